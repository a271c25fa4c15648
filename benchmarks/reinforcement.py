"""Reinforcement learning beside its alternatives and controls: a picture, and the JSON behind it.

    python benchmarks/reinforcement.py --out runs/rl --picture benchmarks/results/grpo-sort.png

For each seed a beginner (gpt2c/finetune/beginner.py) is trained further in five ways: by GRPO, by
rejection fine-tuning, by further examples of its careless teacher, four for each of GRPO's prompts,
and, as controls, by GRPO with random and with negated rewards. Runs that are there already are
read, so it can be stopped and begun again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c import from_pretrained
from gpt2c.bench.report import provenance
from gpt2c.finetune import grpo, sft
from gpt2c.finetune.beginner import CARELESS, SFT, beginner, careless_examples
from gpt2c.finetune.grpo import GRPOSettings
from gpt2c.finetune.rollouts import sample
from gpt2c.finetune.tasks import TASKS, examples, verify
from gpt2c.kernels.limits import usable_cores
from gpt2c.screen.picture import drawing, make_figure, write
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.metrics import read_metrics
from gpt2c.train.settings import recipe_settings

SETTINGS = recipe_settings("grpo", {}, GRPOSettings)
FIGURES = {
    "pass@1": "right if drawn at temperature 1",
    "greedy": "right if the likeliest token is taken",
    "pass@16": "one of 16 that are drawn is right",
    "entropy": "entropy, nats per token",
}
GRPO: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "rejection fine-tuning": {"algorithm": "rft", "beta": 0.0},
    "control: random reward": {},
    "control: negated reward": {},
}
MORE_SFT = "more examples (SFT)"
COLOURS = {
    **{"GRPO": "C0", "rejection fine-tuning": "C2", "control: random reward": "0.6"},
    **{"control: negated reward": "C3", MORE_SFT: "C1"},
}


def random_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return 0 or 1 by a number made of the ids: the same in each run, and no use."""
    rng = np.random.default_rng([len(completion_ids), *map(sum, completion_ids)])
    return rng.integers(0, 2, len(completion_ids)).astype(float).tolist()


def negated_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [-reward for reward in verify(completions, answer)]


# Of controls: they need functions, and cannot pass by them.
REWARDS: dict[str, Callable[..., list[float]]] = {
    "control: random reward": random_reward,
    "control: negated reward": negated_reward,
}


def curve(model: Path, task: str) -> dict[str, float]:
    """Return the figures of a model on held-out problems."""
    prompts = [(one["prompt"], one["answer"]) for one in examples(task, "val", 128, 0)]
    tokenizer, policy = Tokenizer.from_pretrained(model), from_pretrained(model)
    found = {}
    for count, temperature in ((16, 1.0), (1, 0.0)):
        ids = [[tokenizer.eot, *tokenizer.encode(text)] for text, _ in prompts]
        drawn = sample(
            *(policy, ids, count, {tokenizer.eot}, SETTINGS["max_completion_length"]),
            *(temperature, (1337, 1)),
        )
        texts = [tokenizer.decode(one[one != tokenizer.eot].tolist()) for one in drawn.completions]
        right = [answer for _, answer in prompts for _ in range(count)]
        passed = np.array(verify(texts, right)).reshape(-1, count)
        if temperature:
            found["pass@1"], found["pass@16"] = float(passed.mean()), float(passed.max(1).mean())
            found["entropy"] = float(np.concatenate(drawn.entropies).mean())
        else:
            found["greedy"] = float(passed.mean())
    return found


