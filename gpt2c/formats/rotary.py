"""The order of q's and k's rows: rotary positions turn pairs of a head's channels.

    gpt2c, Hugging Face                 i and i + HS / 2 are a pair
    Meta, llama2.c, llama.cpp           2i and 2i + 1 are one

The same model in the other order has the rows of its q and k in another order, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["FromAdjacent", "to_adjacent"]


@dataclass(frozen=True, eq=False)
class FromAdjacent:
    """A mapped weight of adjacent pairs, whose rows are put in gpt2c's order when it is read.

    Parameters
    ----------
    data : (heads * HS, C) float32
    HS : channels of a head
    """

    data: NDArray[Any]
    HS: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.data.shape

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the numbers in memory of their own."""
        pairs = self.data.reshape(-1, self.HS // 2, 2, self.data.shape[1])
        ordered = pairs.swapaxes(1, 2).reshape(self.data.shape)
        return ordered.astype(dtype or np.float32, copy=False)


def to_adjacent(weight: NDArray[Any], HS: int) -> NDArray[Any]:
    """Return a weight (heads * HS, C) of gpt2c with adjacent pairs."""
    rows = weight.reshape(-1, 2, HS // 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)
