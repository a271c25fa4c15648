"""Policy gradients: from rewards to the gradient of the logits.

    rewards (P, G) -> advantages -> loss of each token -> s_t = -d loss / d log p_t

The gradient of the logits of token t is s_t (softmax - onehot). So GRPO, RLOO, REINFORCE, PPO and
rejection fine-tuning differ only in the advantages and in s_t. All is NumPy; P prompts have G
completions each, S = P * G in all, N tokens.

Sources: GRPO, Shao et al., arXiv:2402.03300; DAPO, Yu et al., arXiv:2503.14476; Dr. GRPO, Liu et
al., arXiv:2503.20783; RLOO, Ahmadian et al., arXiv:2402.14740; PPO, Schulman et al.,
arXiv:1707.06347; GAE, Schulman et al., arXiv:1506.02438.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.backend import Backend
from gpt2c.kernels.memory import Array
from gpt2c.model.block import IntArray
from gpt2c.model.objective import Rows

__all__ = [
    "LOSS_TYPES",
    "SCALES",
    "Clipped",
    "PolicyLoss",
    "PolicyObjective",
    "TokenFacts",
    "centred",
    "clipped",
    "deviation",
    "gae",
    "group_advantages",
    "kept_once",
    "kl_penalty",
    "leave_one_out",
    "pass_at_k",
    "token_factors",
    "truncated_ratio",
    "value_loss",
    "whitened",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
SCALES = ("group", "batch", "none")
LOSS_TYPES = ("dapo", "dr_grpo", "grpo", "bnpo")
NEVER = -1e30  # the logit of an id that no text has: its probability is 0, and its gradient

# ---- advantages ----------------------------------------------------------------------------------


def group_advantages(rewards: Floats, scale_rewards: str = "group") -> Floats:
    """Return GRPO's advantages (P, G): rewards less the mean of their group, over a deviation.

    The deviation is the group's (GRPO), the batch's, or 1 (Dr. GRPO); it counts with n - 1, and
    1e-4 is added. A reward of nan has advantage 0 and is in no mean.
    """
    centre = rewards - _mean(rewards)
    if scale_rewards == "group":
        centre /= deviation(rewards) + 1e-4
    elif scale_rewards == "batch":
        centre /= deviation(rewards.reshape(1, -1)) + 1e-4
    return np.nan_to_num(centre, nan=0.0)


def leave_one_out(rewards: Floats) -> Floats:
    """Return RLOO's advantages (P, G): each reward less the mean of the others of its group."""
    others = np.sum(~np.isnan(rewards), axis=1, keepdims=True) - 1
    centre: Floats = (others + 1) / np.maximum(others, 1) * (rewards - _mean(rewards))
    return np.nan_to_num(centre, nan=0.0)


def centred(rewards: Floats) -> Floats:
    """Return REINFORCE's advantages (P, G): rewards less the mean of all."""
    return np.nan_to_num(rewards - _mean(rewards.reshape(1, -1)), nan=0.0)


def kept_once(passed: Bools, completions: Sequence[Sequence[int]]) -> Floats:
    """Return rejection fine-tuning's advantages (P, G): 1 for each different one that passed."""
    P, G = passed.shape
    kept = np.zeros((P, G))
    for p in range(P):
        seen = set()
        for g in range(G):
            text = tuple(completions[p * G + g])
            kept[p, g] = passed[p, g] and text not in seen
            seen.add(text)
    return kept


def gae(
    rewards: Floats, values: Floats, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Floats, Floats]:
    """Return the generalised advantages and the returns of one completion's tokens.

    A_t = d_t + gamma lam A_{t+1}, where d_t = r_t + gamma V_{t+1} - V_t; V is 0 after the end. The
    return of token t is A_t + V_t.

    Parameters
    ----------
    rewards, values : (T,) of each token; a value is that of the text before the token
    """
    advantages, following = np.zeros(len(values)), 0.0
    for t in range(len(values) - 1, -1, -1):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        following = rewards[t] + gamma * after - values[t] + gamma * lam * following
        advantages[t] = following
    return advantages, advantages + values


def whitened(advantages: Floats) -> Floats:
    """Return advantages with mean 0 and deviation 1."""
    white: Floats = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return white


def deviation(rewards: Floats) -> Floats:
    """Return the deviation of each row, (P, 1), with n - 1; 0 for a single reward."""
    count = np.sum(~np.isnan(rewards), axis=1, keepdims=True)
    squares = np.nansum((rewards - _mean(rewards)) ** 2, axis=1, keepdims=True)
    result: Floats = np.sqrt(squares / np.maximum(count - 1, 1))
    return result


