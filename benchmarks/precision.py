"""Whether a model learns as well with products of 16 bits: curves of three seeds in both, and time.

    python benchmarks/precision.py TEXT --json benchmarks/results/xeon-precision.json
    python benchmarks/precision.py TEXT --parts shakespeare --seeds 1           # a minute

TEXT is a file, such as Tiny Shakespeare, for the recipe shakespeare-char. The demo and the part
"long", a GPT-2 of 12 million parameters, read this Python's documentation. The precisions take
turns. A curve's difference is that of its mean over the seeds; the seeds alone show how far one run
is from another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from gpt2c.bench.report import provenance
from gpt2c.kernels.backend import as_precision, get_backend
from gpt2c.kernels.limits import usable_cores
from gpt2c.text.corpus import python_documentation
from gpt2c.text.documents import TextFiles
from gpt2c.text.prepare import prepare
from gpt2c.train.metrics import read_metrics
from gpt2c.train.plot import plot_runs
from gpt2c.train.pretrain import train
from gpt2c.train.settings import recipe_settings

LONG = {
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8, "max_iters": 1500,
    "learning_rate": 1e-3, "warmup_iters": 100, "schedule": "cosine", "min_lr": 1e-4, "beta2": 0.99,
    "eval_interval": 150, "eval_iters": 20,
}  # fmt: skip
RECIPES = {"demo": "demo", "shakespeare": "shakespeare-char"}
PRECISIONS = ("fp32", "bf16")

Curve = list[tuple[int, float]]


def part(name: str, data: Path, folder: Path, seeds: int) -> list[dict[str, Any]]:
    """Return a row for each run of a part."""
    given = dict(LONG) if name == "long" else recipe_settings(RECIPES[name], {})
    rows = []
    for seed in range(1, seeds + 1):
        for precision in PRECISIONS:
            settings = given | {"seed": seed, "precision": precision, "save_minutes": 1000.0}
            out = folder / f"{name} {precision}, seed {seed}"
            seconds = train(data, out, settings).seconds
            entries = read_metrics(out / "metrics.jsonl")
            curve = [(one["step"], one["val_loss"]) for one in entries if "val_loss" in one]
            row = {"part": name, "seed": seed, "precision": precision, "seconds": seconds}
            rows.append(row | {"curve": curve})
            print(f"{name} {seed} {precision}: {curve[-1][1]:.4f}, {seconds:.0f} s", flush=True)
    return rows


def mean_curve(rows: list[dict[str, Any]], name: str, precision: str) -> Curve:
    """Return the mean of the seeds' curves."""
    curves = [r["curve"] for r in rows if r["part"] == name and r["precision"] == precision]
    steps = [step for step, _ in curves[0]]
    return [(s, statistics.mean(c[i][1] for c in curves)) for i, s in enumerate(steps)]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the parts as Markdown."""
    lines = [
        "| part | validation loss fp32 / bf16, of each seed | means differ: most, at the end"
        " | seconds fp32 / bf16 | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["part"] for row in rows):
        own = {p: [r for r in rows if (r["part"], r["precision"]) == (name, p)] for p in PRECISIONS}
        pairs = zip(*own.values(), strict=True)
        losses = ", ".join(f"{a['curve'][-1][1]:.4f} / {b['curve'][-1][1]:.4f}" for a, b in pairs)
        means = [mean_curve(rows, name, precision) for precision in PRECISIONS]
        off = [b / a - 1 for (_, a), (_, b) in zip(*means, strict=True)]
        largest = max(off, key=abs)
        seconds = [statistics.median(row["seconds"] for row in own[p]) for p in PRECISIONS]
        lines.append(
            f"| {name} | {losses} | {largest:+.2%}, {off[-1]:+.2%} | {seconds[0]:.0f} /"
            f" {seconds[1]:.0f} | {seconds[1] / seconds[0]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--parts", nargs="+", default=[*RECIPES, "long"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    threads = usable_cores()
    machine = provenance(threads)
    print(machine, f"auto is {as_precision('auto', get_backend('auto', threads))}", sep="\n")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in given.parts:
            data = folder / f"{name}-data"
            if name == "shakespeare":
                with TextFiles([given.text]) as texts:
                    prepare(texts, data, "bytes")
            else:
                prepare(python_documentation(), data, "bpe:4096")
            rows += part(name, data, folder, given.seeds)
        if given.plot:
            runs = {
                path.parent.name: read_metrics(path)
                for path in sorted(folder.glob("*/metrics.jsonl"))
            }
            plot_runs(runs, given.plot)
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
