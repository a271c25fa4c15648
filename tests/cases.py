"""One table of cases: for every op its arguments, shapes and tolerance.

It drives the kernel tests and can drive benchmarks: `OPS[name].make(rng, **shape)` gives an op's
arguments for any shape, outputs first, in float64 or int32. Outputs that are written hold NaN, so
that an element left out shows; outputs that are accumulated or updated hold numbers. All floats are
representable in float32, so that the float64 reference and a float32 kernel start from the same.

The metric is the normalised error max|a - b| / max|b| over one output, b being the float64
reference: what a sum loses to rounding grows with the size of its terms, not with the size of an
element in which they happened to cancel. One float32 rounding is 6e-8.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2c import reference

Shape = dict[str, Any]
EPS = float(np.float32(1e-5))


@dataclass(frozen=True)
class Op:
    """An op; the first `outputs` of the arguments from `make` are written, updated or accumulated.

    A shape may name a `kind` of values; `rtol_of` has the kinds that need their own tolerance.
    """

    outputs: int
    rtol: float
    make: Callable[..., list[Any]]
    shapes: list[Shape]
    rtol_of: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)  # so that it can be hashed, to be solved once
class Case:
    """One op on one shape."""

    name: str
    shape: Shape

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{letter}={size}" for letter, size in self.shape.items())])

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def rtol(self) -> float:
        return self.op.rtol_of.get(self.shape.get("kind", ""), self.op.rtol)

    def arguments(self) -> list[Any]:
        """Make the arguments, the same ones every time."""
        return self.op.make(np.random.default_rng(zlib.crc32(str(self).encode())), **self.shape)


def normalised_error(a: Any, b: Any) -> float:
    """Give max|a - b| / max|b|, or max|a - b| where b is all zeros; NaN if either holds a NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))


# ---- values --------------------------------------------------------------------------------------


def rounded(values: Any) -> Any:
    """Round to float32, keep as float64."""
    return np.asarray(values, np.float32).astype(np.float64)


def scalar(value: float) -> float:
    return float(np.float32(value))


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Any:
    return rounded(rng.standard_normal(shape, np.float32) * np.float32(scale))


def unwritten(*shape: int) -> Any:
    return np.full(shape, np.nan)


def tokens(rng: np.random.Generator, V: int, *shape: int) -> Any:
    return rng.integers(0, V, shape, np.int32)


def forward(name: str, arguments: list[Any]) -> list[Any]:
    """Run the reference of a forward op, for a backward op that needs what it wrote."""
    getattr(reference, name)(*arguments)
    return [rounded(output) for output in arguments[: OPS[name].outputs]]


# ---- arguments, op by op -------------------------------------------------------------------------


def encoder_forward(rng: Any, B: int, T: int, C: int, V: int) -> list[Any]:
    idx = tokens(rng, V, B, T)
    idx.flat[0] = V - 1  # the last row of wte is read
    wte, wpe = normal(rng, V, C), normal(rng, T + 2, C)  # more positions than are used
    return [unwritten(B, T, C), idx, wte, wpe]


def encoder_backward(rng: Any, B: int, T: int, C: int, V: int) -> list[Any]:
    _, idx, dwte, dwpe = encoder_forward(rng, B, T, C, V)
    return [dwte, dwpe, normal(rng, B, T, C), idx]


def layernorm_forward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    x = {
        "normal": lambda: normal(rng, N, C),
        "large": lambda: normal(rng, N, C, scale=1e4),
        "offset": lambda: rounded(normal(rng, N, C) + 1e4),
        "constant": lambda: np.repeat(normal(rng, N, 1), C, axis=1),
        "zero": lambda: np.zeros((N, C)),
    }[kind]()
    weight, bias = normal(rng, C), normal(rng, C)
    return [unwritten(N, C), unwritten(N), unwritten(N), x, weight, bias, EPS]


