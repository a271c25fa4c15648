"""The specification, continued: the ops that only read a model, to score or generate text.

Linear layers whose weights have 32, 16 or 8 bits, and attention over a cache of keys and values.
They are ops of `gpt2c.reference`, which stands for all of them; only the file is another. Knows
nothing about models, backends or C.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

MIDDLE = 128  # a weight of 8 bits has no sign: 0 is stored as this
LONGEST = 65536  # channels: the sums of so many products of 8 bits fit 32
TINY = 1e-36  # a row with nothing larger counts as zeros: 127 / largest stays finite in float32


def matrix_transpose(out: NDArray[Any], x: NDArray[Any]) -> None:
    """Transpose a matrix: Linear weights on disk are Hugging Face's (C, OC), in memory (OC, C).

    out = x^T

    Parameters
    ----------
    out : (C, R), written
    x : (R, C)
    """
    out[...] = x.T


def linear_forward(
    out: Array, x: Array, weight: NDArray[Any], scale: Array | None, bias: Array | None
) -> None:
    """Apply a linear layer whose weights may be small.

    out = x W^T + bias,   W = weight, or scale * (weight - 128) for weights of 8 bits

    With weights of 8 bits each row of x is rounded to 8 bits too, x = x_scale * x8 with x8 in
    [-127, 127], so that the sums are of integers and exact:
    out = sum((weight - 128) * x8) * (x_scale * scale) + bias

    Parameters
    ----------
    out : (N, OC), written
    x : (N, C)
    weight : (OC, C), float32, float16 without nan and infinity, or uint8, then C <= LONGEST
    scale : (OC,) for uint8, else None
    bias : (OC,), or None for none

    Source: dynamic quantization by rows, Dettmers et al. 2022, arXiv:2208.07339, without its
    outliers.
    """
    if weight.dtype == np.uint8:
        assert scale is not None
        largest = np.abs(x).max(axis=1, keepdims=True)
        inverse = np.divide(127, largest, out=np.zeros_like(largest), where=largest > TINY)
        with np.errstate(invalid="ignore"):  # nan and infinity in a row make its scale nan
            x8 = np.rint(x * inverse).astype(np.int64)
            x_scale = largest / x.dtype.type(127) + (0 * x).sum(axis=1, keepdims=True)
        sums = x8 @ (weight.astype(np.int64) - MIDDLE).T
        out[...] = sums.astype(x.dtype) * (x_scale * scale)
    else:
        out[...] = x @ weight.astype(x.dtype, copy=False).T
    if bias is not None:
        out += bias


def cache_attention_forward(
    out: Array, keys: Array, values: Array, qkv: Array, position: int
) -> None:
    """Let new tokens attend to those before them, whose keys and values are cached, and themselves.

    out = softmax(q k^T / sqrt(HS)) v for keys not later than the query

    Parameters
    ----------
    out : (T, C), written
    keys, values : (NH, P, HS), rows position to position + T are written, those before read
    qkv : (T, 3C), a row holds the q, then the k, then the v of all NH heads
    position : where in the text the first of the T tokens stands; position + T <= P

    Source: see `gpt2c.reference.attention_forward`.
    """
    NH, _, HS = keys.shape
    T = len(qkv)
    end = position + T
    q, k, v = qkv.reshape(T, 3, NH, HS).transpose(1, 2, 0, 3)
    keys[:, position:end], values[:, position:end] = k, v
    scores = q @ keys[:, :end].swapaxes(1, 2) / math.sqrt(HS)
    scores[:, np.triu(np.ones((T, end), dtype=np.bool_), k=position + 1)] = -np.inf
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    attended = p / p.sum(axis=2, keepdims=True) @ values[:, :end]
    out[...] = attended.transpose(1, 0, 2).reshape(T, NH * HS)
