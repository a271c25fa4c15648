"""Tokens/s beside other programs: 0, 1 and 2 busy loops, with all threads and with one.

    python benchmarks/busy.py                     # all sizes; about ten minutes
    python benchmarks/busy.py --checkout ../old   # with a column for another clone, built in place

A busy loop is a process that computes and never sleeps: a video call, or another training. Rows
are processes of their own that take turns, a sample each; the figures are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2c.bench.report import provenance
from gpt2c.kernels.backend import default_threads

ROOT = Path(__file__).resolve().parent.parent
# name: layers, channels, heads, vocabulary, B, T, work
SIZES = {
    "2 layers, 192 channels": (2, 192, 6, 4096, 4, 128, "train"),
    "6 layers, 384 channels": (6, 384, 6, 4096, 4, 128, "train"),
    "124M, 4 x 64": (12, 768, 12, 50257, 4, 64, "train"),
    "decoding, 2 layers, 192 channels": (2, 192, 6, 4096, 1, 35, "decode"),
    "decoding, 124M": (12, 768, 12, 50257, 1, 35, "decode"),
}


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run `loops` programs that never sleep."""
    command = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(command) for _ in range(loops)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def start(size: tuple[object, ...], checkout: Path, threads: int | None) -> subprocess.Popen[str]:
    """Start a row's process and wait until it is warm."""
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    if threads is not None:
        variables["GPT2C_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), *map(str, size)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    row = subprocess.Popen(command, env=variables, text=True, bufsize=1, **pipes)
    if row.stdout is None or row.stdout.readline() != "ready\n":
        sys.exit(f"the row of {checkout} does not start")
    return row


def main() -> None:
    """Measure every size and print a table in Markdown."""
    parser = argparse.ArgumentParser(description="tokens/s beside 0, 1 and 2 busy loops")
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="another clone")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples")
    parser.add_argument("--sizes", help="only those whose name holds this text")
    options = parser.parse_args()
    rounds, seconds = (3, 1.0) if options.quick else (7, 2.0)
    labels = ["all threads", "one thread", *map(str, options.checkout)]
    print(f"{provenance(default_threads())}\n")
    print(f"| tokens/s with 0 / 1 / 2 busy loops | {' | '.join(labels)} |")
    print("|---|" + "---:|" * len(labels), flush=True)
    for name, size in SIZES.items():
        if options.sizes and options.sizes not in name:
            continue
        *_, B, T, work = size
        tokens = B * (T if work == "train" else T - 3)
        others = [start(size, checkout.resolve(), None) for checkout in options.checkout]
        rows = [start(size, ROOT, None), start(size, ROOT, 1), *others]
        medians: list[list[float]] = [[] for _ in rows]
        for loops in range(3):
            samples: list[list[float]] = [[] for _ in rows]
            with busy(loops):
                for _ in range(rounds):
                    for row, found in zip(rows, samples, strict=True):
                        assert row.stdin is not None and row.stdout is not None
                        row.stdin.write(f"{seconds}\n")
                        found.append(tokens / float(row.stdout.readline()))
            for found, median in zip(samples, medians, strict=True):
                median.append(statistics.median(found))
        cells = (" / ".join(f"{rate:,.0f}" for rate in median) for median in medians)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        for row in rows:
            row.kill()
            row.wait()


if __name__ == "__main__":
    main()
