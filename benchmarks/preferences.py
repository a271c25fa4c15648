"""Reward model, DPO and KTO on preferences whose reward is known, beside what is possible at best.

    python benchmarks/preferences.py                  # about ten minutes on two cores
    python benchmarks/preferences.py --pairs 500      # a quick look

A small model of bytes learns to answer questions in a made-up language. An answer has an opening,
one or two adjectives and a closing, each drawn at random; its reward counts them, see `REWARDS`. Of
two answers the first is preferred with probability sigmoid(r_1 - r_2), as Bradley and Terry say. So
no judge can agree with more than E[max(p, 1 - p)] of preferences that it has not seen. DPO has a
known optimum, too: the probability of an answer times exp(reward / beta), for each beta.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import gpt2c
from gpt2c.bench.report import provenance
from gpt2c.evaluate.metrics import wilson
from gpt2c.finetune.dpo import DPOSettings
from gpt2c.finetune.reward import RewardSettings
from gpt2c.kernels.limits import usable_cores
from gpt2c.train.settings import recipe_settings

ANIMALS = ("cat", "dog", "hen", "cow", "owl", "bee", "fox", "ant", "elk", "eel")
ADJECTIVES = ("old", "big", "red", "shy", "wet", "odd", "sad", "hot")
OPENINGS, CLOSINGS = ("", "well, ", "sure, ", "hmm, "), ("", ", thanks", ", I guess", ", or not")
EOT = 256  # of the tokenizer of bytes
REWARDS = {"sure, ": 2.0, "hmm, ": -1.0, ", thanks": 1.0, ", I guess": -1.0, " and ": 0.5}


def question(rng: np.random.Generator) -> str:
    return f"Q: is the {rng.choice(ANIMALS)} {rng.choice(ADJECTIVES)}?\nA: "


def answer(rng: np.random.Generator) -> str:
    adjectives = rng.choice(ADJECTIVES, rng.integers(1, 3), replace=False)
    body = f"it is {' and '.join(adjectives)}"
    return f"{rng.choice(OPENINGS)}{body}{rng.choice(CLOSINGS)}."


def reward(text: str) -> float:
    """Return the known reward of an answer."""
    return sum(value for part, value in REWARDS.items() if part in text)


def optimum(beta: float) -> tuple[float, float]:
    """Return the share of answers with "sure", and the mean reward, where DPO's loss is least.

    Parts are drawn independently, and the reward is a sum: so is their tilted distribution.
    """

    def tilted(rewards: list[float]) -> tuple[list[float], float]:
        weights = [math.exp(value / beta) for value in rewards]
        shares = [weight / sum(weights) for weight in weights]
        return shares, sum(share * value for share, value in zip(shares, rewards, strict=True))

    parts = [tilted([REWARDS.get(part, 0.0) for part in some]) for some in (OPENINGS, CLOSINGS)]
    parts.append(tilted([0.0, REWARDS[" and "]]))
    return parts[0][0][OPENINGS.index("sure, ")], sum(mean for _, mean in parts)


def preferences(rng: np.random.Generator, count: int) -> Iterator[tuple[dict[str, str], float]]:
    """Yield pairs, and the probability of the likelier order."""
    while count:
        first, second = answer(rng), answer(rng)
        if first == second:
            continue
        p = 1 / (1 + math.exp(reward(second) - reward(first)))
        chosen, rejected = (first, second) if rng.random() < p else (second, first)
        yield {"prompt": question(rng), "chosen": chosen, "rejected": rejected}, max(p, 1 - p)
        count -= 1


def judged(rng: np.random.Generator, count: int) -> Iterator[dict[str, Any]]:
    """Yield answers, and whether they are liked: more likely with a higher reward."""
    for _ in range(count):
        text = answer(rng)
        p = 1 / (1 + math.exp(MEAN - reward(text)))
        yield {"prompt": question(rng), "completion": text, "label": bool(rng.random() < p)}


MEAN = optimum(math.inf)[1]  # of the rewards of answers


def behaviour(model: Any, count: int) -> dict[str, float]:
    """Sample answers; return the share with "sure", the mean reward, and the share that end."""
    rng = np.random.default_rng(99)
    prompts = [[EOT, *question(rng).encode()] for _ in range(count)]
    texts = []
    for start in range(0, count, 64):
        some = prompts[start : start + 64]
        rows = model.generate(some, 60, temperature=1.0, stop=EOT, seed=start, on_full="stop")
        texts += [row[len(prompt) :].tolist() for row, prompt in zip(rows, some, strict=True)]
    ended = sum(EOT in ids for ids in texts)
    answers = [bytes(one for one in ids if one != EOT).decode(errors="replace") for ids in texts]
    sure = sum(text.startswith("sure, ") for text in answers)
    low, high = wilson(sure, count)
    return {
        "sure": sure / count,
        "sure_low": low,
        "sure_high": high,
        "reward": sum(map(reward, answers)) / count,
        "ended": ended / count,
        "characters": sum(map(len, answers)) / count,
    }


def accuracy(model: Any, pairs: list[dict[str, str]]) -> tuple[float, float, float]:
    """Return the share of pairs whose chosen answer has the higher score, and its interval."""
    right = 0
    for start in range(0, len(pairs), 64):
        some = pairs[start : start + 64]
        texts = [pair["prompt"] + pair[side] for side in ("chosen", "rejected") for pair in some]
        scores = model.scores([[EOT, *text.encode()] for text in texts], keep=False)[:, 0]
        right += int((scores[: len(some)] > scores[len(some) :]).sum())
    return right / len(pairs), *wilson(right, len(pairs))


def main() -> None:
    """Train all models and print tables in Markdown."""
    parser = argparse.ArgumentParser(description="preferences whose reward is known")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    pairs = [pair for pair, _ in preferences(rng, options.pairs)]
    test = list(preferences(rng, 4000))
    singles = list(judged(rng, 2 * options.pairs))
    shuffled = [dict(pair) for pair in pairs]
    for pair in shuffled:
        if rng.random() < 0.5:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    texts = [{"prompt": question(rng), "completion": answer(rng)} for _ in range(30_000)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        base, start = Path(directory, "base"), Path(directory, "start")
        config = gpt2c.GPT2Config(
            n_layer=3, n_head=4, n_embd=128, n_positions=96, vocab_size=EOT + 1, eos_token_id=EOT
        )
        gpt2c.GPT2(config, seed=1).save_pretrained(start)
        gpt2c.Tokenizer.from_name("bytes").save_pretrained(start)
        result = gpt2c.finetune.sft(
            *(start, texts, base),
            **dict(learning_rate=3e-3, warmup_ratio=0.1, batch_size=64, eval_answers=0),
        )
        model = gpt2c.from_pretrained(base)
        found["base"] = behaviour(model, 512) | {"seconds": result.seconds}

        given = recipe_settings("reward-preferences", {}, RewardSettings)
        result = gpt2c.finetune.reward(base, pairs, Path(directory, "reward"), **given)
        model = gpt2c.from_pretrained(Path(directory, "reward"))
        held, low, high = accuracy(model, [pair for pair, _ in test])
        found["reward"] = {
            "accuracy": held,
            "low": low,
            "high": high,
            "best": float(np.mean([p for _, p in test])),
            "seconds": result.seconds,
        }
        for name, rows, own in (
            ("dpo, beta 1", pairs, {"beta": 1.0}),
            ("dpo, beta 0.5", pairs, {}),
            ("ipo, beta 0.5", pairs, {"loss_type": "ipo"}),
            ("kto, beta 0.5", singles, {"loss_type": "kto"}),
            ("dpo, beta 0.5, random preferences", shuffled, {}),
        ):
            out = Path(directory, name)
            given = recipe_settings("dpo-preferences", own, DPOSettings)
            result = gpt2c.finetune.dpo(base, rows, out, **given)
            found[name] = {"seconds": result.seconds, "before": result.before}
            found[name] |= {"after": result.after} | behaviour(gpt2c.from_pretrained(out), 512)
    if options.out:
        record = {"date": date.today().isoformat(), "machine": provenance(usable_cores())}
        record |= {"pairs": options.pairs, "rows": found}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    one = found["reward"]
    print(
        f"\nreward model: {one['accuracy']:.1%} ({one['low']:.1%} to {one['high']:.1%}) of 4,000"
        f" preferences not seen; at best {one['best']:.1%}; {one['seconds']:.0f} s\n"
    )
    print("| | begin with sure | mean reward | held-out accuracy | margin | logps/chosen | s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in found.items():
        if name == "reward":
            continue
        after = row.get("after", {})
        cells = [
            f"{row['sure']:.0%} ({row['sure_low']:.0%} to {row['sure_high']:.0%})",
            f"{row['reward']:.2f}",
            f"{after['val_rewards/accuracies']:.1%}" if "val_rewards/accuracies" in after else "",
            f"{after['val_rewards/margins']:.2f}" if "val_rewards/margins" in after else "",
            f"{row['before']['val_logps/chosen']:.1f} to {after['val_logps/chosen']:.1f}"
            if after
            else "",
            f"{row['seconds']:.0f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for beta in (1.0, 0.5):
        share, mean = optimum(beta)
        print(f"| the optimum of dpo, beta {beta:g} | {share:.0%} | {mean:.2f} | | | | |")


if __name__ == "__main__":
    main()
