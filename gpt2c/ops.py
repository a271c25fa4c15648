"""Every op of GPT-2 on plain NumPy arrays, on any backend: checked arguments, new results.

    y, mean, rstd = gpt2c.ops.layernorm_forward(x, weight, bias, backend="avx2")

What each op computes stands in `gpt2c.reference`. Arrays must be C-contiguous float32 (backend
"numpy" takes float64 as well), token ids int32; the weights of `linear_forward` may be smaller.
Gradients come back as they are, not added to anything. Every function raises ValueError if an array
has another dtype, layout or shape, a token id is out of range, or the backend is unknown. Knows
nothing about models.
"""

from __future__ import annotations

from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.backend import Backend, get_backend
from gpt2c.checks import check_int32, check_layout, whole
from gpt2c.reference_reading import LONGEST

Array = NDArray[Any]


def _open(
    backend: str, **arrays: tuple[Array, str] | tuple[Array, str, tuple[str, ...]]
) -> tuple[Backend, dict[str, int]]:
    """Check arrays against shapes written in letters; give the backend and the size of each letter.

    A letter means the same size in every shape; "3C" is three times C. All arrays are of one float
    type, but those that come with dtypes of their own.
    """
    ops = get_backend(backend)
    dtypes = ("float32", "float64") if ops.name == "numpy" else ("float32",)
    common = next(
        (a.dtype.name for a, *_ in arrays.values() if getattr(a, "dtype", None) in dtypes),
        dtypes[0],
    )
    sizes: dict[str, int] = {}
    for name, (array, letters, *own) in arrays.items():
        wanted, allowed = letters.split(), own[0] if own else (common,)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} must be a NumPy array, got {type(array).__name__}")
        if array.dtype not in [np.dtype(dtype) for dtype in allowed]:
            kinds = " or ".join(allowed)
            raise ValueError(f"{name} must be {kinds} for backend {ops.name!r}, got {array.dtype}")
        fits = array.ndim == len(wanted) and array.size > 0
        for letter, size in zip(wanted, array.shape, strict=False):
            factor, letter = (3, letter[1:]) if letter.startswith("3") else (1, letter)
            fits = fits and sizes.setdefault(letter, size // factor) * factor == size
        if not fits:
            shape = ", ".join(
                f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in wanted
            )
            raise ValueError(f"{name} must have shape ({shape}), none of them 0, got {array.shape}")
    for name, (array, *_) in arrays.items():  # after the shapes: of the wrong one no copy helps
        check_layout(name, array)
    return ops, sizes


def _numbers(**numbers: float) -> None:
    """Check numbers that C takes as floats."""
    for name, number in numbers.items():
        with suppress(OverflowError):
            if isinstance(number, Real):
                float(number)
                continue
        raise ValueError(f"{name} must be a number, and not too large, got {number!r:.50}")


def encoder_forward(idx: Array, wte: Array, wpe: Array, backend: str = "auto") -> Array:
    """Give wte[idx] + wpe, (B, T, C), for idx (B, T), wte (V, C), wpe (at least T, C)."""
    ops, s = _open(backend, wte=(wte, "V C"), wpe=(wpe, "P C"))
    B, T = _batch_shape(idx, s["P"])
    check_int32("idx", idx, (B, T), 0, s["V"])
    out = np.empty((B, T, s["C"]), wte.dtype)
    ops.encoder_forward(out, idx, wte, wpe)
    return out


def _batch_shape(idx: Array, positions: int) -> tuple[int, int]:
    shape = np.shape(idx)
    if len(shape) != 2 or 0 in shape or shape[1] > positions:
        raise ValueError(
            f"idx must have shape (B, T) with 1 <= T <= {positions}, B >= 1, got {shape}"
        )
    return shape


def encoder_backward(
    dout: Array, idx: Array, vocab_size: int, n_positions: int, backend: str = "auto"
) -> tuple[Array, Array]:
    """Give dwte (vocab_size, C), dwpe (n_positions, C) for dout (B, T, C), idx (B, T)."""
    ops, s = _open(backend, dout=(dout, "B T C"))
    vocab_size, n_positions = whole("vocab_size", vocab_size), whole("n_positions", n_positions)
    _batch_shape(idx, n_positions)
    check_int32("idx", idx, (s["B"], s["T"]), 0, vocab_size)
    dwte, dwpe = (np.zeros((rows, s["C"]), dout.dtype) for rows in (vocab_size, n_positions))
    ops.encoder_backward(dwte, dwpe, dout, idx)
    return dwte, dwpe


def layernorm_forward(
    x: Array, weight: Array, bias: Array, eps: float = 1e-5, backend: str = "auto"
) -> tuple[Array, Array, Array]:
    """Give out (N, C), mean (N,), rstd (N,) for x (N, C), weight and bias (C,)."""
    ops, s = _open(backend, x=(x, "N C"), weight=(weight, "C"), bias=(bias, "C"))
    _numbers(eps=eps)
    out, mean, rstd = np.empty_like(x), np.empty(s["N"], x.dtype), np.empty(s["N"], x.dtype)
    ops.layernorm_forward(out, mean, rstd, x, weight, bias, eps)
    return out, mean, rstd


def layernorm_backward(
    dout: Array, x: Array, weight: Array, mean: Array, rstd: Array, backend: str = "auto"
) -> tuple[Array, Array, Array]:
    """Give dx (N, C), dweight (C,), dbias (C,)."""
    ops, _ = _open(
        backend,
        x=(x, "N C"),
        dout=(dout, "N C"),
        weight=(weight, "C"),
        mean=(mean, "N"),
        rstd=(rstd, "N"),
    )
    dx, dweight, dbias = np.zeros_like(x), np.zeros_like(weight), np.zeros_like(weight)
    ops.layernorm_backward(dx, dweight, dbias, dout, x, weight, mean, rstd)
    return dx, dweight, dbias


def matmul_forward(
    x: Array, weight: Array, bias: Array | None = None, backend: str = "auto"
) -> Array:
    """Give x weight^T + bias, (N, OC), for x (N, C), weight (OC, C), bias (OC,) or None."""
    arrays = {"x": (x, "N C"), "weight": (weight, "OC C")}
    ops, s = _open(backend, **arrays, **({} if bias is None else {"bias": (bias, "OC")}))
    out = np.empty((s["N"], s["OC"]), x.dtype)
    ops.matmul_forward(out, x, weight, bias)
    return out


def matmul_backward(
    dout: Array, x: Array, weight: Array, backend: str = "auto"
) -> tuple[Array, Array, Array]:
    """Give dx (N, C), dweight (OC, C), dbias (OC,) for dout (N, OC)."""
    ops, s = _open(backend, x=(x, "N C"), weight=(weight, "OC C"), dout=(dout, "N OC"))
    dx, dweight, dbias = np.empty_like(x), np.zeros_like(weight), np.zeros(s["OC"], x.dtype)
    ops.matmul_backward(dx, dweight, dbias, dout, x, weight)
    return dx, dweight, dbias


def matrix_transpose(x: Array, backend: str = "auto") -> Array:
    """Give x^T (C, R) for x (R, C)."""
    ops, s = _open(backend, x=(x, "R C"))
    out = np.empty((s["C"], s["R"]), x.dtype)
    ops.matrix_transpose(out, x)
    return out


def linear_forward(
    x: Array,
    weight: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Give x W^T + bias, (N, OC), for x (N, C), weight (OC, C), bias (OC,) or None.

    weight is as x, float16, or uint8 with scale (OC,): then W is scale * (weight - 128), and x is
    rounded to 8 bits too.
    """
    dtype = getattr(weight, "dtype", None)
    if scale is None and dtype == np.uint8:
        raise ValueError("scale must be given for weights of 8 bits")
    small = ("uint8",) if scale is not None else (str(getattr(x, "dtype", "float32")), "float16")
    given = {"scale": (scale, "OC"), "bias": (bias, "OC")}
    vectors = {name: pair for name, pair in given.items() if pair[0] is not None}
    ops, s = _open(backend, x=(x, "N C"), weight=(weight, "OC C", small), **vectors)  # type: ignore[arg-type]
    if dtype == np.float16 and not np.isfinite(weight).all():
        raise ValueError("weight holds nan or infinity, which weights of 16 bits must not")
    if dtype == np.uint8 and s["C"] > LONGEST:
        raise ValueError(f"weight must have at most {LONGEST} channels of 8 bits, got {s['C']}")
    out = np.empty((s["N"], s["OC"]), x.dtype)
    ops.linear_forward(out, x, weight, scale, bias)
    return out


def cache_attention_forward(
    qkv: Array, keys: Array, values: Array, position: int, backend: str = "auto"
) -> tuple[Array, Array, Array]:
    """Give out (T, C), keys and values for qkv (T, 3C) of tokens from `position` on.

    keys, values (NH, P, HS) hold those of the tokens before; the new ones' stand in the result.
    """
    shape = "NH P HS"
    ops, s = _open(backend, qkv=(qkv, "T 3C"), keys=(keys, shape), values=(values, shape))
    if s["NH"] * s["HS"] != s["C"]:
        raise ValueError(f"keys must have NH * HS = C={s['C']}, got {s['NH']} * {s['HS']}")
    position = whole("position", position)
    if not 0 <= position <= s["P"] - s["T"]:
        raise ValueError(
            f"position must be in [0, {s['P'] - s['T']}] for {s['T']} tokens, got {position}"
        )
    out, keys, values = np.empty((s["T"], s["C"]), qkv.dtype), keys.copy(), values.copy()
    ops.cache_attention_forward(out, keys, values, qkv, position)
    return out, keys, values


def attention_forward(qkv: Array, n_head: int, backend: str = "auto") -> tuple[Array, Array]:
    """Give out (B, T, C) and lse (B, n_head, T) for qkv (B, T, 3C)."""
    ops, s = _open(backend, qkv=(qkv, "B T 3C"))
    n_head = whole("n_head", n_head)
    if n_head < 1 or s["C"] % n_head:
        raise ValueError(f"n_head must divide C={s['C']}, got {n_head}")
    out = np.empty((s["B"], s["T"], s["C"]), qkv.dtype)
    lse = np.empty((s["B"], n_head, s["T"]), qkv.dtype)
    ops.attention_forward(out, lse, qkv)
    return out, lse


def attention_backward(
    dout: Array, qkv: Array, out: Array, lse: Array, backend: str = "auto"
) -> Array:
    """Give dqkv (B, T, 3C) for dout (B, T, C) and what the forward pass read and gave."""
    ops, s = _open(
        backend,
        dout=(dout, "B T C"),
        qkv=(qkv, "B T 3C"),
        out=(out, "B T C"),
        lse=(lse, "B NH T"),
    )
    if s["C"] % s["NH"]:
        raise ValueError(f"lse (B, NH, T) must have an NH that divides C={s['C']}, got {s['NH']}")
    dqkv = np.empty_like(qkv)
    ops.attention_backward(dqkv, dout, qkv, out, lse)
    return dqkv


def gelu_forward(x: Array, backend: str = "auto") -> Array:
    """Give the tanh form of GELU of x, any shape."""
    ops, _ = _open(backend, x=(x, _any(x)))
    out = np.empty_like(x)
    ops.gelu_forward(out, x)
    return out


def gelu_backward(dout: Array, x: Array, backend: str = "auto") -> Array:
    """Give dx for dout and x of one shape."""
    ops, _ = _open(backend, x=(x, _any(x)), dout=(dout, _any(x)))
    dx = np.empty_like(x)
    ops.gelu_backward(dx, dout, x)
    return dx


def _any(x: Array) -> str:
    """Letters for whatever shape x has."""
    return " ".join(f"d{axis}" for axis in range(np.ndim(x)))


def residual_forward(x: Array, branch: Array, backend: str = "auto") -> Array:
    """Give x + branch, of one shape."""
    ops, _ = _open(backend, x=(x, _any(x)), branch=(branch, _any(x)))
    out = np.empty_like(x)
    ops.residual_forward(out, x, branch)
    return out


def residual_backward(dout: Array, backend: str = "auto") -> tuple[Array, Array]:
    """Give dx and dbranch, both dout."""
    ops, _ = _open(backend, dout=(dout, _any(dout)))
    dx, dbranch = np.empty_like(dout), np.empty_like(dout)
    ops.residual_backward(dx, dbranch, dout)
    return dx, dbranch


def crossentropy_forward(
    logits: Array, targets: Array, backend: str = "auto"
) -> tuple[Array, Array]:
    """Give losses (N,) in nats, 0 where targets (N,) is -1, and lse (N,) for logits (N, V)."""
    ops, s = _open(backend, logits=(logits, "N V"))
    check_int32("targets", targets, (s["N"],), -1, s["V"])
    losses, lse = np.empty(s["N"], logits.dtype), np.empty(s["N"], logits.dtype)
    ops.crossentropy_forward(losses, lse, logits, targets)
    return losses, lse


def crossentropy_backward(
    logits: Array, lse: Array, targets: Array, scale: float = 1.0, backend: str = "auto"
) -> Array:
    """Give dlogits (N, V) of `scale` times the sum of the losses."""
    ops, s = _open(backend, logits=(logits, "N V"), lse=(lse, "N"))
    check_int32("targets", targets, (s["N"],), -1, s["V"])
    _numbers(scale=scale)
    dlogits = np.empty_like(logits)
    ops.crossentropy_backward(dlogits, logits, lse, targets, scale)
    return dlogits


def adamw_update(
    param: Array,
    m: Array,
    v: Array,
    grad: Array,
    learning_rate: float = 3e-4,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    t: int = 1,
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Array, Array, Array]:
    """Give param, m, v after AdamW's step t = 1, 2, ..., all of one shape."""
    letters = _any(param)
    ops, _ = _open(
        backend, param=(param, letters), m=(m, letters), v=(v, letters), grad=(grad, letters)
    )
    if not 1 <= whole("t", t) < 2**63:
        raise ValueError(f"t must be in [1, 2**63), got {t!r:.50}")
    _numbers(learning_rate=learning_rate, beta1=beta1, beta2=beta2, eps=eps)
    _numbers(weight_decay=weight_decay, grad_scale=grad_scale)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be in [0, 1), got {beta1!r:.50} and {beta2!r:.50}")
    param, m, v = param.copy(), m.copy(), v.copy()
    scalars = (learning_rate, beta1, beta2, eps, weight_decay, t, grad_scale)
    ops.adamw_update(param, m, v, grad, *scalars)
    return param, m, v


def global_norm(grad: Array, backend: str = "auto") -> float:
    """Give the Euclidean norm of a gradient of any shape."""
    ops, _ = _open(backend, grad=(grad, _any(grad)))
    return ops.global_norm(grad)
