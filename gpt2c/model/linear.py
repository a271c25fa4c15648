"""Linear: out = x W^T + b, and what an adapter adds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Parameter, Pass, Slot, Stage

if TYPE_CHECKING:
    from gpt2c.model.lora import Adapter

__all__ = ["Linear"]


class Linear:
    """A linear layer with weight (OC, C), as llm.c lays it out, and bias (OC,).

    Parameters
    ----------
    name : of the parameters, before ".weight" and ".bias"
    C, OC : channels of x and of out
    std, shrink : of the first weights, see `Parameter`
    bias : whether there is one

    Attributes
    ----------
    adapter : see `gpt2c.model.lora`; None if the layer has none
    """

    adapter: Adapter | None = None

    def __init__(
        self, name: str, C: int, OC: int, std: float, shrink: float = 1.0, bias: bool = True
    ) -> None:
        self.name, self.weight, self.scale = name, name + ".weight", name + ".scale"
        self.bias = name + ".bias" if bias else ""
        self.C, self.OC = C, OC
        self._std, self._shrink = std, shrink

    def parameters(self) -> Iterable[Parameter]:
        """Yield the weight, the bias, and those of the adapter."""
        shape = (self.OC, self.C)
        yield Parameter(
            self.weight, shape, std=self._std, shrink=self._shrink, decays=True, small=True
        )
        if self.bias:
            yield Parameter(self.bias, (self.OC,))
        if self.adapter:
            yield from self.adapter.parameters()

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield those of the adapter."""
        if self.adapter:
            yield from self.adapter.slots(batch)

    def flops(self, T: int) -> float:
        """Count the multiply-adds of a token."""
        return self.OC * self.C + (self.adapter.flops() if self.adapter else 0)

    def forward(self, ctx: Pass, out: Array, x: Array) -> None:
        """Write out (N, OC) of x (N, C)."""
        p = ctx.p
        ctx.ops.matmul_forward(
            out, x, p[self.weight], p.get(self.bias), p.get(self.scale), ctx.precision
        )
        if self.adapter:
            self.adapter.forward(ctx, out, x)

    def stages(
        self, ctx: Pass, out: Array, x: Array, then: str = "write", inner: Array | None = None
    ) -> Iterable[Stage]:
        """Yield the stage that does `forward` and `then`, see `Stage`."""
        weight, scale, bias = ctx.p[self.weight], ctx.p.get(self.scale), ctx.p.get(self.bias)
        adapter = self.adapter.stage(ctx) if self.adapter else {}
        layer = {"weight": weight, "scale": scale, "bias": bias, "inner": inner, **adapter}
        yield Stage("matmul", out, x, then, ctx.precision, **layer)

    def backward(self, ctx: Pass, d_x: Array | None, d_out: Array, x: Array) -> None:
        """Write d_x (N, C), which may be x, and the gradients of the parameters.

        What is None or frozen is not computed.
        """
        g, weight, scale = ctx.g, ctx.p[self.weight], ctx.p.get(self.scale)
        d_weight, d_bias = g.get(self.weight), g.get(self.bias)
        given = (d_out, x, weight, scale, ctx.accumulate, ctx.precision)
        if not self.adapter:
            ctx.ops.matmul_backward(d_x, d_weight, d_bias, *given)
            return
        if d_weight is not None or d_bias is not None:
            ctx.ops.matmul_backward(None, d_weight, d_bias, *given)
        self.adapter.backward(ctx, d_x, d_out, x)  # x is read before d_x takes its memory
        if d_x is not None:
            ctx.ops.matmul_backward(d_x, None, None, *given, True)
