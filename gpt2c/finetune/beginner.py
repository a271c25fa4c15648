"""A beginner at a task, from nothing: reinforcement learning sharpens what it sometimes gets right.

base   a small model, pretrained on the text of a careless teacher, wrong in three of ten
sft    fine-tuned on other examples of that teacher: it learns the answers, not the prompts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2c.finetune.sft import sft
from gpt2c.finetune.tasks import examples
from gpt2c.text.prepare import prepare
from gpt2c.train.pretrain import train

__all__ = ["CARELESS", "SFT", "beginner", "careless_examples"]

CARELESS = 0.3  # the share of the teacher's answers that are wrong
TEXTS = 12_000  # lines of the text that the base reads
BASE: dict[str, Any] = {
    **{"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "batch_size": 64},
    **{"learning_rate": 3e-3, "min_lr": 3e-4, "beta2": 0.99, "max_iters": 300, "warmup_iters": 30},
    **{"eval_interval": 0, "log_interval": 100},
}
SFT: dict[str, Any] = {
    **{"learning_rate": 3e-3, "beta2": 0.99, "batch_size": 64, "weight_decay": 0.1},
    **{"val_fraction": 0.02, "log_interval": 100},
}
EXAMPLES = 24_000  # that the beginner learns from, each once


def careless_examples(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return examples of the careless teacher, see `tasks.examples`."""
    return examples(task, "train", count, seed, CARELESS)


def beginner(
    task: str, out: Path, seed: int = 1337, overwrite: bool = False, **given: Any
) -> Path | None:
    """Train a beginner at a task; return its directory, `out`/sft, or None if a signal ended it.

    Parameters
    ----------
    task : of `tasks.TASKS`
    out : gets text, base and sft
    seed : of the weights and the examples
    overwrite : they may hold files
    given : settings of the runs that both have, such as threads

    Raises
    ------
    OSError, ValueError : see `prepare`, `train` and `sft`
    """
    text = [one["prompt"] + one["completion"] for one in careless_examples(task, TEXTS, seed + 1)]
    prepare(text, out / "text", "bytes", overwrite=overwrite)
    given = given | {"seed": seed}
    if train(out / "text", out / "base", BASE | given, overwrite=overwrite).interrupted:
        return None
    taught = careless_examples(task, EXAMPLES, seed)
    done = sft(out / "base", taught, out / "sft", overwrite=overwrite, **SFT | given)
    return None if done.interrupted else out / "sft"
