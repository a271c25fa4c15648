"""Preparation: documents -> token files for training and for validation.

Knows nothing about models, about how text becomes tokens (tokenizer.py) or about the format of
token files (shards.py).
"""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2c.files import atomic
from gpt2c.files.names import MANIFEST_FILE, TOKENIZER_FILES, TOKENIZER_OTHERS
from gpt2c.kernels.checks import counted
from gpt2c.text.documents import TextFiles
from gpt2c.text.shards import (
    MAX_VOCABULARY,
    SplitName,
    TokenWriter,
    alone,
    find_shards,
    remove_shards,
)
from gpt2c.text.tokenizer import SMALLEST, Tokenizer
from gpt2c.text.windows import split_text

__all__ = ["Prepared", "prepare", "shuffled", "split_validation"]

# A document is a string, or an iterable of its pieces, which is read before the next document.
Document = str | Iterable[str]

LEARNED = 1 << 24  # the most bytes of text that a tokenizer is learned from
_MANY = 1 << 18  # documents; of more, none is remembered by itself
_GROUPS = 1 << 16
_BEGINNING = 1 << 16  # characters


def shuffled(seed: list[int], count: int) -> tuple[NDArray[np.int64], int]:
    """Return a permutation of range(count) and one more random number, which `seed` determines.

    They are made of raw bits, which NumPy promises never to change, unlike the results of
    Generator's methods (NEP 19).
    """
    bits = np.random.PCG64(seed).random_raw(count + 1)
    return np.argsort(bits[:-1], kind="stable"), int(bits[-1])


@dataclass(frozen=True)
class HoldOut:
    """The part of the documents that is validation text: whole documents, or the tail of one.

    Documents are chosen in groups. Copies of a document are in one group.

    validation : for each group whether it is held out, (G,) bool
    group_of : the group of each document, (D,); None if it follows from the beginning, see `_group`
    divided : the number of the document whose tail is held out, then those of its copies, which
        lose it; or none
    head : characters of that document that are trained on
    documents, characters, bytes : their numbers; bytes are of UTF-8
    """

    validation: NDArray[np.bool_]
    group_of: NDArray[np.intp] | None
    divided: Sequence[int]
    head: int
    documents: int
    characters: int
    bytes: int

    def parts(self, documents: Iterable[Document]) -> Iterator[tuple[SplitName, Iterator[str]]]:
        """Yield the texts to train on and to validate on, each with its split and in pieces.

        Raises
        ------
        OSError : the documents have changed since this was chosen
        """
        characters, number, group_of, divided = 0, -1, self.group_of, set(self.divided)

        def measured(pieces: Iterable[str]) -> Iterator[str]:
            nonlocal characters
            for piece in pieces:
                characters += len(piece)
                yield piece

        for number, document in enumerate(documents):
            if number == self.documents:
                break
            beginning, whole = _beginning(_pieces(document))
            pieces = measured(whole)
            group = _group(beginning) if group_of is None else int(group_of[number])
            if number in divided:
                head = _Head(pieces, self.head)
                yield "train", iter(head)
                if number == self.divided[0]:
                    yield "val", head.rest()
            else:
                yield "val" if self.validation[group] else "train", pieces
            deque(pieces, 0)  # unread pieces are counted, too
        if (number + 1, characters) != (self.documents, self.characters):
            raise OSError("the text changed while it was read: prepare it again")


class _Head:
    """Splits a text in pieces: an iterator of its first `size` characters, and the `rest`."""

    def __init__(self, pieces: Iterator[str], size: int) -> None:
        self._pieces = pieces
        self._size = size

    def __iter__(self) -> Iterator[str]:
        left = self._size
        for piece in self._pieces:
            if len(piece) >= left:
                self._pieces = chain([piece[left:]], self._pieces)
                yield piece[:left]
                return
            left -= len(piece)
            yield piece

    def rest(self) -> Iterator[str]:
        return self._pieces


