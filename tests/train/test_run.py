"""A run that is killed goes on to the same bits, whenever it was, and nobody else disturbs it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOCUMENTS, refused
from helpers.kills import TINY, contents

from gpt2c.cli.main import main
from gpt2c.gpt2 import GPT2
from gpt2c.screen.progress import Progress
from gpt2c.text.batches import Batches
from gpt2c.text.prepare import prepare
from gpt2c.train import checkpoints, loop, tensorboard
from gpt2c.train import run as run_module
from gpt2c.train.loop import TrainResult
from gpt2c.train.metrics import read_metrics
from gpt2c.train.optimizer import SCHEDULES, AdamW
from gpt2c.train.run import locked_run, read_record

pytestmark = pytest.mark.usefixtures("no_picture")


def train(data: Path, out: Path, *, resume: bool = False, **changes: Any) -> TrainResult:
    return loop.train(data, out, changes if resume else TINY | changes, resume=resume)


def same(a: Path, b: Path) -> None:
    """Check that two runs are the same to the last bit."""
    assert contents(a) == contents(b)


@pytest.fixture
def whole(data: Path, tmp_path: Path) -> Path:
    """Return a run of 20 steps that nothing interrupted."""
    train(data, tmp_path / "whole", save_interval=5)
    return tmp_path / "whole"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a way to have a run that was stopped in the middle of a step."""

    def begin(data: Path, out: Path, step: int, **changes: Any) -> Path:
        def stop(self: Progress, now: int, figures: str) -> None:
            if now == step:
                raise RuntimeError("power cut")

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "step", stop)
            patch.setattr(loop, "_rescue", lambda *run: None)  # a power cut saves nothing
            with pytest.raises(RuntimeError, match="power cut"):
                train(data, out, **changes)
        return out

    yield begin


# ---- kill -9 -------------------------------------------------------------------------------------


def kills(data: Path, tmp_path: Path, **job: Any) -> Any:
    """Do a job of kills.py in a process that has not computed: those can fork."""
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
    """Return data whose training tokens lie in so many files."""
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


