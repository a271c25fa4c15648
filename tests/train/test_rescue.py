"""A run's work is never lost: signals, errors, kills in an evaluation, logs, disks and links."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DOCUMENTS, draw_nothing, refused
from helpers.kills import TINY, contents

from gpt2c.cli.main import main
from gpt2c.files import atomic, untrusted
from gpt2c.generator import Generator
from gpt2c.gpt2 import GPT2
from gpt2c.kernels.busy import BusyCores
from gpt2c.screen.progress import Progress
from gpt2c.text.batches import Batches
from gpt2c.text.prepare import prepare
from gpt2c.train import checkpoints, hooks, loop
from gpt2c.train import run as run_module
from gpt2c.train.loop import TrainResult
from gpt2c.train.metrics import Metrics, read_metrics
from gpt2c.train.optimizer import AdamW
from gpt2c.train.stop import SIGNALS

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("no_picture")

has_tensorboard = importlib.util.find_spec("tensorboardX") is not None


def train(data: Path, out: Path, *, resume: bool = False, **changes: Any) -> TrainResult:
    given = changes if resume else TINY | {"max_iters": 8, "eval_interval": 4} | changes
    overwrite = bool(given.pop("overwrite", False))
    return loop.train(data, out, given, resume=resume, overwrite=overwrite)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 8 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        train(data, out)
    return out


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Give a way to have something happen in a step, after its update and before its evaluation."""
    original = Progress.step

    def arrange(wanted: int, action: Callable[[], Any]) -> None:
        def step(self: Progress, now: int, figures: str) -> bool:
            if now == wanted:
                action()
            return original(self, now, figures)

        monkeypatch.setattr(Progress, "step", step)

    return arrange


def fail(error: BaseException) -> Callable[..., Any]:
    """Return a call that raises an error."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return call


def checkpoint_names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def goes_on(data: Path, out: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> TrainResult:
    """Resume as a user would, and compare all bits with the run that was left alone."""
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    result = train(data, out, resume=True)
    assert contents(out) == contents(whole)
    return result


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("step", [3, 4, 8], ids=["a step", "an evaluation", "the last evaluation"])
def test_a_signal_saves_and_the_run_goes_on(
    data: Path, tmp_path: Path, whole: Path, at_step: Any, name: str, step: int,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    number = getattr(signal, name)
    before, out = signal.getsignal(number), tmp_path / "run"
    at_step(step, lambda: signal.raise_signal(number))
    result = train(data, out)
    assert (result.step, result.interrupted) == (step, True)
    assert signal.getsignal(number) is before
    assert checkpoint_names(out) == [f"{step:08d}"]
    assert GPT2.from_pretrained(out).config.n_layer == 1  # the directory's own model is there
    assert goes_on(data, out, whole, monkeypatch).started == step
    assert "step 8: validation loss " in capsys.readouterr().out.splitlines()[-1]


def test_a_stop_in_the_last_evaluation_is_told(
    data: Path, tmp_path: Path, at_step: Any, capsys: Capture
) -> None:
    at_step(8, lambda: signal.raise_signal(signal.SIGTERM))
    flags = [f"--{name}={value}" for name, value in (TINY | {"max_iters": 8}).items()]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 130
    assert "stopped and saved after step 8 of 8; go on with: " in capsys.readouterr().out


def test_what_is_ignored_stays_ignored(data: Path, tmp_path: Path, at_step: Any) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, lambda: signal.raise_signal(signal.SIGHUP))
        assert not train(data, tmp_path / "run").interrupted
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step", [3, 8])
def test_a_second_ctrl_c_saves_too(
    data: Path, tmp_path: Path, whole: Path, at_step: Any, step: int, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    at_step(step, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(data, out)
    assert f"saved after step {step}, to go on from with --resume\n" in capsys.readouterr().out
    assert goes_on(data, out, whole, monkeypatch).started == step


def test_ctrl_c_does_not_cut_a_save_or_an_update(
    data: Path, tmp_path: Path, whole: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is pressed."""
    save, step = checkpoints.save, AdamW.step

    def pressed(call: Callable[..., Any]) -> Callable[..., Any]:
        def first(*arguments: Any) -> Any:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            return call(*arguments)

        return first

    monkeypatch.setattr(checkpoints, "save", pressed(save))
    monkeypatch.setattr(AdamW, "step", pressed(step))
    assert train(data, tmp_path / "run").step == 1
    assert goes_on(data, tmp_path / "run", whole, monkeypatch).started == 1


