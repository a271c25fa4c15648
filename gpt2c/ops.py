"""Every op of GPT-2 on plain NumPy arrays, on any backend: checked arguments, new results.

The functions are made from the declarations of `gpt2c.kernels.op`: the inputs and numbers of an op,
then the sizes of its results that no input has (vocab_size, n_positions, n_head), then backend.
They return the outputs. What an op computes stands in `gpt2c.kernels.reference`.

Arrays must be C-contiguous float32 (backend "numpy" takes float64 as well), token ids int32; the
weights of `linear_forward` may be smaller. Gradients come back as they are, not added to anything.
Every function raises ValueError if an array has another dtype, layout or shape, a number or token
id is out of range, or the backend is unknown. Knows nothing about models.

Examples
--------
>>> x = np.array([[1, 3]], np.float32)
>>> y, mean, rstd = gpt2c.ops.layernorm_forward(
...     x, weight=np.ones(2, np.float32), bias=np.zeros(2, np.float32), backend="numpy"
... )
>>> y.round(2)
array([[-1.,  1.]], dtype=float32)
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt2c.kernels import reference
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.checks import check_int32, check_layout, number, whole
from gpt2c.kernels.op import OPS, Argument, Op
from gpt2c.kernels.reference.linear import LONGEST

GIVEN = {"V": "vocab_size", "P": "n_positions", "NH": "n_head"}  # sizes that no input may have
LOWEST = {"ids": 0, "targets": -1}

__all__ = list(OPS)


def _public(op: Op) -> Callable[..., Any]:
    """Return the function that checks the arguments of an op, makes its results and runs it."""
    inputs = [array for array in op.outputs if array.mode == "~"] + list(op.inputs)
    known = {letter for array in inputs for letter in array.letters if array.kind == "floats"}
    lacking = {letter for array in op.outputs for letter in array.letters} - known
    given_sizes = {name: letter for letter, name in GIVEN.items() if letter in lacking}
    # a flag is for who keeps memory from call to call
    numbers = {name: value for name, value in op.numbers.items() if value is not True}
    none: Any = inspect.Parameter.empty
    defaults = {
        **{array.name: None if array.optional else none for array in inputs},
        **dict.fromkeys(given_sizes, none),
        **{name: none if value is None else value for name, value in numbers.items()},
        "backend": "auto",
    }
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, either, default=value) for name, value in defaults.items()]
    )

    def run(*positional: Any, **keywords: Any) -> Any:
        bound = signature.bind(*positional, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        backend = get_backend(given["backend"])
        arrays = {array: given[array.name] for array in inputs if given[array.name] is not None}
        for array in inputs:
            if not array.optional and given[array.name] is None:
                raise ValueError(f"{array.name} must be a NumPy array, got None")
        dtype, sizes = _check(arrays, backend.name)
        sizes |= {letter: whole(name, given[name]) for name, letter in given_sizes.items()}
        for name, default in numbers.items():
            given[name] = (number if isinstance(default, float) else whole)(name, given[name])
        _check_rules(op, sizes | {name: given[name] for name in numbers})
        for array, ids in arrays.items():
            if array.kind in LOWEST:
                check_int32(array.name, ids, ids.shape, LOWEST[array.kind], sizes["V"])
        outputs = [
            given[array.name].copy()
            if array.mode == "~"
            else (np.zeros if array.mode == "+" else np.empty)(_shape(array, sizes), dtype)
            for array in op.outputs
        ]
        arguments = (*(given[array.name] for array in op.inputs), *(given[n] for n in numbers))
        result = getattr(backend, op.name)(*outputs, *arguments)
        return result if op.returns else outputs[0] if len(outputs) == 1 else tuple(outputs)

    run.__name__ = run.__qualname__ = op.name
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__doc__ = _documentation(op, list(defaults))
    return run


def _check(arrays: dict[Argument, Any], backend: str) -> tuple[str, dict[str, Any]]:
    """Check arrays against their letters; return their float type and the size of each letter."""
    dtypes = ("float32", "float64") if backend == "numpy" else ("float32",)
    floats = (getattr(a, "dtype", None) for array, a in arrays.items() if array.kind == "floats")
    common = next((str(dtype) for dtype in floats if dtype in dtypes), dtypes[0])
    for array, value in arrays.items():
        _check_type(array, value, arrays, common)
    sizes = _sizes(arrays)
    for array, value in arrays.items():
        if value.shape != _shape(array, sizes) or 0 in value.shape:
            wanted = ", ".join(
                f"{letter}={sizes.get(letter, '')}".rstrip("=") for letter in array.shape
            )
            raise ValueError(
                f"{array.name} must have shape ({wanted}), none of it 0, got {value.shape}"
            )
    for array, value in arrays.items():  # after the shapes: of the wrong one no copy helps
        check_layout(array.name, value)
    return common, sizes


def _sizes(arrays: dict[Argument, Any]) -> dict[str, Any]:
    """Return the size of each letter: what most arrays have, so that the odd one is named."""
    votes: dict[str, Counter[Any]] = defaultdict(Counter)
    # of as many votes the first counts: a gradient must fit the forward pass's arrays
    for array in sorted(arrays, key=lambda array: (array.kind in LOWEST, array.name[0] == "d")):
        shape = arrays[array].shape
        if 0 in shape:
            continue
        if array.shape == ("*",):
            votes["*"][shape] += 1
        elif len(shape) == len(array.shape):
            for letter, size in zip(array.shape, shape, strict=True):
                votes[letter.lstrip("3")][size // 3 if letter[0] == "3" else size] += 1
    return {letter: counts.most_common(1)[0][0] for letter, counts in votes.items()}


def _check_type(array: Argument, value: Any, arrays: dict[Argument, Any], common: str) -> None:
    """Refuse what is no array of a dtype that this argument may have."""
    name = array.name
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name} must be a NumPy array, got {type(value).__name__}")
    allowed: tuple[str, ...] = (common,)
    if array.kind in LOWEST:
        allowed = ("int32",)
    elif array.kind == "weights":
        scaled = any(other.name == "scale" for other in arrays)
        if value.dtype == np.uint8 and not scaled:
            raise ValueError("scale must be given for weights of 8 bits")
        allowed = ("uint8",) if scaled else (common, "float16")
    if value.dtype not in [np.dtype(dtype) for dtype in allowed]:
        raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value.dtype}")
    if value.dtype == np.float16 and not np.isfinite(value).all():
        raise ValueError(f"{name} holds nan or infinity, which weights of 16 bits must not")
    if value.dtype == np.uint8 and value.shape[-1:] > (LONGEST,):
        raise ValueError(
            f"{name} must have at most {LONGEST} channels of 8 bits, got {value.shape[-1]}"
        )


def _shape(array: Argument, sizes: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape that letters mean; a letter that no array has is -1."""
    if array.shape == ("*",):
        return tuple(sizes.get("*", ()))
    return tuple(
        sizes.get(letter.lstrip("3"), -1) * (3 if letter[0] == "3" else 1) for letter in array.shape
    )


