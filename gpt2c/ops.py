"""Every op on plain NumPy arrays, on any backend: checked arguments, new results.

The functions are made from the declarations of `gpt2c.kernels.op`. Their arguments are the inputs
of an op, the sizes of its results that no input has (vocab_size, n_positions, n_head), the optional
inputs, the numbers, offsets or weights of rows, and the backend. They return the outputs.
`gpt2c.kernels.reference` defines what an op computes.

Arrays must be C-contiguous float32 (backend "numpy" takes float64 as well), token ids int32; the
weights of `matmul_forward` and `encoder_forward` may be float16 or uint8, the caches of
`attention_forward` float16, or int8 with scales. Gradients are new arrays, not added to earlier
ones.
Every function raises ValueError if an array has another dtype, layout or shape, a number or token
id is out of range, or the backend is unknown, and MemoryError if the results do not fit. Knows
nothing about models.

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
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels import reference
from gpt2c.kernels.backend import NAMES, get_backend
from gpt2c.kernels.checks import check_int32, check_layout, number, whole
from gpt2c.kernels.memory import require
from gpt2c.kernels.op import LONGEST, OPS, Argument, Op

Array = NDArray[Any]
# sizes that inputs may lack
GIVEN = {"V": "vocab_size", "P": "n_positions", "NH": "n_head", "KV": "n_kv_head"}
LARGEST = 2**31 - 1  # token ids and positions are int32
LOWEST = {"ids": 0, "targets": -1}
INTEGERS = (*LOWEST, "offsets")
# after the others, so that older calls by position mean the same
LATER = ("offsets", "weights")
LAST = ("dropout", "key", "first", "precision", "key_scales", "value_scales")
EIGHT_BITS = {"weights": "uint8", "cache": "int8"}

__all__ = list(OPS)


def _public(op: Op) -> Callable[..., Any]:
    """Return the function that checks the arguments of an op, makes its results and runs it."""
    inputs = [array for array in op.outputs if array.mode == "~"] + list(op.inputs)
    sure = [array for array in inputs if array.kind == "floats" and not array.optional]
    known = {letter for array in sure for letter in array.letters}
    made = [array for array in op.outputs if array.mode != "~"]
    lacking = {letter for array in made for letter in array.letters}
    lacking |= set(re.findall(r"[A-Z]+", " ".join(op.sizes.values())))
    lacking -= known | op.sizes.keys()
    given_sizes = {name: letter for letter, name in GIVEN.items() if letter in lacking}
    # flags are for callers that keep memory from call to call
    numbers = {name: value for name, value in op.numbers.items() if not isinstance(value, bool)}
    none: Any = inspect.Parameter.empty
    defaults = {
        **{array.name: none for array in inputs if not array.optional},
        **{name: none for name, letter in given_sizes.items() if letter != "KV"},
        **{name: none for name, value in numbers.items() if value is None},
        **{a.name: None for a in inputs if a.optional and a.name not in LATER + LAST},
        **{n: value for n, value in numbers.items() if value is not None and n not in LAST},
        **{array.name: None for array in inputs if array.name in LATER},
        **{name: None for name, letter in given_sizes.items() if letter == "KV"},
        **{name: value for name, value in numbers.items() if name in LAST},
        **{array.name: None for array in inputs if array.name in LAST},
        "backend": "auto",
    }
    types = {array.name: "Array | None" if array.optional else "Array" for array in inputs}
    types |= dict.fromkeys(given_sizes, "int") | {"n_kv_head": "int | None", "backend": "str"}
    types |= {n: "int" if value is None else type(value).__name__ for n, value in numbers.items()}
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            inspect.Parameter(name, either, default=value, annotation=types[name])
            for name, value in defaults.items()
        ],
        return_annotation=_returned(op),
    )

    def run(*positional: Any, **keywords: Any) -> Any:
        try:
            bound = signature.bind(*positional, **keywords)
        except TypeError as error:
            raise TypeError(f"{op.name}: {error}") from None
        bound.apply_defaults()
        given = bound.arguments
        for name in list(defaults)[:-1]:  # backend may be where a newer argument came in since
            value = given[name]
            if defaults[name] is not none and isinstance(value, str) and value in ("auto", *NAMES):
                given["backend"], given[name] = value, defaults[name]
        backend = get_backend(given["backend"])
        arrays = {array: given[array.name] for array in inputs if given[array.name] is not None}
        updated = {array.kind for array in arrays if array.mode == "~"}
        if "scales" in updated:  # of a cache
            updated.add("cache")
        for array in inputs:
            missing = not array.optional or (array.mode == "~" and array.kind in updated)
            if missing and given[array.name] is None:
                raise ValueError(f"{array.name} must be a NumPy array, got None")
        if "KV" in given_sizes.values() and given["n_kv_head"] is None:
            given["n_kv_head"] = given["n_head"]
        told = {letter: _size(name, given[name]) for name, letter in given_sizes.items()}
        dtype, sizes = _check(arrays, backend.name, told)
        for array in inputs:  # the letters of a missing array
            sizes |= {letter: sizes.get(letter, 0) for letter in array.letters}
        sizes |= {letter: eval(size, {}, sizes) for letter, size in op.sizes.items()}
        sizes["longest"] = sizes.get("T")
        for array, offsets in arrays.items():
            if array.kind == "offsets":
                sizes["longest"] = _check_offsets(array.name, offsets, sizes["B"], sizes["T"])
        for name, default in numbers.items():
            if not isinstance(default, str):
                given[name] = (number if isinstance(default, float) else whole)(name, given[name])
        _check_rules(op, sizes | {name: given[name] for name in numbers})
        for array, value in arrays.items():  # after the shapes: a copy does not mend a wrong shape
            check_layout(array.name, value)
        for array, ids in arrays.items():
            if array.kind in LOWEST:
                check_int32(array.name, ids, ids.shape, LOWEST[array.kind], sizes["V"])
        item = np.dtype(dtype).itemsize
        results = {array.name: item * math.prod(_shape(array, sizes)) for array in op.outputs}
        require(op.name, results, "take smaller arrays or sizes")
        outputs = [_output(array, given.get(array.name), sizes, dtype) for array in op.outputs]
        arguments = [given[array.name] for array in op.inputs]
        told = {name: given[name] for name in numbers}
        result = getattr(backend, op.name)(*outputs, *arguments, **told)
        outputs = [output for output in outputs if output is not None]
        return result if op.returns else outputs[0] if len(outputs) == 1 else tuple(outputs)

    run.__name__ = run.__qualname__ = op.name
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__doc__ = _documentation(op, defaults)
    return run


def _returned(op: Op) -> str:
    """Return the type of an op's result."""
    if op.returns:
        return "float"
    if any(array.mode == "~" and array.optional for array in op.outputs):
        return "tuple[Array, ...]"  # such an array comes back only if it was given
    arrays = ["Array"] * len(op.outputs)
    return f"tuple[{', '.join(arrays)}]" if len(arrays) > 1 else arrays[0]


