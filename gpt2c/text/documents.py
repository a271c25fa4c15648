"""Users' texts, read piece by piece: plain files, JSONL, directories, standard input.

A file of any size takes no more memory than a small one. Knows nothing about tokens.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, BinaryIO

from gpt2c.files import atomic, untrusted
from gpt2c.files.names import MERGES_FILE, METRICS_FILE, check_named
from gpt2c.screen.terminal import one_line
from gpt2c.text.vocabulary import END_OF_TEXT

__all__ = ["JSON_LINES", "PLAIN", "TextFiles"]

PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")
JSON_LINES = (".jsonl", ".ndjson")
OWN = (METRICS_FILE, MERGES_FILE)  # files that gpt2c writes with such endings; they are not texts
_PIECE = 1 << 16  # bytes
_MOST_BLANK = 1 << 20  # blanks that are kept until other characters of the document come
_LONGEST = 1 << 26  # bytes of a line of JSONL, which is read whole


class TextFiles:
    """The documents of text files, in order; each iteration reads the files again.

    A document is an iterator of pieces (strings), valid until the next document. In a plain text
    "<|endoftext|>" ends a document, and so does the end of a file. In JSONL each line is an object
    with a document in one field; there, too, "<|endoftext|>" ends a document. Blank documents are
    left out. CR LF, the end of a line on Windows, becomes LF.

    Parameters
    ----------
    paths : files, which may be pipes; "-" for standard input; and directories. All files in and
        below a directory with the endings PLAIN and JSON_LINES, in upper or lower case, are read,
        sorted by name; names that begin with a dot are ignored. A line on standard error names each
        that is left out because it cannot be read, is not a file, is a link to a directory, or has
        a name of OWN
    field : the field of JSONL, None for "text". If it is given, files with none of those endings
        are JSONL, too
    watch : called often while the files are read, with the bytes read since the iteration began,
        and the bytes of all files, 0 if unknown, as for a pipe

    Attributes
    ----------
    names : the names of the files

    Raises
    ------
    OSError : a file is missing, cannot be read, is a device, or changes while it is read
    ValueError : a file or its name is empty, a file is not UTF-8, a line is not JSON or lacks the
        field, or a directory has no texts
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        field: str | None = None,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        self._field, self._watch = field, watch
        self._stack = ExitStack()
        self._kept: dict[str, BinaryIO] = {}  # copies of inputs that can be read only once
        self._seen: dict[str, tuple[int, int]] = {}
        self._may_be_empty: set[str] = set()
        self.names: list[str] = []
        try:
            for given in paths:
                check_named("the name of the text", given)
                path = os.fspath(given)
                if path != "-" and os.path.isdir(path):
                    found = list(map(str, _texts_in(Path(path))))
                    self._may_be_empty.update(found)
                    self.names += found
                else:
                    self.names.append(path)
                    self._keep(path)
            self._size = sum(map(self._size_of, self.names))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TextFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the copies of pipes and standard input."""
        self._stack.close()

    def _keep(self, name: str) -> None:
        """Copy a pipe or standard input to a temporary file; refuse a device, which has no end."""
        if name == "-":
            source: Any = sys.stdin.buffer
        else:
            try:
                mode = os.stat(name).st_mode
            except FileNotFoundError:
                raise FileNotFoundError(f"text file {name} does not exist") from None
            if stat.S_ISCHR(mode):  # /dev/zero
                raise OSError(f"text file {name} is a device; a file or a pipe is wanted")
            if not stat.S_ISFIFO(mode):
                return
            source = self._stack.enter_context(open(name, "rb"))
        copy = self._stack.enter_context(tempfile.TemporaryFile())
        with atomic.naming(Path(tempfile.gettempdir())):
            # After a read beyond the end, a person at a terminal must press Ctrl-D again.
            while content := source.read1(_PIECE):
                copy.write(content)
                if self._watch:
                    self._watch(copy.tell(), 0)
            copy.flush()
        self._kept[name] = copy

    def __iter__(self) -> Iterator[Iterator[str]]:
        """Yield the documents, each an iterator of its pieces."""
        before = 0
        for name in self.names:
            lines = _ends(name, JSON_LINES)
            if self._field is not None and not _ends(name, PLAIN):
                lines = True
            with self._open(name) as file:
                flow = self._lines(name, file) if lines else self._plain(name, file)
                yield from _documents(self._watched(flow, file, before))
                before += file.tell()

    def _watched(
        self, flow: Iterator[str | None], file: BinaryIO, before: int
    ) -> Iterator[str | None]:
        """Yield the pieces of `flow`, and report to `watch` how much is read."""
        told = -_PIECE
        for piece in flow:
            if self._watch and file.tell() - told >= _PIECE:  # lines of JSONL are short
                told = file.tell()
                self._watch(before + told, self._size)
            yield piece
        if self._watch:
            self._watch(before + file.tell(), self._size)

    def _size_of(self, name: str) -> int:
        kept = self._kept.get(name)
        return os.stat(name if kept is None else kept.fileno()).st_size

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file; refuse one that has changed since it was first read."""
        if name in self._kept:
            self._kept[name].seek(0)
            yield self._kept[name]
            return
        with untrusted.open_file(Path(name)) as file:
            self._check_same(name, file)
            yield file
            self._check_same(name, file)

    def _check_same(self, name: str, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        mark = (status.st_size, status.st_mtime_ns)
        if self._seen.setdefault(name, mark) != mark:
            raise OSError(f"text file {name} changed while it was read")

    def _plain(self, name: str, file: BinaryIO) -> Iterator[str | None]:
        """Yield pieces of text, and None where a document ends."""
        source = _source(name)
        pieces = _decoded(file, source)
        first = next(pieces, None)
        if first is None:
            if name not in self._may_be_empty:
                raise ValueError(f"{source} is empty")
            return
        yield from _at_marks(chain([first], pieces))

    def _lines(self, name: str, file: BinaryIO) -> Iterator[str | None]:
        """Yield the texts of JSONL, and None where a document ends."""
        wanted = self._field or "text"
        number = 0
        while line := file.readline(_LONGEST + 1):
            number += 1
            source = f"{_source(name)}, line {number:,}"
            if len(line) > _LONGEST:
                raise ValueError(f"{source} has more than {_LONGEST:,} bytes")
            text = untrusted.decode(line, source)
            if not text.strip():
                continue
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source} is not valid JSON: {error}") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{source} must be a JSON object, got {type(entry).__name__}")
            if wanted not in entry:
                there = ", ".join(untrusted.shown(key) for key in list(entry)[:8]) or "none"
                raise ValueError(
                    f"{source} has no field {untrusted.shown(wanted)}; its fields are {there}:"
                    " choose one with --text-field"
                )
            document = entry[wanted]
            if not isinstance(document, str):
                raise ValueError(
                    f"{source}: {untrusted.shown(wanted)} must be a string, got"
                    f" {type(document).__name__}"
                )
            yield from _at_marks([document.replace("\r\n", "\n")])
        if not number and name not in self._may_be_empty:
            raise ValueError(f"{_source(name)} is empty")


