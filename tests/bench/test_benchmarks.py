"""The scripts of benchmarks/ fit the package, and tables.py makes its tables."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2c.bench import report
from gpt2c.bench.machine import Ceilings
from gpt2c.bench.suite import Measurement
from gpt2c.cli.main import parser

CEILINGS = Ceilings(2, {"avx2": 100e9, "base": 50e9}, {1: 10e9, 2: 15e9})
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is not there")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_script_imports(path: Path) -> None:
    if "llama_cpp" in path.read_text():
        pytest.importorskip("llama_cpp")
    runpy.run_path(str(path), run_name="imported")


def test_pytest_finds_a_benchmark_for_each_op() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    # Under xdist pytest-benchmark would take the child process for one of xdist's workers.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, str(BENCHMARKS)], capture_output=True, text=True, timeout=120, env=own
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gelu_forward" in done.stdout


def test_commands_of_the_readme_have_flags_and_scripts_that_exist() -> None:
    text = (BENCHMARKS / "README.md").read_text("utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).splitlines()
    measured = [line for line in lines if line.startswith("gpt2c ")]
    scripts = re.findall(r"python benchmarks/(\w+\.py)", "\n".join(lines))
    for line in measured:
        parser().parse_args(shlex.split(line)[1:])
    assert {"train", "generate", "ops"} == {line.split()[2] for line in measured}
    assert "tables.py" in scripts and all((BENCHMARKS / name).is_file() for name in scripts)


def tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *files: Path
) -> str:
    """Return what benchmarks/tables.py prints."""
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, files)])
    runpy.run_path(str(BENCHMARKS / "tables.py"), run_name="__main__")
    return capsys.readouterr().out


def test_tables_of_training_are_made_from_json_and_llmc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    facts = {"tokens": 256, "flops": 1e9, "peak_memory": 1e9, "first_loss": 11.0}
    seconds = {"torch": 0.4, "base": 0.3, "avx2": 0.2, "torch-tuned": 0.3}
    seconds |= {"avx512bf16": 0.25, "avx2:bf16": 0.05, "torch-bf16": 0.1}
    results = [Measurement("train 4 x 64", row, [s] * 3, facts=facts) for row, s in seconds.items()]
    results.append(Measurement("train 4 x 64", "amx", [0.1], "WRONG: error 1.0e+00", facts))
    path = tmp_path / "cpu-train.json"
    report.write_json(path, CEILINGS, results, "quiet machine: so")
    (tmp_path / "cpu-llmc.txt").write_text("4 x 64: 0.512 s a step, 500.0 tokens/s, loss 9.1\n")
    out = tables(monkeypatch, capsys, path)
    assert "| cpu, fp32: 4 x 64 | 1,280 (avx2) | 853 (torch-tuned) | 1.50 | 5 % |" in out
    assert "| cpu, 16-bit: 4 x 64 | 5,120 (avx2:bf16) | 2,560 (torch-bf16) | 2.00 |  |" in out
    assert "|  | 4 x 64, tokens/s | 4 x 64, GB |" in out
    assert "| avx512bf16 | 1,024 | 1.0 |" in out and "| llm.c | 500 |  |" in out
    assert out.splitlines()[-2].startswith("cpu: ") and "2 threads" in out
    assert "; MKL_CBWR=AVX2; " in out and out.endswith("; quiet machine: so\n\n")


def test_tables_of_generation_show_the_best_of_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "avx2:fp32": (0.02, 500e6),
        "base:fp32": (0.04, 400e6),
        "transformers": (0.05, 800e6),
        "llama.cpp:fp32": (0.025, 900e6),
        "openvino:bf16": (0.015, 700e6),
        "avx2:int8": (0.01, 200e6),
        "avx2:int8:int8": (0.005, 100e6),
    }
    results = [
        Measurement(group, row, [seconds], facts={"tokens": tokens, "memory": memory})
        for group, tokens in (("prefill 512 tokens", 512), ("decode, batch 1", 1))
        for row, (seconds, memory) in rows.items()
    ]
    path = tmp_path / "cpu-generate.json"
    report.write_json(path, CEILINGS, results, "quiet machine: so")
    out = tables(monkeypatch, capsys, path)
    best = "20.0 (avx2:fp32) | 25.0 (llama.cpp:fp32) |  | 15.0 (openvino:bf16) | 10.0 (avx2:int8)"
    assert f"| prefill 512 tokens, ms | {best} |  |" in out
    assert "| decode, batch 1, tokens/s | 50.0 (avx2:fp32) | 40.0 (llama.cpp:fp32) |" in out
    assert "| decode, batch 1, resident MB | 400 (base:fp32) | 800 (transformers) |" in out
    assert "| transformers | 50.0 | 20.0 | 800 |" in out


def test_the_readmes_have_the_tables_of_the_committed_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((BENCHMARKS / "results").glob("*-generate.json"))
    files += sorted((BENCHMARKS / "results").glob("*-train.json"))
    printed = tables(monkeypatch, capsys, *files)

    def best(text: str) -> list[str]:  # without the first column, which has words
        rows = [line for line in text.splitlines() if re.match(r"\|.*\d \([a-z]", line)]
        return sorted(row.removeprefix("| ").partition(" | ")[2] for row in rows)

    def every(text: str) -> set[str]:
        return {line for line in text.splitlines() if re.match(r"\| [a-z]\S* \| ", line)}

    row = r", (fp32|16-bit): \d+ x \d+ \|.*\(torch\S*\) \| ([\d.]+) \|"  # of GPT-2
    ratios = re.findall(row, printed)
    for name, words in (("README.md", "{} to {} times"), ("README.zh-CN.md", "{} 到 {} 倍")):
        text = (BENCHMARKS.parent / name).read_text("utf-8")
        assert best(text) == best(printed)
        for kind in ("fp32", "16-bit"):
            own = [ratio for found, ratio in ratios if found == kind]
            assert words.format(min(own), max(own)) in text, kind
    assert every((BENCHMARKS / "README.md").read_text("utf-8")) == every(printed)
