"""Log-probabilities by the model as it was before its training, computed once and kept in a file.

    {"examples": "8c1f...", "base": "02ab...", ...}     what they were computed from
    -31.25                                              that of an example, one after another

A line is whole or is computed again, so a run that was killed continues in the middle. Numbers of
other examples or of another model are never taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.atomic import atomic_path, naming
from gpt2c.files.untrusted import open_file
from gpt2c.finetune.completions import log_probabilities
from gpt2c.model.model import Model
from gpt2c.parallel.world import ALONE, World
from gpt2c.text.examples import Example, divided
from gpt2c.train.stop import Check

__all__ = ["reference_of"]


def reference_of(
    model: Model,
    examples: Sequence[Example],
    most: int,
    path: Path,
    key: Mapping[str, str],
    untrained: bool,
    check: Check | None = None,
    world: World = ALONE,
) -> NDArray[np.float64]:
    """Return the log-probabilities (N,) of all completions by the untrained model.

    Those that the file has are read; the others are computed and written to it.

    Parameters
    ----------
    examples : N
    most : the most tokens that are read at once; the file does not depend on it
    path : of the file
    key : identifies the examples and the untrained model
    untrained : whether `model` is the untrained one, which can compute what is missing
    check : called before each batch; if it raises, the file keeps what is done
    world : its ranks share the batches; the file is rank 0's

    Raises
    ------
    ValueError : numbers are missing and the model is trained already, or they are not finite
    OSError : the file cannot be read or written
    """
    found = world.by_first(lambda: _kept(examples, most, path, key, untrained))
    batches, size = [], 0
    for batch in divided(examples, most):
        if size >= len(found):
            batches.append(batch)
        size += len(batch)
    if not batches:
        return np.array(found)
    with naming(path), open(path, "ab") if world.rank == 0 else nullcontext() as file:
        for start in range(0, len(batches), world.size):
            if check:
                check()
            own = batches[start + world.rank : start + world.rank + 1]
            values = [log_probabilities(model, batch, keep=False).tolist() for batch in own]
            new = [value for some in world.all(values) for each in some for value in each]
            if not np.isfinite(new).all():
                with world.agreement():
                    raise ValueError(
                        "the untrained model's log-probabilities are not finite numbers"
                    )
            found += new
            if file is not None:
                file.write(b"".join(json.dumps(value).encode() + b"\n" for value in new))
                file.flush()
        if file is not None:
            os.fsync(file.fileno())
    return np.array(found)


def _kept(
    examples: Sequence[Example], most: int, path: Path, key: Mapping[str, str], untrained: bool
) -> list[float]:
    """Return the numbers of whole batches that the file has, and remove the rest from it."""
    lines = _lines(path)
    if lines and _parsed(lines[0], dict, {}) != key:
        lines = []
    found: list[float] = []
    for line in lines[1 : 1 + len(examples)]:
        value = _parsed(line, float, None)
        if value is None:
            break
        found.append(value)
    if len(found) == len(examples):
        return found
    if not untrained:
        raise ValueError(
            f"{path} lacks log-probabilities of these examples by the untrained model, and the"
            " run's model is trained already: put the file back, or begin the run again"
        )
    size = 0
    for batch in divided(examples, most):  # one that is there in part is computed again
        if size + len(batch) > len(found):
            break
        size += len(batch)
    with atomic_path(path) as temporary:
        temporary.write_bytes(
            b"".join(lines[: 1 + size]) if size else json.dumps(key).encode() + b"\n"
        )
    return found[:size]


def _lines(path: Path) -> list[bytes]:
    """Return the whole lines of a file, none if there is no file."""
    if not path.exists():
        return []
    with open_file(path) as file:
        return [line for line in file if line.endswith(b"\n")]


def _parsed(line: bytes, kind: type, other: Any) -> Any:
    """Return the JSON of a line, or `other` if it is not of this kind."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return other
    return value if isinstance(value, kind) else other
