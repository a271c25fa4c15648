"""Objectives: cross-entropy as one of them, and one of the caller's own, distillation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.exact import check_differences, exact, odd_model

from gpt2c import GPT2, GPT2Config
from gpt2c.kernels.backend import get_backend
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.objective import CrossEntropy, Objective, Rows

V = 61
ODD = GPT2Config(vocab_size=V, n_positions=33, n_embd=34, n_layer=2, n_head=2, n_inner=51)
LLAMA = LlamaConfig(V, 30, 71, 2, 6, 2, 10, 33)
BOTH = pytest.mark.parametrize("config", [ODD, LLAMA], ids=["GPT-2", "Llama"])
LENGTHS = (3, 33, 1, 17)
N = sum(LENGTHS)


class Distillation:
    """The divergence KL(teacher || student) of each live row, from the teacher's logits (N, V)."""

    def __init__(self, teacher: Any, live: Any) -> None:
        self.live = live
        self._teacher = teacher - np.log(np.exp(teacher).sum(-1, keepdims=True))

    def _student(self, logits: Any) -> Any:
        moved = logits - logits.max(-1, keepdims=True)
        return moved - np.log(np.exp(moved).sum(-1, keepdims=True))

    def losses(self, ops: Any, out: Any, logits: Any, rows: Rows) -> None:
        q = self._teacher[rows]
        out[...] = (np.exp(q) * (q - self._student(logits))).sum(-1) * self.live[rows]

    def learn(self, ops: Any, out: Any, logits: Any, rows: Rows, scale: float) -> None:
        self.losses(ops, out, logits, rows)
        logits[...] = scale * (np.exp(self._student(logits)) - np.exp(self._teacher[rows]))


def sequences(rng: np.random.Generator) -> list[Any]:
    return [rng.integers(0, V, length) for length in LENGTHS]


def distillation(rng: np.random.Generator) -> Distillation:
    return Distillation(rng.standard_normal((N, V), np.float32), rng.random(N) < 0.6)


def solve(model: Model, idx: Any, targets: Any, **settings: Any) -> tuple[float, Any]:
    """Return the loss, and a copy of fresh gradients."""
    model.zero_grad()
    loss = model.loss(idx, targets, **settings)
    model.backward()
    return loss, model.flat_gradients.copy()


# ---- an objective of the caller's ----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("count", [None, 100])
def test_gradients_of_another_objective_are_derivatives(
    config: Any, count: int | None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, idx = distillation(rng), sequences(rng)
    assert isinstance(objective, Objective) and 0 < objective.live.sum() < N
    model = exact(odd_model(config), monkeypatch)
    solve(model, idx, objective, count=count)
    check_differences(model, lambda: model.loss(idx, objective, keep=False, count=count))


def test_another_objectives_mean_is_over_live_rows(backend: Any, rng: np.random.Generator) -> None:
    objective, idx = distillation(rng), sequences(rng)
    model = GPT2(ODD, backend=backend)
    logits = np.concatenate([model(row[None])[0] for row in idx])
    losses = np.empty(N, np.float32)
    objective.losses(None, losses, logits, slice(None))
    expected = losses.sum(dtype=np.float64) / objective.live.sum()
    for keep in (True, False):
        assert model.loss(idx, objective, keep=keep) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 7, N - 1])
