"""Log-probabilities of completions and their gradients, against the model's own loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpt2c import GPT2, GPT2Config
from gpt2c.finetune.completions import learn_completions, lengths_of, log_probabilities
from gpt2c.text.examples import Example

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=24)


def example(rng: Any, length: int, start: int) -> Example:
    ids = rng.integers(0, 61, length).astype(np.int32)
    return Example(ids, np.arange(length) >= start, "")


@pytest.mark.parametrize("lengths", [(9, 24, 2, 13), (8, 8)], ids=["ragged", "equal"])
def test_completions_are_sums_of_losses(rng: Any, lengths: tuple[int, ...]) -> None:
    model = GPT2(CONFIG)
    examples = [example(rng, length, length // 2) for length in lengths]
    found = log_probabilities(model, examples)
    assert lengths_of(examples).tolist() == [length - length // 2 for length in lengths]
    for one, value in zip(examples, found, strict=True):
        logits = model(one.ids[None, :-1])[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = logs[np.arange(len(one.ids) - 1), one.ids[1:]][one.learned[1:]]
        assert value == pytest.approx(own.sum(), rel=1e-5)  # float32 logits


def test_gradients_are_those_of_weighted_losses(rng: Any) -> None:
    """sum(slopes * log-probabilities), each alone by `loss`, whose mean is over its targets."""
    model, slopes = GPT2(CONFIG), np.array([0.7, -2.0, 0.0, 1.3])
    examples = [example(rng, length, length // 3) for length in (9, 24, 5, 13)]
    model.zero_grad()
    for one, slope, n in zip(examples, slopes, lengths_of(examples), strict=True):
        model.loss(one.ids[None, :-1], one.targets[None])
        model.backward(scale=-slope * n)
    expected = model.flat_gradients.copy()
    model.zero_grad()
    log_probabilities(model, examples)
    learn_completions(model, examples, slopes)
    error = np.abs(model.flat_gradients - expected).max() / np.abs(expected).max()
    assert error < 2e-6  # sums of float32 in another order
