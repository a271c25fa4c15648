"""Softmax and cross-entropy: logits -> losses in nats.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["crossentropy_backward", "crossentropy_forward"]

Array = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]


def crossentropy_forward(losses: Array, lse: Array, logits: Array, targets: IntArray) -> None:
    """Compute the cross-entropy of the softmax of each row of logits with that row's target.

    losses = lse - logits[target] = -log(softmax(logits)[target]),   lse = log(sum(exp(logits)))

    Parameters
    ----------
    losses : (N,), written, in nats; 0 where the target is ignored
    lse : (N,), written, kept for the backward pass
    logits : (N, V)
    targets : (N,) int32, in [0, V), or -1 to ignore the row

    Examples
    --------
    >>> logits, targets = np.zeros((1, 4), np.float32), np.array([2], np.int32)
    >>> losses, lse = gpt2c.ops.crossentropy_forward(logits, targets)
    >>> losses.round(3), np.log(4).round(3)  # four tokens that are equally likely
    (array([1.386], dtype=float32), np.float64(1.386))
    """
    largest = logits.max(axis=1)  # subtracted first, so that exp cannot overflow
    lse[...] = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    # as an index, -1 reads the last column; the next line drops the result
    losses[...] = lse - logits[np.arange(len(targets)), targets]
    losses[targets == -1] = 0


def crossentropy_backward(
    dlogits: Array,
    logits: Array,
    lse: Array,
    targets: IntArray,
    weights: Array | None,
    scale: float,
) -> None:
    """Write the gradient of the logits: of `scale` times the weighted sum of the losses.

    dlogits = (softmax(logits) - onehot(target)) * weights * scale, 0 where the target is ignored

    Parameters
    ----------
    dlogits : (N, V), written; may be `logits`
    logits, lse, targets : the inputs and an output of the forward pass
    weights : (N,), or None: all 1; a row of weight 0 is 0
    scale : 1 / (number of rows that count) makes the loss their mean

    Examples
    --------
    >>> logits, targets = np.zeros((1, 4), np.float32), np.array([2], np.int32)
    >>> losses, lse = gpt2c.ops.crossentropy_forward(logits, targets)
    >>> gpt2c.ops.crossentropy_backward(logits, lse, targets).round(3).tolist()
    [[0.25, 0.25, -0.75, 0.25]]
    """
    # losses = lse - logits[target], and d(lse) / d(logits) is the softmax
    gradient = np.exp(logits - lse[:, None])
    gradient[np.arange(len(targets)), targets] -= 1
    gradient[targets == -1] = 0
    if weights is not None:
        gradient[weights == 0] = 0  # whatever the logits are
    gradient *= scale if weights is None else (weights * scale)[:, None]
    dlogits[...] = gradient
