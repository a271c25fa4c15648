"""Nonfinite numbers: a run stops or skips the step, and keeps a good checkpoint."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.kills import same
from helpers.runs import checkpoint_names, train

from gpt2c.gpt2 import GPT2
from gpt2c.screen.progress import Progress
from gpt2c.text.batches import Batches
from gpt2c.train import checkpoints, loop
from gpt2c.train import run as run_module
from gpt2c.train.metrics import read_metrics
from gpt2c.train.optimizer import AdamW

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces a number in the gradients, or the loss, of some steps."""

    def arrange(at: tuple[int, ...], name: str, value: float) -> None:
        loss, windows, now = GPT2.loss, Batches.windows, [0]

        def watched(self: Batches, first: int, count: int) -> Any:
            now[0] = first // count + 1
            return windows(self, first, count)

        def poisoned_loss(self: GPT2, x: Any, y: Any, keep: bool = True, **given: Any) -> float:
            found = loss(self, x, y, keep, **given)
            return value if keep and name == "loss" and now[0] in at else found

        def backward(self: GPT2, scale: float = 1.0, **given: Any) -> None:
            original(self, scale, **given)
            if name != "loss" and now[0] in at:
                self.gradients[name].flat[3] = value

        original = GPT2.backward
        monkeypatch.setattr(Batches, "windows", watched)
        monkeypatch.setattr(GPT2, "loss", poisoned_loss)
        monkeypatch.setattr(GPT2, "backward", backward)

    return arrange


