"""The settings that the functions of fine-tuning take, by name and type, for a type checker.

A checker cannot read them from the dataclasses, which have defaults, ranges and help. So each class
of settings has its TypedDict here, and a test compares the two.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from gpt2c.kernels.backend import BackendName, Precision
from gpt2c.train.optimizer import ScheduleKind

__all__ = [
    "ClassifyGiven",
    "DPOGiven",
    "DistillGiven",
    "FinetuneGiven",
    "GRPOGiven",
    "RewardGiven",
    "SFTGiven",
]


class FinetuneGiven(TypedDict, total=False):
    """The settings of every method, see `FinetuneSettings`."""

    dropout: float
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    schedule: ScheduleKind
    min_lr: float
    decay_fraction: float
    step_size: int
    gamma: float
    max_iters: int
    eval_interval: int
    log_interval: int
    save_interval: int
    save_minutes: float
    keep: int
    skip_nonfinite: bool
    tensorboard: bool
    seed: int
    backend: BackendName
    threads: int
    recompute: Literal["none", "light", "full"]
    precision: Precision
    zero: Literal[0, 1]
    transport: Literal["fp32", "bf16"]
    mpi_timeout: float
    freeze: str
    random_weights: bool
    keep_zeros: bool
    warmup_ratio: float
    max_epochs: float
    batch_size: int
    batch_tokens: int
    max_length: int
    val_fraction: float
    group_field: str
    lora: bool
    lora_r: int
    lora_alpha: float
    lora_targets: str
    quantize: Literal["none", "int8", "fp16"]


class SupervisedGiven(FinetuneGiven, total=False):
    """The settings of methods that learn from answers, see `SupervisedSettings`."""

    prompt_field: str
    completion_field: str
    text_field: str


class SFTGiven(SupervisedGiven, total=False):
    """The settings of `sft`, see `SFTSettings`."""

    eval_answers: int


class DistillGiven(SupervisedGiven, total=False):
    """The settings of `distill`, see `DistillSettings`."""

    n_layer: int
    n_head: int
    n_embd: int
    kd_ratio: float
    temperature: float
    beta: float
    lmbda: float
    max_new_tokens: int


class ClassifyGiven(FinetuneGiven, total=False):
    """The settings of `classify`, see `ClassifySettings`."""

    test_fraction: float
    folds: int
    class_weights: Literal["none", "balanced"]
    text_field: str
    label_field: str


class JudgingGiven(FinetuneGiven, total=False):
    """The settings of methods that learn from preferences, see `JudgingSettings`."""

    prompt_field: str
    chosen_field: str
    rejected_field: str


class RewardGiven(JudgingGiven, total=False):
    """The settings of `reward`, see `RewardSettings`."""

    center_rewards_coefficient: float


class DPOGiven(JudgingGiven, total=False):
    """The settings of `dpo`, see `DPOSettings`."""

    completion_field: str
    label_field: str
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "kto"]
    beta: float
    label_smoothing: float
    simpo_gamma: float
    sft_weight: float
    desirable_weight: float
    undesirable_weight: float


class GRPOGiven(FinetuneGiven, total=False):
    """The settings of `grpo`, see `GRPOSettings`."""

    task: str
    task_prompts: int
    prompt_field: str
    reward: str
    reward_weights: str
    algorithm: Literal["grpo", "rloo", "reinforce", "ppo", "rft"]
    loss_type: Literal["dapo", "dr_grpo", "grpo", "bnpo"]
    scale_rewards: Literal["group", "batch", "none"]
    num_generations: int
    max_completion_length: int
    temperature: float
    num_iterations: int
    epsilon: float
    epsilon_high: float
    beta: float
    kl_estimator: Literal["k2", "k3"]
    mask_truncated_completions: bool
    rollouts: Literal["fp32", "fp16", "int8"]
    vf_coef: float
    cliprange_value: float
    lam: float
    threshold: float
    least_pass: float
    eval_prompts: int
