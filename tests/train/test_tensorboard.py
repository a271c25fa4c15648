"""TensorBoard: event files hold each step once, also after a resume."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.runs import train

from gpt2c.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("no_picture")


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
    assert (start.session_log.status, start.step) == (1, 0)  # START: older events are void
    entries = read_metrics(out / "metrics.jsonl")
    assert (
        [event.step for event in steps] == [entry["step"] for entry in entries] == [*range(1, 21)]
    )
    for event, entry in zip(steps, entries, strict=True):
        values = {value.tag: value.simple_value for value in event.summary.value}
        assert event.wall_time == entry["time"]
        numbers = {k: np.float32(v) for k, v in entry.items() if k not in ("step", "time")}
        assert values == numbers


def test_tensorboard_reads_the_event_files(data: Path, tmp_path: Path, cut: Any) -> None:
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


def test_resumed_run_may_begin_to_write_event_files(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    pytest.importorskip("tensorboardX")
    train(data, whole, resume=True, tensorboard=True, max_iters=22)
    assert [event.step for event in events(whole / "tensorboard")][2:] == list(range(1, 23))


def test_run_names_the_extra_that_tensorboard_needs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    message = refused(train, data, tmp_path / "run", tensorboard=True)
    assert message == "tensorboard needs tensorboardX: pip install tensorboardX"
    assert not (tmp_path / "run").exists()
