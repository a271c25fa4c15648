"""Progress: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers.command import Terminal

from gpt2c.cli.main import main
from gpt2c.screen import progress
from gpt2c.screen.progress import Reading
from gpt2c.text.prepare import prepare

MB = 1_000_000
Capture = pytest.CaptureFixture[str]


class Clock:
    """A clock that the tests set; tqdm has its own."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def read(reading: Reading, clock: Clock, seconds: float, total: int = 100 * MB) -> None:
    """Read a text of 100 pieces in this number of seconds."""
    for percent in range(1, 101):
        clock.now += seconds / 100
        reading.read(percent * MB, total)
        if percent == 100:  # a report after the last byte changes nothing
            reading.read(percent * MB, total)


def test_lines_come_ten_seconds_apart(clock: Clock, capsys: Capture) -> None:
    with Reading() as reading:
        reading.stage("encoding")
        read(reading, clock, 25)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2] == "encoding: 100 of 100 MB"
    shares = [
        re.fullmatch(r"encoding: (\d+) of 100 MB  00:(\d\d) left", line) for line in lines[:2]
    ]
    (first, then), (second, end) = ((int(s[1]), int(s[2])) for s in shares if s)
    assert 40 <= first <= 42 and 80 <= second <= 84
    assert 14 <= then <= 15 and 4 <= end <= 5


def test_short_work_shows_no_progress(clock: Clock, capsys: Capture) -> None:
    with Reading() as reading:
        for _ in range(20):  # 120 seconds in all
            read(reading, clock, 6)
    assert capsys.readouterr().out == ""


def test_each_pass_has_a_name_and_its_own_time(clock: Clock, capsys: Capture) -> None:
    with Reading() as reading:
        read(reading, clock, 12)
        reading.stage("learning tokens")
        read(reading, clock, 5)
        reading.stage("encoding")
        read(reading, clock, 12)
        read(reading, clock, 12)  # again
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["reading"] * 2 + ["encoding"] * 4


def test_progress_of_a_pipe_shows_no_remaining_time(clock: Clock, capsys: Capture) -> None:
    with Reading() as reading:
        read(reading, clock, 15, total=0)
    assert re.fullmatch(r"reading: 6\d MB\n", capsys.readouterr().out)


def test_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(progress, "_QUICK", 0.0)
    with Reading() as reading:
        reading.stage("encoding")
        reading.read(30 * MB, 100 * MB)
        reading.read(100 * MB, 100 * MB)
    shown = terminal.getvalue()
    assert "encoding: 100M/100M [" in shown.split("\r")[-1]
    assert shown.endswith("\n")


def test_terminal_is_written_to_ten_times_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    updates = []
    monkeypatch.setattr(progress._Bar, "update", lambda bar, n: updates.append(clock.now))
    with Reading() as reading:
        for done in range(2000):
            clock.now += 0.001
            reading.read(done, 5000)
    assert 10 <= len(updates) <= 16  # two seconds, without the first half


def test_progress_survives_a_failing_stream(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    class Full(Terminal):
        def write(self, text: str) -> int:
            raise OSError("no space")

    class FullFile(Full):
        def isatty(self) -> bool:
            return False

    for stream in (Full(), FullFile()):
        monkeypatch.setattr(sys, "stdout", stream)
        with Reading() as reading:
            read(reading, clock, 100)


def test_prepare_names_each_pass_over_the_text(tmp_path: Path) -> None:
    texts, stages = [f"the cat {n} sat on the mat. " * 20 for n in range(20)], []
    prepare(texts, tmp_path / "a", "bpe:300", stage=stages.append)
    assert stages == ["reading", "learning tokens", "encoding"]
    stages.clear()
    prepare(texts, tmp_path / "b", "bytes", stage=stages.append)
    assert stages == ["reading", "encoding"]


@pytest.mark.parametrize(
    "verb", ["prepare", "demo --max-iters 1 --n-layer 1 --block-size 8 --text"]
)
def test_commands_show_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, verb: str
) -> None:
    monkeypatch.setattr(progress, "_BETWEEN", 0.0)
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 20_000)
    assert main([*verb.split(), str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 0 MB" in line]
    names = list(dict.fromkeys(line.split(":")[0] for line in lines))
    assert names == ["reading", "learning tokens", "encoding"]
