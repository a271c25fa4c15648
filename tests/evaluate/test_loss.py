"""The mean loss over windows: every token counts once, with the same weight."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2c.evaluate.loss import evaluate
from gpt2c.gpt2 import GPT2
from gpt2c.model.gpt2 import GPT2Config


def test_evaluate_counts_every_token_once(rng: np.random.Generator) -> None:
    model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    model.flat_parameters += 0.3 * rng.standard_normal(model.flat_parameters.size)
    tokens = rng.integers(0, 11, 61).astype(np.uint16)  # 60 targets: 7 windows of 8 and half of one
    losses = []
    for start in range(0, 60, 8):
        x, y = tokens[start : min(start + 8, 60)], tokens[start + 1 : start + 9]
        logits = model(x[None].astype(np.int32))[0].astype(np.float64)
        log_sum = np.log(np.exp(logits).sum(axis=1))
        losses += list(log_sum - logits[np.arange(len(y)), y])
    assert len(losses) == 60
    for batch_size in (1, 3, 100):
        assert evaluate(model, [tokens], batch_size, 8) == pytest.approx(np.mean(losses), rel=1e-5)
    assert evaluate(model, [tokens], 3, 8, eval_iters=2) == pytest.approx(
        np.mean(losses[:48]), rel=1e-5
    )