def _size(name: str, value: Any) -> int:
    """Return a size that no input has; a negative one will fit no array."""
    size = whole(name, value)
    if size > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {size}")
    return size


def _check_offsets(name: str, offsets: NDArray[np.int32], B: int, T: int) -> int:
    """Check the offsets of a ragged batch; return the length of its longest sequence."""
    if B != 1:
        raise ValueError(f"{name} must come with a batch of B=1 row, which they divide, got B={B}")
    check_int32(name, offsets, offsets.shape, 0, T + 1)
    lengths = np.diff(offsets)
    if len(offsets) < 2 or offsets[0] or offsets[-1] != T or lengths.min() < 1:
        raise ValueError(f"{name} must rise from 0 to T={T}, got {offsets.tolist()!r:.50}")
    return int(lengths.max())


def _output(array: Argument, given: Any, sizes: dict[str, Any], dtype: str) -> Any:
    """Return a result's array: a copy of an updated input, zeros to add to, or not initialized."""
    if array.mode == "~":
        return None if given is None else given.copy()
    return (np.zeros if array.mode == "+" else np.empty)(_shape(array, sizes), dtype)


def _check(
    arrays: dict[Argument, Any], backend: str, told: dict[str, int]
) -> tuple[str, dict[str, Any]]:
    """Check arrays against their letters; return their float type and the size of each letter.

    Parameters
    ----------
    told : sizes from the caller
    """
    dtypes = ("float32", "float64") if backend == "numpy" else ("float32",)
    kinds = ("floats",) if any(array.kind == "floats" for array in arrays) else ("weights",)
    floats = (getattr(a, "dtype", None) for array, a in arrays.items() if array.kind in kinds)
    common = next((str(dtype) for dtype in floats if dtype in dtypes), dtypes[0])
    for array, value in arrays.items():
        _check_type(array, value, arrays, common)
    sizes = _sizes(arrays) | told
    for array, value in arrays.items():
        if value.shape != _shape(array, sizes) or 0 in value.shape:
            wanted = ", ".join(
                f"{letter}={sizes.get(letter, '')}".rstrip("=") for letter in array.shape
            )
            raise ValueError(
                f"{array.name} must have shape ({wanted}), no size 0, got {value.shape}"
            )
    return common, sizes


