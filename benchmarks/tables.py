"""The READMEs' tables and picture of speed, made from the files in benchmarks/results/.

    python benchmarks/tables.py benchmarks/results/*-train.json
    python benchmarks/tables.py benchmarks/results/zen5-generate.json

Prints Markdown. A file is what `gpt2c bench train --json` or `gpt2c bench generate --json` writes.
Its name begins with the CPU. The lines of llm.c (see llmc.c) stand beside it, in CPU-llmc.txt.
benchmarks/README.md has the commands that measure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

from gpt2c.bench.machine import Ceilings
from gpt2c.bench.report import as_markdown
from gpt2c.bench.suite import Result
from gpt2c.kernels.backend import NAMES
from gpt2c.train.plot import plot_speed

OWN = tuple(reversed(NAMES))  # gpt2c's backends, the widest vectors last
KINDS = ("fp32", "fp16", "int8")  # of weights
FIELDS = [field.name for field in dataclasses.fields(Result)]

Table = list[list[str]]


class Run:
    """A JSON file: the timed rows, the ceilings, and a line that says where and when."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self.cpu, self.kind = path.name.partition("-")[0], content["kind"]
        found = [Result(**{name: r[name] for name in FIELDS}) for r in content["results"]]
        self.results = [r for r in found if r.seconds and not r.note]
        if self.kind == "train":
            self.results += llmc(path.with_name(f"{self.cpu}-llmc.txt"))
        bandwidth = {int(count): size for count, size in content["bandwidth"].items()}
        self.ceilings = Ceilings(content["threads"], content["peak_flops"], bandwidth)
        self.title = f"{content['machine'][0].partition(';')[0]}, {content['date'][:10]}"
        self.source = "; ".join(
            [
                f"{self.cpu}: {content['machine'][0]}",
                *(f"{name}={value}" for name, value in content["environment"].items()),
                f"{content['date'][:10]}, commit {content['commit']}",
                content["noise"],
            ]
        )


def llmc(path: Path) -> list[Result]:
    """Return llm.c's rows, none without the file."""
    text = path.read_text() if path.exists() else ""
    return [
        Result(f"train {B} x {T}", "llm.c", [float(seconds)], facts={"tokens": int(B) * int(T)})
        for B, T, seconds in re.findall(r"(\d+) x (\d+): ([\d.]+) s a step", text)
    ]


def rate(result: Result) -> float:
    """Return tokens a second, by the median."""
    return float(result.facts["tokens"] / result.median)


def written(value: float) -> str:
    """Write a figure in three digits or more."""
    return f"{value:,.{0 if value >= 100 else 1}f}"


def train_tables(runs: list[Run]) -> list[tuple[str, Table]]:
    """Return gpt2c's backends beside the best row of PyTorch, and every row's tokens a second."""
    groups: dict[str, dict[str, Result]] = {}
    shares: dict[tuple[str, str], float] = {}
    for run in runs:
        for r in run.results:
            name = f"{run.cpu}, {r.group.removeprefix('train ')}"
            groups.setdefault(name, {})[r.row] = r
            if r.row in OWN:
                least = run.ceilings.seconds(r.row, r.facts["flops"], 0)
                shares[name, r.row] = least / r.median
    rows = list(dict.fromkeys(row for group in groups.values() for row in group))
    own = [row for row in OWN if row in rows]
    rows = own + [row for row in rows if row not in own]
    beside = [
        ["", *(f"{row} / best PyTorch" for row in own), *(f"{row}, % of peak" for row in own)]
    ]
    every = [["", *rows]]
    for name, group in groups.items():
        torch = min((r.median for row, r in group.items() if row.startswith("torch")), default=None)
        ratios = [
            f"{torch / group[row].median:.2f}" if torch and row in group else "" for row in own
        ]
        peaks = [f"{shares[name, row]:.0%}" if row in group else "" for row in own]
        beside.append([name, *ratios, *peaks])
        every.append([name, *(written(rate(group[row])) if row in group else "" for row in rows)])
    return [
        ("Training: speed beside the best row of PyTorch", beside),
        ("Training: tokens a second", every),
    ]


def generate_tables(run: Run) -> list[tuple[str, Table]]:
    """Return the best row of gpt2c and of the others for each kind of weights, and every row."""
    figures: dict[str, dict[str, float]] = {}
    for r in run.results:
        if r.group.startswith("prefill"):
            figures.setdefault(f"{r.group}, ms", {})[r.row] = r.median * 1e3
        else:
            figures.setdefault(f"{r.group}, tokens/s", {})[r.row] = rate(r)
    one = [r for r in run.results if r.group.removesuffix(", Llama") == "decode, batch 1"]
    memory = {r.row: r.facts["memory"] / 1e6 for r in one}
    figures["decode, batch 1, resident MB"] = memory
    best = [["", *(f"{side} {kind}" for kind in KINDS for side in ("gpt2c", "best other"))]]
    for heading, values in figures.items():
        first = max if heading.endswith("tokens/s") else min
        cells = []
        for kind in KINDS:
            for own in (True, False):
                found = [row for row in values if kind_of(row) == kind and is_own(row) == own]
                row = first(found, key=values.__getitem__, default="")
                cells.append(f"{written(values[row])} ({row.partition(':')[0]})" if row else "")
        best.append([heading, *cells])
    rows = dict.fromkeys(row for values in figures.values() for row in values)
    every = [["", *figures]]
    for row in rows:
        every.append([row, *(written(v[row]) if row in v else "" for v in figures.values())])
    return [
        ("Inference: the best row of gpt2c and of the other engines", best),
        ("Inference: every row", every),
    ]


def kind_of(row: str) -> str:
    """Return the kind of a row's weights; an engine without a kind has fp32."""
    return row.partition(":")[2] or "fp32"


def is_own(row: str) -> bool:
    return row.partition(":")[0] in OWN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of gpt2c bench train or generate")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the first file, of training"
    )
    options = parser.parse_args()
    runs = [Run(path) for path in options.files]
    for path, run in zip(options.files, runs, strict=True):
        if run.kind not in ("train", "generate"):
            parser.error(f"{path} is of gpt2c bench {run.kind}: name a file of train or generate")
    trained = [run for run in runs if run.kind == "train"]
    tables = [(train_tables(trained), trained)] if trained else []
    tables += [(generate_tables(run), [run]) for run in runs if run.kind == "generate"]
    for made, measured in tables:
        print("\n".join(as_markdown(*table) for table in made))
        print("\n".join(run.source for run in measured) + "\n")
    if options.plot:
        bars: dict[str, dict[str, float]] = {}
        for r in runs[0].results:
            bars.setdefault(r.group, {})[r.row] = rate(r)
        title = f"GPT-2 124M, fp32, AdamW included\n{runs[0].title}"
        plot_speed(bars, "tokens a second", options.plot, title)


if __name__ == "__main__":
    main()
