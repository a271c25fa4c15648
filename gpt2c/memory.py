"""Flat memory with named views: one buffer for all parameters, one for gradients (as llm.c).

Knows nothing about what the names mean. Used by model; the optimizer sees the flat buffers only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

ALIGNMENT = 16  # floats: 64 bytes, one cache line and the widest vector


def aligned_zeros(size: int) -> Array:
    """Zeros (size,) float32 that start on a cache line."""
    padded = np.zeros(
        size + ALIGNMENT, np.float32
    )  # the pages are taken from the system when first touched
    start = -padded.ctypes.data // 4 % ALIGNMENT
    return padded[start : start + size]


def aligned_offsets(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Give where each array starts in a flat buffer, in floats; the entry "" is its size."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        size = int(np.prod(shape, dtype=np.int64))
        end += -(-size // ALIGNMENT) * ALIGNMENT
    offsets[""] = end
    return offsets


def named_views(flat: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """View `flat` as arrays, one for each name, in the order of `shapes`."""
    offsets = aligned_offsets(shapes)
    return {
        name: flat[offsets[name] : offsets[name] + int(np.prod(shape, dtype=np.int64))].reshape(
            shape
        )
        for name, shape in shapes.items()
    }
