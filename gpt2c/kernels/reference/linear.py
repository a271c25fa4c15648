"""Linear layers, with weights of 32, 16 or 8 bits.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.op import MIDDLE, TINY
from gpt2c.kernels.reference.rounding import on_factors, rounded

__all__ = ["matmul_backward", "matmul_forward", "matrix_transpose"]

Array = NDArray[np.floating[Any]]


@on_factors
def matmul_forward(
    out: Array,
    x: Array,
    weight: NDArray[Any],
    bias: Array | None,
    scale: Array | None,
    precision: str = "fp32",
) -> None:
    """Apply a linear layer to each row; its weights may have 32, 16 or 8 bits.

    out = x W^T + bias,   W = weight, or scale * (weight - 128) for 8-bit weights

    With 8-bit weights each row of x is also rounded to 8 bits, x = x_scale * x8 with x8 in
    [-127, 127], so that the sums are of integers and exact:
    out = sum((weight - 128) * x8) * (x_scale * scale) + bias

    Parameters
    ----------
    out : (N, OC), written
    x : (N, C)
    weight : (OC, C), a row for each output channel: float32, float16 without nan and infinity, or
        uint8 with C <= LONGEST
    bias : (OC,), or None
    scale : (OC,) for uint8, else None
    precision : "bf16" rounds x and a weight of float32 or float16 to 16 bits first, see `bf16`; the
        products are added in float32. "fp32" does not

    Source: dynamic quantization by rows, Dettmers et al. 2022, arXiv:2208.07339, without its
    outliers.
    """
    if weight.dtype == np.uint8:
        assert scale is not None
        largest = np.abs(x).max(axis=1, keepdims=True)
        inverse = np.divide(127, largest, out=np.zeros_like(largest), where=largest > TINY)
        with np.errstate(invalid="ignore"):  # nan and infinity in a row make its scale nan
            x8 = np.rint(x * inverse).astype(np.int64)
            x_scale = largest / x.dtype.type(127) + (0 * x).sum(axis=1, keepdims=True)
        sums = x8 @ (weight.astype(np.int64) - MIDDLE).T
        out[...] = sums.astype(x.dtype) * (x_scale * scale)
    else:
        x, weight = rounded(precision, x, weight.astype(x.dtype, copy=False))
        out[...] = x @ weight.T
    if bias is not None:
        out += bias


@on_factors
def matmul_backward(
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    dout: Array,
    x: Array,
    weight: Array,
    accumulate: bool = True,
    precision: str = "fp32",
) -> None:
    """Add the gradients of a linear layer's parameters; write the gradient of its input.

    dweight += dout^T x,   dbias += the column sums of dout,   dx = dout weight

    Parameters
    ----------
    dx : (N, C), written; may be x; None where it is not wanted
    dweight, dbias : (OC, C), (OC,), accumulated; None where it is not wanted
    dout : (N, OC)
    x, weight : (N, C), (OC, C)
    accumulate : False writes dweight and dbias, so they need not be 0 before
    precision : of the products, see `matmul_forward`; dbias has none
    """
    # out = x weight^T + bias
    if dbias is not None:
        dbias[...] = dout.sum(axis=0) + (dbias if accumulate else 0)
    dout, x, weight = rounded(precision, dout, x, weight)
    if dweight is not None:
        dweight[...] = dout.T @ x + (dweight if accumulate else 0)
    if dx is not None:
        dx[...] = dout @ weight


def matrix_transpose(out: NDArray[Any], x: NDArray[Any]) -> None:
    """Transpose a matrix: linear weights are (C, OC) in Hugging Face's files, (OC, C) in memory.

    out = x^T

    Parameters
    ----------
    out : (C, R), written
    x : (R, C)
    """
    out[...] = x.T