def test_blocks_of_logits_give_another_objective_the_same_result(
    rows: int, backend: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, idx = distillation(rng), sequences(rng)
    loss, gradients = solve(odd_model(ODD, backend), idx, objective)
    monkeypatch.setattr("gpt2c.model.head.LOGITS_FLOATS", rows * V + 1)
    model = odd_model(ODD, backend)
    blocks_loss, blocks = solve(model, idx, objective)
    assert blocks_loss == pytest.approx(loss, rel=1e-6)
    assert model.loss(idx, objective, keep=False) == pytest.approx(loss, rel=1e-6)
    assert np.abs(blocks - gradients).max() <= 1e-5 * np.abs(gradients).max()


def test_teacher_that_is_sure_gives_the_cross_entropy(rng: np.random.Generator) -> None:
    idx, targets = sequences(rng), sequences(rng)
    teacher = np.full((N, V), -100, np.float32)
    teacher[np.arange(N), np.concatenate(targets)] = 0
    loss, gradients = solve(odd_model(ODD), idx, Distillation(teacher, np.ones(N, bool)))
    expected_loss, expected = solve(odd_model(ODD), idx, targets)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert np.abs(gradients - expected).max() <= 1e-5 * np.abs(expected).max()


def test_objective_that_fails_leaves_no_loss_and_no_gradients(rng: np.random.Generator) -> None:
    class Failing(Distillation):
        def learn(self, *arguments: Any) -> None:
            raise KeyError("no teacher")

    model, idx = GPT2(ODD), sequences(rng)
    expected = solve(model, idx, idx)[1]
    with pytest.raises(KeyError, match="no teacher"):
        model.loss(idx, Failing(np.zeros((N, V)), np.ones(N, bool)))
    assert "backward needs a loss" in refused(model.backward)
    assert np.array_equal(model.flat_gradients, expected)


@pytest.mark.parametrize(
    "live", [None, np.ones(N), np.ones(N + 1, bool), np.ones((1, N), bool), [True] * N, 1]
)
def test_live_that_is_no_flag_for_each_token_is_refused(
    live: Any, rng: np.random.Generator
) -> None:
    objective, model = Distillation(np.zeros((N, V)), live), GPT2(ODD)
    wanted = f"an objective's live must be bool ({N},), one for each token of idx, got "
    assert refused(model.loss, sequences(rng), objective).startswith(wanted)


def test_objective_without_live_rows_needs_a_count(rng: np.random.Generator) -> None:
    objective, model = Distillation(np.zeros((N, V)), np.zeros(N, bool)), GPT2(ODD)
    assert "ignored" in refused(model.loss, sequences(rng), objective)
    assert solve(model, sequences(rng), objective, count=3)[0] == 0
    assert not model.flat_gradients.any()


# ---- cross-entropy -------------------------------------------------------------------------------


def test_cross_entropy_is_the_objective_of_targets(backend: Any, rng: np.random.Generator) -> None:
    model, idx = GPT2(ODD, backend=backend), sequences(rng)
    targets = [rng.integers(-1, V, length) for length in LENGTHS]
    expected_loss, expected = solve(model, idx, targets)
    objective = CrossEntropy(np.concatenate(targets).astype(np.int32))
    loss, gradients = solve(model, idx, objective)
    assert loss == expected_loss and np.array_equal(gradients, expected)


def test_weighted_cross_entropy_has_weighted_losses_and_the_gradients_of_two_passes(
    backend: Any, rng: np.random.Generator
) -> None:
    model, idx, targets = GPT2(ODD, backend=backend), sequences(rng), sequences(rng)
    weights = rng.standard_normal(N, np.float32)
    weights[2:9] = 0
    parts = np.split(weights, np.cumsum(LENGTHS)[:-1])
    losses = np.concatenate(model.losses(idx, targets))
    model.backward(scale=1 / 7, weights=parts)
    expected = model.flat_gradients.copy()
    objective = CrossEntropy(np.concatenate(targets).astype(np.int32), weights)
    assert np.array_equal(objective.live, weights != 0)  # others cost no product
    loss, gradients = solve(model, idx, objective, count=7)
    assert loss == pytest.approx((weights * losses).sum(dtype=np.float64) / 7, rel=1e-5)
    assert np.array_equal(gradients, expected)
    assert model.loss(idx, objective, keep=False, count=7) == pytest.approx(loss, rel=1e-5)


def test_cross_entropy_keeps_targets_and_weights_of_its_own(rng: np.random.Generator) -> None:
    model, idx = GPT2(ODD), rng.integers(0, V, (1, 9))
    targets, weights = idx[0].astype(np.int32), np.ones(9, np.float32)
    objective = CrossEntropy(targets, weights)
    expected = model.loss(idx, objective)
    targets[...], weights[...] = 10**9, np.nan
    assert model.loss(idx, objective) == expected


@pytest.mark.parametrize("target", [V, 2**31 - 1])
def test_targets_beyond_the_vocabulary_do_not_reach_the_kernels(target: int) -> None:
    objective = CrossEntropy(np.array([0, target], np.int32))
    for keep in (True, False):
        message = refused(GPT2(ODD).loss, [[1, 2]], objective, keep=keep)
        assert message == f"targets must be below {V}, got {target}"


@pytest.mark.parametrize(
    ("targets", "weights", "wanted"),
    [
        ([1, 2], None, "targets must be int32 (N,), got [1, 2]"),
        (np.ones(2, np.int64), None, "targets must be int32 (N,), got array([1, 1])"),
        (np.ones((1, 2), np.int32), None, "targets must be int32 (N,), got array([[1, 1]]"),
        (np.ones(2, np.int32), [1, 2], "weights must be float32 (2,), got [1, 2]"),
        (np.ones(2, np.int32), np.ones(2), "weights must be float32 (2,), got array([1., 1.])"),
        (np.ones(2, np.int32), np.ones(3, np.float32), "weights must be float32 (2,), got array("),
        (np.ones(2, np.int32), np.full(2, np.inf, np.float32), "weights must be finite"),
    ],
)
def test_cross_entropy_refuses_other_arrays(targets: Any, weights: Any, wanted: str) -> None:
    assert refused(CrossEntropy, targets, weights).startswith(wanted)


def test_losses_of_ignored_rows_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two passes, as in DPO, over texts of which only the answers count."""
    backend = get_backend("base")
    model, idx = GPT2(GPT2Config(61, 40, 32, 1, 2), 1, backend), np.arange(60).reshape(2, 30)
    targets = np.where(np.arange(30) < 27, -1, idx)
    rows: list[int] = []
    product = backend.matmul_forward

    def count(out: Any, *others: Any) -> None:
        rows.extend([len(out)] * (out.shape[1] == 61))
        product(out, *others)

    monkeypatch.setattr(backend, "matmul_forward", count)
    losses = model.losses(idx, targets)
    assert rows == [6] and (losses[:, 27:] > 0).all() and not losses[:, :27].any()
    model.loss(idx, targets, keep=False)
    assert rows == [6, 6]
