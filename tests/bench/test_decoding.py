"""The benchmark of decoding: its rows, its verification, and what it counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS

from gpt2c.bench import decoding as bench_generate
from gpt2c.bench import report, worker
from gpt2c.bench import suite as bench
from gpt2c.bench.decoding import ENGINES, choose_generate_rows
from gpt2c.bench.engines import PEERS, Peer
from gpt2c.bench.machine import Ceilings
from gpt2c.bench.suite import PROCESS_BYTES, QUICK_ROUNDS, Measurement, Row
from gpt2c.bench.worker import SMALL, TINY, Worker
from gpt2c.cli.main import main
from gpt2c.kernels import memory
from gpt2c.kernels.backend import as_precision, backends, get_backend
from gpt2c.kernels.memory import megabytes
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig

CEILINGS = Ceilings(1, {"avx2": 100e9, "base": 50e9}, {1: 10e9})
BF16 = ("openvino:bf16",) if "avx512bf16" in backends() else ()


def test_rows_are_backends_with_each_kind_of_weights() -> None:
    rows = bench_generate.choose_generate_rows(None, quick=False)
    own = {f"{name}:{kind}" for name in backends()[:-1] for kind in ("fp32", "fp16", "int8")}
    own |= {f"{backends()[0]}:{kind}:{kind}" for kind in ("fp16", "int8")}
    assert rows[0] == "numpy:fp32" and set(rows[1 : 1 + len(own)]) == own
    assert rows[1 + len(own) :] == [
        *("transformers", "onnxruntime:fp32", "onnxruntime:int8", "ctranslate2:fp32"),
        *("ctranslate2:int8", "llama.cpp:fp32", "llama.cpp:fp16", "llama.cpp:int8"),
        *("openvino:fp32", *BF16, "openvino:int8"),
    ]
    quick = bench_generate.choose_generate_rows(None, quick=True)
    kinds = ("fp32", "fp16", "int8")
    assert quick == [*(f"{backends()[0]}:{kind}" for kind in kinds), "transformers"]
    assert bench_generate.choose_generate_rows("base:int8, numpy", False) == [
        *("base:int8", "numpy:fp32", "numpy:fp16", "numpy:int8")
    ]
    assert bench_generate.choose_generate_rows(
        "llama.cpp:fp16,onnxruntime, transformers-compile,llama.cpp", False
    ) == [
        *("llama.cpp:fp16", "onnxruntime:fp32", "onnxruntime:int8", "transformers-compile"),
        *("llama.cpp:fp32", "llama.cpp:int8"),
    ]
    choose = bench_generate.choose_generate_rows
    assert "fp32, int8" in refused(choose, "onnxruntime:fp16", False)
    assert choose("openvino", False) == [f"openvino:{kind}" for kind in ("fp32", "bf16", "int8")]
    assert "fp32 alone" in refused(choose, "transformers:int8", False)
    assert "fp32, fp16, int8" in refused(bench_generate.choose_generate_rows, "base:fp8", False)
    assert "'abacus'" in refused(bench_generate.choose_generate_rows, "abacus:int8", False)
    assert "transformers" in refused(bench_generate.choose_generate_rows, "torch", False)


def test_rows_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(done: list[Measurement]) -> None:
        pytest.fail("it started")

    monkeypatch.setattr(bench, "start", show)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    config = GPT2Config()
    texts = bench_generate.PROMPT * config.cache_floats() + config.vocab_size
    one = PROCESS_BYTES + 4 * (2 * config.num_parameters() + texts)
    wanted = f"^a benchmark of generation needs {megabytes(one)}: base:fp32 {megabytes(one)};"
    with pytest.raises(MemoryError, match=wanted):
        bench_generate.bench_generate(["base:fp32"], CEILINGS, GPT2Config(), True, show)
    # rows whose engine is absent, or does not know the model, hold no model
    monkeypatch.setattr(bench_generate, "lacks", lambda name: "torch" if "trans" in name else "")
    wanted = f"openvino:fp32 {megabytes(PROCESS_BYTES)}, transformers {megabytes(PROCESS_BYTES)};"
    with pytest.raises(MemoryError, match=wanted):
        bench_generate.bench_generate(
            ["openvino:fp32", "transformers"], CEILINGS, LlamaConfig(), True, show
        )


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_row_names_the_type_of_its_keys_and_values(cache: str) -> None:
    worker = Worker(f"base:fp16:{cache}", 1)
    answer = worker.generate("decode", dataclasses.asdict(TINY), 3, 9)
    assert answer["error"] <= answer["rtol"] == {"fp16": 1e-3, "int8": 0.05}[cache]
    assert choose_generate_rows(f"base:fp16:{cache}", False) == [f"base:fp16:{cache}"]
    for wrong in ("base:fp16:fp8", "openvino:fp32:fp16"):
        assert "keys and values" in refused(choose_generate_rows, wrong, False)


@TWO_BACKENDS
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("what", "B"), [("prefill", 1), ("decode", 3)])
def test_worker_verifies_and_times(what: str, B: int, precision: str, backend_name: str) -> None:
    worker = Worker(f"{backend_name}:{precision}", 1)
    answer = worker.generate(what, dataclasses.asdict(TINY), B, 9)
    bounds = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 0.01}  # of products; weights of fp16 are exact
    products = "fp32" if precision == "fp32" else as_precision("auto", get_backend(backend_name))
    bound = 0.05 if precision == "int8" else bounds[products]
    assert answer["error"] <= answer["rtol"] <= bound
    assert 0 < worker.sample()["seconds"] < 10


def test_worker_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("base:fp32", 1)
    right = worker._reader

    def wrong(*arguments: Any) -> Any:
        call = right(*arguments)
        return lambda: call() + 1e-3

    monkeypatch.setattr(worker, "_reader", wrong)
    answer = worker.generate("decode", dataclasses.asdict(TINY), 1, 9)
    assert answer["error"] > answer["rtol"]


def test_works_of_the_benchmark_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generate, "WORKS", (("prefill", 1, 16), ("decode", 2, 4)))
    monkeypatch.setattr(bench, "lacks", lambda name: "torch" if name == "transformers" else "")
    rows = ["base:fp32", "base:int8", "transformers"]
    shown: list[list[Measurement]] = []
    results, verdict = bench_generate.bench_generate(rows, CEILINGS, TINY, True, shown.append)
    assert [r for group in shown for r in group] == results and "machine" in verdict.lower()
    assert [(r.row, r.group) for r in results] == [
        (row, group) for group in ("prefill 16 tokens", "decode, batch 2") for row in rows
    ]
    for r in results:
        assert len(r.seconds) == (0 if r.row == "transformers" else QUICK_ROUNDS), r.note
    assert "not installed" in results[2].note
    assert results[3].facts["bytes"] > results[4].facts["bytes"]


def test_texts_at_a_time_replace_the_works() -> None:
    works = [("decode", 3, 4)]
    results, _ = bench_generate.bench_generate(
        ["base:fp32"], CEILINGS, TINY, True, lambda found: None, works=works
    )
    assert [r.group for r in results] == ["decode, batch 3"] and results[0].seconds
    with pytest.raises(MemoryError, match="a benchmark of generation"):
        bench_generate.bench_generate(
            ["base:fp32"], CEILINGS, TINY, True, lambda found: None, works=[("decode", 10**9, 4)]
        )


def test_costs_count_bytes_and_flops() -> None:
    config = GPT2Config()
    weights = config.num_parameters() - 1024 * 768  # less wpe; a few biases more than the matrices
    decode = bench_generate.costs(config, "decode", 1, 0, 4)
    assert math.isclose(decode["bytes"], 4 * weights, rel_tol=1e-3)
    assert math.isclose(decode["flops"], 2 * weights, rel_tol=1e-3)
    eight = bench_generate.costs(config, "decode", 8, 32, 1)
    assert eight["bytes"] == decode["bytes"] / 4 + 4 * 8 * 12 * 2 * 768 * 32
    prefill = bench_generate.costs(config, "prefill", 1, 512, 4)
    head = 2 * 50257 * 768
    assert math.isclose(
        prefill["flops"], 512 * (2 * weights - head) + head + 12 * 2 * 768 * 512**2, rel_tol=2e-3
    )


def test_table_of_decoding() -> None:
    facts = {"flops": 1e9, "bytes": 1e8, "tokens": 8, "memory": 300_000_000}
    results = [
        Measurement("decode, batch 8", "avx2:int8", [0.02] * 3, facts=facts),
        Measurement("decode, batch 8", "transformers", [0.05] * 3, facts=facts),
        Measurement("decode, batch 8", "numpy:fp32", note="FAILED: no", facts=facts),
    ]
    heading, table = report.generate_table(results, CEILINGS)
    assert heading == "decode, batch 8"
    assert table[0][-3:] == ["% of bandwidth", "memory, MB", "times as fast as best PyTorch"]
    assert table[1] == ["avx2:int8", "20.00", "0%", "400.0", "5.0", "50%", "300", "2.50"]
    assert table[3] == ["numpy:fp32", "FAILED: no"]
    results = [
        Measurement("prefill 512 tokens", r.row, r.seconds, r.note, r.facts) for r in results
    ]
    assert report.generate_table(results, CEILINGS)[1][1][4:6] == ["50.0", "50%"]


def test_bad_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ("--backends base:fp8", "--backends abacus", "--shape 4x64"):
        assert main(["bench", "generate", *arguments.split()]) == 2
        err = capsys.readouterr().err
        assert err.startswith("gpt2c: ") and err.count("\n") == 1


@pytest.mark.parametrize(("what", "B"), [("prefill", 1), ("decode", 8)])
def test_timed_work_is_the_verified_work(
    what: str, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker("base:int8", 1)
    name = "matmul_forward" if what == "prefill" else "decode_step"
    right = getattr(worker._backend, name)

    def wrong_for_many(first: Any, *others: Any) -> None:
        many = len(first) > (16 if what == "prefill" else 4)  # like only the products of many rows
        if many and what == "decode":
            first = np.zeros_like(first)  # the tokens
        right(first, *others)
        if many and what == "prefill":
            first *= 1.5  # the output

    monkeypatch.setattr(worker._backend, name, wrong_for_many)
    answer = worker.generate(what, dataclasses.asdict(TINY), B, 9)
    assert answer["error"] > answer["rtol"]


# ---- the engines beside gpt2c --------------------------------------------------------------------


@pytest.mark.parametrize("row", choose_generate_rows(None, quick=False)[-10 - len(BF16) :])
def test_engine_computes_what_gpt2c_does(row: str) -> None:
    """One process for all works: some engines take seconds to import."""
    if lacking := bench.lacks(row):
        pytest.skip(f"not installed: {lacking}")
    if row == "llama.cpp:int8" and "amx" in backends():
        pytest.skip("llama.cpp crashes on AMX with 8-bit weights of a small model")
    with Row(row, 2) as process:
        for what, B in (("prefill", 1), ("decode", 1), ("decode", 3)):
            answer = process.ask("generate", what=what, config=dataclasses.asdict(SMALL), B=B, T=20)
            assert answer["error"] <= answer["rtol"], (what, B)
            found = process.ask("sample")
            assert 0 < found["seconds"] < 60 and found["memory"] > 1e7


def test_row_in_bf16_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "why_missing", lambda name: f"this CPU has no {name}")
    answer = Worker("openvino:bf16", 1).generate("decode", dataclasses.asdict(SMALL), 1, 9)
    assert answer == {"missing": "this CPU has no avx512bf16"}


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_engine_is_timed_on_the_texts_that_it_was_given(what: str) -> None:
    """Prompts are read before the timed steps, which read the texts' tokens one by one."""
    seen: list[Any] = []

    class Fake(Peer):
        def load(self, parameters: Any, directory: Any) -> None:
            assert directory.is_dir()

        def prompt(self) -> Any:
            seen.append("prompt")
            return np.arange(6.0).reshape(2, 3)

        def step(self, ids: Any, past: int) -> Any:
            seen.append((ids.tolist(), past))
            return np.ones((2, 3))

    texts = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    peer = Fake(TINY, {}, "fp32", what, texts, 2, 1)
    assert peer.room >= 3 + 2 + 1
    logits = peer()
    assert logits.shape == ((3,) if what == "prefill" else (2, 3))
    seen.clear()
    assert peer.seconds() >= 0
    steps = [([1, 4], 3), ([2, 5], 4), ([3, 6], 5)]
    assert seen == ["prompt", *(steps if what == "decode" else [])]


def test_every_engine_is_implemented(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PEERS) == set(worker.ENGINES) == {*bench_generate.TRANSFORMERS, *ENGINES}
    assert set(PEERS) <= set(bench.NEEDS)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.lacks("llama.cpp:int8") == "llama-cpp-python gguf"
    assert bench.lacks("transformers-compile") == "torch transformers"
    assert bench.lacks("openvino:bf16") == "openvino"
    assert bench.lacks("avx2:int8") == bench.lacks("numpy") == ""
