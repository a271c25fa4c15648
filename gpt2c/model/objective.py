"""Objectives: losses of logits, and the gradients that logits become.

A head gives an objective its logits in blocks of rows, because those of a whole batch are never in
memory. The objective computes the losses of a block, and turns logits into their gradient where
they lie. A row is a token of the batch, sequence after sequence; N is the number of all.

`gpt2c.GPT2.loss` takes an objective in place of targets.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.backend import Backend
from gpt2c.kernels.memory import Array
from gpt2c.model.block import IntArray

__all__ = ["CrossEntropy", "Objective", "Rows"]

Rows = slice | NDArray[np.intp]


@runtime_checkable
class Objective(Protocol):
    """A loss for each row, and its gradient. A class that has these three need not inherit."""

    @property
    def live(self) -> NDArray[np.bool_]:
        """The rows (N,) that have a loss; the gradient of all others is 0 and costs no product."""

    def losses(self, ops: Backend, out: Array, logits: Array, rows: Rows) -> None:
        """Write the losses of a block, 0 where a row is not live.

        Parameters
        ----------
        ops : the backend
        out : (n,)
        logits : (n, V)
        rows : of the batch, a slice or n numbers
        """

    def learn(self, ops: Backend, out: Array, logits: Array, rows: Rows, scale: float) -> None:
        """Write the losses of a block of live rows; logits become the gradient of scale * losses.

        The gradient of one row depends on that row alone. Parameters are those of `losses`.
        """


class CrossEntropy:
    """The loss -log p of each row's target, in nats, times the row's weight.

    Parameters
    ----------
    targets : (N,) int32 in [0, V); negative ones are ignored
    weights : (N,) float32; None for all 1. Rows of weight 0 are ignored

    Raises
    ------
    ValueError : another shape or dtype, or weights that are not finite
    """

    def __init__(self, targets: IntArray, weights: Array | None = None) -> None:
        if getattr(targets, "dtype", None) != np.int32 or targets.ndim != 1:
            raise ValueError(f"targets must be int32 (N,), got {targets!r:.50}")
        self._targets = targets.copy()
        self._least_V = int(self._targets.max(initial=-1)) + 1  # C trusts the targets
        self.live: NDArray[np.bool_] = self._targets >= 0
        self._weights = weights
        if weights is not None:
            if getattr(weights, "dtype", None) != np.float32 or weights.shape != targets.shape:
                raise ValueError(f"weights must be float32 {targets.shape}, got {weights!r:.50}")
            if not np.isfinite(weights).all():
                raise ValueError("weights must be finite")
            self._weights = weights.copy()
            self.live &= weights != 0

    def losses(self, ops: Backend, out: Array, logits: Array, rows: Rows) -> None:
        """See `Objective`."""
        self._forward(ops, out, logits, rows)

    def learn(self, ops: Backend, out: Array, logits: Array, rows: Rows, scale: float) -> None:
        """See `Objective`: the gradient of a row is scale * weight * (softmax - onehot)."""
        lse = self._forward(ops, out, logits, rows)
        weights = None if self._weights is None else self._weights[rows]
        ops.crossentropy_backward(logits, logits, lse, self._targets[rows], weights, scale)

    def _forward(self, ops: Backend, out: Array, logits: Array, rows: Rows) -> Array:
        """Write the losses, and return the log of each row's denominator."""
        if logits.shape[1] < self._least_V:
            raise ValueError(f"targets must be below {logits.shape[1]}, got {self._least_V - 1}")
        lse = np.empty_like(out)
        ops.crossentropy_forward(out, lse, logits, self._targets[rows])
        if self._weights is not None:
            out *= self._weights[rows]
        return lse
