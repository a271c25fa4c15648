"""Trace: the channels that a forward pass writes, by name, to look inside a model.

    encoded          the embeddings
    h.0.ln_1         the first norm's output
    h.0.attn.qkv     queries, keys and values
    h.0.attn.att     the heads' outputs
    h.0.middle       the stream behind the attention
    h.0.ln_2         the second norm's output
    h.0.mlp.fc       the inner channels before the activation
    h.0.mlp.act      and after it
    h.0.out          the stream behind the layer
    ln_f             the last norm's output

Attention's weights are not among them, because no kernel writes T x T numbers; `attention` computes
them from the queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Life, Pass
from gpt2c.model.stack import Stack

__all__ = ["Trace"]


class Trace(Mapping[str, Array]):
    """The activations of a batch, name -> (B, T, channels) float32; see `Model.trace`."""

    def __init__(self, stack: Stack, ctx: Pass) -> None:
        self._stack, self._ctx = stack, ctx
        self._arrays = {
            slot.name: ctx.rows(ctx.a[slot.name])
            for slot in stack.slots(ctx.batch)
            if slot.life <= Life.CHEAPEST and len(slot.shape) == 2
        }

    def __getitem__(self, name: str) -> Array:
        """Return an activation.

        Raises
        ------
        KeyError : no activation has this name
        """
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Trace of {self._ctx.batch.B} x {self._ctx.batch.T} tokens: {', '.join(self)}"

    def attention(self, layer: int) -> Array:
        """Return how much each token attends to each: (B, NH, T, T), rows add up to 1.

        Raises
        ------
        IndexError : there is no such layer
        """
        block, (B, T) = self._stack.layers[layer].attention, self._ctx.batch
        heads = self._arrays[block.name + ".qkv"].reshape(B, T, -1, block.HS).swapaxes(1, 2)
        q, k = heads[:, : block.NH], heads[:, block.NH : block.NH + block.KV]
        k = np.repeat(k, block.NH // block.KV, axis=1)
        scores = q @ k.swapaxes(2, 3) / np.float32(np.sqrt(block.HS))
        lse = self._ctx.a[block.name + ".lse"].reshape(B, block.NH, T, 1)
        weights: Array = np.tril(np.exp(np.minimum(scores - lse, 0)))
        return weights

    def lens(self, name: str) -> Array:
        """Return the logits (B, T, V) that the stream would give if it ended here (logit lens).

        The last norm and the head are applied to an activation of the stream: "encoded",
        "h.0.middle", "h.0.out". Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

        Raises
        ------
        KeyError : no activation has this name
        ValueError : the activation does not have the stream's channels
        """
        x, (B, T) = self._arrays[name], self._ctx.batch
        if x.shape[-1] != self._stack.norm.C:
            raise ValueError(f"the stream has {self._stack.norm.C} channels, {name} {x.shape[-1]}")
        normed = np.empty((B * T, x.shape[-1]), np.float32)
        logits = np.empty((B * T, self._stack.head.V), np.float32)
        self._stack.norm.forward(self._ctx, normed, x.reshape(B * T, -1))
        self._stack.head.forward(self._ctx, logits, normed)
        return logits.reshape(B, T, -1)
