"""Attention: each token takes, from itself and those before it, what its query asks for.

q, k, v = x W_qkv + b                          q and k turned by their positions, if there is a Rope
att = dropout(softmax(mask(q k^T / sqrt(HS)))) v        for each of NH heads
out = att W_proj + b
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpt2c.kernels.memory import Array
from gpt2c.model.block import NO_CACHE, Batch, Life, Parameter, Pass, Slot, Stage
from gpt2c.model.linear import Linear

if TYPE_CHECKING:
    from gpt2c.model.rope import Rope

__all__ = ["Attention"]


class Attention:
    """Causal attention of several heads, Vaswani et al. 2017, arXiv:1706.03762.

    Parameters
    ----------
    name : of the block; its linear layers are name.c_attn and name.c_proj
    C, NH : channels and query heads
    std, shrink : of the first weights; those of c_proj shrink
    KV : key and value heads, each shared by NH / KV query heads; Ainslie et al. 2023,
        arXiv:2305.13245. None for NH
    HS : channels of a head, None for C / NH
    bias : whether the linear layers have one
    rope : turns q and k by their positions, or None
    """

    def __init__(
        self,
        name: str,
        C: int,
        NH: int,
        std: float,
        shrink: float = 1.0,
        KV: int | None = None,
        HS: int | None = None,
        bias: bool = True,
        rope: Rope | None = None,
    ) -> None:
        self.name = name
        self.NH, self.KV, self.HS, self._rope = NH, KV or NH, HS or C // NH, rope
        heads = NH + 2 * self.KV
        self.qkv = Linear(name + ".c_attn", C, heads * self.HS, std, bias=bias)
        self.proj = Linear(name + ".c_proj", NH * self.HS, C, std, shrink, bias)
        self._qkv, self._att, self._lse = name + ".qkv", name + ".att", name + ".lse"
        self._d_att = name + ".d_att"

    def parameters(self) -> Iterable[Parameter]:
        """Yield those of the two linear layers."""
        yield from self.qkv.parameters()
        yield from self.proj.parameters()

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield q, k, v; the heads' outputs and their gradient; the log of the denominators."""
        yield Slot(self._qkv, (batch.N, self.qkv.OC), Life.INNER, factor=True, taken=True)
        yield Slot(self._att, (batch.N, self.proj.C), Life.INNER, factor=True)
        yield Slot(self._lse, (batch.B, self.NH, batch.T), Life.INNER)
        yield Slot(self._d_att, (batch.N, self.proj.C), Life.GRADIENT)
        yield from self.qkv.slots(batch)
        yield from self.proj.slots(batch)

    def flops(self, T: int) -> float:
        """Count the multiply-adds: a query sees T/2 keys on average, for q k^T and for p v."""
        return self.qkv.flops(T) + self.proj.flops(T) + self.proj.C * T

    def forward(self, ctx: Pass, out: Array, x: Array) -> None:
        """Write out (N, C) of x (N, C)."""
        qkv, att = ctx.a[self._qkv], ctx.a[self._att]
        straight = ctx.floats(self._qkv) if self._rope else qkv  # q and k are rounded when turned
        self.qkv.forward(ctx, straight, x)
        if self._rope:
            self._rope.forward(ctx, qkv, straight, self.NH + self.KV)
        ctx.ops.attention_forward(
            *(ctx.rows(att), ctx.a[self._lse], *ctx.caches.get(self.name, NO_CACHE)),
            *(ctx.rows(qkv), ctx.offsets, ctx.position),
            *(*ctx.dropout.at(self.name), ctx.precision),
        )
        self.proj.forward(ctx, out, att)

    def stages(self, ctx: Pass, out: Array, x: Array) -> Iterable[Stage]:
        """Yield the stages that add to out (N, C) what `forward` makes of x (N, C)."""
        qkv, att = ctx.a[self._qkv], ctx.a[self._att]
        cache = ctx.caches[self.name]._asdict()
        cos, sin = self._rope.tables(cache["keys"].shape[-2]) if self._rope else (None, None)
        yield from self.qkv.stages(ctx, qkv, x)
        yield Stage("attention", att, qkv, **cache, cos=cos, sin=sin, NH=self.NH)
        yield from self.proj.stages(ctx, out, att, "add")

    def backward(self, ctx: Pass, d_x: Array | None, d_out: Array, x: Array) -> None:
        """Write d_x (N, C), which may be x, and the gradients of both layers."""
        qkv, att, lse = ctx.a[self._qkv], ctx.a[self._att], ctx.a[self._lse]
        d_att = ctx.a[self._d_att]  # the op below reads att beside its gradient
        self.proj.backward(ctx, d_att, d_out, att)
        d_qkv = ctx.take(self._qkv)
        ctx.ops.attention_backward(
            *(ctx.rows(d_qkv), ctx.rows(d_att), ctx.rows(qkv), ctx.rows(att), lse, ctx.offsets),
            *(*ctx.dropout.at(self.name), ctx.precision),
        )
        if self._rope:
            self._rope.backward(ctx, d_qkv, self.NH + self.KV)
        self.qkv.backward(ctx, d_x, d_qkv, x)
