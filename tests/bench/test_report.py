"""The report of a benchmark: tables, summaries, pictures, JSON, and comparisons."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from datetime import datetime
from pathlib import Path

import pytest
from conftest import refused
from helpers.measured import CEILINGS, op_results

from gpt2c.bench import machine, report
from gpt2c.bench.machine import Ceilings, cpu_name
from gpt2c.bench.ranks import add_speed_ups
from gpt2c.bench.suite import Measurement


def test_table_of_an_op() -> None:
    heading, table = report.ops_table(op_results(), CEILINGS)
    assert "arithmetic" in heading and "1.0 GFLOP" in heading and "1.0 MB" in heading
    assert table[0] == ["", "ms", "±", "GFLOP/s", "% of ceiling", "times as fast as numpy"]
    assert table[2] == ["avx2", "20.000", "0%", "50.0", "50%", "10.00"]
    lines = report.as_text(heading, table).splitlines()
    assert len({len(line) for line in lines[1:4]}) == 1, "columns do not line up"
    assert lines[4].split() == ["torch", "not", "installed"]
    assert report.as_markdown(heading, table).count("|") > 20


def test_table_of_training() -> None:
    facts = {"flops": 1e9, "tokens": 100, "peak_memory": 2e9}
    results = [
        Measurement("train 1 x 100", "avx2", [0.02] * 3, facts=facts),
        Measurement("train 1 x 100", "torch", [0.05] * 3, facts=facts),
        Measurement("train 1 x 100", "torch-tuned", [0.04] * 3, facts=facts),
    ]
    _, table = report.train_table(results, CEILINGS)
    assert table[0][-1] == "times as fast as best PyTorch" and table[0][4] == "% of peak"
    assert report.train_table(results[:1], CEILINGS)[1][0][-1] == "times as fast as avx2"
    assert table[1] == ["avx2", "0.020", "0%", "5,000.0", "50%", "2.00", "2.00"]


def test_table_of_ranks() -> None:
    facts = {"flops": 1e9, "tokens": 100, "peak_memory": 2e9}
    shared = facts | {"ranks": 4, "mpi_bytes": 3e6, "mpi_share": 0.25}
    results = [
        Measurement("train 4 x 25", "avx2", [0.02] * 3, facts=facts),
        Measurement("train 4 x 25", "4 x avx2", [0.01] * 3, facts=shared),
        Measurement("train 4 x 25", "base", note="FAILED: it died"),
        Measurement("train 4 x 25", "4 x base", [0.04] * 3, facts=dict(shared)),
    ]
    add_speed_ups(results)
    _, table = report.ranks_table(results, CEILINGS)
    assert table[0][-4:] == ["speed-up", "efficiency", "MB sent", "waiting"]
    assert table[1] == ["avx2", "0.020", "0%", "5,000.0", "50%", "2.00", "", "", "", ""]
    shown = ["10,000.0", "25%", "2.00", "2.00", "50%", "3.0", "25%"]
    assert table[2] == ["4 x avx2", "0.010", "0%", *shown]
    assert table[3] == ["base", "FAILED: it died"]
    assert table[4][-4:] == ["", "", "3.0", "25%"]  # one rank alone was not measured


def test_json_and_pictures_are_written(tmp_path: Path) -> None:
    report.write_json(tmp_path / "a.json", CEILINGS, op_results(), "quiet")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["results"][1]["median"] == 0.02 and content["peak_flops"]["base"] == 50e9
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "roof.png", op_results(), CEILINGS)
    trained = [Measurement("train 1 x 9", "avx2", [0.1], facts={"tokens": 9, "flops": 1.0})]
    report.draw(tmp_path / "bars.png", trained, CEILINGS)
    for name in ("roof.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "nothing" in refused(report.draw, tmp_path / "x.png", op_results()[2:], CEILINGS)


def test_table_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"avx512vnni": 108e9, "avx512vnni:int8": 420e9}
    ceilings = Ceilings(2, peaks, {1: 53e9, 2: 45e9}, (171.0, 41.0))
    monkeypatch.setattr(report, "caches", lambda: ["L1 32K", "L3 32768K of cores 0-1"])
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    first, *table, near, far = report.machine_lines(ceilings)
    assert first.startswith(f"{cpu_name()}, 2 threads; gpt2c ")
    assert near == "caches: L1 32K, L3 32768K of cores 0-1"
    assert far == "a cache line takes 41 ns from core to core"
    assert [line.split() for line in table] == [
        ["peak", "of", "memory", "with", "GB/s"],
        ["avx512vnni", "108", "GFLOP/s", "1", "thread", "53"],
        ["avx512vnni:int8", "420", "GOP/s", "2", "threads", "45"],
    ]
    assert ", 1 thread; " in report.machine_lines(CEILINGS)[0]


def test_summary_of_ops() -> None:
    facts = {"flops": 1e9, "bytes": 1e6}
    more = [
        Measurement("gelu n=9", "numpy", [0.08], facts=facts),
        Measurement("gelu n=9", "avx2", [0.02], facts=facts),
        Measurement("gelu n=9", "torch", note="PyTorch has no such op", facts=facts),
        Measurement("norm n=9", "numpy", note="WRONG: error 1.0e+00", facts=facts),
        Measurement("norm n=9", "avx2", [0.02], facts=facts),
    ]
    heading, table = report.summary_table([*op_results(), *more], CEILINGS)
    assert heading == "summary: times as fast as numpy / % of ceiling"
    assert table == [
        ["", "numpy", "avx2", "torch"],
        ["matmul N=1", "1.0 / 5%", "10.0 / 50%", "-"],
        ["gelu n=9", "1.0 / 12%", "4.0 / 50%", "-"],
        ["norm n=9", "WRONG", "50%", "-"],
        ["geometric mean", "1.0", "6.3", "-"],
    ]


def test_summary_of_tokens() -> None:
    results = [
        Measurement(f"train 1 x {T}", row, [0.1 / i], facts={"tokens": T, "flops": 1.0})
        for T in (8, 16)
        for i, row in enumerate(("avx2", "torch"), 1)
    ]
    assert report.summary_table(results, CEILINGS) == (
        "summary: tokens a second",
        [
            ["", "train 1 x 8", "train 1 x 16"],
            ["avx2", "80.0", "160.0"],
            ["torch", "160.0", "320.0"],
        ],
    )


def test_json_records_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    monkeypatch.setenv("MY_SECRET", "x")
    wrong = Measurement("gelu n=9", "base", note="WRONG", facts={"error": math.nan, "flops": 1.0})
    results = [*op_results(), wrong]
    measured = dataclasses.replace(CEILINGS, distances=(41.0, 171.0))
    report.write_json(tmp_path / "a.json", measured, results, "NOISY MACHINE: so")
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    content = json.loads(text)
    assert list(content)[:3] == ["schema", "kind", "noise"]
    assert (content["schema"], content["kind"]) == (report.SCHEMA, "ops")
    assert content["noise"] == "NOISY MACHINE: so" and content["threads"] == 1
    assert datetime.fromisoformat(content["date"]).tzinfo is not None
    assert content["versions"].keys() >= {"gpt2c", "Python", "numpy"}
    assert content["caches"] == machine.caches() and content["core_distance_ns"] == [41.0, 171.0]
    assert content["cpu"] == machine.cpu_facts() and content["commit"] == machine.commit()
    assert content["compiler"] == "unknown compiler" or re.search("GCC|clang", content["compiler"])
    assert content["environment"]["MKL_NUM_THREADS"] == "2"
    assert "MY_SECRET" not in content["environment"]
    assert content["results"][-1]["facts"]["error"] is None


def test_older_json_file_is_compared(tmp_path: Path) -> None:
    path, facts = tmp_path / "old.json", {"flops": 1.0, "bytes": 1.0}
    older = [
        Measurement("gelu n=9", "avx2", [0.04], facts=facts),
        Measurement("gelu n=9", "base", [0.08], facts=facts),
    ]
    report.write_json(path, CEILINGS, older, "NOISY MACHINE")
    old = report.read_old(path, "ops")
    newer = [
        Measurement("gelu n=9", "avx2", [0.02], facts=facts),
        Measurement("gelu n=9", "numpy", [0.1], facts=facts),
    ]
    heading, table = report.comparison(path, old, newer, 2)
    assert heading.startswith(f"compared with {path} (") and report.NOISY in heading
    assert "other threads: 1" in heading and "other cpu" not in heading
    assert table == [
        ["", "old, ms", "new, ms", "times as fast as old"],
        ["gelu n=9  avx2", "40.000", "20.000", "2.00"],
        ["gelu n=9  numpy", "not in the old"],
        ["gelu n=9  base", "not measured now"],
    ]


def test_picture_names_machine_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    for name in ("plot_shares", "plot_speed"):
        monkeypatch.setattr(report, name, lambda *arguments: titles.append(arguments[-1]))
    report.draw(tmp_path / "a.png", op_results(), CEILINGS, "NOISY MACHINE: so")
    trained = [Measurement("train 1 x 9", "avx2", [0.1], facts={"tokens": 9, "flops": 1.0})]
    report.draw(tmp_path / "b.png", trained, CEILINGS)
    day = datetime.now().date().isoformat()
    assert titles[0] == f"{cpu_name()}, 1 thread, {day}, NOISY MACHINE"
    assert titles[1].endswith(f"\n{cpu_name()}, 1 thread, {day}")
