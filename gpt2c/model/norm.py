"""LayerNorm: each row of x with mean 0 and variance 1, then scaled and shifted.

out = (x - mean) * rstd * weight + bias
"""

from __future__ import annotations

from collections.abc import Iterable

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Life, Parameter, Run, Slot

__all__ = ["LayerNorm"]


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

    def forward(self, run: Run, out: Array, x: Array) -> None:
        """Write out (N, C) of x (N, C), and the statistics."""
        p, a = run.p, run.a
        run.ops.layernorm_forward(
            out, a[self.mean], a[self.rstd], x, p[self.weight], p[self.bias], self._eps
        )

    def backward(self, run: Run, d_x: Array, d_out: Array, x: Array) -> None:
        """Add to d_x, the gradient of the stream: what came past the block stands there."""
        p, g, a = run.p, run.g, run.a
        run.ops.layernorm_backward(
            *(d_x, g[self.weight], g[self.bias], d_out, x, p[self.weight]),
            *(a[self.mean], a[self.rstd]),
        )
