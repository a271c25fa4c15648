"""Linear: out = x W^T + b."""

from __future__ import annotations

from collections.abc import Iterable

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Parameter, Run, Stage

__all__ = ["Linear"]


class Linear:
    """A linear layer with weight (OC, C), as llm.c lays it out, and bias (OC,).

    Parameters
    ----------
    name : of the parameters, before ".weight" and ".bias"
    C, OC : channels of x and of out
    std, shrink : of the first weights, see `Parameter`
    bias : whether there is one
    """

    def __init__(
        self, name: str, C: int, OC: int, std: float, shrink: float = 1.0, bias: bool = True
    ) -> None:
        self.weight, self.scale = name + ".weight", name + ".scale"
        self.bias = name + ".bias" if bias else ""
        self.C, self.OC = C, OC
        self._std, self._shrink = std, shrink

    def parameters(self) -> Iterable[Parameter]:
        """Yield the weight and the bias."""
        shape = (self.OC, self.C)
        yield Parameter(
            self.weight, shape, std=self._std, shrink=self._shrink, decays=True, small=True
        )
        if self.bias:
            yield Parameter(self.bias, (self.OC,))

    def flops(self, T: int) -> float:
        """Count the multiply-adds of a token."""
        return self.OC * self.C

    def forward(self, run: Run, out: Array, x: Array) -> None:
        """Write out (N, OC) of x (N, C)."""
        p = run.p
        run.ops.matmul_forward(
            out, x, p[self.weight], p.get(self.bias), p.get(self.scale), run.precision
        )

    def stages(
        self, run: Run, out: Array, x: Array, then: str = "write", inner: Array | None = None
    ) -> Iterable[Stage]:
        """Yield the stage that does `forward` and `then`, see `Stage`."""
        weight, scale, bias = run.p[self.weight], run.p.get(self.scale), run.p.get(self.bias)
        yield Stage("matmul", out, x, then, inner, weight=weight, scale=scale, bias=bias)

    def backward(self, run: Run, d_x: Array | None, d_out: Array, x: Array) -> None:
        """Write d_x (N, C), which may be x, and the gradients of weight and bias.

        What is None or frozen is not computed.
        """
        g = run.g
        run.ops.matmul_backward(
            *(d_x, g.get(self.weight), g.get(self.bias)),
            *(d_out, x, run.p[self.weight], run.accumulate, run.precision),
        )
