"""Distillation on little data, and pruning with healing, from a run of gpt2c demo.

    gpt2c demo                                                # the teacher, 1.7 million parameters
    python benchmarks/distillation.py runs/demo/run runs/demo/data    # about 10 minutes

A student of one layer and half the channels learns a twentieth of the teacher's text, by
cross-entropy alone and with the teacher's probabilities, from the same first weights and by the
same batches. Seconds are those of the steps; the teacher's forward pass is in them. Then the
teacher itself is pruned in several ways, and each result is healed by a short distillation.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import gpt2c
from gpt2c.bench.report import provenance
from gpt2c.finetune import distill, prune, sft
from gpt2c.finetune.distill import DistillSettings, student_config
from gpt2c.kernels.limits import usable_cores
from gpt2c.text.shards import read_shards, write_tokens
from gpt2c.train.metrics import read_metrics
from gpt2c.train.settings import recipe_settings

VALIDATION = 20_000  # tokens
WAYS: dict[str, dict[str, Any]] = {
    "1 of 2 layers": {"layers": 1},
    "half of the inner neurons": {"mlp": 0.5},
    "half of the weights 0, by Wanda": {"sparsity": 0.5},
    "half of the weights 0, by magnitude": {"sparsity": 0.5, "method": "magnitude"},
    "2 of 4 weights 0, by Wanda": {"mask_structure": "2:4"},
}


def part(data: Path, out: Path, share: float) -> Path:
    """Write a share of the training tokens, and some of the validation's."""
    out.mkdir()
    (train,), (val,) = read_shards(data, "train"), read_shards(data, "val")
    write_tokens(out / "train.bin", train[: round(share * len(train))])
    write_tokens(out / "val.bin", val[:VALIDATION])
    return out


def evaluations(run: Path) -> list[tuple[int, float, float]]:
    """Return (step, seconds of all steps, validation loss) of each evaluation."""
    return [
        (entry["step"], entry["elapsed_seconds"], entry["val_loss"])
        for entry in read_metrics(run / "metrics.jsonl")
        if "val_loss" in entry
    ]


def students(teacher: Path, data: Path, work: Path, steps: int, share: float) -> dict[str, Any]:
    """Train students on little data, and print a table."""
    little = part(data, work / "little", share)
    model = gpt2c.from_pretrained(teacher)
    given = recipe_settings("distill-little", {"max_iters": steps}, DistillSettings)
    sizes = [given.pop(name) for name in ("n_layer", "n_head", "n_embd")]
    most = given.pop("kd_ratio")
    config = student_config(model.config, *sizes)
    gpt2c.GPT2(config, seed=1).save_pretrained(work / "student")
    gpt2c.Tokenizer.from_pretrained(teacher).save_pretrained(work / "student")
    curves = {}
    sft(work / "student", little, work / "ce", **given)
    curves["cross-entropy"] = evaluations(work / "ce")
    for ratio in (0.5, most):
        run = work / f"kd {ratio}"
        distill(teacher, little, run, student=work / "student", kd_ratio=ratio, **given)
        curves[f"teacher's share {ratio}"] = evaluations(run)
    limit = curves["cross-entropy"][-1][1]
    tokens = len(read_shards(little, "train")[0])
    print(
        f"\n{config.num_parameters():,} parameters learn {tokens:,} tokens, {steps} steps; the"
        f" teacher has {model.config.num_parameters():,}\n"
    )
    print("| student | seconds | loss | lowest loss | at its step | lowest in equal seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, found in curves.items():
        best = min(found, key=lambda one: one[2])
        in_time = min((loss for _, seconds, loss in found if seconds <= limit), default=math.nan)
        _, seconds, loss = found[-1]
        print(
            f"| {name} | {seconds:.0f} | {loss:.3f} | {best[2]:.3f} | {best[0]} | {in_time:.3f} |"
        )
    return {"tokens": tokens, "parameters": config.num_parameters(), "curves": curves}


def pruned(teacher: Path, data: Path, work: Path, steps: int) -> dict[str, Any]:
    """Prune the teacher in several ways and heal it, and print a table."""
    rows = {}
    whole = part(data, work / "whole", 1.0)
    print(
        f"\nhealed: {steps} steps of distillation, the unpruned model as the teacher\n\n"
        "| pruned | parameters | speed | loss | healed |\n|---|---:|---:|---:|---:|"
    )
    for name, way in WAYS.items():
        out, healed = work / f"pruned {name}", work / f"healed {name}"
        result = prune(teacher, whole, out, **way)
        heal = distill(
            *(teacher, whole, healed),
            student=out,
            keep_zeros=result.after["zeros"] > 0.1,
            max_iters=steps,
            eval_interval=steps,
            log_interval=steps,
        )
        if way == {"layers": 1}:
            row = result.before
            print(f"| nothing | {row['parameters']:,} | 1 | {row['val_loss']:.3f} | |")
        row = result.after
        rows[name] = {"before": result.before, "after": row, "healed": heal.after}
        speed = row["tokens_per_second"] / result.before["tokens_per_second"]
        print(
            f"| {name} | {row['parameters']:,} | {speed:.2f} |"
            f" {row['val_loss']:.3f} | {heal.after['val_loss']:.3f} |"
        )
    return rows


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description="distillation on little data, and pruning")
    parser.add_argument("teacher", type=Path, help="a run of gpt2c demo")
    parser.add_argument("data", type=Path, help="its data")
    parser.add_argument("--steps", type=int, default=600, help="of each student")
    parser.add_argument("--heal-steps", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.05, help="of the teacher's text")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        given = options.teacher, options.data, Path(work)
        record = {"date": date.today().isoformat(), "machine": provenance(usable_cores())}
        record["students"] = students(*given, options.steps, options.share)
        record["pruned"] = pruned(*given, options.heal_steps)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