def _sizes(arrays: dict[Argument, Any]) -> dict[str, Any]:
    """Return the size of each letter: that of most arrays, so that an error names the odd one."""
    votes: dict[str, Counter[Any]] = defaultdict(Counter)
    # of equal votes the first counts: a gradient must fit the arrays of the forward pass
    for array in sorted(arrays, key=lambda array: (array.kind in INTEGERS, array.name[0] == "d")):
        shape = arrays[array].shape
        if 0 in shape:
            continue
        if array.shape == ("*",):
            votes["*"][shape] += 1
        elif len(shape) == len(array.shape):
            for letter, factor, size in zip(array.letters, array.factors, shape, strict=True):
                votes[letter][size // factor] += 1
    return {letter: counts.most_common(1)[0][0] for letter, counts in votes.items()}


def _check_type(array: Argument, value: Any, arrays: dict[Argument, Any], common: str) -> None:
    """Refuse a value that is not an array of a dtype that this argument may have."""
    name = array.name
    if type(value) not in (np.ndarray, np.memmap):  # other subclasses compute otherwise: np.matrix
        raise ValueError(f"{name} must be a NumPy array, got {type(value).__name__}")
    allowed: tuple[str, ...] = (common,)
    if array.kind in INTEGERS:
        allowed = ("int32",)
    elif array.kind == "scales":
        allowed = ("float32",)
    elif array.kind in EIGHT_BITS:
        eight, scales = EIGHT_BITS[array.kind], [a.name for a in arrays if "scale" in a.name]
        if value.dtype == eight and not scales:
            needed = "scale" if array.kind == "weights" else "key_scales"
            raise ValueError(f"{needed} must be given for {array.kind} of 8 bits")
        allowed = (eight,) if scales else (common, "float16")
        first = next(other for other in arrays if other.kind == array.kind)
        if arrays[first].dtype in allowed:  # keys and values have one type
            allowed = (str(arrays[first].dtype),)
    if value.dtype not in [np.dtype(dtype) for dtype in allowed]:
        raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value.dtype}")
    if array.kind == "weights" and value.dtype == np.float16 and not np.isfinite(value).all():
        raise ValueError(f"{name} holds nan or infinity; weights of 16 bits must be finite")
    if value.dtype == np.uint8 and value.shape[-1:] > (LONGEST,):
        raise ValueError(
            f"{name} must have at most {LONGEST} channels of 8 bits, got {value.shape[-1]}"
        )


