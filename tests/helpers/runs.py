"""Training runs of a tiny model, and what tests look at in a run's directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_nothing

from gpt2c.train import pretrain
from gpt2c.train.loop import TrainResult
from helpers.kills import TINY, contents

# All settings of the first version's run.json. None is ever added here: a later setting declares
# its value for such a run.
FIRST: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4,
    "gradient_accumulation_steps": 2, "max_iters": 3, "learning_rate": 0.01, "min_lr": 0.001,
    "warmup_iters": 0, "schedule": "constant", "decay_fraction": 0.2, "step_size": 1000,
    "gamma": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "eval_interval": 0, "eval_iters": 0, "log_interval": 10, "save_interval": 0, "keep": 1,
    "skip_nonfinite": False, "tensorboard": False, "seed": 1337, "backend": "auto",
    "recompute": "none",
}  # fmt: skip

# The names of the settings in the first run.json of each method of fine-tuning: those of every
# method, and its own. None is ever added here either.
FIRST_TUNED = frozenset(
    "learning_rate weight_decay beta1 beta2 grad_clip dropout schedule min_lr decay_fraction"
    " step_size gamma warmup_ratio max_iters max_epochs eval_interval log_interval save_interval"
    " save_minutes keep skip_nonfinite tensorboard seed backend threads recompute precision"
    " batch_size batch_tokens max_length val_fraction".split()
)
FIRST_OWN = {
    "sft": "prompt_field completion_field text_field eval_answers",
    "classify": "freeze group_field test_fraction folds class_weights text_field label_field",
    "reward": "prompt_field chosen_field rejected_field center_rewards_coefficient",
    "dpo": "prompt_field chosen_field rejected_field completion_field label_field loss_type beta"
    " label_smoothing simpo_gamma sft_weight desirable_weight undesirable_weight",
    "distill": "freeze random_weights keep_zeros prompt_field completion_field text_field n_layer"
    " n_head n_embd kd_ratio temperature beta lmbda max_new_tokens",
    "grpo": "task task_prompts prompt_field reward reward_weights algorithm loss_type"
    " scale_rewards num_generations max_completion_length temperature num_iterations epsilon"
    " epsilon_high beta kl_estimator mask_truncated_completions rollouts vf_coef cliprange_value"
    " lam threshold least_pass eval_prompts",
}


def train(data: Path, out: Path, *, resume: bool = False, **changes: Any) -> TrainResult:
    """Train 20 steps with TINY and these changes; a resumed run gets the changes alone."""
    given = changes if resume else TINY | changes
    overwrite = bool(given.pop("overwrite", False))
    return pretrain.train(data, out, given, resume=resume, overwrite=overwrite)


def train_short(data: Path, out: Path, *, resume: bool = False, **changes: Any) -> TrainResult:
    """Train 8 steps, with an evaluation after every four; see `train`."""
    shorter = {} if resume else {"max_iters": 8, "eval_interval": 4}
    return train(data, out, resume=resume, **shorter | changes)


def resume_and_compare(
    data: Path, out: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainResult:
    """Resume a run without the test's patches, and compare all bits with an uninterrupted run."""
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    result = train(data, out, resume=True)
    assert contents(out) == contents(whole)
    return result


def checkpoint_names(out: Path) -> list[str]:
    """Return the names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def files_below(out: Path) -> dict[Path, bytes]:
    """Return the content of each file below a directory."""
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def fail(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises an error."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return call