def layernorm_backward(rng: Any, N: int, C: int, kind: str = "normal") -> list[Any]:
    arguments = layernorm_forward(rng, N, C, kind)
    x, weight = arguments[3:5]
    _, mean, rstd = forward("layernorm_forward", arguments)
    gradients = [normal(rng, N, C), normal(rng, C), normal(rng, C)]
    return [*gradients, normal(rng, N, C), x, weight, mean, rstd]


def matmul_forward(rng: Any, N: int, C: int, OC: int, bias: bool = True) -> list[Any]:
    x, weight = normal(rng, N, C), normal(rng, OC, C)
    return [unwritten(N, OC), x, weight, normal(rng, OC) if bias else None]


def matmul_backward(
    rng: Any, N: int, C: int, OC: int, bias: bool = True, accumulate: bool = True
) -> list[Any]:
    held = normal if accumulate else lambda rng, *shape: unwritten(*shape)
    dweight, dbias = held(rng, OC, C), held(rng, OC) if bias else None
    dout, x, weight = normal(rng, N, OC), normal(rng, N, C), normal(rng, OC, C)
    return [unwritten(N, C), dweight, dbias, dout, x, weight, accumulate]


def attention_forward(
    rng: Any, B: int, T: int, NH: int, HS: int, kind: str = "normal"
) -> list[Any]:
    # at 10, scores spread over hundreds: most rows of the softmax are a 1 and zeros
    qkv = normal(rng, B, T, 3 * NH * HS, scale=10.0 if kind == "saturated" else 1.0)
    return [unwritten(B, T, NH * HS), unwritten(B, NH, T), qkv]


def attention_backward(
    rng: Any, B: int, T: int, NH: int, HS: int, kind: str = "normal"
) -> list[Any]:
    arguments = attention_forward(rng, B, T, NH, HS, kind)
    out, lse = forward("attention_forward", arguments)
    dout = normal(rng, B, T, NH * HS)
    return [unwritten(B, T, 3 * NH * HS), dout, arguments[2], out, lse]


def gelu_forward(rng: Any, n: int, kind: str = "normal") -> list[Any]:
    x = {
        "normal": lambda: normal(rng, n),
        "wide": lambda: np.linspace(-10, 10, n),  # from where it is 0 to where it is x
        "huge": lambda: rng.uniform(-1e4, 1e4, n),
        "tiny": lambda: 10 ** rng.uniform(-44, -30, n) * rng.choice([-1, 1], n),  # and denormals
        "zero": lambda: np.zeros(n),
    }[kind]()
    return [unwritten(n), rounded(x)]


def gelu_backward(rng: Any, n: int, kind: str = "normal") -> list[Any]:
    dx, x = gelu_forward(rng, n, kind)
    return [dx, normal(rng, n), x]


def residual_forward(rng: Any, n: int) -> list[Any]:
    return [unwritten(n), normal(rng, n), normal(rng, n)]


def residual_backward(rng: Any, n: int) -> list[Any]:
    return [unwritten(n), unwritten(n), normal(rng, n)]


def crossentropy_forward(rng: Any, N: int, V: int, kind: str = "normal") -> list[Any]:
    logits = {
        "normal": lambda: normal(rng, N, V),
        "ignored": lambda: normal(rng, N, V),
        "equal": lambda: np.repeat(normal(rng, N, 1), V, axis=1),
        "spread": lambda: rounded(rng.uniform(-1e4, 1e4, (N, V))),
    }[kind]()
    targets = tokens(rng, V, N)
    targets[2::3] = -1
    targets[0] = V - 1
    if kind == "ignored":
        targets[:] = -1
    return [unwritten(N), unwritten(N), logits, targets]


def crossentropy_backward(rng: Any, N: int, V: int, kind: str = "normal") -> list[Any]:
    arguments = crossentropy_forward(rng, N, V, kind)
    _, lse = forward("crossentropy_forward", arguments)
    return [unwritten(N, V), arguments[2], lse, arguments[3], scalar(1 / N)]


