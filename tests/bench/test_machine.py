"""The machine of a benchmark: its peaks, its noise, its name, and the commit that ran."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.measured import CEILINGS

from gpt2c.bench import machine
from gpt2c.bench.machine import Ceilings, Quiet, cpu_name, measure_ceilings
from gpt2c.kernels.backend import backends, get_backend
from gpt2c.kernels.limits import usable_cores


def test_ceilings_are_measured() -> None:
    cores = usable_cores()
    ceilings = measure_ceilings(cores + 1)
    assert ceilings.peak.keys() == set(backends()) - {"numpy"}
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


def test_peaks_are_the_best_of_two_measurements() -> None:
    busy = Ceilings(1, {"avx2": 3e9, "base": 60e9}, {1: 20e9})
    assert CEILINGS.best(busy) == Ceilings(1, {"avx2": 100e9, "base": 60e9}, {1: 20e9})


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
    both = Ceilings(2, {"avx512bf16": 200e9, "avx512bf16:bf16": 400e9, "avx2": 180e9}, {1: 10e9})
    for row, peak in (("avx512bf16", 200), ("avx512bf16:bf16", 400), ("avx2:bf16", 180)):
        assert both.seconds(row, 1e9, 0) == pytest.approx(1 / peak)
    for row, peak in (("torch-tuned", 200), ("torch-bf16", 400), ("numpy", 200)):
        assert both.seconds(row, 1e9, 0) == pytest.approx(1 / peak)
