"""Token files: llm.c's shards, mapped and written, and nanoGPT's files, which have no header.

    train.bin     or shards of it, train_000001.bin, fineweb_train_000002.bin
    val.bin       or tiny_shakespeare_val.bin: the split is a word of the name

Knows nothing about text, models or batches.
"""

from __future__ import annotations

import os
import re
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gpt2c import files

Tokens = NDArray[np.uint16]
Split = Literal["train", "val"]

# The header of karpathy/llm.c:dev/data/data_common.py: 256 int32, of which three are used.
MAGIC, _VERSION, _HEADER_BYTES = 20240520, 1, 256 * 4
_MAX_TOKENS = 2**31 - 1  # the count is an int32
MAX_VOCABULARY = 2**16  # a token is a uint16
_CHECKED = 1 << 20  # tokens that are read at a time to be checked


class StoredTokens:
    """The tokens of a file, (N,) uint16, read when a slice or all of them are asked for.

    They are read and not mapped: where a mapped file is cut short meanwhile, the system ends the
    process. The file stays open, so one that is replaced is still the one that was opened.

    Parameters
    ----------
    path : the file
    start : bytes before the first token
    count : N
    """

    dtype = np.dtype(np.uint16)

    def __init__(self, path: Path, start: int, count: int) -> None:
        self.path, self._start, self.shape = path, start, (count,)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Tokens:
        """Read tokens that lie one after the other.

        Raises
        ------
        OSError : the file cannot be read, or has been cut short
        """
        first, last, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"stored tokens are read one after the other, not by steps of {step}")
        tokens = np.empty(max(0, last - first), "<u2")
        left, place = tokens.data.cast("B"), self._start + 2 * first
        with files.naming(self.path):
            while left:
                size = os.preadv(self._descriptor, [left], place)
                if not size:
                    raise OSError(
                        f"{self.path} was cut short while it was read: tokens {first:,} to"
                        f" {last:,} of {len(self):,} are not there any more"
                    )
                left, place = left[size:], place + size
        return tokens

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Read all tokens; see `__getitem__` for errors."""
        return self[:].astype(dtype or np.uint16, copy=False)


def write_tokens(path: str | os.PathLike[str], tokens: ArrayLike) -> None:
    """Write token ids (N,) as an llm.c shard: 256 little-endian int32 of header, then N uint16.

    Raises
    ------
    ValueError : no tokens, too many, or an id outside 0 to 65535
    OSError : the file cannot be written; what was there before is unchanged
    """
    _write_all([Path(path)], [np.asarray(tokens)])


def write_shards(
    directory: Path, split: Split, tokens: ArrayLike, shard_tokens: int = 0
) -> list[Path]:
    """Write token ids (N,) as files of `shard_tokens`, from 1, the last smaller; 0: as one.

    Returns
    -------
    the files: `split`.bin, or `split`_000001.bin and so on

    Raises
    ------
    ValueError : see `write_tokens`
    OSError : a file cannot be written; then none is new
    """
    array = np.asarray(tokens)
    size = shard_tokens or max(1, len(array))
    pieces = [array[start : start + size] for start in range(0, max(1, len(array)), size)]
    paths = [directory / f"{split}_{number:06d}.bin" for number in range(1, len(pieces) + 1)]
    if len(paths) == 1:
        paths = [directory / f"{split}.bin"]
    _write_all(paths, pieces)
    return paths


def _write_all(paths: list[Path], pieces: list[NDArray[Any]]) -> None:
    for path, tokens in zip(paths, pieces, strict=True):
        _check(path, tokens)
    with files.atomic_paths(*paths) as temporaries:
        for temporary, tokens in zip(temporaries, pieces, strict=True):
            header = np.zeros(256, dtype="<i4")
            header[:3] = MAGIC, _VERSION, len(tokens)
            with open(temporary, "wb") as file:
                file.write(header.tobytes())
                file.write(np.ascontiguousarray(tokens, "<u2").data)


def _check(path: Path, tokens: NDArray[Any]) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens for {path} must be a (N,) array of integers, not {tokens.dtype} {tokens.shape}"
        )
    if not 0 < len(tokens) <= _MAX_TOKENS:
        raise ValueError(
            f"{path} would hold {len(tokens)} tokens; a token file holds 1 to {_MAX_TOKENS}"
        )
    if tokens.min() < 0 or tokens.max() >= MAX_VOCABULARY:
        raise ValueError(
            f"tokens for {path} must lie between 0 and 65535, not {tokens.min()} and {tokens.max()}"
        )


def read_tokens(path: str | os.PathLike[str], vocab_size: int | None = None) -> Tokens:
    """Open an llm.c shard: a read-only (N,) uint16 array, mapped from the file where that can be.

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
    _count(path)
    tokens = files.map_file(path)[_HEADER_BYTES:].view("<u2")
    _check_vocabulary(path, tokens, vocab_size)
    return tokens


