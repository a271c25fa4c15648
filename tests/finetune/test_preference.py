"""The losses of preferences: slopes against central differences, known values, the two limits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c.finetune.preference import (
    PAIR_LOSSES,
    PairLoss,
    bradley_terry,
    kto,
    reference_point,
    sft,
)

B = 9
LOSSES = [
    PairLoss(),
    PairLoss("sigmoid", 0.3, label_smoothing=0.2),
    PairLoss("robust", 0.3, label_smoothing=0.2),
    PairLoss("hinge", 0.4),
    PairLoss("ipo", 0.5),
    PairLoss("simpo", 2.0, simpo_gamma=0.7),
    PairLoss("simpo", 2.0, label_smoothing=0.1, simpo_gamma=0.7),
]
EACH = pytest.mark.parametrize("loss", LOSSES, ids=str)


def numbers(seed: int = 0) -> tuple[Any, Any, Any]:
    """Return log-probabilities of a policy and of a reference, and lengths, (2,B) each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, (2, B))
    policy = -rng.uniform(0.5, 2.5, (2, B)) * lengths
    return policy, policy + rng.normal(0, 4, (2, B)), lengths


def check_slopes(losses: Callable[[Any], tuple[Any, Any]], at: Any) -> None:
    """Compare the slopes of a sum of losses with central differences, in float64."""
    slopes, h = losses(at)[1], 1e-6
    assert slopes.shape == at.shape
    for place in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[place] = h
        difference = (losses(at + step)[0].sum() - losses(at - step)[0].sum()) / (2 * h)
        assert slopes[place] == pytest.approx(difference, rel=1e-6, abs=1e-8)


@EACH
def test_slopes_of_pairs(loss: PairLoss) -> None:
    policy, reference, lengths = numbers()
    check_slopes(lambda at: loss(at, reference if loss.has_reference else None, lengths), policy)


@pytest.mark.parametrize("centring", [0.0, 0.02])
@pytest.mark.parametrize("margin", [0.0, np.linspace(0, 2, B)], ids=["no margin", "margins"])
def test_slopes_of_rewards(margin: Any, centring: float) -> None:
    rewards = np.random.default_rng(1).normal(0, 2, (2, B))
    check_slopes(lambda at: bradley_terry(at, margin, centring), rewards)


def test_slopes_of_single_completions() -> None:
    policy, reference, lengths = numbers()
    liked = np.arange(B) % 3 == 0
    check_slopes(lambda at: kto(at, reference[0], liked, 0.8, 0.3, 1.5, 0.7), policy[0])
    check_slopes(lambda at: sft(at, lengths[0]), policy[0])


@EACH
def test_start_is_the_loss_of_an_untrained_policy(loss: PairLoss) -> None:
    policy, _, lengths = numbers()
    if loss.has_reference:
        losses, _ = loss(policy, policy, lengths)
        assert losses == pytest.approx(loss.start, abs=1e-12)


def test_known_values() -> None:
    for loss in (PairLoss(), PairLoss(label_smoothing=0.1), PairLoss("robust", 0.1, 0.1)):
        assert loss.start == pytest.approx(math.log(2), abs=1e-15)
    assert PairLoss("hinge").start == 1
    assert PairLoss("ipo", 0.5).start == pytest.approx(1 / (4 * 0.5**2))
    ones = np.ones(2)
    losses, slopes = kto(ones, ones, np.array([True, False]), 0.0, 0.2, 3.0, 1.0)
    assert losses == pytest.approx([1.5, 0.5])
    assert slopes == pytest.approx([-3 * 0.2 / 4, 0.2 / 4])
    # by hand: margins of log(policy / reference) 2, per token 3/3 - 1/1 = 0
    policy, reference = np.array([[-1.0], [-2.0]]), np.array([[-4.0], [-3.0]])
    losses, slopes = PairLoss("sigmoid", 0.5)(policy, reference, None)
    assert losses == pytest.approx(-math.log(1 / (1 + math.exp(-1))))
    assert slopes[:, 0] == pytest.approx([-0.5 / (1 + math.e), 0.5 / (1 + math.e)])
    losses, slopes = PairLoss("ipo", 0.5)(policy, reference, np.array([[3], [1]]))
    assert losses == pytest.approx(1) and slopes[:, 0] == pytest.approx([-2 / 3, 2])


def test_robust_is_without_bias() -> None:
    """The mean over flips of the label is the loss of the true label: the paper's own claim."""
    policy, reference, lengths = numbers(2)
    wrong = 0.3
    robust = PairLoss("robust", 0.2, label_smoothing=wrong)
    true, flipped = (
        robust(*(side[::way] for side in (policy, reference, lengths)))[0] for way in (1, -1)
    )
    plain = PairLoss("sigmoid", 0.2)(policy, reference, lengths)[0]
    assert (1 - wrong) * true + wrong * flipped == pytest.approx(plain, rel=1e-12)


@EACH
def test_far_margins_are_finite(loss: PairLoss) -> None:
    far = np.array([[5000.0, -5000.0], [-5000.0, 5000.0]])
    with np.errstate(over="raise", invalid="raise"):
        losses, slopes = loss(far, np.zeros((2, 2)), np.ones((2, 2)))
    assert np.isfinite(losses).all() and np.isfinite(slopes).all()
    losses, slopes = kto(far[0], np.zeros(2), np.array([True, False]), 0.0)
    assert losses == pytest.approx(0, abs=1e-9) and slopes == pytest.approx(0, abs=1e-9)


def test_reference_point_is_a_mean_that_is_not_negative() -> None:
    assert reference_point(np.array([-1.0, -4.0]), np.array([-2.0, -7.0])) == 2
    assert reference_point(np.array([-2.0, -7.0]), np.array([-1.0, -4.0])) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "dpo"}, "one of sigmoid, robust, hinge, ipo, simpo, got 'dpo'"),
        ({"beta": 0.0}, "beta must be positive, got 0"),
        ({"beta": math.nan}, "beta must be positive, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"name": "ipo", "label_smoothing": 0.1}, "for sigmoid, robust and simpo, not ipo"),
        ({"name": "simpo", "simpo_gamma": -1.0}, "simpo_gamma must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings: Any, words: str) -> None:
    assert re.search(words, refused(PairLoss, **settings))


def test_every_loss_is_tested_here() -> None:
    assert {loss.name for loss in LOSSES} == PAIR_LOSSES.keys()
