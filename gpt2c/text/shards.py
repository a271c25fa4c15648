"""Token files: llm.c's shards, read and written, and nanoGPT's files, which have no header.

    train.bin     or shards of it, train_000001.bin, fineweb_train_000002.bin
    val.bin       or tiny_shakespeare_val.bin: the split is a word of the name
    manifest.json the list of files that `gpt2c prepare` wrote, to detect other files

Knows nothing about text, models or batches.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import weakref
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gpt2c.files import atomic, untrusted
from gpt2c.files.names import MANIFEST_FILE, token_file
from gpt2c.kernels.checks import counted

__all__ = [
    "MAGIC",
    "MAX_VOCABULARY",
    "SplitName",
    "StoredTokens",
    "TokenArray",
    "TokenWriter",
    "alone",
    "checksums",
    "find_shards",
    "has_header",
    "open_tokens",
    "read_shards",
    "read_start",
    "read_tokens",
    "remove_shards",
    "shard_names",
    "write_blocks",
    "write_shards",
    "write_tokens",
]

TokenArray = NDArray[np.uint16]
SplitName = Literal["train", "val"]

# The header of karpathy/llm.c:dev/data/data_common.py: 256 int32, of which three are used.
MAGIC, _VERSION, _HEADER_BYTES = 20240520, 1, 256 * 4
_MAX_TOKENS = 2**31 - 1  # the count is an int32
MAX_VOCABULARY = 2**16  # a token is a uint16
_MANIFEST_VERSION = 1
_BLOCK = 1 << 20  # tokens that are written, summed up or checked at a time


class StoredTokens:
    """The tokens of a file, (N,) uint16; a slice, or all of them, are read on demand.

    They are read and not mapped, because the system kills a process whose mapped file is cut short.
    The file stays open, so the tokens stay the same if the file is replaced.

    Parameters
    ----------
    path : the file
    start : bytes before the first token
    count : N

    Attributes
    ----------
    checksum, text_bytes : set by `open_tokens`: the CRC-32 of the tokens, and the bytes of text
        that they stand for, 0 if `lengths` was not given
    """

    dtype = np.dtype(np.uint16)
    checksum = text_bytes = 0

    def __init__(self, path: Path, start: int, count: int) -> None:
        self.path, self._start, self.shape = path, start, (count,)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __repr__(self) -> str:
        return f"StoredTokens({str(self.path)!r}, {counted(len(self), 'token')})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> TokenArray:
        """Read a slice of tokens.

        Raises
        ------
        OSError : the file cannot be read, or has been cut short
        ValueError : the step of the slice is not 1
        """
        first, last, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"stored tokens are read one after the other, not by steps of {step}")
        tokens = np.empty(max(0, last - first), "<u2")
        left, place = tokens.data.cast("B"), self._start + 2 * first
        with atomic.naming(self.path):
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


def write_tokens(path: str | os.PathLike[str], tokens: ArrayLike | StoredTokens) -> None:
    """Write token ids (N,) as an llm.c shard: 256 little-endian int32 of header, then N uint16.

    Raises
    ------
    ValueError : no tokens, too many, or an id outside 0 to 65535
    OSError : the file cannot be written; an existing file is unchanged
    """
    _write_all([Path(path)], _source(tokens))


def write_shards(
    directory: Path, split: SplitName, tokens: ArrayLike | StoredTokens, shard_tokens: int = 0
) -> list[Path]:
    """Write token ids (N,) as files of `shard_tokens` tokens, the last smaller; 0 writes one file.

    Returns
    -------
    the files: `split`.bin, or `split`_000001.bin and so on

    Raises
    ------
    ValueError : see `write_tokens`
    OSError : a file cannot be written; then no file has changed
    """
    source = _source(tokens)
    paths = [directory / name for name in shard_names(split, len(source), shard_tokens)]
    _write_all(paths, source, shard_tokens)
    return paths


def shard_names(split: SplitName, count: int, shard_tokens: int) -> list[str]:
    """Return the names of the files that `write_shards` writes of `count` tokens."""
    if count <= (shard_tokens or count):
        return [token_file(split)]
    return [token_file(split, shard) for shard in range(1, -(-count // shard_tokens) + 1)]


def _source(tokens: ArrayLike | StoredTokens) -> NDArray[Any] | StoredTokens:
    return tokens if isinstance(tokens, StoredTokens) else np.asarray(tokens)


def _write_all(paths: list[Path], tokens: NDArray[Any] | StoredTokens, size: int = 0) -> None:
    """Write tokens (N,) as files of `size` tokens, the last smaller; 0 writes one file."""
    size = size or max(1, math.prod(tokens.shape))
    starts = range(0, size * len(paths), size)
    for path, start in zip(paths, starts, strict=True):
        _check(path, tokens, start, start + size)
    with atomic.atomic_paths(*paths) as temporaries:
        for temporary, start in zip(temporaries, starts, strict=True):
            with open(temporary, "wb") as file:
                stop = min(start + size, len(tokens))
                file.write(_header(stop - start))
                write_blocks(file, tokens, start, stop)


def write_blocks(
    file: BinaryIO, tokens: NDArray[Any] | StoredTokens, start: int, stop: int
) -> None:
    """Write tokens from `start` up to `stop`, a block at a time: all may not fit into memory."""
    for place in range(start, stop, _BLOCK):
        file.write(np.ascontiguousarray(tokens[place : min(place + _BLOCK, stop)], "<u2").data)


def _header(count: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, _VERSION, count
    return header.tobytes()


def _check(path: Path, tokens: NDArray[Any] | StoredTokens, start: int, stop: int) -> None:
    if len(tokens.shape) != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens for {path} must be a (N,) array of integers, not {tokens.dtype} {tokens.shape}"
        )
    count = min(stop, len(tokens)) - start
    if not 0 < count <= _MAX_TOKENS:
        raise ValueError(f"{path} would hold {count} tokens; a token file holds 1 to {_MAX_TOKENS}")
    if isinstance(tokens, StoredTokens):
        return  # a uint16 is in range
    least, largest = tokens[start:stop].min(), tokens[start:stop].max()
    if least < 0 or largest >= MAX_VOCABULARY:
        raise ValueError(
            f"tokens for {path} must lie between 0 and 65535, not {least} and {largest}"
        )


class TokenWriter:
    """Writes the token files of both splits as their tokens come, in little memory.

    The files have temporary names until `publish`. At the end of its with statement, files that
    were not published are removed.

    Parameters
    ----------
    directory : must exist
    shard_tokens : the most tokens in a file of training tokens; more make several files,
        train_000001.bin and so on; 0 puts all into one

    Raises
    ------
    OSError : a file cannot be written
    """

    def __init__(self, directory: Path, shard_tokens: int = 0) -> None:
        self._directory = directory
        self._most = {"train": shard_tokens or _MAX_TOKENS, "val": _MAX_TOKENS}
        self._files: dict[SplitName, list[_TokenFile]] = {"train": [], "val": []}

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._all():
            file.drop()

    def _all(self) -> list[_TokenFile]:
        return [*self._files["train"], *self._files["val"]]

    def write(self, split: SplitName, tokens: NDArray[Any]) -> None:
        """Append token ids (N,), from 0 to 65535, to a split."""
        files_ = self._files[split]
        while len(tokens):
            if not files_ or files_[-1].count == self._most[split]:
                name = token_file(split)
                if files_:
                    files_[-1].finish()
                    files_[0].path = self._directory / token_file(split, 1)
                    name = token_file(split, len(files_) + 1)
                files_.append(_TokenFile(self._directory / name))
            room = self._most[split] - files_[-1].count
            files_[-1].append(tokens[:room].astype("<u2"))
            tokens = tokens[room:]

    def finish(self) -> None:
        """Complete the files on disk, beside the files that they will replace.

        Raises
        ------
        OSError : see `atomic.places`, or a full disk
        """
        every = self._all()
        for file, place in zip(every, atomic.places(*(f.path for f in every)), strict=True):
            file.finish()
            file.move(place)

    def names(self) -> set[str]:
        """Return the names of the files that `publish` will write, the manifest among them.

        They are final after `finish`.
        """
        return {MANIFEST_FILE, *(file.path.name for file in self._all())}

    def publish(
        self, facts: Mapping[str, Any], splits: Mapping[SplitName, Mapping[str, Any]]
    ) -> None:
        """Rename the files to their final names, and write the manifest; val.bin comes last.

        Call `remove_shards` before.

        Parameters
        ----------
        facts, splits : further entries of the manifest, for all and for each split
        """
        self.finish()
        manifest: dict[str, Any] = {"version": _MANIFEST_VERSION, **facts}
        for split, files_ in self._files.items():
            entries = [
                {"name": file.path.name, "tokens": file.count, "crc32": file.checksum}
                for file in files_
            ]
            manifest[split] = {**splits[split], "files": entries}
        for file in self._files["train"]:
            file.publish()
        with atomic.atomic_path(self._directory / MANIFEST_FILE) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for file in self._files["val"]:
            file.publish()
        for directory in {file.place.parent for file in self._all()}:
            atomic.sync(directory)


class _TokenFile:
    """A token file in progress, under a temporary name; its header is written at the end."""

    def __init__(self, path: Path) -> None:
        self.path = self.place = path  # its name, and the path to write
        self._temporary = atomic.temporary_path(path)
        self._waiting: list[NDArray[Any]] = []
        self._waiting_tokens = 0
        self.count = self.checksum = 0
        with self._naming():
            self._file = open(self._temporary, "wb")
            self._file.write(bytes(_HEADER_BYTES))

    def _naming(self) -> AbstractContextManager[None]:
        return atomic.naming(self.path, {self._temporary: self.path})

    def append(self, tokens: NDArray[Any]) -> None:
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        self.count += len(tokens)
        if self._waiting_tokens >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            content = np.concatenate(self._waiting).tobytes()
            self._waiting, self._waiting_tokens = [], 0
            self.checksum = zlib.crc32(content, self.checksum)
            with self._naming():
                self._file.write(content)

    def finish(self) -> None:
        if not self._file.closed:
            self._flush()
            with self._naming():
                self._file.seek(0)
                self._file.write(_header(self.count))
                self._file.close()
                atomic.sync(self._temporary)

    def move(self, place: Path) -> None:
        """Move the temporary file beside `place`, which may be on another disk."""
        self.place, written = place, self._temporary
        if place.parent != written.parent:
            self._temporary = atomic.temporary_path(place)
            try:
                with self._naming():
                    shutil.move(written, self._temporary)
                    atomic.sync(self._temporary)
            finally:
                written.unlink(missing_ok=True)

    def publish(self) -> None:
        with self._naming():
            os.replace(self._temporary, self.place)

    def drop(self) -> None:
        with suppress(OSError):  # a full disk, which may be the reason for the drop
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_tokens(path: str | os.PathLike[str], vocab_size: int | None = None) -> TokenArray:
    """Read an llm.c shard: tokens (N,) uint16.

    Parameters
    ----------
    path : the file
    vocab_size : if given, every token must be below it

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : the file is not an llm.c shard or is truncated, or a token is outside the
        vocabulary
    """
    return open_tokens(path, vocab_size)[:]


def open_tokens(
    path: str | os.PathLike[str],
    vocab_size: int | None = None,
    lengths: NDArray[np.int64] | None = None,
) -> StoredTokens:
    """Open an llm.c shard, whose tokens are read on demand; see `read_tokens`.

    The whole file is read once, for the attributes and the checks.

    Parameters
    ----------
    lengths : bytes of text in each token of the vocabulary, (V,)
    """
    path = Path(path)
    tokens = StoredTokens(path, _HEADER_BYTES, _count(path))
    largest = 0
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        tokens.checksum = zlib.crc32(block.data, tokens.checksum)
        largest = max(largest, int(block.max()))
        if lengths is not None and largest < len(lengths):
            tokens.text_bytes += int(lengths[block].sum())
    if vocab_size is not None:
        _check_vocabulary(path, largest, vocab_size)
    return tokens


def checksums(shards: Sequence[StoredTokens]) -> list[int]:
    """Return the length and the checksum of each opened token file, which identify them."""
    return [mark for shard in shards for mark in (len(shard), shard.checksum)]


def _check_vocabulary(path: Path, largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"{path} holds token {largest}, outside a vocabulary of {vocab_size}; "
            "is it another tokenizer's?"
        )


def _count(path: Path) -> int:
    """Return how many tokens an llm.c shard holds; see `read_tokens` for errors."""
    header, size = read_start(path)
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
    """Return whether a token file starts like llm.c's; see `read_tokens` for errors."""
    return int.from_bytes(read_start(path)[0][:4], "little") == MAGIC


