"""Token files and batches: documents -> `train.bin`, `val.bin` -> (x, y) arrays of token ids.

A token file is an llm.c shard. Which tokens a step sees depends on nothing but the seed and the
step, so a resumed run needs no saved position.

Knows nothing about models, nor about how text becomes tokens: that is the tokenizer's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c import files
from gpt2c.tokenizer import END_OF_TEXT, Tokenizer

# The header of karpathy/llm.c:dev/data/data_common.py: 256 int32, of which three are used.
_MAGIC, _VERSION, _HEADER_BYTES = 20240520, 1, 256 * 4
_MAX_TOKENS = 2**31 - 1  # the count is an int32
_MAX_VOCABULARY = 2**16  # a token is a uint16


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file as it is, line endings included.

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : the file is empty or not UTF-8
    """
    try:
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
    overwrite : whether `out` may hold something already

    Raises
    ------
    ValueError : nothing to hold out, a bad spec, or a vocabulary of more than 65536 tokens
    OSError : `out` is not empty, or cannot be written
    """
    train, val = split_validation(documents, val_fraction, seed)
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer_from_spec(tokenizer, train)
    if tokenizer.vocab_size > _MAX_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size} tokens; "
            f"token files hold at most {_MAX_VOCABULARY}"
        )
    train_tokens, val_tokens = _encode(train, tokenizer), _encode(val, tokenizer)
    files.claim_directory(out, overwrite)
    # train.bin goes first and comes last: a directory that has it never mixes two preparations.
    (out / "train.bin").unlink(missing_ok=True)
    tokenizer.save_pretrained(out)
    write_tokens(out / "val.bin", val_tokens)
    write_tokens(out / "train.bin", train_tokens)
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
    if int(size) > _MAX_VOCABULARY:
        raise ValueError(
            f"tokenizer {spec!r} asks for too many tokens; "
            f"token files hold at most {_MAX_VOCABULARY}"
        )
    return Tokenizer.train(train, int(size))


def _encode(documents: list[str], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    pieces: list[NDArray[np.uint16]] = []
    for ids in tokenizer.encode_batch(documents):
        pieces += [np.array([tokenizer.eot], dtype=np.uint16), ids.astype(np.uint16)]
    return np.concatenate(pieces)


def write_tokens(path: str | os.PathLike[str], tokens: ArrayLike) -> None:
    """Write token ids (N,) as an llm.c shard: 256 little-endian int32 of header, then N uint16.

    Raises
    ------
    ValueError : no tokens, too many, or an id outside 0 to 65535
    OSError : the file cannot be written; what was there before is unchanged
    """
    path, array = Path(path), np.asarray(tokens)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"tokens for {path} must be a (N,) array of integers, not {array.dtype} {array.shape}"
        )
    if not 0 < len(array) <= _MAX_TOKENS:
        raise ValueError(
            f"{path} would hold {len(array)} tokens; a token file holds 1 to {_MAX_TOKENS}"
        )
    if array.min() < 0 or array.max() >= _MAX_VOCABULARY:
        raise ValueError(
            f"tokens for {path} must lie between 0 and 65535, not {array.min()} and {array.max()}"
        )
    header = np.zeros(256, dtype="<i4")
    header[:3] = _MAGIC, _VERSION, len(array)
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        array.astype("<u2").tofile(file)


def read_tokens(path: str | os.PathLike[str], vocab_size: int | None = None) -> NDArray[np.uint16]:
    """Open an llm.c shard: a read-only (N,) uint16 array mapped from the file.

    Parameters
    ----------
    path : the file
    vocab_size : when given, every token is checked to lie below it

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : not an llm.c shard, truncated, or a token outside the vocabulary
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f"token file {path} does not exist; make it with `gpt2c prepare`"
        ) from None
    if (magic := int.from_bytes(header[:4], "little")) != _MAGIC:
        raise ValueError(
            f"{path} is not an llm.c token file: it starts with {magic}, not {_MAGIC} "
            "(nanoGPT's .bin without a header is not accepted; "
            "make token files with `gpt2c prepare`)"
        )
    if len(header) < _HEADER_BYTES:
        raise ValueError(
            f"{path} is truncated: {size} bytes, fewer than the {_HEADER_BYTES} of its header"
        )
    version, count = (int(number) for number in np.frombuffer(header, dtype="<i4")[1:3])
    if version != _VERSION:
        raise ValueError(
            f"{path} is a token file of version {version}; version {_VERSION} is wanted"
        )
    if count < 1:
        raise ValueError(f"{path} says that it holds {count} tokens; at least one is wanted")
    if size != _HEADER_BYTES + 2 * count:
        raise ValueError(
            f"{path} has {size} bytes; its {count} tokens need {_HEADER_BYTES + 2 * count}"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=_HEADER_BYTES, shape=(count,))
    if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"{path} holds token {largest}, outside a vocabulary of {vocab_size}; "
            "is it another tokenizer's?"
        )
    return tokens


