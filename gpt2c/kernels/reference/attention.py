"""Causal attention with many heads, over whole sequences or over a cache.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["attention_backward", "attention_forward"]

Array = NDArray[np.floating[Any]]


def _heads(rows: Array, NH: int) -> Array:
    """Return (B, T, C) as a view (B, NH, T, HS); a write to the view changes `rows`."""
    return rows.reshape(*rows.shape[:2], NH, -1).transpose(0, 2, 1, 3)


def _causal_scores(q: Array, k: Array) -> Array:
    """Return q k^T / sqrt(HS), (B, NH, T, P), with -inf where the key comes after the query.

    The queries are the last T of the P tokens.
    """
    (T, HS), P = q.shape[2:], k.shape[2]
    scores = q @ k.swapaxes(2, 3) / math.sqrt(HS)
    scores[..., np.triu(np.ones((T, P), dtype=np.bool_), k=P - T + 1)] = -np.inf
    return scores


def attention_forward(
    out: Array,
    lse: Array | None,
    keys: Array | None,
    values: Array | None,
    qkv: Array,
    position: int,
) -> None:
    """Compute for each token, in each head, a weighted mean of the values up to that token.

    p = softmax(scores),   scores = q k^T / sqrt(HS) for keys not later than the query,   out = p v

    With a cache, the T tokens continue texts whose earlier keys and values the cache holds.

    Parameters
    ----------
    out : (B, T, C), written
    lse : (B, NH, T), written: log(sum(exp(scores))) over the keys, which is all that the backward
        pass needs of the T x T scores; None with a cache, where no backward follows
    keys, values : (B, NH, P, HS), the cache: rows position to position + T are written, those
        before are read; None without a cache
    qkv : (B, T, 3C), a row holds the q, then the k, then the v of all NH heads
    position : position in its text of the first of the T tokens; position + T <= P; 0 without a
        cache

    Source: Vaswani et al. 2017, arXiv:1706.03762; lse: Dao et al. 2022, arXiv:2205.14135.
    """
    NH = keys.shape[1] if keys is not None else lse.shape[1]  # type: ignore[union-attr]
    q, k, v = (_heads(part, NH) for part in np.split(qkv, 3, axis=2))
    if keys is not None and values is not None:
        end = position + qkv.shape[1]
        keys[:, :, position:end], values[:, :, position:end] = k, v
        k, v = keys[:, :, :end], values[:, :, :end]
    scores = _causal_scores(q, k)
    largest = scores.max(axis=3, keepdims=True)  # subtracted first, so that exp cannot overflow
    p = np.exp(scores - largest)
    total = p.sum(axis=3, keepdims=True)
    if lse is not None:
        lse[...] = (largest + np.log(total))[..., 0]
    _heads(out, NH)[...] = (p / total) @ v


def attention_backward(dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array) -> None:
    """Write the gradient of q, k and v; recompute the softmax from `lse`.

    dv = p^T dout,   dscores = p * (dout v^T - sum(dout * out)),   p = exp(scores - lse)
    dq = dscores k / sqrt(HS),   dk = dscores^T q / sqrt(HS)

    Parameters
    ----------
    dqkv : (B, T, 3C), written; may be qkv
    dout : (B, T, C)
    qkv, out, lse : the input and the outputs of the forward pass
    """
    NH = lse.shape[1]
    q, k, v = (_heads(part, NH) for part in np.split(qkv, 3, axis=2))
    dq, dk, dv = (_heads(part, NH) for part in np.split(dqkv, 3, axis=2))
    dout, out = _heads(dout, NH), _heads(out, NH)
    p = np.exp(_causal_scores(q, k) - lse[..., None])
    # out = p v
    dp = dout @ v.swapaxes(2, 3)
    # p = softmax(scores): dscores = p * (dp - sum(p * dp)), where the sum over keys of p * dp
    # equals the sum over channels of dout * out
    dscores = p * (dp - (dout * out).sum(axis=3, keepdims=True))
    # scores = q k^T / sqrt(HS)
    dscores /= math.sqrt(q.shape[3])
    dq[...], dk[...] = dscores @ k, dscores.swapaxes(2, 3) @ q
    dv[...] = p.swapaxes(2, 3) @ dout