def find_shards(directory: str | os.PathLike[str], split: SplitName) -> list[Path]:
    """Return a split's token files, such as train.bin or fineweb_val_000001.bin, sorted by name.

    The split must be a word of the name: pretrained.bin is not a file of train. Names that begin
    with a dot are ignored, as by a shell. The list may be empty.

    Raises
    ------
    ValueError : the name of a file has both train and val
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
    """Lock a directory, if it exists, so that no other process trains on it or into it.

    Raises
    ------
    BlockingIOError : another process does
    """
    if not out.is_dir():
        return nullcontext()
    return atomic.locked(
        out,
        f"another process trains on {out}, or prepares it, or trains into it: wait for it, or name"
        " another directory",
    )


def remove_shards(directory: Path, coming: Collection[str]) -> None:
    """Remove the manifest, then the token files of val, then those of train.

    Other files with such names stay. If a link has the name of a coming file, the link stays and
    its target is removed.

    Parameters
    ----------
    coming : names of the files that are written next

    Raises
    ------
    OSError : a file cannot be read, or see `atomic.places`; then nothing is removed
    """
    splits: tuple[SplitName, ...] = ("val", "train")
    homes = dict(zip(coming, atomic.places(*(directory / name for name in coming)), strict=True))
    old = [path for split in splits for path in find_shards(directory, split)]
    ours = [path for path in old if path.name in homes or path.stem in splits or has_header(path)]
    for path in [directory / MANIFEST_FILE, *ours]:
        homes.get(path.name, path).unlink(missing_ok=True)


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.stem.lower()))


def read_shards(
    directory: str | os.PathLike[str],
    split: SplitName,
    vocab_size: int | None = None,
    fingerprint: str | None = None,
    lengths: NDArray[np.int64] | None = None,
) -> list[StoredTokens]:
    """Open the token files of a split, see `find_shards` and `open_tokens`.

    If there is a manifest of `gpt2c prepare`, the files must be exactly those that it lists.
    Directories of llm.c and nanoGPT have no manifest.

    Parameters
    ----------
    fingerprint : that of the expected tokenizer, see `Tokenizer.fingerprint`; compared if there is
        a manifest
    lengths : see `open_tokens`

    Raises
    ------
    OSError : there is no file, one cannot be read, or one that the manifest lists is missing
    ValueError : a file is damaged, not an llm.c shard, or of another preparation or tokenizer
    """
    directory = Path(directory)
    paths = find_shards(directory, split)
    manifest = _read_manifest(directory)
    for name in manifest[split] if manifest else ():
        if directory / name not in paths:
            raise FileNotFoundError(
                f"token file {directory / name} is missing: {MANIFEST_FILE} says that gpt2c prepare"
                " wrote it; put it back, or prepare the text again"
            )
    if not paths:
        raise FileNotFoundError(
            f"token file {directory / split}.bin does not exist, nor another *{split}*.bin; "
            "make it with `gpt2c prepare`"
        )
    shards = [open_tokens(path, vocab_size, lengths) for path in paths]
    if manifest:
        for tokens in shards:
            _check_listed(tokens, manifest[split])
        if fingerprint is not None and manifest["tokenizer"] != fingerprint:
            raise ValueError(
                f"the token files of {directory} are of another tokenizer than the one given, as"
                f" {MANIFEST_FILE} says; give the tokenizer that they were prepared with, or"
                " prepare the text again"
            )
    return shards


def _check_listed(tokens: StoredTokens, listed: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a token file that differs from the manifest's list, name -> (tokens, crc)."""
    path = tokens.path
    if listed.get(path.name) == (len(tokens), tokens.checksum):
        return
    others = [name for name in listed if name != path.name]
    beside = f", which belongs to {others[0]}" if others else ""
    if path.name not in listed:
        what = f"is not a file of the preparation that {MANIFEST_FILE} beside it lists{beside}"
    else:
        what = (
            f"is not the file that {MANIFEST_FILE} beside it lists under that name{beside}: it is"
            " of another preparation, or was changed"
        )
    raise ValueError(
        f"{path} {what}; put it elsewhere or prepare the text again, or remove {MANIFEST_FILE} if"
        " the file is intended"
    )


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest, if any: tokenizer, and for each split name -> (tokens, crc)."""
    path = directory / MANIFEST_FILE
    if not os.path.lexists(path):
        return None
    entries = untrusted.read_json(path)
    if (version := entries.get("version")) != _MANIFEST_VERSION:
        raise ValueError(
            f"{path}: version must be {_MANIFEST_VERSION}, got {untrusted.shown(version)}"
        )
    try:
        found: dict[str, Any] = {"tokenizer": str(entries["tokenizer"])}
        for split in ("train", "val"):
            found[split] = {
                str(file["name"]): (int(file["tokens"]), int(file["crc32"]))
                for file in entries[split]["files"]
            }
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{path} is damaged; prepare the text again, or remove it") from None
    return found


def read_start(path: Path) -> tuple[bytes, int]:
    """Return the first bytes of a file, at most the size of a header, and the file's size."""
    try:
        return untrusted.read_header(path, _HEADER_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"token file {path} does not exist; make it with `gpt2c prepare`"
        ) from None
