"""Heads: what is read off the last norm's output. The language head gives logits.

    logits = x wte^T

Logits of a whole batch would be its largest array by far, (N, V). So they come in blocks of rows,
become their own gradient in place, and are taken back before the next block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Life, Parameter, Run, Slot

__all__ = ["LanguageHead"]

# The loss never holds more logits than this, 104 MB; (N, V) would be 0.8 GB at 4 x 1024.
LOGITS_FLOATS = 26_000_000


class LanguageHead:
    """The logits of the next token, with the embedding's table as weight.

    Parameters
    ----------
    V, C : tokens, channels
    """

    def __init__(self, V: int, C: int) -> None:
        self.V, self.C = V, C
        self.weight, self.scale = "wte.weight", "wte.scale"

    def parameters(self) -> Iterable[Parameter]:
        """None of its own: the embedding has the table."""
        return ()

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

    def blocks(self, run: Run, x: Array) -> Iterator[tuple[slice, Array]]:
        """Yield logits (rows, V) of x (N, C), block after block; one is void at the next."""
        memory = run.a["logits"]
        size = -(-len(x) // -(-len(x) // len(memory)))  # blocks of nearly one size
        for start in range(0, len(x), size):
            rows = slice(start, min(start + size, len(x)))
            logits = memory[: rows.stop - rows.start]
            self.forward(run, logits, x[rows])
            yield rows, logits

    def backward(self, run: Run, d_weight: Array, d_x: Array, d_logits: Array, x: Array) -> None:
        """Write d_x (rows, C), which may be x; run.accumulate is for d_weight (V, C)."""
        weight = run.p[self.weight]
        run.ops.matmul_backward(d_x, d_weight, None, d_logits, x, weight, run.accumulate)
