"""make check: which tests a change to a file asks for."""

from __future__ import annotations

from pathlib import Path

import check
import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(path.stem[4:] for path in (ROOT / "gpt2c").glob("**/cli_*.py"))

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source tree")


def test_a_kernel_asks_for_the_tests_of_its_ops() -> None:
    assert check.ops(ROOT / "csrc/layernorm.c") == ["layernorm_forward", "layernorm_backward"]
    assert check.ops(ROOT / "csrc/gemm.c") == check.ops(ROOT / "csrc/matmul.c") != []
    of_ops, of_models = check.test(["csrc/gelu.c", "csrc/residual.c"])
    names = "gelu_backward or gelu_forward or residual_forward"
    assert of_ops[of_ops.index("-k") + 1] == names
    assert "tests/test_kernels.py" in of_ops and "tests/test_model.py" in of_models


def test_ops_of_a_file() -> None:
    assert check.ops(ROOT / "csrc/team.c") == []
    assert check.ops(ROOT / "csrc/decode.c") == ["decode_step"]
    assert check.ops(ROOT / "csrc/linear.c") == ["linear_forward", "matrix_transpose"]


@pytest.mark.parametrize("name", ["csrc/team.c", "csrc/team.h"])
def test_the_threads_ask_for_the_tests_of_all_kernels(name: str) -> None:
    (command,) = check.test([name])
    assert "-k" not in command and "tests/test_kernels.py" in command


def test_what_kernels_share_asks_for_the_tests_of_all() -> None:
    (command,) = check.test(["csrc/simd.h", "csrc/gelu.c"])
    assert "-k" not in command and "tests/test_kernels.py" in command


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_asks_for_the_tests_that_run_it(name: str) -> None:
    assert check.tests_of(f"gpt2c/cli_{name}.py")


def test_a_module_asks_for_the_tests_that_import_it() -> None:
    assert {"test_plot.py"} <= check.tests_of("gpt2c/plot.py")
    assert "test_kernels.py" in check.tests_of("tests/cases.py")
    assert check.tests_of("tests/test_plot.py") == {"test_plot.py"}
    assert check.tests_of("build.py") == {"test_build.py"}
    assert check.tests_of("README.md") == {"test_readme.py"}
    assert check.tests_of("LICENSE") == set()


def test_every_test_that_is_asked_for_exists() -> None:
    """And tests that need an environment of their own are left to make parity."""
    names = [str(path.relative_to(ROOT)) for path in (ROOT / "gpt2c").glob("**/*.py")]
    for command in check.test([*names, "tests/test_parity.py", "tests/cases.py", "csrc/gelu.c"]):
        files = [part for part in command if part.startswith("tests/")]
        assert files and not [name for name in files if not (ROOT / name).exists()]
        assert "tests/test_parity.py" not in files


def test_lint_is_of_what_changed() -> None:
    commands = check.lint(["gpt2c/plot.py", "csrc/gelu.c", "README.md"])
    assert [command[-1] for command in commands] == [
        *["gpt2c/plot.py"] * 2,
        "mypy",
        "csrc/gelu.c",
        "--werror",
    ]
    assert check.lint(["README.md"]) == []
