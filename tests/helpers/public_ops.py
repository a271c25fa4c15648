"""The public ops: their arguments for a small shape, and the right results."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from gpt2c import ops
from gpt2c.kernels import reference
from gpt2c.kernels.cases import OpShape
from gpt2c.kernels.op import OPS
from helpers.cases import Case, small_shape

GIVEN = {  # sizes that no array of the call has
    "vocab_size": lambda shape: shape["V"],
    "n_positions": lambda shape: shape["T"] + 2,
    "n_head": lambda shape: shape["NH"],
    "n_kv_head": lambda shape: shape.get("KV", shape["NH"]),
}


PUBLIC = ops.PUBLIC


def solved(
    name: str, dtype: type = np.float32, shape: OpShape | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """Return an op's arguments by name, floats of `dtype`, and the reference's float64 outputs."""
    shape = shape or small_shape(name)
    arguments = Case(name, shape).arguments()
    names = inspect.signature(getattr(reference, name)).parameters
    outputs = arguments[: len(OPS[name].outputs)]
    wanted = inspect.signature(PUBLIC[name]).parameters
    given = {key: size(shape) for key, size in GIVEN.items() if key in wanted}
    for key, value in zip(names, arguments, strict=True):
        if key in wanted:  # param, m and v of AdamW are inputs and outputs
            floats = isinstance(value, np.ndarray) and value.dtype == np.float64
            given[key] = value.astype(dtype) if floats else value
        elif isinstance(value, np.ndarray):
            value[...] = 0  # gradients that accumulate start here
    result = getattr(reference, name)(*arguments)
    return given, [output for output in outputs if output is not None] or [result]


def results_of(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    results = PUBLIC[name](**arguments)
    return results if isinstance(results, tuple) else (results,)


def arrays_of(name: str) -> list[str]:
    return [key for key, value in solved(name)[0].items() if isinstance(value, np.ndarray)]
