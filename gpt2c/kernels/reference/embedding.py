"""Embedding: token ids -> vectors, token and position; rotary positions.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.op import MIDDLE
from gpt2c.kernels.reference.rounding import on_factors

__all__ = ["encoder_backward", "encoder_forward", "rope_backward", "rope_forward"]

Array = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]


def _times(rows: NDArray[Any], offsets: IntArray | None) -> IntArray:
    """Return where in its sequence each of the T tokens of a row stands, (T,)."""
    t = np.arange(rows.shape[1], dtype=np.int32)
    return t if offsets is None else t - np.repeat(offsets[:-1], np.diff(offsets))


def encoder_forward(
    out: Array,
    idx: IntArray,
    wte: NDArray[Any],
    wpe: Array | None,
    scale: Array | None,
    offsets: IntArray | None,
    position: int,
) -> None:
    """Look up the vector of each token and add the vector of its position.

    out = W[idx] + wpe[position + t],   W = wte, or scale * (wte - 128) for uint8

    Parameters
    ----------
    out : (B, T, C), written
    idx : (B, T) int32, token ids in [0, V)
    wte : (V, C) token vectors, of the dtypes of `matmul_forward`'s weight
    wpe : (at least position + T, C) position vectors, or None without positions
    scale : (V,) for uint8, else None
    offsets : (S,) int32, the first row of each sequence of a ragged batch, then T; or None
    position : position in its text of the first of the T tokens

    Source: Radford et al. 2019 (GPT-2); names follow karpathy/llm.c.

    Examples
    --------
    >>> wte = np.array([[0, 0], [1, 1], [2, 2]], np.float32)  # a vector for each of three tokens
    >>> wpe = np.array([[0.1, 0], [0.2, 0]], np.float32)  # and for each of two positions
    >>> gpt2c.ops.encoder_forward(np.array([[2, 1]], np.int32), wte, wpe).round(1)
    array([[[2.1, 2. ],
            [1.2, 1. ]]], dtype=float32)
    """
    tokens = wte[idx].astype(out.dtype, copy=False)
    if scale is not None:
        tokens = (tokens - out.dtype.type(MIDDLE)) * scale[idx, None]
    out[...] = tokens if wpe is None else tokens + wpe[position + _times(idx, offsets)]


def encoder_backward(
    dwte: Array | None, dwpe: Array | None, dout: Array, idx: IntArray, offsets: IntArray | None
) -> None:
    """Add the gradient of each output row to those of its token vector and its position vector.

    Parameters
    ----------
    dwte, dwpe : (V, C), (at least T, C), accumulated; or None where it is not wanted
    dout : (B, T, C)
    idx : (B, T) int32
    offsets : see `encoder_forward`

    Examples
    --------
    >>> idx, dout = np.array([[2, 0, 2]], np.int32), np.ones((1, 3, 2), np.float32)
    >>> dwte, dwpe = gpt2c.ops.encoder_backward(dout, idx, vocab_size=3, n_positions=4)
    >>> dwte[:, 0].tolist(), dwpe[:, 0].tolist()  # token 2 came twice, and position 3 never
    ([1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 0.0])
    """
    # out = wte[idx] + wpe[t]. A row of wte that several tokens use gets the sum of their gradients;
    # dwte[idx] += dout would add only one of them.
    if dwte is not None:
        np.add.at(dwte, idx, dout)
    if dwpe is not None:
        np.add.at(dwpe, _times(idx, offsets), dout.sum(axis=0))


@on_factors
def rope_forward(
    out: Array,
    qkv: Array,
    cos: Array,
    sin: Array,
    offsets: IntArray | None,
    heads: int,
    position: int,
) -> None:
    """Turn each pair of channels of q and k by an angle that its position decides.

    out_i = x_i cos - x_j sin,   out_j = x_j cos + x_i sin,   j = i + D, for each head x

    A row of qkv holds heads of 2D channels: the q, then the k, then the v. The first `heads` are
    turned: NH + KV leaves the values as they are. A row of cos and sin belongs to a position.

    Parameters
    ----------
    out : (B, T, W), written; may be `qkv`
    qkv : (B, T, W)
    cos, sin : (at least position + T, D), a row for each position, an angle for each pair
    offsets : (S,) int32, the first row of each sequence of a ragged batch, then T; or None
    heads : the number of heads of a row that are turned, the first ones: those of q and of k
    position : position in its text of the first of the T tokens

    Source: Su et al. 2021, arXiv:2104.09864; the pairs are those of transformers' rotate_half.

    Examples
    --------
    >>> angles = np.pi / 3 * np.arange(3)[:, None]  # 60 degrees for each position, for one pair
    >>> cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    >>> qkv = np.array([[[1, 0, 1, 0, 5, 5]]], np.float32)  # q, k and v of a head of two channels
    >>> gpt2c.ops.rope_forward(qkv, cos, sin, heads=2, position=1).round(2)
    array([[[0.5 , 0.87, 0.5 , 0.87, 5.  , 5.  ]]], dtype=float32)
    """
    (B, T, _), D = qkv.shape, cos.shape[1]
    x = qkv.reshape(B, T, -1, 2, D)[:, :, :heads].copy()  # out may be qkv
    out[...] = qkv
    turned = out.reshape(B, T, -1, 2, D)[:, :, :heads]
    c, s = (table[position + _times(qkv[..., 0], offsets), None] for table in (cos, sin))
    turned[..., 0, :] = x[..., 0, :] * c - x[..., 1, :] * s
    turned[..., 1, :] = x[..., 1, :] * c + x[..., 0, :] * s


def rope_backward(
    dqkv: Array,
    dout: Array,
    cos: Array,
    sin: Array,
    offsets: IntArray | None,
    heads: int,
    position: int,
) -> None:
    """Write the gradient of qkv: the gradient of a turned pair is turned back.

    dx_i = dout_i cos + dout_j sin,   dx_j = dout_j cos - dout_i sin,   j = i + D

    Parameters
    ----------
    dqkv : (B, T, W), written; may be `dout`
    dout : (B, T, W)
    cos, sin, offsets, heads, position : as in the forward pass

    Examples
    --------
    >>> angles = np.arange(3)[:, None]
    >>> cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    >>> qkv = np.arange(18, dtype=np.float32).reshape(1, 3, 6)
    >>> turned = gpt2c.ops.rope_forward(qkv, cos, sin, heads=2)
    >>> back = gpt2c.ops.rope_backward(turned, cos, sin, heads=2)
    >>> bool(np.allclose(back, qkv, atol=1e-5))
    True
    """
    # out_i = x_i cos - x_j sin,   out_j = x_j cos + x_i sin
    rope_forward(dqkv, dout, cos, -sin, offsets, heads, position)
