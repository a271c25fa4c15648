"""Errors in a step: a run saves its last whole step, and never lost weights."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from helpers.kills import contents
from helpers.runs import checkpoint_names, resume_and_compare, train_short

from gpt2c.gpt2 import GPT2
from gpt2c.text.batches import Batches
from gpt2c.train import directory, loop, pretrain
from gpt2c.train.metrics import read_metrics
from gpt2c.train.optimizer import AdamW

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.mark.parametrize("step", [4, 8])
def test_kill_in_an_evaluation_loses_at_most_the_save_interval(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out, evaluate = tmp_path / "run", pretrain.evaluate

    def killed(*arguments: Any, **keywords: Any) -> float:
        if f"{step:08d}" in checkpoint_names(out):
            raise RuntimeError("power cut")
        return evaluate(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "evaluate", killed)
        patch.setattr(loop, "_rescue", lambda *run: None)
        with pytest.raises(RuntimeError, match="power cut"):
            train_short(data, out, save_interval=4)
    assert len(read_metrics(out / "metrics.jsonl")) == step - 1
    assert train_short(data, out, resume=True, save_interval=0).started == step
    assert contents(out) == contents(whole_short)


@pytest.mark.parametrize(
    "error", [MemoryError("none left"), OSError(errno.ESTALE, "Stale file handle"), SystemError()]
)
@pytest.mark.parametrize("where", ["evaluation", "batch", "loss"])
def test_run_saves_after_an_error_outside_the_weights(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch, where: str,
    error: Exception,
) -> None:  # fmt: skip
    out, calls = tmp_path / "run", [0]
    owner, name = {
        "evaluation": (pretrain, "evaluate"),
        "batch": (Batches, "windows"),
        "loss": (GPT2, "loss"),
    }[where]
    original = getattr(owner, name)

    def third(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == (1 if where == "evaluation" else 3):
            raise error
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, third)
    with pytest.raises(type(error)):
        train_short(data, out)
    done = 4 if where == "evaluation" else 2
    assert checkpoint_names(out) == [f"{done:08d}"]
    assert resume_and_compare(data, out, whole_short, monkeypatch).started == done


def test_run_saves_nothing_after_half_an_update(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AdamW.step

    def torn(self: AdamW, *arguments: Any) -> float:
        if self.steps == 5:
            self.model.flat_parameters[:7] = 0
            raise MemoryError
        return step(self, *arguments)

    monkeypatch.setattr(AdamW, "step", torn)
    with pytest.raises(MemoryError):
        train_short(data, tmp_path / "run", save_interval=3)
    assert checkpoint_names(tmp_path / "run") == ["00000003"]


def test_run_saves_when_a_token_file_is_truncated(
    data: Path, tmp_path: Path, whole_short: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, copy)
    at_step(3, lambda: os.truncate(copy / "train.bin", 1100))
    with pytest.raises(OSError, match=r"train\.bin was cut short while it was read"):
        train_short(copy, out)
    assert resume_and_compare(data, out, whole_short, monkeypatch).started == 3


def test_last_checkpoint_is_removed_when_its_validation_loss_is_nan(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was saved before the evaluation that shows the loss."""
    step, out = AdamW.step, tmp_path / "run"

    def ruin(self: AdamW, *arguments: Any) -> float:
        norm = step(self, *arguments)
        if self.steps == 8:
            self.model.flat_parameters[:] = 1e30
        return norm

    monkeypatch.setattr(AdamW, "step", ruin)
    message = refused(train_short, data, out, save_interval=3)
    good = out / "checkpoints" / "00000006"
    assert message.startswith("the validation loss is nan after step 8, so its weights were not k")
    assert f"; the last good checkpoint is {good}; " in message
    assert checkpoint_names(out) == ["00000006"]
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (good / name).read_bytes()


class Broken:
    """A terminal that is gone."""

    encoding = "ascii"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def isatty(self) -> bool:
        return True

    def write(self, *text: str) -> int:
        raise self.error

    flush = fileno = write


@pytest.mark.parametrize(
    "stream",
    [
        None,
        Broken(OSError(errno.EIO, "Input/output error")),
        Broken(BrokenPipeError()),
        Broken(OSError(errno.ENOSPC, "No space left on device")),
        Broken(ValueError("I/O operation on closed file")),
        Broken(UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal not in range")),
    ],
    ids=["none", "vanished", "no reader", "full", "closed", "ascii"],
)
def test_run_goes_on_without_its_terminal(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    train_short(data, tmp_path / "run", log_interval=1)
    directory.report("a line")
    out = tmp_path / "run"
    assert (out / "model.safetensors").read_bytes() == (
        whole_short / "model.safetensors"
    ).read_bytes()
