"""Examples of every op: arguments, tolerance, cost, and shapes that GPT-2 uses.

The kernel tests and the benchmarks use it. `EXAMPLES[name].make(rng, **shape)` returns an op's
arguments for any shape, outputs first: float64 and int32, with float16 and uint8 weights, and
caches of float16, or of int8 with float32 scales. Outputs that are written hold NaN, so that a
missed element shows; outputs that are accumulated or updated hold numbers. All floats are
representable in float32, so that the float64 reference and a float32 kernel start from the same
numbers.

The metric is the normalised error max|a - b| / max|b| over one output, where b is the float64
reference. The rounding error of a sum grows with the size of its terms, not with the size of a
result in which the terms cancel. One float32 rounding is 6e-8.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2c.kernels import reference
from gpt2c.kernels.op import OPS

__all__ = ["BF16_ATTENTION", "EPS", "EXAMPLES", "OpExample", "OpShape", "normalised_error"]

OpShape = dict[str, Any]
EPS = float(np.float32(1e-5))
# of attention: a kernel rounds multiples of the softmax's weights, the reference the weights, by
# 2^-9 of each
BF16_ATTENTION = 2.0**-8
KEY, FIRST = 0x9ABCDEF012345678, 0x8765432180000003  # of dropout


@dataclass(frozen=True)
class OpExample:
    """The arguments, tolerance and cost of an op.

    Attributes
    ----------
    rtol : the normalised error that a kernel may have
    make : returns the arguments, see above
    shapes : those of GPT-2 124M; a quick benchmark takes only the first
    cost : the least floating-point operations and bytes of memory that a shape takes, each number
        read or written once. An exponential counts as 10 operations
    kinds : other values that `make` knows, each with the error that a kernel may have on them
    """

    rtol: float
    make: Callable[..., list[Any]]
    shapes: list[OpShape]
    cost: Callable[..., tuple[float, float]]
    kinds: dict[str, float] = field(default_factory=dict)

    @property
    def letters(self) -> list[str]:
        """The sizes that `make` must be told."""
        _, *parameters = inspect.signature(self.make).parameters.values()
        return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


def normalised_error(a: Any, b: Any) -> float:
    """Return max|a - b| / max|b|, or max|a - b| where b is all zeros; NaN if either holds a NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))


# ---- values --------------------------------------------------------------------------------------


def _rounded(values: Any) -> Any:
    """Round to float32; return float64."""
    return np.asarray(values, np.float32).astype(np.float64)


def _scalar(value: float) -> float:
    return float(np.float32(value))


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Any:
    return _rounded(rng.standard_normal(shape, np.float32) * np.float32(scale))


def _unwritten(*shape: int) -> Any:
    return np.full(shape, np.nan)


def _tokens(rng: np.random.Generator, V: int, *shape: int) -> Any:
    return rng.integers(0, V, shape, np.int32)


def _forward(name: str, arguments: list[Any]) -> list[Any]:
    """Run a forward op's reference; return its outputs, which the backward op needs."""
    getattr(reference, name)(*arguments)
    outputs = arguments[: len(OPS[name].outputs)]
    return [None if output is None else _rounded(output) for output in outputs]


# ---- arguments, op by op -------------------------------------------------------------------------


def _weight(rng: Any, kind: str, rows: int, C: int) -> tuple[Any, Any]:
    """Return a weight of a dtype, and the scale of a uint8 weight, else None."""
    if kind == "uint8":
        return rng.integers(1, 256, (rows, C), np.uint8), _rounded(rng.uniform(0.5, 1.5, rows))
    weight = _normal(rng, rows, C)
    return weight.astype(np.float16) if kind == "float16" else weight, None


def _offsets(rng: Any, T: int, S: int) -> Any:
    """Return where S - 1 sequences of T tokens in all begin and end, or None where S is 0."""
    if not S:
        return None
    inner = np.sort(rng.permutation(T - 1)[: S - 2]) + 1
    return np.array([0, *inner, T], np.int32)


def _encoder_forward(
    rng: Any, B: int, T: int, C: int, V: int, kind: str = "float32", position: int = 0, S: int = 0
) -> list[Any]:
    idx = _tokens(rng, V, B, T)
    idx.flat[0] = V - 1  # the last row of wte is read
    wte, scale = _weight(rng, "float32" if kind == "no wpe" else kind, V, C)
    wpe = _normal(rng, position + T + 2, C)  # more positions than are used
    parts = idx, wte, None if kind == "no wpe" else wpe, scale, _offsets(rng, T, S)
    return [_unwritten(B, T, C), *parts, position]


