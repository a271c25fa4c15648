"""What fine-tuning costs: adapters in memory, time and loss; ragged batches; rollouts.

    python benchmarks/finetuning.py --json runs/finetuning.json                   # some minutes
    python benchmarks/finetuning.py --base runs/demo/run --examples runs/answers.jsonl

GPT-2 124M with random weights, which cost what trained ones cost. Ways to train it take turns, each
in a process of its own, whose peak is its memory. Given a base and examples, such as those of
answers.py, the loss of adapters is compared with that of all weights, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gpt2c
from gpt2c.bench.report import provenance
from gpt2c.finetune import grpo, sft
from gpt2c.finetune.beginner import beginner
from gpt2c.finetune.grpo import GRPOSettings
from gpt2c.finetune.sft import SFTSettings
from gpt2c.kernels.limits import usable_cores
from gpt2c.train.metrics import read_metrics
from gpt2c.train.settings import recipe_settings

PARTS = ("adapters", "ragged", "rollouts", "losses")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "all weights": ("fp32", {}),
    "LoRA": ("fp32", {"lora": True}),
    "LoRA beside a base in fp16": ("fp16", {"lora": True, "quantize": "fp16"}),
    "LoRA beside a base in int8": ("int8", {"lora": True, "quantize": "int8"}),
}
TOKENS, ROUNDS = 512, 3


def seconds(call: Callable[[], object], count: int = 3) -> float:
    """Return the median time of a call, after one that is not counted."""
    call()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def step(way: str) -> None:
    """Print the seconds of a training step in one way, and the process's peak in MB."""
    weights, given = WAYS[way]
    config = gpt2c.GPT2Config()
    if given:
        config = dataclasses.replace(config, lora=gpt2c.LoRA())
    model = gpt2c.GPT2(config, seed=1, weights=weights)
    optimizer = gpt2c.AdamW(model)
    idx, targets = np.random.default_rng(0).integers(0, config.vocab_size, (2, 1, TOKENS))

    def once() -> None:
        model.zero_grad()
        model.loss(idx, targets)
        model.backward()
        optimizer.step(1e-5)

    spent = seconds(once)
    print(json.dumps([spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000]))


def adapters() -> dict[str, Any]:
    """Print a table of the ways' time and memory."""
    samples: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, found in samples.items():
            done = subprocess.run(
                [sys.executable, __file__, "--step", way], check=True, capture_output=True
            )
            found.append(json.loads(done.stdout))
    rows = {
        way: [statistics.median(one) for one in zip(*found, strict=True)]
        for way, found in samples.items()
    }
    first = rows["all weights"]
    print(f"| a step of 1 x {TOKENS} tokens | memory, MB | of all weights' | seconds | of theirs |")
    print("|---|---:|---:|---:|---:|")
    for way, (spent, peak) in rows.items():
        shares = peak / first[1], spent / first[0]
        print(f"| {way} | {peak:,.0f} | {shares[0]:.0%} | {spent:.2f} | {shares[1]:.2f} |")
    return {"tokens": TOKENS, "rows": rows, "samples": samples}