NAMES = ["loss", "h.0.mlp.c_fc.weight", "ln_f.bias"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_run_stops_before_the_update_of_a_nonfinite_step(
    data: Path, tmp_path: Path, poisoned: Any, name: str, value: float
) -> None:
    poisoned((14,), name, value)
    out = tmp_path / "run"
    message = refused(train, data, out, save_interval=5)
    fault = f"the loss is {value}" if name == "loss" else f"the gradient of {name} holds {value}"
    assert message == (
        f"{fault} at step 14, so the run stopped before its update; the last good checkpoint is"
        f" {out / 'checkpoints' / '00000010'}; lower the learning rate, or leave such steps out"
        " with --skip-nonfinite"
    )
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == list(range(1, 14))
    content = (out / "model.safetensors").read_bytes()
    assert content == (out / "checkpoints" / "00000010" / "model.safetensors").read_bytes()


def test_error_says_that_there_is_no_checkpoint(data: Path, tmp_path: Path, poisoned: Any) -> None:
    poisoned((3,), "loss", math.nan)
    assert "; there is no checkpoint yet (--save-interval makes some); " in refused(
        train, data, tmp_path / "run"
    )


@pytest.mark.parametrize("name", NAMES)
def test_skipped_step_updates_nothing_and_is_counted(
    data: Path, tmp_path: Path, poisoned: Any, name: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    poisoned((6, 14, 15), name, math.nan)
    norms: list[tuple[int, float]] = []
    log = run_module.Run.log

    def logged(self: run_module.Run) -> None:
        parts = (self.model.flat_parameters, self.optimizer.m, self.optimizer.v)
        norms.append((self.optimizer.steps, sum(float(np.abs(part).sum()) for part in parts)))
        log(self)

    monkeypatch.setattr(run_module.Run, "log", logged)
    result = train(data, tmp_path / "run", skip_nonfinite=True, log_interval=1)
    assert (result.step, result.skipped) == (20, 3)
    for step in (6, 14, 15):
        assert norms[step - 1] == norms[step - 2]
    assert len(set(norms)) == 17
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry["skipped"] for entry in entries] == [0] * 5 + [1] * 8 + [2] + [3] * 6
    assert [entry["step"] for entry in entries if entry["grad_norm"] is None] == [6, 14, 15]
    output = capsys.readouterr().out
    assert ", so nothing is updated (3 skipped by now)\n" in output


def test_run_with_skipped_steps_resumes_to_the_same_bits(
    data: Path, tmp_path: Path, poisoned: Any, cut: Any
) -> None:
    poisoned((6, 14, 15), "ln_f.bias", math.inf)
    settings = {"skip_nonfinite": True, "save_interval": 8}
    train(data, tmp_path / "whole", **settings)
    out = cut(data, tmp_path / "run", 12, **settings)
    assert train(data, out, resume=True).skipped == 3
    same(out, tmp_path / "whole")


@pytest.mark.parametrize("part", ["flat_parameters", "m", "v"])
def test_overflowed_model_replaces_no_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """An update may overflow though its gradients are finite."""
    step = AdamW.step

    def overflowing(self: AdamW, *arguments: Any) -> float:
        norm = step(self, *arguments)
        if self.steps == 9:
            array = self.model.flat_parameters if part == "flat_parameters" else getattr(self, part)
            array[7] = math.inf
        return norm

    monkeypatch.setattr(AdamW, "step", overflowing)
    out = tmp_path / "run"
    message = refused(train, data, out, save_interval=3, max_iters=9, eval_interval=1)
    assert message.endswith(
        f"the last good checkpoint is {out / 'checkpoints' / '00000006'}; lower the learning rate"
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000006"]


@pytest.fixture
def ruined(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes a step's update leave finite but useless weights."""

    def arrange(at: int) -> None:
        def ruin(self: AdamW, *arguments: Any) -> float:
            norm = step(self, *arguments)
            if self.steps == at:
                self.model.flat_parameters[:] = 1e30
            return norm

        monkeypatch.setattr(AdamW, "step", ruin)

    step = AdamW.step
    return arrange


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoint_without_a_finite_loss_replaces_no_good_one(
    data: Path, tmp_path: Path, whole: Path, ruined: Any, resume: bool
) -> None:
    """Its weights are finite, but their loss is not."""
    ruined(10)
    out = tmp_path / "run"
    bad, good = out / "checkpoints" / "00000010", out / "checkpoints" / "00000005"
    message = refused(train, data, out, save_interval=5)
    if resume:
        message = refused(train, data, out, resume=True)
    assert "at step 11, so the run stopped before its update; the last good checkpoint is" in (
        message
    )
    assert f" is {good} (delete {bad} to resume from it); " in message
    assert checkpoint_names(out) == ["00000005", "00000010"]
    shutil.rmtree(bad)
    ruined(0)  # never
    train(data, out, resume=True)
    same(out, whole)


def test_error_says_that_there_is_no_good_checkpoint(
    data: Path, tmp_path: Path, ruined: Any
) -> None:
    ruined(5)
    message = refused(train, data, tmp_path / "run", save_interval=5)
    bad = tmp_path / "run" / "checkpoints" / "00000005"
    assert f"; there is no good checkpoint: {bad} gives no finite loss; " in message


def test_older_checkpoint_is_removed_once_the_newer_one_gave_a_finite_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[int, list[str]] = {}
    log = run_module.Run.log

    def logged(self: run_module.Run) -> None:
        log(self)
        if (self.out / "checkpoints").is_dir():
            found[self.step] = checkpoint_names(self.out)

    monkeypatch.setattr(run_module.Run, "log", logged)
    save = checkpoints.save

    def saved(*arguments: Any) -> Path:
        path = save(*arguments)
        found[-int(path.name)] = checkpoint_names(path.parent.parent)
        return path

    monkeypatch.setattr(checkpoints, "save", saved)
    train(data, tmp_path / "run", save_interval=5, max_iters=10)
    assert found[-5] == found[6] == ["00000005"]
    assert found[-10] == found[10] == ["00000005", "00000010"]  # before the last evaluation
    assert checkpoint_names(tmp_path / "run") == ["00000010"]


def test_run_saves_nothing_right_after_a_skipped_step(
    data: Path, tmp_path: Path, poisoned: Any
) -> None:
    poisoned((10,), "loss", math.nan)
    out = tmp_path / "run"
    settings = {"skip_nonfinite": True, "save_interval": 5, "keep": 9}
    assert train(data, out, **settings).skipped == 1
    assert checkpoint_names(out) == ["00000005", "00000015", "00000020"]


def test_ctrl_c_waits_for_a_step_that_is_not_skipped(
    data: Path, tmp_path: Path, poisoned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned((7, 8), "loss", math.nan)
    step = Progress.step

    def interrupt(self: Progress, now: int, figures: str) -> None:
        step(self, now, figures)
        if now == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "step", interrupt)
    result = train(data, tmp_path / "run", skip_nonfinite=True)
    assert (result.step, result.skipped, result.interrupted) == (9, 2, True)
    assert checkpoint_names(tmp_path / "run") == ["00000009"]


def test_run_stops_after_too_many_skipped_steps(
    data: Path, tmp_path: Path, ruined: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ruined(6)
    out, most = tmp_path / "run", loop.MOST_SKIPPED
    settings = {"skip_nonfinite": True, "save_interval": 5, "max_iters": 200, "log_interval": 8}
    message = refused(train, data, out, **settings)
    good = out / "checkpoints" / "00000005"
    assert (
        f" at step {6 + most}, the {most}th in a row that would be skipped, so the run" in message
    )
    assert message.endswith(f"; the last good checkpoint is {good}; lower the learning rate")
    assert checkpoint_names(out) == ["00000005"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "is updated" in line]
    assert [line.split(":")[0] for line in lines] == ["step 7", "step 15", "step 23"]


def test_run_logs_the_step_whose_evaluation_fails(data: Path, tmp_path: Path, ruined: Any) -> None:
    ruined(9)
    message = refused(train, data, tmp_path / "run", max_iters=9)
    assert message.startswith("the validation loss is ") and "after step 9" in message
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["step"] == 9 and last["loss"] and last["val_loss"] is None