def _encoder_backward(
    rng: Any, B: int, T: int, C: int, V: int, kind: str = "float32", S: int = 0
) -> list[Any]:
    _, idx, dwte, dwpe, _, offsets, _ = _encoder_forward(rng, B, T, C, V, kind, S=S)
    return [None if kind == "no wte" else dwte, dwpe, _normal(rng, B, T, C), idx, offsets]


def _rows(rng: Any, N: int, C: int, kind: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "normal": lambda: _normal(rng, N, C),
        "large": lambda: _normal(rng, N, C, scale=1e4),
        "offset": lambda: _rounded(_normal(rng, N, C) + 1e4),
        "constant": lambda: np.repeat(_normal(rng, N, 1), C, axis=1),
        "zero": lambda: np.zeros((N, C)),
    }
    return makers[kind]()


def _layernorm_forward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    x = _rows(rng, N, C, kind)
    weight, bias = _normal(rng, C), _normal(rng, C)
    return [_unwritten(N, C), _unwritten(N), _unwritten(N), x, weight, bias, EPS]


def _layernorm_backward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    arguments = _layernorm_forward(rng, N, C, kind)
    x, weight = arguments[3:5]
    _, mean, rstd = _forward("layernorm_forward", arguments)
    gradients = [_normal(rng, N, C), _normal(rng, C), _normal(rng, C)]
    return [*gradients, _normal(rng, N, C), x, weight, mean, rstd]


def _rmsnorm_forward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    return [_unwritten(N, C), _unwritten(N), _rows(rng, N, C, kind), _normal(rng, C), EPS]


def _rmsnorm_backward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    arguments = _rmsnorm_forward(rng, N, C, kind)
    _, rstd = _forward("rmsnorm_forward", arguments)
    x, weight = arguments[2:4]
    return [_normal(rng, N, C), _normal(rng, C), _normal(rng, N, C), x, weight, rstd]


def _matmul_forward(
    rng: Any,
    N: int,
    C: int,
    OC: int,
    kind: str = "float32",
    bias: bool = True,
    precision: str = "fp32",
) -> list[Any]:
    x, (weight, scale) = _normal(rng, N, C), _weight(rng, kind, OC, C)
    if kind == "uint8":
        # No number of x lies near the border of two of its 127 steps, where float64 and float32 may
        # round differently; the largest number of a row sets the size of the steps.
        steps = rng.integers(-126, 127, (N, C)) + rng.uniform(-0.4, 0.4, (N, C))
        steps[np.arange(N), rng.integers(0, C, N)] = rng.choice([-127, 127], N)
        x = _rounded(steps * rng.uniform(0.005, 0.02, (N, 1)))
    return [_unwritten(N, OC), x, weight, _normal(rng, OC) if bias else None, scale, precision]


def _matmul_backward(
    rng: Any,
    N: int,
    C: int,
    OC: int,
    kind: str = "float32",
    bias: bool = True,
    accumulate: bool = True,
    precision: str = "fp32",
    add: bool = False,
) -> list[Any]:
    held = _normal if accumulate else lambda rng, *shape: _unwritten(*shape)
    dweight, dbias = held(rng, OC, C), held(rng, OC) if bias else None
    dout, x, (weight, scale) = _normal(rng, N, OC), _normal(rng, N, C), _weight(rng, kind, OC, C)
    dx = _normal(rng, N, C) if add else _unwritten(N, C)
    return [dx, dweight, dbias, dout, x, weight, scale, accumulate, precision, add]


def _lora_forward(rng: Any, N: int, C: int, OC: int, R: int, scale: float = 0.7) -> list[Any]:
    y, x, down, up = (_normal(rng, *shape) for shape in ((N, OC), (N, C), (R, C), (OC, R)))
    return [_unwritten(N, OC), _unwritten(N, R), y, x, down, up, _scalar(scale)]


