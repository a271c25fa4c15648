"""Flat memory with named views: one buffer for all parameters, one for gradients (as in llm.c).

Knows nothing about what the names mean.
"""

from __future__ import annotations

import ctypes
import math
import mmap as _mmap
from collections.abc import Mapping
from contextlib import suppress
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.limits import free_bytes

__all__ = [
    "ALIGNMENT",
    "HUGE_PAGE",
    "Array",
    "aligned_offsets",
    "aligned_zeros",
    "available_bytes",
    "megabytes",
    "named_views",
    "require",
    "view",
]

Array = NDArray[np.float32]

ALIGNMENT = 16  # floats: 64 bytes, one cache line and the widest vector
HUGE_PAGE = 1 << 21  # bytes, on x86-64 and most ARM systems
RESERVE = 16 << 20  # bytes: for lists, imports, threads and all else that is not allocated here
UNASKED = HUGE_PAGE  # bytes: less is not checked, because the check takes longer than the use
MADV_HUGEPAGE = getattr(_mmap, "MADV_HUGEPAGE", None)  # on Linux

# All large arrays. The system counts a page of theirs only after it is first touched.
_given: WeakValueDictionary[int, mmap] = WeakValueDictionary()


def available_bytes() -> int:
    """Return the bytes that may still be allocated.

    They are the free bytes, less the bytes that are allocated and not yet touched, less RESERVE.
    """
    return max(0, free_bytes(_untouched()) - RESERVE)


def require(what: str, parts: Mapping[str, int], mend: str, most: float = math.inf) -> None:
    """Refuse work that does not fit into memory, before any of its memory is allocated.

    A system may allocate more than it has, and kill the process when that memory is used.

    Parameters
    ----------
    what : the work, as the error names it: "a model"
    parts : name -> bytes
    mend : the advice of the error
    most : bytes; the share of this process, if others take memory beside it

    Raises
    ------
    MemoryError : it does not fit
    """
    total = sum(parts.values())
    if total < UNASKED:
        return
    free = min(available_bytes(), most)
    if total > free:
        listed = ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items() if size)
        raise MemoryError(
            f"{what} needs {megabytes(total)}: {listed}; {megabytes(free)} are free"
            f"{' for this rank' if free == most else ''}: {mend}"
        )


def megabytes(size: float) -> str:
    """Return a number of bytes as text in MB."""
    return f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"


def _untouched() -> int:
    """Return the bytes of large arrays that are not yet touched, without the arrays' borders."""
    resident = getattr(ctypes.CDLL(None), "mincore", None)
    if resident is None:
        return 0
    size_bytes = 0
    for reference in _given.valuerefs():
        mapped = reference()
        if mapped is None:
            continue
        pages = np.empty(-(-len(mapped) // PAGESIZE), np.uint8)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        asked = (ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)))
        if resident(*asked, ctypes.c_void_p(pages.ctypes.data)) == 0:
            absent = PAGESIZE * int(np.count_nonzero(pages & 1 == 0))
            size_bytes += max(0, absent - HUGE_PAGE)
    return size_bytes


def aligned_zeros(size: int) -> Array:
    """Return zeros (size,) float32 that start on a cache line, large ones on a huge page.

    Huge pages are requested because with small pages a matrix product spends part of its time on
    address translation. The system provides a page when it is first touched.

    Raises
    ------
    MemoryError : there is too little memory
    """
    size_bytes, border = 4 * size, 4 * ALIGNMENT
    if size_bytes < HUGE_PAGE:
        memory = np.zeros(size_bytes + border, np.uint8)
    else:
        border, free = HUGE_PAGE, available_bytes()
        if size_bytes > free:  # see `require`, which checks all arrays of a work together
            raise MemoryError(f"{size_bytes:,} bytes are wanted, {free:,} are free")
        try:
            mapped = mmap(-1, size_bytes + border, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size_bytes:,} bytes are wanted: {error.strerror}") from error
        if MADV_HUGEPAGE is not None:
            with suppress(OSError):  # a system without huge pages refuses
                mapped.madvise(MADV_HUGEPAGE)
        _given[id(mapped)] = mapped
        memory = np.frombuffer(mapped, np.uint8)
    start = -memory.ctypes.data % border
    return memory[start : start + size_bytes].view(np.float32)


def aligned_offsets(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return where each array starts in a flat buffer, in floats; entry "" is the buffer's size."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
    offsets[""] = end
    return offsets


def named_views(flat: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return views of `flat`, an array for each name, in the order of `shapes`."""
    offsets = aligned_offsets(shapes)
    return {name: view(flat, offsets[name], shape) for name, shape in shapes.items()}


def view(flat: Array, offset: int, shape: tuple[int, ...]) -> Array:
    """View a part of `flat` as an array of this shape."""
    return flat[offset : offset + math.prod(shape)].reshape(shape)
