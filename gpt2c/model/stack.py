"""Stack: embedding, layers and a last norm, one after the other; and the layer they are made of.

    y = x + dropout(attention(norm_1(x))),   out = y + dropout(mlp(norm_2(y)))

The residual stream, x, goes through all layers; its gradient comes back as it is and collects what
each branch adds. Knows which blocks follow each other, nothing about what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain

from gpt2c.kernels.memory import Array
from gpt2c.model.attention import Attention
from gpt2c.model.block import Batch, Block, IntArray, Life, Parameter, Pass, Slot, Stage
from gpt2c.model.embedding import Embedding
from gpt2c.model.head import Head
from gpt2c.model.linear import Linear
from gpt2c.model.mlp import MLP
from gpt2c.model.norm import Norm

__all__ = ["Layer", "Stack"]


class Layer:
    """One layer: attention and MLP, each behind a norm, each added to the stream.

    Parameters
    ----------
    name : "h.0" of the first
    """

    def __init__(
        self, name: str, norm_1: Norm, attention: Attention, norm_2: Norm, mlp: MLP
    ) -> None:
        self.norm_1, self.attention, self.norm_2, self.mlp = norm_1, attention, norm_2, mlp
        self.blocks: tuple[Block, ...] = (norm_1, attention, norm_2, mlp)
        self._ln_1, self._middle = name + ".ln_1", name + ".middle"
        self._ln_2, self.out = name + ".ln_2", name + ".out"

    @cached_property  # at the first use: a stack gets its adapters after its layers
    def names(self) -> list[tuple[str, ...]]:
        """The names of each block's parameters."""
        return [names_of(block) for block in self.blocks]

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield those of the blocks, the norms' outputs, and the stream behind each branch."""
        shape = (batch.N, self.norm_1.C)
        yield Slot(self._ln_1, shape, Life.CHEAP, factor=True, taken=True)
        yield Slot(self._middle, shape, Life.INNER, over=self.out)
        yield Slot(self._ln_2, shape, Life.CHEAP, over=self._ln_1, factor=True, taken=True)
        yield Slot(self.out, shape, Life.STREAM)
        yield Slot("branch", shape, Life.SCRATCH)
        yield from chain.from_iterable(block.slots(batch) for block in self.blocks)

    def forward(self, ctx: Pass, x: Array) -> Array:
        """Return out (N, C) of x (N, C)."""
        a, branch = ctx.a, ctx.a["branch"]
        middle, out = a[self._middle], a[self.out]
        self.norm_1.forward(ctx, a[self._ln_1], x)
        self.attention.forward(ctx, branch, a[self._ln_1])
        self._add(ctx, self._middle, x)
        self.norm_2.forward(ctx, a[self._ln_2], middle)
        self.mlp.forward(ctx, branch, a[self._ln_2])
        self._add(ctx, self.out, middle)
        return out

    def _add(self, ctx: Pass, name: str, x: Array) -> None:
        """Write the stream (N, C) behind the branch: x plus the branch, with dropout."""
        branch = ctx.a["branch"]
        ctx.ops.residual_forward(ctx.a[name], x, ctx.drop(branch, branch, name))

    def stages(self, ctx: Pass, stream: Array) -> Iterable[Stage]:
        """Yield the stages that do `forward` on the stream (N, C) in place."""
        ln_1, ln_2 = ctx.a[self._ln_1], ctx.a[self._ln_2]
        yield from self.norm_1.stages(ctx, ln_1, stream)
        yield from self.attention.stages(ctx, stream, ln_1)
        yield from self.norm_2.stages(ctx, ln_2, stream)
        yield from self.mlp.stages(ctx, stream, ln_2)

    def again(self, ctx: Pass, x: Array, kept: Life) -> None:
        """Compute again what was not kept for backward: by the same ops, so the same bits."""
        a, branch, middle = ctx.a, ctx.a["branch"], ctx.a[self._middle]
        if kept < Life.CHEAP:
            self.norm_1.forward(ctx, a[self._ln_1], x)
        if kept < Life.INNER:
            self.attention.forward(ctx, branch, a[self._ln_1])
            self._add(ctx, self._middle, x)
        if kept < Life.CHEAP:
            self.norm_2.forward(ctx, a[self._ln_2], middle)
        if kept < Life.INNER:
            self.mlp.hidden(ctx, a[self._ln_2])
        elif kept < Life.CHEAPEST:
            self.mlp.activate(ctx)

    def backward(self, ctx: Pass, stream: Array, x: Array, below: bool) -> None:
        """Go back over the lines of `forward` on x; stream (N, C) goes from out's gradient to x's.

        The layer's activations are gone afterwards: their gradients took their memory.

        Parameters
        ----------
        below : whether anything below the layer is trained; if not, x's gradient is not completed
        """
        in_norm_1, in_attention, in_norm_2, _ = (is_trained(ctx, names) for names in self.names)
        above = below or in_norm_1 or in_attention  # whether the middle's gradient is needed
        branch = ctx.a["branch"]  # for the gradient of a branch with dropout
        d_ln_2 = ctx.take(self._ln_2) if above or in_norm_2 else None
        d_mlp = ctx.drop(branch, stream, self.out)
        self.mlp.backward(ctx, d_ln_2, d_mlp, ctx.a[self._ln_2])
        if d_ln_2 is None:
            return
        self.norm_2.backward(ctx, stream, d_ln_2, ctx.a[self._middle])
        if not above:
            return
        d_ln_1 = ctx.take(self._ln_1) if below or in_norm_1 else None
        d_attention = ctx.drop(branch, stream, self._middle)
        self.attention.backward(ctx, d_ln_1, d_attention, ctx.a[self._ln_1])
        if d_ln_1 is not None:
            self.norm_1.backward(ctx, stream, d_ln_1, x)