def _lora_backward(
    rng: Any, N: int, C: int, OC: int, R: int, scale: float = 0.7, accumulate: bool = True
) -> list[Any]:
    arguments = _lora_forward(rng, N, C, OC, R, scale)
    _, u = _forward("lora_forward", arguments)
    held = _normal if accumulate else lambda rng, *shape: _unwritten(*shape)
    _, _, _, x, down, up, factor = arguments
    gradients = [_unwritten(N, C), held(rng, R, C), held(rng, OC, R)]
    return [*gradients, _normal(rng, N, OC), x, u, down, up, factor, accumulate]


def _matrix_transpose(rng: Any, R: int, C: int) -> list[Any]:
    return [_unwritten(C, R), _normal(rng, R, C)]


def _attention_forward(
    rng: Any,
    B: int,
    T: int,
    NH: int,
    HS: int,
    kind: str = "normal",
    position: int = 0,
    P: int = 0,
    KV: int = 0,
    S: int = 0,
    dropout: float = 0.0,
    precision: str = "fp32",
    cache: str = "float64",
) -> list[Any]:
    # with 10, scores spread over hundreds, and most rows of the softmax are a 1 and zeros
    scale, KV = 10.0 if kind == "saturated" else 1.0, KV or NH
    qkv = _normal(rng, B, T, (NH + 2 * KV) * HS, scale=scale)
    outputs = [_unwritten(B, T, NH * HS), _unwritten(B, NH, T)]
    if not P:
        inputs = [None, None, None, None, qkv, _offsets(rng, T, S)]
        return [*outputs, *inputs, 0, dropout, KEY, FIRST, precision]
    caches = [_normal(rng, B, KV, P, HS, scale=scale), _normal(rng, B, KV, P, HS)]
    scales: list[Any] = [None, None]
    if cache == "int8":
        caches = [rng.integers(-127, 128, rows.shape, np.int8) for rows in caches]
        steps = rng.uniform(0.005, 0.02, (2, B, KV, P)).astype(np.float32)
        scales = [np.float32(scale) * steps[0], steps[1]]
    written = np.s_[:, :, position : position + T]  # the rows around them stay
    caches = [rows.astype(cache, copy=False) for rows in caches]
    for rows in scales if cache == "int8" else caches:
        rows[written] = np.nan
    return [*outputs, *caches, *scales, qkv, None, position, 0.0, 0, 0, precision]


def _attention_backward(
    rng: Any,
    B: int,
    T: int,
    NH: int,
    HS: int,
    kind: str = "normal",
    KV: int = 0,
    S: int = 0,
    dropout: float = 0.0,
    precision: str = "fp32",
) -> list[Any]:
    arguments = _attention_forward(
        rng, B, T, NH, HS, kind, KV=KV, S=S, dropout=dropout, precision=precision
    )
    out, lse, *_ = _forward("attention_forward", arguments)
    _, _, _, _, _, _, qkv, offsets, _, *numbers = arguments
    return [_unwritten(*qkv.shape), _normal(rng, B, T, NH * HS), qkv, out, lse, offsets, *numbers]


def _rope_forward(
    rng: Any, B: int, T: int, NH: int, D: int, position: int = 3, S: int = 0
) -> list[Any]:
    x = _normal(rng, B, T, (NH + 2) * 2 * D)  # a head of keys and one of values
    angles = rng.uniform(-np.pi, np.pi, (position + T + 2, D))  # more positions than are used
    return [
        _unwritten(*x.shape),
        *(x, _rounded(np.cos(angles)), _rounded(np.sin(angles))),
        *(_offsets(rng, T, S), NH + 1, position),
    ]


def _hidden(rng: Any, kind: str, *shape: int) -> Any:
    n = math.prod(shape)
    makers: dict[str, Callable[[], Any]] = {
        "normal": lambda: _normal(rng, n),
        "wide": lambda: np.linspace(-10, 10, n),  # from where GELU is 0 to where it is x
        "huge": lambda: rng.uniform(-1e4, 1e4, n),
        "tiny": lambda: 10 ** rng.uniform(-44, -30, n) * rng.choice([-1, 1], n),  # and denormals
        "zero": lambda: np.zeros(n),
    }
    return _rounded(makers[kind]()).reshape(shape)


def _gelu_forward(rng: Any, n: int, kind: str = "normal") -> list[Any]:
    return [_unwritten(n), _hidden(rng, kind, n)]


def _gelu_backward(rng: Any, n: int, kind: str = "normal") -> list[Any]:
    dx, x = _gelu_forward(rng, n, kind)
    return [dx, _normal(rng, n), x]