def _mean(rewards: Floats) -> Floats:
    """Return the mean of each row without its nan, (P, 1)."""
    count = np.sum(~np.isnan(rewards), axis=1, keepdims=True)
    mean: Floats = np.nansum(rewards, axis=1, keepdims=True) / np.maximum(count, 1)
    return mean


# ---- losses of tokens ----------------------------------------------------------------------------


def token_factors(loss_type: str, lengths: NDArray[np.int64], most: int) -> Floats:
    """Return the factor (S,) of the loss of each completion's tokens; the loss is their sum.

    dapo     1 / all tokens of the step
    bnpo     the same here, where a step is one batch
    grpo     1 / (completions * tokens of the completion)
    dr_grpo  1 / (completions * the most tokens of one)

    Parameters
    ----------
    loss_type : TRL's name
    lengths : (S,) tokens of each completion that count
    most : max_completion_length
    """
    S = len(lengths)
    if loss_type == "grpo":
        return 1 / (S * np.maximum(lengths, 1.0))
    return np.full(S, 1 / (S * most if loss_type == "dr_grpo" else max(1, lengths.sum())))


class Clipped(NamedTuple):
    """The loss of each token (n,), s = -d loss / d log p, and where the ratio was clipped."""

    losses: Floats
    s: Floats
    low: Bools
    high: Bools


def clipped(
    logps: Floats, old: Floats, advantages: Floats, epsilon: float, epsilon_high: float
) -> Clipped:
    """Return PPO's clipped loss: -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A).

    Parameters
    ----------
    logps, old : (n,) log-probabilities, of the policy and of the one that sampled; r is the ratio
    advantages : (n,)
    """
    ratio = np.exp(logps - old)
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    bounded = np.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    losses = -np.minimum(ratio * advantages, bounded * advantages)
    return Clipped(losses, np.where(low | high, 0.0, ratio * advantages), low, high)


def kl_penalty(kind: str, logps: Floats, reference: Floats) -> tuple[Floats, Floats]:
    """Return an estimate (n,) of the divergence from a reference, and its s.

    With d = reference - logps, k2 is d^2 / 2: its mean gradient is that of the divergence. k3 is
    e^d - d - 1, as TRL has it; its gradient is biased, and explodes where the policy has become
    unlikely (http://joschu.net/blog/kl-approx.html).
    """
    d = reference - logps
    if kind == "k2":
        return d * d / 2, d
    return np.exp(d) - d - 1, np.exp(d) - 1


def truncated_ratio(logps: Floats, sampled: Floats, most: float = 2.0) -> Floats:
    """Return the factor (n,) that corrects for another sampler: p / p of the sampler, at most 2."""
    return np.minimum(np.exp(logps - sampled), most)


def value_loss(
    values: Floats, old: Floats, returns: Floats, epsilon: float
) -> tuple[Floats, Floats]:
    """Return PPO's loss of values (n,) and its derivative.

    It is max((V - R)^2, (V' - R)^2) / 2, where V' is V, at most epsilon from the old value.
    """
    bounded = old + np.clip(values - old, -epsilon, epsilon)
    free, held = (values - returns) ** 2, (bounded - returns) ** 2
    slopes = np.where(free >= held, values - returns, 0.0)
    return np.maximum(free, held) / 2, slopes


class TokenFacts(NamedTuple):
    """What is known of tokens before the policy's log-probabilities, (n,) each.

    Attributes
    ----------
    factors : of their losses, see `token_factors`
    advantages : of their completions or, for PPO, their own
    old : log-probabilities before the first update on these tokens; None at that update
    reference : log-probabilities of the reference, for a divergence
    sampled : log-probabilities of another sampler, whose samples are corrected for
    values, returns : for PPO, of the text before each token
    """

    factors: Floats
    advantages: Floats
    old: Floats | None = None
    reference: Floats | None = None
    sampled: Floats | None = None
    values: Floats | None = None
    returns: Floats | None = None

    def at(self, rows: Rows) -> TokenFacts:
        """Return these tokens only."""
        known = {name: part[rows] for name, part in self._asdict().items() if part is not None}
        return TokenFacts(**known)


