"""Token files: llm.c's shards, mapped and written, and nanoGPT's files, which have no header.

    train.bin     or shards of it, train_000001.bin, fineweb_train_000002.bin
    val.bin       or tiny_shakespeare_val.bin: the split is a word of the name
    manifest.json what `gpt2c prepare` wrote, to know when another file is among it

Knows nothing about text, models or batches.
"""

from __future__ import annotations

import json
import os
import re
import weakref
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gpt2c import files
from gpt2c.checks import counted

Tokens = NDArray[np.uint16]
Split = Literal["train", "val"]

# The header of karpathy/llm.c:dev/data/data_common.py: 256 int32, of which three are used.
MAGIC, _VERSION, _HEADER_BYTES = 20240520, 1, 256 * 4
_MAX_TOKENS = 2**31 - 1  # the count is an int32
MAX_VOCABULARY = 2**16  # a token is a uint16
MANIFEST = "manifest.json"
_MANIFEST_VERSION = 1
_BLOCK = 1 << 20  # tokens that are written, summed up or checked at a time


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

    def __repr__(self) -> str:
        return f"StoredTokens({str(self.path)!r}, {counted(len(self), 'token')})"

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
            with open(temporary, "wb") as file:
                file.write(_header(len(tokens)))
                file.write(np.ascontiguousarray(tokens, "<u2").data)