def test_the_marks_of_the_data_stay_as_old_runs_have_them(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's length and CRC, one after the other; and how many bytes a token has."""
    monkeypatch.setattr("gpt2c.text.shards._BLOCK", 100)  # so that there is more than one block
    train(shards, tmp_path / "run", max_iters=1)
    record = read_record(tmp_path / "run")
    for split in ("train", "val"):
        contents = [p.read_bytes()[1024:] for p in sorted(shards.glob(f"{split}*.bin"))]
        marks = [mark for part in contents for mark in (len(part) // 2, zlib.crc32(part))]
        assert record["data"][split] == marks
        tokens = np.frombuffer(b"".join(contents), "<u2")
        assert record["bytes_per_token"][split] == (tokens < 256).mean()  # but END_OF_TEXT


def test_a_start_reads_each_token_file_once(
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
def test_forty_steps_are_twenty_and_a_kill_and_twenty(
    data: Path, shards: Path, tmp_path: Path
) -> None:
    """Every schedule; batches one at a time and accumulated; over the ends of shards and epochs."""
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
def test_a_kill_between_any_two_operations(data: Path, tmp_path: Path) -> None:
    settings = {"max_iters": 3, "save_interval": 2, "eval_interval": 2}
    result = kills(data, tmp_path, what="points", settings=settings)
    assert result["points"] > 60  # two saves and what begins a run


@pytest.mark.slow
def test_a_kill_of_a_run_that_goes_on_between_any_two_operations(
    data: Path, tmp_path: Path
) -> None:
    settings = {"max_iters": 4, "save_interval": 2, "eval_interval": 2}
    result = kills(data, tmp_path, what="points", settings=settings, first=3)
    assert result["points"] > 40


@pytest.mark.slow
def test_a_kill_of_a_run_that_overwrites_one_of_another_tokenizer(
    data: Path, tmp_path: Path
) -> None:
    prepare(DOCUMENTS, tmp_path / "other", "bpe:270")
    settings = {"max_iters": 1}
    result = kills(data, tmp_path, what="points", settings=settings, other=str(tmp_path / "other"))
    assert result["points"] > 50


@pytest.mark.slow
def test_a_kill_at_any_moment(data: Path, tmp_path: Path) -> None:
    settings = {"max_iters": 20, "save_interval": 1, "eval_interval": 7}
    result = kills(data, tmp_path, what="moments", settings=settings, kills=12)
    assert result["kills"] == 12 and result["kills of a resumed run"] > 0


# ---- going on ------------------------------------------------------------------------------------


def test_a_run_that_never_saved_goes_on(data: Path, tmp_path: Path, cut: Any) -> None:
    train(data, tmp_path / "whole", seed=5)
    out = cut(data, tmp_path / "run", 7, seed=5)
    assert not (out / "model.safetensors").exists()
    result = train(data, out, resume=True)
    assert (result.started, result.step) == (0, 20)
    same(out, tmp_path / "whole")


def test_a_finished_run_says_so(
    data: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    command = ["train", "--data", str(data), "--out", str(whole), "--resume"]
    assert main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{whole}: was finished already, after 20 steps (a larger --max-iters")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert main([*command, "--max-iters", "24"]) == 0
    assert re.search(r": 4 steps in \d+ s, 24 in all, validation", capsys.readouterr().out)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_longer_run_keeps_the_rates_it_had(data: Path, tmp_path: Path, schedule: str) -> None:
    """With another max_iters the steps to come follow the new schedule, those done stay."""
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


def test_a_changed_setting_is_remembered_at_once(data: Path, tmp_path: Path, cut: Any) -> None:
    out = cut(data, tmp_path / "run", 7)
    train(data, out, resume=True, max_iters=3)
    assert read_record(out)["settings"]["max_iters"] == 3
    assert train(data, out, resume=True).step == 3


def test_the_newest_whole_checkpoint_counts(
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


def test_the_directory_is_the_newest_checkpoints_model(data: Path, whole: Path) -> None:
    newest = whole / "checkpoints" / "00000020"
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (newest / name).read_bytes()
    assert GPT2.from_pretrained(whole).config == GPT2.from_pretrained(newest).config


def test_what_other_programs_write_does_not_reach_the_checkpoint(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    """`open(path, "w")` writes into the file that is there, and into every link to it."""
    out = tmp_path / "run"
    train(data, out, save_interval=5)
    inodes = {path.stat().st_ino for path in (out / "checkpoints").rglob("*")}
    # A run goes on by these; the others are only written.
    read = (*("run.json", "metrics.jsonl"), *("vocab.json", "merges.txt", "tokenizer_config.json"))
    for path in [path for path in out.iterdir() if path.is_file()]:
        assert path.stat().st_ino not in inodes, path
        content = path.read_text() if path.name in read else "ruined"
        with open(path, "w") as file:
            file.write(content)
    train(data, out, resume=True)
    same(out, whole)


def test_other_weights_saved_over_a_runs_do_not_touch_it(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    copy = tmp_path / "copy"
    train(data, copy, save_interval=5)
    model = GPT2.from_pretrained(copy)
    model.flat_parameters[:] = 0
    model.save_pretrained(copy)
    train(data, copy, resume=True)
    same(copy, whole)


def test_another_backend_is_told(
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
        ({"settings": {"n_layer": 1}}, "its settings lack n_head: put it back, or"),
        ({"n_layer": "one"}, "its settings are invalid: n_layer must be int"),
        ({"n_embd": 10**9}, "holds a model of another config"),
        ({"learning_rate": 10**400}, "learning_rate is too large"),
        ({"config": 7}, "holds a model of another config"),
        ({"config": {"n_layer": 2}}, "holds a model of another config"),
        ({"data": [1, 2]}, "does not hold the training and validation"),
        ({"data": None}, "does not hold the training and validation"),
        ({"data": {"train": []}}, "does not hold the training and validation"),
    ],
)
def test_a_damaged_record(data: Path, tmp_path: Path, cut: Any, content: Any, wanted: str) -> None:
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
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = refused(train, data, out, resume=True)
    assert str(out) in message or str(data) in message
    assert re.search(wanted, message), message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# ---- one at a time -------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from gpt2c.train.run import locked_run
with locked_run(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(
    data: Path, tmp_path: Path, whole: Path, cut: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut(data, tmp_path / "run", 7, save_interval=5)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"locked\n"
    for flag in ("--resume", "--overwrite"):
        assert main(["train", "--data", str(data), "--out", str(out), flag]) == 2
        assert capsys.readouterr().err == (
            f"gpt2c: another process is training into {out}: wait for it, or name another"
            " directory\n"
        )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    holder.kill()  # SIGKILL: it cannot unlock
    holder.communicate()
    train(data, out, resume=True)
    same(out, whole)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_run(tmp_path), locked_run(tmp_path):
        pass


# ---- not finite ----------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a way to have a number in the gradients, or the loss, of some steps replaced."""

    def arrange(at: tuple[int, ...], name: str, value: float) -> None:
        loss, batch, now = GPT2.loss, Batches.batch, [0]

        def watched(self: Batches, index: int) -> Any:
            now[0] = index + 1
            return batch(self, index)

        def poisoned_loss(self: GPT2, x: Any, y: Any, keep: bool = True) -> float:
            found = loss(self, x, y, keep)
            return value if keep and name == "loss" and now[0] in at else found

        def backward(self: GPT2, scale: float = 1.0) -> None:
            original(self, scale)
            if name != "loss" and now[0] in at:
                self.gradients[name].flat[3] = value

        original = GPT2.backward
        monkeypatch.setattr(Batches, "batch", watched)
        monkeypatch.setattr(GPT2, "loss", poisoned_loss)
        monkeypatch.setattr(GPT2, "backward", backward)

    return arrange


NAMES = ["loss", "h.0.mlp.c_fc.weight", "ln_f.bias"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_stops_before_its_update(
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


def test_without_a_checkpoint_the_error_says_so(data: Path, tmp_path: Path, poisoned: Any) -> None:
    poisoned((3,), "loss", math.nan)
    assert "; there is no checkpoint yet (--save-interval makes some); " in refused(
        train, data, tmp_path / "run"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_step_left_out_updates_nothing_and_is_counted(
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


def test_a_run_with_skipped_steps_goes_on_to_the_bit(
    data: Path, tmp_path: Path, poisoned: Any, cut: Any
) -> None:
    poisoned((6, 14, 15), "ln_f.bias", math.inf)
    settings = {"skip_nonfinite": True, "save_interval": 8}
    train(data, tmp_path / "whole", **settings)
    out = cut(data, tmp_path / "run", 12, **settings)
    assert train(data, out, resume=True).skipped == 3
    same(out, tmp_path / "whole")


@pytest.mark.parametrize("part", ["flat_parameters", "m", "v"])
def test_a_model_that_is_lost_takes_no_good_ones_place(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """An update may overflow though the gradients were finite."""
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


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ({"m": np.zeros(3, np.float32)}, "the state of AdamW must be m, v, got m"),
        (dict.fromkeys("mv", np.zeros(3, np.float32)), r"m must have shape \(\d+,\), got \(3,\)"),
    ],
)
def test_another_optimizers_state_is_refused(
    data: Path, tmp_path: Path, whole: Path, state: dict[str, Any], wanted: str
) -> None:
    """It is not damaged: its checksum is right."""
    checkpoint = whole / "checkpoints" / "00000020"
    found = checkpoints.newest(checkpoint.parent, pytest.fail)
    assert found is not None
    tensors = {name: np.asarray(tensor) for name, tensor in found.tensors.items()}
    shutil.rmtree(checkpoint)
    checkpoints.save(checkpoint.parent, found.state, found.config, tensors, state)
    before = contents(whole)
    message = refused(train, data, whole, resume=True, max_iters=30)
    assert re.fullmatch(f"{checkpoint / 'trainer.safetensors'}: {wanted}", message)
    assert contents(whole) == before


@pytest.fixture
def ruined(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a way to have the update of a step leave weights that are finite and of no use."""

    def arrange(at: int) -> None:
        def ruin(self: AdamW, *arguments: Any) -> float:
            norm = step(self, *arguments)
            if self.steps == at:
                self.model.flat_parameters[:] = 1e30
            return norm

        monkeypatch.setattr(AdamW, "step", ruin)

    step = AdamW.step
    return arrange


def checkpoint_names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("resume", [False, True])
def test_a_ruined_checkpoint_takes_no_good_ones_place(
    data: Path, tmp_path: Path, whole: Path, ruined: Any, resume: bool
) -> None:
    """Its weights are finite, but no loss that comes from them is."""
    ruined(10)
    out = tmp_path / "run"
    bad, good = out / "checkpoints" / "00000010", out / "checkpoints" / "00000005"
    message = refused(train, data, out, save_interval=5)
    if resume:
        message = refused(train, data, out, resume=True)
    assert "at step 11, so the run stopped before its update; the last good checkpoint is" in (
        message
    )
    assert f" is {good} (delete {bad} to go on from it); " in message
    assert checkpoint_names(out) == ["00000005", "00000010"]
    shutil.rmtree(bad)
    ruined(0)  # never
    train(data, out, resume=True)
    same(out, whole)


def test_the_first_checkpoint_may_be_ruined(data: Path, tmp_path: Path, ruined: Any) -> None:
    ruined(5)
    message = refused(train, data, tmp_path / "run", save_interval=5)
    bad = tmp_path / "run" / "checkpoints" / "00000005"
    assert f"; there is no good checkpoint: {bad} gives no finite loss; " in message


def test_an_older_checkpoint_goes_when_the_newer_one_is_known_to_be_good(
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
    assert found[-10] == found[10] == ["00000005", "00000010"]  # the last evaluation is not heard
    assert checkpoint_names(tmp_path / "run") == ["00000010"]


def test_nothing_is_saved_right_after_a_skipped_step(
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


def test_a_run_that_only_skips_is_stopped(
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


def test_the_step_whose_evaluation_fails_is_logged(data: Path, tmp_path: Path, ruined: Any) -> None:
    ruined(9)
    message = refused(train, data, tmp_path / "run", max_iters=9)
    assert message.startswith("the validation loss is ") and "after step 9" in message
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["step"] == 9 and last["loss"] and last["val_loss"] is None


# ---- the order of what reaches the disk ----------------------------------------------------------


def test_a_save_is_on_the_disk_before_the_last_one_goes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves is what was synced, in the order in which it was renamed."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("what a descriptor is of is read from /proc")
    out, done = tmp_path / "run", []  # (operation, path), as seen from the run's directory

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


# ---- a full disk ---------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from gpt2c import files
from gpt2c.cli.main import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [1_000, 4_000, 25_000, 40_000])
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    data: Path, tmp_path: Path, whole: Path, cut: Any, limit: int
) -> None:
    """No file may grow beyond the limit: run.json, metrics.jsonl, the weights, or the moments."""
    pytest.importorskip("resource")
    out = cut(data, tmp_path / "run", 12, save_interval=5)
    newest = out / "checkpoints" / "00000010"
    before = {path: path.read_bytes() for path in [*newest.iterdir(), out / "model.safetensors"]}
    command = [sys.executable, "-B", "-W", "error", "-c", LIMITED, str(limit)]
    command += ["train", "--data", str(data), "--out", str(out), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("gpt2c: ") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and str(out) in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    train(data, out, resume=True)
    same(out, whole)


# ---- TensorBoard ---------------------------------------------------------------------------------


def events(directory: Path) -> list[Any]:
    """Read event files by the format's own rules: length, checksum, record, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = directory.iterdir()
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_event_files_hold_each_step_once(data: Path, tmp_path: Path, cut: Any) -> None:
    pytest.importorskip("tensorboardX")
    out = cut(data, tmp_path / "run", 12, save_interval=5, tensorboard=True, eval_interval=4)
    train(data, out, resume=True)
    version, start, *steps = events(out / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (1, 0)  # START: what came before is void
    entries = read_metrics(out / "metrics.jsonl")
    assert (
        [event.step for event in steps] == [entry["step"] for entry in entries] == [*range(1, 21)]
    )
    for event, entry in zip(steps, entries, strict=True):
        values = {value.tag: value.simple_value for value in event.summary.value}
        assert event.wall_time == entry["time"]
        numbers = {k: np.float32(v) for k, v in entry.items() if k not in ("step", "time")}
        assert values == numbers


def test_tensorboard_reads_them(data: Path, tmp_path: Path, cut: Any) -> None:
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = cut(data, tmp_path / "run", 12, save_interval=5, tensorboard=True)
    train(data, out, resume=True)
    reader = accumulator.EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= {
        *reader.Tags()["scalars"]
    }
    assert [scalar.step for scalar in reader.Scalars("loss")] == list(range(1, 21))


def test_a_run_may_take_it_up_later(data: Path, tmp_path: Path, whole: Path) -> None:
    pytest.importorskip("tensorboardX")
    train(data, whole, resume=True, tensorboard=True, max_iters=22)
    assert [event.step for event in events(whole / "tensorboard")][2:] == list(range(1, 23))


def test_without_tensorboardx(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    message = refused(train, data, tmp_path / "run", tensorboard=True)
    assert message == "tensorboard needs tensorboardX: pip install 'gpt2c[tensorboard]'"
    assert not (tmp_path / "run").exists()


def test_time_goes_on(data: Path, tmp_path: Path, cut: Any) -> None:
    out = cut(data, tmp_path / "run", 12, save_interval=5)
    train(data, out, resume=True)
    entries = read_metrics(out / "metrics.jsonl")
    elapsed = [entry["elapsed_seconds"] for entry in entries]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0
    assert [entry["tokens"] for entry in entries] == [64 * step for step in range(1, 21)]
    assert all(abs(time.time() - entry["time"]) < 600 for entry in entries)
