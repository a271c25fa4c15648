"""Log-probabilities by the model as it was before its training, computed once and kept in a file.

    {"examples": "8c1f...", "base": "02ab...", ...}     what they were computed from
    -31.25                                              that of an example, one after another

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
from gpt2c.text.examples import Example, divided

__all__ = ["reference_of"]


def reference_of(
    model: Model,
    examples: Sequence[Example],
    most: int,
    path: Path,
    key: Mapping[str, str],
    untrained: bool,
    check: Callable[[], None] | None = None,
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

    Raises
    ------
    ValueError : numbers are missing and the model is trained already, or they are not finite
    OSError : the file cannot be read or written
    """
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
        return np.array(found)
    if not untrained:
        raise ValueError(
            f"{path} lacks log-probabilities of these examples by the untrained model, and the"
            " run's model is trained already: put the file back, or begin the run again"
        )
    batches, size = [], 0
    for batch in divided(examples, most):  # one that is there in part is computed again
        if size + len(batch) > len(found):
            batches.append(batch)
        else:
            size += len(batch)
    del found[size:]
    with atomic_path(path) as temporary:
        temporary.write_bytes(
            b"".join(lines[: 1 + size]) if size else json.dumps(key).encode() + b"\n"
        )
    with naming(path), open(path, "ab") as file:
        for batch in batches:
            if check:
                check()
            values = log_probabilities(model, batch, keep=False)
            if not np.isfinite(values).all():
                raise ValueError("the untrained model's log-probabilities are not finite numbers")
            found += values.tolist()
            file.write(b"".join(json.dumps(value).encode() + b"\n" for value in values.tolist()))
            file.flush()
        os.fsync(file.fileno())
    return np.array(found)


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