def _source(name: str) -> str:
    return "standard input" if name == "-" else f"text file {name}"


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    """Return whether a name has one of these endings, in upper or lower case."""
    return name.lower().endswith(endings)


def _texts_in(directory: Path) -> list[Path]:
    """Return the text files of a directory, sorted."""

    def leave_out_folder(error: OSError) -> None:
        if error.filename == str(directory):
            raise error
        _leave_out(error.filename, f"it cannot be read ({error.strerror})")

    found = []
    for folder, subfolders, names in os.walk(directory, onerror=leave_out_folder):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for path in (Path(folder, name) for name in subfolders):
            if path.is_symlink():  # it may lead back to a directory that is read already
                _leave_out(path, "it is a link to a directory")
        for path in (Path(folder, name) for name in names):
            if path.name[0] == "." or not _ends(path.name, PLAIN + JSON_LINES):
                continue
            if reason := _no_text(path):
                _leave_out(path, reason)
            else:
                found.append(path)
    if not found:
        endings = ", ".join(f"*{ending}" for ending in PLAIN + JSON_LINES)
        raise ValueError(f"directory {directory} has no text files ({endings})")
    return sorted(found)


def _no_text(path: Path) -> str:
    """Return why a file of a directory is not read as a text, "" if it is."""
    if path.name in OWN:
        return "gpt2c writes such a file itself"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if not stat.S_ISREG(mode):
        return "it is a pipe, a socket or a device"
    return "" if os.access(path, os.R_OK) else "there is no permission to read it"


def _leave_out(path: str | Path, reason: str) -> None:
    print(f"gpt2c: {one_line(str(path))} is left out: {reason}", file=sys.stderr)


def _decoded(file: BinaryIO, source: str) -> Iterator[str]:
    """Decode a file as `untrusted.decode` does, but piece by piece; no piece is empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    content = file.read(_PIECE)
    untrusted.check_encoding(content[:4], source)
    offset = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    content = content[offset:]
    held = ""  # a CR whose LF may begin the next piece
    ended = False
    while not ended:
        following = file.read(_PIECE)
        ended = not following
        kept = len(decoder.getstate()[0])
        try:
            text = held + decoder.decode(content, final=ended)
        except UnicodeDecodeError as error:
            raise untrusted.not_utf8(source, error, offset - kept) from None
        offset += len(content)
        held = "\r" if text.endswith("\r") and not ended else ""
        text = text[: len(text) - len(held)].replace("\r\n", "\n")
        if text:
            yield text
        content = following


def _at_marks(pieces: Iterable[str]) -> Iterator[str | None]:
    """Yield pieces, and None where a document ends: at each "<|endoftext|>" and at the end.

    The mark may begin in one piece and end in another.
    """
    held = ""
    for piece in pieces:
        *whole, held = (held + piece).split(END_OF_TEXT)
        for text in whole:
            yield text
            yield None
        starts = range(max(0, len(held) - len(END_OF_TEXT) + 1), len(held))
        place = next((i for i in starts if END_OF_TEXT.startswith(held[i:])), len(held))
        yield held[:place]
        held = held[place:]
    yield held
    yield None


def _documents(flow: Iterator[str | None]) -> Iterator[Iterator[str]]:
    """Gather pieces into documents; leave out documents with nothing but blanks.

    A blank document of more than `_MOST_BLANK` characters stays, and every tokenizer refuses it.
    """
    blank: list[str] = []
    for piece in flow:
        if piece is None:
            blank = []
        elif not piece.strip() and sum(map(len, blank)) < _MOST_BLANK:
            blank.append(piece)
        else:
            rest = takewhile(lambda piece: piece is not None, flow)
            document = (piece for piece in chain(blank, [piece], rest) if piece)
            blank = []
            yield document
            deque(document, 0)  # skip what its reader left
