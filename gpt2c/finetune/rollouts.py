"""Rollouts: the completions that a policy samples of prompts, for reinforcement learning.

A prompt is read once for all of its completions. Completions of many prompts are read together, a
token of each in one step, and a group of completions takes the place of one that has ended. Each
completion has random numbers of its own, so which others run beside it changes nothing.

The log-probabilities are those of the policy itself, softmax(logits / temperature): top-k, top-p
and penalties would sample from another one than is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2c.model.language_model import LanguageModel
from gpt2c.parallel.world import ALONE, World
from gpt2c.train.run import LostModel
from gpt2c.train.stop import Check, StoppedError

__all__ = ["Diverged", "Rollouts", "draw", "sample"]

IntArray = NDArray[np.int32]
Floats = NDArray[np.float64]
MEMORY = 1 << 28  # bytes of keys, values and logits; more completions wait for their place


class Diverged(LostModel):
    """The policy's logits are not finite."""


class Rollouts(NamedTuple):
    """S = P * G completions, G of each of P prompts, one prompt after the other.

    Attributes
    ----------
    prompts : token ids of the P prompts
    completions : token ids of S completions, with the one that ended them
    logps : as completions, the log-probability of each token in nats, of the policy that sampled
    entropies : as completions, the entropy in nats of what each token was drawn from
    values : as completions, the value of the text before each token; 0 of a policy without
    truncated : (S,) whether a completion has no end, because it has the most tokens
    """

    prompts: Sequence[Sequence[int]]
    completions: list[IntArray]
    logps: list[Floats]
    entropies: list[Floats]
    values: list[Floats]
    truncated: NDArray[np.bool_]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each completion, (S,)."""
        return np.array([len(ids) for ids in self.completions], np.int64)

    def prompt_of(self, number: int) -> Sequence[int]:
        """Return the prompt of a completion."""
        return self.prompts[number // (len(self.completions) // len(self.prompts))]


def draw(
    logits: NDArray[Any], temperature: float, uniforms: Floats
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Draw a token of each row; with temperature 0 take the likeliest.

    Parameters
    ----------
    logits : (N, V) floats; -inf for a token that is never drawn
    temperature : divides them; what is drawn with 0 has the log-probabilities of 1
    uniforms : (N,) in [0, 1), a random number for each row

    Returns
    -------
    tokens (N,), their log-probabilities (N,) and the entropies of the rows (N,), in nats

    Raises
    ------
    Diverged : logits hold nan or infinity
    """
    z = logits.astype(np.float64)
    largest = z.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise Diverged("the policy's logits hold nan or infinity: its weights have diverged")
    z -= largest
    z /= temperature or 1.0
    p = np.exp(z)
    cumulative = np.cumsum(p, axis=1)
    total = cumulative[:, -1:].copy()
    if temperature:
        tokens = (cumulative <= uniforms[:, None] * total).sum(axis=1)
    else:
        tokens = z.argmax(axis=1)
    z[p == 0] = 0  # so that 0 times -inf is 0
    log_total = np.log(total[:, 0])
    logps = z[np.arange(len(z)), tokens] - log_total
    return tokens, logps, log_total - np.einsum("nv,nv->n", p, z) / total[:, 0]


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    ends: Collection[int],
    max_tokens: int,
    temperature: float,
    key: tuple[int, int],
    unused: Sequence[int] = (),
    value: int | None = None,
    check: Check | None = None,
    world: World = ALONE,
) -> Rollouts:
    """Sample completions.

    Parameters
    ----------
    model : the policy
    prompts : P prompts of token ids, at least one each
    count : G, the number of completions of each
    ends : token ids that end a completion
    max_tokens : the most tokens of a completion; prompt and completion fit the context
    temperature : of the policy; 0 takes the likeliest token each time
    key : of the random numbers, such as seed and step
    unused : ids that are never drawn
    value : the id whose logit is the value of the text before each token
    check : called before each step of all; it may raise an error that ends the work. On several
        ranks, whose steps are not as many, it is `Stop.check` of one rank, and a stop ends all
    world : its ranks share the prompts, and each gets the completions of all

    Raises
    ------
    Diverged : the policy's logits are not finite
    StoppedError : a signal has come to a rank
    MemoryError : the keys and values of one group do not fit
    """
    S, share = len(prompts) * count, world.share(len(prompts))
    capacity = max(map(len, prompts)) + max_tokens - 1
    uniforms = np.random.Generator(np.random.Philox(key=list(key))).random((S, max_tokens))
    uniforms = uniforms[share.start * count : share.stop * count]
    own, error, stopped = None, "", False
    each_step: Callable[[], None] | None = check
    if check and world.size > 1:
        each_step = partial(check, here=True)
    try:
        own = _sampled(
            *(model, prompts[share], count, ends, capacity, temperature, uniforms),
            *(unused, value, each_step),
        )
    except Diverged as diverged:
        error = str(diverged)
    except StoppedError:
        stopped = True
    if world.any(stopped):
        raise StoppedError
    for told in world.all(error):
        if told:
            raise Diverged(told)
    assert own is not None
    return own if world.size == 1 else _gathered(own, prompts, world)


