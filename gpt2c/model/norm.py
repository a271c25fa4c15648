"""Norms: each row of x brought to one scale.

LayerNorm    out = (x - mean) * rstd * weight + bias    mean 0 and variance 1 before weight
RMSNorm      out = x * rstd * weight                    mean square 1 before weight
"""

from __future__ import annotations

from collections.abc import Iterable

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Life, Parameter, Pass, Slot, Stage

__all__ = ["LayerNorm", "Norm", "RMSNorm"]


class LayerNorm:
    """Layer normalisation, Ba et al. 2016, arXiv:1607.06450.

    Parameters
    ----------
    name : of the parameters and of the statistics
    C : channels
    eps : added to the variance
    """

    def __init__(self, name: str, C: int, eps: float) -> None:
        self.weight, self.bias = name + ".weight", name + ".bias"
        self.mean, self.rstd = name + ".mean", name + ".rstd"
        self.C, self._eps = C, eps

    def parameters(self) -> Iterable[Parameter]:
        """Yield the gain and the shift."""
        yield Parameter(self.weight, (self.C,), fill=1.0)
        yield Parameter(self.bias, (self.C,))

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield the statistics of each row."""
        yield Slot(self.mean, (batch.N,), Life.CHEAP)
        yield Slot(self.rstd, (batch.N,), Life.CHEAP)

    def flops(self, T: int) -> float:
        """Count no multiply-adds: there are no products of matrices."""
        return 0.0

    def forward(self, ctx: Pass, out: Array, x: Array) -> None:
        """Write out (N, C) of x (N, C), and the statistics."""
        p, a = ctx.p, ctx.a
        ctx.ops.layernorm_forward(
            out, a[self.mean], a[self.rstd], x, p[self.weight], p[self.bias], self._eps
        )

    def stages(self, ctx: Pass, out: Array, x: Array) -> Iterable[Stage]:
        """Yield the stage that does `forward`."""
        gain, shift = ctx.p[self.weight], ctx.p[self.bias]
        yield Stage("layernorm", out, x, gain=gain, shift=shift, eps=self._eps)

    def backward(self, ctx: Pass, d_x: Array, d_out: Array, x: Array) -> None:
        """Add to d_x, the gradient of the stream: what came past the block stands there."""
        p, g, a = ctx.p, ctx.g, ctx.a
        ctx.ops.layernorm_backward(
            *(d_x, g.get(self.weight), g.get(self.bias), d_out, x, p[self.weight]),
            *(a[self.mean], a[self.rstd]),
        )


class RMSNorm:
    """Root mean square normalisation, Zhang & Sennrich 2019, arXiv:1910.07467.

    Parameters
    ----------
    name : of the gain and of the statistics
    C : channels
    eps : added to the mean square
    """

    def __init__(self, name: str, C: int, eps: float) -> None:
        self.weight, self.rstd = name + ".weight", name + ".rstd"
        self.C, self._eps = C, eps

    def parameters(self) -> Iterable[Parameter]:
        """Yield the gain."""
        yield Parameter(self.weight, (self.C,), fill=1.0)

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield the statistics of each row."""
        yield Slot(self.rstd, (batch.N,), Life.CHEAP)

    def flops(self, T: int) -> float:
        """Count no multiply-adds: there are no products of matrices."""
        return 0.0

    def forward(self, ctx: Pass, out: Array, x: Array) -> None:
        """Write out (N, C) of x (N, C), and the statistics."""
        ctx.ops.rmsnorm_forward(out, ctx.a[self.rstd], x, ctx.p[self.weight], self._eps)

    def stages(self, ctx: Pass, out: Array, x: Array) -> Iterable[Stage]:
        """Yield the stage that does `forward`."""
        yield Stage("rmsnorm", out, x, gain=ctx.p[self.weight], eps=self._eps)

    def backward(self, ctx: Pass, d_x: Array, d_out: Array, x: Array) -> None:
        """Add to d_x, the gradient of the stream: what came past the block stands there."""
        weight = self.weight
        ctx.ops.rmsnorm_backward(d_x, ctx.g.get(weight), d_out, x, ctx.p[weight], ctx.a[self.rstd])


Norm = LayerNorm | RMSNorm
