"""Baselines that a language model must beat: xz and a bigram model, on the same held-out text.

A language model is a compressor: coding a text with its probabilities takes loss / ln(2) bits per
token. So all three are compared in bits per byte of the text. Independent of GPT-2.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "bigram_nats", "xz_bits_per_byte"]

TokenArray = NDArray[np.uint16]
BLOCK = 1 << 20  # tokens that are counted at a time
_STRENGTHS = np.array([2, 5, 10, 20, 50, 100, 200])  # of the prior: k in `bigram_nats`


def xz_bits_per_byte(history: Iterable[bytes], text: Iterable[bytes]) -> float:
    """Return the bits per byte that `xz -9` adds for `text` when it has already packed `history`.

    Both are pieces of text, and are iterated several times. xz's window of 64 MiB must hold both,
    or the comparison is unfair to xz.
    """
    packed = _packed(chain(history, text)) - _packed(history)
    return packed * 8 / sum(map(len, text))


def _packed(pieces: Iterable[bytes]) -> int:
    compressor = lzma.LZMACompressor(preset=9)
    return sum(len(compressor.compress(piece)) for piece in pieces) + len(compressor.flush())


def bigram_nats(history: TokenArray, tokens: TokenArray, vocab_size: int) -> float:
    """Return the loss over `tokens[1:]`, summed, in nats, of a bigram model counted on `history`.

    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k) with p(b) = (count(b) + 1) / (N + V): the
    more often a was seen, the more the pair counts and the less the token alone (Dirichlet
    smoothing, MacKay and Peto 1995). k is the best of several values on `tokens` themselves, which
    favours the bigram.
    """
    V = vocab_size
    pairs, counts = _count_pairs(history, V)
    starts = np.bincount(pairs // V, counts, V)
    each = np.bincount(pairs % V, counts, V)
    each[history[0]] += 1
    unigram = (each + 1) / (len(history) + V)
    nats = np.zeros(len(_STRENGTHS))
    for wanted in _pairs(tokens, V):
        found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        seen = np.where(pairs[found] == wanted, counts[found], 0)
        total, prior = starts[wanted // V], unigram[wanted % V]
        nats -= [np.log((seen + k * prior) / (total + k)).sum() for k in _STRENGTHS]
    return float(nats.min())


def _pairs(tokens: TokenArray, vocab_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield each token and its next as one number, a block at a time."""
    for start in range(0, len(tokens) - 1, BLOCK):
        part = tokens[start : start + BLOCK + 1].astype(np.int64)
        yield part[:-1] * vocab_size + part[1:]


def _count_pairs(
    tokens: TokenArray, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs that occur, sorted, and the count of each."""
    pairs = counts = np.empty(0, np.int64)
    for block in _pairs(tokens, vocab_size):
        fresh, more = np.unique(block, return_counts=True)
        both, place = np.unique(np.concatenate([pairs, fresh]), return_inverse=True)
        total = np.zeros(len(both), np.int64)
        total[place[: len(pairs)]] = counts
        total[place[len(pairs) :]] += more
        pairs, counts = both, total
    return pairs, counts
