"""Dropout in a model: the same masks under recompute, in parts of a batch, and in every run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS

from gpt2c import GPT2, Dropout, GPT2Config
from gpt2c.kernels.backend import get_backend
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.plan import KEPT

ODD = GPT2Config(vocab_size=61, n_positions=70, n_embd=34, n_layer=3, n_head=2, n_inner=51)
LLAMA = LlamaConfig(61, 30, 71, 2, 6, 2, 10, 70)
BOTH = pytest.mark.parametrize("config", [ODD, LLAMA], ids=["GPT-2", "Llama"])
DROPOUT = Dropout(0.2, seed=2**64 - 9)


def ids(rng: np.random.Generator, B: int = 3, T: int = 66) -> Any:
    return rng.integers(0, 61, (2, B, T))


def solve(model: Model, idx: Any, targets: Any, dropout: Dropout | None) -> tuple[float, Any]:
    """Return the loss and fresh gradients."""
    model.zero_grad()
    loss = model.loss(idx, targets, dropout=dropout)
    model.backward()
    return loss, model.flat_gradients.copy()


@BOTH
def test_seed_decides_the_masks(config: Any, backend: Any, rng: np.random.Generator) -> None:
    model, batch = Model(config, backend=backend), ids(rng)
    without, one = solve(model, *batch, None), solve(model, *batch, DROPOUT)
    others = [DROPOUT._replace(seed=1), DROPOUT._replace(first=1), DROPOUT._replace(rate=0.1), None]
    for other in others:
        loss, gradients = solve(model, *batch, other)
        assert loss != one[0] and not np.array_equal(gradients, one[1])
    again = solve(model, *batch, DROPOUT)
    assert one[0] == again[0] and np.array_equal(one[1], again[1])
    none, zero = solve(model, *batch, None), solve(model, *batch, Dropout(0.0, 5))
    assert without[0] == none[0] == zero[0]
    assert np.array_equal(without[1], none[1]) and np.array_equal(without[1], zero[1])


@TWO_BACKENDS
@BOTH
@pytest.mark.parametrize("recompute", ["light", "full"])
def test_recompute_has_the_same_masks(
    config: Any, recompute: str, backend: Any, rng: np.random.Generator
) -> None:
    batch = ids(rng)
    loss, gradients = solve(Model(config, backend=backend), *batch, DROPOUT)
    same = solve(Model(config, backend=backend, recompute=recompute), *batch, DROPOUT)
    assert loss == same[0] and np.array_equal(gradients, same[1])


@TWO_BACKENDS
@BOTH
@pytest.mark.parametrize("lengths", [(20,) * 8, (3, 70, 1, 17)], ids=["rows", "ragged"])
def test_parts_of_a_batch_have_its_masks(
    config: Any, lengths: tuple[int, ...], backend: Any, rng: np.random.Generator
) -> None:
    """Its sequences one by one, each told which token of the step is its first."""
    model = Model(config, backend=backend)
    idx = [rng.integers(0, 61, length) for length in lengths]
    targets = [rng.integers(0, 61, length) for length in lengths]
    targets[1][::3] = -1
    loss, expected = solve(model, idx, targets, DROPOUT)
    model.zero_grad()
    sum_of_losses, first, count = 0.0, 0, sum(int((wanted >= 0).sum()) for wanted in targets)
    for row, wanted in zip(idx, targets, strict=True):
        own = DROPOUT._replace(first=first)
        sum_of_losses += model.loss([row], [wanted], count=count, dropout=own)
        model.backward()
        first += len(row)
    assert sum_of_losses == pytest.approx(loss, rel=1e-6)
    assert np.abs(model.flat_gradients - expected).max() <= 1e-6 * np.abs(expected).max()


def test_losses_have_the_masks_of_loss(backend: Any, rng: np.random.Generator) -> None:
    model, (idx, targets) = GPT2(ODD, backend=backend), ids(rng)
    loss, expected = solve(model, idx, targets, DROPOUT)
    assert model.loss(idx, targets, keep=False, dropout=DROPOUT) == loss
    model.zero_grad()
    losses = model.losses(idx, targets, dropout=DROPOUT)
    model.backward(scale=1 / idx.size)
    assert isinstance(losses, np.ndarray) and losses.mean() == pytest.approx(loss, rel=1e-6)
    assert np.abs(model.flat_gradients - expected).max() <= 1e-6 * np.abs(expected).max()


def test_reading_has_no_dropout(backend: Any, rng: np.random.Generator) -> None:
    """Neither between a loss and its backward, nor after; and it does not change the masks."""
    model, (idx, targets) = GPT2(ODD, backend=backend), ids(rng)
    _, expected = solve(model, idx, targets, DROPOUT)

    def readings() -> list[Any]:
        texts = model.generate(idx[:, :9], 3, temperature=0)
        return [texts, model.logprobs(idx), np.array(model.mean_loss(idx, targets))]

    before, logits = readings(), model(idx)
    model.zero_grad()
    model.loss(idx, targets, dropout=DROPOUT)
    for a, b in zip(before, readings(), strict=True):
        assert np.array_equal(a, b)
    model.backward()
    assert np.array_equal(model.flat_gradients, expected)
    assert np.array_equal(model(idx), logits)


@pytest.mark.parametrize("recompute", KEPT)
@pytest.mark.parametrize(
    "patterns", [("wte.*", "wpe.*", "h.0.*"), ("*.c_attn.*", "h.2.*"), ("*.bias",)], ids="-".join
)
def test_frozen_parameters_change_no_bit_of_the_others_gradients(
    patterns: tuple[str, ...], recompute: str | None, rng: np.random.Generator
) -> None:
    model, batch = GPT2(ODD, recompute=recompute), ids(rng)
    solve(model, *batch, DROPOUT)
    expected = {name: array.copy() for name, array in model.gradients.items()}
    model.freeze(*patterns)
    solve(model, *batch, DROPOUT)
    assert 0 < len(model.gradients) < len(expected)
    for name, gradient in model.gradients.items():
        assert np.array_equal(gradient, expected[name]), name


def test_each_place_of_a_deep_model_has_masks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    L, places = 150, []
    backend = get_backend("numpy")
    for name in ("attention_forward", "dropout_forward"):
        op = getattr(backend, name)

        def watched(*arguments: Any, op: Any = op) -> None:
            places.append([number for number in arguments if isinstance(number, int)][-1])
            op(*arguments)

        monkeypatch.setattr(backend, name, watched, raising=False)
    model = GPT2(GPT2Config(5, 4, n_embd=2, n_layer=L, n_head=1), backend=backend)
    model.loss([[1, 2]], [[2, 3]], dropout=Dropout(0.1, 1, first=7))
    assert len(places) == 1 + 3 * L == len({place >> 32 for place in places})
    assert {place % 2**32 for place in places} == {7}


@pytest.mark.parametrize(
    ("dropout", "wanted"),
    [
        (0.1, "dropout must be a gpt2c.Dropout, got 0.1"),
        (Dropout(1.0, 1), "dropout's rate must be in [0, 1), got 1.0"),
        (Dropout(-0.1, 1), "dropout's rate must be in [0, 1), got -0.1"),
        (Dropout(float("nan"), 1), "dropout's rate must be in [0, 1), got nan"),
        (Dropout("0.1", 1), "dropout's rate must be a number, got '0.1'"),  # type: ignore[arg-type]
        (Dropout(0.1, -1), "dropout's seed must be in [0, 2^64), got -1"),
        (Dropout(0.1, 2**64), "dropout's seed must be in [0, 2^64), got 18446744073709551616"),
        (Dropout(0.1, 0.5), "dropout's seed must be a whole number, got 0.5"),  # type: ignore[arg-type]
        (Dropout(0.1, 1, -1), "dropout's first must be in [0, 2^32 - N] with N=2 tokens, got -1"),
        (
            Dropout(0.1, 1, 2**32 - 1),
            "dropout's first must be in [0, 2^32 - N] with N=2 tokens, got 4294967295",
        ),
    ],
)
def test_model_refuses_dropout_out_of_range(dropout: Any, wanted: str) -> None:
    model = GPT2(ODD)
    for door in (model.loss, model.losses):
        assert refused(door, [[1, 2]], [[2, 3]], dropout=dropout) == wanted
    model.loss([[1, 2]], [[2, 3]], dropout=Dropout(0.1, 1, 2**32 - 2))
    scorer = GPT2(dataclasses.replace(ODD, num_labels=2))
    assert refused(scorer.scores, [[1, 2]], dropout=dropout) == wanted


def test_scores_have_the_dropout_of_their_step() -> None:
    model, idx = GPT2(dataclasses.replace(ODD, num_labels=2)), [[1, 2, 3], [4, 5]]
    first, again, other = (model.scores(idx, dropout=Dropout(0.5, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first, model.scores(idx))
