"""MLP: two linear layers with GELU between them, for each token by itself.

out = gelu(x W_fc + b) W_proj + b
"""

from __future__ import annotations

from collections.abc import Iterable

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Life, Parameter, Run, Slot
from gpt2c.model.linear import Linear

__all__ = ["MLP"]


class MLP:
    """GPT-2's MLP.

    Parameters
    ----------
    name : of the block; its linear layers are name.c_fc and name.c_proj
    C, F : channels outside and inside
    std, shrink : of the first weights; those of c_proj shrink
    """

    def __init__(self, name: str, C: int, F: int, std: float, shrink: float) -> None:
        self.fc = Linear(name + ".c_fc", C, F, std)
        self.proj = Linear(name + ".c_proj", F, C, std, shrink)
        self.F = F
        self._fc, self._gelu = name + ".fc", name + ".gelu"

    def parameters(self) -> Iterable[Parameter]:
        """Yield those of the two linear layers."""
        yield from self.fc.parameters()
        yield from self.proj.parameters()

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield the inner channels before and after GELU."""
        yield Slot(self._fc, (batch.N, self.F), Life.INNER)
        yield Slot(self._gelu, (batch.N, self.F), Life.CHEAP, over=self._fc)

    def flops(self, T: int) -> float:
        """Count the multiply-adds of both layers."""
        return self.fc.flops(T) + self.proj.flops(T)

    def activate(self, run: Run) -> None:
        """Write the inner channels after GELU from those before it."""
        run.ops.gelu_forward(run.a[self._gelu], run.a[self._fc])

    def hidden(self, run: Run, x: Array) -> Array:
        """Return the inner channels (N, F) of x (N, C): all of forward that backward needs."""
        self.fc.forward(run, run.a[self._fc], x)
        self.activate(run)
        return run.a[self._gelu]

    def forward(self, run: Run, out: Array, x: Array) -> None:
        """Write out (N, C) of x (N, C)."""
        self.proj.forward(run, out, self.hidden(run, x))

    def backward(self, run: Run, d_x: Array, d_out: Array, x: Array) -> None:
        """Write d_x (N, C), which may be x, and the gradients of both layers."""
        d_gelu = run.take(self._gelu)
        self.proj.backward(run, d_gelu, d_out, run.a[self._gelu])
        run.ops.gelu_backward(d_gelu, d_gelu, run.a[self._fc])
        self.fc.backward(run, d_x, d_gelu, x)
