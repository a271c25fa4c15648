"""What a language model must beat: xz and a bigram model, on the same held-out text.

A language model is a compressor: coding a text with its probabilities takes loss / ln(2) bits a
token. So all three are compared in bits per byte of the text. Independent of GPT-2. Used by demo.
"""

from __future__ import annotations

import lzma

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]


def xz_bits_per_byte(history: bytes, text: bytes) -> float:
    """Bits per byte that `xz -9` adds for `text` when it has already packed `history`.

    Its window, 64 MiB, must hold both, or the comparison is not fair to it.
    """
    packed = len(lzma.compress(history + text, preset=9)) - len(lzma.compress(history, preset=9))
    return packed * 8 / len(text)


def bigram_nats(history: Tokens, tokens: Tokens, vocab_size: int) -> float:
    """Sum the loss, in nats, of a bigram model counted on `history` over `tokens[1:]`.

    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k) with p(b) = (count(b) + 1) / (N + V): the
    pair as far as it was seen, else the token (Dirichlet smoothing, MacKay and Peto 1995). k is the
    best of a few on `tokens` themselves, which favours the bigram.
    """
    V = vocab_size
    unigram = (np.bincount(history, minlength=V) + 1.0) / (len(history) + V)
    starts = np.bincount(history[:-1], minlength=V)
    pairs, counts = np.unique(history[:-1].astype(np.int64) * V + history[1:], return_counts=True)
    wanted = tokens[:-1].astype(np.int64) * V + tokens[1:]
    found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[found] == wanted, counts[found], 0)
    total, prior = starts[tokens[:-1]], unigram[tokens[1:]]
    return min(
        float(-np.log((seen + k * prior) / (total + k)).sum()) for k in (2, 5, 10, 20, 50, 100, 200)
    )
