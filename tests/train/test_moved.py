"""Links and moved directories: links stay, and a run writes into no other run's directory."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.kills import TINY
from helpers.runs import checkpoint_names, files_below, train_short

from gpt2c.cli.main import main
from gpt2c.gpt2 import GPT2
from gpt2c.train import checkpoints, directory, pretrain
from gpt2c.train.metrics import read_metrics

has_tensorboard = importlib.util.find_spec("tensorboardX") is not None

pytestmark = pytest.mark.usefixtures("no_picture")


# ---- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "an empty directory"])
def test_resume_refuses_a_run_without_its_checkpoints(
    data: Path, tmp_path: Path, whole_short: Path, left: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole_short, out)
    shutil.rmtree(out / "checkpoints")
    if left != "nothing":
        (out / "checkpoints").mkdir()
    before = files_below(out)
    with pytest.raises(FileNotFoundError) as error:
        train_short(data, out, resume=True)
    assert str(error.value) == (
        f"{out} has done 8 steps, but {out / 'checkpoints'} holds no checkpoint to resume from: put"
        " it back, or begin the run again with --overwrite"
    )
    assert files_below(out) == before


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_run_refuses_checkpoints_linked_to_an_unmounted_disk(
    data: Path, tmp_path: Path, whole_short: Path, how: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole_short, out)
    shutil.move(out / "checkpoints", tmp_path / "away")
    (out / "checkpoints").symlink_to(tmp_path / "disk")
    before = files_below(out)
    with pytest.raises(FileNotFoundError, match=rf"s is a link to {tmp_path}/disk, which does not"):
        train_short(data, out, **{how: True})
    assert files_below(out) == before
    shutil.move(tmp_path / "away", tmp_path / "disk")
    train_short(data, out, **{how: True})
    assert (out / "checkpoints").is_symlink() and checkpoint_names(out) == ["00000008"]


def test_overwrite_keeps_links_and_foreign_files(
    data: Path, tmp_path: Path, whole_short: Path
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
        train_short(data, out, seed=seed, tensorboard=True, overwrite=True)
        for name in ("checkpoints", "tensorboard", "metrics.jsonl"):
            assert (out / name).is_symlink()
    assert sorted(os.listdir(disk / "checkpoints")) == ["00000008", "mine"]
    assert len(os.listdir(disk / "tensorboard")) == 2
    assert [entry["loss"] for entry in read_metrics(disk / "metrics.jsonl")] == [
        entry["loss"] for entry in read_metrics(whole_short / "metrics.jsonl")
    ]


MODEL = ("model.safetensors", "config.json", "generation_config.json", "run.json")
MODEL += ("vocab.json", "merges.txt", "tokenizer_config.json")


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_run_writes_its_model_through_links(data: Path, tmp_path: Path, how: str) -> None:
    out, disk = tmp_path / "run", tmp_path / "disk"
    train_short(data, out, max_iters=4)
    disk.mkdir()
    for name in MODEL:
        shutil.move(out / name, disk / name)
        (out / name).symlink_to(disk / name)
    (disk / "tokenizer.json").write_text("another's")
    if how == "overwrite":
        (out / "tokenizer.json").symlink_to(disk / "tokenizer.json")
    before = files_below(out)
    disk.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        train_short(data, out, **{how: True})
    (tmp_path / "away").rename(disk)
    assert files_below(out) == before
    train_short(data, out, **{how: True, "max_iters": 8})
    assert all((out / name).is_symlink() for name in MODEL)
    assert sorted(os.listdir(disk)) == sorted([*MODEL, "tokenizer.json"])
    assert not (out / "tokenizer.json").is_symlink()
    assert (disk / "tokenizer.json").read_text() == "another's"
    for name in MODEL[:3]:
        assert (disk / name).read_bytes() == (out / "checkpoints/00000008" / name).read_bytes()
    GPT2.from_pretrained(out).save_pretrained(out)
    assert all((out / name).is_symlink() for name in MODEL)


def test_run_replaces_links_into_its_checkpoints(
    data: Path, tmp_path: Path, whole_short: Path
) -> None:
    """Also on another disk, if the directory of checkpoints is a link."""
    out, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    out.mkdir()
    (out / "checkpoints").symlink_to(disk)
    train_short(data, out, max_iters=4, overwrite=True, keep=9)
    kept = files_below(disk / "00000004")
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
        (out / name).symlink_to(f"checkpoints/00000004/{name}")
    train_short(data, out, resume=True, max_iters=8)
    assert files_below(disk / "00000004") == kept and not (out / "model.safetensors").is_symlink()
    newest = (disk / "00000008" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == newest
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").symlink_to(disk / "00000004" / "model.safetensors")
    GPT2.from_pretrained(whole_short).save_pretrained(out)
    assert files_below(disk / "00000004") == kept


# ---- directories ---------------------------------------------------------------------------------


def empty(out: Path) -> None:
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "lose",
    [shutil.rmtree, empty, lambda out: out.rename(out.with_name("away"))],
    ids=["removed", "emptied", "renamed"],
)
def test_run_makes_its_lost_directory_again(
    data: Path, tmp_path: Path, whole_short: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], lose: Callable[[Path], Any],
) -> None:  # fmt: skip
    out, amend, locks = tmp_path / "run", checkpoints.amend, []

    def amended(path: Path, *rest: Any) -> None:
        with pytest.raises(BlockingIOError), directory.locked_run(out):
            pass
        locks.append(path)
        amend(path, *rest)

    monkeypatch.setattr(checkpoints, "amend", amended)
    at_step(3, lambda: lose(out))
    train_short(data, out, save_interval=2, tensorboard=has_tensorboard)
    assert locks == [out / "checkpoints" / f"{step:08d}" for step in (4, 8)]
    told = f"{out} was removed, renamed or emptied while the run trained: it is made again, and its"
    assert capsys.readouterr().out.count(f"{told} metrics continue after step 3\n") == 1
    assert (out / "model.safetensors").read_bytes() == (
        whole_short / "model.safetensors"
    ).read_bytes()
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == [4, 5, 6, 7, 8]
    if has_tensorboard:
        (events,) = (out / "tensorboard").iterdir()
        assert events.read_bytes().count(b"learning_rate") == 5
    with directory.locked_run(out):  # the run has unlocked it
        pass
    at_step(3, lambda: None)
    assert train_short(data, out, resume=True, max_iters=10).step == 10


def test_run_makes_a_directory_lost_after_the_last_save_again(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is written before its evaluation, and again after it."""
    out, evaluate = tmp_path / "run", pretrain.evaluate
    monkeypatch.setattr(pretrain, "evaluate", lambda *a: [evaluate(*a), shutil.rmtree(out)][0])
    train_short(data, out, eval_interval=0)
    name = "checkpoints/00000008/model.safetensors"
    assert (out / name).read_bytes() == (whole_short / name).read_bytes()


