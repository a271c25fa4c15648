"""Batches: token files -> (x, y) arrays of token ids, in an order that depends on the seed alone.

Seed and step determine a batch, so a resumed run needs no saved position. Knows nothing about
models or the format of token files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.checks import counted
from gpt2c.text.prepare import shuffled
from gpt2c.text.shards import StoredTokens, TokenArray

__all__ = ["Batches", "windows"]

# From this number of windows on, an epoch may have one window more of a shard than its tokens need,
# so that epochs cut the text at more places.
_MANY = 16
# Bytes that a window takes: in the epoch before, and in an epoch that is being made.
_PLACE, _MAKING = 16, 40


class Batches:
    """Training batches: in every epoch each token of a shard except its first is a target.

    An epoch is a permutation of windows of T tokens. Each window lies within one shard, and the
    windows of a shard cover it. Seed and epoch determine the permutation and the places where the
    windows cut a shard. If a shard's tokens do not fill its windows, the first or the last windows
    overlap, so that a few tokens come twice in an epoch. A batch may span two epochs.

    Parameters
    ----------
    shards : (N,) token ids each; one of fewer than T + 1 tokens is left out
    batch_size : B, windows in a batch
    block_size : T, tokens in a window
    seed : determines permutations and places, not negative
    order : 2; or 1, the order of older runs: windows side by side, which miss up to T tokens at the
        end of a shard, and whole shards of fewer than 2 T tokens

    Attributes
    ----------
    windows_per_epoch : the number of windows of all shards
    targets_per_epoch : the number of tokens that are a target in an epoch, each counted once
    left_out : the number of shards that are left out
    order_bytes : the most memory that the order of windows takes, when an epoch follows another

    Raises
    ------
    ValueError : too few tokens for B windows; one shard needs B*T + 1
    """

    def __init__(
        self,
        shards: Sequence[TokenArray | StoredTokens],
        batch_size: int,
        block_size: int,
        seed: int,
        order: int = 2,
    ) -> None:
        self.shards = list(shards)
        lengths = np.array([len(shard) for shard in shards], np.int64)
        full = np.maximum((lengths - 1) // block_size, 0)
        if full.sum() < batch_size:
            several = f" in {len(shards)} shards" if len(shards) > 1 else ""
            total = int(lengths.sum())
            raise ValueError(
                f"{counted(total, 'token')}{several} {'is' if total == 1 else 'are'} too few for"
                f" one batch of {batch_size} x {block_size}, which needs"
                f" {batch_size * block_size + 1} in one shard; add text, or lower batch_size or"
                " block_size"
            )
        if order == 1:
            # As many windows as fit after any offset; if they are too few for a batch, more windows
            # with fewer offsets.
            counts = np.maximum(lengths // block_size - 1, 0)
            if counts.sum() < batch_size:
                counts = full
            shifts = np.clip(lengths - counts * block_size, 1, block_size)
            least_shifts = np.zeros_like(lengths)
            self.targets_per_epoch = int(counts.sum()) * block_size
        else:
            counts = np.where(full > 0, -(-(lengths - 1) // block_size), 0)
            # Windows side by side begin up to `spare` tokens before the shard; windows that cross
            # an end of the shard are moved into it. One window more allows other shifts, in which
            # neither the first two windows nor the last two have the same place.
            spare = np.maximum(counts * block_size - (lengths - 1), 0)
            more = (counts >= _MANY) & (block_size - spare - 1 > spare + 1)
            counts += more
            shifts = np.where(more, block_size - spare - 1, spare + 1)
            least_shifts = np.where(more, spare + 1, 0)
            self.targets_per_epoch = int((lengths - 1)[full > 0].sum())
        self._shifts = [*zip(least_shifts.tolist(), shifts.tolist(), strict=True)]
        self._direction = 1 if order == 1 else -1
        self.left_out = int((counts == 0).sum())
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.windows_per_epoch = int(counts.sum())
        self.order_bytes = (_PLACE + _MAKING) * self.windows_per_epoch
        self._last_starts = np.maximum(lengths - 1 - block_size, 0)
        self._ends = np.cumsum(counts)  # windows up to the end of each shard
        self._firsts = self._ends - counts
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __repr__(self) -> str:
        of = f"batch_size={self.batch_size}, block_size={self.block_size}, seed={self.seed}"
        return f"Batches({counted(len(self.shards), 'shard')}, {of})"

    def batch(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the batch of a step, from 0: x and y, both (B,T) int32, y one token ahead of x."""
        return self.windows(step * self.batch_size, self.batch_size)

    def windows(self, first: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return windows `first` to `first + count` of all epochs; see `batch`."""
        rows = np.empty((count, self.block_size + 1), np.int32)
        for row, n in enumerate(range(first, first + count)):
            shard, starts = self._epoch(n // self.windows_per_epoch)
            window = n % self.windows_per_epoch
            start = starts[window]
            rows[row] = self.shards[shard[window]][start : start + self.block_size + 1]
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shard of each window of an epoch, in its order, and the start in that shard.

        Results are kept for the two epochs that a batch may span.
        """
        if epoch not in self._epochs:
            self._epochs = {key: kept for key, kept in self._epochs.items() if key == epoch - 1}
            order, number = shuffled([self.seed, epoch], self.windows_per_epoch)
            shard = np.searchsorted(self._ends, order, side="right")
            shifts = np.array([least + number % count for least, count in self._shifts], np.int64)
            starts = (order - self._firsts[shard]) * self.block_size
            starts += self._direction * shifts[shard]
            starts = np.clip(starts, 0, self._last_starts[shard])
            self._epochs[epoch] = shard, starts
        return self._epochs[epoch]


def windows(
    shards: Sequence[TokenArray | StoredTokens], batch_size: int, block_size: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Cut shards into batches for evaluation: all tokens but a shard's first are targets, in order.

    Parameters
    ----------
    shards : (N,) token ids each; a window lies within one
    batch_size : B, windows in a batch
    block_size : T, tokens in a window

    Returns
    -------
    iterator of (x, y), both (B,T) int32; y is -1 (ignored) where there is no target

    Raises
    ------
    ValueError : no shard has two tokens
    """
    if not any(len(tokens) > 1 for tokens in shards):
        total = sum(map(len, shards))
        raise ValueError(
            f"{counted(total, 'token')} {'is' if total == 1 else 'are'} too few to evaluate on; at"
            " least 2 are needed"
        )
    places = (
        (tokens, start) for tokens in shards for start in range(0, len(tokens) - 1, block_size)
    )

    def batch(
        rows: list[tuple[TokenArray | StoredTokens, int]],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        x = np.zeros((batch_size, block_size), np.int32)
        y = np.full((batch_size, block_size), -1, np.int32)
        for row, (tokens, start) in enumerate(rows):
            end = min(start + block_size, len(tokens) - 1)
            x[row, : end - start] = tokens[start:end]
            y[row, : end - start] = tokens[start + 1 : end + 1]
        return x, y

    return map(batch, iter(lambda: list(islice(places, batch_size)), []))