def open_tokens(path: str | os.PathLike[str], vocab_size: int | None = None) -> StoredTokens:
    """Open an llm.c shard whose tokens are read when they are needed; see `read_tokens`."""
    path = Path(path)
    tokens = StoredTokens(path, _HEADER_BYTES, _count(path))
    _check_vocabulary(path, tokens, vocab_size)
    return tokens


def _check_vocabulary(path: Path, tokens: Tokens | StoredTokens, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    parts = range(0, len(tokens), _CHECKED)
    largest = max(int(tokens[start : start + _CHECKED].max()) for start in parts)
    if largest >= vocab_size:
        raise ValueError(
            f"{path} holds token {largest}, outside a vocabulary of {vocab_size}; "
            "is it another tokenizer's?"
        )


def _count(path: Path) -> int:
    """Return how many tokens an llm.c shard holds; see `read_tokens` for errors."""
    header, size = _open(path)
    if (magic := int.from_bytes(header[:4], "little")) != MAGIC:
        raise ValueError(
            f"{path} is not an llm.c token file: it starts with {magic}, not {MAGIC} "
            "(nanoGPT's .bin without a header is not accepted; "
            "`gpt2c convert SRC DST --format nanogpt` gives it one)"
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
    return count


def has_header(path: Path) -> bool:
    """Whether a token file starts as llm.c's; see `read_tokens` for errors."""
    return int.from_bytes(_open(path)[0][:4], "little") == MAGIC


def find_shards(directory: str | os.PathLike[str], split: Split) -> list[Path]:
    """List a split's token files, as train.bin or fineweb_val_000001.bin, in the order of names.

    The split is a word of the name: a pretrained.bin is none of them. Names that begin with a dot
    are passed over, as by a shell. The list may be empty.

    Raises
    ------
    ValueError : the name of a file says both train and val
    """
    names = Path(directory).glob(f"*{split}*.bin")
    paths = sorted(path for path in names if path.name[0] != "." and split in _words(path))
    for path in paths:
        if {"train", "val"} <= _words(path):
            raise ValueError(
                f"{path} says both train and val, so it could be of either: rename it to say one"
            )
    return paths


def alone(out: Path) -> AbstractContextManager[None]:
    """Have a directory of token files to oneself, if it exists, so that nothing trains on them.

    Raises
    ------
    BlockingIOError : something does
    """
    if not out.is_dir():
        return nullcontext()
    return files.locked(
        out,
        f"another process trains on {out}, or prepares it: wait for it, or name another directory",
    )


def remove_shards(directory: str | os.PathLike[str]) -> None:
    """Remove the token files of both splits, those of val first; others of such names stay."""
    splits: tuple[Split, ...] = ("val", "train")
    for path in [path for split in splits for path in find_shards(directory, split)]:
        if path.stem in splits or has_header(path):
            path.unlink()


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.stem.lower()))


def read_shards(
    directory: str | os.PathLike[str], split: Split, vocab_size: int | None = None
) -> list[StoredTokens]:
    """Open the token files of a split, see `find_shards` and `open_tokens`.

    Raises
    ------
    OSError : there is none, or one cannot be read
    ValueError : one is damaged, or not an llm.c shard
    """
    paths = find_shards(directory, split)
    if not paths:
        raise FileNotFoundError(
            f"token file {Path(directory) / split}.bin does not exist, nor another *{split}*.bin; "
            "make it with `gpt2c prepare`"
        )
    return [open_tokens(path, vocab_size) for path in paths]


def read_nanogpt(path: str | os.PathLike[str]) -> Tokens:
    """Open a token file of nanoGPT's: a read-only (N,) uint16 array, all that the file holds.

    It has no header, so nothing shows that a file is one: call this where the user says so.

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : the file is empty, has an odd number of bytes, or starts as an llm.c shard
    """
    path = Path(path)
    header, size = _open(path)
    if int.from_bytes(header[:4], "little") == MAGIC:
        raise ValueError(f"{path} has llm.c's header: it is not one of nanoGPT's token files")
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes; tokens of 2 bytes each are wanted")
    return files.map_file(path).view("<u2")


def write_nanogpt(path: Path, shards: list[Tokens]) -> None:
    """Write the tokens of shards, one after the other, as nanoGPT does: uint16 and no header.

    Raises
    ------
    OSError : the file cannot be written; what was there before is unchanged
    """
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        for tokens in shards:
            file.write(np.ascontiguousarray(tokens, "<u2").data)


def _open(path: Path) -> tuple[bytes, int]:
    """Give the first bytes of a file, as many as a header has, and its size."""
    try:
        return files.read_header(path, _HEADER_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"token file {path} does not exist; make it with `gpt2c prepare`"
        ) from None
