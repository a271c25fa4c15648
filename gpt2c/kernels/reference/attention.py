"""Causal attention with many heads, over whole sequences or over a cache.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.op import TINY
from gpt2c.kernels.reference.dropout import keep_factors
from gpt2c.kernels.reference.rounding import on_factors, rounded

__all__ = ["attention_backward", "attention_forward"]

Array = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]


def _split(qkv: Array, C: int, NH: int) -> tuple[Array, Array, Array]:
    """View q (B, NH, T, HS), k and v (B, KV, T, HS) in qkv (B, T, W)."""
    KV = (qkv.shape[2] - C) * NH // (2 * C)
    q, k, v = np.split(qkv, [C, (C + qkv.shape[2]) // 2], axis=2)
    return _heads(q, NH), _heads(k, KV), _heads(v, KV)


def _for_each_query_head(heads: Array, NH: int) -> Array:
    """Repeat keys or values (B, KV, T, HS) for the query heads that share them: (B, NH, T, HS)."""
    repeated: Array = np.repeat(heads, NH // heads.shape[1], axis=1)
    return repeated


def _sum_over_group(heads: Array, KV: int) -> Array:
    """Return the sums (B, KV, T, HS) over the query heads (B, NH, T, HS) that share a key head."""
    B, NH, T, HS = heads.shape
    sums: Array = heads.reshape(B, KV, NH // KV, T, HS).sum(axis=2)
    return sums


def _sequences(offsets: IntArray) -> list[slice]:
    """Return the rows of each sequence of a ragged batch."""
    return [slice(start, end) for start, end in pairwise(offsets.tolist())]


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


def _keep(p: Array, dropout: float, key: int, first: int) -> Array:
    """Return what dropout multiplies the probabilities (B, NH, T, T) by, see `keep_factors`."""
    B, NH, T, _ = p.shape
    factors = keep_factors(B * T, NH, T, dropout, key, first).reshape(B, T, NH, T)
    return factors.swapaxes(1, 2).astype(p.dtype)


def _through_cache(
    rows: NDArray[Any], scales: NDArray[np.float32] | None, x: Array, position: int
) -> Array:
    """Write x (B, KV, T, HS) to a cache, rounded to its type; return all rows up to there, widened.

    int8 has a scale for each row: its largest magnitude becomes 127 steps. If that is at most TINY,
    all become 0. The steps are those of float32 in any dtype of x.
    """
    end = position + x.shape[2]
    new, seen = np.s_[:, :, position:end], np.s_[:, :, :end]
    if scales is None:
        with np.errstate(over="ignore"):  # from 65520 on a float16 is infinity
            rows[new] = x
        return rows[seen].astype(x.dtype, copy=False)
    narrow = x.astype(np.float32)
    largest = np.abs(narrow).max(axis=3, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > TINY)
    with np.errstate(invalid="ignore"):  # nan and infinity in a row make its scale nan
        rows[new] = np.rint(narrow * inverse)
        scales[new] = largest[..., 0] / np.float32(127) + (0 * narrow).sum(axis=3)
    widened: Array = rows[seen] * scales[seen][..., None].astype(x.dtype)
    return widened


@on_factors
def attention_forward(
    out: Array,
    lse: Array,
    keys: NDArray[Any] | None,
    values: NDArray[Any] | None,
    key_scales: NDArray[np.float32] | None,
    value_scales: NDArray[np.float32] | None,
    qkv: Array,
    offsets: IntArray | None,
    position: int,
    dropout: float,
    key: int,
    first: int,
    precision: str = "fp32",
) -> None:
    """Compute for each token, in each head, a weighted mean of the values up to that token.

    p = softmax(scores),   scores = q k^T / sqrt(HS) for keys not later than the query,   out = p v

    A row of qkv holds q of NH heads, then k and then v of KV heads: W = (NH + 2 KV) HS channels.
    With fewer key and value heads than query heads, NH / KV query heads share one (grouped-query
    attention). With a cache, the T tokens continue texts whose earlier keys and values the cache
    holds. A cache of 16 or 8 bits rounds them (number = scale * byte), those of the T tokens before
    any query sees them: a text read at once and in parts is the same. With dropout, random elements
    of p become 0 after the softmax, and the others are divided by 1 - dropout.

    Parameters
    ----------
    out : (B, T, C), written
    lse : (B, NH, T), written: log(sum(exp(scores))) over the keys, which is all that the backward
        pass needs of the T x T scores
    keys, values : (B, KV, P, HS), the cache: rows position to position + T are written, those
        before are read; the dtype of out, float16 or int8; None without a cache
    key_scales, value_scales : (B, KV, P) float32, the scales of an int8 cache's rows, written and
        read with them; else None
    qkv : (B, T, W), a row holds q of NH heads, then k and then v of KV heads, W = C + 2 KV HS
    offsets : (S,) int32, the first row of each sequence of a ragged batch, then T; or None
    position : position in its text of the first of the T tokens; position + T <= P; 0 without a
        cache
    dropout, key, first : see `dropout_forward`; a row is a token of the batch, a column a key of
        its sequence, and each head has its own; dropout is 0 with a cache
    precision : "bf16" rounds the factors of both products to 16 bits, see `matmul_forward`; a
        kernel rounds multiples of p. "fp16" does not round

    Source: Vaswani et al. 2017, arXiv:1706.03762; lse: Dao et al. 2022, arXiv:2205.14135; grouped
    queries: Ainslie et al. 2023, arXiv:2305.13245.

    Examples
    --------
    >>> qkv = np.zeros((1, 3, 6), np.float32)  # q and k are 0: each key counts as much as any other
    >>> qkv[0, :, 4:] = [[1, 0], [3, 0], [8, 0]]  # v
    >>> out, lse = gpt2c.ops.attention_forward(qkv, n_head=1)
    >>> out[0, :, 0].round(3).tolist()  # the mean of the values up to there
    [1.0, 2.0, 4.0]
    """
    if offsets is not None:
        for rows in _sequences(offsets):
            parts = out[:, rows], lse[:, :, rows], None, None, None, None, qkv[:, rows]
            attention_forward(*parts, None, 0, dropout, key, first + rows.start, precision)
        return
    NH = lse.shape[1]
    q, k, v = _split(qkv, out.shape[2], NH)
    if keys is not None and values is not None:
        k = _through_cache(keys, key_scales, k, position)
        v = _through_cache(values, value_scales, v, position)
    q, k, v = rounded(precision, q, k, v)
    scores = _causal_scores(q, _for_each_query_head(k, NH))
    largest = scores.max(axis=3, keepdims=True)  # subtracted first, so that exp cannot overflow
    p = np.exp(scores - largest)
    total = p.sum(axis=3, keepdims=True)
    lse[...] = (largest + np.log(total))[..., 0]
    if dropout:
        p *= _keep(p, dropout, key, first)
    (p,) = rounded(precision, p / total)
    _heads(out, NH)[...] = p @ _for_each_query_head(v, NH)


@on_factors
def attention_backward(
    dqkv: Array,
    dout: Array,
    qkv: Array,
    out: Array,
    lse: Array,
    offsets: IntArray | None,
    dropout: float,
    key: int,
    first: int,
    precision: str = "fp32",
) -> None:
    """Write the gradient of q, k and v; recompute the softmax from `lse`.

    dv = p^T dout,   dscores = p * (dout v^T - sum(dout * out)),   p = exp(scores - lse)
    dq = dscores k / sqrt(HS),   dk = dscores^T q / sqrt(HS)

    With dropout, p in dv and dout v^T are multiplied by the factors of the forward pass.

    Parameters
    ----------
    dqkv : (B, T, W), written; may be qkv
    dout : (B, T, C)
    qkv, out, lse, offsets, dropout, key, first, precision : the inputs and the outputs of the
        forward pass

    Examples
    --------
    >>> qkv = np.zeros((1, 3, 6), np.float32)
    >>> out, lse = gpt2c.ops.attention_forward(qkv, n_head=1)
    >>> dout = np.zeros_like(out)
    >>> dout[0, 1] = 1  # the second query sees two keys, and not the third
    >>> gpt2c.ops.attention_backward(dout, qkv, out, lse)[0, :, 4].round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    if offsets is not None:
        for rows in _sequences(offsets):
            parts = dqkv[:, rows], dout[:, rows], qkv[:, rows], out[:, rows]
            own = dropout, key, first + rows.start
            attention_backward(*parts, lse[:, :, rows], None, *own, precision)
        return
    C, NH = out.shape[2], lse.shape[1]
    q, k, v = _split(qkv, C, NH)
    dq, dk, dv = _split(dqkv, C, NH)
    KV = k.shape[1]
    q, k, v = rounded(precision, q, k, v)
    k, v = _for_each_query_head(k, NH), _for_each_query_head(v, NH)
    dout, out = _heads(dout, NH), _heads(out, NH)
    p = np.exp(_causal_scores(q, k) - lse[..., None])
    delta = (dout * out).sum(axis=3, keepdims=True)
    (dout,) = rounded(precision, dout)
    # out = dropped v
    dp, dropped = dout @ v.swapaxes(2, 3), p
    if dropout:  # dropped = p * keep
        keep = _keep(p, dropout, key, first)
        dp, dropped = dp * keep, p * keep
    # p = softmax(scores): dscores = p * (dp - sum(p * dp)), where the sum over keys of p * dp
    # equals the sum over channels of dout * out
    dscores = p * (dp - delta)
    # scores = q k^T / sqrt(HS)
    dscores /= math.sqrt(q.shape[3])
    dscores, dropped = rounded(precision, dscores, dropped)
    dq[...], dk[...] = dscores @ k, _sum_over_group(dscores.swapaxes(2, 3) @ q, KV)
    dv[...] = _sum_over_group(dropped.swapaxes(2, 3) @ dout, KV)