def _check_rules(op: Op, values: dict[str, Any]) -> None:
    """Check what must hold of an op's sizes and numbers."""
    for name, rule in op.rules:
        if not eval(rule, {}, values):  # a declaration of this package's own
            words = dict.fromkeys(re.findall(r"[A-Za-z]\w*", rule))
            got = ", ".join(f"{word}={values[word]!r:.50}" for word in words if word in values)
            raise ValueError(f"{name} must be such that {rule}, got {got}")


def _documentation(op: Op, parameters: list[str]) -> str:
    """Return the docstring of a public function: what the reference says, with shapes."""

    def line(array: Argument) -> str:
        shape = "any shape" if array.shape == ("*",) else f"({', '.join(array.shape)})"
        return f"{array.name} : {shape}" + (", or None" if array.optional else "")

    summary = inspect.cleandoc(getattr(reference, op.name).__doc__ or "")
    formula = summary.split("\nParameters\n")[0].rstrip()
    arrays = [line(array) for array in op.arrays if array.name in parameters]
    results = [line(array) for array in op.outputs] or [f"{op.returns} : float"]
    parts = [formula, "", "Parameters", "----------", *arrays, "", "Returns", "-------", *results]
    return "\n".join(parts)


globals().update({op.name: _public(op) for op in OPS.values()})


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
