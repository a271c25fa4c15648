"""Runs of fine-tuning on a tiny base model, compared to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2c
from gpt2c.train import hooks
from gpt2c.train.metrics import read_metrics

TIMES = ("elapsed_seconds", "time", "tokens_per_second", "share_of_peak", "rollout_seconds")


def capitals(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return words and their capitals as prompts and completions, of different lengths."""
    rng = random.Random(seed)
    words = dict.fromkeys(
        "".join(rng.choice("abcde") for _ in range(rng.randint(2, 6))) for _ in range(2 * count)
    )
    return [{"prompt": f"{word}=", "completion": word.upper()} for word in list(words)[:count]]


def losses(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step without times."""
    return [
        {name: value for name, value in entry.items() if name not in TIMES}
        for entry in read_metrics(run / "metrics.jsonl")
    ]


def weights(run: Path) -> bytes:
    """Return the bits of a run's model."""
    return bytes(gpt2c.from_pretrained(run).flat_parameters.data)


class Killed(BaseException):
    """The process ends at once, as by kill -9."""


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """End the process after a step, before its hooks, and without a last save."""
    real = hooks.Show.__call__

    def show(self: hooks.Show, run: Any, step: hooks.Step) -> None:
        if run.step == steps:
            raise Killed
        real(self, run, step)

    monkeypatch.setattr(hooks.Show, "__call__", show)
    monkeypatch.setattr("gpt2c.train.loop._rescue", lambda *run: None)


def resumes_to_the_bit(
    tune: Callable[..., Any], whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Kill a run, go on, and compare it with the whole run; a save is made every 2 steps."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, at)
        tune(out, save_interval=2)
    result = tune(out, resume=True)
    done = tune(whole)
    assert weights(out) == weights(whole)
    assert losses(out) == losses(whole)
    assert result.before == done.before and result.after == done.after
    assert np.isfinite(list(done.after.values())).all()
