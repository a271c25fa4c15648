"""Log-probabilities by the model as it was before its training, computed once and kept in a file.

    {"examples": "8c1f...", "base": "02ab...", ...}     what they were computed from
    [-31.25, -17.5, ...]                                those of a batch, batch after batch

A line is whole or is computed again, so a run that was killed goes on in the middle. Numbers of
other examples or of another model are never taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.atomic import atomic_path, naming
from gpt2c.files.untrusted import open_file
from gpt2c.finetune.completions import log_probabilities
from gpt2c.model.model import Model
from gpt2c.text.examples import Example

__all__ = ["REFERENCE_FILE", "reference_of"]

REFERENCE_FILE = "reference.jsonl"


def reference_of(
    model: Model,
    batches: Sequence[Sequence[Example]],
    path: Path,
    key: Mapping[str, str],
    untrained: bool,
    check: Callable[[], None] | None = None,
) -> NDArray[np.float64]:
    """Return the log-probabilities of all completions by the untrained model, batch after batch.

    Those that the file has are read; the others are computed and written to it.

    Parameters
    ----------
    batches : of examples that are computed together
    path : of the file
    key : identifies the examples and the untrained model
    untrained : whether `model` is the untrained one, which can compute what is missing
    check : called before each batch; if it raises, the file keeps what is done

    Raises
    ------
    ValueError : numbers are missing and the model is trained already, or they are not finite
    OSError : the file cannot be read or written
    """
    lines = _lines(path)
    if lines and _parsed(lines[0], dict, {}) != key:
        lines = []
    found: list[list[float]] = []
    for batch, line in zip(batches, lines[1:], strict=False):
        values = _parsed(line, list, [])
        if len(values) != len(batch) or not all(type(value) is float for value in values):
            break
        found.append(values)
    if len(found) == len(batches):
        return np.concatenate(found)
    if not untrained:
        raise ValueError(
            f"{path} lacks log-probabilities of these examples by the untrained model, and the"
            " run's model is trained already: put the file back, or begin the run again"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(
            b"".join(lines[: 1 + len(found)]) if found else json.dumps(key).encode() + b"\n"
        )
    with naming(path), open(path, "ab") as file:
        for batch in batches[len(found) :]:
            if check:
                check()
            values = log_probabilities(model, batch)
            if not np.isfinite(values).all():
                raise ValueError("the untrained model's log-probabilities are not finite numbers")
            found.append(values.tolist())
            file.write(json.dumps(found[-1], allow_nan=False).encode() + b"\n")
            file.flush()
        os.fsync(file.fileno())
    return np.concatenate(found)


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
