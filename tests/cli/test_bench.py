"""gpt2c bench: its flags, what it refuses before the start, and what it prints meanwhile."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.measured import CEILINGS, op_results

from gpt2c.bench import report
from gpt2c.bench import suite as bench
from gpt2c.bench.machine import Quiet
from gpt2c.bench.suite import Row
from gpt2c.cli import bench as cli_bench
from gpt2c.cli.main import main
from gpt2c.kernels.cases import EXAMPLES


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


def test_ops_on_the_command_line(
    gelu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_only_missing_packages_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_bench, "lacks", lambda name: "torch")
    assert main(["bench", "ops", "--backends", "torch"]) == 2
    assert capsys.readouterr().err == "gpt2c: not installed: torch (pip install torch)\n"


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
    ["--shape 4x64", "--recompute full", "--torch-compile", "--batch 8", "--json no/such/a.json"],
)
def test_ops_refuse_flags_of_other_benchmarks(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "ops", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_texts_at_a_time_are_at_least_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", "--batch", "8", "--batch", "0"]) == 2
    assert capsys.readouterr().err == "gpt2c: --batch must be at least 1, got 0\n"


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
