"""Documents and batches: documents -> token files -> (x, y) arrays of token ids.

Which tokens a step sees depends on nothing but the seed and the step, so a resumed run needs no
saved position.

Knows nothing about models, nor about how text becomes tokens (that is the tokenizer's) or how
tokens lie in a file (tokenfile's).
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2c import files
from gpt2c.tokenfile import (
    MAX_VOCABULARY,
    StoredTokens,
    Tokens,
    alone,
    remove_shards,
    write_shards,
    write_tokens,
)
from gpt2c.tokenizer import END_OF_TEXT, Tokenizer


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file as it is, line endings included; it may be a pipe.

    Raises
    ------
    OSError : the file is missing, cannot be read, or is a device
    ValueError : the file is empty or not UTF-8
    """
    try:
        if stat.S_ISCHR(os.stat(path).st_mode):  # /dev/zero has no end
            raise OSError(f"text file {path} is a device; a file or a pipe is wanted")
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"text file {path} does not exist") from None
    if not content:
        raise ValueError(f"text file {path} is empty")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {path} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}; "
            "convert it to UTF-8"
        ) from None


def split_documents(text: str) -> list[str]:
    """Split a text at each "<|endoftext|>"; drop blank parts, keep the others as they are."""
    return [document for document in text.split(END_OF_TEXT) if document.strip()]


def _shuffled(seed: list[int], count: int) -> tuple[NDArray[np.int64], int]:
    """Return a permutation of range(count) and one more random number, both given by `seed` alone.

    From raw bits: NumPy promises those never to change, unlike what Generator's methods make of
    them (NEP 19).
    """
    bits = np.random.PCG64(seed).random_raw(count + 1)
    return np.argsort(bits[:-1], kind="stable"), int(bits[-1])


