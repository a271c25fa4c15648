"""The benchmark: what it refuses, verifies and prints. Its timings are not tested."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.cases import small_shape

from gpt2c import GPT2Config
from gpt2c.bench import machine, report
from gpt2c.bench import suite as bench
from gpt2c.bench.machine import Ceilings, Quiet, cpu_name, measure_ceilings
from gpt2c.bench.suite import Result, Row, WorkerError, bench_ops, bench_train
from gpt2c.bench.worker import TINY, Worker
from gpt2c.cli import bench as cli_bench
from gpt2c.cli.main import main
from gpt2c.kernels import memory
from gpt2c.kernels.backend import backends, get_backend
from gpt2c.kernels.cases import EXAMPLES
from gpt2c.kernels.limits import usable_cores
from gpt2c.kernels.memory import megabytes

CEILINGS = Ceilings(1, {"avx2": 100e9, "base": 50e9}, {1: 10e9})
# ---- a row ---------------------------------------------------------------------------------------


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
    shown: list[list[Result]] = []
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
    result = bench.get_ready(liar, "op", {}, lambda row: row.ask("op"))
    bench.take_turns([liar], [result], "sample", 2, 1.0, Quiet(1))
    assert result.note.startswith("WRONG") and not result.seconds


def test_rows_with_other_losses_are_struck_out() -> None:
    losses = [5.0, 5.0001, 5.1, math.nan]
    results = [
        Result("train", str(i), [1.0], facts={"first_loss": x}) for i, x in enumerate(losses)
    ]
    bench._compare_losses(results)
    assert [bool(r.note) for r in results] == [False, False, True, True]
    assert not results[2].seconds


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


@pytest.mark.slow
def test_ops_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"gelu_forward": dataclasses.replace(EXAMPLES["gelu_forward"], shapes=[{"n": 999}])}
    monkeypatch.setattr(bench, "EXAMPLES", one)
    files = {kind: tmp_path / f"a.{kind}" for kind in ("json", "png", "md")}
    command = f"bench ops --quick --backends numpy,base --threads 1 --json {files['json']}"
    command += f" --plot {files['png']} --report {files['md']}"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "GFLOP/s" in out and "gelu_forward n=999" in out
    assert "machine" in out.splitlines()[-1].lower()
    assert all(path.stat().st_size > 100 for path in files.values())
    assert "machine" in files["md"].read_text().splitlines()[2].lower(), "the verdict comes first"
    monkeypatch.setattr(Row, "ask", lambda *_, **__: {"error": math.nan, "rtol": 1.0})
    assert main(["bench", "ops", "--quick", "--backends", "base", "--threads", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out


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
    with pytest.raises(MemoryError, match=r"^a benchmark of ops needs .*: base .*, what verifies"):
        bench_ops(["base"], CEILINGS, True, print)


def test_unknown_rows_list_the_known() -> None:
    assert "torch-tuned" in refused(bench.choose_rows, "base,cuda")
    assert "none" in refused(bench.choose_rows, " , ")
    assert bench.choose_rows("base, torch") == ["base", "torch"]
    assert bench.choose_rows("base", True) == ["base", "torch-compile"]
    assert set(bench.choose_rows(None)) == {*backends(), "torch", "torch-tuned"}


def test_threads_are_checked() -> None:
    assert "0" in refused(bench.check_threads, 0)
    assert bench.check_threads(1) == (1, "")
    cores = usable_cores()
    count, warning = bench.check_threads(cores + 1)
    assert count == cores + 1 and f"{cores + 1} threads" in warning and f"{cores} cores" in warning


@pytest.mark.parametrize(
    "arguments",
    ["--shape 4", "--shape 0x64", "--shape x", "--threads 0", "--backends cuda", "--shape 1x1025"],
)
def test_bad_arguments_are_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--backends", "base", *arguments.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("gpt2c: ")


@pytest.mark.parametrize(
    "arguments",
    ["--shape 4x64", "--recompute full", "--torch-compile", "--json no/such/place.json"],
)
def test_ops_refuse_flags_of_other_benchmarks(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "ops", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- the machine ---------------------------------------------------------------------------------


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
    steps = {"base": 32, "avx2": 64, "avx512": 128, "avx512vnni": 128}[backend_name]
    kernels = get_backend(backend_name, 2)
    assert kernels.memory_read(np.ones(n, np.float32)) == n // steps * steps


def test_ceiling_is_arithmetic_or_memory() -> None:
    assert CEILINGS.seconds("base", 50e9, 1e9) == 1.0
    assert CEILINGS.seconds("torch", 50e9, 1e9) == 0.5  # the highest peak
    assert CEILINGS.seconds("avx2", 1e9, 20e9) == 2.0


def test_noise_is_reported() -> None:
    quiet = Quiet(1)
    quiet._seconds = [1.0, 1.01, 1.0, 1.02]
    assert quiet.verdict().startswith("quiet")
    quiet._seconds = [1.0, 1.5, 1.0, 2.0]
    assert quiet.verdict().startswith("NOISY")


# ---- output --------------------------------------------------------------------------------------


def op_results() -> list[Result]:
    facts = {"flops": 1e9, "bytes": 1e6}
    return [
        Result("matmul N=1", "numpy", [0.1, 0.2, 0.4], facts=facts),
        Result("matmul N=1", "avx2", [0.02, 0.02, 0.02], facts=facts),
        Result("matmul N=1", "torch", note="not installed", facts=facts),
    ]


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
        Result("train 1 x 100", "avx2", [0.02] * 3, facts=facts),
        Result("train 1 x 100", "torch", [0.05] * 3, facts=facts),
        Result("train 1 x 100", "torch-tuned", [0.04] * 3, facts=facts),
    ]
    _, table = report.train_table(results, CEILINGS)
    assert table[0][-1] == "times as fast as best PyTorch" and table[0][4] == "% of peak"
    assert report.train_table(results[:1], CEILINGS)[1][0][-1] == "times as fast as avx2"
    assert table[1] == ["avx2", "0.020", "0%", "5,000.0", "50%", "2.00", "2.00"]


def test_json_and_pictures_are_written(tmp_path: Path) -> None:
    report.write_json(tmp_path / "a.json", CEILINGS, op_results(), "quiet")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["results"][1]["median"] == 0.02 and content["peak_flops"]["base"] == 50e9
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "roof.png", op_results(), CEILINGS)
    trained = [Result("train 1 x 9", "avx2", [0.1], facts={"tokens": 9, "flops": 1.0})]
    report.draw(tmp_path / "bars.png", trained, CEILINGS)
    for name in ("roof.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "nothing" in refused(report.draw, tmp_path / "x.png", op_results()[2:], CEILINGS)


def test_table_of_the_machine() -> None:
    ceilings = Ceilings(2, {"avx512vnni": 108e9, "base": 42e9}, {1: 53e9, 2: 45e9})
    first, *table = report.machine_lines(ceilings)
    assert first.startswith(f"{cpu_name()}, 2 threads; gpt2c ")
    assert [line.split() for line in table] == [
        ["peak", "of", "GFLOP/s", "memory", "with", "GB/s"],
        ["avx512vnni", "108", "1", "thread", "53"],
        ["base", "42", "2", "threads", "45"],
    ]
    assert ", 1 thread; " in report.machine_lines(CEILINGS)[0]


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


def test_summary_of_ops() -> None:
    facts = {"flops": 1e9, "bytes": 1e6}
    more = [
        Result("gelu n=9", "numpy", [0.08], facts=facts),
        Result("gelu n=9", "avx2", [0.02], facts=facts),
        Result("gelu n=9", "torch", note="PyTorch has no such op", facts=facts),
        Result("norm n=9", "numpy", note="WRONG: error 1.0e+00", facts=facts),
        Result("norm n=9", "avx2", [0.02], facts=facts),
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
        Result(f"train 1 x {T}", row, [0.1 / i], facts={"tokens": T, "flops": 1.0})
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


# ---- the JSON file, and a later run compared with it ---------------------------------------------


def test_json_records_what_was_measured(tmp_path: Path) -> None:
    wrong = Result("gelu n=9", "base", note="WRONG", facts={"error": math.nan, "flops": 1.0})
    results = [*op_results(), wrong]
    report.write_json(tmp_path / "a.json", CEILINGS, results, "NOISY MACHINE: so")
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    content = json.loads(text)
    assert list(content)[:3] == ["schema", "kind", "noise"]
    assert (content["schema"], content["kind"]) == (report.SCHEMA, "ops")
    assert content["noise"] == "NOISY MACHINE: so" and content["threads"] == 1
    assert datetime.fromisoformat(content["date"]).tzinfo is not None
    assert content["versions"].keys() >= {"gpt2c", "Python", "numpy"}
    assert content["cpu"] == machine.cpu_facts() and content["commit"] == machine.commit()
    assert content["compiler"] == "unknown compiler" or re.search("GCC|clang", content["compiler"])
    assert content["results"][-1]["facts"]["error"] is None


def test_recorded_commit_is_that_of_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(machine.__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        assert re.fullmatch(r"[0-9a-f]{40}\+?", machine.commit())
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "gpt2c" / "bench" / "machine.py"))
    assert machine.commit() == ""


def test_older_json_file_is_compared(tmp_path: Path) -> None:
    path, facts = tmp_path / "old.json", {"flops": 1.0, "bytes": 1.0}
    older = [
        Result("gelu n=9", "avx2", [0.04], facts=facts),
        Result("gelu n=9", "base", [0.08], facts=facts),
    ]
    report.write_json(path, CEILINGS, older, "NOISY MACHINE")
    old = report.read_old(path, "ops")
    newer = [
        Result("gelu n=9", "avx2", [0.02], facts=facts),
        Result("gelu n=9", "numpy", [0.1], facts=facts),
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": None}, "no schema"),
        ({"schema": 99}, "schema 99"),
        ({"schema": True}, "schema"),
        ({"kind": "train"}, "gpt2c bench 'train'"),
        ({"results": 5}, "results"),
        ({"results": [{"group": "a", "row": "b", "median": 0}]}, "results"),
        ({"results": [{"group": "a", "row": "b", "median": "x"}]}, "results"),
        ({"results": [{"row": "b"}]}, "results"),
        ({"results": [{"group": [], "row": "b"}]}, "results"),
    ],
)
def test_incomparable_json_file_is_refused_before_the_start(
    change: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli_bench, "measure_ceilings", lambda *_: pytest.fail("it started"))
    path = tmp_path / "old.json"
    report.write_json(path, CEILINGS, op_results(), "quiet")
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    assert main(["bench", "ops", "--backends", "base", "--compare", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and said in err and err.count("\n") == 1


def test_file_that_is_no_json_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text("{")
    for name in ("a", "nothing"):
        assert main(["bench", "ops", "--compare", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert str(tmp_path / name) in err and err.count("\n") == 1


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the benchmark to two cases of gelu, and measure the machine at once."""
    op = dataclasses.replace(EXAMPLES["gelu_forward"], shapes=[{"n": 999}, {"n": 99}])
    monkeypatch.setattr(bench, "EXAMPLES", {"gelu_forward": op})
    monkeypatch.setattr(cli_bench, "measure_ceilings", lambda threads: CEILINGS)


