"""The order of q's and k's rows: rotary positions turn pairs of a head's channels.

    gpt2c, Hugging Face                 i and i + HS / 2 are a pair
    Meta, llama2.c, llama.cpp           2i and 2i + 1 are one

The same model in the other order has the rows of its q and k in another order, and nothing else.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

__all__ = ["to_adjacent", "to_halves"]


def to_halves(weight: NDArray[Any], HS: int) -> NDArray[Any]:
    """Return a weight (heads * HS, C) of adjacent pairs with those of gpt2c."""
    pairs = weight.reshape(-1, HS // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def to_adjacent(weight: NDArray[Any], HS: int) -> NDArray[Any]:
    """Return a weight (heads * HS, C) of gpt2c with adjacent pairs: the inverse of `to_halves`."""
    halves = weight.reshape(-1, 2, HS // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
