"""Batches of completions that several updates learn from, on disk while a run may need them.

A run that was stopped between two updates on the same completions goes on with these: it cannot
sample them again, because the weights have changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.atomic import atomic_path
from gpt2c.files.names import CHECKPOINTS
from gpt2c.finetune.policy import Tokens

__all__ = ["Batch", "load", "store"]

Floats = NDArray[np.float64]
DIRECTORY = "rollouts"


class Batch(NamedTuple):
    """What updates on the completions of a step learn from.

    Attributes
    ----------
    ids : token ids of the completions that are learned from, each with its prompt
    tokens : what is known of the targets (N,), completion after completion
    targets : (N,) int32, -1 in prompts
    sampled : (N,) the sampler's log-probabilities
    read : the number of tokens of all completions and their prompts
    metrics : figures of the completions
    """

    ids: list[NDArray[np.int32]]
    tokens: Tokens
    targets: NDArray[np.int32]
    sampled: Floats
    read: int
    metrics: dict[str, float]


def store(out: Path, cycle: int, batch: Batch) -> None:
    """Write the batch of a cycle; remove those that no checkpoint needs any more.

    Raises
    ------
    OSError : it cannot be written
    """
    directory = out / DIRECTORY
    directory.mkdir(exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {
        name: value for name, value in batch.tokens._asdict().items() if value is not None
    }
    arrays["lengths"] = np.array([len(ids) for ids in batch.ids], np.int64)
    arrays["ids"] = np.concatenate([np.zeros(0, np.int32), *batch.ids])
    arrays["targets"], arrays["sampler"] = batch.targets, batch.sampled
    arrays["json"] = np.array(json.dumps([batch.read, batch.metrics]))
    with atomic_path(directory / f"{cycle:08d}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
