"""Embedding: a row for each token plus a row for each position.

out = wte[idx] + wpe[position ...]
"""

from __future__ import annotations

from collections.abc import Iterable

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, IntArray, Life, Parameter, Run, Slot

__all__ = ["Embedding"]


class Embedding:
    """GPT-2's table of tokens, wte (V, C), and of positions, wpe (P, C).

    Parameters
    ----------
    V, P, C : tokens, positions, channels
    std : of the first values
    """

    def __init__(self, V: int, P: int, C: int, std: float) -> None:
        self.V, self.P, self.C, self._std = V, P, C, std

    def parameters(self) -> Iterable[Parameter]:
        """Yield both tables."""
        V, P, C, std = self.V, self.P, self.C, self._std
        yield Parameter("wte.weight", (V, C), std=std, decays=True, small=True)
        yield Parameter("wpe.weight", (P, C), std=std, decays=True)

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield the first layer's input."""
        yield Slot("encoded", (batch.N, self.C), Life.STREAM)

    def flops(self, T: int) -> float:
        """Count no multiply-adds: rows are looked up."""
        return 0.0

    def forward(self, run: Run, idx: IntArray) -> Array:
        """Return the embeddings (N, C) of idx (B, T)."""
        out, p = run.a["encoded"], run.p
        run.ops.encoder_forward(
            *(run.rows(out), idx, p["wte.weight"], p["wpe.weight"], p.get("wte.scale")),
            *(run.offsets, run.position),
        )
        return out

    def backward(self, run: Run, d_out: Array, idx: IntArray) -> None:
        """Add to the gradients of both tables; wte's has what the head wrote."""
        g = run.g
        if not run.accumulate:
            g["wpe.weight"].fill(0.0)
        run.ops.encoder_backward(
            g["wte.weight"], g["wpe.weight"], run.rows(d_out), idx, run.offsets
        )
