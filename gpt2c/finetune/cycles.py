"""Experience: completions that several updates learn from, on disk while a run may need them.

A run that was stopped between two updates on the same completions continues with these: it cannot
sample them again, because the weights have changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.atomic import atomic_path
from gpt2c.files.names import ROLLOUTS
from gpt2c.files.tensors import map_tensors, write_tensors
from gpt2c.finetune.policy import TokenFacts
from gpt2c.parallel.world import ALONE, World

__all__ = ["Experience", "load", "prune", "store"]

Floats = NDArray[np.float64]


class Experience(NamedTuple):
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
    tokens: TokenFacts
    targets: NDArray[np.int32]
    sampled: Floats
    read: int
    metrics: dict[str, float]


def store(out: Path, cycle: int, batch: Experience) -> None:
    """Write what a cycle of updates learns from.

    Raises
    ------
    OSError : it cannot be written
    """
    (out / ROLLOUTS).mkdir(exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {
        **{name: value for name, value in batch.tokens._asdict().items() if value is not None},
        "lengths": np.array([len(ids) for ids in batch.ids]),
        "ids": np.concatenate([np.zeros(0), *batch.ids]),
        "targets": batch.targets,
        "sampler": batch.sampled,
    }
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}  # exact for ids too
    with atomic_path(_path(out, cycle)) as temporary:
        write_tensors(
            temporary, wide, {"read": str(batch.read), "figures": json.dumps(batch.metrics)}
        )


def load(out: Path, cycle: int, world: World = ALONE) -> Experience:
    """Read what a cycle of updates learns from; rank 0 reads it for all.

    Raises
    ------
    OSError : it is missing or unreadable
    ValueError : it is damaged
    """
    path = _path(out, cycle)

    def stored() -> tuple[dict[str, list[float]], dict[str, str]]:
        found, metadata = map_tensors(path, dtypes=("F64",))
        return {name: tensor.data.tolist() for name, tensor in found.items()}, metadata

    lists, metadata = world.by_first(stored)
    arrays: dict[str, NDArray[Any]] = {name: np.array(values) for name, values in lists.items()}
    try:
        lengths, ids = (arrays.pop(name).astype(np.int32) for name in ("lengths", "ids"))
        targets, sampled = arrays.pop("targets").astype(np.int32), arrays.pop("sampler")
        figures, read = json.loads(metadata["figures"]), int(metadata["read"])
        tokens = TokenFacts(**arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.70}") from None
    if {len(part) for part in (targets, sampled, *arrays.values())} != {
        lengths.sum() - len(lengths)
    }:
        raise ValueError(f"{path} is damaged: its arrays have different lengths")
    each = np.split(ids, lengths.cumsum())[:-1]  # of no completions none
    return Experience(each, tokens, targets, sampled, read, figures)


def prune(out: Path, first: int) -> None:
    """Remove the files of cycles before `first`."""
    for path in (out / ROLLOUTS).glob("*.safetensors"):
        if path.stem.isdigit() and int(path.stem) < first:
            path.unlink(missing_ok=True)


def _path(out: Path, cycle: int) -> Path:
    return out / ROLLOUTS / f"{cycle:08d}.safetensors"
