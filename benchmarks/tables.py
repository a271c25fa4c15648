"""The READMEs' tables and picture of speed, made from the files in benchmarks/results/.

    python benchmarks/tables.py benchmarks/results/{zen3,xeon}-train.json
    python benchmarks/tables.py benchmarks/results/zen3-generate.json

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
from gpt2c.bench.suite import Measurement
from gpt2c.kernels.backend import NAMES
from gpt2c.train.plot import plot_speed

CPUS = {
    "zen3": "AMD Zen 3",
    "zen4": "AMD Zen 4",
    "xeon": "Xeon with AMX",
}  # the first word of a file's name
KINDS = ("fp32", "16-bit", "int8")  # of weights, or of the numbers that training multiplies
FIELDS = [field.name for field in dataclasses.fields(Measurement)]

Table = list[list[str]]


class Run:
    """A JSON file: the timed rows, the ceilings, and a line that says where and when."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        cpu, self.kind = path.name.partition("-")[0], content["kind"]
        self.cpu = CPUS.get(cpu, cpu)
        found = [Measurement(**{name: r[name] for name in FIELDS}) for r in content["results"]]
        self.results = [r for r in found if r.seconds and not r.note]
        if self.kind == "train":
            self.results += llmc(path.with_name(f"{cpu}-llmc.txt"))
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


def llmc(path: Path) -> list[Measurement]:
    """Return llm.c's rows, none without the file."""
    text = path.read_text() if path.exists() else ""
    return [
        Measurement(
            f"train {B} x {T}", "llm.c", [float(seconds)], facts={"tokens": int(B) * int(T)}
        )
        for B, T, seconds in re.findall(r"(\d+) x (\d+): ([\d.]+) s a step", text)
    ]


def rate(result: Measurement) -> float:
    """Return tokens a second, by the median."""
    return float(result.facts["tokens"] / result.median)


def written(value: float) -> str:
    """Write a figure in three digits or more."""
    return f"{value:,.{0 if value >= 100 else 1}f}"


def train_tables(runs: list[Run]) -> list[tuple[str, Table]]:
    """Return the best row of gpt2c beside that of PyTorch, with equal numbers; and every row."""
    beside = [["", "gpt2c", "best of PyTorch", "gpt2c / PyTorch", "of its peak"]]
    for kind in KINDS:
        for run in runs:
            for group in dict.fromkeys(r.group for r in run.results):
                rows = [r for r in run.results if r.group == group and kind_of(r.row) == kind]
                own, torch = (
                    min((r for r in rows if side(r.row)), key=lambda r: r.median, default=None)
                    for side in (is_own, is_torch)
                )
                if not own or not torch:
                    continue
                floor = run.ceilings.seconds(own.row, own.facts["flops"], 0)
                share = f"{100 * floor / own.median:.0f} %" if kind == "fp32" else ""
                name = f"{run.cpu}, {kind}: {group.removeprefix('train ')}"
                cells = [f"{written(rate(r))} ({r.row})" for r in (own, torch)]
                beside.append([name, *cells, f"{torch.median / own.median:.2f}", share])
    every = []
    for run in runs:
        figures: dict[str, dict[str, float]] = {}
        for r in run.results:
            shape = r.group.removeprefix("train ")
            figures.setdefault(f"{shape}, tokens/s", {})[r.row] = rate(r)
            gigabytes = figures.setdefault(f"{shape}, GB", {})
            if "peak_memory" in r.facts:  # llm.c tells none
                gigabytes[r.row] = r.facts["peak_memory"] / 1e9
        every.append((f"Training, {run.cpu}: every row", of_rows(figures)))
    return [("Training, tokens a second: the best rows of gpt2c and PyTorch", beside), *every]


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
    if memory:
        figures["decode, batch 1, resident MB"] = memory
    best = [["", *(f"{side} {kind}" for kind in KINDS for side in ("gpt2c", "best other"))]]
    for heading, values in figures.items():
        first = max if heading.endswith("tokens/s") else min
        cells = []
        for kind in KINDS:
            for own in (True, False):
                found = [row for row in values if kind_of(row) == kind and is_own(row) == own]
                row = first(found, key=values.__getitem__, default="")
                cells.append(f"{written(values[row])} ({row})" if row else "")
        best.append([heading, *cells])
    return [
        (f"Inference, {run.cpu}: the best row of gpt2c and of the other engines", best),
        (f"Inference, {run.cpu}: every row", of_rows(figures)),
    ]


def of_rows(figures: dict[str, dict[str, float]]) -> Table:
    """Return a table with a line for each row and a column for each figure."""
    table = [["", *figures]]
    for row in dict.fromkeys(row for values in figures.values() for row in values):
        table.append([row, *(written(v[row]) if row in v else "" for v in figures.values())])
    return table


def kind_of(row: str) -> str:
    """Return the kind of a row's numbers: fp32 unless its name says otherwise."""
    name, _, kind = row.partition(":")
    kind = kind or ("bf16" if name.startswith("torch-bf16") else "fp32")
    return "16-bit" if kind in ("fp16", "bf16") else kind


def is_own(row: str) -> bool:
    return row.partition(":")[0] in NAMES


def is_torch(row: str) -> bool:
    return row.startswith("torch")


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
