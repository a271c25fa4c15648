"""Whether a model learns as well with products of 16 bits: curves of three seeds in both, and time.

    python benchmarks/precision.py TEXT --json benchmarks/results/xeon-precision.json
    python benchmarks/precision.py TEXT --parts shakespeare --seeds 1           # two minutes

TEXT is a file, such as Tiny Shakespeare, for the recipe shakespeare-char. The demo and the part
"long", a GPT-2 of 12 million parameters, read this Python's documentation. The precisions take
turns, each on the fastest backend with instructions for it. A curve's difference is that of its
mean over the seeds; the seeds alone show how far one run is from another. Runs that FILE has are
not repeated: an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from gpt2c.bench.machine import fastest_for
from gpt2c.bench.report import provenance
from gpt2c.files.atomic import atomic_path
from gpt2c.kernels.backend import PRECISIONS, as_precision, get_backend
from gpt2c.kernels.limits import usable_cores
from gpt2c.screen.picture import drawing, make_figure, write
from gpt2c.text.corpus import python_documentation
from gpt2c.text.documents import TextFiles
from gpt2c.text.prepare import prepare
from gpt2c.train.metrics import read_metrics
from gpt2c.train.pretrain import train
from gpt2c.train.settings import recipe_settings

LONG = {
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8, "max_iters": 1500,
    "learning_rate": 1e-3, "warmup_iters": 100, "schedule": "cosine", "min_lr": 1e-4, "beta2": 0.99,
    "eval_interval": 150, "eval_iters": 20,
}  # fmt: skip
RECIPES = {"demo": "demo", "shakespeare": "shakespeare-char"}
Curve = list[tuple[int, float]]


def run(name: str, precision: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train; return the row of a run."""
    given = dict(LONG) if name == "long" else recipe_settings(RECIPES[name], {})
    settings = given | {"seed": seed, "precision": precision, "save_minutes": 1000.0}
    settings["backend"] = fastest_for(precision)
    out = folder / f"{name} {precision}, seed {seed}"
    seconds = train(data, out, settings).seconds
    entries = read_metrics(out / "metrics.jsonl")
    curve = [(one["step"], one["val_loss"]) for one in entries if "val_loss" in one]
    print(f"{name} {seed} {precision}: {curve[-1][1]:.4f}, {seconds:.0f} s", flush=True)
    row = {"part": name, "seed": seed, "precision": precision, "seconds": seconds}
    return row | {"curve": curve, "machine": provenance(usable_cores())}


def mean_curve(rows: list[dict[str, Any]], name: str, precision: str) -> Curve:
    """Return the mean of the seeds' curves."""
    curves = [r["curve"] for r in rows if r["part"] == name and r["precision"] == precision]
    steps = [step for step, _ in curves[0]]
    return [(s, statistics.mean(c[i][1] for c in curves)) for i, s in enumerate(steps)]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the parts as Markdown; a difference is from fp32, of the means of the seeds."""
    lines = [
        "| part | precision | validation loss of each seed | differs: most, at the end | seconds |",
        "|---|---|---|---:|---:|",
    ]
    for name, precision in dict.fromkeys((row["part"], row["precision"]) for row in rows):
        own = [row for row in rows if (row["part"], row["precision"]) == (name, precision)]
        losses = ", ".join(f"{row['curve'][-1][1]:.4f}" for row in own)
        seconds = statistics.median(row["seconds"] for row in own)
        seeds = {row["seed"] for row in own}  # of fp32, too: seeds differ more than precisions
        alike = [row for row in rows if row["seed"] in seeds]
        means = [mean_curve(alike, name, one) for one in ("fp32", precision)]
        off = [b / a - 1 for (_, a), (_, b) in zip(*means, strict=True)]
        differs = f"{max(off, key=abs):+.2%}, {off[-1]:+.2%}" if precision != "fp32" else ""
        lines.append(f"| {name} | {precision} | {losses} | {differs} | {seconds:.0f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the curves of each part, of all seeds, one precision dashed over the other."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    with drawing():
        figure = make_figure((4.5 * len(parts), 4.5))
        for place, name in enumerate(parts, 1):
            axes = figure.add_subplot(1, len(parts), place)
            for row in rows:
                if row["part"] == name:
                    steps, losses = zip(*row["curve"], strict=True)
                    number = PRECISIONS.index(row["precision"])
                    label = row["precision"] if row["seed"] == 1 else None
                    style = ("-", "--", ":")[number]
                    axes.plot(steps, losses, style, color=f"C{number}", label=label)
            axes.set(title=name, xlabel="step", ylabel="validation loss" if place == 1 else "")
            axes.legend()
        write(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--parts", nargs="+", default=[*RECIPES, "long"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    threads = usable_cores()
    print(f"auto is {as_precision('auto', get_backend('auto', threads))}")
    is_there = given.json and given.json.exists()
    rows: list[dict[str, Any]] = json.loads(given.json.read_text())["rows"] if is_there else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = product(given.parts, range(1, given.seeds + 1), given.precisions)
        for name, seed, precision in runs:
            if any((r["part"], r["seed"], r["precision"]) == (name, seed, precision) for r in rows):
                continue
            data = folder / f"{name}-data"
            if name == "shakespeare" and not data.exists():
                with TextFiles([given.text]) as texts:
                    prepare(texts, data, "bytes")
            elif not data.exists():
                prepare(python_documentation(), data, "bpe:4096")
            rows.append(run(name, precision, seed, data, folder))
            if given.json:
                with atomic_path(given.json) as temporary_path:
                    temporary_path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if given.plot:
        plot(rows, given.plot)
    print(table(rows))


if __name__ == "__main__":
    main()
