"""Heads: what is read off the last norm's output: logits of tokens, or scores of texts.

    logits = x W^T

A language head has V logits, one for each token. A score head has K scores, read at the last token
of a text, or at every token; Hugging Face calls its weight "score". Both are the same product.

Logits of a whole batch would be its largest array by far, (N, V). So they come in blocks of rows,
become their own gradient in place, and are taken back before the next block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Life, Parameter, Pass, Slot, Stage
from gpt2c.model.objective import Objective, Rows

__all__ = ["Head"]

# The loss never holds more logits than this, 104 MB; (N, V) would be 0.8 GB at 4 x 1024.
LOGITS_FLOATS = 26_000_000


class Head:
    """The logits of the next token, or scores.

    Parameters
    ----------
    V, C : logits of a row (tokens or scores), channels
    name : "lm_head" or "score" for a weight of its own; "wte" for the embedding's table
    std : of the first values of a weight of its own

    Attributes
    ----------
    tied : whether its weight is the embedding's table
    small : see `Parameter`
    """

    def __init__(self, V: int, C: int, name: str = "wte", std: float = 0.0) -> None:
        self.V, self.C, self._std, self.tied = V, C, std, name == "wte"
        self.small = True
        self.weight, self.scale = name + ".weight", name + ".scale"

    def parameters(self) -> Iterable[Parameter]:
        """Yield the weight, if it is its own."""
        if not self.tied:
            shape = (self.V, self.C)
            yield Parameter(self.weight, shape, std=self._std, decays=True, small=self.small)

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield a block of logits, and the loss of each row."""
        rows = max(1, min(batch.N, LOGITS_FLOATS // self.V))
        yield Slot("logits", (rows, self.V), Life.LOGITS)
        yield Slot("losses", (batch.N,), Life.SCRATCH)

    def flops(self, T: int) -> float:
        """Count the multiply-adds of a token."""
        return self.V * self.C

    def forward(self, ctx: Pass, out: Array, x: Array) -> None:
        """Write logits (N, V) of x (N, C)."""
        weight, scale = ctx.p[self.weight], ctx.p.get(self.scale)
        ctx.ops.matmul_forward(out, x, weight, None, scale, ctx.precision)

    def stages(self, ctx: Pass, out: Array, x: Array) -> Iterable[Stage]:
        """Yield the stage that does `forward`."""
        weight, scale = ctx.p[self.weight], ctx.p.get(self.scale)
        yield Stage("matmul", out, x, precision=ctx.precision, weight=weight, scale=scale)

    def losses(self, ctx: Pass, x: Array, objective: Objective) -> Array:
        """Return the losses (N,) of x (N, C)."""
        losses, live = ctx.a["losses"], live_rows(objective)
        for block, rows in self._blocks(ctx, len(x), live):
            objective.losses(ctx.ops, losses[block], self._logits(ctx, x[rows]), rows)
        if live is not None:
            scatter(losses, live)
        return losses

    def learn(
        self, ctx: Pass, d_weight: Array | None, x: Array, objective: Objective, scale: float
    ) -> Array:
        """Return `losses`, and turn x into its gradient, that of scale * sum(losses).

        Parameters
        ----------
        d_weight : (V, C), written; added to if ctx.accumulate; None if the head is frozen
        x : (N, C), becomes its own gradient
        """
        ops, accumulate = ctx.ops, ctx.accumulate
        weight, w_scale = ctx.p[self.weight], ctx.p.get(self.scale)
        losses, live = ctx.a["losses"], live_rows(objective)
        for block, rows in self._blocks(ctx, len(x), live):
            part = x[rows]  # a view of a slice, a copy of scattered rows
            logits = self._logits(ctx, part)
            objective.learn(ops, losses[block], logits, rows, scale)
            ops.matmul_backward(
                *(part, d_weight, None, logits, part, weight, w_scale),
                *(accumulate, ctx.precision),
            )
            if live is not None:
                x[rows] = part
            accumulate = True
        if live is not None:
            scatter(losses, live)
            x[~objective.live] = 0
            if d_weight is not None and not accumulate:
                d_weight.fill(0.0)
        return losses

    def backward(
        self,
        ctx: Pass,
        d_weight: Array | None,
        x: Array,
        d_logits: Array,
        rows: NDArray[np.intp],
    ) -> None:
        """Turn x (N, C) into its gradient, from that of the logits (n, V) of n of its rows."""
        part, weight, scale = x[rows], ctx.p[self.weight], ctx.p.get(self.scale)
        ctx.ops.matmul_backward(
            *(part, d_weight, None, d_logits, part, weight, scale),
            *(ctx.accumulate, ctx.precision),
        )
        x.fill(0.0)
        x[rows] = part

    def _logits(self, ctx: Pass, x: Array) -> Array:
        """Return the logits of a block of rows; they are void at the next."""
        logits = ctx.a["logits"][: len(x)]
        self.forward(ctx, logits, x)
        return logits

    def _blocks(
        self, ctx: Pass, N: int, live: NDArray[np.intp] | None
    ) -> Iterator[tuple[slice, Rows]]:
        """Divide N rows, or those of `live`, into blocks of nearly one size that fit the memory.

        Yield the place of each block among these rows, and its rows of the batch.
        """
        count = N if live is None else live.size
        if count:
            size = -(-count // -(-count // len(ctx.a["logits"])))
            for start in range(0, count, size):
                block = slice(start, min(start + size, count))
                yield block, block if live is None else live[block]


def live_rows(objective: Objective) -> NDArray[np.intp] | None:
    """Return the rows that have a loss, None for all: other rows cost no product."""
    return None if objective.live.all() else np.flatnonzero(objective.live)


def scatter(losses: Array, live: NDArray[np.intp]) -> None:
    """Move the first losses (N,) to the rows of `live`; those of other rows are 0."""
    found = losses[: live.size].copy()
    losses.fill(0.0)
    losses[live] = found