def _pieces(document: Document) -> Iterator[str]:
    return split_text([document] if isinstance(document, str) else document)


def _beginning(pieces: Iterator[str]) -> tuple[str, Iterator[str]]:
    """Return the first characters of a text, and the whole text in pieces."""
    read: list[str] = []
    size = 0
    while size < _BEGINNING and (piece := next(pieces, None)) is not None:
        read.append(piece)
        size += len(piece)
    return "".join(read)[:_BEGINNING], chain(read, pieces)


def _group(beginning: str) -> int:
    """Return the group, in range(_GROUPS), of all documents that begin so."""
    digest = hashlib.blake2b(beginning.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _GROUPS


def split_validation(documents: Iterable[Document], fraction: float, seed: int) -> HoldOut:
    """Hold out about `fraction` of the characters for validation.

    Whole documents are held out, chosen by `seed`, as many as fit. None is larger than a quarter of
    the share, if there are enough smaller ones. Copies of a document stay together, so that no
    held-out text is trained on. If whole documents fill less than half of the share (one document,
    or few large ones), the tail of the longest document is held out instead, cut at a line break if
    there is one; its head and its tail are then two texts.

    Memory does not grow with the text: no document is kept. Of more than 262,144 documents only the
    numbers of the longest and its copies are. Then documents whose first 65,536 characters have the
    same hash, modulo 65,536, stay together.

    Raises
    ------
    ValueError : no documents, `fraction` not between 0 and 1, or a text too short to be cut
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the share of validation text must lie between 0 and 1, not {fraction}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    keys, lengths = array("Q"), array("q")  # of the first documents
    sizes = np.zeros(_GROUPS, np.int64)  # of groups by beginnings
    count, characters, size_in_bytes, blank = 0, 0, 0, True
    longest, length, longest_key = array("q"), -1, 0  # the first one and its copies
    for count, document in enumerate(documents, 1):
        beginning, pieces = _beginning(_pieces(document))
        digest, size = hashlib.blake2b(digest_size=8), 0
        for piece in pieces:
            content = piece.encode()
            digest.update(content)
            size += len(piece)
            size_in_bytes += len(content)
            blank = blank and not piece.strip()
        group = _group(beginning)
        sizes[group] += size
        characters += size
        key = int.from_bytes(digest.digest(), "little")
        if size > length:
            longest, length, longest_key = array("q", [count - 1]), size, key
        elif size == length and key == longest_key:
            longest.append(count - 1)
        if count <= _MANY:
            keys.append(key)
            lengths.append(size)
    if blank:
        raise ValueError("there is no text: every document is blank")
    group_of = None
    if count <= _MANY:  # a group for each distinct document, in the order of first occurrences
        _, first, found = np.unique(
            np.array(keys, np.uint64), return_index=True, return_inverse=True
        )
        rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
        group_of = rank[found.ravel()]
        sizes = np.bincount(group_of, np.array(lengths), len(first)).astype(np.int64)
    budget = fraction * characters
    order = shuffled([seed], len(sizes))[0]
    # First without large ones: one document that fills the share would represent all others.
    for largest in (budget / 4, budget):
        held_out = np.zeros(len(sizes), bool)
        chosen = 0
        candidates = order[sizes[order] <= largest]
        for group, size in zip(candidates.tolist(), sizes[candidates].tolist(), strict=True):
            if chosen + size <= budget:
                held_out[group] = True
                chosen += size
        if chosen >= budget / 2:
            return HoldOut(held_out, group_of, (), 0, count, characters, size_in_bytes)
    head = _cut(documents, longest[0], length, fraction, budget)
    held_out[:] = False
    return HoldOut(held_out, group_of, longest, head, count, characters, size_in_bytes)


def _cut(
    documents: Iterable[Document], index: int, length: int, fraction: float, budget: float
) -> int:
    """Return how many characters of one document are trained on; the tail is held out.

    Raises
    ------
    ValueError : the head or the tail would be blank
    """

    def pieces() -> Iterator[str]:
        for document in islice(documents, index, index + 1):
            yield from _pieces(document)

    size = max(1, round(min(budget, max(fraction, 0.5) * length)))
    place = length - size
    cut, start = place, 0
    least = max(1, place - size)  # a line break at most `size` away
    for piece in pieces():
        line_break = piece.rfind("\n", max(0, least - start), max(0, place - start))
        if line_break >= 0:
            cut = start + line_break + 1
        start += len(piece)
    head = _Head(pieces(), cut)
    has_head = any([bool(piece.strip()) for piece in head])
    has_tail = any([bool(piece.strip()) for piece in head.rest()])
    if not has_head or not has_tail:
        raise ValueError(
            f"a text of {counted(length, 'character')} is too short to hold out {fraction:g} of it;"
            " add text"
        )
    return cut


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`. Bytes are of UTF-8; tokens include each `<|endoftext|>`."""

    documents: int
    train_documents: int
    val_documents: int
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    vocab_size: int
    tail_held_out: bool  # the validation text is the tail of one document, not whole documents


def prepare(
    documents: Iterable[Document],
    out: Path,
    tokenizer: Tokenizer | str,
    val_fraction: float = 0.1,
    seed: int = 1337,
    overwrite: bool = False,
    shard_tokens: int = 0,
    stage: Callable[[str], None] = lambda name: None,
) -> Prepared:
    """Write documents as token files: `out`/train.bin, `out`/val.bin and the tokenizer's files.

    The files are written while documents are read, so texts of any size take little memory. `out`
    does not change before all files are complete. manifest.json lists them.

    Parameters
    ----------
    documents : texts; each has an `<|endoftext|>` before it in the files, as in llm.c. In a
        document that string is ordinary text. They are iterated several times; an iterator, which
        can be read only once, is copied into memory first
    out : directory to make
    tokenizer : a tokenizer or its spec: "gpt2", "bytes", a directory, or "bpe:N" to train one of N
        tokens on the training documents only; of more than 16 MiB of text, on parts that are spread
        evenly and have at most 16 MiB together
    val_fraction : share of the characters held out, see `split_validation`
    seed : chooses the documents held out
    overwrite : whether `out` may have files already; its token files are replaced
    shard_tokens : the most tokens in a file of training tokens; more make several files,
        train_000001.bin and so on; 0 puts all into one
    stage : called with the purpose of each iteration of the documents, before it

    Raises
    ------
    ValueError : nothing to hold out, a bad spec, a vocabulary of more than 65536 tokens, a negative
        `shard_tokens`, or a text file that would be replaced
    OSError : `out` is not empty, or cannot be written; the documents changed meanwhile; another
        process trains on what `out` holds
    """
    if shard_tokens < 0:
        raise ValueError(f"shard_tokens must be at least 1, or 0 for one file, got {shard_tokens}")
    if isinstance(documents, str):
        raise ValueError("documents must be several texts, got one string; put it into a list")
    atomic.check_directory(out, overwrite)
    if isinstance(documents, TextFiles):
        names = (*TOKENIZER_FILES, *TOKENIZER_OTHERS, MANIFEST_FILE)
        shards = find_shards(out, "train") + find_shards(out, "val")
        for path in (*(out / name for name in names), *shards):
            atomic.check_apart(path, *documents.names)
    with alone(out):  # refuse `out` in use before long work, and again before a change
        pass
    if isinstance(documents, Iterator):  # an iterator can be read only once
        documents = ["".join(_pieces(document)) for document in documents]
    size_to_learn = 0
    if isinstance(tokenizer, str):  # refuse a mistake before long work
        size_to_learn = _size_to_learn(tokenizer)
        tokenizer = Tokenizer.from_spec("bytes" if size_to_learn else tokenizer)
    stage("reading")
    held_out = split_validation(documents, val_fraction, seed)
    if size_to_learn:
        stage("learning tokens")
        tokenizer = _learned(documents, held_out, size_to_learn)
    if tokenizer.vocab_size > MAX_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size} tokens; "
            f"token files hold at most {MAX_VOCABULARY}"
        )
    with atomic.claimed(out, overwrite), alone(out):
        atomic.remove_leftovers(out)  # of a killed process
        with TokenWriter(out, shard_tokens) as writer:
            stage("encoding")
            prepared = _encode(documents, held_out, tokenizer, writer)
            writer.finish()
            # val.bin is removed first and written last: a directory that has it never mixes two
            # preparations and never lacks a shard.
            remove_shards(out, writer.names())
            plain = copy.copy(tokenizer)
            plain.add_bos_token = False  # windows begin anywhere in a text
            plain.save_pretrained(out)
            writer.publish(
                {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
                {
                    "train": {"documents": prepared.train_documents, "bytes": prepared.train_bytes},
                    "val": {"documents": prepared.val_documents, "bytes": prepared.val_bytes},
                },
            )
    return prepared


def _size_to_learn(spec: str) -> int:
    """Return N of the spec "bpe:N", a tokenizer to be trained, or 0 for another spec."""
    if not spec.startswith("bpe:"):
        return 0
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdecimal()):
        raise ValueError(f"tokenizer {spec!r} must name a vocabulary size, such as bpe:4096")
    if len(size) > 9 or int(size) > MAX_VOCABULARY:
        raise ValueError(
            f"tokenizer {spec!r:.40} asks for too many tokens; "
            f"token files hold at most {MAX_VOCABULARY}"
        )
    if int(size) < SMALLEST:
        raise ValueError(f"tokenizer {spec!r} has too few tokens; at least {SMALLEST} are needed")
    return int(size)


