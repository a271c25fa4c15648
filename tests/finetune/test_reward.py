"""Reward models: the rewards that pairs teach, equivalences, runs that go on, and bad input."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.tuning import losses, resumes_to_the_bit

import gpt2c
from gpt2c.finetune import reward
from gpt2c.finetune.pairs import Unit
from gpt2c.finetune.reward import Scores

QUICK: dict[str, Any] = {
    "learning_rate": 3e-3, "max_iters": 8, "eval_interval": 4, "batch_size": 6, "backend": "base",
}  # fmt: skip


def more_of_a(count: int, seed: int = 1, noise: float = 0.0) -> list[dict[str, str]]:
    """Return pairs of words of equal length: the one with more a is chosen, or by chance."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        pair = ["".join(rng.choice("ab") for _ in range(6)) for _ in range(2)]
        chosen, rejected = sorted(pair, key=lambda word: -word.count("a"))
        if chosen.count("a") == rejected.count("a"):
            continue
        if rng.random() < noise:
            chosen, rejected = rejected, chosen
        prompt = "".join(rng.choice("cde") for _ in range(rng.randint(2, 6)))
        rows.append({"prompt": f"{prompt}?", "chosen": chosen, "rejected": rejected})
    return rows


def test_rewards_are_learned(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = QUICK | {"max_iters": 80, "eval_interval": 80, "batch_size": 16, "val_fraction": 0.2}
    result = reward(base, more_of_a(200), out, **given)
    assert result.before["val_loss"] == pytest.approx(math.log(2), abs=0.1)
    assert result.after["val_accuracy"] > 0.9
    model = gpt2c.from_pretrained(out)
    rewards = model.scores([list(b"cd?" + word) for word in (b"aaaaaa", b"aabbab", b"bbbbbb")])
    assert rewards[0] > rewards[1] > rewards[2]
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["pad_token_id"] == 256
    again = reward(out, more_of_a(40), tmp_path / "again", **QUICK | {"max_iters": 1})
    assert again.before["val_accuracy"] > 0.8  # its head is the trained one


def test_random_preferences_teach_nothing(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 20, "eval_interval": 20, "val_fraction": 0.6}
    after = reward(base, more_of_a(260, noise=0.5), tmp_path / "run", **given).after
    assert after["val_accuracy/low"] < 0.5 < after["val_accuracy/high"]
    assert after["val_accuracy/high"] - after["val_accuracy/low"] < 0.17


def test_centring_pulls_rewards_to_0(base: Path, tmp_path: Path) -> None:
    means = []
    rows = [row | {"number": number} for number, row in enumerate(more_of_a(60))]
    for weight in (0.0, 1.0):
        given = QUICK | {"center_rewards_coefficient": weight, "max_iters": 30}
        given |= {"group_field": "number"}  # a prompt that comes twice moves no split
        after = reward(base, rows, tmp_path / str(weight), **given).after
        means.append(abs(after["val_mean_reward"]))
    assert means[1] < 0.1 < means[0]


def test_figures_of_rewards() -> None:
    units = [Unit(()), Unit((), margin=2.0)]
    judged = Scores(0.1)(units, np.array([[1.0, -1.0], [-2.0, 0.5]]))
    assert judged.losses == pytest.approx(
        [math.log1p(math.exp(-3)) + 0.1, math.log1p(math.exp(3.5)) + 0.1 * 0.25]
    )
    found = {name: row.tolist() for name, row in judged.figures.items()}
    assert found == {
        "accuracy": [1.0, 0.0],
        "margin": [3.0, -1.5],
        "min_reward": [-2.0, -1.0],
        "mean_reward": [-0.5, -0.25],
        "max_reward": [1.0, 0.5],
    }


def test_division_of_a_step_changes_rounding_alone(base: Path, tmp_path: Path) -> None:
    found = {}
    for most in (1, 60, 4096):  # each pair alone, a few, all of a step together
        out = tmp_path / str(most)
        reward(base, more_of_a(30), out, batch_tokens=most, **QUICK)
        found[most] = losses(out)
    for most in (1, 60):
        for one, other in zip(found[most], found[4096], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_killed_run_goes_on_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        given = {} if resume else QUICK | others
        return reward(base, more_of_a(30), out, resume=resume, **given)

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, 5)


def test_longer_answers_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{n}", "chosen": "long", "rejected": "no"} for n in range(8)]
    rows += [{"prompt": f"{n}", "chosen": "no", "rejected": "long"} for n in range(2)]
    rows += [{"prompt": f"{n}", "chosen": "ab", "rejected": "cd"} for n in range(3)]
    reward(base, rows, tmp_path / "run", **QUICK | {"max_iters": 1})
    shown = capsys.readouterr().out
    assert "answers have 3.2 tokens in the mean if chosen, 2.3 if rejected; of 10 pairs" in shown
    assert "of different lengths, the longer is chosen in 80.0% (49.0% to 94.3%)" in shown


def test_all_tokens_are_read_and_no_end_of_text(base: Path, tmp_path: Path) -> None:
    """An answer that fills the context: its last token decides."""
    rows = [{"prompt": "", "chosen": "x" * 47, "rejected": "x" * 46 + "y"}]
    given = QUICK | {"val_fraction": 0.0, "max_iters": 1, "batch_size": 1}
    result = reward(base, rows, tmp_path / "run", **given)
    assert result.before["val_margin"] != 0
    longer = [row | {"chosen": "x" * 48, "rejected": "x" * 47 + "y"} for row in rows]
    assert "1 whose answers are equal up to where they are cut" in refused(
        lambda: reward(base, longer, tmp_path / "longer", **given)
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"prompt": "a", "chosen": "b", "rejected": "b"}],
            "example 1: chosen and rejected are eq",
        ),
        ([{"prompt": "a", "completion": "b"}], "wanted are chosen and rejected"),
    ],
)
def test_bad_input_is_refused(base: Path, tmp_path: Path, rows: Any, said: str) -> None:
    assert said in refused(reward, base, rows, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_classifier_is_no_base(tmp_path: Path) -> None:
    config = gpt2c.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=48, vocab_size=257, num_labels=3
    )
    gpt2c.GPT2(config).save_pretrained(tmp_path / "base")
    gpt2c.Tokenizer.from_name("bytes").save_pretrained(tmp_path / "base")
    said = "the base has 3 scores, and a reward is one"
    assert said in refused(reward, tmp_path / "base", more_of_a(4), tmp_path / "run")
    assert not (tmp_path / "run").exists()
