"""Parameters by name: patterns of names, and tensors to load, which must fit a config."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

__all__ = ["Tensor", "check_shapes", "converted_bytes", "names_that_fit"]


class Tensor(Protocol):
    """An array, or an object that np.asarray reads into one, such as a tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> Any: ...  # noqa: D102

    def __array__(self) -> NDArray[Any]: ...


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Refuse tensors whose names or shapes are not those of `shapes`; errors name `source`.

    Raises
    ------
    ValueError : a tensor is missing, unknown or of another shape
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{source}: tensor {name} is missing")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{source}: tensor {name} must be {shape} for its config, got {tensors[name].shape}"
            )
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise ValueError(f"{source}: this model has no tensor {unknown[0]}")


def converted_bytes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, for `require`, the memory to convert stored tensors to float32 one at a time."""
    sizes = [
        4 * math.prod(tensor.shape)
        for tensor in tensors.values()
        if isinstance(tensor.dtype, str) and tensor.dtype != "F32"
    ]
    return {"a tensor in float32": max(sizes, default=0)}


def names_that_fit(names: Collection[str], patterns: Iterable[str]) -> frozenset[str]:
    """Return the names that fit a pattern, as the shell has them: "wte.*", "h.[0-5].*", "*.bias".

    Raises
    ------
    ValueError : a pattern is not a string, or fits no name
    """
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"a pattern of names must be a string, got {pattern!r:.50}")
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            whole = fnmatch.filter(names, f"{pattern}.*")
            hint = f"did you mean '{pattern}.*'?" if whole else "one is 'wte.weight'"
            raise ValueError(f"no parameter has a name like {pattern!r}; {hint}")
        found.update(fitting)
    return frozenset(found)
