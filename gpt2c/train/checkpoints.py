"""Checkpoints of a run, which resumes from the newest whole one, bit for bit.

    00000040/config.json, model.safetensors   the model of step 40, as transformers loads it; or
    00000040/adapter_config.json, adapter_model.safetensors    its adapters, as PEFT loads them
    00000040/trainer.safetensors              the arrays of the optimizer's state, by name
    00000040/state.json                       the counts, and size and SHA-256 of the other files

A checkpoint gets its name only when all of it is on the disk. Knows nothing about models: tensors
are named arrays, a configuration is a dict.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.atomic import atomic_directory, atomic_path, naming, reason, remove
from gpt2c.files.names import (
    ADAPTER_FILES,
    CONFIG_FILE,
    MOMENTS_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
)
from gpt2c.files.tensors import read_tensors, write_tensors
from gpt2c.files.untrusted import open_file, read_json, shown
from gpt2c.formats.huggingface import load_weights, read_config
from gpt2c.formats.load import model_kind
from gpt2c.formats.peft import Stored, read_adapter

__all__ = [
    "Checkpoint",
    "TrainerState",
    "amend",
    "before",
    "clear",
    "model_files",
    "newest",
    "prune",
    "save",
]

VERSION = 1
_NAME = re.compile(r"\d{8,15}")


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """The progress of a run, without its tensors; the rest follows from settings and step.

    Parameters
    ----------
    step : the number of steps done, with the skipped ones
    skipped : the number of steps without an update; the optimizer has taken step - skipped
    seconds : time spent in steps, by all processes of the run
    val_loss : of these weights, in nats per token; None if they were not evaluated
    entry : the step's metrics while its evaluation is due: metrics.jsonl does not have them yet
    tokens : the number of tokens in the steps done

    Raises
    ------
    ValueError : a number has another type or is out of range
    """

    step: int
    skipped: int = 0
    seconds: float = 0.0
    val_loss: float | None = None
    entry: dict[str, Any] | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        for name, most in (("step", 10**15 - 1), ("skipped", self.step), ("tokens", 10**18)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(
                    f"{name} must be a whole number in [0, {most}], got {shown(value)}"
                )
        for name in ("seconds", "val_loss"):
            value = getattr(self, name)
            if value is None and name == "val_loss":
                continue
            if type(value) is not float or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {shown(value)}")
        if self.entry is not None:
            kinds = (
                {type(v) for v in self.entry.values()} if isinstance(self.entry, dict) else {str}
            )
            if not kinds <= {int, float} or self.entry.get("step") != self.step:
                raise ValueError(f"entry must be the metrics of the step, got {shown(self.entry)}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read. Tensors may be mapped from files.

    Attributes
    ----------
    path, state : of the checkpoint
    config, tensors : of the whole model; empty beside adapters
    adapters : in place of these, or None
    optimizer : its state, name -> array
    """

    path: Path
    state: TrainerState
    config: dict[str, Any]
    tensors: Mapping[str, Any]
    adapters: Stored | None
    optimizer: Mapping[str, Any]


def save(
    directory: Path,
    state: TrainerState,
    write: Callable[[Path], object],
    optimizer: Mapping[str, NDArray[np.float32]],
) -> Path:
    """Write a checkpoint beside the others; return its path.

    Parameters
    ----------
    directory : of the run's checkpoints, made if it does not exist
    write : writes the model's files into a directory, as `GPT2.save_pretrained`
    optimizer : its state, name -> float32 array

    Raises
    ------
    OSError : it cannot be written (a full disk, ...); the other checkpoints are unchanged
    """
    directory.mkdir(exist_ok=True)
    path = directory / f"{state.step:08d}"
    with atomic_directory(path) as temporary:
        write(temporary)
        write_tensors(temporary / MOMENTS_FILE, optimizer, {"format": "gpt2c"})
        files = {file.name: _sum(file) for file in sorted(temporary.iterdir())}
        (temporary / STATE_FILE).write_text(_text(state, files), encoding="utf-8")
    return path