def _swiglu_forward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    gate, up = _hidden(rng, kind, N, C), _normal(rng, N, C)
    return [_unwritten(N, C), np.concatenate([gate, up], axis=1)]


def _swiglu_backward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    dout, x = _swiglu_forward(rng, N, C, kind)
    return [_unwritten(N, 2 * C), _normal(rng, *dout.shape), x]


def _residual_forward(rng: Any, n: int) -> list[Any]:
    return [_unwritten(n), _normal(rng, n), _normal(rng, n)]


def _dropout_forward(rng: Any, N: int, C: int, dropout: float = 0.25) -> list[Any]:
    return [_unwritten(N, C), _normal(rng, N, C), dropout, KEY, FIRST]


def _crossentropy_forward(rng: Any, N: int, V: int, kind: str = "normal") -> list[Any]:
    makers: dict[str, Callable[[], Any]] = {
        "normal": lambda: _normal(rng, N, V),
        "weighted": lambda: _normal(rng, N, V),
        "ignored": lambda: _normal(rng, N, V),
        "equal": lambda: np.repeat(_normal(rng, N, 1), V, axis=1),
        "spread": lambda: _rounded(rng.uniform(-1e4, 1e4, (N, V))),
    }
    logits = makers[kind]()
    targets = _tokens(rng, V, N)
    targets[2::3] = -1
    targets[0] = V - 1
    if kind == "ignored":
        targets[:] = -1
    return [_unwritten(N), _unwritten(N), logits, targets]


def _crossentropy_backward(rng: Any, N: int, V: int, kind: str = "normal") -> list[Any]:
    arguments = _crossentropy_forward(rng, N, V, kind)
    _, lse = _forward("crossentropy_forward", arguments)
    weights = _normal(rng, N) if kind == "weighted" else None
    if weights is not None:
        weights[1::4] = 0
    return [_unwritten(N, V), arguments[2], lse, arguments[3], weights, _scalar(1 / N)]


def _adamw_update(
    rng: Any,
    n: int,
    t: int = 1000,
    weight_decay: float = 0.1,
    grad_scale: float = 1.0,
    kind: str = "normal",
) -> list[Any]:
    started = float(t > 1)  # m and v are zero before the first step
    param, m = _normal(rng, n), _normal(rng, n, scale=0.1 * started)
    v = _rounded(rng.uniform(0.01, 1, n) * started)
    grad = _normal(rng, n, scale=0.0 if kind == "zero" else 1.0)
    # the learning rate is large, so that the step shows beside the parameter
    scalars = [_scalar(value) for value in (0.1, 0.9, 0.95, 1e-8, weight_decay)]
    return [param, m, v, grad, *scalars, t, _scalar(grad_scale)]


def _global_norm(rng: Any, n: int, kind: str = "normal") -> list[Any]:
    # in float32, the squares of huge and tiny ones would overflow and vanish
    return [_normal(rng, n, scale={"normal": 1.0, "huge": 1e30, "tiny": 1e-30}[kind])]


# ---- the table -----------------------------------------------------------------------------------

# Tolerances. A float32 sum of K terms, added one by one, loses about sqrt(K) roundings, 3e-6 at
# K = 3072; sums in vector lanes and blocks lose fewer. The kernels' exp, tanh and log are accurate
# to a few roundings.
SUM, FEW, COPY = 4e-6, 2e-6, 0.0  # long sums; a few operations, or short sums; no operation
ROUNDING = 1.2e-7  # one operation: half a unit in the last place of its result, and a margin