def _gathered(own: Rollouts, prompts: Sequence[Sequence[int]], world: World) -> Rollouts:
    """Return the completions of all ranks, those of their shares of the prompts."""
    ends = np.cumsum(world.rows(own.lengths))[:-1]

    def rows(each: Sequence[NDArray[Any]], dtype: Any) -> list[NDArray[Any]]:
        return np.split(world.rows(np.concatenate([np.zeros(0, dtype), *each])), ends)

    floats = [rows(each, np.float64) for each in (own.logps, own.entropies, own.values)]
    tokens = rows(own.completions, np.int32)
    return Rollouts(prompts, tokens, floats[0], floats[1], floats[2], world.rows(own.truncated))


def _sampled(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    ends: Collection[int],
    capacity: int,
    temperature: float,
    uniforms: Floats,
    unused: Sequence[int],
    value: int | None,
    check: Callable[[], None] | None,
) -> Rollouts:
    """Sample the completions of P prompts, see `sample`; `uniforms` are (P * G, max_tokens)."""
    P, G, (S, max_tokens) = len(prompts), count, uniforms.shape
    slots = _slots(model, capacity, G, P)
    decoder = model.decoder(slots, capacity)
    tokens = np.zeros((S, max_tokens), np.int32)
    logps, entropies, values = np.zeros((3, S, max_tokens))
    counts = np.zeros(S, np.int64)
    slot_of = np.zeros(S, np.int32)
    starts = np.repeat([len(prompt) for prompt in prompts], G)
    ended = np.zeros(S, np.bool_)
    ending, never = np.array(sorted(ends), np.int64), list(unused)

    def choose(rows: NDArray[np.int64], logits: NDArray[Any]) -> None:
        places = rows, counts[rows]
        if value is not None:
            values[places] = logits[:, value]
        logits[:, never] = -np.inf
        tokens[places], logps[places], entropies[places] = draw(
            logits, temperature, uniforms[places]
        )
        ended[rows] = (tokens[places][:, None] == ending).any(axis=1)
        counts[rows] += 1

    free, waiting, live = list(range(slots)), list(range(P)), np.empty(0, np.int64)
    while waiting or len(live):
        if check:
            check()
        while waiting and len(free) >= G:
            prompt = waiting.pop(0)
            group = np.arange(prompt * G, prompt * G + G)
            slot_of[group], free = free[:G], free[G:]
            first = decoder.read(np.array(prompts[prompt], np.int32), int(slot_of[group[0]]), 0)
            for row in group[1:]:
                decoder.copy(int(slot_of[group[0]]), int(slot_of[row]), len(prompts[prompt]))
            choose(group, np.tile(first, (G, 1)))
            live = np.concatenate([live, group])
        done = ended[live] | (counts[live] == max_tokens)
        free += slot_of[live[done]].tolist()
        live = live[~done]
        if len(live):
            newest = tokens[live, counts[live] - 1]
            positions = (starts[live] + counts[live] - 1).astype(np.int32)
            choose(live, decoder.step(newest, slot_of[live], positions))
    kept = [
        [row[:n].copy() for row, n in zip(rows, counts, strict=True)]
        for rows in (tokens, logps, entropies, values)
    ]
    return Rollouts(prompts, kept[0], kept[1], kept[2], kept[3], ~ended)


def _slots(model: LanguageModel, capacity: int, G: int, P: int) -> int:
    """Return how many completions run at a time, in whole groups."""
    config = model.config
    attention = config.stack().layers[0].attention
    one = 8 * config.n_layer * attention.KV * attention.HS * capacity + 32 * config.vocab_size
    return G * max(1, min(P, math.floor(MEMORY / (G * one))))
