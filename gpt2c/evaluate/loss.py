"""The mean loss of a model on token files, in adjacent windows as in training.

Knows nothing about training or the meaning of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from gpt2c.model.model import Model
from gpt2c.parallel.world import ALONE, World
from gpt2c.text.batches import windows
from gpt2c.text.shards import StoredTokens, TokenArray

__all__ = ["Shards", "evaluate"]

Shards = Sequence[TokenArray | StoredTokens]


def evaluate(
    model: Model,
    tokens: Shards,
    batch_size: int,
    block_size: int,
    eval_iters: int = 0,
    check: Callable[[], None] | None = None,
    world: World = ALONE,
) -> float:
    """Return the mean loss over consecutive windows of `tokens`, in nats per token.

    Parameters
    ----------
    batch_size, block_size : B windows of T tokens at a time
    eval_iters : the most batches to evaluate; 0 is all
    check : called before each batch; an error that it raises ends the evaluation
    world : its ranks take turns with the batches, and `check` is called before each turn of all
    """
    total, count = 0.0, 0
    batches = islice(windows(tokens, batch_size, block_size), eval_iters or None)
    for x, y in world.turns(batches, check):
        scored = int(np.count_nonzero(y >= 0))
        total += model.loss(x, y, keep=False) * scored
        count += scored
    total, targets = world.sum([total, count])
    return total / targets
