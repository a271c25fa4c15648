"""Embedding: token ids -> vectors, token and position; rotary positions.

`gpt2c.kernels.reference` says what holds for all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.reference.linear import MIDDLE

__all__ = ["encoder_backward", "encoder_forward", "rope_backward", "rope_forward"]

Array = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]


def encoder_forward(
    out: Array, idx: IntArray, wte: NDArray[Any], wpe: Array, scale: Array | None, position: int
) -> None:
    """Look up the vector of each token and add the vector of its position.

    out = W[idx] + wpe[position..position + T),   W = wte, or scale * (wte - 128) of 8 bits

    Parameters
    ----------
    out : (B, T, C), written
    idx : (B, T) int32, token ids in [0, V)
    wte : (V, C) token vectors, of the types of `matmul_forward`'s weight
    wpe : (at least position + T, C) position vectors
    scale : (V,) for uint8, else None
    position : where in its text the first of the T tokens stands

    Source: Radford et al. 2019 (GPT-2); names follow karpathy/llm.c.
    """
    tokens = wte[idx].astype(out.dtype, copy=False)
    if scale is not None:
        tokens = (tokens - out.dtype.type(MIDDLE)) * scale[idx, None]
    out[...] = tokens + wpe[position : position + idx.shape[1]]


def encoder_backward(dwte: Array, dwpe: Array, dout: Array, idx: IntArray) -> None:
    """Add the gradient of each output row to the token vector and the position vector it came from.

    Parameters
    ----------
    dwte, dwpe : (V, C), (at least T, C), accumulated
    dout : (B, T, C)
    idx : (B, T) int32
    """
    # out = wte[idx] + wpe[0..T): a row of wte that several tokens use gets the sum of their
    # gradients, which dwte[idx] += dout would not do (it keeps one of them)
    np.add.at(dwte, idx, dout)
    dwpe[: idx.shape[1]] += dout.sum(axis=0)


def rope_forward(out: Array, qkv: Array, cos: Array, sin: Array, heads: int, position: int) -> None:
    """Turn each pair of channels of q and k by an angle that its position decides.

    out_i = x_i cos - x_j sin,   out_j = x_j cos + x_i sin,   j = i + D, for each head x

    A row of qkv holds heads of 2D channels: the q, then the k, then the v. The values stay as they
    are.

    Parameters
    ----------
    out : (B, T, C), written; may be `qkv`
    qkv : (B, T, C)
    cos, sin : (at least position + T, D), a row for each position, an angle for each pair
    heads : how many heads of a row are turned, the first ones: those of q and of k
    position : where in its text the first of the T tokens stands

    Source: Su et al. 2021, arXiv:2104.09864; the pairs are those of transformers' rotate_half.
    """
    (B, T, _), D = qkv.shape, cos.shape[1]
    x = qkv.reshape(B, T, -1, 2, D)[:, :, :heads].copy()  # out may be qkv
    out[...] = qkv
    turned = out.reshape(B, T, -1, 2, D)[:, :, :heads]
    c, s = (table[position : position + T, None] for table in (cos, sin))
    turned[..., 0, :] = x[..., 0, :] * c - x[..., 1, :] * s
    turned[..., 1, :] = x[..., 1, :] * c + x[..., 0, :] * s


def rope_backward(
    dqkv: Array, dout: Array, cos: Array, sin: Array, heads: int, position: int
) -> None:
    """Write the gradient of qkv: the gradient of a turned pair is turned back.

    dx_i = dout_i cos + dout_j sin,   dx_j = dout_j cos - dout_i sin,   j = i + D

    Parameters
    ----------
    dqkv : (B, T, C), written; may be `dout`
    dout : (B, T, C)
    cos, sin, heads, position : as in the forward pass
    """
    # out_i = x_i cos - x_j sin,   out_j = x_j cos + x_i sin
    rope_forward(dqkv, dout, cos, -sin, heads, position)