def _learned(documents: Iterable[Document], held_out: HoldOut, vocab_size: int) -> Tokenizer:
    parts = held_out.parts(documents)
    train: Iterator[Iterator[str]] = (pieces for split, pieces in parts if split == "train")
    if held_out.bytes > LEARNED:
        train = _sample(train, LEARNED / held_out.bytes)
    return Tokenizer.train_on_pieces(train, vocab_size)


def _sample(texts: Iterable[Iterator[str]], share: float) -> Iterator[Iterator[str]]:
    """Yield the texts with a share of their pieces, spread evenly."""
    seen = taken = 0

    def chosen(pieces: Iterator[str]) -> Iterator[str]:
        nonlocal seen, taken
        for piece in pieces:
            seen += len(piece)
            if taken + len(piece) <= share * seen:
                taken += len(piece)
                yield piece

    return map(chosen, texts)


def _encode(
    documents: Iterable[Document], held_out: HoldOut, tokenizer: Tokenizer, writer: TokenWriter
) -> Prepared:
    splits: tuple[SplitName, SplitName] = ("train", "val")
    coming: deque[tuple[int, SplitName]] = deque()  # texts that the tokenizer has begun to read
    texts, tokens, sizes = ({split: 0 for split in splits} for _ in range(3))

    def measured(split: SplitName, pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            sizes[split] += len(piece.encode())
            yield piece

    def all_texts() -> Iterator[Iterator[str]]:
        for number, (split, pieces) in enumerate(held_out.parts(documents)):
            coming.append((number, split))
            yield measured(split, pieces)

    last = -1
    start = np.array([tokenizer.eot], np.uint16)
    for number, ids in tokenizer.encode_pieces(all_texts()):
        while coming[0][0] < number:
            coming.popleft()
        split = coming[0][1]
        if number != last:
            last = number
            texts[split] += 1
            tokens[split] += 1
            writer.write(split, start)
        tokens[split] += len(ids)
        writer.write(split, ids)
    return Prepared(
        documents=held_out.documents,
        train_documents=texts["train"],
        val_documents=texts["val"],
        train_tokens=tokens["train"],
        val_tokens=tokens["val"],
        train_bytes=sizes["train"],
        val_bytes=sizes["val"],
        vocab_size=tokenizer.vocab_size,
        tail_held_out=len(held_out.divided) > 0,
    )
