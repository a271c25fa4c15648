"""Losses of preferences and their slopes, in NumPy: the formulas alone, without a model.

A slope is the derivative of a loss with respect to the log-probability of a whole completion, which
is a sum over tokens: so it is the slope of each token's log-probability too. In a reward model it
is the derivative with respect to the reward.

Letters: B pairs, or B examples. In arrays (2,B), row 0 is the chosen and row 1 the rejected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.untrusted import shown

__all__ = ["PAIR_LOSSES", "PairLoss", "bradley_terry", "kto", "reference_point", "sft"]

Array = NDArray[np.float64]
Losses = tuple[Array, Array]  # and their slopes

SIDES = np.array([[1.0], [-1.0]])  # a margin is the chosen minus the rejected


def bradley_terry(rewards: Array, margin: Array | float = 0.0, centring: float = 0.0) -> Losses:
    """Return -log sigmoid(r_c - r_r - margin) + centring (r_c + r_r)^2, and its slopes.

    The probability that r_c is preferred to r_r is sigmoid(r_c - r_r) (Bradley and Terry 1952), and
    a loss of rewards is its -log: Ouyang et al. 2022, arXiv:2203.02155, equation 1. A margin says
    how much better the chosen is: Touvron et al. 2023, arXiv:2307.09288. Centring pulls the mean of
    both to 0: Eisenstein et al. 2023, arXiv:2312.09244.

    Parameters
    ----------
    rewards : (2,B)
    margin : (B,), or one for all
    centring : TRL's center_rewards_coefficient

    Returns
    -------
    losses (B,), slopes (2,B)
    """
    difference = rewards[0] - rewards[1] - margin
    total = rewards[0] + rewards[1]
    losses = _minus_log_sigmoid(difference) + centring * total**2
    return losses, -SIDES * _sigmoid(-difference) + 2 * centring * total


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """A loss of pairs of completions: a curve over the margin, by which the chosen is likelier.

    The margin is that of log(policy / reference). "ipo" and "simpo" take each log-probability per
    token of its completion; "simpo" has no reference.

    sigmoid : -log sigmoid(beta margin), Rafailov et al. 2023, arXiv:2305.18290, equation 7; with
        label_smoothing, a share of preferences that may be wrong: Mitchell 2023, conservative DPO
    robust : the same without bias by that share: Chowdhury et al. 2024, arXiv:2403.00409
    hinge : max(0, 1 - beta margin), Zhao et al. 2023, arXiv:2305.10425
    ipo : (margin - 1 / (2 beta))^2, Azar et al. 2023, arXiv:2310.12036, equation 17, as TRL has it
    simpo : -log sigmoid(beta margin - simpo_gamma), Meng et al. 2024, arXiv:2405.14734, equation 6

    Raises
    ------
    ValueError : no such loss, a number out of range, or one that the loss does not have
    """

    name: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in PAIR_LOSSES:
            known = ", ".join(PAIR_LOSSES)
            raise ValueError(f"a loss of pairs is one of {known}, got {shown(self.name)}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.name in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing is for sigmoid, robust and simpo, not {self.name}")
        if not self.simpo_gamma >= 0:
            raise ValueError(f"simpo_gamma must be at least 0, got {self.simpo_gamma}")

    @property
    def has_reference(self) -> bool:
        """Whether margins are those of log(policy / reference)."""
        return self.name != "simpo"

    @property
    def start(self) -> float:
        """The loss where policy and reference are equal."""
        return float(PAIR_LOSSES[self.name](self, np.zeros(1))[0][0])

    def __call__(self, policy: Array, reference: Array | None, lengths: Any) -> Losses:
        """Return the losses of pairs, and their slopes.

        Parameters
        ----------
        policy : (2,B), log-probabilities of completions by the model that is trained
        reference : (2,B), the same by the untrained model; None for "simpo"
        lengths : (2,B), tokens of completions

        Returns
        -------
        losses (B,), slopes (2,B)
        """
        unit = lengths if self.name in ("ipo", "simpo") else 1.0
        scores = (policy if reference is None else policy - reference) / unit
        losses, slopes = PAIR_LOSSES[self.name](self, scores[0] - scores[1])
        return losses, SIDES * slopes / unit


def _logistic(of: PairLoss, margin: Array) -> Losses:
    x, wrong = of.beta * margin, of.label_smoothing
    losses = (1 - wrong) * _minus_log_sigmoid(x) + wrong * _minus_log_sigmoid(-x)
    return losses, of.beta * (wrong * _sigmoid(x) - (1 - wrong) * _sigmoid(-x))


def _robust(of: PairLoss, margin: Array) -> Losses:
    x, wrong = of.beta * margin, of.label_smoothing
    losses = (1 - wrong) * _minus_log_sigmoid(x) - wrong * _minus_log_sigmoid(-x)
    slopes = -of.beta * ((1 - wrong) * _sigmoid(-x) + wrong * _sigmoid(x))
    return losses / (1 - 2 * wrong), slopes / (1 - 2 * wrong)


def _simpo(of: PairLoss, margin: Array) -> Losses:
    return _logistic(of, margin - of.simpo_gamma / of.beta)


def _hinge(of: PairLoss, margin: Array) -> Losses:
    short = 1 - of.beta * margin
    return np.maximum(short, 0), np.where(short > 0, -of.beta, 0.0)


def _ipo(of: PairLoss, margin: Array) -> Losses:
    off = margin - 1 / (2 * of.beta)
    return off**2, 2 * off


PAIR_LOSSES: dict[str, Callable[[PairLoss, Array], Losses]] = {
    "sigmoid": _logistic,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
}


def sft(policy: Array, lengths: Any) -> Losses:
    """Return the losses per token of completions, and their slopes: the term of plain learning.

    With a loss of pairs it keeps the chosen likely: Pang et al. 2024, arXiv:2404.19733, equation 2.
    A long completion counts as much as a short one.

    Parameters
    ----------
    policy : (B,), log-probabilities of completions
    lengths : (B,), their tokens

    Returns
    -------
    losses (B,), slopes (B,)
    """
    return -policy / lengths, -1.0 / lengths


def kto(
    policy: Array,
    reference: Array,
    desirable: NDArray[np.bool_],
    point: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Losses:
    """Return the losses of single completions that were liked or not, and their slopes.

    1 - sigmoid(beta (log(policy / reference) - point)) if it is desirable, with the sign inside
    turned round if not, times the weight of its kind: Ethayarajh et al. 2024, arXiv:2402.01306,
    equation 8.

    Parameters
    ----------
    policy, reference : (B,), log-probabilities of completions
    desirable : (B,)
    point : see `reference_point`; it has no slope

    Returns
    -------
    losses (B,), slopes (B,)
    """
    signs = np.where(desirable, beta, -beta)
    weights = np.where(desirable, desirable_weight, undesirable_weight)
    x = signs * (policy - reference - point)
    return weights * _sigmoid(-x), -weights * signs * _sigmoid(x) * _sigmoid(-x)


def reference_point(policy: Array, reference: Array) -> float:
    """Return KTO's z0, a divergence of policy and reference, at least 0.

    It is the mean of log(policy / reference) over completions of other prompts: the same paper,
    section 4.1.

    Parameters
    ----------
    policy, reference : (B,), log-probabilities of mismatched completions
    """
    return max(0.0, float(np.mean(policy - reference)))


def _sigmoid(x: Array) -> Array:
    return np.exp(-_minus_log_sigmoid(x))


def _minus_log_sigmoid(x: Array) -> Array:
    return np.logaddexp(0.0, -x)
