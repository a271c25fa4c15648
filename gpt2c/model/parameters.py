"""Tensors to load: whether they fit a config, and how much memory converting them takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

__all__ = ["Tensor", "check_shapes", "converted_bytes"]


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