def _header(count: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, _VERSION, count
    return header.tobytes()


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


class TokenWriter:
    """Writes the token files of both splits as their tokens come, in little memory.

    The files have temporary names until `publish`. Use it as a context, which removes what was not
    published.

    Parameters
    ----------
    directory : exists
    shard_tokens : the most tokens in a file of training tokens, which are then several,
        train_000001.bin and so on; 0 puts all into one

    Raises
    ------
    OSError : a file cannot be written
    """

    def __init__(self, directory: Path, shard_tokens: int = 0) -> None:
        self._directory = directory
        self._most = {"train": shard_tokens or _MAX_TOKENS, "val": _MAX_TOKENS}
        self._files: dict[Split, list[_TokenFile]] = {"train": [], "val": []}

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._all():
            file.drop()

    def _all(self) -> list[_TokenFile]:
        return [*self._files["train"], *self._files["val"]]

    def write(self, split: Split, tokens: NDArray[Any]) -> None:
        """Append token ids (N,), from 0 to 65535, to a split."""
        files_ = self._files[split]
        while len(tokens):
            if not files_ or files_[-1].count == self._most[split]:
                if files_:
                    files_[-1].finish()
                name = f"{split}_{len(files_) + 1:06d}.bin"
                files_.append(_TokenFile(self._directory / name))
            room = self._most[split] - files_[-1].count
            files_[-1].append(tokens[:room].astype("<u2"))
            tokens = tokens[room:]

    def finish(self) -> None:
        """Put all that was written on the disk."""
        for file in self._all():
            file.finish()

    def publish(self, facts: Mapping[str, Any], splits: Mapping[Split, Mapping[str, Any]]) -> None:
        """Let the files take their names, and write the manifest; val.bin comes last.

        What `remove_shards` removes must be gone.

        Parameters
        ----------
        facts, splits : what the manifest says beside the files, of all and of each split
        """
        self.finish()
        manifest: dict[str, Any] = {"version": _MANIFEST_VERSION, **facts}
        for split, files_ in self._files.items():
            if len(files_) == 1:
                files_[0].path = self._directory / f"{split}.bin"
            entries = [
                {"name": file.path.name, "tokens": file.count, "crc32": file.checksum}
                for file in files_
            ]
            manifest[split] = {**splits[split], "files": entries}
        for file in self._files["train"]:
            file.publish()
        with files.atomic_path(self._directory / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for file in self._files["val"]:
            file.publish()
        files.sync(self._directory)


class _TokenFile:
    """A token file that is being written, of a name to come; its header is written at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = files.temporary_path(path)
        self._waiting: list[NDArray[Any]] = []
        self._waiting_tokens = 0
        self.count = self.checksum = 0
        with files.naming(path):
            self._file = open(self._temporary, "wb")
            self._file.write(bytes(_HEADER_BYTES))

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
            with files.naming(self.path):
                self._file.write(content)

    def finish(self) -> None:
        if not self._file.closed:
            self._flush()
            with files.naming(self.path):
                self._file.seek(0)
                self._file.write(_header(self.count))
                self._file.close()
                files.sync(self._temporary)

    def publish(self) -> None:
        os.replace(self._temporary, self.path)

    def drop(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


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
    parts = range(0, len(tokens), _BLOCK)
    largest = max(int(tokens[start : start + _BLOCK].max()) for start in parts)
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
    """Remove the token files of both splits, their manifest first, then those of val.

    Others of such names stay.
    """
    splits: tuple[Split, ...] = ("val", "train")
    (Path(directory) / MANIFEST).unlink(missing_ok=True)
    for path in [path for split in splits for path in find_shards(directory, split)]:
        if path.stem in splits or has_header(path):
            path.unlink()


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.stem.lower()))


def read_shards(
    directory: str | os.PathLike[str],
    split: Split,
    vocab_size: int | None = None,
    fingerprint: str | None = None,
) -> list[StoredTokens]:
    """Open the token files of a split, see `find_shards` and `open_tokens`.

    Where a manifest says what `gpt2c prepare` wrote, they must be that: all of it and no other.
    Directories of llm.c's or nanoGPT's have none.

    Parameters
    ----------
    fingerprint : of the tokenizer that the tokens should be of, see `Tokenizer.fingerprint`;
        compared where there is a manifest

    Raises
    ------
    OSError : there is none, one cannot be read, or one that the manifest names is missing
    ValueError : one is damaged, not an llm.c shard, or not of the preparation or tokenizer
    """
    directory = Path(directory)
    paths = find_shards(directory, split)
    manifest = _read_manifest(directory)
    for name in manifest[split] if manifest else ():
        if directory / name not in paths:
            raise FileNotFoundError(
                f"token file {directory / name} is missing: {MANIFEST} says that gpt2c prepare"
                " wrote it; put it back, or prepare the text again"
            )
    if not paths:
        raise FileNotFoundError(
            f"token file {directory / split}.bin does not exist, nor another *{split}*.bin; "
            "make it with `gpt2c prepare`"
        )
    shards = [open_tokens(path, vocab_size) for path in paths]
    if manifest:
        for path, tokens in zip(paths, shards, strict=True):
            _check_listed(path, tokens, manifest[split])
        if fingerprint is not None and manifest["tokenizer"] != fingerprint:
            raise ValueError(
                f"the token files of {directory} are of another tokenizer than the one given, as"
                f" {MANIFEST} says; give the tokenizer that they were prepared with, or prepare the"
                " text again"
            )
    return shards


def _check_listed(path: Path, tokens: StoredTokens, listed: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a token file that is not the one that the manifest, name -> (tokens, crc), lists."""
    checksum = 0
    for start in range(0, len(tokens), _BLOCK):
        checksum = zlib.crc32(tokens[start : start + _BLOCK].tobytes(), checksum)
    if listed.get(path.name) == (len(tokens), checksum):
        return
    others = [name for name in listed if name != path.name]
    beside = f", which belongs to {others[0]}" if others else ""
    if path.name not in listed:
        what = f"is no file of the preparation that {MANIFEST} beside it lists{beside}"
    else:
        what = (
            f"is not the file that {MANIFEST} beside it lists under that name{beside}: it is of"
            " another preparation, or was changed"
        )
    raise ValueError(
        f"{path} {what}; put it elsewhere or prepare the text again, or remove {MANIFEST} if it is"
        " meant"
    )


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """Read what `gpt2c prepare` wrote: its tokenizer, and for each split name -> (tokens, crc)."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return None
    entries = files.read_json(path)
    if (version := entries.get("version")) != _MANIFEST_VERSION:
        raise ValueError(f"{path}: version must be {_MANIFEST_VERSION}, got {files.shown(version)}")
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
