"""A run's directory: a killed run resumes to the same bits, and one process trains at a time."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOCUMENTS, refused
from helpers.command import environment, program
from helpers.kills import contents, same
from helpers.runs import checkpoint_names, files_below, train

from gpt2c.cli.main import main
from gpt2c.files import atomic
from gpt2c.formats.huggingface import save_weights
from gpt2c.generator import Generator
from gpt2c.gpt2 import GPT2
from gpt2c.text.prepare import prepare
from gpt2c.train import checkpoints
from gpt2c.train.directory import locked_run, read_record
from gpt2c.train.metrics import read_metrics
from gpt2c.train.optimizer import SCHEDULES

pytestmark = pytest.mark.usefixtures("no_picture")


# ---- kill -9 -------------------------------------------------------------------------------------


def kills(data: Path, tmp_path: Path, **job: Any) -> Any:
    """Do a job of kills.py in a process that has not computed yet, so that it can fork."""
    if not hasattr(os, "fork"):
        pytest.skip("nothing forks here")
    script = Path(__file__).parents[1] / "helpers" / "kills.py"
    text = json.dumps(job | {"data": str(data), "out": str(tmp_path / "kills")})
    command = [sys.executable, "-W", "error", str(script), text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=[1, 3], ids=["one shard", "three shards"])
def shards(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Path:
    """Return data whose training tokens are in one file, or in three."""
    if request.param == 1:
        return data
    copy = tmp_path / "shards"
    shutil.copytree(data, copy)
    content = (copy / "train.bin").read_bytes()
    (copy / "train.bin").unlink()
    (copy / "manifest.json").unlink()
    header, tokens = (
        np.frombuffer(content[:1024], "<i4").copy(),
        np.frombuffer(content[1024:], "<u2"),
    )
    for i, part in enumerate(np.array_split(tokens, request.param), start=1):
        header[2] = len(part)
        (copy / f"train_{i:06d}.bin").write_bytes(header.tobytes() + part.tobytes())
    return copy


def test_record_marks_the_data_as_older_runs_did(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length and CRC of each file, in order; and the bytes per token."""
    monkeypatch.setattr("gpt2c.text.shards._BLOCK", 100)  # so that there is more than one block
    train(shards, tmp_path / "run", max_iters=1)
    record = read_record(tmp_path / "run")
    for split in ("train", "val"):
        contents = [p.read_bytes()[1024:] for p in sorted(shards.glob(f"{split}*.bin"))]
        marks = [mark for part in contents for mark in (len(part) // 2, zlib.crc32(part))]
        assert record["data"][split] == marks
        tokens = np.frombuffer(b"".join(contents), "<u2")
        assert record["bytes_per_token"][split] == (tokens < 256).mean()  # all but END_OF_TEXT


def test_start_reads_each_token_file_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, read = os.preadv, [0]

    def counted(*arguments: Any) -> int:
        size = preadv(*arguments)
        read[0] += size
        return size

    monkeypatch.setattr(os, "preadv", counted)
    with pytest.raises(ValueError, match="too few for one batch"):
        train(data, tmp_path / "run", block_size=1 << 20)
    sizes = [(data / f"{split}.bin").stat().st_size - 1024 for split in ("train", "val")]
    assert read == [sum(sizes)]


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_batches_and_bits(
    data: Path, shards: Path, tmp_path: Path
) -> None:
    """For every schedule, with and without accumulation, across ends of shards and epochs."""
    settings = [
        {"max_iters": 40, "save_interval": 20, "eval_interval": 16, "schedule": schedule}
        | {"batch_size": 6, "step_size": 7, "gradient_accumulation_steps": accumulate}
        for schedule in SCHEDULES
        for accumulate in (1, 3)
    ]
    epoch = ((data / "train.bin").stat().st_size - 1024) // 2 // 16  # windows
    assert 6 * 27 < epoch < 6 * 40 < 3 * 6 * 20, "an epoch must end after the kill, and before it"
    result = kills(shards, tmp_path, what="exact", settings=settings, stop=27)
    assert result == {"runs": 10, "batches": 5 * 40 + 5 * 120}


@pytest.mark.slow
def test_run_survives_a_kill_between_any_two_disk_operations(data: Path, tmp_path: Path) -> None:
    settings = {"max_iters": 3, "save_interval": 2, "eval_interval": 2}
    result = kills(data, tmp_path, what="points", settings=settings)
    assert result["points"] > 60  # two saves and what begins a run


@pytest.mark.slow
def test_resumed_run_survives_a_kill_between_any_two_disk_operations(
    data: Path, tmp_path: Path
) -> None:
    settings = {"max_iters": 4, "save_interval": 2, "eval_interval": 2}
    result = kills(data, tmp_path, what="points", settings=settings, first=3)
    assert result["points"] > 40


@pytest.mark.slow
def test_overwriting_run_survives_a_kill_between_any_two_disk_operations(
    data: Path, tmp_path: Path
) -> None:
    prepare(DOCUMENTS, tmp_path / "other", "bpe:270")
    settings = {"max_iters": 1}
    result = kills(data, tmp_path, what="points", settings=settings, other=str(tmp_path / "other"))
    assert result["points"] > 50


@pytest.mark.slow
def test_run_survives_a_kill_at_any_moment(data: Path, tmp_path: Path) -> None:
    settings = {"max_iters": 20, "save_interval": 1, "eval_interval": 7}
    result = kills(data, tmp_path, what="moments", settings=settings, kills=12)
    assert result["kills"] == 12 and result["kills of a resumed run"] > 0


# ---- resume --------------------------------------------------------------------------------------


def test_run_without_a_checkpoint_starts_again_on_resume(
    data: Path, tmp_path: Path, cut: Any
) -> None:
    train(data, tmp_path / "whole", seed=5)
    out = cut(data, tmp_path / "run", 7, seed=5)
    assert not (out / "model.safetensors").exists()
    result = train(data, out, resume=True)
    assert (result.started, result.step) == (0, 20)
    same(out, tmp_path / "whole")


def test_resume_of_a_finished_run_reports_that_it_is_finished(
    data: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(whole)
    command = ["train", "--data", str(data), "--out", str(whole), "--resume"]
    assert main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{whole}: is already finished after 20 steps: raise --max-iters")
    assert files_below(whole) == before
    assert main([*command, "--max-iters", "24"]) == 0
    assert re.search(r": 4 steps in \d+ s, 24 in all, validation", capsys.readouterr().out)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_longer_max_iters_keep_the_learning_rates_of_past_steps(
    data: Path, tmp_path: Path, schedule: str
) -> None:
    """With another max_iters, only the steps to come follow the new schedule."""
    for name, steps in (("short", 10), ("long", 16)):
        train(data, tmp_path / name, max_iters=steps, schedule=schedule, step_size=3)
    train(data, tmp_path / "short", resume=True, max_iters=16)
    short, long = (
        [entry["learning_rate"] for entry in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("short", "long")
    )
    assert short[10:] == long[10:]
    if schedule in ("constant", "step"):  # whose rates do not depend on the run's length
        names = ("model.safetensors", "config.json")
        assert short == long
        assert all(
            (tmp_path / "short" / n).read_bytes() == (tmp_path / "long" / n).read_bytes()
            for n in names
        )
    else:
        assert short[:10] != long[:10]


def test_resume_records_a_changed_setting_at_once(data: Path, tmp_path: Path, cut: Any) -> None:
    out = cut(data, tmp_path / "run", 7)
    train(data, out, resume=True, max_iters=3)
    assert read_record(out)["settings"]["max_iters"] == 3
    assert train(data, out, resume=True).step == 3


def test_resume_takes_the_newest_whole_checkpoint(
    data: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(data, out, save_interval=5, keep=3)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["00000010", "00000015", "00000020"]
    for name in names[1:]:
        os.truncate(out / "checkpoints" / name / "trainer.safetensors", 5)
    capsys.readouterr()
    result = train(data, out, resume=True, keep=1)
    assert (result.started, result.step) == (10, 20)
    lines = [line for line in capsys.readouterr().out.splitlines() if "is not whole" in line]
    assert [Path(line.split()[0]).name for line in lines] == ["00000020", "00000015"]
    kept = [out / "checkpoints" / f"{name}.damaged" for name in names[1:]]
    assert all((path / "trainer.safetensors").stat().st_size == 5 for path in kept)
    for path in kept:
        shutil.rmtree(path)
    same(out, whole)


def test_run_directory_holds_the_model_of_the_newest_checkpoint(data: Path, whole: Path) -> None:
    newest = whole / "checkpoints" / "00000020"
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (newest / name).read_bytes()
    assert GPT2.from_pretrained(whole).config == GPT2.from_pretrained(newest).config


def test_checkpoint_shares_no_file_with_the_run_directory(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    """`open(path, "w")` would write into the checkpoint through a hard link."""
    out = tmp_path / "run"
    train(data, out, save_interval=5)
    inodes = {path.stat().st_ino for path in (out / "checkpoints").rglob("*")}
    # A resumed run reads these, or keeps them if it had finished; it only writes the others.
    read = ("run.json", "metrics.jsonl", "result.json")
    read += ("vocab.json", "merges.txt", "tokenizer_config.json")
    for path in [path for path in out.iterdir() if path.is_file()]:
        assert path.stat().st_ino not in inodes, path
        content = path.read_text() if path.name in read else "ruined"
        with open(path, "w") as file:
            file.write(content)
    train(data, out, resume=True)
    same(out, whole)


def test_resume_ignores_weights_saved_over_the_run(data: Path, tmp_path: Path, whole: Path) -> None:
    copy = tmp_path / "copy"
    train(data, copy, save_interval=5)
    model = GPT2.from_pretrained(copy)
    model.flat_parameters[:] = 0
    model.save_pretrained(copy)
    train(data, copy, resume=True)
    same(copy, whole)


def test_resume_warns_of_another_backend(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data, tmp_path / "run", max_iters=3, backend="base")
    train(data, tmp_path / "run", resume=True, max_iters=4, backend="numpy")
    said = capsys.readouterr().out
    assert "run ran on base and continues on numpy: the result will not be bit-for-bit" in said


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"version": 2}', "version must be 1, got 2"),
        (b'{"version": 1}', "lacks settings"),
        ({"settings": []}, r"its settings must be an object, got \[\]"),
        ({"settings": {"n_layer": 1}}, "its settings lack learning_rate: put it back, or"),
        ({"n_layer": "one"}, "its settings are invalid: n_layer must be int"),
        ({"n_embd": 10**9}, "another config: its n_embd is [0-9]+, and .* makes it 1000000000$"),
        ({"learning_rate": 10**400}, "learning_rate is too large"),
        ({"config": 7}, "another config: its model_type is None, and .* makes it 'gpt2'"),
        ({"config": {"n_layer": 2}}, "another config: its vocab_size is 50257, and .* makes it"),
        ({"data": [1, 2]}, "does not hold the training and validation"),
        ({"data": None}, "does not hold the training and validation"),
        ({"data": {"train": []}}, "does not hold the training and validation"),
    ],
)
def test_resume_refuses_a_damaged_record(
    data: Path, tmp_path: Path, cut: Any, content: Any, wanted: str
) -> None:
    out = cut(data, tmp_path / "run", 3)
    path = out / "run.json"
    if isinstance(content, dict):
        record = json.loads(path.read_text())
        settings = record["settings"] | {
            k: v for k, v in content.items() if k in record["settings"]
        }
        record |= {"settings": settings} | {k: v for k, v in content.items() if k in record}
        content = json.dumps(record).encode()
    path.write_bytes(content)
    before = files_below(out)
    message = refused(train, data, out, resume=True)
    assert str(out) in message or str(data) in message
    assert re.search(wanted, message), message
    assert files_below(out) == before


def test_run_saves_by_the_clock(data: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    train(data, out, save_minutes=1e-9, keep=99)
    assert checkpoint_names(out) == [f"{step:08d}" for step in range(1, 21)]
    for name in checkpoint_names(out)[:-1]:
        shutil.rmtree(out / "checkpoints" / name)
    record = json.loads((out / "run.json").read_text())
    record["settings"] |= {"save_minutes": 10.0, "save_interval": 5, "keep": 1}
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    assert contents(out) == contents(whole)


def test_run_of_an_older_version_goes_on(
    data: Path, tmp_path: Path, whole: Path, cut: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut(data, tmp_path / "run", 7, save_interval=5)
    record = json.loads((out / "run.json").read_text())
    del record["settings"]["threads"]
    (out / "run.json").write_text(json.dumps(record))
    train(data, out, resume=True)
    assert contents(out) == contents(whole)
    assert "version's; settings that it lacks become threads=0\n" in capsys.readouterr().out
    record["settings"]["rope"] = True
    (out / "run.json").write_text(json.dumps(record))
    assert "its settings have 'rope', which" in refused(train, data, out, resume=True)


def test_checkpoint_generates_with_the_tokenizer_of_its_run(whole: Path, tmp_path: Path) -> None:
    checkpoint = whole / "checkpoints" / "00000020"
    settings = {"max_new_tokens": 5, "seed": 1}
    texts = [
        Generator.from_pretrained(path).generate("a", **settings) for path in (checkpoint, whole)
    ]
    assert texts[0] == texts[1]
    shutil.copytree(checkpoint, tmp_path / "00000020")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json does not exist"):
        Generator.from_pretrained(tmp_path / "00000020")


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ({"m": np.zeros(3, np.float32)}, "the state of AdamW must be m, v, got m"),
        (dict.fromkeys("mv", np.zeros(3, np.float32)), r"m must have shape \(\d+,\), got \(3,\)"),
    ],
)
def test_resume_refuses_the_state_of_another_optimizer(
    data: Path, tmp_path: Path, whole: Path, state: dict[str, Any], wanted: str
) -> None:
    """It is not damaged: its checksum is right."""
    checkpoint = whole / "checkpoints" / "00000020"
    found = checkpoints.newest(checkpoint.parent, pytest.fail)
    assert found is not None
    tensors = {name: np.asarray(tensor) for name, tensor in found.tensors.items()}
    shutil.rmtree(checkpoint)
    write = partial(save_weights, config=found.config, tensors=tensors)
    checkpoints.save(checkpoint.parent, found.state, write, state)
    before = contents(whole)
    message = refused(train, data, whole, resume=True, max_iters=30)
    assert re.fullmatch(f"{checkpoint / 'trainer.safetensors'}: {wanted}", message)
    assert contents(whole) == before


def test_elapsed_seconds_go_on_after_resume(data: Path, tmp_path: Path, cut: Any) -> None:
    out = cut(data, tmp_path / "run", 12, save_interval=5)
    train(data, out, resume=True)
    entries = read_metrics(out / "metrics.jsonl")
    elapsed = [entry["elapsed_seconds"] for entry in entries]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0
    assert [entry["tokens"] for entry in entries] == [64 * step for step in range(1, 21)]
    assert all(abs(time.time() - entry["time"]) < 600 for entry in entries)


# ---- one process at a time -----------------------------------------------------------------------


def test_run_refuses_a_second_process_until_the_first_is_dead(
    data: Path, tmp_path: Path, whole: Path, cut: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut(data, tmp_path / "run", 7, save_interval=5)
    before = files_below(out)
    command = program("programs.disks", "hold", str(out))
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    assert holder.stdout and holder.stdout.readline() == b"locked\n"
    for flag in ("--resume", "--overwrite"):
        assert main(["train", "--data", str(data), "--out", str(out), flag]) == 2
        assert capsys.readouterr().err == (
            f"gpt2c: another process is training into {out}: wait for it, or name another"
            " directory\n"
        )
    assert files_below(out) == before
    holder.kill()  # SIGKILL: it cannot unlock
    holder.communicate()
    train(data, out, resume=True)
    same(out, whole)


def test_prepare_and_demo_refuse_to_replace_tokens_in_use(
    data: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, text = tmp_path / "demo", tmp_path / "text.txt"
    shutil.copytree(data, demo / "data")
    text.write_text("The cat sat on the mat.\n" * 400)
    before, codes = files_below(demo / "data"), []

    def others() -> None:
        out = ["--out", str(demo / "data"), "--overwrite"]
        codes.append(main(["prepare", str(text), "--tokenizer", "bytes", *out]))
        codes.append(main(["demo", "--text", str(text), "--out", str(demo), "--overwrite"]))

    at_step(3, others)
    train(demo / "data", demo / "run")
    assert codes == [2, 2] and files_below(demo / "data") == before
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"gpt2c: another process trains on {demo / 'data'}, or prepares it")
    assert errors[1].startswith(f"gpt2c: another process is training into {demo / 'run'}: wait")
    prepare(DOCUMENTS, demo / "data", "bytes", overwrite=True)  # it has ended


def test_two_runs_share_their_tokens(data: Path, tmp_path: Path, at_step: Any) -> None:
    results = []
    at_step(3, lambda: results or results.append(train(data, tmp_path / "b", max_iters=2)))
    train(data, tmp_path / "a")
    assert [result.step for result in results] == [2]


def test_training_refuses_tokens_that_another_process_prepares(data: Path, tmp_path: Path) -> None:
    with (
        atomic.locked(data, "no"),
        pytest.raises(BlockingIOError, match="another process prepares"),
    ):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lock_is_left_out_where_the_file_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_run(tmp_path), locked_run(tmp_path):
        pass


# ---- the order of writes -------------------------------------------------------------------------


def test_new_checkpoint_is_synced_before_the_old_one_is_removed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves what was synced, in the order of the renames."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("what a descriptor is of is read from /proc")
    out, done = tmp_path / "run", []  # (operation, path relative to the run's directory)

    def name(path: Any) -> str:
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
        return re.sub(r"/\.(\w+)(\.\w+)?\.\d+\.tmp", r"/new \1\2", "/" + os.path.relpath(path, out))

    def watch(module: Any, operation: str, which: int = 0) -> None:
        original = getattr(module, operation)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            done.append((operation, name(arguments[which])))
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, operation, watched)

    train(data, out, max_iters=5)
    for module, operation, which in (
        *((os, "fsync", 0), (os, "replace", 1), (os, "rename", 1), (os, "unlink", 0)),
        (shutil, "rmtree", 0),
    ):
        watch(module, operation, which)
    train(data, out, resume=True, max_iters=6)
    place = {step: i for i, step in enumerate(done)}
    renamed = place["rename", "/checkpoints/00000006"]
    new = "/checkpoints/new 00000006"
    files = {path.name for path in (out / "checkpoints" / "00000006").iterdir()}
    assert len(files) == 5
    assert all(place["fsync", f"{new}/{file}"] < place["fsync", new] for file in files)
    assert place["fsync", new] < renamed < place["fsync", "/checkpoints"]
    assert done.index(("fsync", "/metrics.jsonl")) < renamed  # of the steps before
    amended = place["replace", "/checkpoints/00000006/state.json"]
    assert renamed < place["fsync", "/metrics.jsonl"] < amended  # of the evaluated step
    published = place["replace", "/model.safetensors"]
    assert amended < published
    assert place["fsync", "/checkpoints"] < place["fsync", "/new model.safetensors"] < published
    old = [at for at, (_, path) in enumerate(done) if "00000005" in path]
    assert old and min(old) > published, "the last checkpoint goes after all else"
