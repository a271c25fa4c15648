"""From logits to tokens: sampling, and the loop that feeds each token back.

Knows nothing about models and tokenizers: it is given a function from token ids to the logits of
the token that follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def sample(
    logits: NDArray[Any],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw one token per row from softmax(logits / temperature).

    The order is Hugging Face's: temperature, then `top_k`, then `top_p`. One uniform number is
    drawn per row (none when greedy), so a row's token depends on its place in the batch but not on
    the other rows' logits.

    Parameters
    ----------
    logits : (B, V) floats, computed with in float64
    temperature : 0 takes the largest logit (the first of equals), 1 the model's own distribution
    top_k : keep the k largest logits (of equals the lower ids), None keeps all
    top_p : keep the most probable tokens until their probability reaches top_p, always at least one
        (nucleus sampling, Holtzman et al., arXiv:1904.09751), None keeps all
    rng : where the uniform numbers come from

    Returns
    -------
    (B,) int64 token ids

    Raises
    ------
    ValueError : a setting is out of range, or logits are not 2-D or hold nan or infinity
    """
    _check_settings(temperature, top_k, top_p)
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits of shape (B, V) are wanted, got {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError(
            "logits hold nan or infinity; the model's weights have diverged or are damaged"
        )
    if temperature == 0:
        return np.asarray(np.argmax(logits, axis=1), dtype=np.int64)
    draws = rng.random(len(logits))
    tokens = [
        _sample_row(row, temperature, top_k, top_p, draw)
        for row, draw in zip(logits, draws, strict=True)
    ]
    return np.array(tokens, dtype=np.int64)


def _sample_row(
    logits: NDArray[np.float64],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    draw: float,
) -> int:
    """Invert the cumulative distribution of one row, logits (V,), at `draw` in [0, 1)."""
    candidates = np.arange(len(logits))
    if top_k is not None and top_k < len(logits):
        # A partition is several times cheaper than sorting a whole vocabulary; all equals at the
        # cut pass it, the sort below decides among them.
        candidates = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    if top_k is not None or top_p is not None:
        # A stable sort breaks ties by id, the same on every machine.
        candidates = candidates[np.argsort(-logits[candidates], kind="stable")][:top_k]
    # A tiny temperature sends all but the largest to exp(-inf) = 0.
    with np.errstate(over="ignore"):
        weights = np.exp((logits[candidates] - logits.max()) / temperature)
    cumulative = np.cumsum(weights)
    if top_p is not None:
        cumulative = cumulative[: np.searchsorted(cumulative, top_p * cumulative[-1]) + 1]
    return int(candidates[np.searchsorted(cumulative, draw * cumulative[-1], side="right")])


def stream(
    next_logits: Callable[[NDArray[np.int64]], NDArray[Any]],
    idx: NDArray[Any],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | Collection[int] | None = None,
) -> Iterator[NDArray[np.int64]]:
    """Continue a batch of prompts, yielding each step's tokens as soon as they are drawn.

    A row that has produced a stop token goes on producing that token; when every row has, the loop
    ends. The stop token itself is yielded.

    Parameters
    ----------
    next_logits : maps all token ids so far, (B, T) int64, to the logits (B, V) of what follows
    idx : (B, T) ints, the prompts, T >= 1
    max_new_tokens : the most tokens to add to each row
    temperature, top_k, top_p : see `sample`
    seed : the same seed and logits give the same tokens; None takes a fresh seed from the system
    stop : a token id, or several, that end a row; None goes on to `max_new_tokens`

    Returns
    -------
    an iterator of (B,) int64 arrays

    Raises
    ------
    ValueError : an argument is out of range (at the call, not at the first token), or logits are
        not finite
    """
    _check_settings(temperature, top_k, top_p)
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be at least 0, or None for a fresh one, got {seed}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    idx = np.asarray(idx)
    if idx.ndim != 2 or idx.size == 0 or idx.dtype.kind not in "iu":
        raise ValueError(
            "idx must be integer token ids of shape (B, T) with T >= 1, "
            f"got shape {idx.shape} and dtype {idx.dtype}"
        )
    stop_ids = [] if stop is None else list(stop) if isinstance(stop, Collection) else [stop]

    def steps() -> Iterator[NDArray[np.int64]]:
        rng = np.random.default_rng(seed)
        ids = idx.astype(np.int64)
        stopped = np.zeros(len(ids), dtype=bool)
        for _ in range(max_new_tokens):
            drawn = sample(next_logits(ids), temperature, top_k, top_p, rng)
            tokens = np.where(stopped, ids[:, -1], drawn)
            ids = np.concatenate([ids, tokens[:, None]], axis=1)
            stopped |= np.isin(tokens, stop_ids)
            yield tokens
            if stopped.all():
                return

    return steps()


def _check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None to keep every token, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p must be above 0 and at most 1, or None to keep every token, got {top_p}"
        )
