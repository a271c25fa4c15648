"""The order of q's and k's rows: rotary positions turn pairs of a head's channels.

    gpt2c, Hugging Face                 i and i + HS / 2 are a pair
    Meta, llama2.c, llama.cpp           2i and 2i + 1 are one

The same model in the other order has the rows of its q and k in another order, and nothing else.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

__all__ = ["halves", "to_adjacent"]


def halves(weight: NDArray[Any], HS: int) -> list[NDArray[Any]]:
    """Return the rows of a weight (heads * HS, C) of adjacent pairs in gpt2c's order, as views.

    Of each head they are the first row of all pairs, then the second.
    """
    heads = weight.reshape(-1, HS, weight.shape[1])
    return [head[first::2] for head in heads for first in (0, 1)]


def to_adjacent(weight: NDArray[Any], HS: int) -> NDArray[Any]:
    """Return a weight (heads * HS, C) of gpt2c with adjacent pairs."""
    rows = weight.reshape(-1, 2, HS // 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)
