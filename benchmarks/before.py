"""Speed against another clone's: training steps, decoding, prefill and import, in turn, medians.

    python benchmarks/before.py ../before           # a clone of the commit before, built in place

Each row is a process in each clone; they take turns, a sample each, and the ratio is of medians.
Above 1 this clone is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name: layers, channels, heads, vocabulary, B, T, work
ROWS = {
    "training 124M, 4 x 64": (12, 768, 12, 50257, 4, 64, "train"),
    "training 124M, 1 x 1024": (12, 768, 12, 50257, 1, 1024, "train"),
    "training 2 layers, 192 channels": (2, 192, 6, 4096, 4, 128, "train"),
    "training 1 layer, 16 channels": (1, 16, 2, 257, 1, 16, "train"),
    "decoding 124M, batch 1": (12, 768, 12, 50257, 1, 64, "decode"),
    "decoding 124M, batch 8": (12, 768, 12, 50257, 8, 64, "decode"),
    "decoding 2 layers, 192 channels": (2, 192, 6, 4096, 1, 64, "decode"),
    "prefill 124M, 512 tokens": (12, 768, 12, 50257, 1, 512, "prefill"),
}


def start(row: tuple[object, ...], clone: Path) -> subprocess.Popen[str]:
    """Start a row's process in a clone and wait until it is warm."""
    command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), *map(str, row)]
    variables = {**os.environ, "PYTHONPATH": str(clone)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process: subprocess.Popen[str] = subprocess.Popen(
        command, env=variables, text=True, bufsize=1, **pipes
    )
    if process.stdout is None or process.stdout.readline() != "ready\n":
        sys.exit(f"{clone} does not start")
    return process


def sample(process: subprocess.Popen[str], seconds: float) -> float:
    """Return the mean seconds of a row's work, sampled for `seconds`."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    return float(process.stdout.readline())


def imports(clone: Path) -> float:
    """Return the seconds that a fresh process takes to import gpt2c with its model."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import gpt2c; gpt2c.GPT2"], cwd=clone, check=True)
    return time.perf_counter() - begun


def main() -> None:
    """Measure every row in both clones and print a table."""
    parser = argparse.ArgumentParser(description="speed against another clone's")
    parser.add_argument("before", type=Path, help="a clone of the commit before, built")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a sample")
    options = parser.parse_args()
    clones = {"before": options.before.resolve(), "here": ROOT}
    print(f"{'':36}{'before':>12}{'here':>12}{'ratio':>8}")
    for name, row in [*ROWS.items(), ("import", None)]:
        times: dict[str, list[float]] = {which: [] for which in clones}
        processes = {which: start(row, clone) for which, clone in clones.items()} if row else {}
        for _ in range(options.rounds):
            for which, clone in clones.items():
                taken = sample(processes[which], options.seconds) if row else imports(clone)
                times[which].append(taken)
        for process in processes.values():
            process.kill()
            process.wait()
        before, here = (statistics.median(times[which]) for which in clones)
        print(f"{name:36}{before * 1e3:>9,.2f} ms{here * 1e3:>9,.2f} ms{before / here:>8.3f}")


if __name__ == "__main__":
    main()
