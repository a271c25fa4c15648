"""The scripts of benchmarks/ fit the package: each imports, and pytest finds its benchmarks."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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