def test_run_on_the_command_line(
    gelu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_bench, "lacks", lambda name: "torch" if "torch" in name else "")
    monkeypatch.setattr(bench, "ROUNDS", 2)
    path = tmp_path / "a.json"
    command = ["bench", "ops", "--backends", "numpy,base,base,torch,torch-tuned", "--threads", "1"]
    assert main([*command, "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("not installed") == 1
    assert "not installed: torch, torch-tuned (pip install torch)" in out
    assert out.count("summary: times as fast as numpy / % of ceiling") == 1
    assert "measuring 1 of 2: gelu_forward n=999\nmeasuring 2 of 2: gelu_forward n=99\n" in err
    assert main([*command, "--compare", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"compared with {path}" in out and out.count("gelu_forward n=99  base") == 1


def test_only_missing_packages_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_bench, "lacks", lambda name: "torch")
    assert main(["bench", "ops", "--backends", "torch"]) == 2
    assert capsys.readouterr().err == "gpt2c: not installed: torch (pip install torch)\n"


def test_noisy_machine_is_reported_before_the_start_too(
    gelu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Quiet, "verdict", lambda self: "NOISY MACHINE: so")
    assert main(["bench", "ops", "--quick", "--backends", "base", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NOISY MACHINE") and lines[-1].startswith("NOISY MACHINE")


@pytest.mark.parametrize("what", ["ops", "train", "generate"])
def test_each_kind_has_a_help_of_its_own(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", what, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: gpt2c bench {what}" in out and "--compare OLD.json" in out and "%%" not in out
    assert ("--shape" in out) == ("--torch-compile" in out) == (what == "train")


def test_flags_stand_before_the_kind_or_after(gelu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measured(names: Any, ceilings: Any, quick: Any, show: Any, watch: Any) -> Any:
        seen.append((list(names), quick))
        show(op_results())
        return [], "quiet"

    monkeypatch.setattr(cli_bench, "bench_ops", measured)
    for command in ("--quick --backends base ops", "ops --quick --backends base"):
        assert main(["bench", *command.split()]) == 0
    assert main(["bench", "--backends", "numpy", "ops", "--backends", "base"]) == 0
    assert seen == [(["base"], True)] * 2 + [(["base"], False)]


def test_outputs_are_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_bench, "measure_ceilings", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr(cli_bench, "why_not", lambda: "a picture needs matplotlib: so")
    commands = {
        f"--json {tmp_path}": "is a directory",
        f"--plot {tmp_path}": "is a directory",
        f"--plot {tmp_path}/a.svg": "name in .png",
        f"--plot {tmp_path}/a.png": "--plot: a picture needs matplotlib",
        f"--report {tmp_path}/b/a.md": "there is no directory",
    }
    for flags, said in commands.items():
        assert main(["bench", "ops", *flags.split()]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_terminal_shows_a_bar_of_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = cli_bench._Shown(19)
    shown.work("gelu_forward n=9")
    shown.work("gelu_backward n=9")
    shown.now("round 2 of 9: avx2")
    shown.print("a table")
    shown.close()
    out, err = capsys.readouterr()
    assert out == "a table\n"
    assert "1/19" in err and "gelu_backward n=9: round 2 of 9: avx2" in err
    assert "measuring" not in err


def test_shapes_are_written_for_people() -> None:
    work = [bench.describe(shape) for _, shape in bench.ops_work(False)]
    assert "N=1 C=768 OC=3072 int8 weights" in work
    assert "N=1024 C=768 OC=3072 gradients written" in work
    assert not any("kind" in text or "True" in text or "False" in text for text in work)


def test_peaks_are_the_best_of_two_measurements() -> None:
    busy = Ceilings(1, {"avx2": 3e9, "base": 60e9}, {1: 20e9})
    assert CEILINGS.best(busy) == Ceilings(1, {"avx2": 100e9, "base": 60e9}, {1: 20e9})


def test_picture_names_machine_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    for name in ("plot_shares", "plot_speed"):
        monkeypatch.setattr(report, name, lambda *arguments: titles.append(arguments[-1]))
    report.draw(tmp_path / "a.png", op_results(), CEILINGS, "NOISY MACHINE: so")
    trained = [Result("train 1 x 9", "avx2", [0.1], facts={"tokens": 9, "flops": 1.0})]
    report.draw(tmp_path / "b.png", trained, CEILINGS)
    day = datetime.now().date().isoformat()
    assert titles[0] == f"{cpu_name()}, 1 thread, {day}, NOISY MACHINE"
    assert titles[1].endswith(f"\n{cpu_name()}, 1 thread, {day}")


def test_interrupted_benchmark_writes_the_rows_it_has(
    gelu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(names: Any, ceilings: Any, quick: Any, show: Any, watch: Any) -> Any:
        show(op_results())
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_bench, "bench_ops", interrupted)
    path = tmp_path / "a.json"
    assert main(["bench", "ops", "--backends", "base", "--json", str(path)]) == 130
    assert "STOPPED by Ctrl-C after 1 of 2" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["noise"].startswith("STOPPED") and len(content["results"]) == 3
