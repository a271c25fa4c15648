"""Flat memory with named views: one buffer for all parameters, one for gradients (as llm.c).

Knows nothing about what the names mean. Used by model; the optimizer sees the flat buffers only.
"""

from __future__ import annotations

import math
import mmap as _mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

ALIGNMENT = 16  # floats: 64 bytes, one cache line and the widest vector
HUGE_PAGE = 1 << 21  # bytes, on x86-64 and most ARM systems
MADV_HUGEPAGE = getattr(_mmap, "MADV_HUGEPAGE", None)  # Linux has it

MEMINFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
GROUPS = (  # versions 2 and 1: limit, what is used, and how much of that are files
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        *("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        ("total_active_file", "total_inactive_file"),
    ),
)


def aligned_zeros(size: int) -> Array:
    """Zeros (size,) float32 that start on a cache line, large ones on a huge page.

    The system is asked for huge pages: with small ones, a product of matrices spends a part of its
    time looking up where they are. Pages are taken from it when first touched.

    Raises
    ------
    MemoryError : there is not so much
    """
    size_bytes, border = 4 * size, 4 * ALIGNMENT
    if size_bytes < HUGE_PAGE:
        memory = np.zeros(size_bytes + border, np.uint8)
    else:
        border, free = HUGE_PAGE, free_bytes()
        if size_bytes > free:  # the system may promise more, and end the process when it is used
            raise MemoryError(f"{size_bytes:,} bytes are wanted, {free:,} are free")
        try:
            mapped = mmap(-1, size_bytes + border, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size_bytes:,} bytes are wanted: {error.strerror}") from error
        if MADV_HUGEPAGE is not None:
            with suppress(OSError):  # a system without them says so
                mapped.madvise(MADV_HUGEPAGE)
        memory = np.frombuffer(mapped, np.uint8)
    start = -memory.ctypes.data % border
    return memory[start : start + size_bytes].view(np.float32)


def aligned_offsets(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Give where each array starts in a flat buffer, in floats; the entry "" is its size."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
    offsets[""] = end
    return offsets


def named_views(flat: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """View `flat` as arrays, one for each name, in the order of `shapes`."""
    offsets = aligned_offsets(shapes)
    return {
        name: flat[offsets[name] : offsets[name] + math.prod(shape)].reshape(shape)
        for name, shape in shapes.items()
    }


def free_bytes() -> int:
    """Give the memory that new processes may take: the system's, or less in a container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, KeyError, ValueError):
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        kilobytes = {name: value.split()[0] for name, value in (line.split(":") for line in lines)}
        free = 1024 * (int(kilobytes["MemAvailable"]) + int(kilobytes.get("SwapFree", 0)))
    for limit, used, stat, files in GROUPS:
        with suppress(OSError, ValueError):  # another version, or "max", no number: no limit
            room = int((GROUP / limit).read_text()) - int((GROUP / used).read_text())
            # Files that were read count as used, but make room for whoever asks.
            counts = dict(line.split() for line in (GROUP / stat).read_text().splitlines())
            free = min(free, room + sum(int(counts.get(name, 0)) for name in files))
    return max(0, free)
