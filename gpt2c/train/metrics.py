"""metrics.jsonl: one JSON object for each step, exactly one even if the run was stopped.

    {"step": 40, "loss": 4.1, "learning_rate": 0.001, "grad_norm": 0.7, "tokens": 81920, ...}

A number that JSON cannot hold is null. Knows nothing about the meaning of the numbers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2c.files.atomic import atomic_path, naming, refinement
from gpt2c.files.names import DAMAGED_FILE, METRICS_FILE, RESULT_FILE
from gpt2c.files.untrusted import open_file, parse_json, read_json

__all__ = ["Metrics", "read_before", "read_figures", "read_metrics"]

_LONGEST = 1 << 16  # bytes of a line; `Metrics` writes no longer one


class Metrics:
    """The metrics of a run, open for appending.

    Opening drops the lines after `step`, as the run will write them again, and a last line that was
    cut short. A damaged file does not stop the run: its readable lines stay, and the whole file is
    copied to metrics.jsonl.damaged.

    Parameters
    ----------
    path : the file; made if it does not exist
    step : the last step whose line stays, 0 for a new run
    report : called with a line of text if the file was damaged

    Raises
    ------
    OSError : the file cannot be read or written
    """

    def __init__(self, path: Path, step: int, report: Callable[[str], Any]) -> None:
        self.path = path
        kept = bad = last = 0
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for line, entry in _lines(path):
                if entry is None or entry["step"] <= last:
                    bad += 1
                elif entry["step"] <= step:
                    kept, last = kept + 1, entry["step"]
                    file.write(line)
            if bad and kept < step:
                damaged = path.with_name(DAMAGED_FILE)
                with atomic_path(damaged) as copy:
                    shutil.copyfile(path, copy)
                report(
                    f"{path} was damaged: {step - kept} of {step} steps cannot be read; a copy of"
                    f" the damaged file is {damaged}"
                )
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._cut = False  # whether the last line is incomplete

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line; a float that is not finite becomes null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        line = b"\n" * self._cut + json.dumps(finite, allow_nan=False).encode() + b"\n"
        with naming(self.path):
            while line:
                written = os.write(self._descriptor, line)
                line = line[written:]
                self._cut = bool(line)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with naming(self.path), refinement():
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the valid lines, in the order of their steps; others are skipped.

    Raises
    ------
    OSError : the file is missing or unreadable
    """
    entries = {entry["step"]: entry for _, entry in _lines(path, missing_ok=False) if entry}
    return [entries[step] for step in sorted(entries)]


def read_before(out: Path) -> dict[str, float]:
    """Return the figures of a run's base model, which result.json has since step 0, or {}."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = read_json(out / RESULT_FILE).get("before")
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in pairs if type(value) in (int, float)}


def read_figures(out: Path) -> list[dict[str, Any]]:
    """Return a run's metrics for a picture: the evaluation before the first step is step 0.

    Raises
    ------
    OSError : metrics.jsonl is missing or unreadable
    """
    entries, before = read_metrics(out / METRICS_FILE), read_before(out)
    return [{"step": 0, **before}, *entries] if entries and before else entries


def _lines(path: Path, missing_ok: bool = True) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line with its object, or with None if `Metrics` cannot have written it."""
    if missing_ok and not path.exists():
        return
    with open_file(path) as file:
        while line := file.readline(_LONGEST):
            yield line, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = parse_json(line, METRICS_FILE)
        numbers = {k: v for k, v in entry.items() if v is not None}
        finite = all(type(v) in (int, float) and math.isfinite(v) for v in numbers.values())
        step = entry.get("step")
        return entry if finite and type(step) is int and 1 <= step < 10**15 else None
    except (ValueError, OverflowError):  # not JSON; a whole number too large for a float
        return None
