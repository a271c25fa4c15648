"""What users give: whole numbers, and arrays that C can read as they are.

Each refuses the rest with one sentence that names the argument. Knows nothing about what they mean.
Here too is how such sentences count.
"""

from __future__ import annotations

from contextlib import suppress
from numbers import Real
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "check_int32",
    "check_kind",
    "check_layout",
    "counted",
    "number",
    "whole",
    "whole_or_float",
]


def whole(name: str, number: Any) -> int:
    """Return a whole number as an int.

    Raises
    ------
    ValueError : it is none, or a bool
    """
    try:
        if not isinstance(number, bool | np.bool_):
            return int(index(number))
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number, got {number!r:.50}")


def whole_or_float(name: str, number: Any) -> int:
    """Return a whole number as an int; 2.0, as some readers of JSON give it, is one.

    Raises
    ------
    ValueError : it is none, or a bool
    """
    is_float = isinstance(number, float | np.floating)
    return int(number) if is_float and number.is_integer() else whole(name, number)


def number(name: str, value: Any) -> float:
    """Return a number as a float.

    Raises
    ------
    ValueError : it is none, a bool, or too large for a float
    """
    if isinstance(value, Real) and not isinstance(value, bool | np.bool_):
        with suppress(OverflowError):
            return float(value)
    raise ValueError(f"{name} must be a number, got {value!r:.50}")


def counted(number: int, noun: str) -> str:
    """Return "1 token", "2 tokens", "1,000 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_kind(name: str, value: Any, kind: type, wanted: str) -> None:
    """Refuse what is of another class; `wanted` says what is of this one.

    Raises
    ------
    ValueError : it is of another class
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {wanted}, got {value!r:.50}")


def check_layout(name: str, array: NDArray[Any]) -> None:
    """Refuse what C could not walk over.

    Raises
    ------
    ValueError : it is not C-contiguous or not aligned
    """
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"{name} must be C-contiguous and aligned: pass its .copy()")


def check_int32(name: str, ids: Any, shape: tuple[int, ...], low: int, high: int) -> None:
    """Refuse what is not int32 numbers in [low, high) of this shape.

    Raises
    ------
    ValueError : another type, shape or layout, or a number out of range
    """
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.shape != shape:
        came = (getattr(ids, "dtype", type(ids).__name__), getattr(ids, "shape", ""))
        raise ValueError(f"{name} must be an int32 array {shape}, got {came[0]} {came[1]}")
    check_layout(name, ids)
    numbers = ids.ravel().tolist()  # of few numbers a list is searched faster than an array
    if numbers and not (low <= min(numbers) and max(numbers) < high):
        raise ValueError(f"{name} must be in [{low}, {high}), got {min(numbers)} .. {max(numbers)}")