# ---- kills and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 8])
def test_a_kill_in_an_evaluation_loses_at_most_the_interval(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out, evaluate = tmp_path / "run", hooks.evaluate

    def killed(*arguments: Any, **keywords: Any) -> float:
        if f"{step:08d}" in checkpoint_names(out):
            raise RuntimeError("power cut")
        return evaluate(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(hooks, "evaluate", killed)
        patch.setattr(loop, "_rescue", lambda *run: None)
        with pytest.raises(RuntimeError, match="power cut"):
            train(data, out, save_interval=4)
    assert len(read_metrics(out / "metrics.jsonl")) == step - 1
    assert train(data, out, resume=True, save_interval=0).started == step
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    "error", [MemoryError("none left"), OSError(errno.ESTALE, "Stale file handle"), SystemError()]
)
@pytest.mark.parametrize("where", ["evaluation", "batch", "loss"])
def test_an_error_that_is_none_of_the_weights_ends_in_a_save(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, where: str,
    error: Exception,
) -> None:  # fmt: skip
    out, calls = tmp_path / "run", [0]
    owner, name = {
        "evaluation": (hooks, "evaluate"),
        "batch": (Batches, "batch"),
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
        train(data, out)
    done = 4 if where == "evaluation" else 2
    assert checkpoint_names(out) == [f"{done:08d}"]
    assert goes_on(data, out, whole, monkeypatch).started == done


def test_an_update_that_fails_half_way_saves_nothing(
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
        train(data, tmp_path / "run", save_interval=3)
    assert checkpoint_names(tmp_path / "run") == ["00000003"]


def test_token_files_that_are_cut_short_end_in_a_sentence(
    data: Path, tmp_path: Path, whole: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, copy)
    at_step(3, lambda: os.truncate(copy / "train.bin", 1100))
    with pytest.raises(OSError, match=r"train\.bin was cut short while it was read"):
        train(copy, out)
    assert goes_on(data, out, whole, monkeypatch).started == 3


def test_a_lost_model_is_not_kept_by_its_last_save(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved before the evaluation that shows that it is lost."""
    step, out = AdamW.step, tmp_path / "run"

    def ruin(self: AdamW, *arguments: Any) -> float:
        norm = step(self, *arguments)
        if self.steps == 8:
            self.model.flat_parameters[:] = 1e30
        return norm

    monkeypatch.setattr(AdamW, "step", ruin)
    message = refused(train, data, out, save_interval=3)
    good = out / "checkpoints" / "00000006"
    assert message.startswith("the validation loss is nan after step 8, so its weights were not k")
    assert f"; the last good checkpoint is {good}; " in message
    assert checkpoint_names(out) == ["00000006"]
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (good / name).read_bytes()


def test_the_default_saves_by_the_clock(data: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    train(data, out, save_minutes=1e-9, keep=99)
    assert checkpoint_names(out) == [f"{step:08d}" for step in range(1, 9)]
    for name in checkpoint_names(out)[:-1]:
        shutil.rmtree(out / "checkpoints" / name)
    record = json.loads((out / "run.json").read_text())
    record["settings"] |= {"save_minutes": 10.0, "keep": 1}
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    assert contents(out) == contents(whole)


def test_a_run_of_before_a_setting_goes_on(
    data: Path, tmp_path: Path, whole: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    at_step(3, lambda: signal.raise_signal(signal.SIGINT))
    train(data, out)
    record = json.loads((out / "run.json").read_text())
    del record["settings"]["threads"]
    (out / "run.json").write_text(json.dumps(record))
    goes_on(data, out, whole, monkeypatch)
    assert "version's; settings that it lacks become threads=0\n" in capsys.readouterr().out
    record["settings"]["rope"] = True
    (out / "run.json").write_text(json.dumps(record))
    assert "its settings have 'rope', which" in refused(train, data, out, resume=True)


# ---- before the first step -----------------------------------------------------------------------


def everything(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_is_tried_before_the_first_step(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "run"
    if overwrite:
        shutil.copytree(whole, out)
    before = everything(out)
    monkeypatch.setattr(Path, "write_bytes", fail(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(PermissionError) as error:
        train(data, out, overwrite=overwrite)
    assert error.value.filename == str(out)
    assert everything(out) == before
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    train(data, out, overwrite=overwrite)  # a fresh directory was left empty
    assert contents(out) == contents(whole)


def test_a_disk_too_small_for_a_checkpoint(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, free = shutil.disk_usage, [1000]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(free=free[0], used=0)
    )
    with pytest.raises(
        OSError, match=r"a checkpoint needs 122,880 bytes and 1,000 are fr"
    ) as error:
        train(data, tmp_path / "run")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "run"))
    free[0] = 122_880
    train(data, tmp_path / "run")
    free[0] -= 50_000  # less than what the overwritten run leaves
    train(data, tmp_path / "run", overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(total=0, free=0))
    train(data, tmp_path / "other")  # a file system that does not say
    assert contents(tmp_path / "other") == contents(whole)


@pytest.mark.parametrize("left", ["nothing", "an empty directory"])
def test_resume_refuses_where_the_checkpoints_are_gone(
    data: Path, tmp_path: Path, whole: Path, left: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    if left != "nothing":
        (out / "checkpoints").mkdir()
    before = everything(out)
    with pytest.raises(FileNotFoundError) as error:
        train(data, out, resume=True)
    assert str(error.value) == (
        f"{out} has done 8 steps, but {out / 'checkpoints'} holds no checkpoint to go on from: put"
        " it back, or begin the run again with --overwrite"
    )
    assert everything(out) == before


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_link_to_a_disk_that_is_not_mounted(
    data: Path, tmp_path: Path, whole: Path, how: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.move(out / "checkpoints", tmp_path / "away")
    (out / "checkpoints").symlink_to(tmp_path / "disk")
    before = everything(out)
    with pytest.raises(FileNotFoundError, match=rf"s is a link to {tmp_path}/disk, which does not"):
        train(data, out, **{how: True})
    assert everything(out) == before
    shutil.move(tmp_path / "away", tmp_path / "disk")
    train(data, out, **{how: True})
    assert (out / "checkpoints").is_symlink() and checkpoint_names(out) == ["00000008"]


def test_overwrite_keeps_links_and_what_is_not_the_runs(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    pytest.importorskip("tensorboardX")
    out, disk = tmp_path / "run", tmp_path / "disk"
    for name in ("checkpoints", "tensorboard"):
        (disk / name).mkdir(parents=True)
        (disk / name / "mine").touch()
    out.mkdir()
    for name in ("checkpoints", "tensorboard", "metrics.jsonl"):
        (out / name).symlink_to(disk / name)
    for seed in (1, 1337):
        train(data, out, seed=seed, tensorboard=True, overwrite=True)
        for name in ("checkpoints", "tensorboard", "metrics.jsonl"):
            assert (out / name).is_symlink()
    assert sorted(os.listdir(disk / "checkpoints")) == ["00000008", "mine"]
    assert len(os.listdir(disk / "tensorboard")) == 2
    assert [entry["loss"] for entry in read_metrics(disk / "metrics.jsonl")] == [
        entry["loss"] for entry in read_metrics(whole / "metrics.jsonl")
    ]


MODEL = ("model.safetensors", "config.json", "generation_config.json", "run.json")
MODEL += ("vocab.json", "merges.txt", "tokenizer_config.json")


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_links_of_the_model_stay(data: Path, tmp_path: Path, how: str) -> None:
    out, disk = tmp_path / "run", tmp_path / "disk"
    train(data, out, max_iters=4)
    disk.mkdir()
    for name in MODEL:
        shutil.move(out / name, disk / name)
        (out / name).symlink_to(disk / name)
    (disk / "tokenizer.json").write_text("another's")
    if how == "overwrite":
        (out / "tokenizer.json").symlink_to(disk / "tokenizer.json")
    before = everything(out)
    disk.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        train(data, out, **{how: True})
    (tmp_path / "away").rename(disk)
    assert everything(out) == before
    train(data, out, **{how: True, "max_iters": 8})
    assert all((out / name).is_symlink() for name in MODEL)
    assert sorted(os.listdir(disk)) == sorted([*MODEL, "tokenizer.json"])
    assert not (out / "tokenizer.json").is_symlink()
    assert (disk / "tokenizer.json").read_text() == "another's"
    for name in MODEL[:3]:
        assert (disk / name).read_bytes() == (out / "checkpoints/00000008" / name).read_bytes()
    GPT2.from_pretrained(out).save_pretrained(out)
    assert all((out / name).is_symlink() for name in MODEL)


def test_a_link_to_a_checkpoint_is_not_written_through(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    """On another disk, too, where the directory of checkpoints is a link."""
    out, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    out.mkdir()
    (out / "checkpoints").symlink_to(disk)
    train(data, out, max_iters=4, overwrite=True, keep=9)
    kept = everything(disk / "00000004")
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
        (out / name).symlink_to(f"checkpoints/00000004/{name}")
    train(data, out, resume=True, max_iters=8)
    assert everything(disk / "00000004") == kept and not (out / "model.safetensors").is_symlink()
    newest = (disk / "00000008" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == newest
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").symlink_to(disk / "00000004" / "model.safetensors")
    GPT2.from_pretrained(whole).save_pretrained(out)
    assert everything(disk / "00000004") == kept


def empty(out: Path) -> None:
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "lose",
    [shutil.rmtree, empty, lambda out: out.rename(out.with_name("away"))],
    ids=["removed", "emptied", "renamed"],
)
def test_a_directory_that_is_lost_meanwhile_is_made_again(
    data: Path, tmp_path: Path, whole: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture, lose: Callable[[Path], Any],
) -> None:  # fmt: skip
    out, amend, locks = tmp_path / "run", checkpoints.amend, []

    def amended(path: Path, *rest: Any) -> None:
        with pytest.raises(BlockingIOError), run_module.locked_run(out):
            pass
        locks.append(path)
        amend(path, *rest)

    monkeypatch.setattr(checkpoints, "amend", amended)
    at_step(3, lambda: lose(out))
    train(data, out, save_interval=2, tensorboard=has_tensorboard)
    assert locks == [out / "checkpoints" / f"{step:08d}" for step in (4, 8)]
    told = f"{out} was removed, renamed or emptied while the run trained: it is made again, and its"
    assert capsys.readouterr().out.count(f"{told} metrics go on after step 3\n") == 1
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == [4, 5, 6, 7, 8]
    if has_tensorboard:
        (events,) = (out / "tensorboard").iterdir()
        assert events.read_bytes().count(b"learning_rate") == 5
    with run_module.locked_run(out):  # the run has let go of it
        pass
    at_step(3, lambda: None)
    assert train(data, out, resume=True, max_iters=10).step == 10


def test_a_directory_that_is_lost_after_the_last_save_is_made_again(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is written before its evaluation, and again after it."""
    out, evaluate = tmp_path / "run", hooks.evaluate
    monkeypatch.setattr(hooks, "evaluate", lambda *a: [evaluate(*a), shutil.rmtree(out)][0])
    train(data, out, eval_interval=0)
    name = "checkpoints/00000008/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("when", ["before a save", "in a save"])
def test_another_run_that_has_taken_the_name_is_not_touched(
    data: Path, tmp_path: Path, whole: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture, when: str,
) -> None:  # fmt: skip
    out, away, save = tmp_path / "run", tmp_path / "away", checkpoints.save
    before: dict[Path, bytes] = {}

    def take() -> None:
        out.rename(away)
        shutil.copytree(whole, out)
        for name in ("00000001", "00000002"):  # a run that keeps one would remove the first
            shutil.copytree(out / "checkpoints" / "00000008", out / "checkpoints" / name)
        (out / "checkpoints" / "00000002" / "model.safetensors").write_bytes(b"not the newest")
        before.update(everything(out))

    def saved(*arguments: Any) -> Path:
        path = save(*arguments)
        if not before:
            take()
        return path

    if when == "in a save":
        monkeypatch.setattr(checkpoints, "save", saved)
    else:
        at_step(3, take)
    flags = {**TINY, "max_iters": 8, "eval_interval": 0, "save_interval": 2}
    call = ["train", "--data", str(data), "--out", str(out)]
    assert main([*call, *(f"--{name}={value}" for name, value in flags.items())]) == 2
    assert everything(out) == before
    written = capsys.readouterr()
    why = (
        f"{out}: this is another directory than the one this run began in: another run may have"
        " taken its name; the checkpoints are in the run's own directory, if that was only renamed"
    )
    assert written.err == f"gpt2c: {why}\n"
    assert f"step 6: {why}; the run goes on and tries again" in written.out
    assert checkpoint_names(away) == ["00000002"]
    assert [entry["step"] for entry in read_metrics(away / "metrics.jsonl")] == [*range(1, 9)]


def test_a_model_that_is_lost_removes_no_checkpoint_of_another_run(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def evaluate(*arguments: Any) -> float:
        out.rename(tmp_path / "away")
        shutil.copytree(whole, out)
        return math.nan

    monkeypatch.setattr(hooks, "evaluate", evaluate)
    with pytest.raises(OSError, match="another run may have taken its name"):
        train(data, out, eval_interval=0)
    assert everything(out) == {
        out / path.relative_to(whole): content for path, content in everything(whole).items()
    }


# ---- logs and pictures ---------------------------------------------------------------------------


def test_a_log_that_fails_does_not_end_the_run(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, append = tmp_path / "run", Metrics.append

    def full(self: Metrics, entry: Any) -> None:
        if 3 <= entry["step"] <= 5:
            os.write(self._descriptor, b'{"step": ')  # half of a line
            self._cut = True
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, entry)

    monkeypatch.setattr(Metrics, "append", full)
    assert train(data, out).step == 8
    told = f"{out / 'metrics.jsonl'} cannot be written (No space left on device): the run goes on"
    assert capsys.readouterr().out.count(told) == 1
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == [1, 2, 6, 7, 8]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_log_that_is_deleted_or_a_directory(
    data: Path, tmp_path: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(hooks, "fma_peak", lambda name, threads: 0.0)
    out = tmp_path / "run"
    (out / "metrics.jsonl").mkdir(parents=True)
    (out / "loss.png").mkdir()
    result = train(data, out, overwrite=True)
    assert (result.step, result.has_plot) == (8, False)
    lines = capsys.readouterr().out.splitlines()
    for name in ("metrics.jsonl", "loss.png"):
        assert len([line for line in lines if f"{out / name} cannot be written (Is a" in line]) == 1
    at_step(3, lambda: (tmp_path / "other" / "metrics.jsonl").unlink())
    assert train(data, tmp_path / "other").step == 8
    assert f"{tmp_path}/other/loss.png cannot be drawn: " in capsys.readouterr().out
    assert checkpoint_names(tmp_path / "other") == ["00000008"]


def test_a_picture_that_fails_does_not_fail_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(loop, "plot_loss", fail(RuntimeError("no such font")))
    assert not train(data, tmp_path / "run").has_plot
    assert f"{tmp_path}/run/loss.png cannot be drawn: no such font\n" in capsys.readouterr().out


def test_tensorboard_that_cannot_be_written(data: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    assert train(data, tmp_path / "run", tensorboard=True, overwrite=True).step == 8
    assert f"{tmp_path}/run/tensorboard cannot be written (" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_refinements(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    error = OSError(number, os.strerror(number))
    for owner, name in ((os, "fsync"), (os, "chmod"), (Path, "chmod"), (os, "utime")):
        monkeypatch.setattr(owner, name, fail(error))
    for owner, name in ((atomic.fcntl, "flock"), (untrusted.mmap, "mmap"), (os, "link")):
        monkeypatch.setattr(owner, name, fail(error))
    copy, out = tmp_path / "data", tmp_path / "run"
    prepare(DOCUMENTS, copy, "bytes")
    train(copy, out, max_iters=4)
    train(copy, out, resume=True, max_iters=8)
    assert (out / "model.safetensors").stat().st_size
    assert checkpoint_names(out) == ["00000008"]
    GPT2.from_pretrained(out).save_pretrained(tmp_path / "model")


def test_the_file_that_does_not_fit_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what it is a copy of, nor a temporary name."""
    out = tmp_path / "run"

    def full(source: Path, to: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(to))

    monkeypatch.setattr(run_module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as error:
        train(data, out)
    assert error.value.filename == str(out / "config.json")
    monkeypatch.undo()
    real = open

    def opened(path: Any, *arguments: Any, **keywords: Any) -> Any:
        file = real(path, *arguments, **keywords)
        if str(path).endswith("trainer.safetensors") and "wb" in arguments:
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(OSError, match="No space left") as error:
        train(data, tmp_path / "other")
    assert error.value.filename == str(
        tmp_path / "other" / "checkpoints" / "00000008" / "trainer.safetensors"
    )


# ---- a disk that is full for a while -------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Give a way to have the disk refuse a part of some steps' saves; it lists what it refused."""
    moments, copy, amend = checkpoints.write_tensors, shutil.copyfile, checkpoints.amend

    def arrange(
        part: str, steps: tuple[int, ...], number: int = errno.ENOSPC, times: int = 99
    ) -> list[str]:
        done: list[str] = []

        def refused_now(path: Path) -> bool:
            named = any(f"{step:08d}" in str(path) for step in steps)
            if named and len(done) < times:
                done.append(str(path))
                return True
            return False

        def write(path: Path, *rest: Any) -> None:
            if refused_now(path):
                path.write_bytes(b"half of it")
                raise OSError(number, os.strerror(number), str(path))
            moments(path, *rest)

        def copied(source: Path, to: Path) -> None:
            if refused_now(source):
                to.write_bytes(b"half of it")
                raise OSError(number, os.strerror(number), str(source), None, str(to))
            copy(source, to)

        def amended(path: Path, *rest: Any) -> None:
            if refused_now(path):
                raise OSError(number, os.strerror(number), str(path / "state.json"))
            amend(path, *rest)

        if part == "moments":
            monkeypatch.setattr(checkpoints, "write_tensors", write)
        elif part == "model":
            monkeypatch.setattr(run_module.shutil, "copyfile", copied)
        else:
            monkeypatch.setattr(checkpoints, "amend", amended)
        return done

    return arrange


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(
    ("part", "file", "left"),
    [
        ("moments", "checkpoints/00000004/trainer.safetensors", (2, 6, 8)),
        ("model", "config.json", (2, 4, 6, 8)),
        ("amended state", "checkpoints/00000004/state.json", (2, 4, 6, 8)),
    ],
    ids=["moments", "model", "amended state"],
)
def test_a_disk_that_is_full_for_a_while_ends_no_run(
    data: Path, tmp_path: Path, whole: Path, refuse: Any, number: int, part: str, file: str,
    left: tuple[int, ...], capsys: Capture,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    refuse(part, (4,), number)
    result = train(data, out, save_interval=2, keep=99)
    assert (result.step, result.interrupted) == (8, False)
    told = f"step 4: {out / file}: {os.strerror(number)}; the newest checkpoint is "
    assert capsys.readouterr().out.count(told) == 1
    assert checkpoint_names(out) == [f"{step:08d}" for step in left] and leftovers(out) == []
    for name in ("model.safetensors", "checkpoints/00000008/trainer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    logged, wanted = (read_metrics(path / "metrics.jsonl") for path in (out, whole))
    assert [(e["loss"], e.get("val_loss")) for e in logged] == [
        (e["loss"], e.get("val_loss")) for e in wanted
    ]


def test_each_save_that_fails_is_told_in_a_line(
    data: Path, tmp_path: Path, refuse: Any, capsys: Capture
) -> None:
    out = tmp_path / "run"
    place = out / "checkpoints"
    refuse("moments", (2, 6, 7))
    train(data, out, save_interval=2, eval_interval=0)
    train(data, tmp_path / "other", save_interval=1, eval_interval=0)
    told = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    why = "trainer.safetensors: No space left on device"
    end = "the run goes on and tries again with its next checkpoint"
    other = tmp_path / "other" / "checkpoints"
    assert told == [
        f"step 2: {place}/00000002/{why}; there is no checkpoint yet; {end}",
        f"step 6: {place}/00000006/{why}; the newest checkpoint is {place}/00000004, 2 steps ago;"
        f" {end}",
        f"step 2: {other}/00000002/{why}; the newest checkpoint is {other}/00000001, 1 step ago;"
        f" {end}",
        f"step 6: {other}/00000006/{why}; the newest checkpoint is {other}/00000005, 1 step ago;"
        f" {end}",
        f"step 7: {other}/00000007/{why}; the newest checkpoint is {other}/00000005, 2 steps ago;"
        f" {end}",
    ]


def test_a_disk_that_stays_full_ends_the_run_in_a_sentence(
    data: Path, tmp_path: Path, whole: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    refuse("moments", (6, 8))
    flags = {**TINY, "max_iters": 8, "eval_interval": 4, "save_interval": 2}
    call = ["train", "--data", str(data), "--out", str(out)]
    assert main([*call, *(f"--{name}={value}" for name, value in flags.items())]) == 2
    newest = out / "checkpoints" / "00000004"
    assert capsys.readouterr().err == (
        f"gpt2c: {out}/checkpoints/00000008/trainer.safetensors: No space left on device; the"
        f" newest checkpoint is {newest}, 4 steps ago\n"
    )
    assert checkpoint_names(out) == ["00000004"] and leftovers(out) == []
    assert (out / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    assert len(read_metrics(out / "metrics.jsonl")) == 8
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    assert train(data, out, resume=True, save_interval=0).started == 4
    assert contents(out) == contents(whole)


def test_what_was_refused_is_written_at_a_stop(
    data: Path, tmp_path: Path, whole: Path, refuse: Any, at_step: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The checkpoint is whole: what is left to do is to give the directory its model."""
    out = tmp_path / "run"
    done = refuse("model", (3,), times=1)
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(data, out, save_interval=3).interrupted
    assert len(done) == 1
    checkpoint = out / "checkpoints" / "00000003" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == checkpoint.read_bytes()
    assert train(data, out, resume=True, save_interval=0).started == 3
    assert contents(out) == contents(whole)


def test_what_was_refused_of_the_last_evaluation_is_written_at_the_end(
    data: Path, tmp_path: Path, whole: Path, refuse: Any
) -> None:
    done = refuse("amended state", (8,), times=1)
    train(data, tmp_path / "run")
    assert len(done) == 1 and contents(tmp_path / "run") == contents(whole)


def test_an_error_after_a_refused_save_ends_in_a_save(
    data: Path, tmp_path: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    done = refuse("moments", (4,), times=1)
    monkeypatch.setattr(hooks, "evaluate", fail(MemoryError("none left")))
    with pytest.raises(MemoryError):
        train(data, out, save_interval=4)
    assert len(done) == 1 and checkpoint_names(out) == ["00000004"]


# ---- locks ---------------------------------------------------------------------------------------


def test_nothing_replaces_the_tokens_of_a_run_that_trains(
    data: Path, tmp_path: Path, at_step: Any, capsys: Capture
) -> None:
    demo, text = tmp_path / "demo", tmp_path / "text.txt"
    shutil.copytree(data, demo / "data")
    text.write_text("The cat sat on the mat.\n" * 400)
    before, codes = everything(demo / "data"), []

    def others() -> None:
        out = ["--out", str(demo / "data"), "--overwrite"]
        codes.append(main(["prepare", str(text), "--tokenizer", "bytes", *out]))
        codes.append(main(["demo", "--text", str(text), "--out", str(demo), "--overwrite"]))

    at_step(3, others)
    train(demo / "data", demo / "run")
    assert codes == [2, 2] and everything(demo / "data") == before
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"gpt2c: another process trains on {demo / 'data'}, or prepares it")
    assert errors[1].startswith(f"gpt2c: another process is training into {demo / 'run'}: wait")
    prepare(DOCUMENTS, demo / "data", "bytes", overwrite=True)  # it has ended


def test_two_runs_share_their_tokens(data: Path, tmp_path: Path, at_step: Any) -> None:
    results = []
    at_step(3, lambda: results or results.append(train(data, tmp_path / "b", max_iters=2)))
    train(data, tmp_path / "a")
    assert [result.step for result in results] == [2]


def test_training_waits_for_what_prepares_its_tokens(data: Path, tmp_path: Path) -> None:
    with (
        atomic.locked(data, "no"),
        pytest.raises(BlockingIOError, match="another process prepares"),
    ):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what is seen --------------------------------------------------------------------------------


def test_lines_are_means_since_the_last_one(data: Path, tmp_path: Path, capsys: Capture) -> None:
    train(data, tmp_path / "run", log_interval=3, eval_interval=0)
    lines = [x for x in capsys.readouterr().out.splitlines() if " tokens/s" in x]
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for line, (first, last) in zip(lines, ((0, 3), (3, 6), (6, 8)), strict=True):
        loss = math.fsum(entry["loss"] for entry in entries[first:last]) / (last - first)
        assert line.startswith(f"step {last}/8  loss {loss:.3f}  ")
        speed = float(line.split("  ")[2].removesuffix(" tokens/s").replace(",", ""))
        seconds = math.fsum(64 / entry["tokens_per_second"] for entry in entries[first:last])
        assert speed == pytest.approx(64 * (last - first) / seconds, abs=1)
        assert line.endswith(" left") == (last < 8)


def test_other_programs_are_told_of_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(BusyCores, "others", lambda self: 1.25)
    train(data, tmp_path / "run")
    assert capsys.readouterr().out.count("other programs use 1.2 of the ") == 1


def test_load_is_what_the_cores_did_less_the_own_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, now, own = tmp_path / "stat", [100.0], [5.0]
    tick = os.sysconf("SC_CLK_TCK")

    def write(first: float, second: float, third: float) -> None:
        """Write so many seconds of work of three cores, the last of which is not ours."""
        rows = [
            f"cpu{i} {int(s * tick)} 0 0 77 88 0 0 0 0 0" for i, s in enumerate((first, second))
        ]
        rows += [f"cpu2 {int(third * tick)} 0 0 0 0 0 0 0 0 0", "intr 5", "cpu 9 9 9 9"]
        stat.write_text("\n".join(rows))

    monkeypatch.setattr("gpt2c.kernels.busy.STAT", stat)
    monkeypatch.setattr("gpt2c.kernels.busy.time.monotonic", lambda: now[0])
    monkeypatch.setattr("gpt2c.kernels.busy.time.process_time", lambda: own[0])
    monkeypatch.setattr("gpt2c.kernels.busy.AFFINITY", {0, 1})
    write(10, 20, 30)
    two, one = BusyCores(2), BusyCores(1)
    now[0], own[0] = 110.0, 13.0
    write(20, 30, 99)  # ours worked 20 s in 10 s, 8 of which are this process's
    assert two.others() == pytest.approx(1.2)
    assert one.others() == pytest.approx(1.2)  # 1.2 and a thread are more than two cores
    now[0], own[0] = 120.0, 23.0
    write(30, 40, 99)  # 20 again, 10 of which are its own
    assert (two.others(), one.others()) == (pytest.approx(1.0), 0.0)
    now[0] += 0.5
    assert two.others() == 0.0  # too short a look
    stat.unlink()
    now[0] += 100
    assert BusyCores(2).others() == 0.0


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
def test_a_terminal_that_is_gone_ends_no_run(
    data: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    train(data, tmp_path / "run", log_interval=1)
    run_module.report("a line")
    out = tmp_path / "run"
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_writes_with_the_runs_tokenizer(whole: Path, tmp_path: Path) -> None:
    checkpoint = whole / "checkpoints" / "00000008"
    settings = {"max_new_tokens": 5, "seed": 1}
    texts = [
        Generator.from_pretrained(path).generate("a", **settings) for path in (checkpoint, whole)
    ]
    assert texts[0] == texts[1]
    shutil.copytree(checkpoint, tmp_path / "00000008")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json does not exist"):
        Generator.from_pretrained(tmp_path / "00000008")


def test_an_early_ctrl_c_is_no_traceback(tmp_path: Path) -> None:
    """Before the command line is there."""
    code = """
import signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Press())
sys.argv = ["gpt2c", "info"]
from gpt2c.__main__ import run
sys.exit(run())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "gpt2c: interrupted\n", "")


def test_states_come_back() -> None:
    entry = {"step": 4, "loss": 1.5}
    state = checkpoints.TrainerState(4, entry=entry)
    assert checkpoints.TrainerState(**dataclasses.asdict(state)) == state
    for bad in ({"step": 5}, {}, [1], 7, {"step": 4, "loss": "low"}, {"step": 4, "loss": [1]}):
        assert "entry must be the metrics of the step" in refused(
            checkpoints.TrainerState, 4, 0, 0.0, None, bad
        )
