"""Questions whose answers a program can check, from the files of Python itself, for `gpt2c sft`.

    python benchmarks/answers.py runs/answers.jsonl

A question is the head of a function of the standard library, and its answer the names of the
function's parameters, which Python's own parser knows:

    user:       def copyfile(src, dst, *, follow_symlinks=True):
    assistant:  src, dst, follow_symlinks

Heads that differ in the function's name alone are one question.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST = 12  # parameters of a function
LONGEST = 160  # characters of a head


def heads(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield (head, names of its parameters) of each function below a directory."""
    for path in sorted(directory.rglob("*.py")):
        if {"test", "tests", "idlelib", "site-packages"} & {*path.parts}:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                plain = [*given.posonlyargs, *given.args, given.vararg]
                names = [one.arg for one in (*plain, *given.kwonlyargs, given.kwarg) if one]
                if 1 <= len(names) <= MOST:
                    yield f"def {node.name}({ast.unparse(given)}):", ", ".join(names)


def conversations(directory: Path) -> list[dict[str, Any]]:
    """Return a conversation of two messages for each different list of parameters."""
    found: dict[str, tuple[str, str]] = {}
    for head, answer in heads(directory):
        if len(head) <= LONGEST:
            found.setdefault(head.partition("(")[2], (head, answer))
    return [
        {"messages": [{"role": "user", "content": head}, {"role": "assistant", "content": answer}]}
        for head, answer in found.values()
    ]


def main() -> None:
    """Write the questions and answers as JSONL."""
    parser = argparse.ArgumentParser(description="answers that a program can check")
    parser.add_argument("out", type=Path, help="the file to write")
    out = parser.parse_args().out
    examples = conversations(Path(sysconfig.get_path("stdlib")))
    lines = [json.dumps(example) + "\n" for example in examples]
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines):,} questions of Python {platform.python_version()}'s standard library")


if __name__ == "__main__":
    main()
