"""Rope: rotary positions. Each pair of channels of q and k is turned by an angle.

angle of pair i at position t = t * theta^(-2i / HS)

Then q k^T depends on how far two tokens are apart, and no position has parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpt2c.kernels.memory import Array, require
from gpt2c.model.block import Pass

if TYPE_CHECKING:
    from gpt2c.model.rope_scaling import RopeScaling

__all__ = ["Rope"]


class Rope:
    """Rotary position embedding, Su et al. 2021, arXiv:2104.09864, with transformers' pairs.

    Parameters
    ----------
    P, HS : positions, channels of a head; i and i + HS / 2 are a pair
    theta : the base of the frequencies
    scaling : changes the frequencies of a model whose texts have become longer, or None

    Attributes
    ----------
    frequencies : (HS / 2,) float64, the angle of each pair from one position to the next
    """

    def __init__(self, P: int, HS: int, theta: float, scaling: RopeScaling | None = None) -> None:
        frequencies = theta ** -(np.arange(0, HS, 2) / HS)
        self._P, self.frequencies = P, scaling.scaled(frequencies) if scaling else frequencies
        self._tables: tuple[Array, Array] | None = None

    def tables(self, rows: int) -> tuple[Array, Array]:
        """Return cosines and sines (at least `rows`, HS / 2).

        They are kept, and made again when a text is longer than those before.
        """
        tables = (
            self._tables
        )  # threads that share a config share them: another may set shorter ones
        if tables is None or len(tables[0]) < rows:
            positions = np.arange(min(self._P, 2 * rows))
            size = 32 * len(positions) * len(self.frequencies)  # float64 on the way
            require("rotary positions", {"tables": size}, "take shorter texts")
            angles = positions[:, None] * self.frequencies
            tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            self._tables = tables
        return tables

    def forward(self, ctx: Pass, out: Array, qkv: Array, heads: int) -> None:
        """Turn the first `heads` heads, those of q and k, of each row of qkv (N, W).

        Write out (N, W), which may be qkv.
        """
        rows, tables = ctx.rows(qkv), self.tables(ctx.position + ctx.batch.T)
        ctx.ops.rope_forward(ctx.rows(out), rows, *tables, ctx.offsets, heads, ctx.position)

    def backward(self, ctx: Pass, d_qkv: Array, heads: int) -> None:
        """Turn their gradients back, in place."""
        rows, tables = ctx.rows(d_qkv), self.tables(ctx.position + ctx.batch.T)
        ctx.ops.rope_backward(rows, rows, *tables, ctx.offsets, heads, ctx.position)
