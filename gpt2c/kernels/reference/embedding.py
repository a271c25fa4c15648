"""Embedding: token ids -> vectors, token and position.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.reference.linear import MIDDLE

__all__ = ["encoder_backward", "encoder_forward"]

Array = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]


def encoder_forward(
    out: Array, idx: IntArray, wte: NDArray[Any], wpe: Array, scale: Array | None, position: int
) -> None:
    """Look up the vector of each token and add the vector of its position.

    out = W[idx] + wpe[position..position + T),   W = wte, or scale * (wte - 128) for uint8

    Parameters
    ----------
    out : (B, T, C), written
    idx : (B, T) int32, token ids in [0, V)
    wte : (V, C) token vectors, of the dtypes of `matmul_forward`'s weight
    wpe : (at least position + T, C) position vectors
    scale : (V,) for uint8, else None
    position : position in its text of the first of the T tokens

    Source: Radford et al. 2019 (GPT-2); names follow karpathy/llm.c.
    """
    tokens = wte[idx].astype(out.dtype, copy=False)
    if scale is not None:
        tokens = (tokens - out.dtype.type(MIDDLE)) * scale[idx, None]
    out[...] = tokens + wpe[position : position + idx.shape[1]]


def encoder_backward(dwte: Array, dwpe: Array, dout: Array, idx: IntArray) -> None:
    """Add the gradient of each output row to those of its token vector and its position vector.

    Parameters
    ----------
    dwte, dwpe : (V, C), (at least T, C), accumulated
    dout : (B, T, C)
    idx : (B, T) int32
    """
    # out = wte[idx] + wpe[0..T). A row of wte that several tokens use gets the sum of their
    # gradients; dwte[idx] += dout would add only one of them.
    np.add.at(dwte, idx, dout)
    dwpe[: idx.shape[1]] += dout.sum(axis=0)
