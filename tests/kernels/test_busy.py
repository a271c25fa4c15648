"""Busy cores: the work of other programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpt2c.kernels.busy import BusyCores


def test_load_leaves_out_the_work_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, now, own = tmp_path / "stat", [100.0], [5.0]
    tick = os.sysconf("SC_CLK_TCK")

    def write(first: float, second: float, third: float) -> None:
        """Write the seconds of work of three cores, of which the last is not this process's."""
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
    write(20, 30, 99)  # our cores worked 20 s in 10 s; 8 s are this process's
    assert two.others() == pytest.approx(1.2)
    assert one.others() == pytest.approx(1.2)  # 1.2 and a thread are more than two cores
    now[0], own[0] = 120.0, 23.0
    write(30, 40, 99)  # 20 s again; 10 s are its own
    assert (two.others(), one.others()) == (pytest.approx(1.0), 0.0)
    now[0] += 0.5
    assert two.others() == 0.0  # the interval is too short
    stat.unlink()
    now[0] += 100
    assert BusyCores(2).others() == 0.0
