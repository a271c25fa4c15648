"""Full disks and limited file systems: a run goes on where it can, and its files stay whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DOCUMENTS, draw_nothing
from helpers.command import program, run_process
from helpers.kills import TINY, contents, same
from helpers.runs import checkpoint_names, fail, files_below, train, train_short

from gpt2c.cli.main import main
from gpt2c.files import atomic, untrusted
from gpt2c.gpt2 import GPT2
from gpt2c.text.prepare import prepare
from gpt2c.train import checkpoints, directory, hooks, loop, pretrain, tensorboard
from gpt2c.train.metrics import Metrics, read_metrics

pytestmark = pytest.mark.usefixtures("no_picture")


# ---- before the first step -----------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_tries_a_save_before_the_first_step(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "run"
    if overwrite:
        shutil.copytree(whole_short, out)
    before = files_below(out)
    monkeypatch.setattr(Path, "write_bytes", fail(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(PermissionError) as error:
        train_short(data, out, overwrite=overwrite)
    assert error.value.filename == str(out)
    assert files_below(out) == before
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    train_short(data, out, overwrite=overwrite)  # a fresh directory was left empty
    assert contents(out) == contents(whole_short)


def test_run_refuses_a_disk_too_small_for_a_checkpoint(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, free = shutil.disk_usage, [1000]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(free=free[0], used=0)
    )
    with pytest.raises(
        OSError, match=r"a checkpoint needs 122,880 bytes and 1,000 are fr"
    ) as error:
        train_short(data, tmp_path / "run")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "run"))
    free[0] = 122_880
    train_short(data, tmp_path / "run")
    free[0] -= 50_000  # the overwritten run frees more than is missing
    train_short(data, tmp_path / "run", overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(total=0, free=0))
    train_short(data, tmp_path / "other")  # a file system that does not tell its size
    assert contents(tmp_path / "other") == contents(whole_short)


# ---- logs and pictures ---------------------------------------------------------------------------


def test_run_goes_on_while_its_log_cannot_be_written(
    data: Path,
    tmp_path: Path,
    whole_short: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, append = tmp_path / "run", Metrics.append

    def full(self: Metrics, entry: Any) -> None:
        if 3 <= entry["step"] <= 5:
            os.write(self._descriptor, b'{"step": ')  # half of a line
            self._cut = True
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, entry)

    monkeypatch.setattr(Metrics, "append", full)
    assert train_short(data, out).step == 8
    told = f"{out / 'metrics.jsonl'} cannot be written (No space left on device): it is left out"
    assert capsys.readouterr().out.count(told) == 1
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == [1, 2, 6, 7, 8]
    assert (out / "model.safetensors").read_bytes() == (
        whole_short / "model.safetensors"
    ).read_bytes()


def test_run_goes_on_where_its_log_is_deleted_or_a_directory(
    data: Path,
    tmp_path: Path,
    at_step: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(hooks, "fma_peak", lambda *_: 0.0)
    out = tmp_path / "run"
    (out / "metrics.jsonl").mkdir(parents=True)
    (out / "loss.png").mkdir()
    result = train_short(data, out, overwrite=True)
    assert (result.step, result.has_plot) == (8, False)
    lines = capsys.readouterr().out.splitlines()
    for name in ("metrics.jsonl", "loss.png"):
        assert len([line for line in lines if f"{out / name} cannot be written (Is a" in line]) == 1
    at_step(3, lambda: (tmp_path / "other" / "metrics.jsonl").unlink())
    assert train_short(data, tmp_path / "other").step == 8
    said = f"/other/loss.png cannot be drawn: {tmp_path}/other/metrics.jsonl: No such file or"
    assert said in capsys.readouterr().out
    assert checkpoint_names(tmp_path / "other") == ["00000008"]


def test_run_succeeds_when_its_picture_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "plot_loss", fail(RuntimeError("no such font")))
    assert not train_short(data, tmp_path / "run").has_plot
    assert f"{tmp_path}/run/loss.png cannot be drawn: no such font\n" in capsys.readouterr().out


def test_run_goes_on_where_tensorboard_cannot_be_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    assert train_short(data, tmp_path / "run", tensorboard=True, overwrite=True).step == 8
    assert f"{tmp_path}/run/tensorboard cannot be written (" in capsys.readouterr().out


def test_events_are_written_where_metrics_cannot_be(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    assert train_short(data, tmp_path / "run", tensorboard=True, overwrite=True).step == 8
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert "tensorboard cannot be written" not in capsys.readouterr().out


def test_overwriting_run_reports_events_that_cannot_be_removed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_short(data, tmp_path / "run")
    denied = PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(tensorboard, "clear", fail(denied))
    assert train_short(data, tmp_path / "run", overwrite=True).step == 8
    assert "tensorboard cannot be written (Operation not permitted)" in capsys.readouterr().out


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1_000, 4_000, 25_000, 40_000])
@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint_whole(
    data: Path, tmp_path: Path, whole: Path, cut: Any, limit: int
) -> None:
    """No file may exceed the limit: run.json, metrics.jsonl, the weights, or the moments."""
    pytest.importorskip("resource")
    out = cut(data, tmp_path / "run", 12, save_interval=5)
    newest = out / "checkpoints" / "00000010"
    before = {path: path.read_bytes() for path in [*newest.iterdir(), out / "model.safetensors"]}
    arguments = ["train", "--data", str(data), "--out", str(out), "--resume"]
    done = run_process(program("programs.disks", "command", str(limit), *arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("gpt2c: ") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and str(out) in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    train(data, out, resume=True)
    same(out, whole)


def test_error_of_a_full_disk_names_the_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither the source of a copy nor a temporary file."""
    out = tmp_path / "run"

    def full(source: Path, to: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(to))

    monkeypatch.setattr(directory.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as error:
        train_short(data, out)
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
        train_short(data, tmp_path / "other")
    assert error.value.filename == str(
        tmp_path / "other" / "checkpoints" / "00000008" / "trainer.safetensors"
    )


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that makes a part of some steps' saves fail, and returns their paths."""
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
            monkeypatch.setattr(directory.shutil, "copyfile", copied)
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
def test_run_goes_on_while_the_disk_is_full(
    data: Path, tmp_path: Path, whole_short: Path, refuse: Any, number: int, part: str, file: str,
    left: tuple[int, ...], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    refuse(part, (4,), number)
    result = train_short(data, out, save_interval=2, keep=99)
    assert (result.step, result.interrupted) == (8, False)
    told = f"step 4: {out / file}: {os.strerror(number)}; the newest checkpoint is "
    assert capsys.readouterr().out.count(told) == 1
    assert checkpoint_names(out) == [f"{step:08d}" for step in left] and leftovers(out) == []
    for name in ("model.safetensors", "checkpoints/00000008/trainer.safetensors"):
        assert (out / name).read_bytes() == (whole_short / name).read_bytes()
    logged, wanted = (read_metrics(path / "metrics.jsonl") for path in (out, whole_short))
    assert [(e["loss"], e.get("val_loss")) for e in logged] == [
        (e["loss"], e.get("val_loss")) for e in wanted
    ]


def test_run_prints_a_line_for_each_failed_save(
    data: Path, tmp_path: Path, refuse: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    place = out / "checkpoints"
    refuse("moments", (2, 6, 7))
    train_short(data, out, save_interval=2, eval_interval=0)
    train_short(data, tmp_path / "other", save_interval=1, eval_interval=0)
    told = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    why = "trainer.safetensors: No space left on device"
    end = "the run continues and tries again with its next checkpoint"
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


def test_run_ends_with_one_sentence_if_the_disk_stays_full(
    data: Path, tmp_path: Path, whole_short: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    assert train_short(data, out, resume=True, save_interval=0).started == 4
    assert contents(out) == contents(whole_short)


def test_stop_publishes_the_model_that_a_save_could_not(
    data: Path, tmp_path: Path, whole_short: Path, refuse: Any, at_step: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The checkpoint is whole; only the copy in the run's directory is missing."""
    out = tmp_path / "run"
    done = refuse("model", (3,), times=1)
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert train_short(data, out, save_interval=3).interrupted
    assert len(done) == 1
    checkpoint = out / "checkpoints" / "00000003" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == checkpoint.read_bytes()
    assert train_short(data, out, resume=True, save_interval=0).started == 3
    assert contents(out) == contents(whole_short)


def test_run_writes_at_its_end_the_evaluation_that_a_save_could_not(
    data: Path, tmp_path: Path, whole_short: Path, refuse: Any
) -> None:
    done = refuse("amended state", (8,), times=1)
    train_short(data, tmp_path / "run")
    assert len(done) == 1 and contents(tmp_path / "run") == contents(whole_short)


def test_run_saves_after_a_failed_save_and_an_error(
    data: Path, tmp_path: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    done = refuse("moments", (4,), times=1)
    monkeypatch.setattr(pretrain, "evaluate", fail(MemoryError("none left")))
    with pytest.raises(MemoryError):
        train_short(data, out, save_interval=4)
    assert len(done) == 1 and checkpoint_names(out) == ["00000004"]


# ---- other file systems --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_run_needs_no_fsync_chmod_flock_or_mmap(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    error = OSError(number, os.strerror(number))
    for owner, name in ((os, "fsync"), (os, "chmod"), (Path, "chmod"), (os, "utime")):
        monkeypatch.setattr(owner, name, fail(error))
    for owner, name in ((atomic.fcntl, "flock"), (untrusted.mmap, "mmap"), (os, "link")):
        monkeypatch.setattr(owner, name, fail(error))
    copy, out = tmp_path / "data", tmp_path / "run"
    prepare(DOCUMENTS, copy, "bytes")
    train_short(copy, out, max_iters=4)
    train_short(copy, out, resume=True, max_iters=8)
    assert (out / "model.safetensors").stat().st_size
    assert checkpoint_names(out) == ["00000008"]
    GPT2.from_pretrained(out).save_pretrained(tmp_path / "model")
