"""Files that are whole or absent: every result is written under a temporary name, then renamed.

And JSON that a stranger may have written. Knows nothing about what is in the files. Used by data,
tokenizer, checkpoint and train.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_JSON = 1 << 28  # bytes: no file of a model's or run's comes near it


@contextmanager
def atomic_paths(*paths: Path) -> Iterator[list[Path]]:
    """Give a temporary path beside each path; on success rename them all, on failure remove them.

    No file is renamed before all of them are on disk, so a full disk leaves every one as it was.

    Raises
    ------
    OSError : a file cannot be written (no such directory, no permission, a full disk)
    """
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(paths[0])) from error
        raise
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path for one file; see `atomic_paths`."""
    with atomic_paths(path) as (temporary,):
        yield temporary


def claim_directory(path: Path, overwrite: bool) -> None:
    """Make an output directory; refuse one that holds something unless `overwrite`.

    Raises
    ------
    FileExistsError : `path` is not empty and `overwrite` is false
    NotADirectoryError : `path` is a file
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; an output directory is wanted")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{path} exists and is not empty; name another directory or pass --overwrite"
        )
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, if it is one: a pipe or a device might never end.

    Raises
    ------
    OSError : it is missing, unreadable, a directory, a pipe or a device
    """

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # else a pipe waits for a writer

    with open(path, "rb", opener=at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is a pipe or a device; a file is wanted")
        yield file


def read_bytes(path: Path, most: int = LARGEST_JSON) -> bytes:
    """Read a whole file of at most `most` bytes.

    Raises
    ------
    OSError : see `open_file`; it grows or shrinks while it is read
    ValueError : it has more
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path} has {size:,} bytes; such a file has at most {most:,}")
        content = file.read(size + 1)
    if len(content) != size:
        raise OSError(f"{path} changed while it was read")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises
    ------
    OSError : it is missing or unreadable
    ValueError : it is not JSON (nan and infinity are not), or not an object; a key is there twice
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """Parse one JSON object; `source` names it in errors. See `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):  # the readers of a file might disagree on which one counts
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} is there twice")
    return entries


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")
