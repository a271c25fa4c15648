"""Heads: what is read off the last norm's output. The language head gives logits.

    logits = x W^T

Logits of a whole batch would be its largest array by far, (N, V). So they come in blocks of rows,
become their own gradient in place, and are taken back before the next block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, IntArray, Life, Parameter, Run, Slot, Stage

__all__ = ["LanguageHead"]

# The loss never holds more logits than this, 104 MB; (N, V) would be 0.8 GB at 4 x 1024.
LOGITS_FLOATS = 26_000_000


class LanguageHead:
    """The logits of the next token.

    Parameters
    ----------
    V, C : tokens, channels
    std : of the first values of a weight of its own, lm_head; None for the embedding's table, wte
    """

    def __init__(self, V: int, C: int, std: float | None = None) -> None:
        self.V, self.C, self._std = V, C, std
        name = "wte" if std is None else "lm_head"
        self.weight, self.scale = name + ".weight", name + ".scale"

    def parameters(self) -> Iterable[Parameter]:
        """Yield the weight, if it is its own."""
        if self._std is not None:
            yield Parameter(self.weight, (self.V, self.C), std=self._std, decays=True, small=True)

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield a block of logits, and for each row its loss and the log of its denominator."""
        rows = max(1, min(batch.N, LOGITS_FLOATS // self.V))
        yield Slot("logits", (rows, self.V), Life.SCRATCH)
        yield Slot("losses", (batch.N,), Life.SCRATCH)
        yield Slot("lse", (batch.N,), Life.SCRATCH)

    def flops(self, T: int) -> float:
        """Count the multiply-adds of a token."""
        return self.V * self.C

    def forward(self, run: Run, out: Array, x: Array) -> None:
        """Write logits (N, V) of x (N, C)."""
        run.ops.matmul_forward(out, x, run.p[self.weight], None, run.p.get(self.scale))

    def stages(self, run: Run, out: Array, x: Array) -> Iterable[Stage]:
        """Yield the stage that does `forward`."""
        yield Stage("matmul", out, x, weight=run.p[self.weight], scale=run.p.get(self.scale))

    def losses(self, run: Run, x: Array, targets: IntArray) -> Array:
        """Return -log p (N,) of each target (N,) in nats, from x (N, C)."""
        losses, lse = run.a["losses"], run.a["lse"]
        for rows in self._blocks(run, len(x)):
            logits = self._logits(run, x[rows])
            run.ops.crossentropy_forward(losses[rows], lse[rows], logits, targets[rows])
        return losses

    def learn(
        self,
        run: Run,
        d_weight: Array | None,
        x: Array,
        targets: IntArray,
        weights: Array | None,
        scale: float,
    ) -> Array:
        """Return `losses`, and turn x into its gradient, that of scale * sum(weights * losses).

        Parameters
        ----------
        d_weight : (V, C), written; added to if run.accumulate; None if the head is frozen
        x : (N, C), becomes its own gradient
        targets : (N,), -1 is ignored
        weights : (N,), None for all 1
        """
        ops, weight, accumulate = run.ops, run.p[self.weight], run.accumulate
        losses, lse = run.a["losses"], run.a["lse"]
        is_live = targets >= 0 if weights is None else (targets >= 0) & (weights != 0)
        live = None if is_live.all() else np.flatnonzero(is_live)  # other rows cost no product
        for block in self._blocks(run, len(x) if live is None else live.size):
            rows = block if live is None else live[block]
            part, wanted = x[rows], targets[rows]  # views of a slice, copies of scattered rows
            own_losses, own_lse, logits = losses[block], lse[block], self._logits(run, part)
            factors = None if weights is None else weights[rows]
            ops.crossentropy_forward(own_losses, own_lse, logits, wanted)
            ops.crossentropy_backward(logits, logits, own_lse, wanted, factors, scale)
            ops.matmul_backward(part, d_weight, None, logits, part, weight, accumulate)
            if live is not None:
                x[rows] = part
            accumulate = True
        if live is not None:
            losses[live] = losses[: live.size].copy()
            losses[~is_live] = x[~is_live] = 0
            if d_weight is not None and not accumulate:
                d_weight.fill(0.0)
        return losses

    def _logits(self, run: Run, x: Array) -> Array:
        """Return the logits of a block of rows; they are void at the next."""
        logits = run.a["logits"][: len(x)]
        self.forward(run, logits, x)
        return logits

    def _blocks(self, run: Run, N: int) -> Iterator[slice]:
        """Divide N rows into blocks of nearly one size, as many as there is memory for."""
        if N:
            size = -(-N // -(-N // len(run.a["logits"])))
            for start in range(0, N, size):
                yield slice(start, min(start + size, N))
