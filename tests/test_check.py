"""make check: the tests that a change to a file asks for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import check
import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    path.stem for path in (ROOT / "gpt2c/cli").glob("[!_]*.py") if path.stem != "main"
)

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source tree")


def test_kernel_asks_for_the_tests_of_its_ops() -> None:
    assert check.ops(ROOT / "csrc/layernorm.c") == ["layernorm_forward", "layernorm_backward"]
    assert check.ops(ROOT / "csrc/gemm.c") == check.ops(ROOT / "csrc/matmul.c") != []
    of_ops, of_models = check.test(["csrc/gelu.c", "csrc/residual.c"])
    names = "gelu_backward or gelu_forward or residual_forward"
    assert of_ops[of_ops.index("-k") + 1] == names
    assert "tests/kernels/test_kernels.py" in of_ops and "tests/model/test_model.py" in of_models


def test_ops_of_a_file() -> None:
    assert check.ops(ROOT / "csrc/team.c") == []
    assert check.ops(ROOT / "csrc/decode.c") == ["decode_step"]
    products = ["matmul_forward", "matmul_backward", "matrix_transpose"]
    assert check.ops(ROOT / "csrc/matmul.c") == check.ops(ROOT / "csrc/linear.c") == products


@pytest.mark.parametrize("name", ["csrc/team.c", "csrc/team.h"])
def test_team_asks_for_the_tests_of_all_kernels(name: str) -> None:
    (command,) = check.test([name])
    assert "-k" not in command and "tests/kernels/test_kernels.py" in command


def test_shared_header_asks_for_the_tests_of_all_kernels() -> None:
    (command,) = check.test(["csrc/simd.h", "csrc/gelu.c"])
    assert "-k" not in command and "tests/kernels/test_kernels.py" in command


@pytest.mark.parametrize("name", COMMANDS)
def test_command_asks_for_the_tests_that_run_it(name: str) -> None:
    asked = check.tests_of(f"gpt2c/cli/{name}.py")
    assert {test for test in check.callers(name) if check.is_test(test)} <= asked
    assert any((ROOT / test).exists() for test in asked)


def test_module_asks_for_its_own_tests_and_those_that_import_it() -> None:
    assert "tests/train/test_plot.py" in check.tests_of("gpt2c/train/plot.py")
    shards = check.tests_of("gpt2c/text/shards.py")
    assert {"tests/text/test_shards.py", "tests/formats/test_convert.py"} <= shards


def test_helper_asks_for_tests_that_use_it_through_another_helper() -> None:
    assert "from helpers.cases" not in (ROOT / "tests/kernels/test_ops.py").read_text()
    cases = check.tests_of("tests/helpers/cases.py")
    assert {"tests/kernels/test_kernels.py", "tests/kernels/test_ops.py"} <= cases
    assert check.tests_of("tests/fuzz.py") == {"tests/files/test_hostile.py"}
    forks = check.tests_of("tests/programs/forks.py")
    assert forks == {"tests/test_processes.py"} < check.tests_of("tests/programs/common.py")
    assert "tests/train/test_disks.py" in check.tests_of("tests/programs/disks.py")


def test_fixtures_ask_for_the_tests_of_their_folder() -> None:
    training = check.tests_of("tests/train/conftest.py")
    assert "tests/train/test_signals.py" in training and "tests/train/test_run.py" in training
    assert all(Path(name).parent == Path("tests/train") for name in training)


def test_other_files_ask_for_the_test_that_reads_them() -> None:
    assert check.tests_of("tests/train/test_plot.py") == {"tests/train/test_plot.py"}
    assert check.tests_of("build.py") == {"tests/test_build.py"}
    assert check.tests_of("README.md") == {"tests/test_readme.py"}
    assert check.tests_of("LICENSE") == set()


def test_selected_tests_exist() -> None:
    """Tests that need another environment are left to make parity."""
    names = [str(path.relative_to(ROOT)) for path in (ROOT / "gpt2c").glob("**/*.py")]
    for command in check.test(
        [*names, "tests/test_parity.py", "tests/helpers/cases.py", "csrc/gelu.c"]
    ):
        files = [part for part in command if part.startswith("tests/")]
        assert files and not [name for name in files if not (ROOT / name).exists()]
        assert "tests/test_parity.py" not in files


def test_deleted_file_counts_as_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed file counts with both names: some file may still import the old one."""
    monkeypatch.setattr(check, "ROOT", tmp_path)
    for name in ("gone.py", "old.py", "same.py"):
        (tmp_path / name).write_text(f"# {name} has lines\n" * 9)
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    subprocess.run(["git", "mv", "old.py", "new.py"], cwd=tmp_path, check=True)
    (tmp_path / "fresh.py").touch()
    assert check.changed("HEAD") == ["fresh.py", "gone.py", "new.py", "old.py"]


def test_deleted_file_asks_for_the_tests_that_used_it() -> None:
    """tests/test_lost.py and csrc/lost.c do not exist, as after a deletion."""
    (command,) = check.test(["gpt2c/train/plot.py", "tests/test_lost.py"])
    assert "tests/train/test_plot.py" in command and "tests/test_lost.py" not in command
    (command,) = check.test(["csrc/lost.c"])
    assert "-k" not in command and "tests/kernels/test_kernels.py" in command
    commands = check.lint(["gpt2c/lost.py", "csrc/lost.c"])
    assert [command[-1] for command in commands] == ["mypy", "--werror"]


def test_files_that_no_test_reads_ask_for_the_target_that_does() -> None:
    others = (ROOT / "tests").glob("*.[!p]*")
    assert {f"tests/{path.name}" for path in others} == check.TARGETS.keys()
    assert check.test(["tests/threads.c", "tests/sanitize.sh"]) == [["make", "sanitize"]]
    assert check.test(["tests/lowest.txt"]) == [["make", "lowest"]]
    makefile = (ROOT / "Makefile").read_text()
    assert not [target for target in check.TARGETS.values() if f"\n{target}: " not in makefile]


def test_lint_checks_the_changed_files() -> None:
    commands = check.lint(["gpt2c/train/plot.py", "csrc/gelu.c", "README.md"])
    assert [command[-1] for command in commands] == [
        *["gpt2c/train/plot.py"] * 2,
        "mypy",
        "csrc/gelu.c",
        "--werror",
    ]
    assert check.lint(["README.md"]) == []
    assert [command[-1] for command in check.lint(["tests/programs/forks.py"])][-1] == "mypy"
