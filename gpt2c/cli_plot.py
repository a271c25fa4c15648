"""`gpt2c plot`: flags in, a picture out. Knows nothing that the doors do not know; used by cli."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpt2c.metrics import FILE, read_metrics
from gpt2c.plot import RUNS_FILE, plot_runs
from gpt2c.terminal import well_formed


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Say what `gpt2c plot` takes."""
    verb.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="what gpt2c train made")
    verb.add_argument(
        "--out", type=Path, metavar="FILE.png", help="default: plot.png in the first run"
    )


def run_plot(options: argparse.Namespace) -> int:
    """`gpt2c plot`."""
    out = options.out or options.runs[0] / RUNS_FILE
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: a picture is a PNG file; give --out a name that ends in .png")
    runs = {}
    for path in options.runs:
        if not (path / FILE).is_file():
            raise FileNotFoundError(f"{path / FILE} does not exist: a run of gpt2c train has it")
        entries = read_metrics(path / FILE)
        if not entries:
            raise ValueError(f"{path / FILE} holds no step that can be drawn")
        runs[well_formed(str(path))] = entries
    plot_runs(runs, out)
    print(out)
    return 0
