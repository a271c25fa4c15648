"""Inputs: what users hand a model, checked: token ids, targets, labels, weights of rows.

C trusts ids and shapes, so all of them pass here first. Knows nothing about what a model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.checks import counted
from gpt2c.kernels.memory import Array
from gpt2c.model.block import IntArray
from gpt2c.model.config import ModelConfig

__all__ = [
    "Tokens",
    "check_batch",
    "check_ids",
    "check_labels",
    "check_like",
    "check_prompts",
    "check_targets",
    "check_tokens",
]


class Tokens(NamedTuple):
    """A batch of token ids.

    Attributes
    ----------
    ids : (B, T), or (1, N) of sequences of different lengths that follow each other
    offsets : (B + 1,) where each of those starts, and N; None for (B, T)
    """

    ids: IntArray
    offsets: IntArray | None = None

    def __str__(self) -> str:
        """Write the shape for a person, "(2, 3)" or "sequences of 2, 3 tokens"."""
        if self.offsets is None:
            return str(self.ids.shape)
        return f"sequences of {', '.join(map(str, np.diff(self.offsets)))} tokens"

    @property
    def last(self) -> NDArray[np.intp]:
        """The row of each sequence's last token, (B,)."""
        B, T = self.ids.shape
        ends = np.arange(1, B + 1) * T if self.offsets is None else self.offsets[1:]
        return ends.astype(np.intp) - 1

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of a number for each token: (B, T), or (T,) of each sequence."""
        if self.offsets is None:
            return [self.ids.shape]
        return [(n,) for n in np.diff(self.offsets).tolist()]


def check_ids(ids: ArrayLike, name: str, low: int, high: int, what: str = "token id") -> IntArray:
    """Return a C-contiguous int32 copy of `ids`; refuse all but whole numbers in [low, high)."""
    try:
        array = np.asarray(ids)
    except ValueError as error:  # nested lists of different lengths
        raise ValueError(
            f"{name} must be an array of whole numbers in rows of one length"
        ) from error
    if array.size and array.dtype.kind not in "iu":  # an empty list is float64
        is_number = array.dtype.kind in "fcb"  # the dtype of other kinds explains nothing
        came = f"dtype {array.dtype}" if is_number else f"{ids!r:.50}"
        raise ValueError(f"{name} must be whole numbers, got {came}")
    copy = np.empty(array.shape, np.int32)  # before reading: too large an array fails early
    if array.size and not (low <= array.min() and array.max() < high):
        wrong = array[(array < low) | (array >= high)].flat[0]
        raise ValueError(f"{name}: {what} {wrong} is not in [{low}, {high})")
    copy[...] = array  # backward reads the ids after the caller may have changed them
    return copy


def check_tokens(config: ModelConfig, idx: ArrayLike) -> IntArray:
    """Return token ids (B, T).

    Raises
    ------
    ValueError : another shape, not whole numbers, an id out of range, rows beyond n_positions
    """
    ids = check_ids(idx, "idx", 0, config.vocab_size)
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(
            f"idx must be (B, T) token ids with B, T >= 1, got shape {ids.shape}{_one_row(ids)}"
        )
    if ids.shape[1] > config.n_positions:
        raise ValueError(
            f"idx has rows of {ids.shape[1]:,} tokens; this model's context is"
            f" {config.n_positions:,} ({config.context_name}): give shorter rows"
        )
    return ids


def check_batch(
    config: ModelConfig,
    rows: ArrayLike | Sequence[Sequence[int]],
    name: str = "idx",
    low: int = 0,
) -> Tokens:
    """Return token ids in [low, V), rows of one length or of several.

    Raises
    ------
    ValueError : see `check_tokens`
    """
    if not _is_ragged(rows):
        if name == "idx":
            return Tokens(check_tokens(config, rows))
        return Tokens(check_ids(rows, name, low, config.vocab_size))
    parts = [check_ids(row, name, low, config.vocab_size) for row in rows]
    for part in parts:
        if part.ndim != 1 or not 1 <= len(part) <= config.n_positions:
            raise ValueError(
                f"{name}: each sequence must have from 1 to {config.n_positions} tokens"
                f" ({config.context_name}), got shape {part.shape}"
            )
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return Tokens(np.concatenate(parts)[None], offsets)


def check_targets(
    config: ModelConfig, targets: ArrayLike | Sequence[Sequence[int]], tokens: Tokens
) -> IntArray:
    """Return targets (N,), one for each token; -1 is ignored.

    Raises
    ------
    ValueError : another shape than that of the tokens, not whole numbers, an id out of range
    """
    wanted = check_batch(config, targets, "targets", -1)
    if str(wanted) != str(tokens):
        raise ValueError(f"targets must have the shape of idx, {tokens}, got {wanted}")
    return wanted.ids.reshape(-1)


def check_labels(K: int, labels: ArrayLike, tokens: Tokens) -> IntArray:
    """Return targets (N,): the label (B,) of a sequence, of K, at its last token; others -1.

    Raises
    ------
    ValueError : another shape, not whole numbers, a label out of range, or one label alone
    """
    if K == 1:
        raise ValueError(
            "the cross-entropy of one score is always 0 (num_labels=1): compute a loss of"
            " scores(idx), and call backward(d_scores=...)"
        )
    given = check_ids(labels, "targets", -(2**31), 2**31, "label")
    rows = tokens.last
    if given.shape != rows.shape:  # before their range: targets of tokens are no labels at all
        raise ValueError(
            f"targets must be ({len(rows)},), a label for each sequence, got {given.shape}"
        )
    targets = np.full(tokens.ids.size, -1, np.int32)
    targets[rows] = check_ids(given, "targets", -1, K, "label")
    return targets


def check_prompts(config: ModelConfig, idx: ArrayLike | Sequence[Sequence[int]]) -> list[list[int]]:
    """Return prompts as lists of token ids; an empty prompt becomes [start_token_id].

    Raises
    ------
    ValueError : no prompts, not whole numbers, an id out of range, longer than n_positions, or an
        empty prompt without eos_token_id
    """
    if isinstance(idx, list | tuple) and all(_is_row(row) for row in idx):
        given = [row if len(row) else np.empty(0, int) for row in idx]
        rows = [check_ids(row, "idx", 0, config.vocab_size) for row in given]
    else:
        array = check_ids(idx, "idx", 0, config.vocab_size)
        if array.ndim != 2:
            raise ValueError(
                f"idx must be (B, T) token ids, got shape {array.shape}{_one_row(array)}"
            )
        rows = list(array)
    if not rows:
        raise ValueError("idx must hold at least one prompt, got none")
    for row in rows:
        if row.ndim != 1:
            raise ValueError(f"idx must be (B, T) token ids, got a row of shape {row.shape}")
        if len(row) > config.n_positions:
            raise ValueError(
                f"the prompt is {len(row):,} tokens; this model's context is"
                f" {config.n_positions:,} ({config.context_name}): give a shorter prompt, or at"
                f" most its last {counted(config.n_positions, 'token')}"
            )
    start = config.start_token_id
    if start is None and any(len(row) == 0 for row in rows):
        raise ValueError(
            "idx has an empty prompt, and the config has no eos_token_id to start it: give at"
            " least one token"
        )
    return [row.tolist() or [start] for row in rows]


def check_like(name: str, given: Any, shapes: Sequence[tuple[int, ...]], what: str) -> Array:
    """Return numbers as flat float32: an array of the one shape, or a list of arrays of several.

    Raises
    ------
    ValueError : no numbers, or of other shapes, or not finite as float32
    """
    try:
        arrays = [np.asarray(part) for part in ([given] if len(shapes) == 1 else list(given))]
        with np.errstate(over="ignore"):
            arrays = [part.astype(np.float32) for part in arrays if part.dtype.kind in "fiu"]
    except (TypeError, ValueError):
        arrays = []
    if [array.shape for array in arrays] != list(shapes):
        raise ValueError(f"{name} must be numbers of the shape of {what}, {list(shapes)!r:.70}")
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    if not np.isfinite(flat).all():
        raise ValueError(f"{name} must be finite")
    return flat


def _one_row(ids: NDArray[Any]) -> str:
    """Return a hint if one text was passed where several are wanted, else ""."""
    return ": for one text pass ids[None], or [ids]" if ids.ndim == 1 and ids.size else ""


def _is_ragged(rows: Any) -> TypeGuard[Sequence[Sequence[int]]]:
    """Return whether these are sequences of different lengths."""
    if not (isinstance(rows, list | tuple) and all(map(_is_row, rows))):
        return False
    return len({len(row) for row in rows}) > 1


def _is_row(row: Any) -> bool:
    return isinstance(row, list | tuple) or (isinstance(row, np.ndarray) and row.ndim > 0)