ENCODER: list[OpShape] = [{"B": 4, "T": 1024, "C": 768, "V": 50257}]
ROWS: list[OpShape] = [{"N": 4096, "C": 768}]
MATMUL: list[OpShape] = [
    {"N": 1024, "C": 768, "OC": 3072},
    {"N": 1024, "C": 3072, "OC": 768},
    {"N": 1024, "C": 768, "OC": 768},
    {"N": 256, "C": 768, "OC": 3072},
    {"N": 1024, "C": 768, "OC": 50257},
]
ATTENTION: list[OpShape] = [
    {"B": 1, "T": 1024, "NH": 12, "HS": 64},
    {"B": 4, "T": 64, "NH": 12, "HS": 64},
]
ROPE: list[OpShape] = [{"B": 4, "T": 1024, "NH": 12, "D": 32}]
TRANSPOSE: list[OpShape] = [{"R": 768, "C": 3072}, {"R": 3072, "C": 768}]
# one token, tokens of several texts, and a piece of a prompt
LINEAR: list[OpShape] = [
    {"N": N, "C": 768, "OC": OC, "kind": kind}
    for N, OC in [(1, 3072), (1, 50257), (8, 3072), (256, 3072)]
    for kind in ("float32", "float16", "uint8")
]
WEIGHT_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
CACHE: list[OpShape] = [
    {"B": 1, "T": 1, "NH": 12, "HS": 64, "position": 1023, "P": 1024},
    {"B": 1, "T": 256, "NH": 12, "HS": 64, "position": 768, "P": 1024},
]
LOGITS: list[OpShape] = [{"N": 512, "V": 50257}]
ADAPTERS: list[OpShape] = [{**shape, "R": 8} for shape in MATMUL]
HIDDEN: list[OpShape] = [{"n": 4096 * 3072}]
GATED: list[OpShape] = [{"N": 4096, "C": 2048}]
STREAM: list[OpShape] = [{"n": 4096 * 768}]
WEIGHTS: list[OpShape] = [{"n": 40_000_000}]

ODD_ROWS = ("large", "offset", "constant", "zero")
ODD_HIDDEN = ("wide", "huge", "tiny", "zero")
ODD_LOGITS = ("ignored", "equal", "spread")

