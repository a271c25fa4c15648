"""Log-probabilities of completions by a model, and the gradients that slopes of them give.

A completion is the learned part of an example. Its log-probability is the sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2c.model.model import Model
from gpt2c.text.examples import Example

__all__ = ["Send", "learn_completions", "lengths_of", "log_probabilities"]

Send = Callable[[Iterable[str]], None] | None  # the argument `final` of `Model.backward`


def log_probabilities(
    model: Model, examples: Sequence[Example], keep: bool = True
) -> NDArray[np.float64]:
    """Return the log-probability of each completion, (B,), in nats.

    With `keep` the model keeps what `learn_completions` needs.
    """
    inputs, targets = [one.ids[:-1] for one in examples], [one.targets for one in examples]
    losses = model.losses(inputs, targets, keep=keep)
    return -np.array([row.sum(dtype=np.float64) for row in losses])


def learn_completions(
    model: Model, examples: Sequence[Example], slopes: NDArray[np.float64], final: Send = None
) -> None:
    """Add the gradient of sum(slopes * log-probabilities), for those computed last.

    Parameters
    ----------
    slopes : (B,)
    final : see `Model.backward`
    """
    model.backward(
        weights=[
            np.full(len(one.ids) - 1, -slope) for one, slope in zip(examples, slopes, strict=True)
        ],
        final=final,
    )


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the number of tokens in each completion, (B,)."""
    return np.array([np.count_nonzero(one.learned) for one in examples])
