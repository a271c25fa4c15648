"""Supervised fine-tuning on answers that a program can check, from the files of Python itself.

    gpt2c demo                                        # the base, 1.7 million parameters
    python benchmarks/answers.py runs/demo/run        # about 3 minutes

A question is the head of a function of the standard library, and its answer the names of the
function's parameters, which Python's own parser knows:

    user:       def copyfile(src, dst, *, follow_symlinks=True):
    assistant:  src, dst, follow_symlinks

Heads that differ in the function's name alone are one question. Prints how many answers end by
themselves and how many are right, before and after, on questions held out, with intervals.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2c.evaluate.metrics import wilson
from gpt2c.finetune import sft

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
                every = [
                    *given.posonlyargs,
                    *given.args,
                    given.vararg,
                    *given.kwonlyargs,
                    given.kwarg,
                ]
                names = [one.arg for one in every if one is not None]
                if 1 <= len(names) <= MOST:
                    yield f"def {node.name}({ast.unparse(given)}):", ", ".join(names)


def conversations(directory: Path) -> list[dict[str, Any]]:
    """Return a conversation of two messages for each different list of parameters."""
    found = {}
    for head, answer in heads(directory):
        if len(head) <= LONGEST:
            found.setdefault(head.partition("(")[2], (head, answer))
    return [
        {"messages": [{"role": "user", "content": head}, {"role": "assistant", "content": answer}]}
        for head, answer in found.values()
    ]


def main() -> None:
    """Fine-tune a base model and print a table in Markdown."""
    parser = argparse.ArgumentParser(description="answers that a program can check")
    parser.add_argument("base", help="a run of gpt2c demo")
    parser.add_argument("--out", type=Path, help="keep the run here")
    parser.add_argument("--epochs", type=float, default=5.0)
    options = parser.parse_args()
    examples = conversations(Path(sysconfig.get_path("stdlib")))
    asked = len(examples) // 20
    with tempfile.TemporaryDirectory() as directory:
        result = sft(
            options.base,
            examples,
            options.out or Path(directory, "run"),
            learning_rate=1e-3,
            batch_size=16,
            max_epochs=options.epochs,
            eval_answers=asked,
            log_interval=100,
        )
    print("\n| | before | after |\n|---|---:|---:|")
    losses = result.before["val_loss"], result.after["val_loss"]
    print(f"| loss of the answers, nats/token | {losses[0]:.3f} | {losses[1]:.3f} |")
    for name, text in (("val_ended", "end by themselves"), ("val_exact_match", "are right")):
        cells = []
        for figures in (result.before, result.after):
            low, high = wilson(round(asked * figures[name]), asked)
            cells.append(f"{figures[name]:.1%} ({low:.1%} to {high:.1%})")
        print(f"| answers that {text}, of {asked} | {' | '.join(cells)} |")
    print(f"\n{len(examples):,} questions, {result.step:,} steps, {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