def ragged() -> dict[str, float]:
    """Time a step of texts of different lengths against one of as many tokens in equal rows."""
    model = gpt2c.GPT2(gpt2c.GPT2Config(), seed=1)
    rng = np.random.default_rng(0)
    lengths = [31, 200, 97, 256, 64, 140, 180, 56]
    flat = rng.integers(0, model.config.vocab_size, (2, sum(lengths)), np.int32)
    texts, following = (np.split(row, np.cumsum(lengths)[:-1]) for row in flat)
    answers = [
        np.where(np.arange(len(row)) < 2 * len(row) // 3, np.int32(-1), row) for row in following
    ]
    batches: dict[str, tuple[Any, Any]] = {
        "4 rows": tuple(flat.reshape(2, 4, -1)),
        f"{len(lengths)} texts": (texts, following),
        "the same, the last third of each learned": (texts, answers),
    }

    def learn(idx: Any, targets: Any) -> None:
        model.loss(idx, targets)
        model.backward()

    samples: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(ROUNDS):
        for name, given in batches.items():
            samples[name].append(seconds(partial(learn, *given)))
    rows = {name: statistics.median(found) for name, found in samples.items()}
    print(f"\n| loss and gradients of {sum(lengths):,} tokens | tokens/s | of equal rows' |")
    print("|---|---:|---:|")
    for name, spent in rows.items():
        print(f"| {name} | {sum(lengths) / spent:.0f} | {rows['4 rows'] / spent:.2f} |")
    return rows


def share_of_rollouts(work: Path) -> dict[str, float]:
    """Return the share of GRPO's steps that sampling takes: the recipe's, and one of 124M."""
    base = beginner("sort", work / "beginner")
    assert base
    gpt2c.GPT2(gpt2c.GPT2Config(), seed=1).save_pretrained(work / "gpt2")
    gpt2c.Tokenizer.from_name("bytes").save_pretrained(work / "gpt2")
    prompts = [{"prompt": f"Write the numbers from {n} to 100, one a line."} for n in range(16)]
    large = {"batch_size": 2, "num_generations": 8, "max_completion_length": 64, "max_iters": 3}

    def short(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(text)) for text in completions]

    unjudged = {"eval_interval": 40, "eval_prompts": 1, "least_pass": 0.0, "val_fraction": 0.0}
    recipe = recipe_settings("grpo", {"max_iters": 40, "task": "sort"}, GRPOSettings) | unjudged
    grpo(base, None, work / "the recipe's", **recipe)
    grpo(work / "gpt2", prompts, work / "124M's", reward_funcs=[short], **large | unjudged)
    rows = {}
    for name in ("the recipe's", "124M's"):
        entries = read_metrics(work / name / "metrics.jsonl")
        sampling = sum(entry["rollout_seconds"] for entry in entries)
        rows[name] = sampling / entries[-1]["elapsed_seconds"]
    return rows


def losses(base: Path, examples: Path, work: Path) -> dict[str, Any]:
    """Train in each way on examples, and print the validation losses."""
    rows = {}
    print("\n| | loss before | after | answers right | seconds |\n|---|---:|---:|---:|---:|")
    for way, (_, given) in WAYS.items():
        settings = recipe_settings("sft-answers", given, SFTSettings)
        if given:
            settings["learning_rate"] = 3e-3
        found = sft(base, examples, work / way, **settings)
        rows[way] = {
            "learning_rate": settings["learning_rate"],
            "curve": [
                [entry["step"], entry["val_loss"]]
                for entry in read_metrics(work / way / "metrics.jsonl")
                if "val_loss" in entry
            ],
            **{"before": found.before, "after": found.after, "seconds": found.seconds},
        }
    for way, row in rows.items():
        before, after = row["before"], row["after"]
        print(
            f"| {way} | {before['val_loss']:.3f} | {after['val_loss']:.3f} |"
            f" {after['val_exact_match']:.1%} | {row['seconds']:.0f} |"
        )
    return rows


def main() -> None:
    """Measure all, print tables in Markdown."""
    parser = argparse.ArgumentParser(description="what fine-tuning costs")
    parser.add_argument("--base", type=Path, help="a model, for losses")
    parser.add_argument("--examples", type=Path, help="what it learns")
    parser.add_argument("--json", type=Path, help="write the figures here, beside those of others")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these alone")
    parser.add_argument("--step", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.base is None) != (options.examples is None):
        parser.error("--base and --examples belong together")
    if options.only == ["losses"] and options.base is None:
        parser.error("losses are those of --base on --examples")
    if options.step:
        step(options.step)
        return
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for part in options.only:
            if part == "adapters":
                record[part] = adapters()
            elif part == "ragged":
                record[part] = ragged()
            elif part == "rollouts":
                record[part] = share_of_rollouts(Path(directory))
                for name, share in record[part].items():
                    print(f"rollouts' share of a step, {name}: {share:.0%}")
            elif options.base:
                record[part] = losses(options.base, options.examples, Path(directory))
    if options.json:
        before = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {}
        measured = dict.fromkeys(record, provenance(usable_cores()))  # with the date
        record = before | record | {"measured": before.get("measured", {}) | measured}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
