"""Policy gradients: each formula against its definition, each slope against differences."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from helpers.exact import check_differences, exact, odd_model

from gpt2c import GPT2Config
from gpt2c.finetune.policy import (
    LOSS_TYPES,
    PolicyLoss,
    PolicyObjective,
    TokenFacts,
    centred,
    clipped,
    gae,
    group_advantages,
    kept_once,
    kl_penalty,
    leave_one_out,
    pass_at_k,
    token_factors,
    truncated_ratio,
    value_loss,
    whitened,
)

NAN = float("nan")
V = 31
CONFIG = GPT2Config(vocab_size=V, n_positions=16, n_embd=24, n_layer=2, n_head=2)
LENGTHS = (5, 16, 1)
N = sum(LENGTHS)


# ---- advantages ----------------------------------------------------------------------------------


def test_group_advantages() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    by_group = np.array([1, -1, -1, 1]) * 0.5 / (np.sqrt(1 / 3) + 1e-4)
    assert group_advantages(rewards)[0] == pytest.approx(by_group)
    assert group_advantages(rewards, "none")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    scale = np.std(rewards, ddof=1) + 1e-4
    assert group_advantages(rewards, "batch")[0] == pytest.approx(
        np.array([0.5, -0.5, -0.5, 0.5]) / scale
    )
    for scale_rewards in ("group", "batch", "none"):
        assert not group_advantages(rewards, scale_rewards)[1].any()


def test_a_reward_is_less_than_the_mean_of_the_others() -> None:
    rewards = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 6.0]])
    assert leave_one_out(rewards).tolist() == [[1.5, -1.5, 0.0], [-3.0, -3.0, 6.0]]
    assert centred(rewards).tolist() == [[1.0, -1.0, 0.0], [-2.0, -2.0, 4.0]]


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out, centred])
def test_a_completion_without_reward_changes_nothing(advantages: Any) -> None:
    with_nan = advantages(np.array([[1.0, NAN, 0.0, 0.5]]))
    assert with_nan[0, 1] == 0
    assert np.delete(with_nan, 1) == pytest.approx(advantages(np.array([[1.0, 0.0, 0.5]]))[0])
    assert not advantages(np.array([[NAN, 1.0], [NAN, NAN]])).any()


def test_each_right_completion_is_kept_once() -> None:
    passed = np.array([[True, True, False], [True, False, True]])
    completions = [[1], [1], [2], [1], [2], [3]]
    assert kept_once(passed, completions).tolist() == [[1, 0, 0], [1, 0, 1]]


def test_gae_is_the_sum_of_its_definition(rng: np.random.Generator) -> None:
    rewards, values = rng.standard_normal((2, 6))
    deltas = rewards + 0.9 * np.append(values[1:], 0) - values
    expected = [sum((0.9 * 0.8) ** k * deltas[t + k] for k in range(6 - t)) for t in range(6)]
    advantages, returns = gae(rewards, values, 0.9, 0.8)
    assert advantages == pytest.approx(expected) and returns == pytest.approx(expected + values)
    rest = np.cumsum(rewards[::-1])[::-1]
    assert gae(rewards, values, 1, 1)[1] == pytest.approx(rest)


def test_whitened(rng: np.random.Generator) -> None:
    found = whitened(rng.standard_normal(50) * 3 + 7)
    assert found.mean() == pytest.approx(0, abs=1e-12) and found.std() == pytest.approx(1)


# ---- losses of tokens ----------------------------------------------------------------------------


def test_factors_are_those_of_the_definitions() -> None:
    lengths = np.array([2, 4, 0])
    factors = {name: token_factors(name, lengths, 10) for name in LOSS_TYPES}
    assert factors["dapo"].tolist() == factors["bnpo"].tolist() == [1 / 6] * 3
    assert factors["grpo"].tolist() == pytest.approx([1 / 6, 1 / 12, 1 / 3])
    assert factors["dr_grpo"].tolist() == pytest.approx([1 / 30] * 3)


def slope(loss: Any, at: Any) -> Any:
    return (np.asarray(loss(at + 1e-6)) - np.asarray(loss(at - 1e-6))) / 2e-6


def test_slopes_of_the_losses_are_differences(rng: np.random.Generator) -> None:
    logps, old, advantages = -rng.random(400), -rng.random(400), rng.standard_normal(400)
    found = clipped(logps, old, advantages, 0.2, 0.3)
    assert found.low.sum() > 20 and found.high.sum() > 20 and (found.s != 0).sum() > 200
    assert -found.s == pytest.approx(
        slope(lambda at: clipped(at, old, advantages, 0.2, 0.3).losses, logps), abs=1e-8
    )
    for kind in ("k2", "k3"):
        estimate, s = kl_penalty(kind, logps, old)
        differences = slope(partial(kl_penalty, kind, reference=old), logps)[0]
        assert (estimate >= 0).all() and -s == pytest.approx(differences, abs=1e-8)
    values, returns = rng.standard_normal((2, 400))
    losses, slopes = value_loss(values, old, returns, 0.2)
    assert (losses >= (values - returns) ** 2 / 2).all() and 50 < (slopes == 0).sum() < 350
    assert slopes == pytest.approx(
        slope(lambda at: value_loss(at, old, returns, 0.2)[0], values), abs=1e-8
    )


def test_estimates_of_the_divergence(rng: np.random.Generator) -> None:
    """k3 has the right mean; the mean slope of k2 is that of the divergence."""
    z, reference = rng.standard_normal((2, 7))
    log_p, log_q = z - np.log(np.exp(z).sum()), reference - np.log(np.exp(reference).sum())
    p = np.exp(log_p)
    assert p @ kl_penalty("k3", log_p, log_q)[0] == pytest.approx(p @ (log_p - log_q))
    score = np.eye(7) - p  # row v: d log p_v / d z
    expected = (p * (log_p - log_q)) @ score
    assert -(p * kl_penalty("k2", log_p, log_q)[1]) @ score == pytest.approx(expected)


def test_ratio_to_another_sampler_is_truncated() -> None:
    found = truncated_ratio(np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.4, 0.01]))
    assert found == pytest.approx([2.0, 0.5, 2.0])


def test_one_update_of_grpo_is_reinforce(rng: np.random.Generator) -> None:
    logps, first = -rng.random(N), tokens(rng)
    reinforce, grpo = PolicyLoss()(first, logps), PolicyLoss()(first._replace(old=logps), logps)
    assert grpo.s.tolist() == reinforce.s.tolist() == (first.factors * first.advantages).tolist()
    assert not (grpo.low | grpo.high).any()


def test_pass_at_k_is_the_share_of_draws_with_a_pass() -> None:
    passed = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    for k in (1, 2, 3, 5):
        shares = [[row[list(c)].any() for c in combinations(range(5), k)] for row in passed]
        assert pass_at_k(passed, k) == pytest.approx(np.mean(shares))


# ---- the objective -------------------------------------------------------------------------------


def batch(rng: np.random.Generator) -> tuple[Any, Any]:
    """Return sequences, and targets of which a third are ignored."""
    idx = [rng.integers(0, V - 2, length) for length in LENGTHS]
    return idx, np.where(rng.random(N) < 0.3, -1, rng.integers(0, V - 2, N)).astype(np.int32)


def tokens(rng: np.random.Generator, **parts: Any) -> TokenFacts:
    return TokenFacts(rng.random(N), rng.standard_normal(N), **parts)


def logps_of(rng: np.random.Generator) -> Any:
    """Return log-probabilities near those of a model that knows nothing."""
    return rng.standard_normal(N) / 2 - np.log(V)


@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        ((), {}),
        (("old",), {"temperature": 0.7}),
        (("old", "reference"), {}),
        (("old", "sampled", "reference"), {"temperature": 1.5}),
        (("old", "values", "returns"), {"unused": [V - 1, V - 2], "value": V - 1}),
    ],
    ids=["reinforce", "clipped", "divergence", "sampler", "value"],
)
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_gradients_of_the_objective_are_derivatives(
    parts: Any, settings: Any, kl: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    idx, targets = batch(rng)
    known = tokens(rng, **{name: logps_of(rng) for name in parts})
    if "values" in parts:  # near the model's
        known = known._replace(values=rng.standard_normal(N) / 4, returns=rng.standard_normal(N))
    one = PolicyObjective(targets, known, PolicyLoss(0.2, 0.3, 0.1, kl, 0.5), **settings)
    model = exact(odd_model(CONFIG), monkeypatch)
    model.zero_grad()
    model.loss(idx, one, count=3)
    model.backward()
    check_differences(model, lambda: model.loss(idx, one, keep=False, count=3))


def test_log_probabilities_are_those_of_the_policy(backend: Any, rng: np.random.Generator) -> None:
    idx, targets = batch(rng)
    one = PolicyObjective(targets, tokens(rng), PolicyLoss(), 0.5, [V - 1, V - 2])
    model = odd_model(CONFIG, backend)
    logits = np.concatenate([model(row[None])[0] for row in idx]).astype(np.float64)
    logits = logits[:, : V - 2] / 0.5
    logps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = np.where(targets >= 0, logps[np.arange(N), targets], 0)
    model.loss(idx, one)
    assert one.logps == pytest.approx(expected, abs=1e-4)


def test_rejection_fine_tuning_has_the_bits_of_sft(rng: np.random.Generator) -> None:
    """An advantage of 1 for what was kept is the cross-entropy of it."""
    idx, targets = batch(rng)
    expected, model = (odd_model(CONFIG, "auto") for _ in range(2))
    count = int((targets >= 0).sum())
    factors = np.full(N, token_factors("dapo", np.array([count]), 1)[0])
    one = PolicyObjective(targets, TokenFacts(factors, np.ones(N)), PolicyLoss())
    losses = [
        expected.loss(idx, np.split(targets, np.cumsum(LENGTHS)[:-1])),
        model.loss(idx, one, count=1),
    ]
    expected.backward()
    model.backward()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert np.array_equal(model.flat_gradients, expected.flat_gradients)