class Batches:
    """Training batches: every epoch visits all windows of T tokens once, in an order of its own.

    An epoch is a permutation of back-to-back windows, which start at an offset below T, so that
    epochs cut the text differently. Both are given by the seed and the epoch. Batches run on across
    the border of two epochs.

    Parameters
    ----------
    tokens : (N,) token ids
    batch_size : B, windows in a batch
    block_size : T, tokens in a window
    seed : of permutations and offsets, not negative

    Raises
    ------
    ValueError : fewer than B*T + 1 tokens
    """

    def __init__(
        self, tokens: NDArray[np.uint16], batch_size: int, block_size: int, seed: int
    ) -> None:
        needed = batch_size * block_size + 1
        if len(tokens) < needed:
            raise ValueError(
                f"{len(tokens)} tokens are too few for one batch of {batch_size} x {block_size}, "
                f"which needs {needed}; add text, or lower batch_size or block_size"
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        # As many windows as fit after any offset; tokens for hardly one batch have fewer offsets.
        self.windows_per_epoch = max(batch_size, len(tokens) // block_size - 1)
        self._offsets = min(block_size, len(tokens) - self.windows_per_epoch * block_size)
        self._starts: dict[int, NDArray[np.int64]] = {}

    def batch(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the batch of a step, from 0: x and y, both (B,T) int32, y one token ahead of x."""
        windows = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = [
            self._epoch(n // self.windows_per_epoch)[n % self.windows_per_epoch] for n in windows
        ]
        index = np.array(starts)[:, None] + np.arange(self.block_size + 1)
        rows = self.tokens[index].astype(np.int32)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """Where the windows of an epoch start, in its order; kept for the two a batch may touch."""
        if epoch not in self._starts:
            order, number = _shuffled([self.seed, epoch], self.windows_per_epoch)
            self._starts = {key: starts for key, starts in self._starts.items() if key == epoch - 1}
            self._starts[epoch] = order * self.block_size + number % self._offsets
        return self._starts[epoch]


def windows(
    tokens: NDArray[np.uint16], batch_size: int, block_size: int, overlap: int = 0
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Cut tokens into batches for evaluation: all but the first are targets, once, in order.

    Parameters
    ----------
    tokens : (N,) token ids
    batch_size : B, windows in a batch
    block_size : T, tokens in a window
    overlap : so many tokens of each window stood in the one before; they are context, not targets
        again, so that every target has at least `overlap` tokens before it

    Returns
    -------
    iterator of (x, y), both (B,T) int32; where there is no target, y = -1 (ignored)

    Raises
    ------
    ValueError : fewer than two tokens, or overlap is not in [0, block_size)
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens are too few to evaluate on; at least 2 are needed")
    if not 0 <= overlap < block_size:
        raise ValueError(f"overlap must be in [0, block_size = {block_size}), got {overlap}")
    last = len(tokens) - 1
    starts = range(0, max(1, last - overlap), block_size - overlap)

    def batch(first: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        x = np.zeros((batch_size, block_size), np.int32)
        y = np.full((batch_size, block_size), -1, np.int32)
        for row, start in enumerate(starts[first : first + batch_size]):
            end = min(start + block_size, last)
            x[row, : end - start] = tokens[start:end]
            y[row, : end - start] = tokens[start + 1 : end + 1]
            y[row, : overlap if start else 0] = -1
        return x, y

    return (batch(first) for first in range(0, len(starts), batch_size))
