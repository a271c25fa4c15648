"""A run's directory: the files that training writes, and resumes from after a kill at any moment.

    run.json                          settings, config and a fingerprint of the data, before step 1
    checkpoints/00000040/             see checkpoints.py
    config.json, model.safetensors    copies of the newest checkpoint's; with the tokenizer's files
                                      they are a model that transformers can load
    metrics.jsonl, tensorboard/       see metrics and tensorboard
    result.json                       the figures that the run ended with

Here are its lock, its records, and the checks before hours of work depend on it. run.py writes the
rest. Knows nothing about the steps of a run.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from gpt2c.files import atomic
from gpt2c.files.atomic import atomic_path, check_link, through
from gpt2c.files.names import (
    ADAPTER_FILES,
    CHECKPOINTS,
    CONFUSION_FILE,
    DAMAGED_FILE,
    LOSS_FILE,
    METRICS_FILE,
    MODEL_FILES,
    REFERENCE_FILE,
    RESULT_FILE,
    RUN_FILE,
    RUNS_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
)
from gpt2c.files.untrusted import read_json, shown
from gpt2c.formats import peft
from gpt2c.formats.load import config_of
from gpt2c.model.config import ModelConfig
from gpt2c.train import checkpoints
from gpt2c.train.checkpoints import Checkpoint
from gpt2c.train.metrics import read_metrics
from gpt2c.train.optimizer import AdamW

__all__ = [
    "FILES",
    "LOGS",
    "VERSION",
    "check_config",
    "check_never_saved",
    "check_save",
    "copy_model",
    "locked_run",
    "newest_checkpoint",
    "read_record",
    "report",
    "write_result",
]

VERSION = 1  # of run.json
# What a run writes at the top of its directory.
FILES = (RUN_FILE, *MODEL_FILES, *ADAPTER_FILES, *TOKENIZER_FILES, REFERENCE_FILE)
LOGS = (METRICS_FILE, DAMAGED_FILE, LOSS_FILE, RUNS_FILE, RESULT_FILE, CONFUSION_FILE)


def locked_run(out: Path) -> AbstractContextManager[None]:
    """Lock a run's directory for this process; see `atomic.locked`.

    Raises
    ------
    FileNotFoundError : there is no such directory
    BlockingIOError : another process trains into it
    """
    if not out.is_dir():
        check_link(out)
        raise FileNotFoundError(f"{out} is not a directory, so it holds no run to resume")
    return atomic.locked(
        out, f"another process is training into {out}: wait for it, or name another directory"
    )


def report(line: str) -> None:
    """Print a line about a run; if it cannot be printed, the work goes on."""
    with suppress(OSError, ValueError):  # a closed terminal, pipe or file; a full disk
        print(line, flush=True)


def read_record(out: Path, verb: str = "train") -> dict[str, Any]:
    """Read the run.json of a run that `gpt2c verb` began.

    Raises
    ------
    OSError : it is missing or unreadable
    ValueError : it is damaged, or of another version or verb
    """
    path = out / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {out} holds no run to resume")
    record = read_json(path)
    version = record.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {shown(version)}")
    began = record.get("verb", "train")
    if began != verb:
        raise ValueError(
            f"{path}: gpt2c {shown(began)[1:-1]} began this run, so resume it with that"
        )
    for name in ("settings", "config", "data", "backend", "threads"):
        if name not in record:
            raise ValueError(f"{path} lacks {name}")
    return record


def check_save(out: Path, parameters: int, overwrite: bool) -> None:
    """Check that a run's existing directory can take a save, before hours of work depend on it.

    Raises
    ------
    OSError : its files cannot be written: a link to nothing, no permission, or less room on the
        disk than a checkpoint of `parameters` parameters and a copy of its weights need
    """
    directory = out / CHECKPOINTS
    check_link(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; it must be the directory of checkpoints")
    place = directory if directory.is_dir() else out  # where it will be made
    homes = [path.parent for path in atomic.places(*(out / name for name in FILES))]
    for parent in dict.fromkeys((out, place, *homes)):
        trial = atomic.temporary_path(parent / "trial")
        try:
            with atomic.naming(parent, {trial: parent}):
                trial.mkdir(exist_ok=True)
                (trial / "file").write_bytes(b"can be written")
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    # The checkpoints of an overwritten run are removed first.
    left = sum(path.lstat().st_size for path in directory.glob("*/*")) if overwrite else 0
    copy = through(out / WEIGHTS_FILE).parent
    weights = 4 * parameters
    checkpoint = weights + AdamW.state_bytes(parameters)
    wanted = {place: checkpoint, copy: weights}
    if os.stat(copy).st_dev == os.stat(place).st_dev:
        wanted = {place: checkpoint + weights}
    for parent, size in wanted.items():
        disk = shutil.disk_usage(parent)
        if disk.total and disk.free + left < size:  # some file systems report 0 for all
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint needs {size:,} bytes and {disk.free + left:,} are free: make room,"
                " or name another directory",
                str(parent),
            )


def check_never_saved(out: Path) -> None:
    """Refuse to begin a run again if it had checkpoints and none was found.

    Raises
    ------
    FileNotFoundError : the run had a checkpoint
    """
    steps = 0
    with suppress(OSError):
        steps = len(read_metrics(out / METRICS_FILE))
    # A run killed before its first save has an empty directory of checkpoints and no model.
    saved = any((out / name).exists() for name in (WEIGHTS_FILE, ADAPTER_FILES[1]))
    if saved or (steps and not (out / CHECKPOINTS).is_dir()):
        raise FileNotFoundError(
            f"{out} has done {steps:,} steps, but {out / CHECKPOINTS} holds no checkpoint to resume"
            " from: put it back, or begin the run again with --overwrite"
        )
    if steps:
        report(f"{out} had no checkpoint yet: it begins again with its first step")


def check_config(source: Path, entries: Any, config: ModelConfig) -> None:
    """Refuse a run of another model before the model is built.

    Raises
    ------
    ValueError : `entries`, from the file `source`, are not those of `config`
    """
    try:
        found = config_of(entries) if isinstance(entries, dict) else None
    except ValueError as error:
        raise ValueError(f"{source}: its config is invalid: {error}") from None
    own, wanted = _fields(found), _fields(dataclasses.replace(config, lora=None))  # type: ignore[type-var]
    for name, value in wanted.items():
        if own.get(name) != value:
            raise ValueError(
                f"{source} holds a model of another config: its {name} is {shown(own.get(name))},"
                f" and what the run is given now makes it {shown(value)}"
            )


def _fields(config: ModelConfig | None) -> dict[str, Any]:
    """Return the kind and the fields of a config, {} of none."""
    if config is None:
        return {}
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return {name: getattr(config, name) for name in ("model_type", *names)}


def newest_checkpoint(
    out: Path, record: Mapping[str, Any], config: ModelConfig
) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run that is resumed; None if it begins again.

    Raises
    ------
    OSError, ValueError : see `checkpoints.newest`, `check_config` and `check_never_saved`
    """
    check_config(out / RUN_FILE, record["config"], config)
    check_link(out / CHECKPOINTS)
    found = checkpoints.newest(out / CHECKPOINTS, report)
    if found is None:
        check_never_saved(out)
    elif found.adapters is not None:
        lora, _ = peft.adapters_of(found.adapters, config)
        if lora != config.lora:
            raise ValueError(f"{found.path} holds {lora}; its settings give {config.lora}")
    else:
        check_config(found.path, found.config, config)
    return found


def copy_model(checkpoint: Path, out: Path) -> None:
    """Copy the model of a checkpoint: a link would let other programs write into it."""
    for source in checkpoints.model_files(checkpoint):
        with atomic_path(out / source.name) as temporary:
            shutil.copyfile(source, temporary)


def write_result(out: Path, verb: str, entries: Mapping[str, Any]) -> None:
    """Write result.json; numbers that JSON lacks become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(entry) for name, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    version = {"gpt2c": importlib.metadata.version("gpt2c")}
    text = json.dumps(plain({"verb": verb, "versions": version, **entries}), indent=2)
    with atomic_path(out / RESULT_FILE) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
