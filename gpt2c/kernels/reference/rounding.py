"""Products of 16-bit numbers: how factors are rounded, and how halves are added.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.op import OPS

__all__ = ["bf16", "halves", "nearest", "on_factors", "product", "read", "rounded", "stored"]

P = ParamSpec("P")
# of products of halves: the numbers of a row that are scaled alike, at most, and the products that
# are added in halves
PART, BLOCK = 768, 64


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


def halves(x: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Round rows to IEEE half precision, scaled so that nothing is too large.

    Return a power of two for each row of x (N, K), (N, 1), and the nearest halves to x times it, as
    float64. The largest number of a row becomes one in [8, 16], unless it is below 2^-121.

    Examples
    --------
    >>> numbers, power = gpt2c.kernels.reference.halves(np.array([[1e-6, -3e-8]]))
    >>> (numbers / power).round(13).tolist()  # alone, 3e-8 would be 0 in half precision
    [[1e-06, -3e-08]]
    """
    largest = np.fmax.reduce(np.abs(x), axis=1, keepdims=True).clip(2.0**-121, 2.0**127)
    power = np.ldexp(1.0, 4 - np.frexp(largest.astype(np.float64))[1])
    with np.errstate(over="ignore"):  # beside infinity: the row has it anyway
        return (x * power).astype(np.float16).astype(np.float64), power


def product(a: NDArray[Any], b: NDArray[Any], precision: str) -> NDArray[Any]:
    """Return a b^T for a (M, K) and b (N, K), in the dtype of a.

    "bf16" rounds both. "fp16" takes K in equal parts of at most PART numbers, rounds each part's
    rows to `halves`, and adds BLOCK products at a time as the instructions of AVX512-FP16 do: in
    halves, each multiply-add rounded once. The sums of blocks are added in the dtype of a.
    """
    if precision != "fp16":
        a, b = rounded(precision, a, b)
        exact: NDArray[Any] = a @ b.T
        return exact
    out, K = np.zeros((len(a), len(b)), a.dtype), a.shape[1]
    depth = math.ceil(math.ceil(K / math.ceil(K / PART)) / 8) * 8
    for first in range(0, K, depth):
        (x, to_x), (y, to_y) = (halves(one[:, first : first + depth]) for one in (a, b))
        sums = np.zeros_like(out)
        for block in range(0, x.shape[1], BLOCK):
            total = np.zeros(out.shape, np.float16)
            with np.errstate(invalid="ignore"):  # infinity times 0 is nan
                for k in range(block, min(block + BLOCK, x.shape[1])):
                    total = (total + np.multiply.outer(x[:, k], y[:, k])).astype(np.float16)
            sums += total
        with np.errstate(over="ignore"):
            out += (sums / to_x / to_y.T).astype(out.dtype)
    return out


def rounded(precision: str, *factors: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Return factors as they are, or the nearest bfloat16; "fp16" is `product`'s alone."""
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
