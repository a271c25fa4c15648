"""Untrusted files: sizes, pipes, encodings and JSON are checked before the content is used.

Knows nothing about what the files mean.
"""

from __future__ import annotations

import codecs
import errno
import json
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.atomic import reason, refinement

__all__ = [
    "LARGEST_JSON",
    "LONGEST_VALUE",
    "check_encoding",
    "decode",
    "map_file",
    "not_utf8",
    "open_file",
    "parse_json",
    "parse_json_list",
    "read_bytes",
    "read_header",
    "read_json",
    "read_text",
    "shown",
]

LARGEST_JSON = 1 << 28  # bytes: the files of models and runs are far smaller


LONGEST_VALUE = 120  # characters of an untrusted value in an error


# UTF-32 comes first, because one of its marks begins with one of UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def map_file(path: Path) -> NDArray[np.uint8]:
    """Return a file's bytes, (size,) uint8, read-only: mapped, or read if it cannot be mapped.

    Raises
    ------
    OSError : see `open_file`
    MemoryError : they do not fit into memory
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.empty(0, np.uint8)
        try:
            with refinement():
                # Private, because some file systems refuse shared maps; nothing is written to it.
                memory = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ)
                return np.frombuffer(memory, np.uint8)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise MemoryError(
                f"{path} cannot be mapped, {size:,} bytes: {error.strerror}"
            ) from error
        content = np.fromfile(file, np.uint8, size)
    if len(content) != size:
        raise OSError(f"{path} changed while it was read")
    content.flags.writeable = False
    return content


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read its bytes; a pipe or a device, which might not end, is refused.

    Raises
    ------
    OSError : the file is missing, unreadable, a directory, a pipe or a device
    """

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # else opening a pipe waits for a writer

    with open(path, "rb", opener=at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is a pipe or a device; a file is wanted")
        yield file


def read_header(path: Path, most: int) -> tuple[bytes, int]:
    """Return a file's first bytes, at most `most`, and its size; see `open_file` for errors."""
    with open_file(path) as file:
        return file.read(most), os.fstat(file.fileno()).st_size


def read_bytes(path: Path, most: int = LARGEST_JSON) -> bytes:
    """Read a whole file of at most `most` bytes.

    Raises
    ------
    OSError : see `open_file`; the file grows or shrinks while it is read
    ValueError : it has more bytes
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path} has {size:,} bytes; such a file has at most {most:,}")
        content = file.read(size + 1)
    if len(content) != size:
        raise OSError(f"{path} changed while it was read")
    return content


def decode(content: bytes, source: str, errors: str = "strict") -> str:
    """Decode UTF-8 text, also as editors on Windows write it.

    A byte order mark at the start is dropped, and CR LF becomes LF.

    Parameters
    ----------
    source : names the text in errors
    errors : "replace" turns bytes that are not UTF-8 into U+FFFD

    Raises
    ------
    ValueError : it is not UTF-8, or its first bytes are the mark of another encoding
    """
    check_encoding(content, source)
    try:
        text = content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise not_utf8(source, error, 0) from None
    return text.replace("\r\n", "\n")


def check_encoding(start: bytes, source: str) -> None:
    """Refuse a text whose first bytes (4 are enough) are the mark of another encoding.

    Raises
    ------
    ValueError : it is UTF-16 or UTF-32
    """
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            raise ValueError(f"{source} is {encoding}, not UTF-8; save it as UTF-8")


def not_utf8(source: str, error: UnicodeDecodeError, offset: int) -> ValueError:
    """Return the error for bytes that are not UTF-8 and begin at `offset` in a file."""
    byte = error.object[error.start]
    place = f"byte {offset + error.start:,} is 0x{byte:02x}"
    return ValueError(f"{source} is not UTF-8: {place}; convert it to UTF-8")


def read_text(path: str | os.PathLike[str], errors: str = "strict") -> str:
    """Read a UTF-8 text file, see `decode`; it may be a pipe.

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
    text = decode(content, f"text file {path}", errors)
    if not text:
        raise ValueError(f"text file {path} is empty")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises
    ------
    OSError : it is missing or unreadable
    ValueError : it is not JSON (nan and infinity are not), is not an object, or repeats a key
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """Parse one JSON object; `source` names it in errors. See `read_json`."""
    value = _parsed(text, source)
    if not isinstance(value, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(value).__name__}")
    return value


def parse_json_list(text: str | bytes, source: str) -> list[Any]:
    """Parse one JSON list; `source` names it in errors. See `read_json`."""
    value = _parsed(text, source)
    if not isinstance(value, list):
        raise ValueError(f"{source} must hold a JSON list, got {type(value).__name__}")
    return value


def _parsed(text: str | bytes, source: str) -> Any:
    if isinstance(text, bytes):
        text = decode(text, source)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None


def shown(value: object) -> str:
    """Return a value, or the text of an exception, as one printable line for an error.

    A long or deeply nested value is shortened.
    """
    short = Repr()
    short.maxlevel, short.maxstring = 3, LONGEST_VALUE
    text = reason(value) if isinstance(value, Exception) else short.repr(value)
    cut = text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):  # readers of the file might disagree on which one counts
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{shown(counts.most_common(1)[0][0])} is there twice")
    return entries


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")