def learned(name: str, task: str, base: Path, out: Path, seed: int) -> None:
    """Train a beginner in one of the ways, with all checkpoints of evaluations."""
    steps, interval = SETTINGS["max_iters"], SETTINGS["eval_interval"]
    shared = {"seed": seed, "save_interval": interval, "keep": steps // interval + 1}
    shared |= {"overwrite": True, "log_interval": steps}
    if name == MORE_SFT:
        given = SFT | {"learning_rate": SETTINGS["learning_rate"], "schedule": "linear"}
        given |= {"max_iters": steps, "eval_interval": steps, "eval_answers": 0}
        taught = careless_examples(task, steps * given["batch_size"], seed + 2)
        sft(base, taught, out, **given | shared)
    else:
        reward = [REWARDS[name]] if name in REWARDS else []
        given = SETTINGS | GRPO[name] | {"eval_interval": steps, "task": task}
        grpo(base, None, out, reward_funcs=reward, least_pass=0.0, **given | shared)


def measure(task: str, seeds: list[int], out: Path) -> dict[str, Any]:
    """Return the curves: name -> seed -> [(step, figures)], and the seconds of each run."""
    curves: dict[str, list[list[Any]]] = {name: [] for name in COLOURS}
    seconds: dict[str, list[float]] = {name: [] for name in COLOURS}
    for seed in seeds:
        home = out / f"{task}-{seed}"
        if not (home / "sft" / "result.json").exists() or not json.loads(
            (home / "sft" / "result.json").read_text()
        ).get("after"):
            beginner(task, home, seed, overwrite=True)
        start = curve(home / "sft", task)
        for name in COLOURS:
            run = home / "".join(c if c.isalnum() else "-" for c in name)
            if not (run / "curve.json").exists():
                learned(name, task, home / "sft", run, seed)
                points = [
                    [int(path.name), curve(path, task)]
                    for path in sorted((run / "checkpoints").iterdir())
                ]
                spent = read_metrics(run / "metrics.jsonl")[-1]["elapsed_seconds"]
                text = json.dumps({"points": points, "seconds": spent})
                (run / "curve.json").write_text(text)
            stored = json.loads((run / "curve.json").read_text())
            curves[name].append([[0, start], *stored["points"]])
            seconds[name].append(stored["seconds"])
            print(seed, name, start["pass@1"], curves[name][-1][-1], flush=True)
    return {"curves": curves, "seconds": seconds}


def draw(task: str, found: dict[str, Any], path: Path) -> None:
    with drawing():
        figure = make_figure((11, 7))
        panels = figure.subplots(2, 2, sharex=True).flatten()
        for axes, (figure_name, label) in zip(panels, FIGURES.items(), strict=True):
            for name, runs in found["curves"].items():
                steps = [step for step, _ in runs[0]]
                values = np.array([[point[figure_name] for _, point in run] for run in runs])
                colour = COLOURS[name]
                dashes = "--" if name.startswith("control") else "-"
                axes.plot(
                    steps, values.mean(axis=0), dashes, color=colour, label=f"{name} ({len(runs)})"
                )
                axes.fill_between(
                    steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0
                )
            axes.set_title(label, fontsize=10)
            axes.grid(alpha=0.3)
            if figure_name == "entropy":
                axes.set_ylim(0)
                continue
            axes.set_ylim(0, 1.02)
            if figure_name == "pass@1":
                axes.axhline(1 - CARELESS, color="k", lw=0.8, ls=":")
                axes.text(0, 1 - CARELESS, " the teacher", fontsize=8, va="bottom")
        panels[2].legend(fontsize=8, loc="lower center", ncol=2)
        for axes in panels[2:]:
            axes.set_xlabel("steps of 16 prompts x 16 completions, or of 64 examples")
        figure.suptitle(f"gpt2c grpo --task {task}: held-out problems, mean and range over seeds")
        write(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="sort", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/reinforcement"))
    parser.add_argument("--only", type=int, help="measure this seed alone, and draw nothing")
    parser.add_argument("--picture", type=Path, default=Path("runs/grpo.png"))
    options = parser.parse_args()
    seeds = [options.only] if options.only else [*range(1, options.seeds + 1)]
    found = measure(options.task, seeds, options.out)
    if options.only:
        return
    draw(options.task, found, options.picture)
    record = {
        **{"task": options.task, "settings": SETTINGS, "date": date.today().isoformat()},
        **{"machine": provenance(usable_cores()), "careless": CARELESS, **found},
    }
    options.picture.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
