"""Rounding to 16 bits, as the products of a training step in 16 bits round their factors.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bf16", "rounded"]


def bf16(x: NDArray[Any]) -> NDArray[Any]:
    """Return the nearest bfloat16 numbers, in the dtype of x.

    They have float32's range and 8 bits of precision: they are the upper half of a float32. Of two
    that are as near the even one is taken. Numbers below 2^-126 become 0 of their sign, as the
    instructions of AVX512_BF16 have it; infinity and nan stay.

    Source: Intel, bfloat16 Hardware Numerics Definition, 2018.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    nearest = np.where(np.isnan(x), bits | 0x00400000, nearest) & np.uint32(0xFFFF0000)
    tiny = np.abs(x) < np.float32(2.0**-126)
    found = np.where(tiny, bits & np.uint32(0x80000000), nearest).view(np.float32)
    return found.reshape(x.shape).astype(x.dtype, copy=False)


def rounded(precision: str, *factors: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Return the factors of products of this precision: as they are, or nearest bfloat16."""
    return tuple(map(bf16, factors)) if precision == "bf16" else factors
