"""Ragged batches: the examples of each step, in an order that depends on the seed alone.

A step has batch_size examples, whatever their lengths; batch_tokens limits what a model reads at
once, so it decides only how much memory a step takes. No batch has padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2c.text.prepare import shuffled

__all__ = ["Order", "held_out", "parts"]


class Order:
    """The numbers of the examples of each step: every epoch has each example once.

    A step may span two epochs. Seed and step alone determine its examples.

    Parameters
    ----------
    count : of the examples
    batch_size : examples in a step
    seed : not negative

    Examples
    --------
    >>> from gpt2c.text.ragged import Order
    >>> order = Order(count=5, batch_size=2, seed=1)
    >>> sorted([*order.step(0), *order.step(1), order.step(2)[0]])
    [0, 1, 2, 3, 4]
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def step(self, step: int) -> list[int]:
        """Return the numbers of a step's examples, (batch_size,), steps counted from 0."""
        first = step * self.batch_size
        places = range(first, first + self.batch_size)
        return [int(self._epoch(n // self.count)[n % self.count]) for n in places]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs = {key: kept for key, kept in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch], _ = shuffled([self.seed, epoch], self.count)
        return self._epochs[epoch]


def parts(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Divide sequences that follow each other into parts of at most `most` tokens.

    A sequence that is longer is a part of its own.

    Examples
    --------
    >>> from gpt2c.text.ragged import parts
    >>> list(parts([3, 4, 2, 9], most=8))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    start = size = 0
    for number, length in enumerate(lengths):
        if size and size + length > most:
            yield slice(start, number)
            start, size = number, 0
        size += length
    if size:
        yield slice(start, len(lengths))


def held_out(groups: Sequence[object], fraction: float, seed: int) -> list[bool]:
    """Choose examples for validation, whole groups at a time, until they are a fraction of all.

    Parameters
    ----------
    groups : the group of each example; examples of a group are on one side
    fraction : in [0, 1); 0 holds out none, and otherwise at least one group is on each side
    seed : determines the choice

    Raises
    ------
    ValueError : there is one group only, and a fraction
    """
    names = list(dict.fromkeys(groups))
    chosen: set[object] = set()
    if fraction and len(names) < 2:
        raise ValueError(
            "validation needs at least 2 different examples, or val_fraction 0; those of one prompt"
            " or group are on one side"
        )
    order, _ = shuffled([seed, 1 << 32], len(names))
    sizes: dict[object, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    wanted, size = fraction * len(groups), 0
    for place in order[: len(names) - 1]:
        if size >= wanted:
            break
        chosen.add(names[place])
        size += sizes[names[place]]
    return [group in chosen for group in groups]
