"""FinetuneSettings: the settings that all methods of fine-tuning share.

Names are nanoGPT's, and TRL's where nanoGPT has none. Defaults fit a pretrained model of 124
million parameters; small models of one's own take about what `--help` says.
Adapters take ten times the rate, unless another is given.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

from gpt2c.model.lora import TARGETS, LoRA
from gpt2c.model.quantized import check_method
from gpt2c.train.settings import Settings, setting

__all__ = ["FinetuneSettings", "rate"]


def rate(default: float, small: float = 1e-3) -> float:
    """Make the field learning_rate: its default, and about what small models take."""
    field: Any = setting(
        "optimizer", default, f"the highest learning rate; small models take about {small:g}"
    )
    rate: float = dataclasses.field(default=default, metadata={**field.metadata, "small": small})
    return rate


@dataclasses.dataclass(frozen=True)
class FinetuneSettings(Settings):
    """The settings of a run that begins with a trained model.

    Raises
    ------
    ValueError : a setting is out of range, or the schedule refuses it
    """

    freeze: str = setting(
        *("model", "", 'parameters that stay as they are, such as "wte.*,h.[0-3].*"'),
        older="",
        fixed=True,
    )
    random_weights: bool = setting(
        *("model", False, "begin with random weights, not the base's: what is the base worth?"),
        older=False,
        fixed=True,
    )
    learning_rate: float = rate(2e-5)
    weight_decay: float = setting("optimizer", 0.0, "AdamW's weight decay, of matrices only")
    beta2: float = setting(
        "optimizer", 0.999, "AdamW's decay rate for the mean of squared gradients"
    )
    keep_zeros: bool = setting(
        *("optimizer", False, "weights of matrices that are 0 in the base stay 0, as pruned ones"),
        older=False,
        fixed=True,
    )
    schedule: str = setting("schedule", "linear", Settings.fields()["schedule"].metadata["help"])
    min_lr: float = setting("schedule", 0.0, "the lowest learning rate, at the end")
    warmup_ratio: float = setting("schedule", 0.03, "the share of all steps that warm up")
    max_iters: int = setting(
        "run", 0, "steps of the optimizer; 0: as many as max-epochs takes", least=0
    )
    max_epochs: float = setting("run", 1.0, "how often each example is learned")
    eval_interval: int = setting(
        "run", 0, "steps between two evaluations; 0: after each epoch", least=0
    )
    batch_size: int = setting("data", 8, "examples in a step", least=1, fixed=True)
    batch_tokens: int = setting(
        "data", 4096, "the most tokens that are read at once; it changes memory alone", least=1
    )
    max_length: int = setting(
        *("data", 0, "the most tokens of an example; 0: the model's context"), least=0, fixed=True
    )
    val_fraction: float = setting(
        "data", 0.05, "the share of the examples that is held out", least=0, fixed=True
    )
    group_field: str = setting(
        *("data", "", "a field: examples that have the same one are on one side of a split"),
        older="",
        fixed=True,
    )
    lora: bool = setting(
        "lora", False, "train low-rank adapters, not the model", older=False, fixed=True
    )
    lora_r: int = setting("lora", 8, "the adapters' rank", least=1, older=8, fixed=True)
    lora_alpha: float = setting(
        "lora", 16.0, "the adapters' output is multiplied by alpha / r", older=16.0, fixed=True
    )
    lora_targets: str = setting(
        *("lora", ",".join(TARGETS), "linear layers that have adapters: ends of names"),
        older=",".join(TARGETS),
        fixed=True,
    )
    quantize: str = setting(
        *("lora", "none", "int8 or fp16: hold the model in 8 or 16 bits under adapters"),
        older="none",
        fixed=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize != "none":
            check_method(self.quantize)
            if not self.lora:
                raise ValueError("quantize needs lora: weights of 16 or 8 bits are not trained")
        if self.keep_zeros and self.lora:
            raise ValueError("keep_zeros is for whole models: merged adapters would fill the zeros")
        for name in ("val_fraction", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.max_epochs > 0:
            raise ValueError(f"max_epochs must be above 0, got {self.max_epochs}")
        if self.max_iters:
            self.learning_rates()

    @property
    def names(self) -> dict[str, str]:
        """The names that fields have in the records, by ours; see `read_records`."""
        ending = "_field"
        names = [name for name in self.fields() if name.endswith(ending)]
        names.remove("group_field")  # it gives no field another name
        return {name.removesuffix(ending): getattr(self, name) for name in names}

    @property
    def adapters(self) -> LoRA | None:
        """The adapters that are trained, or None."""
        if not self.lora:
            return None
        targets = tuple(target.strip() for target in self.lora_targets.split(","))
        return LoRA(self.lora_r, self.lora_alpha, targets)

    @property
    def warmup(self) -> int:
        """The steps of linear warm-up."""
        return math.ceil(self.warmup_ratio * self.max_iters)

    def planned(self, examples: int) -> Self:
        """Return the settings with the steps that these epochs of so many examples take.

        Examples
        --------
        >>> gpt2c.finetune.SFTSettings(batch_size=8, max_epochs=2.0).planned(examples=100).max_iters
        25
        """
        epoch = math.ceil(examples / self.batch_size)
        return dataclasses.replace(
            self,
            max_iters=self.max_iters or math.ceil(self.max_epochs * examples / self.batch_size),
            eval_interval=self.eval_interval or epoch,
        )