class Terms(NamedTuple):
    """The loss of each token (n,), its derivatives, and what metrics show.

    Attributes
    ----------
    losses : their sum is the loss
    s : -d loss / d log p
    d_values : d loss / d value
    kl : the estimated divergence from the reference
    low, high : where the ratio was clipped
    """

    losses: Floats
    s: Floats
    d_values: Floats
    kl: Floats
    low: Bools
    high: Bools


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of tokens: the clipped one, plus beta times a divergence, plus that of values.

    Without old log-probabilities the ratio is 1, and the loss is REINFORCE's, -A log p: it has the
    same gradient, and with advantages of 1 it is the cross-entropy.
    """

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    kl_estimator: str = "k2"
    vf_coef: float = 0.1
    cliprange_value: float = 0.2

    def __call__(self, tokens: TokenFacts, logps: Floats, values: Floats | None = None) -> Terms:
        """Return the terms of n tokens from their log-probabilities and values, (n,) each."""
        none = np.zeros(len(logps), np.bool_)
        advantages = tokens.advantages
        if tokens.sampled is not None:
            before = logps if tokens.old is None else tokens.old
            advantages = advantages * truncated_ratio(before, tokens.sampled)
        if tokens.old is None:
            losses, s, low, high = Clipped(-advantages * logps, advantages, none, none)
        else:
            losses, s, low, high = clipped(
                logps, tokens.old, advantages, self.epsilon, self.epsilon_high
            )
        kl = d_values = np.zeros(len(logps))
        if tokens.reference is not None:
            kl, slopes = kl_penalty(self.kl_estimator, logps, tokens.reference)
            losses, s = losses + self.beta * kl, s + self.beta * slopes
        if values is not None and tokens.values is not None and tokens.returns is not None:
            value, d_values = value_loss(
                values, tokens.values, tokens.returns, self.cliprange_value
            )
            losses, d_values = losses + self.vf_coef * value, self.vf_coef * d_values
        f = tokens.factors
        return Terms(f * losses, f * s, f * d_values, kl, low, high)


# ---- figures -------------------------------------------------------------------------------------


def pass_at_k(passed: Bools, k: int) -> float:
    """Return the chance that one of k completions passes, without bias (Chen et al., 2107.03374).

    Parameters
    ----------
    passed : (P, G), k at most G
    """
    G = passed.shape[1]
    return float(np.mean([1 - math.comb(G - c, k) / math.comb(G, k) for c in passed.sum(axis=1)]))


# ---- the objective -------------------------------------------------------------------------------


class PolicyObjective:
    """A loss of each row's target, from its log-probability; see `gpt2c.model.objective`.

    Parameters
    ----------
    targets : (N,) int32; negative ones are ignored
    tokens : what is known of each target, (N,)
    loss : of the tokens
    temperature : the policy is softmax(logits / temperature)
    unused : ids that no text has
    value : the id whose logit is the value of the text before each token; None for no values

    Attributes
    ----------
    logps : (N,) the log-probabilities that were computed, 0 for ignored targets
    """

    def __init__(
        self,
        targets: IntArray,
        tokens: TokenFacts,
        loss: PolicyLoss,
        temperature: float = 1.0,
        unused: Sequence[int] = (),
        value: int | None = None,
    ) -> None:
        self.live: Bools = targets >= 0
        self.logps = np.zeros(len(targets))
        self._targets = targets
        self._tokens = tokens
        self._loss = loss
        self._temperature = temperature
        self._unused = list(unused)
        self._value = value

    def losses(self, ops: Backend, out: Array, logits: Array, rows: Rows) -> None:
        """See `Objective`."""
        self._forward(ops, out, logits, rows)
        out[~self.live[rows]] = 0

    def learn(self, ops: Backend, out: Array, logits: Array, rows: Rows, scale: float) -> None:
        """See `Objective`: a row's gradient is scale * s * (softmax - onehot) / temperature."""
        lse, terms = self._forward(ops, out, logits, rows)
        weights = (terms.s / self._temperature).astype(np.float32)
        ops.crossentropy_backward(logits, logits, lse, self._targets[rows], weights, scale)
        if self._value is not None:
            logits[:, self._value] = scale * terms.d_values

    def _forward(self, ops: Backend, out: Array, logits: Array, rows: Rows) -> tuple[Array, Terms]:
        """Write the losses; return the log of each row's denominator, and the terms."""
        values = None if self._value is None else logits[:, self._value].astype(np.float64)
        logits[:, self._unused] = NEVER
        if self._temperature != 1:
            logits /= np.float32(self._temperature)
        lse = np.empty_like(out)
        ops.crossentropy_forward(out, lse, logits, self._targets[rows])
        logps = -out.astype(np.float64)
        self.logps[rows] = logps
        terms = self._loss(self._tokens.at(rows), logps, values)
        out[...] = terms.losses
        return lse, terms
