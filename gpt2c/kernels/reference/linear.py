"""Linear layers, with weights of 32, 16 or 8 bits.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.op import MIDDLE, TINY
from gpt2c.kernels.reference.rounding import on_factors, product

__all__ = ["lora_backward", "lora_forward", "matmul_backward", "matmul_forward", "matrix_transpose"]

Array = NDArray[np.floating[Any]]
FEW_ROWS = 16  # whose products in "fp16" are of float32: reading the weights takes longer


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
        products are added in float32. "fp16" rounds them to half precision and adds some products
        there, see `product`, if x has more than FEW_ROWS rows. "fp32" does not round

    Source: dynamic quantization by rows, Dettmers et al. 2022, arXiv:2208.07339, without its
    outliers.

    Examples
    --------
    >>> x, weight = np.array([[1, 2]], np.float32), np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    >>> gpt2c.ops.matmul_forward(x, weight, bias=np.array([0, 0, 10], np.float32))
    array([[ 1.,  2., 13.]], dtype=float32)
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
        few = precision == "fp16" and len(x) <= FEW_ROWS
        out[...] = product(x, weight.astype(x.dtype, copy=False), "fp32" if few else precision)
    if bias is not None:
        out += bias


@on_factors
def matmul_backward(
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    dout: Array,
    x: Array,
    weight: NDArray[Any],
    scale: Array | None,
    accumulate: bool = True,
    precision: str = "fp32",
    add: bool = False,
) -> None:
    """Add the gradients of a linear layer's parameters; write the gradient of its input.

    dweight += dout^T x,   dbias += the column sums of dout,   dx = dout W

    W is that of `matmul_forward`. The rounding of x to 8 bits counts as no change of x.

    Parameters
    ----------
    dx : (N, C), written; may be x; None where it is not wanted
    dweight, dbias : (OC, C), (OC,), accumulated; None where it is not wanted
    dout : (N, OC)
    x, weight, scale : (N, C), and see `matmul_forward`
    accumulate : False writes dweight and dbias, so they need not be 0 before
    precision : of the products, see `matmul_forward`; dbias has none
    add : True adds to dx in place of writing it; then dx is not x

    Examples
    --------
    >>> x, weight = np.array([[1, 2]], np.float32), np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    >>> dout = np.array([[0, 0, 1]], np.float32)  # only the last output counts
    >>> dx, dweight, dbias = gpt2c.ops.matmul_backward(dout, x, weight)
    >>> dx.tolist(), dweight.tolist(), dbias.tolist()
    ([[1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], [0.0, 0.0, 1.0])
    """
    # out = x weight^T + bias
    if dbias is not None:
        dbias[...] = dout.sum(axis=0) + (dbias if accumulate else 0)
    weight = weight.astype(x.dtype, copy=False)
    if scale is not None:
        weight = scale[:, None] * (weight - x.dtype.type(MIDDLE))
    if dweight is not None:
        dweight[...] = product(dout.T, x.T, precision) + (dweight if accumulate else 0)
    if dx is not None:
        dx[...] = product(dout, weight.T, precision) + (dx if add else 0)


def lora_forward(
    out: Array, u: Array, y: Array, x: Array, down: Array, up: Array, scale: float
) -> None:
    """Add a low-rank adapter's output to that of its linear layer (LoRA).

    out = y + u up^T,   u = scale * x down^T

    Parameters
    ----------
    out : (N, OC), written; may be y
    u : (N, R), written, for the backward pass
    y, x : (N, OC), (N, C), the layer's output and input
    down, up : (R, C), (OC, R), the paper's A and B; scale * up down is added to the weight

    Source: Hu et al. 2021, arXiv:2106.09685.

    Examples
    --------
    >>> y, x = np.zeros((1, 3), np.float32), np.array([[1, 2]], np.float32)
    >>> down, up = np.array([[1, 1]], np.float32), np.array([[1], [0], [2]], np.float32)  # rank 1
    >>> out, u = gpt2c.ops.lora_forward(y, x, down, up, scale=10.0)
    >>> out.tolist()
    [[30.0, 0.0, 60.0]]
    """
    u[...] = scale * (x @ down.T)
    out[...] = y + u @ up.T


def lora_backward(
    dx: Array | None,
    ddown: Array | None,
    dup: Array | None,
    dout: Array,
    x: Array,
    u: Array,
    down: Array,
    up: Array,
    scale: float,
    accumulate: bool = True,
) -> None:
    """Add the gradients of an adapter; write its part of the gradient of its input.

    dup += dout^T u,   du = scale * dout up,   ddown += du^T x,   dx = du down

    Parameters
    ----------
    dx : (N, C), written; may be x; None where it is not wanted
    ddown, dup : (R, C), (OC, R), accumulated; None where it is not wanted
    dout : (N, OC), which is also the gradient of y
    accumulate : False writes ddown and dup, so they need not be 0 before

    Examples
    --------
    >>> y, x = np.zeros((1, 3), np.float32), np.array([[1, 2]], np.float32)
    >>> down, up = np.array([[1, 1]], np.float32), np.zeros((3, 1), np.float32)  # as at the start
    >>> out, u = gpt2c.ops.lora_forward(y, x, down, up)
    >>> dx, ddown, dup = gpt2c.ops.lora_backward(np.ones_like(y), x, u, down, up)
    >>> ddown.tolist(), dup.tolist()  # B is 0, so only B learns in the first step
    ([[0.0, 0.0]], [[3.0], [3.0], [3.0]])
    """
    # out = y + u up^T
    if dup is not None:
        dup[...] = dout.T @ u + (dup if accumulate else 0)
    # u = scale * x down^T
    du = scale * (dout @ up)
    if ddown is not None:
        ddown[...] = du.T @ x + (ddown if accumulate else 0)
    if dx is not None:
        dx[...] = du @ down


def matrix_transpose(out: NDArray[Any], x: NDArray[Any]) -> None:
    """Transpose a matrix: linear weights are (C, OC) in Hugging Face's files, (OC, C) in memory.

    out = x^T

    Parameters
    ----------
    out : (C, R), written
    x : (R, C)

    Examples
    --------
    >>> gpt2c.ops.matrix_transpose(np.array([[1, 2, 3], [4, 5, 6]], np.float32)).tolist()
    [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    """
    out[...] = x.T
