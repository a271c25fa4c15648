"""Norms: layernorm, rows of mean 0 and variance 1; rmsnorm, rows of mean square 1.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.reference.rounding import on_factors

__all__ = ["layernorm_backward", "layernorm_forward", "rmsnorm_backward", "rmsnorm_forward"]

Array = NDArray[np.floating[Any]]


@on_factors
def layernorm_forward(
    out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array, eps: float
) -> None:
    """Normalise each row of `x` to zero mean and unit variance, then scale and shift.

    out = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)      (biased variance)

    Parameters
    ----------
    out : (N, C), written
    mean, rstd : (N,), written, kept for the backward pass
    x : (N, C)
    weight, bias : (C,)
    eps : added to the variance (not to its root)

    Source: Ba et al. 2016, arXiv:1607.06450.

    Examples
    --------
    >>> x = np.array([[1, 3], [10, 30]], np.float32)
    >>> weight, bias = np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> out, mean, rstd = gpt2c.ops.layernorm_forward(x, weight, bias)
    >>> out.round(2).tolist(), mean.tolist()
    ([[-1.0, 1.0], [-1.0, 1.0]], [2.0, 20.0])
    """
    mean[...] = x.mean(axis=1)
    centred = x - mean[:, None]
    rstd[...] = 1 / np.sqrt(np.square(centred).mean(axis=1) + eps)
    out[...] = centred * rstd[:, None] * weight + bias


def layernorm_backward(
    dx: Array,
    dweight: Array | None,
    dbias: Array | None,
    dout: Array,
    x: Array,
    weight: Array,
    mean: Array,
    rstd: Array,
) -> None:
    """Add the gradients of layernorm to those of its input and its parameters.

    dx += (dnorm - mean(dnorm) - norm * mean(dnorm * norm)) * rstd
    norm = (x - mean) * rstd,   dnorm = dout * weight

    Parameters
    ----------
    dx : (N, C), accumulated: `x` is the residual stream, and `dx` already holds the gradient that
        did not go through the branch
    dweight, dbias : (C,), accumulated; None where it is not wanted
    dout, x : (N, C)
    weight : (C,)
    mean, rstd : (N,), from the forward pass

    Examples
    --------
    >>> x, dout = np.array([[1, 3]], np.float32), np.array([[1, 1]], np.float32)
    >>> weight, bias = np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> out, mean, rstd = gpt2c.ops.layernorm_forward(x, weight, bias)
    >>> dx, dweight, dbias = gpt2c.ops.layernorm_backward(dout, x, weight, mean, rstd)
    >>> bool(np.allclose(dx, 0, atol=1e-6)), dbias.tolist()  # a shift of x changes nothing
    (True, [1.0, 1.0])
    """
    norm = (x - mean[:, None]) * rstd[:, None]
    # out = norm * weight + bias
    dnorm = dout * weight
    if dweight is not None:
        dweight += (dout * norm).sum(axis=0)
    if dbias is not None:
        dbias += dout.sum(axis=0)
    # norm = (x - mean(x)) * rstd(x). A row of norm has mean 0 and variance 1 for every x, so the
    # parts of dnorm that would change these are removed.
    shift = dnorm.mean(axis=1, keepdims=True)
    stretch = (dnorm * norm).mean(axis=1, keepdims=True)
    dx += (dnorm - shift - norm * stretch) * rstd[:, None]


@on_factors
def rmsnorm_forward(out: Array, rstd: Array, x: Array, weight: Array, eps: float) -> None:
    """Scale each row of `x` to a mean square of 1, then channel by channel.

    out = x * rstd * weight,   rstd = 1 / sqrt(mean(x^2) + eps)

    Parameters
    ----------
    out : (N, C), written
    rstd : (N,), written, kept for the backward pass
    x : (N, C)
    weight : (C,)
    eps : added to the mean square (not to its root)

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; eps as in transformers' LlamaRMSNorm.

    Examples
    --------
    >>> x, weight = np.array([[3, 4], [30, 40]], np.float32), np.ones(2, np.float32)
    >>> out, rstd = gpt2c.ops.rmsnorm_forward(x, weight)
    >>> out.round(2)
    array([[0.85, 1.13],
           [0.85, 1.13]], dtype=float32)
    """
    rstd[...] = 1 / np.sqrt(np.square(x).mean(axis=1) + eps)
    out[...] = x * rstd[:, None] * weight


def rmsnorm_backward(
    dx: Array, dweight: Array | None, dout: Array, x: Array, weight: Array, rstd: Array
) -> None:
    """Add the gradients of rmsnorm to those of its input and its weight.

    dx += (dnorm - norm * mean(dnorm * norm)) * rstd
    norm = x * rstd,   dnorm = dout * weight

    Parameters
    ----------
    dx : (N, C), accumulated, as layernorm's
    dweight : (C,), accumulated; None where it is not wanted
    dout, x : (N, C)
    weight : (C,)
    rstd : (N,), from the forward pass

    Examples
    --------
    >>> x, weight = np.array([[3, 4]], np.float32), np.ones(2, np.float32)
    >>> out, rstd = gpt2c.ops.rmsnorm_forward(x, weight)
    >>> dx, dweight = gpt2c.ops.rmsnorm_backward(x, x, weight, rstd)
    >>> bool(np.allclose(dx, 0, atol=1e-4))  # a longer x changes nothing
    True
    """
    norm = x * rstd[:, None]
    # out = norm * weight
    dnorm = dout * weight
    if dweight is not None:
        dweight += (dout * norm).sum(axis=0)
    # norm = x * rstd(x). The mean square of a row of norm is 1 for every x, so the part of dnorm
    # that would change it is removed.
    stretch = (dnorm * norm).mean(axis=1, keepdims=True)
    dx += (dnorm - norm * stretch) * rstd[:, None]