def adamw_update(
    rng: Any,
    n: int,
    t: int = 1000,
    weight_decay: float = 0.1,
    grad_scale: float = 1.0,
    kind: str = "normal",
) -> list[Any]:
    started = float(t > 1)  # m and v are zero before the first step
    param, m = normal(rng, n), normal(rng, n, scale=0.1 * started)
    v = rounded(rng.uniform(0.01, 1, n) * started)
    grad = normal(rng, n, scale=0.0 if kind == "zero" else 1.0)
    # a learning rate so large that the step shows beside the parameter
    scalars = [scalar(value) for value in (0.1, 0.9, 0.95, 1e-8, weight_decay)]
    return [param, m, v, grad, *scalars, t, scalar(grad_scale)]


def global_norm(rng: Any, n: int, kind: str = "normal") -> list[Any]:
    # in float32, the squares of these would overflow and vanish
    return [normal(rng, n, scale={"normal": 1.0, "huge": 1e30, "tiny": 1e-30}[kind])]


# ---- shapes --------------------------------------------------------------------------------------


def shapes(letters: str, sizes: Iterable[tuple[Any, ...]]) -> list[Shape]:
    return [dict(zip(letters.split(), size, strict=True)) for size in sizes]


# vectors hold 4, 8 or 16 floats and loops are unrolled: one less, the same, one more; then primes
VECTOR_EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 257)
ELEMENTWISE = shapes("n", [(n,) for n in (*VECTOR_EDGES, 1023, 1024, 1025, 100_003, 768 * 64)])

ENCODER = shapes(
    "B T C V",
    [(1, 1, 1, 1), (2, 50, 5, 2), (1, 7, 768, 257), (4, 64, 768, 1000), (2, 9, 16, 50257)]
    + [(2, 3, C, 7) for C in VECTOR_EDGES],
)
ROWS = [(3, C) for C in VECTOR_EDGES] + [(1, 768), (2, 1600), (97, 768), (257, 48), (1, 3072)]
LAYERNORM = shapes("N C", ROWS) + shapes(
    "N C kind",
    [(5, C, kind) for C in (33, 768) for kind in ("large", "offset", "constant", "zero")],
)
# around the panels, tiles and blocks of a matmul, in each of its three sizes
PANELS = (95, 96, 97, 191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 512, 513, 767, 768, 769)
BLOCKS = (343, 344, 345, 515, 516, 517, 1031, 1032, 1033, 1535, 1536, 1537)
TILES = (*VECTOR_EDGES, 6, 11, 12, 13, 14, 23, 24, 25, 47, 48, 49)
MATMUL = shapes(
    "N C OC",
    [
        *((7, C, 18) for C in (*VECTOR_EDGES, *PANELS, *BLOCKS)),
        *((N, 24, 20) for N in (*TILES, *PANELS, *BLOCKS)),
        *((13, 24, OC) for OC in (*TILES, *PANELS)),
        *((1, C, 1) for C in (1, 16, 17)),
        *((1, 768, 2304), (4, 768, 3072), (5, 3072, 768), (65, 768, 768), (97, 385, 257)),
    ],
) + shapes("N C OC bias", [(1, 1, 1, False), (7, 33, 18, False), (98, 259, 194, False)])
ATTENTION = shapes(
    "B T NH HS",
    [(1, 1, 1, 1), (3, 1, 2, 8), (2, 7, 1, 1), (2, 17, 3, 5), (2, 65, 2, 33), (1, 40, 2, 130)]
    + [(1, T, 2, 16) for T in (2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 127, 128, 129)]
    + [(1, 19, 2, HS) for HS in VECTOR_EDGES]
    + [(1, 64, 12, 64), (2, 256, 1, 64), (1, 300, 2, 64), (1, 257, 1, 64)],
) + shapes("B T NH HS kind", [(2, 40, 2, 64, "saturated"), (1, 130, 1, 33, "saturated")])
CROSSENTROPY = shapes(
    "N V", [*((5, V) for V in VECTOR_EDGES), (1, 257), (97, 65), (3, 50257), (1, 50257)]
) + shapes(
    "N V kind",
    [(4, V, kind) for V in (257, 50257) for kind in ("ignored", "equal", "spread")],
)
GELU = ELEMENTWISE + shapes("n kind", [(1003, kind) for kind in ("wide", "huge", "tiny", "zero")])
ADAMW = (
    ELEMENTWISE
    + shapes(
        "n t weight_decay grad_scale",
        [(33, 1, 0.0, 1.0), (33, 1, 0.1, 0.25), (257, 1000, 0.0, 0.25), (257, 1_000_000, 0.1, 2.0)],
    )
    + shapes("n t kind", [(33, 1, "zero"), (33, 1000, "zero")])
)
NORM = ELEMENTWISE + shapes("n kind", [(257, "huge"), (257, "tiny")])

