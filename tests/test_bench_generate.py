"""The benchmark of reading and writing text: its rows, what it verifies, what it counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from conftest import refused

from gpt2c import bench_generate, report
from gpt2c.backend import backends
from gpt2c.bench import QUICK_ROUNDS, Result
from gpt2c.cli import main
from gpt2c.config import GPT2Config
from gpt2c.machine import Ceilings
from gpt2c.worker import TINY, Worker

CEILINGS = Ceilings(1, {"avx2": 100e9, "base": 50e9}, {1: 10e9})


def test_rows_are_backends_with_each_kind_of_weights() -> None:
    rows = bench_generate.choose_generate_rows(None, quick=False)
    assert rows[0] == "numpy:fp32" and rows[-1] == "transformers"
    assert set(rows[1:-1]) == {
        f"{name}:{kind}" for name in backends()[:-1] for kind in ("fp32", "fp16", "int8")
    }
    quick = bench_generate.choose_generate_rows(None, quick=True)
    assert quick == [f"{backends()[0]}:{kind}" for kind in ("fp32", "fp16", "int8")] + rows[-1:]
    assert bench_generate.choose_generate_rows("base:int8, numpy", False) == [
        *("base:int8", "numpy:fp32", "numpy:fp16", "numpy:int8")
    ]
    assert "fp32, fp16, int8" in refused(bench_generate.choose_generate_rows, "base:fp8", False)
    assert "'abacus'" in refused(bench_generate.choose_generate_rows, "abacus:int8", False)
    assert "transformers" in refused(bench_generate.choose_generate_rows, "torch", False)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("what", "B"), [("prefill", 1), ("decode", 3)])
def test_a_worker_verifies_and_times(what: str, B: int, precision: str, backend_name: str) -> None:
    worker = Worker(f"{backend_name}:{precision}", 1)
    answer = worker.generate(what, dataclasses.asdict(TINY), B, 9)
    assert answer["error"] <= answer["rtol"] <= (0.05 if precision == "int8" else 1e-5)
    assert 0 < worker.sample()["seconds"] < 10


def test_a_worker_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("base:fp32", 1)
    right = worker._reader

    def wrong(*arguments: Any) -> Any:
        call = right(*arguments)
        return lambda: call() + 1e-3

    monkeypatch.setattr(worker, "_reader", wrong)
    answer = worker.generate("decode", dataclasses.asdict(TINY), 1, 9)
    assert answer["error"] > answer["rtol"]


def test_works_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generate, "WORKS", (("prefill", 1, 16), ("decode", 2, 4)))
    monkeypatch.setattr(bench_generate.importlib.util, "find_spec", lambda name: None)
    rows = ["base:fp32", "base:int8", "transformers"]
    shown: list[list[Result]] = []
    results, verdict = bench_generate.bench_generate(rows, CEILINGS, TINY, True, shown.append)
    assert [r for group in shown for r in group] == results and "machine" in verdict.lower()
    assert [(r.row, r.group) for r in results] == [
        (row, group) for group in ("prefill 16 tokens", "decode, batch 2") for row in rows
    ]
    for r in results:
        assert len(r.seconds) == (0 if r.row == "transformers" else QUICK_ROUNDS), r.note
    assert "not installed" in results[2].note
    assert results[3].facts["bytes"] > results[4].facts["bytes"]


def test_what_is_counted() -> None:
    config = GPT2Config()
    weights = config.num_parameters() - 1024 * 768  # less wpe; a few biases more than the matrices
    decode = bench_generate.counted(config, "decode", 1, 0, 4)
    assert math.isclose(decode["bytes"], 4 * weights, rel_tol=1e-3)
    assert math.isclose(decode["flops"], 2 * weights, rel_tol=1e-3)
    eight = bench_generate.counted(config, "decode", 8, 32, 1)
    assert eight["bytes"] == decode["bytes"] / 4 + 4 * 8 * 12 * 2 * 768 * 32
    prefill = bench_generate.counted(config, "prefill", 1, 512, 4)
    head = 2 * 50257 * 768
    assert math.isclose(
        prefill["flops"], 512 * (2 * weights - head) + head + 12 * 2 * 768 * 512**2, rel_tol=2e-3
    )


def test_a_table() -> None:
    facts = {"flops": 1e9, "bytes": 1e8, "tokens": 8}
    results = [
        Result("decode, batch 8", "avx2:int8", [0.02] * 3, facts=facts),
        Result("decode, batch 8", "transformers", [0.05] * 3, facts=facts),
        Result("decode, batch 8", "numpy:fp32", note="FAILED: no", facts=facts),
    ]
    heading, table = report.generate_table(results, CEILINGS)
    assert heading == "decode, batch 8"
    assert table[1] == ["avx2:int8", "20.00", "0%", "400.0", "5.0", "50%", "2.50"]
    assert table[3] == ["numpy:fp32", "FAILED: no"]
    results = [Result("prefill 512 tokens", r.row, r.seconds, r.note, r.facts) for r in results]
    assert report.generate_table(results, CEILINGS)[1][1][4:6] == ["50.0", "50%"]


def test_mistakes_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ("--backends base:fp8", "--backends abacus", "--shape 4x64"):
        assert main(["bench", "generate", *arguments.split()]) == 2
        err = capsys.readouterr().err
        assert err.startswith("gpt2c: ") and err.count("\n") == 1


@pytest.mark.parametrize(("what", "B"), [("prefill", 1), ("decode", 8)])
def test_what_is_timed_is_what_is_verified(
    what: str, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker("base:int8", 1)
    name = "linear_forward" if what == "prefill" else "decode_step"
    right = getattr(worker._backend, name)

    def wrong_for_many(*arguments: Any) -> None:
        right(*arguments)
        out = arguments[0]
        if len(out) > (16 if what == "prefill" else 4):  # as only the products of many rows
            out *= 1.5

    monkeypatch.setattr(worker._backend, name, wrong_for_many)
    answer = worker.generate(what, dataclasses.asdict(TINY), B, 9)
    assert answer["error"] > answer["rtol"]
