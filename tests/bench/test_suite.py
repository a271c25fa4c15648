"""The benchmark: it verifies each row, rows take turns, and it refuses what does not fit."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.cases import small_shape
from helpers.measured import CEILINGS

from gpt2c import GPT2Config
from gpt2c.bench import suite as bench
from gpt2c.bench.machine import Quiet
from gpt2c.bench.suite import Measurement, Row, Work, WorkerError, bench_ops, bench_train
from gpt2c.bench.worker import TINY, Worker
from gpt2c.kernels import memory
from gpt2c.kernels.cases import EXAMPLES
from gpt2c.kernels.limits import usable_cores
from gpt2c.kernels.memory import megabytes

# ---- a row ---------------------------------------------------------------------------------------


@TWO_BACKENDS
@pytest.mark.parametrize("name", EXAMPLES)
def test_worker_verifies_and_times_every_op(name: str, backend_name: str) -> None:
    worker = Worker(backend_name, 1)
    answer = worker.op(name, small_shape(name))
    assert answer["error"] <= answer["rtol"]
    assert 0 < worker.sample()["seconds"] < 10


def test_worker_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("base", 1)
    right = worker._backend.gelu_forward

    class Wrong:
        def gelu_forward(self, out: Any, x: Any) -> None:
            right(out, x)
            out[3] += 0.01

    monkeypatch.setattr(worker, "_backend", Wrong())
    answer = worker.op("gelu_forward", {"n": 50})
    assert answer["error"] > answer["rtol"]


def test_worker_sees_an_element_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("base", 1)

    class Lazy:
        def crossentropy_backward(self, dlogits: Any, *rest: Any) -> None:
            """Write nothing: for rows of ignored targets, zeros would be right."""

    monkeypatch.setattr(worker, "_backend", Lazy())
    answer = worker.op("crossentropy_backward", {"N": 3, "V": 8})
    assert not answer["error"] <= answer["rtol"]
    assert math.isnan(answer["error"])


def test_worker_sees_a_nan_in_any_output(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("base", 1)
    right = worker._backend.layernorm_forward

    class Wrong:
        def layernorm_forward(self, out: Any, mean: Any, rstd: Any, *rest: Any) -> None:
            right(out, mean, rstd, *rest)
            rstd[1] = np.nan

    monkeypatch.setattr(worker, "_backend", Wrong())
    answer = worker.op("layernorm_forward", {"N": 3, "C": 8})
    assert not answer["error"] <= answer["rtol"]


@pytest.mark.parametrize("recompute", [None, "light", "full"])
def test_worker_trains(recompute: str | None) -> None:
    worker = Worker("base", 1)
    answer = worker.train(dataclasses.asdict(TINY), 2, 8, recompute)
    assert answer["error"] <= answer["rtol"]
    first, second = worker.step(), worker.step()
    assert second["loss"] < first["loss"]
    assert first["peak_memory"] > 10e6 and first["seconds"] > 0


def test_row_that_dies_gives_its_reason() -> None:
    with Row("base", 1) as row:
        assert row.ask("op", name="gelu_forward", shape={"n": 10})["error"] < 1e-5
        with pytest.raises(WorkerError, match="no_such_op"):
            row.ask("op", name="no_such_op", shape={})
        with pytest.raises(WorkerError):
            row.ask("sample")


# ---- taking turns --------------------------------------------------------------------------------


def test_ops_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "lacks", lambda name: "torch" if name == "torch" else "")
    one = {
        "gelu_forward": dataclasses.replace(EXAMPLES["gelu_forward"], shapes=[{"n": 999}, {"n": 9}])
    }
    monkeypatch.setattr(bench, "EXAMPLES", one)
    shown: list[list[Measurement]] = []
    results, verdict = bench_ops(["numpy", "base", "torch"], CEILINGS, True, shown.append)
    assert shown == [results] and "machine" in verdict.lower()
    assert [(r.row, r.group) for r in results] == [
        (row, "gelu_forward n=999") for row in ("numpy", "base", "torch")
    ]
    assert [len(r.seconds) for r in results] == [bench.QUICK_ROUNDS, bench.QUICK_ROUNDS, 0]
    assert "not installed" in results[2].note
    assert results[0].facts["flops"] == 18 * 999


def test_training_steps_take_turns() -> None:
    results, _ = bench_train(
        ["numpy", "base"], CEILINGS, TINY, [(1, 8), (2, 32)], "full", True, lambda _: None
    )
    assert [r.group for r in results] == ["train 1 x 8, recompute full"] * 2 + [
        "train 2 x 32, recompute full"
    ] * 2
    for r in results:
        assert not r.note and len(r.seconds) == bench.QUICK_STEP_ROUNDS
        assert math.isclose(r.facts["first_loss"], math.log(TINY.vocab_size), rel_tol=0.05)
    assert results[2].facts["tokens"] == 64


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_wrong_row_is_not_timed(error: float) -> None:
    class Liar(Row):
        def __init__(self) -> None:
            self.name = "liar"

        def ask(self, do: str, **_: Any) -> dict[str, Any]:
            assert do != "sample", "a wrong result was timed"
            return {"error": error, "rtol": 1e-6}

    liar = Liar()
    result = bench.get_ready(liar, Work("op", "op", {}, "sample", lambda row: {}))
    bench.take_turns([liar], [result], "sample", 2, 1.0, Quiet(1))
    assert result.note.startswith("WRONG") and not result.seconds


def test_rows_with_other_losses_are_struck_out() -> None:
    losses = [5.0, 5.0001, 5.1, math.nan]
    results = [Measurement("train", str(i), facts={"first_loss": x}) for i, x in enumerate(losses)]
    bench._compare_losses(results)
    assert [bool(r.note) for r in results] == [False, False, True, True]


def test_losses_are_not_compared_with_those_of_a_wrong_row() -> None:
    wrong = Measurement("train", "a", note="WRONG: error 1.0e+00", facts={"first_loss": 4.0})
    results = [wrong, *(Measurement("train", row, facts={"first_loss": 5.0}) for row in "bc")]
    bench._compare_losses(results)
    assert [r.note for r in results] == ["WRONG: error 1.0e+00", "", ""]


def test_a_row_whose_loss_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Row.ask

    def lying(self: Row, do: str, **arguments: Any) -> dict[str, Any]:
        answer = ask(self, do, **arguments)
        if self.name == "base" and do == "train":
            answer["first_loss"] += 0.1
        return answer

    monkeypatch.setattr(Row, "ask", lying)
    results, _ = bench_train(["numpy", "base"], CEILINGS, TINY, [(1, 8)], None, True, print)
    assert [bool(r.seconds) for r in results] == [True, False]
    assert results[1].note.startswith("WRONG: first loss")


def test_row_that_dies_is_reported_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {name: EXAMPLES[name] for name in ("gelu_forward", "gelu_backward")}
    monkeypatch.setattr(
        bench, "EXAMPLES", {n: dataclasses.replace(op, shapes=[{"n": 99}]) for n, op in two.items()}
    )
    ask = Row.ask

    def dying(self: Row, do: str, **arguments: Any) -> dict[str, Any]:
        if self.name == "base" and arguments.get("name") == "gelu_forward":
            arguments["name"] = "no_such_op"
        return ask(self, do, **arguments)

    monkeypatch.setattr(Row, "ask", dying)
    results, _ = bench_ops(["numpy", "base"], CEILINGS, True, lambda _: None)
    assert [r.row for r in results if r.seconds] == ["numpy", "numpy"]
    assert results[1].note.startswith("FAILED") and "ended in gelu_forward" in results[3].note


def test_shapes_are_written_for_people() -> None:
    work = [found.group.partition(" ")[2] for found in bench.ops_work(False)]
    assert "N=1 C=768 OC=3072 int8 weights" in work
    assert "N=1024 C=768 OC=3072 gradients written" in work
    assert not any("kind" in text or "True" in text or "False" in text for text in work)


# ---- refusals ------------------------------------------------------------------------------------


def test_too_much_memory_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "start", lambda *_: pytest.fail("it started"))
    shapes = [(4096, 1024)]
    with pytest.raises(MemoryError) as error:
        bench_train(["base", "numpy"], CEILINGS, GPT2Config(), shapes, None, True, print)
    number = r"[\d,]+ MB"
    assert re.fullmatch(
        f"a benchmark of 4096 x 1024 tokens needs {number}: base {number}, numpy {number};"
        f" {number} are free: take fewer rows or a smaller shape",
        str(error.value),
    )
    message = refused(bench_train, ["base"], CEILINGS, TINY, [(1, 33)], None, True, print)
    assert "n_positions" in message


def test_memory_is_that_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench.bytes_needed(GPT2Config(), 4, 64) + bench.PROCESS_BYTES
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * one - 1)
    bench._check_memory(["base"], GPT2Config(), 4, 64, None)
    each = megabytes(one)
    with pytest.raises(MemoryError, match=f"{megabytes(2 * one)}: base {each}, avx2 {each};"):
        bench._check_memory(["base", "avx2"], GPT2Config(), 4, 64, None)


def test_ops_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "start", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    with pytest.raises(MemoryError, match=r"^a benchmark of ops needs .*: base .*, verification"):
        bench_ops(["base"], CEILINGS, True, print)


def test_unknown_rows_list_the_known() -> None:
    assert "torch-tuned" in refused(bench.choose_rows, "base,cuda")
    assert "none" in refused(bench.choose_rows, " , ")
    assert bench.choose_rows("base, torch") == ["base", "torch"]
    assert bench.choose_rows("base", True) == ["base", "torch-compile"]
    assert bench.choose_rows("base:bf16,torch-bf16") == ["base:bf16", "torch-bf16"]
    assert "base:int8" in refused(bench.choose_rows, "base:int8")


def test_rows_in_bfloat16_are_those_of_a_cpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "backends", lambda: ("avx2", "base", "numpy"))
    own = ["numpy", "base", "avx2"]
    assert bench.choose_rows(None) == [*own, "torch", "torch-tuned"]
    assert bench.choose_rows(None, True) == [*own, "torch", "torch-tuned", "torch-compile"]
    monkeypatch.setattr(bench, "backends", lambda: ("avx512bf16", "numpy"))
    rounded = ["numpy", "avx512bf16", "avx512bf16:bf16", "torch", "torch-tuned", "torch-bf16"]
    assert bench.choose_rows(None) == rounded
    assert bench.choose_rows(None, True)[-3:] == [
        "torch-compile",
        "torch-bf16",
        "torch-bf16-compile",
    ]
    monkeypatch.setattr(bench, "backends", lambda: ("avx512fp16",))
    of_halves = ["avx512fp16", "avx512fp16:bf16", "avx512fp16:fp16"]
    assert bench.choose_rows(None)[:3] == of_halves


def test_threads_are_checked() -> None:
    assert "0" in refused(bench.check_threads, 0)
    assert bench.check_threads(1) == (1, "")
    cores = usable_cores()
    count, warning = bench.check_threads(cores + 1)
    assert count == cores + 1 and f"{cores + 1} threads" in warning and f"{cores} cores" in warning
