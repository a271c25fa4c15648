"""README runs: every line of its shell and Python blocks, in order.

A demo of three steps replaces `make demo`, and a three-hundredth of its steps each --max-iters N.
Three kinds of lines are not run. Lines with "# network:" need one. Lines with "# minutes:" take
that long, so only their flags are read. `make` and the activation of .venv are about the clone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2c.cli.main import parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"
COMMANDS = Path(sys.executable).parent  # where pip puts gpt2c
TINY = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 32 --batch-size 4"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no README.md: not a source tree")


def blocks(path: Path = README) -> Iterator[tuple[str, str]]:
    """Return the language and the text of each block of code in README."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S):
        yield match[1], match[2]


def lines(path: Path = README) -> list[str]:
    """Return the lines of README's shell blocks, without lines of comment."""
    shell = "".join(text for language, text in blocks(path) if language == "sh")
    found = re.sub(r"\\\n", " ", shell).splitlines()
    return [line for line in found if line.strip() and not line.lstrip().startswith("#")]


def about_the_clone(line: str) -> bool:
    return line.startswith(("make ", ". .venv/bin/activate"))


def run(command: list[str], folder: Path) -> None:
    variables = os.environ | {"PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, input="The list\n"
    )
    said = f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    assert done.returncode == 0, said
    # not on standard output: a model that has read Python's documentation may write these words
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, said


def test_every_block_names_its_language() -> None:
    assert {language for language, _ in blocks()} == {"sh", "python", "text"}
    assert len(lines()) > 20
    assert not [line for line in lines() if re.search(r"\bsudo\b|\.\.\.", line.partition("#")[0])]


def test_every_line_of_shell_runs_in_order(tmp_path: Path) -> None:
    if not (COMMANDS / "gpt2c").exists() or not shutil.which("bash"):
        pytest.skip("gpt2c is not installed, or there is no bash")
    pytest.importorskip("matplotlib")
    pytest.importorskip("gguf")
    demos = 0
    for line in lines():
        if line.startswith("make demo"):
            demos += 1
            line = f"gpt2c demo --overwrite --max-iters 900 {TINY}"
        elif about_the_clone(line) or "# network:" in line or "# minutes:" in line:
            continue
        line = re.sub(r"--max-iters (\d+)", lambda n: f"--max-iters {int(n[1]) // 300}", line)
        run(["bash", "-euo", "pipefail", "-c", line], tmp_path)
    assert demos == 1
    for name in ("demo/run", "book/run", "copy"):
        assert (tmp_path / "runs" / name / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "a file outside runs/ is litter"


def test_every_line_of_python_runs_in_order(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(text for language, text in blocks() if language == "python"))
    run([sys.executable, "-W", "error", str(script)], tmp_path)


def test_lines_that_take_minutes_have_flags_that_exist() -> None:
    long = [line.partition("#")[0] for line in lines() if "# minutes:" in line]
    assert long
    for line in long:
        program, *rest = shlex.split(line)
        if program == "gpt2c":
            parser().parse_args(rest)
        else:
            assert program == "python" and (ROOT / rest[0]).exists(), line


def test_chinese_readme_has_the_same_lines() -> None:
    def code(path: Path) -> list[str]:
        python = "".join(text for language, text in blocks(path) if language == "python")
        return [line.partition("#")[0].rstrip() for line in lines(path) + python.splitlines()]

    assert code(CHINESE) == code(README)


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"`make (\w+)|^make (\w+)", README.read_text("utf-8"), re.MULTILINE)
    targets = {one or other for one, other in named}
    assert {"setup", "demo", "test"} <= targets
    assert not [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]


@pytest.mark.parametrize("page", [README, CHINESE], ids=lambda page: page.name)
def test_every_file_that_is_linked_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert paths and not [path for path in paths if not (ROOT / path).exists()]
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines()}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
