"""The machine of a benchmark: its peaks, its noise, its name, and the commit that ran."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
from helpers.measured import CEILINGS

from gpt2c.bench import machine
from gpt2c.bench.machine import (
    Ceilings,
    Quiet,
    caches,
    core_distance,
    cpu_name,
    distance_text,
    measure_ceilings,
    read_bandwidth,
)
from gpt2c.kernels.backend import backends, fma_peak, get_backend
from gpt2c.kernels.limits import usable_cores


def test_ceilings_are_measured() -> None:
    cores = usable_cores()
    ceilings = measure_ceilings(cores + 1)
    own = set(backends()) - {"numpy"}
    halves = {"amx": ["bf16"], "avx512bf16": ["bf16"], "avx512fp16": ["bf16", "fp16"]}
    rounded = {f"{name}:{one}" for name in own for one in halves.get(name, [])}
    assert ceilings.peak.keys() == own | rounded | {f"{name}:int8" for name in own}
    assert len(ceilings.distances) == 1 and 0 <= ceilings.distances[0] < 1e6
    assert 1 in ceilings.bandwidth and max(ceilings.bandwidth) == cores
    assert all(1e9 < size < 1e13 for size in ceilings.bandwidth.values())
    assert cpu_name()


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 5000])
def test_memory_is_read_to_the_last_whole_step(n: int, backend_name: str) -> None:
    if backend_name == "numpy":
        pytest.skip("numpy has no kernels")
    steps = {"base": 32, "avx2": 64}.get(backend_name, 128)
    kernels = get_backend(backend_name, 2)
    assert kernels.memory_read(np.ones(n, np.float32)) == n // steps * steps


def test_ceiling_is_arithmetic_or_memory() -> None:
    assert CEILINGS.seconds("base", 50e9, 1e9) == 1.0
    assert CEILINGS.seconds("torch", 50e9, 1e9) == 0.5  # the highest peak
    assert CEILINGS.seconds("avx2", 1e9, 20e9) == 2.0
    whole = dataclasses.replace(CEILINGS, peak={"avx2:int8": 400e9, **CEILINGS.peak})
    assert whole.seconds("torch", 50e9, 1e9) == 0.5  # int8 is no peak of floats


def test_peaks_are_the_best_of_two_measurements() -> None:
    first = dataclasses.replace(CEILINGS, distances=(41.0,))
    busy = Ceilings(1, {"avx2": 3e9, "base": 60e9}, {1: 20e9}, (170.0,))
    best = Ceilings(1, {"avx2": 100e9, "base": 60e9}, {1: 20e9}, (41.0, 170.0))
    assert first.best(busy) == best


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_operations_of_a_peak_are_counted(precision: str, backend_name: str) -> None:
    if backend_name == "numpy":
        pytest.skip("numpy has no kernels")
    lanes = {"base": 4, "avx2": 8}.get(backend_name, 16)
    # numbers of 8 bits in a vector; without VNNI each is widened to 16 bits
    small = {"base": 8, "avx2": 16, "avx512": 32}.get(backend_name, 64)
    halves = 32 if backend_name == "avx512fp16" else lanes
    products = {"fp32": lanes, "bf16": 2 * lanes, "fp16": halves, "int8": small}[precision]
    a_round = 12 * products
    if backend_name == "amx" and precision in ("bf16", "int8"):  # 16 x 16 sums of rows of 64 bytes
        a_round = 4 * 16 * 16 * {"bf16": 32, "int8": 64}[precision]
    for threads in (1, 2):
        done = get_backend(backend_name, threads).fma_burn(7, precision)
        assert done == threads * 7 * a_round * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_no_loop_of_a_peak_vanishes(precision: str, backend_name: str) -> None:
    """As one whose sums the compiler knows would: it seems to be endlessly fast."""
    if backend_name == "numpy":
        pytest.skip("numpy has no kernels")
    assert 1e8 < fma_peak(backend_name, 1, precision) < 1e14


def test_line_goes_from_thread_to_thread(backend_name: str) -> None:
    if backend_name == "numpy":
        pytest.skip("numpy has no kernels")
    assert get_backend(backend_name, 1).line_travel(3) == 0.0, "there is no other thread"
    for threads in (2, 3):
        found = [get_backend(backend_name, threads).line_travel(10) for _ in range(3)]
        assert all(0 <= way < 1e7 for way in found)  # 0: the machine was too busy


def test_distance_is_the_shortest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = itertools.cycle([0.0, 900.0, 171.0, 0.0, 180.0])
    fake = types.SimpleNamespace(line_travel=lambda rounds: next(ways))
    monkeypatch.setattr(machine, "get_backend", lambda name, threads: fake)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    assert core_distance() == 171.0
    ways = itertools.cycle([0.0])
    assert core_distance() == 0.0
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    monkeypatch.setattr(machine, "get_backend", lambda name, threads: pytest.fail("it measured"))
    assert core_distance() == 0.0


def test_distance_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    assert distance_text(41.2) == "a cache line takes 41 ns from core to core"
    far = "a cache line takes 171 ns from core to core: the cores share no cache at the moment"
    assert distance_text(171.0) == far
    assert distance_text(0.0).startswith("unknown")
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    assert distance_text(0.0).startswith("one core")


def test_caches_are_those_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert caches() == []
    for i, (level, kind, size, cores) in enumerate(
        [
            ("1", "Data", "32K", "0"),
            ("1", "Instruction", "32K", "0"),
            ("2", "Unified", "512K", "0"),
            ("3", "Unified", "32768K", "0-7"),
            ("4", "Unified", "", "0-7"),
        ]
    ):
        (tmp_path / f"index{i}").mkdir()
        names = ("level", "type", "size", "shared_cpu_list")
        for name, text in zip(names, (level, kind, size, cores), strict=True):
            (tmp_path / f"index{i}" / name).write_text(f"{text}\n")
    assert caches() == ["L1 32K", "L2 512K", "L3 32768K of cores 0-7"]


def test_memory_is_read_at_some_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FLOATS", 1 << 20)
    assert 1e8 < read_bandwidth(2) < 1e13


def test_noise_is_reported() -> None:
    quiet = Quiet(1)
    quiet._seconds = [1.0, 1.01, 1.0, 1.02]
    assert quiet.verdict().startswith("quiet")
    quiet._seconds = [1.0, 1.5, 1.0, 2.0]
    assert quiet.verdict().startswith("NOISY")


def test_processor_without_a_model_number_is_named_by_its_family(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = {"model name": "AMD EPYC", "cpu family": "26", "model": "2", "stepping": "1"}
    monkeypatch.setattr(machine, "cpu_facts", lambda: facts)
    assert cpu_name() == "AMD EPYC (family 26, model 2, stepping 1)"
    facts["model name"] = "AMD EPYC 9355"
    assert cpu_name() == "AMD EPYC 9355"
    facts.clear()
    assert cpu_name()


def test_recorded_commit_is_that_of_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(machine.__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        assert re.fullmatch(r"[0-9a-f]{40}\+?", machine.commit())
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "gpt2c" / "bench" / "machine.py"))
    assert machine.commit() == ""


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_commit_with_changed_sources_ends_in_plus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        me = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *me, *arguments], check=True)

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "gpt2c" / "bench" / "machine.py"))
    git("init", "-q")
    assert machine.commit() == ""
    for name in ("gpt2c", "csrc", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    (tmp_path / "benchmarks" / "a").write_text("2")
    head = machine.commit()
    assert re.fullmatch(r"[0-9a-f]{40}", head), "a result is no source"
    (tmp_path / "csrc" / "a").write_text("2")
    assert machine.commit() == head + "+"


def test_ceiling_of_a_row_is_that_of_its_precision() -> None:
    peaks = {"avx512bf16": 200e9, "avx512bf16:bf16": 400e9, "avx2": 180e9}
    both = Ceilings(2, peaks | {"avx512fp16:fp16": 390e9}, {1: 10e9})
    for row, peak in (("avx512bf16", 200), ("avx512bf16:bf16", 400), ("avx2:bf16", 180)):
        assert both.seconds(row, 1e9, 0) == pytest.approx(1 / peak)
    for row, peak in (
        ("torch-tuned", 200),
        ("torch-bf16", 400),
        ("numpy", 200),
        ("avx512fp16:fp16", 390),
    ):
        assert both.seconds(row, 1e9, 0) == pytest.approx(1 / peak)