@pytest.mark.parametrize("when", ["before a save", "in a save"])
def test_run_leaves_another_run_of_its_name_untouched(
    data: Path, tmp_path: Path, whole_short: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], when: str,
) -> None:  # fmt: skip
    out, away, save = tmp_path / "run", tmp_path / "away", checkpoints.save
    before: dict[Path, bytes] = {}

    def take() -> None:
        out.rename(away)
        shutil.copytree(whole_short, out)
        for name in ("00000001", "00000002"):  # a run with keep=1 would remove the first
            shutil.copytree(out / "checkpoints" / "00000008", out / "checkpoints" / name)
        (out / "checkpoints" / "00000002" / "model.safetensors").write_bytes(b"not the newest")
        before.update(files_below(out))

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
    assert files_below(out) == before
    written = capsys.readouterr()
    why = (
        f"{out}: this is another directory than the one this run began in: another run may have"
        " taken its name; the checkpoints are in the run's own directory, if that was only renamed"
    )
    assert written.err == f"gpt2c: {why}\n"
    assert f"step 6: {why}; the run continues and tries again" in written.out
    assert checkpoint_names(away) == ["00000002"]
    assert [entry["step"] for entry in read_metrics(away / "metrics.jsonl")] == [*range(1, 9)]


def test_lost_model_removes_no_checkpoint_of_another_run(
    data: Path, tmp_path: Path, whole_short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def evaluate(*arguments: Any) -> float:
        out.rename(tmp_path / "away")
        shutil.copytree(whole_short, out)
        return math.nan

    monkeypatch.setattr(pretrain, "evaluate", evaluate)
    with pytest.raises(OSError, match="another run may have taken its name"):
        train_short(data, out, eval_interval=0)
    assert files_below(out) == {
        out / path.relative_to(whole_short): content
        for path, content in files_below(whole_short).items()
    }
