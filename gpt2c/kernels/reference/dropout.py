"""Dropout: elements of a batch become 0 at random; a counter decides which, and no state.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["dropout_forward", "keep_factors", "philox"]

Array = NDArray[np.floating[Any]]
Words = NDArray[np.uint64]  # numbers of 32 bits; 64 hold the product of two

ROUNDS = 7  # the fewest with which Philox passes every test of Crush and BigCrush
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
STEPS = 0x9E3779B9, 0xBB67AE85
LOW, HALF = np.uint64(2**32 - 1), np.uint64(32)


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> list[Words]:
    """Return four random words for each counter of four words: the generator Philox 4x32-7.

    The words of two counters, or of two keys, look independent even if one bit differs.

    Parameters
    ----------
    counter : four arrays of shapes that broadcast, numbers of 32 bits
    key : a number of 64 bits

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
    doi:10.1145/2063384.2063405.
    """
    a, b, c, d = counter
    keys = key % 2**32, key >> 32
    for number in range(ROUNDS):
        low, high = (
            np.uint64((word + number * step) % 2**32)
            for word, step in zip(keys, STEPS, strict=True)
        )
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            (second >> HALF) ^ b ^ low,
            second & LOW,
            (first >> HALF) ^ d ^ high,
            first & LOW,
        )
    return [a, b, c, d]


def keep_factors(
    N: int, NH: int, columns: int, dropout: float, key: int, first: int
) -> NDArray[np.float64]:
    """Return what dropout multiplies by, (N, NH, columns): 0, or 1 / (1 - dropout) where it keeps.

    Column j in head h of token i is word j % 4 of the counter (j // 4, h, first + i), of which the
    last number has 64 bits. It stays if its word is at least dropout * 2^32.
    """
    tokens = np.arange(N, dtype=np.uint64)[:, None, None] + np.uint64(first)
    heads = np.arange(NH, dtype=np.uint64)[:, None]
    blocks = np.arange(-(-columns // 4), dtype=np.uint64)
    words = np.stack(philox((blocks, heads, tokens & LOW, tokens >> HALF), key), axis=-1)
    kept = words.reshape(N, NH, -1)[..., :columns] >= int(dropout * 2**32)
    factors: NDArray[np.float64] = kept / (1 - dropout)
    return factors


def dropout_forward(out: Array, x: Array, dropout: float, key: int, first: int) -> None:
    """Set random elements to 0 and divide the others by 1 - dropout, so that the mean stays.

    out = x * factor,   factor = 0 with probability dropout, else 1 / (1 - dropout)

    A factor is a function of dropout, key, column and the row's number, which is first for the
    first row. The gradient of x is that of out times the same factors, so it has no op of its own.

    Parameters
    ----------
    out : (N, C), written; may be `x`
    x : (N, C)
    dropout : the probability in [0, 1) that an element becomes 0
    key : a number of 64 bits that decides which
    first : the number of the first row, of 64 bits. A model takes the lower 32 for the token, and
        the upper 32 for the place: rows of a batch do not reach the next place

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from
    overfitting".

    Examples
    --------
    >>> out = gpt2c.ops.dropout_forward(np.ones((100, 100), np.float32), dropout=0.5, key=1)
    >>> sorted({*out.flat}) == [0, 2], 0.9 < float(out.mean()) < 1.1
    (True, True)
    """
    out[...] = x * keep_factors(len(x), 1, x.shape[1], dropout, key, first)[:, 0].astype(x.dtype)
