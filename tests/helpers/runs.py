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
