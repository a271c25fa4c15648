"""Element-wise ops: GELU, SwiGLU, and the sum of the residual stream.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.reference.rounding import on_factors

__all__ = [
    "gelu_backward",
    "gelu_forward",
    "residual_forward",
    "swiglu_backward",
    "swiglu_forward",
]

Array = NDArray[np.floating[Any]]


GELU_SCALE = math.sqrt(2 / math.pi)


GELU_CUBIC = 0.044715  # keeps the tanh form within 5e-4 of x * Phi(x)


@on_factors
def gelu_forward(out: Array, x: Array) -> None:
    """Apply the tanh form of GELU: near x for large x, near 0 for very negative x.

    out = x/2 * (1 + tanh(u)),   u = sqrt(2/pi) * (x + 0.044715 x^3)

    Parameters
    ----------
    out, x : any shape, the same; `out` is written

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.

    Examples
    --------
    >>> gpt2c.ops.gelu_forward(np.array([-1, 0, 1, 10], np.float32)).round(2)
    array([-0.16,  0.  ,  0.84, 10.  ], dtype=float32)
    """
    out[...] = 0.5 * x * (1 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x)))


@on_factors
def gelu_backward(dx: Array, dout: Array, x: Array) -> None:
    """Write the gradient of GELU's input.

    dx = dout * ((1 + tanh(u)) / 2 + x/2 * (1 - tanh(u)^2) * du/dx)
    du/dx = sqrt(2/pi) * (1 + 3 * 0.044715 x^2)

    Parameters
    ----------
    dx, dout, x : any shape, the same; `dx` is written and may be `dout`

    Examples
    --------
    >>> x = np.array([-1, 0, 1, 10], np.float32)
    >>> gpt2c.ops.gelu_backward(np.ones_like(x), x).round(2)
    array([-0.08,  0.5 ,  1.08,  1.  ], dtype=float32)
    """
    # out = x/2 * (1 + tanh(u))
    tanh = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))
    du = GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    dx[...] = dout * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * du)


def _swiglu_parts(x: Array) -> tuple[Array, Array, Array]:
    """Return gate and up, the halves of each row, and the sigmoid of gate."""
    gate, up = np.split(x, 2, axis=1)
    return gate, up, 0.5 * (1 + np.tanh(0.5 * gate))  # 1 / (1 + e^-gate) could overflow


@on_factors
def swiglu_forward(out: Array, x: Array) -> None:
    """Multiply `up` by the smooth gate silu(gate), where a row of `x` holds gate, then up.

    out = silu(gate) * up,   silu(gate) = gate * s,   s = 1 / (1 + e^-gate)

    Parameters
    ----------
    out : (N, C), written
    x : (N, 2C); one linear layer makes both halves, its weight is gate's rows above up's

    Source: Shazeer 2020, arXiv:2002.05202.

    Examples
    --------
    >>> x = np.array([[10, 1, 0, 7, 7, 7]], np.float32)  # three gates, then what they let through
    >>> gpt2c.ops.swiglu_forward(x).round(2)
    array([[70.  ,  5.12,  0.  ]], dtype=float32)
    """
    gate, up, s = _swiglu_parts(x)
    out[...] = gate * s * up


@on_factors
def swiglu_backward(dx: Array, dout: Array, x: Array) -> None:
    """Write the gradients of gate and up.

    dgate = dout * up * s * (1 + gate * (1 - s)),   dup = dout * gate * s

    Parameters
    ----------
    dx : (N, 2C), written; may be `x`
    dout : (N, C)
    x : (N, 2C)

    Examples
    --------
    >>> x = np.array([[0, 3]], np.float32)  # a closed gate
    >>> gpt2c.ops.swiglu_backward(np.ones((1, 1), np.float32), x).round(2).tolist()
    [[1.5, 0.0]]
    """
    gate, up, s = _swiglu_parts(x)
    # out = gate * s * up,   s' = s * (1 - s)
    dgate = dout * up * s * (1 + gate * (1 - s))
    dx[...] = np.concatenate([dgate, dout * gate * s], axis=1)


def residual_forward(out: Array, x: Array, branch: Array) -> None:
    """Add a branch to the residual stream.

    out = x + branch

    Parameters
    ----------
    out, x, branch : any shape, the same; `out` is written and may be `x`

    Source: He et al. 2015, arXiv:1512.03385.

    Examples
    --------
    >>> x, branch = np.array([1, 2], np.float32), np.array([10, 20], np.float32)
    >>> gpt2c.ops.residual_forward(x, branch).tolist()
    [11.0, 22.0]
    """
    out[...] = x + branch