def names_of(block: Block) -> tuple[str, ...]:
    """Return the names of a block's parameters."""
    return tuple(one.name for one in block.parameters())


def is_trained(ctx: Pass, names: tuple[str, ...]) -> bool:
    """Return whether one of these parameters has a gradient."""
    return any(name in ctx.g for name in names)


class Stack:
    """A whole model but for its memory.

    Parameters
    ----------
    embedding, layers, norm, head : in the order in which a batch passes through them
    """

    def __init__(
        self, embedding: Embedding, layers: Sequence[Layer], norm: Norm, head: Head
    ) -> None:
        self.embedding, self.layers, self.norm, self.head = embedding, layers, norm, head
        self.blocks: list[Block] = [
            embedding,
            *chain.from_iterable(layer.blocks for layer in layers),
            norm,
            head,
        ]
        self._embedding_names = names_of(embedding)

    def parameters(self) -> dict[str, Parameter]:
        """Return all parameters by name: those that decay come first."""
        found = chain.from_iterable(block.parameters() for block in self.blocks)
        return {one.name: one for one in sorted(found, key=lambda one: not one.decays)}

    @cached_property
    def final_order(self) -> list[tuple[str, ...]]:
        """The names of parameters whose gradients are final together, in the order of backward."""
        head = names_of(self.head)  # none, if the embedding's table is its weight
        layers = [tuple(chain.from_iterable(layer.names)) for layer in reversed(self.layers)]
        return [(*head, *names_of(self.norm)), *layers, self._embedding_names]

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield the arrays of all but the head."""
        yield from self.embedding.slots(batch)
        yield from chain.from_iterable(layer.slots(batch) for layer in self.layers)
        yield Slot("ln_f", (batch.N, self.norm.C), Life.STREAM)
        yield Slot("d_stream", (batch.N, self.norm.C), Life.GRADIENT)
        yield from self.norm.slots(batch)

    def slots_with_head(self, batch: Batch) -> Iterable[Slot]:
        """Yield the arrays of all."""
        yield from self.slots(batch)
        yield from self.head.slots(batch)

    def linears(self) -> Iterable[Linear]:
        """Yield the linear layers, without the head."""
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.proj, layer.mlp.fc, layer.mlp.proj)

    def flops(self, T: int) -> float:
        """Count the multiply-adds of a token among T, forward."""
        return sum(block.flops(T) for block in self.blocks)

    def forward(self, ctx: Pass, idx: IntArray, states: Array | None = None) -> Array:
        """Return the last norm's output (N, C) of idx (B, T).

        `states` (L + 1, B, T, C), where it is given, gets the residual stream before each layer
        and the output.
        """
        out = ctx.a["ln_f"]
        *above, first = self.final_order  # of backward, so the next is the last
        if ctx.arrive is not None:
            ctx.arrive(first)
        x = self.embedding.forward(ctx, idx)
        for number, layer in enumerate(self.layers):
            if states is not None:
                states[number] = ctx.rows(x)
            if ctx.arrive is not None:
                ctx.arrive(above.pop())
            x = layer.forward(ctx, x)
        if ctx.arrive is not None:
            ctx.arrive(above.pop())  # the norm's, and those of the head, which reads `out`
        self.norm.forward(ctx, out, x)
        if states is not None:
            states[-1] = ctx.rows(out)
        return out

    def stages(self, ctx: Pass, logits: Array) -> Iterable[Stage]:
        """Yield the stages from token ids to logits (N, V)."""
        stream, out = ctx.a["encoded"], ctx.a["ln_f"]
        yield from self.embedding.stages(ctx, stream)
        for layer in self.layers:
            yield from layer.stages(ctx, stream)
        yield from self.norm.stages(ctx, out, stream)
        yield from self.head.stages(ctx, logits, out)

    def backward(self, ctx: Pass, d_out: Array, idx: IntArray, kept: Life) -> None:
        """Go back over the lines of `forward`; d_out (N, C) is the gradient of its result.

        Parameters
        ----------
        kept : the activations that forward left
        """
        a, stream = ctx.a, ctx.a["d_stream"]
        # whether anything before a layer is trained, and last, anything before the norm
        below = [is_trained(ctx, self._embedding_names)]
        for layer in self.layers:
            below.append(below[-1] or any(is_trained(ctx, names) for names in layer.names))
        inputs = [a["encoded"], *(a[layer.out] for layer in self.layers)]
        stream.fill(0.0)
        self.norm.backward(ctx, stream, d_out, inputs[-1])
        if ctx.final is not None:
            ctx.final(self.final_order[0])
        for number in reversed(range(len(self.layers))):
            if not below[number + 1]:
                return
            layer, x = self.layers[number], inputs[number]
            layer.again(ctx, x, kept)
            layer.backward(ctx, stream, x, below[number])
            if ctx.final is not None:
                ctx.final(self.final_order[len(self.layers) - number])
        if below[0]:
            self.embedding.backward(ctx, stream, idx)
            if ctx.final is not None:
                ctx.final(self.final_order[-1])
