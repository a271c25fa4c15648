"""Checks of users' arguments: whole numbers, and arrays that C can read as they are.

Each error is one sentence that names the argument; `counted` writes numbers in such sentences.
Knows nothing about what the arguments mean.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from numbers import Real
from operator import index
from types import UnionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "check_choice",
    "check_int32",
    "check_kind",
    "check_layout",
    "counted",
    "number",
    "several",
    "whole",
    "whole_or_float",
]


def whole(name: str, number: Any) -> int:
    """Return a whole number as an int.

    Raises
    ------
    ValueError : `number` is not a whole number, or is a bool
    """
    try:
        if not isinstance(number, bool | np.bool_):
            return int(index(number))
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number, got {number!r:.50}")


def whole_or_float(name: str, number: Any) -> int:
    """Return a whole number as an int; 2.0, as some readers of JSON return it, is one.

    Raises
    ------
    ValueError : `number` is not a whole number, or is a bool
    """
    is_float = isinstance(number, float | np.floating)
    return int(number) if is_float and number.is_integer() else whole(name, number)


def number(name: str, value: Any) -> float:
    """Return a number as a float.

    Raises
    ------
    ValueError : `value` is not a number, is a bool, or is too large for a float
    """
    if isinstance(value, Real) and not isinstance(value, bool | np.bool_):
        with suppress(OverflowError):
            return float(value)
    raise ValueError(f"{name} must be a number, got {value!r:.50}")


def several(values: Any) -> list[Any]:
    """Return the values of a collection; a text, or what is no collection, is one value itself."""
    if isinstance(values, str | bytes | bytearray):
        return [values]
    try:
        return list(values)
    except TypeError:
        return [values]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 token", "2 tokens", "1,000 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse all but these strings; a list or an array has no place in a dict of them.

    Raises
    ------
    ValueError : `value` is none of them
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.50}")


def check_kind(name: str, value: Any, kind: type | UnionType, wanted: str) -> None:
    """Refuse a value that is not of a class; `wanted` describes the class in the error.

    Raises
    ------
    ValueError : `value` is not a `kind`
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {wanted}, got {value!r:.50}")


def check_layout(name: str, array: NDArray[Any]) -> None:
    """Refuse an array that C cannot read as it is.

    Raises
    ------
    ValueError : `array` is not C-contiguous or not aligned
    """
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"{name} must be C-contiguous and aligned: pass its .copy()")


def check_int32(name: str, ids: Any, shape: tuple[int, ...], low: int, high: int) -> None:
    """Refuse all but an int32 array of this shape with numbers in [low, high).

    Raises
    ------
    ValueError : another type, shape or layout, or a number out of range
    """
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.shape != shape:
        came = (getattr(ids, "dtype", type(ids).__name__), getattr(ids, "shape", ""))
        raise ValueError(f"{name} must be an int32 array {shape}, got {came[0]} {came[1]}")
    check_layout(name, ids)
    numbers = ids.ravel().tolist()  # a short list is searched faster than a short array
    if numbers and not (low <= min(numbers) and max(numbers) < high):
        raise ValueError(f"{name} must be in [{low}, {high}), got {min(numbers)} .. {max(numbers)}")