def amend(path: Path, state: TrainerState) -> None:
    """Replace the state of a checkpoint, after an evaluation of its weights.

    Raises
    ------
    OSError : it cannot be written; the checkpoint is unchanged
    """
    text = _text(state, read_json(path / STATE_FILE)["files"])
    with atomic_path(path / STATE_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _text(state: TrainerState, files: Mapping[str, Any]) -> str:
    fields = {k: v for k, v in dataclasses.asdict(state).items() if k != "entry" or v is not None}
    summed = {"state": fields, "files": files}
    content = {"version": VERSION, "sha256": _sum_of(summed), **summed}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def prune(newest: Path, keep: int) -> None:
    """Remove the checkpoints up to `newest`, except the last `keep` >= 1; the oldest first."""
    done = [path for path in _steps(newest.parent) if int(path.name) <= int(newest.name)]
    for path in reversed(done[keep:]):
        remove(path)


def clear(directory: Path) -> None:
    """Remove all checkpoints, also damaged ones; the directory and other files stay."""
    for path in list(directory.iterdir()):
        if _NAME.fullmatch(path.name.partition(".damaged")[0]):
            remove(path)


def before(checkpoint: Path) -> Path | None:
    """Return the checkpoint before this one, None if it is the first."""
    older = [p for p in _steps(checkpoint.parent) if int(p.name) < int(checkpoint.name)]
    return older[0] if older else None


def newest(directory: Path, report: Callable[[str], Any]) -> Checkpoint | None:
    """Read the newest whole checkpoint; None if there is no checkpoint at all.

    Newer ones, which lack a file or have changed since they were written, are renamed.

    Parameters
    ----------
    report : called with a line for each newer checkpoint that was not used, and the reason

    Raises
    ------
    OSError : existing files of one cannot be read (no permission, a failing disk): it may be whole
    ValueError : there are checkpoints, but none is whole; one has another version
    """
    faults = {}
    for path in _steps(directory):
        try:
            with naming(path):
                found = _read(path)
        except _OtherVersion:
            raise
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            faults[path] = f"{path} is not whole: {reason(error)}"
            continue
        for damaged, fault in faults.items():
            aside = _aside(damaged)
            report(f"{fault}; it is kept as {aside.name}, going on from {found.path}")
        return found
    if faults:
        first = next(iter(faults.values()))
        raise ValueError(
            f"no checkpoint of the run can be read ({first}); put a whole one into {directory}, or"
            " begin the run again with --overwrite"
        )
    return None


def model_files(path: Path) -> list[Path]:
    """Return the model's files of a checkpoint, the weights last."""
    return sorted(file for file in path.iterdir() if file.name not in (MOMENTS_FILE, STATE_FILE))


def _steps(directory: Path) -> list[Path]:
    """Return the checkpoints, the newest first, whole or not."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name), reverse=True)


def _aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that no later one replaces it nor `prune` removes it."""
    names = (f"{path.name}.damaged{n if n > 1 else ''}" for n in count(1))
    free = next(name for name in names if not os.path.lexists(path.with_name(name)))
    shutil.move(path, path.with_name(free))  # copies if the directory cannot be renamed
    return path.with_name(free)


class _OtherVersion(ValueError):
    """Another version of gpt2c wrote the checkpoint; it is not damaged."""


def _read(path: Path) -> Checkpoint:
    content = read_json(path / STATE_FILE)
    version = content.get("version")
    if type(version) is int and version != VERSION:
        raise _OtherVersion(
            f"{path / STATE_FILE} is of version {shown(version)}, wanted {VERSION}: continue with"
            f" the gpt2c that wrote it, or move {path} away"
        )
    if type(version) is not int:
        raise ValueError(f"{STATE_FILE} is of version {shown(version)}, wanted {VERSION}")
    if content.keys() != {"version", "sha256", "state", "files"}:
        raise ValueError(f"{STATE_FILE} must hold version, sha256, state and files")
    summed = {name: content[name] for name in ("state", "files")}
    if content["sha256"] != _sum_of(summed):
        raise ValueError(f"{STATE_FILE} is damaged: its SHA-256 is not the one that it records")
    _check_files(path, content["files"])
    try:
        state = TrainerState(**content["state"])
    except TypeError as error:
        raise ValueError(f"{STATE_FILE} has a state of other fields: {error}") from None
    except ValueError as error:
        raise ValueError(f"{STATE_FILE}: {error}") from None
    if int(path.name) != state.step:
        raise ValueError(f"{STATE_FILE} is of step {state.step}")
    optimizer, _ = read_tensors(path / MOMENTS_FILE)
    if model_kind(path) == "adapters":
        return Checkpoint(path, state, {}, {}, read_adapter(path), optimizer)
    entries, _ = read_config(path)
    return Checkpoint(path, state, entries, load_weights(path, entries), None, optimizer)


def _check_files(path: Path, files: Any) -> None:
    """Compare the files of a checkpoint with the sizes and SHA-256 in its state."""
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"{STATE_FILE}: files must be an object of objects")
    model = set(ADAPTER_FILES) if ADAPTER_FILES[0] in files else {CONFIG_FILE, WEIGHTS_FILE}
    missing = (model | {MOMENTS_FILE}) - files.keys()
    if missing:
        raise ValueError(f"{STATE_FILE}: files lacks {min(missing)}")
    for name, wanted in files.items():
        if name != os.path.basename(name):
            raise ValueError(f"{STATE_FILE} names a file that is not beside it: {shown(name)}")
        size = (path / name).stat().st_size
        if size != wanted.get("size"):
            raise ValueError(f"{name} has {size} bytes, not {shown(wanted.get('size'))}")
        if _sum(path / name) != wanted:
            raise ValueError(
                f"{name} is damaged: its SHA-256 is not the one that {STATE_FILE} records"
            )


def _sum(path: Path) -> dict[str, Any]:
    with open_file(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def _sum_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