def _shape(array: Argument, sizes: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape that letters mean; a letter without a size is -1."""
    if array.shape == ("*",):
        return tuple(sizes.get("*", ()))
    axes = zip(array.letters, array.factors, strict=True)
    return tuple(sizes.get(letter, -1) * factor for letter, factor in axes)


def _check_rules(op: Op, values: dict[str, Any]) -> None:
    """Check the rules of an op's sizes and numbers."""
    for name, rule in op.rules:
        if not eval(rule, {}, values):  # safe: this package declares the rules
            words = dict.fromkeys(re.findall(r"[A-Za-z]\w*", rule))
            got = ", ".join(f"{word}={values[word]!r:.50}" for word in words if word in values)
            raise ValueError(f"{name} must be such that {rule}, got {got}")


def _documentation(op: Op, parameters: dict[str, Any]) -> str:
    """Return the docstring of a public function: that of the reference, with shapes.

    Parameters
    ----------
    parameters : of the function, each with its default
    """

    def line(array: Argument, absent: str = "") -> str:
        shape = "any shape" if array.shape == ("*",) else f"({', '.join(array.shape)})"
        if array.kind == "offsets":
            shape += " int32, the first row of each sequence of a ragged batch, then T"
        return f"{array.name} : {shape}{absent if array.optional else ''}"

    summary = inspect.cleandoc(getattr(reference, op.name).__doc__ or "")
    formula, _, examples = summary.partition("\nExamples\n--------\n")
    formula = formula.split("\nParameters\n")[0].rstrip()
    lines = {array.name: line(array, ", or None") for array in op.arrays}
    lines |= {name: f"{name} : int, the size {letter}" for letter, name in GIVEN.items()}
    for name, default in op.numbers.items():
        shown = f"{type(default).__name__}, default {default}"
        lines[name] = f"{name} : {'int' if default is None else shown}"
    lines["n_kv_head"] = "n_kv_head : int, the size KV, default n_head"
    lines["backend"] = "backend : a name of `gpt2c.backends()`, default auto"
    inputs = [lines[name] for name in parameters]
    results = [
        line(array, ", if it was given" if array.mode == "~" else "") for array in op.outputs
    ]
    results = results or [f"{op.returns} : float"]
    parts = [formula, "", "Parameters", "----------", *inputs, "", "Returns", "-------", *results]
    return "\n".join([*parts, "", "Examples", "--------", examples])


PUBLIC = {op.name: _public(op) for op in OPS.values()}
globals().update(PUBLIC)

if TYPE_CHECKING:  # the types of the ops, for mypy and editors
    from gpt2c.kernels.op_types import *


def linear_forward(
    x: Array, weight: Array, scale: Any = None, bias: Any = None, backend: str = "auto"
) -> Array:
    """Return `matmul_forward`, the new name of this op."""
    _say_new_name("linear_forward", "matmul_forward(x, weight, bias, scale)")
    out: Array = PUBLIC["matmul_forward"](x, weight, bias, scale, backend=backend)
    return out


def cache_attention_forward(
    qkv: Array, keys: Array, values: Array, position: int, backend: str = "auto"
) -> tuple[Array, ...]:
    """Return `attention_forward`, the new name of this op, of one text and without its lse."""
    _say_new_name(
        "cache_attention_forward", "attention_forward(qkv, n_head, keys, values, position=position)"
    )
    forward = PUBLIC["attention_forward"]
    one = (array[None] for array in (keys, values))
    out, _, *caches = forward(qkv[None], len(keys), *one, position=position, backend=backend)
    return tuple(array[0] for array in (out, *caches))


def residual_backward(dout: Array, backend: str = "auto") -> tuple[Array, Array]:
    """Return dout twice: the gradient of a sum is that of both terms, so it needs no op."""
    _say_new_name("residual_backward", "dout itself, for both terms")
    return dout.copy(), dout.copy()


def _say_new_name(old: str, new: str) -> None:
    warnings.warn(f"gpt2c.ops.{old} is now {new}", DeprecationWarning, stacklevel=3)
