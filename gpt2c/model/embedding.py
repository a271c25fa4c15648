"""Embedding: a row for each token plus, in GPT-2, a row for each position.

out = dropout(wte[idx] + wpe[position + t])
"""

from __future__ import annotations

from collections.abc import Iterable

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, IntArray, Life, Parameter, Pass, Slot, Stage

__all__ = ["Embedding"]


class Embedding:
    """The table of tokens, wte (V, C), and that of positions, wpe (P, C).

    Parameters
    ----------
    V, P, C : tokens, positions, channels; without a table of positions P is 0
    std : of the first values
    tied : whether the head has wte as its weight, too
    """

    def __init__(self, V: int, P: int, C: int, std: float, tied: bool = True) -> None:
        self.V, self.P, self.C, self._std, self._tied = V, P, C, std, tied

    def parameters(self) -> Iterable[Parameter]:
        """Yield both tables."""
        V, P, C, std = self.V, self.P, self.C, self._std
        yield Parameter("wte.weight", (V, C), std=std, decays=True, small=True)
        if P:
            yield Parameter("wpe.weight", (P, C), std=std, decays=True)

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield the first layer's input."""
        yield Slot("encoded", (batch.N, self.C), Life.STREAM)

    def flops(self, T: int) -> float:
        """Count no multiply-adds: rows are looked up."""
        return 0.0

    def forward(self, ctx: Pass, idx: IntArray) -> Array:
        """Return the embeddings (N, C) of idx (B, T)."""
        out, p = ctx.a["encoded"], ctx.p
        ctx.ops.encoder_forward(
            *(ctx.rows(out), idx, p["wte.weight"], p.get("wpe.weight"), p.get("wte.scale")),
            *(ctx.offsets, ctx.position),
        )
        return ctx.drop(out, out, "encoded")

    def stages(self, ctx: Pass, out: Array) -> Iterable[Stage]:
        """Yield the stage that does `forward`."""
        wte, scale, wpe = (ctx.p.get(name) for name in ("wte.weight", "wte.scale", "wpe.weight"))
        yield Stage("encoder", out, weight=wte, scale=scale, wpe=wpe)

    def backward(self, ctx: Pass, d_out: Array, idx: IntArray) -> None:
        """Add to the gradients of both tables; a tied wte's has what the head wrote.

        With dropout, d_out (N, C) becomes the gradient of the sum before it.
        """
        ctx.drop(d_out, d_out, "encoded")
        d_wte, d_wpe = ctx.g.get("wte.weight"), ctx.g.get("wpe.weight")
        for table in (d_wpe, None if self._tied else d_wte):
            if table is not None and not ctx.accumulate:
                table.fill(0.0)
        ctx.ops.encoder_backward(d_wte, d_wpe, ctx.rows(d_out), idx, ctx.offsets)
