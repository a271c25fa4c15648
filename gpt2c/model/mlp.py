"""MLPs: what each token becomes by itself, through F inner channels.

MLP       out = gelu(x W_fc + b) W_proj + b
SwiGLU    out = (silu(gate) * up) W_proj,    gate and up = the halves of x W_fc
"""

from __future__ import annotations

from collections.abc import Iterable

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Life, Parameter, Pass, Slot, Stage
from gpt2c.model.linear import Linear

__all__ = ["MLP", "SwiGLU"]


class MLP:
    """GPT-2's MLP, with the tanh form of GELU between two linear layers.

    Parameters
    ----------
    name : of the block; its linear layers are name.c_fc and name.c_proj
    C, F : channels outside and inside
    std, shrink : of the first weights; those of c_proj shrink
    bias : whether the linear layers have one
    """

    _width = 1  # numbers of the first layer's output for each inner channel
    _activation = "gelu"  # a `then` of Stage

    def __init__(
        self, name: str, C: int, F: int, std: float, shrink: float = 1.0, bias: bool = True
    ) -> None:
        self.fc = Linear(name + ".c_fc", C, self._width * F, std, bias=bias)
        self.proj = Linear(name + ".c_proj", F, C, std, shrink, bias)
        self._fc, self._act = name + ".fc", name + ".act"

    def parameters(self) -> Iterable[Parameter]:
        """Yield those of the two linear layers."""
        yield from self.fc.parameters()
        yield from self.proj.parameters()

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield the inner channels before and after GELU."""
        yield Slot(self._fc, (batch.N, self.fc.OC), Life.INNER, factor=True)
        shape = batch.N, self.proj.C
        yield Slot(self._act, shape, Life.CHEAPEST, over=self._fc, factor=True, taken=True)
        yield from self._low(batch)

    def _low(self, batch: Batch) -> Iterable[Slot]:
        """Yield those of the linear layers."""
        yield from self.fc.slots(batch)
        yield from self.proj.slots(batch)

    def flops(self, T: int) -> float:
        """Count the multiply-adds of both layers."""
        return self.fc.flops(T) + self.proj.flops(T)

    def activate(self, ctx: Pass) -> None:
        """Write the inner channels after GELU from those before it."""
        ctx.ops.gelu_forward(ctx.a[self._act], ctx.a[self._fc])

    def hidden(self, ctx: Pass, x: Array) -> Array:
        """Return the inner channels (N, F) of x (N, C): all of forward that backward needs."""
        self.fc.forward(ctx, ctx.a[self._fc], x)
        self.activate(ctx)
        return ctx.a[self._act]

    def forward(self, ctx: Pass, out: Array, x: Array) -> None:
        """Write out (N, C) of x (N, C)."""
        self.proj.forward(ctx, out, self.hidden(ctx, x))

    def stages(self, ctx: Pass, out: Array, x: Array) -> Iterable[Stage]:
        """Yield the stages that add to out (N, C) what `forward` makes of x (N, C)."""
        fc, act = ctx.a[self._fc], ctx.a[self._act]
        yield from self.fc.stages(ctx, act, x, self._activation, fc)
        yield from self.proj.stages(ctx, out, act, "add")

    def backward(self, ctx: Pass, d_x: Array | None, d_out: Array, x: Array) -> None:
        """Write d_x (N, C), which may be x, and the gradients of both layers."""
        d_act = ctx.take(self._act)
        self.proj.backward(ctx, d_act, d_out, ctx.a[self._act])
        d_fc = self.activate_backward(ctx, d_act)
        self.fc.backward(ctx, d_x, d_fc, x)

    def activate_backward(self, ctx: Pass, d_act: Array) -> Array:
        """Return the gradient of the inner channels before GELU, in the memory of d_act."""
        ctx.ops.gelu_backward(d_act, d_act, ctx.a[self._fc])
        return d_act


class SwiGLU(MLP):
    """Llama's MLP: one half of the first layer gates the other. Shazeer 2020, arXiv:2002.05202.

    Parameters
    ----------
    name, C, F, std, shrink, bias : see `MLP`; the rows of name.c_fc are gate's, then up's
    """

    _width = 2
    _activation = "swiglu"

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield gate and up, and what becomes of them."""
        yield Slot(self._fc, (batch.N, self.fc.OC), Life.INNER, factor=True, taken=True)
        yield Slot(self._act, (batch.N, self.proj.C), Life.CHEAPEST, factor=True, taken=True)
        yield from self._low(batch)

    def activate(self, ctx: Pass) -> None:
        """Write silu(gate) * up."""
        ctx.ops.swiglu_forward(ctx.a[self._act], ctx.a[self._fc])

    def activate_backward(self, ctx: Pass, d_act: Array) -> Array:
        """Return the gradient of gate and up, in their own memory."""
        d_fc = ctx.take(self._fc)
        ctx.ops.swiglu_backward(d_fc, d_act, ctx.a[self._fc])
        return d_fc
