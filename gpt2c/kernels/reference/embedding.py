"""Embedding: token ids -> vectors, token and position.

`gpt2c.kernels.reference` says what holds for all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["encoder_backward", "encoder_forward"]

Array = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]


def encoder_forward(out: Array, idx: IntArray, wte: Array, wpe: Array) -> None:
    """Look up the vector of each token and add the vector of its position.

    out = wte[idx] + wpe[0..T)

    Parameters
    ----------
    out : (B, T, C), written
    idx : (B, T) int32, token ids in [0, V)
    wte, wpe : (V, C) token vectors, (at least T, C) position vectors

    Source: Radford et al. 2019 (GPT-2); names follow karpathy/llm.c.
    """
    out[...] = wte[idx] + wpe[: idx.shape[1]]


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