EXAMPLES: dict[str, OpExample] = {
    "encoder_forward": OpExample(
        ROUNDING,
        _encoder_forward,
        ENCODER,
        lambda B, T, C, V: (B * T * C, 8 * B * T * C),
        kinds={"float16": ROUNDING, "uint8": ROUNDING},
    ),
    "encoder_backward": OpExample(
        FEW, _encoder_backward, ENCODER, lambda B, T, C, V: (2 * B * T * C, 12 * B * T * C)
    ),
    "layernorm_forward": OpExample(
        FEW,
        _layernorm_forward,
        ROWS,
        lambda N, C: (8 * N * C, 8 * N * C),
        # the mean is rounded by 6e-8 of itself: 1e4 times more beside a deviation of 1;
        # and where the variance is 0, rstd = 316 multiplies it
        kinds={"large": FEW, "offset": 1e-3, "constant": 1e-4, "zero": FEW},
    ),
    "layernorm_backward": OpExample(  # dweight and dbias are sums over rows
        SUM,
        _layernorm_backward,
        ROWS,
        lambda N, C: (16 * N * C, 16 * N * C),
        kinds=dict.fromkeys(ODD_ROWS, FEW),
    ),
    "rmsnorm_forward": OpExample(
        FEW,
        _rmsnorm_forward,
        ROWS,
        lambda N, C: (5 * N * C, 8 * N * C),
        # the sum of equal squares is rounded the same way many times in a row: with one lane, 1003
        # channels lose 5e-6
        kinds=dict.fromkeys(ODD_ROWS, FEW) | {"constant": 1e-5},
    ),
    "rmsnorm_backward": OpExample(  # dweight is a sum over rows
        SUM,
        _rmsnorm_backward,
        ROWS,
        lambda N, C: (13 * N * C, 16 * N * C),
        kinds=dict.fromkeys(ODD_ROWS, FEW),
    ),
    # with 8-bit weights the sums are of integers and exact; only a few roundings remain
    "matmul_forward": OpExample(
        SUM,
        _matmul_forward,
        MATMUL + LINEAR,
        lambda N, C, OC, kind="float32": (
            2 * N * C * OC,
            4 * N * (C + OC) + WEIGHT_BYTES[kind] * OC * C,
        ),
        # sums of integers are exact; the product of two scales, that with a sum, and a bias are
        # rounded
        kinds={"float16": SUM, "uint8": 1e-6},
    ),
    "matmul_backward": OpExample(
        SUM,
        _matmul_backward,
        [{**shape, "accumulate": False} for shape in MATMUL],
        lambda N, C, OC, accumulate: (4 * N * C * OC, 8 * (N * C + OC * C) + 4 * N * OC),
        kinds={"float16": SUM, "uint8": SUM},
    ),
    "lora_forward": OpExample(
        SUM,
        _lora_forward,
        ADAPTERS,
        lambda N, C, OC, R: (2 * N * R * (C + OC), 4 * (N * C + 2 * N * OC + R * (N + C + OC))),
    ),
    "lora_backward": OpExample(
        SUM,
        _lora_backward,
        [{**shape, "accumulate": False} for shape in ADAPTERS],
        lambda N, C, OC, R, accumulate: (
            4 * N * R * (C + OC),
            4 * (2 * N * C + N * OC + R * (N + 2 * C + 2 * OC)),
        ),
    ),
    "matrix_transpose": OpExample(COPY, _matrix_transpose, TRANSPOSE, lambda R, C: (0, 8 * R * C)),
    # the causal half; backward computes the scores again, which is not counted
    "attention_forward": OpExample(
        SUM,
        _attention_forward,
        ATTENTION + CACHE,
        # with a cache: its rows that the queries see; each key and value is read once
        lambda B, T, NH, HS, position=0, P=0: (
            4 * B * NH * HS * (T * position + (T * (T + 1) if P else T * T) // 2),
            8 * B * NH * HS * (position + 3 * T) if P else 16 * B * T * NH * HS,
        ),
        # scores of hundreds are rounded by 1e-5 and more, the relative error of their exp
        kinds={"saturated": 1e-4},
    ),
    "attention_backward": OpExample(
        SUM,
        _attention_backward,
        ATTENTION,
        lambda B, T, NH, HS: (4 * B * NH * HS * T * T, 32 * B * T * NH * HS),
        kinds={"saturated": 1e-4},
    ),
    "rope_forward": OpExample(
        FEW,
        _rope_forward,
        ROPE,
        lambda B, T, NH, D: (6 * B * T * (NH + 1) * D, 16 * B * T * (NH + 2) * D),
    ),
    "rope_backward": OpExample(
        FEW,
        _rope_forward,  # a gradient has the shape of qkv
        ROPE,
        lambda B, T, NH, D: (6 * B * T * (NH + 1) * D, 16 * B * T * (NH + 2) * D),
    ),
    "gelu_forward": OpExample(
        FEW,
        _gelu_forward,
        HIDDEN,
        lambda n: (18 * n, 8 * n),
        kinds=dict.fromkeys(ODD_HIDDEN, FEW),
    ),
    "gelu_backward": OpExample(
        FEW,
        _gelu_backward,
        HIDDEN,
        lambda n: (28 * n, 12 * n),
        kinds=dict.fromkeys(ODD_HIDDEN, FEW),
    ),
    "swiglu_forward": OpExample(
        FEW,
        _swiglu_forward,
        GATED,
        lambda N, C: (14 * N * C, 12 * N * C),
        kinds=dict.fromkeys(ODD_HIDDEN, FEW),
    ),
    "swiglu_backward": OpExample(
        FEW,
        _swiglu_backward,
        GATED,
        lambda N, C: (20 * N * C, 20 * N * C),
        kinds=dict.fromkeys(ODD_HIDDEN, FEW),
    ),
    "residual_forward": OpExample(ROUNDING, _residual_forward, STREAM, lambda n: (n, 12 * n)),
    # integers count as operations: in 4 words, 7 rounds of 2 products, 4 exclusive ors and 2 sums
    "dropout_forward": OpExample(
        ROUNDING, _dropout_forward, ROWS, lambda N, C: (16 * N * C, 8 * N * C)
    ),
    "crossentropy_forward": OpExample(
        FEW,
        _crossentropy_forward,
        LOGITS,
        lambda N, V: (13 * N * V, 4 * N * V),
        kinds=dict.fromkeys(ODD_LOGITS, FEW),
    ),
    "crossentropy_backward": OpExample(
        FEW,
        _crossentropy_backward,
        LOGITS,
        lambda N, V: (12 * N * V, 8 * N * V),
        kinds=dict.fromkeys(ODD_LOGITS, FEW),
    ),
    "adamw_update": OpExample(
        FEW, _adamw_update, WEIGHTS, lambda n: (14 * n, 28 * n), kinds={"zero": FEW}
    ),
    # summed in float64 by the kernels too
    "global_norm": OpExample(
        1e-12,
        _global_norm,
        WEIGHTS,
        lambda n: (2 * n, 4 * n),
        kinds={"huge": 1e-12, "tiny": 1e-12},
    ),
}