def split_validation(
    documents: list[str], fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Hold out about `fraction` of the characters for validation: (training, validation) documents.

    Whole documents, chosen by `seed`, as many as fit, none of them more than a quarter of what is
    held out as long as there are enough of those; copies of a document stay together, so that no
    held-out text is trained on. Where whole documents give less than half of what was asked (one
    document, or few large ones), the tail of the longest document is held out instead, cut at a
    line break if there is one: then there are more documents after than before.

    Raises
    ------
    ValueError : no documents, `fraction` not between 0 and 1, or a text too short to be cut
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the share of validation text must lie between 0 and 1, not {fraction}")
    if not any(document.strip() for document in documents):
        raise ValueError("there is no text: every document is blank")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    budget = fraction * sum(map(len, documents))
    copies = Counter(documents)
    distinct = list(copies)
    order = _shuffled([seed], len(distinct))[0]
    # First without the largest: one document that fills the share would speak for all the others.
    for largest in (budget / 4, budget):
        held_out: set[str] = set()
        size = 0
        for index in order:
            document = distinct[index]
            length = len(document) * copies[document]
            if length <= largest and size + length <= budget:
                held_out.add(document)
                size += length
        if size >= budget / 2:
            return (
                [document for document in documents if document not in held_out],
                [document for document in documents if document in held_out],
            )
    longest = max(distinct, key=len)
    size = max(1, round(min(budget, max(fraction, 0.5) * len(longest))))
    cut = len(longest) - size
    line_break = longest.rfind("\n", max(1, cut - size), cut)  # at most `size` away
    cut = line_break + 1 or cut
    head, tail = longest[:cut], longest[cut:]
    if not head.strip() or not tail.strip():
        raise ValueError(
            f"a text of {len(longest)} characters is too short to hold out {fraction:g} "
            "of it; add text"
        )
    return [head if document == longest else document for document in documents], [tail]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote. Bytes are of UTF-8; tokens count one `<|endoftext|>` a document."""

    documents: int
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    vocab_size: int
    tail_held_out: bool  # the validation text is not whole documents but the tail of one


def prepare(
    documents: list[str],
    out: Path,
    tokenizer: Tokenizer | str,
    val_fraction: float = 0.1,
    seed: int = 1337,
    overwrite: bool = False,
    shard_tokens: int = 0,
) -> Prepared:
    """Write documents as token files: `out`/train.bin, `out`/val.bin and the tokenizer's files.

    Parameters
    ----------
    documents : texts, each preceded by `<|endoftext|>` in the files, as in llm.c
    out : directory to make
    tokenizer : a tokenizer or its spec: "gpt2", "bytes", a directory, or "bpe:N" to train one of N
        tokens on the training documents only
    val_fraction : share of the characters held out, see `split_validation`
    seed : chooses the documents held out
    overwrite : whether `out` may hold something already; its token files are replaced
    shard_tokens : the most tokens in a file of training tokens, which are then several,
        train_000001.bin and so on; 0 puts all into one

    Raises
    ------
    ValueError : nothing to hold out, a bad spec, a vocabulary of more than 65536 tokens, or a
        negative `shard_tokens`
    OSError : `out` is not empty, or cannot be written; another process trains on what it holds
    """
    if shard_tokens < 0:
        raise ValueError(f"shard_tokens must be at least 1, or 0 for one file, got {shard_tokens}")
    files.check_directory(out, overwrite)
    with alone(out):
        return _prepare(*(documents, out, tokenizer, val_fraction, seed, overwrite, shard_tokens))


def _prepare(
    documents: list[str],
    out: Path,
    tokenizer: Tokenizer | str,
    val_fraction: float,
    seed: int,
    overwrite: bool,
    shard_tokens: int,
) -> Prepared:
    train, val = split_validation(documents, val_fraction, seed)
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer_from_spec(tokenizer, train)
    if tokenizer.vocab_size > MAX_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size} tokens; "
            f"token files hold at most {MAX_VOCABULARY}"
        )
    train_tokens, val_tokens = _encode(train, tokenizer), _encode(val, tokenizer)
    files.claim_directory(out, overwrite)
    # val.bin goes first and comes last: a directory that has it never mixes two preparations, nor
    # lacks some of its shards.
    remove_shards(out)
    tokenizer.save_pretrained(out)
    write_shards(out, "train", train_tokens, shard_tokens)
    write_tokens(out / "val.bin", val_tokens)
    return Prepared(
        documents=len(documents),
        train_tokens=len(train_tokens),
        val_tokens=len(val_tokens),
        train_bytes=sum(len(document.encode()) for document in train),
        val_bytes=sum(len(document.encode()) for document in val),
        vocab_size=tokenizer.vocab_size,
        tail_held_out=len(train) + len(val) > len(documents),
    )


def _tokenizer_from_spec(spec: str, train: list[str]) -> Tokenizer:
    if not spec.startswith("bpe:"):
        return Tokenizer.from_spec(spec)
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdecimal()):
        raise ValueError(f"tokenizer {spec!r} must name a vocabulary size, such as bpe:4096")
    if int(size) > MAX_VOCABULARY:
        raise ValueError(
            f"tokenizer {spec!r} asks for too many tokens; "
            f"token files hold at most {MAX_VOCABULARY}"
        )
    return Tokenizer.train(train, int(size))


def _encode(documents: list[str], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    pieces: list[NDArray[np.uint16]] = []
    for ids in tokenizer.encode_batch(documents):
        pieces += [np.array([tokenizer.eot], dtype=np.uint16), ids.astype(np.uint16)]
    return np.concatenate(pieces)


class Batches:
    """Training batches: every epoch visits all windows of T tokens once, in an order of its own.

    An epoch is a permutation of the back-to-back windows of all shards. In each shard they start at
    an offset below T, so that epochs cut the text differently. Both are given by the seed and the
    epoch. Batches run on across the border of two epochs; a window lies within one shard.

    Parameters
    ----------
    shards : (N,) token ids each
    batch_size : B, windows in a batch
    block_size : T, tokens in a window
    seed : of permutations and offsets, not negative

    Raises
    ------
    ValueError : too few tokens for B windows; one shard needs B*T + 1
    """

    def __init__(
        self, shards: Sequence[Tokens | StoredTokens], batch_size: int, block_size: int, seed: int
    ) -> None:
        self.shards = list(shards)
        lengths = np.array([len(shard) for shard in shards], np.int64)
        # As many windows as fit after any offset; tokens for hardly one batch have fewer offsets.
        counts = np.maximum(lengths // block_size - 1, 0)
        if counts.sum() < batch_size:
            counts = np.maximum((lengths - 1) // block_size, 0)
        if counts.sum() < batch_size:
            several = f" in {len(shards)} shards" if len(shards) > 1 else ""
            raise ValueError(
                f"{lengths.sum()} tokens{several} are too few for one batch of {batch_size} x "
                f"{block_size}, which needs {batch_size * block_size + 1} in one shard; add text, "
                "or lower batch_size or block_size"
            )
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.windows_per_epoch = int(counts.sum())
        self._ends = np.cumsum(counts)  # of the shards, in windows
        self._firsts = self._ends - counts
        self._offsets = np.clip(lengths - counts * block_size, 1, block_size).tolist()
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def batch(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the batch of a step, from 0: x and y, both (B,T) int32, y one token ahead of x."""
        rows = np.empty((self.batch_size, self.block_size + 1), np.int32)
        for row, n in enumerate(range(step * self.batch_size, (step + 1) * self.batch_size)):
            shard, starts = self._epoch(n // self.windows_per_epoch)
            window = n % self.windows_per_epoch
            start = starts[window]
            rows[row] = self.shards[shard[window]][start : start + self.block_size + 1]
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Say where the windows of an epoch are, in its order: shards, and starts in them.

        Kept for the two epochs that a batch may touch.
        """
        if epoch not in self._epochs:
            order, number = _shuffled([self.seed, epoch], self.windows_per_epoch)
            shard = np.searchsorted(self._ends, order, side="right")
            offsets = np.array([number % offset for offset in self._offsets], np.int64)
            starts = (order - self._firsts[shard]) * self.block_size + offsets[shard]
            self._epochs = {key: kept for key, kept in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = shard, starts
        return self._epochs[epoch]


def windows(
    shards: Sequence[Tokens | StoredTokens], batch_size: int, block_size: int, overlap: int = 0
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Cut shards into batches for evaluation: all but a shard's first token are targets, in order.

    Parameters
    ----------
    shards : (N,) token ids each; a window lies within one
    batch_size : B, windows in a batch
    block_size : T, tokens in a window
    overlap : so many tokens of each window stood in the one before; they are context, not targets
        again, so that every target has at least `overlap` tokens of its shard before it

    Returns
    -------
    iterator of (x, y), both (B,T) int32; where there is no target, y = -1 (ignored)

    Raises
    ------
    ValueError : no shard has two tokens, or overlap is not in [0, block_size)
    """
    if not any(len(tokens) > 1 for tokens in shards):
        total = sum(map(len, shards))
        raise ValueError(f"{total} tokens are too few to evaluate on; at least 2 are needed")
    if not 0 <= overlap < block_size:
        raise ValueError(f"overlap must be in [0, block_size = {block_size}), got {overlap}")
    places = (
        (tokens, start)
        for tokens in shards
        if len(tokens) > 1
        for start in range(0, max(1, len(tokens) - 1 - overlap), block_size - overlap)
    )

    def batch(
        rows: list[tuple[Tokens | StoredTokens, int]],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        x = np.zeros((batch_size, block_size), np.int32)
        y = np.full((batch_size, block_size), -1, np.int32)
        for row, (tokens, start) in enumerate(rows):
            end = min(start + block_size, len(tokens) - 1)
            x[row, : end - start] = tokens[start:end]
            y[row, : end - start] = tokens[start + 1 : end + 1]
            y[row, : overlap if start else 0] = -1
        return x, y

    return map(batch, iter(lambda: list(islice(places, batch_size)), []))
