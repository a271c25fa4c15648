"""Checkpoints: a save round trips bit for bit, and damaged checkpoints are passed over by name."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c.formats.huggingface import read_config, save_weights
from gpt2c.train import checkpoints
from gpt2c.train.checkpoints import TrainerState, before, newest, prune, save

CONFIG = {"n_embd": 4, "model_type": "gpt2"}
FILES = ["config.json", "generation_config.json", "model.safetensors", "state.json"]
FILES += ["trainer.safetensors"]


def arrays(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and moments."""
    rng = np.random.default_rng(seed)
    weights = {"wte.weight": (7, 4), "h.0.attn.c_attn.weight": (12, 4), "ln_f.bias": (4,)}
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in weights.items()}
    return drawn, {name: rng.standard_normal(80, np.float32) for name in ("m", "v")}


def put(directory: Path, step: int, **state: Any) -> Path:
    weights, moments = arrays(step)
    write = partial(save_weights, config=CONFIG, tensors=weights)
    return save(directory, TrainerState(step, **state), write, moments)


def found(directory: Path) -> tuple[int, list[str]]:
    """Return the step of the newest whole checkpoint, and the messages about the others."""
    lines: list[str] = []
    checkpoint = newest(directory, lines.append)
    assert checkpoint is not None
    return checkpoint.state.step, lines


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Return a directory with checkpoints of the steps 10, 20 and 30."""
    for step in (10, 20, 30):
        put(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def test_round_trip(tmp_path: Path) -> None:
    state = TrainerState(40, skipped=3, seconds=1.25, val_loss=2 / 3)
    weights, moments = arrays(1)
    write = partial(save_weights, config=CONFIG, tensors=weights)
    path = save(tmp_path / "checkpoints", state, write, moments)
    assert path == tmp_path / "checkpoints" / "00000040"
    assert sorted(file.name for file in path.iterdir()) == FILES
    checkpoint = newest(path.parent, pytest.fail)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.state, checkpoint.config) == (path, state, CONFIG)
    for read, written in ((checkpoint.tensors, weights), (checkpoint.optimizer, moments)):
        assert read.keys() == written.keys()
        assert all(np.array_equal(np.asarray(read[name]), written[name]) for name in written)
    assert read_config(path)[0] == CONFIG  # a checkpoint is a model directory


def test_trainer_state_survives_a_dict_and_refuses_a_bad_entry() -> None:
    entry = {"step": 4, "loss": 1.5}
    state = TrainerState(4, entry=entry)
    assert TrainerState(**dataclasses.asdict(state)) == state
    for bad in ({"step": 5}, {}, [1], 7, {"step": 4, "loss": "low"}, {"step": 4, "loss": [1]}):
        assert "entry must be the metrics of the step" in refused(
            TrainerState, 4, 0, 0.0, None, bad
        )


def test_prune_keeps_the_newest(three: Path) -> None:
    assert [path.name for path in sorted(three.iterdir())] == ["00000010", "00000020", "00000030"]
    path = put(three, 40)
    assert before(path) == three / "00000030" and before(three / "00000010") is None
    prune(path, 2)
    assert [path.name for path in sorted(three.iterdir())] == ["00000030", "00000040"]
    assert found(three) == (40, [])


def test_newest_returns_none_without_checkpoints(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints", pytest.fail) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".00000010.77.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes").touch()
    assert newest(tmp_path / "checkpoints", pytest.fail) is None


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes: Any) -> None:
    """Change state.json and correct its checksum."""
    content = json.loads(path.read_text())
    for name, change in changes.items():
        content[name] = change(content[name])
    summed = {name: content[name] for name in ("state", "files")}
    content["sha256"] = checkpoints._sum_of(summed)
    path.write_text(json.dumps(content))


def state(**changes: Any) -> Any:
    return lambda path: rewrite(path / "state.json", state=lambda old: old | changes)


DAMAGES: list[tuple[Any, str]] = [
    (lambda path: (path / "state.json").unlink(), "state.json"),
    (lambda path: (path / "state.json").write_bytes(b""), r"state\.json is not valid JSON"),
    (lambda path: (path / "state.json").write_text("[]"), "must hold a JSON object"),
    (lambda path: (path / "state.json").write_text("{}"), "is of version None, wanted 1"),
    (lambda path: (path / "state.json").write_text("[" * 10**5), "is not valid JSON"),
    (lambda path: flip(path / "state.json", -120), r"state\.json"),
    (lambda path: (path / "trainer.safetensors").unlink(), r"trainer\.safetensors"),
    (lambda path: os.truncate(path / "trainer.safetensors", 100), "has 100 bytes, not "),
    (lambda path: os.truncate(path / "model.safetensors", 0), "has 0 bytes, not "),
    (
        lambda path: flip(path / "model.safetensors", -1),
        r"model\.safetensors is damaged: its SHA-256 is not",
    ),
    (lambda path: flip(path / "trainer.safetensors", 500), r"trainer\.safetensors is damaged"),
    (lambda path: flip(path / "config.json", 5), r"config\.json is damaged"),
    (lambda path: [f.unlink() for f in path.iterdir()], r"state\.json"),
    (lambda path: [shutil.rmtree(path), path.touch()], r"state\.json"),
    (state(step=31), "is of step 31"),
    (state(step="30"), "step must be a whole number"),
    (state(step=True), "step must be a whole number"),
    (state(skipped=31), "skipped must be a whole number in"),
    (state(seconds=-1.0), "seconds must be finite and at least 0"),
    (state(val_loss="low"), "val_loss must be finite and at least 0"),
    (state(more=1), "has a state of other fields"),
    (
        lambda path: rewrite(
            path / "state.json", files=lambda old: old | {"../x": old["config.json"]}
        ),
        r"names a file that is not beside it: '\.\./x'",
    ),
    (
        lambda path: rewrite(path / "state.json", files=lambda old: []),
        "files must be an object of objects",
    ),
    (
        lambda path: rewrite(path / "state.json", files=lambda old: {"config.json": 1}),
        "files must be an object",
    ),
    (lambda path: rewrite(path / "state.json", files=lambda old: {}), "files lacks config.json"),
    (lambda path: rewrite(path / "state.json", version=lambda old: True), "is of version True"),
    (lambda path: rewrite(path / "state.json", state=lambda old: [1]), "has a state of other fiel"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_newest_passes_over_a_damaged_checkpoint(three: Path, damage: Any, reason: str) -> None:
    damage(three / "00000030")
    step, lines = found(three)
    assert step == 20
    (line,) = lines
    assert line.startswith(f"{three / '00000030'} is not whole: ") and "\n" not in line
    end = f"; it is kept as 00000030.damaged, going on from {three / '00000020'}"
    assert line.endswith(end)
    assert re.search(reason, line), line
    prune(put(three, 30), 1)  # the step is done again
    assert sorted(path.name for path in three.iterdir()) == ["00000030", "00000030.damaged"]
    assert found(three) == (30, [])


def test_second_damaged_checkpoint_is_kept_beside_the_first(three: Path) -> None:
    for _ in range(2):
        (three / "00000030" / "state.json").write_text("")
        assert found(three)[0] == 20
        put(three, 30)
    names = [path.name for path in sorted(three.iterdir())][2:]
    assert names == ["00000030", "00000030.damaged", "00000030.damaged2"]


def test_checkpoint_of_another_version_is_refused(three: Path) -> None:
    rewrite(three / "00000030" / "state.json", version=lambda old: 2)
    before = {path: path.stat().st_mtime_ns for path in three.rglob("*")}
    message = refused(newest, three, pytest.fail)
    assert f"{three / '00000030' / 'state.json'} is of version 2, wanted 1" in message
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*")} == before


def test_error_says_that_no_checkpoint_is_whole(three: Path) -> None:
    for path in three.iterdir():
        flip(path / "model.safetensors", -1)
    message = refused(newest, three, pytest.fail)
    assert message.startswith("no checkpoint of the run can be read (")
    assert "00000030 is not whole: model.safetensors is damaged" in message
    assert message.endswith(
        f"; put a whole one into {three}, or begin the run again with --overwrite"
    )


def test_prune_ignores_later_checkpoints(three: Path) -> None:
    prune(put(three, 25), 1)
    assert sorted(path.name for path in three.iterdir()) == ["00000025", "00000030"]


@pytest.mark.parametrize("name", ["read_json", "_sum"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_unreadable_checkpoint_is_an_error(
    three: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """It may be whole. Most errors of a read do not name a file."""

    def failing(path: Path) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints, name, failing)
    with pytest.raises(OSError) as error:
        newest(three, pytest.fail)
    assert error.value.errno == number and error.value.filename == str(three / "00000030")
    assert sorted(path.name for path in three.iterdir()) == ["00000010", "00000020", "00000030"]


def test_failed_save_leaves_the_old_checkpoints(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {path: path.stat().st_mtime_ns for path in three.rglob("*")}
    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(OSError, match="00000040") as error:
        put(three, 40)
    assert error.value.strerror == "No space left on device"
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*")} == before
    assert found(three) == (30, [])
