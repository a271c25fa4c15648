"""Rounding to 16 bits, as the products of a training step in 16 bits round their factors.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.op import OPS

__all__ = ["bf16", "nearest", "on_factors", "read", "rounded", "stored"]

P = ParamSpec("P")


def bf16(x: NDArray[Any]) -> NDArray[Any]:
    """Return the nearest bfloat16 numbers, in the dtype of x.

    Numbers below 2^-126 become 0 of their sign, as the instructions of AVX512_BF16 have it.

    Source: Intel, bfloat16 Hardware Numerics Definition, 2018.
    """
    narrow = np.ascontiguousarray(x, np.float32)
    tiny = np.abs(x) < np.float32(2.0**-126)
    found = np.where(tiny, np.copysign(np.float32(0), narrow), nearest(narrow))
    return found.reshape(x.shape).astype(x.dtype, copy=False)


def nearest(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the nearest bfloat16 numbers, as float32; infinity and nan stay.

    They have float32's range and 8 bits of precision: they are the upper half of a float32. Of two
    that are as near the even one is taken. A nan gets a bit, or its upper half could be infinity.
    """
    bits = x.view(np.uint32)
    found = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    found = np.where(np.isnan(x), bits | 0x00400000, found) & np.uint32(0xFFFF0000)
    return found.view(np.float32)


def rounded(precision: str, *factors: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Return the factors of products of this precision: as they are, or nearest bfloat16."""
    return tuple(map(bf16, factors)) if precision == "bf16" else factors


def stored(x: NDArray[Any]) -> NDArray[np.uint16]:
    """Return the nearest bfloat16 numbers as they lie in memory: the upper halves of float32."""
    return (bf16(x).astype(np.float32, copy=False).view(np.uint32) >> 16).astype(np.uint16)


def read(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 numbers in memory, see `stored`, as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def on_factors(op: Callable[P, None]) -> Callable[P, None]:
    """Let an op also take factors that are bfloat16 in memory, see `stored`.

    It computes on float32 numbers, and rounds what it writes.
    """
    outputs = len(OPS[op.__name__].outputs)

    @functools.wraps(op)
    def run(*arguments: P.args, **others: P.kwargs) -> None:
        halves = [getattr(argument, "dtype", None) == np.uint16 for argument in arguments]
        if not any(halves):
            op(*arguments, **others)
            return
        given: list[Any] = [*arguments]
        floats = [read(one) if half else one for one, half in zip(given, halves, strict=True)]
        op(*floats, **others)  # type: ignore[arg-type]
        for array, half, found in zip(given[:outputs], halves, floats, strict=False):
            if half:
                array[...] = stored(found)

    return run
