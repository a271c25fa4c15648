"""Weights of 16 and 8 bits: how they lie in memory, and how numbers become them.

Memory bandwidth limits inference, so a quarter of the bytes can make it four times as fast. int8
rounds each row of a matrix to 255 steps between plus and minus its largest weight; fp16 keeps 11
bits of each weight. `gpt2c.kernels.reference` defines what the layers compute with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.checks import check_choice
from gpt2c.kernels.memory import Array, named_views
from gpt2c.kernels.op import LONGEST, MIDDLE, TINY
from gpt2c.model.block import Parameter
from gpt2c.model.config import ModelConfig
from gpt2c.model.parameters import Tensor

__all__ = [
    "DTYPES",
    "WEIGHTS",
    "TypedLayout",
    "Weights",
    "check_method",
    "check_weights",
    "copy_stored",
    "layout_of",
    "restored",
    "room_of",
    "round_into",
    "round_rows",
    "shapes_of",
    "typed_views",
]

STEPS = 127  # steps from 0 to a row's largest weight, and as many below 0
ROWS = 1024  # rows rounded at a time, so that the temporary arrays stay small
DTYPES = {"int8": np.uint8, "fp16": np.float16}
Weights = Literal["fp32", "int8", "fp16"]
WEIGHTS = ("fp32", *DTYPES)  # the types of weights that a model can have

TypedLayout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]  # name -> shape, dtype


def check_method(method: str) -> None:
    """Refuse a type that weights cannot be rounded to."""
    check_choice("quantize", method, DTYPES)


def check_weights(weights: str, config: ModelConfig) -> None:
    """Refuse an unknown type of weights, and int8 for rows that its sums cannot hold."""
    check_choice("weights", weights, WEIGHTS)
    shapes = [one.shape for one in config.stack().parameters().values() if one.small]
    longest = max(columns for _, columns in shapes)
    if weights == "int8" and longest > LONGEST:
        raise ValueError(f"int8 weights have at most {LONGEST} channels, got {longest}")


# ---- memory --------------------------------------------------------------------------------------


def layout_of(parameters: Iterable[Parameter], weights: str) -> TypedLayout:
    """Return the arrays that a model with these weights has for its parameters.

    An int8 weight, "x.weight", has a float32 factor for each of its rows behind it, "x.scale".
    """
    layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    for one in parameters:
        dtype = np.dtype(DTYPES.get(weights, np.float32) if one.small else np.float32)
        layout[one.name] = one.shape, dtype
        if dtype == np.uint8:
            layout[_scale_of(one.name)] = one.shape[:1], np.dtype(np.float32)
    return layout


def _scale_of(name: str) -> str:
    return name.removesuffix("weight") + "scale"


def shapes_of(config: ModelConfig, weights: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the arrays of a model with these weights."""
    layout = layout_of(config.stack().parameters().values(), weights)
    return {name: shape for name, (shape, _) in layout.items()}


def room_of(layout: TypedLayout) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the flat float32 memory that each array takes."""
    return {
        name: shape if dtype == np.float32 else (-(-math.prod(shape) * dtype.itemsize // 4),)
        for name, (shape, dtype) in layout.items()
    }


def typed_views(flat: Array, layout: TypedLayout) -> dict[str, NDArray[Any]]:
    """Return views of flat memory, an array for each name; each starts on a cache line."""
    arrays: dict[str, NDArray[Any]] = dict(named_views(flat, room_of(layout)))
    for name, (shape, dtype) in layout.items():
        if dtype != np.float32:
            arrays[name] = arrays[name].view(dtype)[: math.prod(shape)].reshape(shape)
    return arrays


# ---- rounding ------------------------------------------------------------------------------------


def round_into(
    parameters: Mapping[str, NDArray[Any]],
    weights: str,
    name: str,
    tensor: NDArray[Any],
    source: str,
) -> None:
    """Round a tensor into the parameter of this name, and its scale; errors name `source`.

    Raises
    ------
    ValueError : a number is not finite or beyond fp16's range
    """
    parameter = parameters[name]
    if not np.isfinite(tensor).all():
        raise ValueError(
            f"{source}: {name} holds nan or infinity; only finite weights can be rounded to"
            f" {8 * np.dtype(DTYPES[weights]).itemsize} bits"
        )
    if parameter.dtype == np.uint8:
        round_rows(parameter, parameters[_scale_of(name)], tensor)
        return
    with np.errstate(over="ignore"):
        parameter[...] = tensor
    if not np.isfinite(parameter).all():
        raise ValueError(f"{source}: {name} holds numbers beyond fp16's range, 65504")


def round_rows(weight: NDArray[np.uint8], scale: Array, tensor: NDArray[np.floating[Any]]) -> None:
    """Write weight (OC, C) and scale (OC,): scale * (weight - 128) approximates tensor (OC, C).

    A row's largest magnitude becomes 127 steps, and 0 stays 0. If it is at most TINY, all become 0.
    """
    for start in range(0, len(tensor), ROWS):
        rows = slice(start, start + ROWS)
        largest = np.abs(tensor[rows]).max(axis=1)
        scale[rows] = np.where(largest > TINY, largest, 0) / np.float32(STEPS)
        steps = np.where(scale[rows] > 0, scale[rows], np.float32(1))[:, None]
        weight[rows] = np.rint(tensor[rows] / steps) + MIDDLE


def restored(parameters: Mapping[str, NDArray[Any]], name: str) -> Array:
    """Return the numbers that a parameter stands for, in float32; a float32 one is returned."""
    parameter = parameters[name]
    if parameter.dtype == np.uint8:
        scale = parameters[_scale_of(name)][:, None]
        return scale * (parameter - np.float32(MIDDLE))
    return parameter.astype(np.float32) if parameter.dtype == np.float16 else parameter


def copy_stored(parameter: NDArray[Any], tensor: Tensor, name: str) -> None:
    """Copy a tensor that is of the parameter's type already; `name` names it in errors.

    Raises
    ------
    ValueError : it is of another type, or a number is not finite
    """
    if tensor.dtype != parameter.dtype:
        raise ValueError(f"{name} must be {parameter.dtype}, got {tensor.dtype}")
    parameter[...] = np.asarray(tensor)
    if parameter.dtype != np.uint8 and not np.isfinite(parameter).all():
        raise ValueError(f"{name} holds nan or infinity")
