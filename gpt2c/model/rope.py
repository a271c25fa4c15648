"""Rope: rotary positions. Each pair of channels of q and k is turned by an angle.

angle of pair i at position t = t * theta^(-2i / HS)

Then q k^T depends on how far two tokens are apart, and no position has parameters.
"""

from __future__ import annotations

import numpy as np

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Run

__all__ = ["Rope"]


class Rope:
    """Rotary position embedding, Su et al. 2021, arXiv:2104.09864, with transformers' pairs.

    Parameters
    ----------
    P, HS : positions, channels of a head; i and i + HS / 2 are a pair
    theta : the base of the frequencies
    """

    def __init__(self, P: int, HS: int, theta: float) -> None:
        self._sizes = P, HS, theta
        self._tables: tuple[Array, Array] | None = None  # made when they are needed first

    @property
    def tables(self) -> tuple[Array, Array]:
        """The cosines and sines, (P, HS / 2) each."""
        if self._tables is None:
            P, HS, theta = self._sizes
            frequencies = theta ** -(np.arange(0, HS, 2) / HS)
            angles = np.arange(P)[:, None] * frequencies
            self._tables = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
        return self._tables

    def forward(self, run: Run, qkv: Array, heads: int) -> None:
        """Turn the first `heads` heads, those of q and k, of each row of qkv (N, W) in place."""
        rows = run.rows(qkv)
        run.ops.rope_forward(rows, rows, *self.tables, run.offsets, heads, run.position)

    def backward(self, run: Run, d_qkv: Array, heads: int) -> None:
        """Turn their gradients back, in place."""
        rows = run.rows(d_qkv)
        run.ops.rope_backward(rows, rows, *self.tables, run.offsets, heads, run.position)