# ---- the table -----------------------------------------------------------------------------------

# Tolerances. A sum of K terms in float32 loses about sqrt(K) roundings if done one by one, 3e-6 at
# K = 3072, and fewer in vector lanes and blocks. Kernels' exp, tanh and log are good to a few
# roundings.
SUM, FEW, COPY = 4e-6, 2e-6, 0.0  # long sums; a few operations, or short sums; no operation
ROUNDING = 1.2e-7  # one operation: half a unit in the last place of its result, and a little

OPS: dict[str, Op] = {
    "encoder_forward": Op(1, ROUNDING, encoder_forward, ENCODER),
    "encoder_backward": Op(2, FEW, encoder_backward, ENCODER),
    "layernorm_forward": Op(
        3,
        FEW,
        layernorm_forward,
        LAYERNORM,
        # the mean is rounded by 6e-8 of itself: 1e4 times more beside a deviation of 1;
        # and where the variance is 0, rstd = 316 multiplies it
        {"offset": 1e-3, "constant": 1e-4},
    ),
    "layernorm_backward": Op(3, FEW, layernorm_backward, LAYERNORM),
    "matmul_forward": Op(1, SUM, matmul_forward, [*MATMUL, *shapes("N C OC", [(3, 768, 50257)])]),
    "matmul_backward": Op(
        3,
        SUM,
        matmul_backward,
        [
            *MATMUL,
            *shapes("N C OC", [(3, 64, 50257)]),
            *({**shape, "accumulate": False} for shape in MATMUL),
        ],
    ),
    # scores of hundreds are rounded by 1e-5 and more, and that is the relative error of their exp
    "attention_forward": Op(2, SUM, attention_forward, ATTENTION, {"saturated": 1e-4}),
    "attention_backward": Op(1, SUM, attention_backward, ATTENTION, {"saturated": 1e-4}),
    "gelu_forward": Op(1, FEW, gelu_forward, GELU),
    "gelu_backward": Op(1, FEW, gelu_backward, GELU),
    "residual_forward": Op(1, ROUNDING, residual_forward, ELEMENTWISE),
    "residual_backward": Op(2, COPY, residual_backward, ELEMENTWISE),
    "crossentropy_forward": Op(2, FEW, crossentropy_forward, CROSSENTROPY),
    "crossentropy_backward": Op(1, FEW, crossentropy_backward, CROSSENTROPY),
    "adamw_update": Op(3, FEW, adamw_update, ADAMW),
    "global_norm": Op(0, 1e-12, global_norm, NORM),  # summed in float64 by the kernels too
}

CASES = [Case(name, shape) for name, op in OPS.items() for shape in op.shapes]

# op: (output, input that it may be), by position
ALIASES = {
    "matmul_backward": (0, 4),
    "attention_backward": (0, 2),
    "gelu_backward": (0, 1),
    "residual_forward": (0, 1),
    "residual_backward": (0, 2),
    "crossentropy_backward": (0, 1),
}
