"""Lint, build and test what a change touches, and say what that left out: `make check`.

    python tests/check.py [SINCE]    SINCE: the commit to compare with; without it, where this
                                     branch left main

A change to one kernel or one command takes less than a minute on two cores. It is for the way
there; `make lint test` is what a change must pass.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PYTHON = sys.executable
PYTEST = [PYTHON, "-W", "error", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
OF_OPS = [f"tests/kernels/test_{part}.py" for part in ("kernels", "ops", "kernel_fuzz")]  # by op
OF_MODELS = [f"tests/model/test_{part}.py" for part in ("model", "reader")]  # all ops together
PARTS = dict.fromkeys(("gemm.c", "linear.c"), "matmul.c")  # a file without an op: its op's
NOT_HERE = {"tests/test_parity.py"}  # make parity
# Files that no test reads, and the target of the Makefile that reads them.
TARGETS = {
    "tests/threads.c": "sanitize",
    "tests/sanitize.sh": "sanitize",
    "tests/lowest.txt": "lowest",
}


def output(*command: str) -> list[str]:
    """Return the lines that a command prints, or none if it fails."""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()


def changed(since: str | None) -> list[str]:
    """Return the paths that differ from a commit, and new paths that git does not ignore.

    A deleted path is among them, because the tests of its importers must run. A renamed file counts
    with both names.
    """
    commits = [since] if since else ["main", "origin/main", "HEAD"]
    base = next(
        (found for name in commits if (found := output("git", "merge-base", "HEAD", name))), []
    )
    if not base:
        sys.exit(f"make check compares with a commit, and git finds no {since or 'HEAD'} here")
    different = output("git", "diff", "--name-only", "--no-renames", base[0])
    return sorted({*different, *output("git", "ls-files", "--others", "--exclude-standard")})


def is_test(name: str) -> bool:
    return Path(name).name.startswith("test_")


def that_say(pattern: str) -> set[str]:
    """Return the Python files below tests/ that match a pattern."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in TESTS.rglob("*.py")
        if re.search(pattern, path.read_text(), re.MULTILINE)
    }


def importers(module: str) -> set[str]:
    """Return the files below tests/ that import a module of gpt2c or of the tests."""
    package, _, name = module.rpartition(".")
    member = rf"|^ *from {re.escape(package)} import .*\b{name}\b" if package else ""
    return that_say(rf"^ *(from|import) {re.escape(module)}\b{member}")


def callers(verb: str) -> set[str]:
    """Return the files below tests/ that run a verb of the command line."""
    return that_say(rf'"{verb}( |",)|gpt2c {verb}\b')


def ops(source: Path) -> list[str]:
    """Return the kernels of csrc/gpt2c.h that a C file defines, or none if the file is gone."""
    source = source.with_name(PARTS.get(source.name, source.name))
    if not source.exists():
        return []
    header = (ROOT / "csrc/gpt2c.h").read_text()
    declared = re.findall(r"^\w+ (\w+)\([^;]*Team \*team\);", header, re.MULTILINE)
    defined = re.findall(r"^\w+ (\w+)\(", source.read_text(), re.MULTILINE)
    return [name for name in defined if name in declared]


def tests_of(name: str) -> set[str]:
    """Return the test files that a changed file concerns, except for csrc/."""
    path = Path(name)
    if name == "build.py":
        return {"tests/test_build.py"}
    if name in ("README.md", "README.zh-CN.md"):
        return {"tests/test_readme.py"}
    if path.match("gpt2c/recipes/*.toml"):
        return tests_of("gpt2c/train/settings.py")
    if path.parts[0] == "tests" and is_test(name):
        return {name}
    if path.match("tests/*/conftest.py"):
        return {
            test.relative_to(ROOT).as_posix() for test in (ROOT / path).parent.glob("test_*.py")
        }
    if path.parts[0] == "tests" and path.suffix == ".py":
        module = ".".join(path.with_suffix("").parts[1:])
        users = importers(module) | that_say(f'"{re.escape(module)}"')  # programs are run by name
        return set().union(*map(tests_of, users))
    if path.parts[0] == "gpt2c" and path.suffix == ".py":
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        own = Path("tests", *path.parts[1:-1], f"test_{path.name}").as_posix()
        users = importers(module) | (callers(path.stem) if path.match("gpt2c/cli/*") else set())
        return {own, *filter(is_test, users)}
    return set()


def lint(names: list[str]) -> list[list[str]]:
    """Return the commands that check the changed files without running them."""
    own_build = any(re.fullmatch(r"csrc/\w+\.[ch]|build\.py", name) for name in names)
    typed = any(re.fullmatch(r"build\.py|(gpt2c|tests/programs)/.*\.pyi?", name) for name in names)
    names = [name for name in names if (ROOT / name).exists()]
    python = [name for name in names if name.endswith((".py", ".pyi"))]
    c = [name for name in names if name.startswith("csrc/") and name.endswith((".c", ".h"))]
    commands = []
    if python:
        commands += [[PYTHON, "-m", "ruff", "check", *python]]
        commands += [[PYTHON, "-m", "ruff", "format", "--check", *python]]
    if typed:
        commands.append([PYTHON, "-m", "mypy"])
    if c:
        commands.append([str(Path(PYTHON).with_name("clang-format")), "--dry-run", "--Werror", *c])
    if own_build:
        commands.append([PYTHON, "build.py", "--werror"])
    return commands


def test(names: Iterable[str]) -> list[list[str]]:
    """Return the commands that run the tests of the changed files."""
    names = list(names)
    kernels = [ROOT / name for name in names if re.fullmatch(r"csrc/\w+\.[ch]", name)]
    of_each = [ops(path) if path.suffix == ".c" else [] for path in kernels]
    files = set().union(*map(tests_of, names)) - NOT_HERE
    files = {name for name in files if (ROOT / name).exists()}
    targets = sorted({TARGETS[name] for name in names if name in TARGETS})
    commands = []
    if kernels:
        files |= {*OF_OPS, *OF_MODELS} if not all(of_each) else set(OF_MODELS)
        names_of_ops = sorted({name for found in of_each for name in found})
        if all(of_each):  # otherwise all kernels share the file
            commands.append([*OF_OPS, "-k", " or ".join(names_of_ops)])
    if files:
        commands.append(sorted(files))
    return [
        *([*PYTEST, "-m", "not slow", *arguments] for arguments in commands),
        *(["make", target] for target in targets),
    ]


def main() -> None:
    names = changed(sys.argv[1] if len(sys.argv) > 1 else None)
    if not names:
        print("make check: nothing changed")
        return
    print("changed:", *names, flush=True)
    tests, failed = test(names), 0
    for command in [*lint(names), *tests]:
        print("\n$", *(Path(part).name if part == PYTHON else part for part in command), flush=True)
        code = subprocess.run(command, cwd=ROOT).returncode
        failed += code not in (0, 5 if command in tests else 0)  # 5: no test of that name
    run = {part for command in tests for part in command}
    left = sorted(name for name in that_say("") if is_test(name) and name not in run)
    print("\nleft out: tests marked slow;", f"{len(left)} files of tests:", *left)
    print("`make lint test` runs everything")
    sys.exit(f"make check: {failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
