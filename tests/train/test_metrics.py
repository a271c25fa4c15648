"""metrics.jsonl: it has each step once, whatever it held before."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from gpt2c.train.metrics import Metrics, read_metrics


def line(step: Any, **entries: Any) -> bytes:
    return json.dumps({"step": step, "loss": 1.5, **entries}).encode() + b"\n"


def opened(path: Path, step: int) -> list[str]:
    """Open and close the file; return what was reported."""
    lines: list[str] = []
    Metrics(path, step, lines.append).close()
    return lines


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(path)]


def test_appended_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0, pytest.fail)
    metrics.append({"step": 1, "loss": 2 / 3, "grad_norm": math.nan})
    assert read_metrics(path) == [{"step": 1, "loss": 2 / 3, "grad_norm": None}]  # before any flush
    metrics.append({"step": 2, "loss": math.inf})
    metrics.sync()
    metrics.close()
    assert path.read_bytes().endswith(b'{"step": 2, "loss": null}\n')


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, range(1, 9))))
    assert opened(path, 5) == []
    assert path.read_bytes() == b"".join(map(line, range(1, 6)))
    metrics = Metrics(path, 5, pytest.fail)
    metrics.append({"step": 6})
    metrics.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("end", [b'{"step": 6, "lo', b"\0" * 50, b"{}\n", b"\n\n", b"\xff\xfe\n"])
def test_half_a_last_line_is_no_damage(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, range(1, 6))) + end)
    assert opened(path, 5) == []
    assert path.read_bytes() == b"".join(map(line, range(1, 6)))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "bad",
    [
        b"nonsense\n",
        b"\xff\xfe\n",
        b"[3]\n",
        b"{}\n",
        line("3"),
        line(True),
        line(0),
        line(10**20),
        line(3, loss="low"),
        line(3, loss=[1]),
        b'{"step": 3, "loss": NaN}\n',
        b'{"step": 3, "loss": 1e999}\n',
        b'{"step": 3, "loss": 1' + b"0" * 400 + b"}\n",
        b'{"step": 3, "loss": 1' + b"0" * 5000 + b"}\n",
        b'{"step": 3, "step": 3}\n',
        b'{"step": ' + b"[" * 30_000 + b"\n",
        b"x" * 200_000 + b"\n",
        line(2),
    ],
)
def test_damaged_line_is_left_out_and_kept_aside(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = line(1) + line(2) + bad + line(4)
    path.write_bytes(content)
    (report,) = opened(path, 4)
    damaged = tmp_path / "metrics.jsonl.damaged"
    assert report == (
        f"{path} was damaged: 1 of 4 steps cannot be read; a copy of the damaged file is {damaged}"
    )
    assert damaged.read_bytes() == content
    assert path.read_bytes() == line(1) + line(2) + line(4)
    assert opened(path, 4) == []  # once is enough
    assert steps(damaged) == [1, 2, 4]  # a picture of it is drawn as well


def test_missing_metrics_file_begins_anew(tmp_path: Path) -> None:
    assert opened(tmp_path / "metrics.jsonl", 7) == []
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "other.jsonl")


def test_error_of_a_failed_write_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, pytest.fail)

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            metrics.append({"step": 1})
    metrics.close()


def test_partial_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda descriptor, content: write(descriptor, content[:3]))
        metrics.append({"step": 1, "loss": 2.5})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
