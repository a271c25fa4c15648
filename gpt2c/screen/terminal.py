"""The command line's door for text: standard input, output and error that do not end the work.

A stream may fail: its disk is full, its reader or terminal is gone, it is closed or non-blocking,
or its encoding lacks a character. Then the text is replaced or dropped, and the door remembers
that. A model's text cannot control a terminal. Only the command line opens the door; the library
leaves global streams alone.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import select
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from gpt2c.files.untrusted import check_encoding

__all__ = [
    "PLAIN",
    "Door",
    "Terminated",
    "colored",
    "columns",
    "fitted",
    "has_colors",
    "one_line",
    "open_door",
    "padded",
    "spelled",
    "text_input",
    "text_is_lost",
    "visible",
    "well_formed",
    "write_pieces",
]

PATIENCE = 0.5  # seconds to wait for a full non-blocking stream
# C0 except tab and newline, DEL, C1; line separators, and controls of the direction of text
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
PLAIN = "\x1b[0m"  # ends a colour
NAMED = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\"}


class Terminated(KeyboardInterrupt):
    """A signal that ends the program; Ctrl-C may end only the current text."""


class Door(io.TextIOBase):
    """A text stream that accepts whatever is written to it; it replaces sys.stdout.

    Each line, and each flush, is one write to the file itself, so that no buffered text can fail
    when the program ends.

    Parameters
    ----------
    stream : the stream behind it; None if the program was started without one

    Attributes
    ----------
    needed : whether the user wants this text: then a write waits for a full non-blocking stream
        without a limit
    lost : the first error that dropped text, or None
    """

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, stream: Any) -> None:
        self.needed = False
        self.lost: OSError | None = None
        self._stream = stream
        self._pending = ""
        self._stuck = False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.errors = getattr(stream, "errors", None) or "replace"
        self._encoder = codecs.getincrementalencoder(self.encoding)(self.errors)
        self._terminal = self.isatty()
        buffer = getattr(stream, "buffer", None)  # None: a stream of characters, as io.StringIO
        self._file: Any = getattr(buffer, "raw", buffer)
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()

    def write(self, text: str) -> int:
        """Accept text; keep an error of the stream in `lost`."""
        self._pending += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Write the pending text."""
        text, self._pending = self._pending, ""
        if not text or self._stream is None:
            return
        try:
            if self._file is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                self._send(memoryview(self._encode(text)))
        except OSError as error:
            self.lost = self.lost or error
        except ValueError:  # the stream was closed
            self.lost = self.lost or OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _encode(self, text: str) -> bytes:
        try:
            return self._encoder.encode(text)
        except UnicodeEncodeError:  # the stream's own handler fails; write a question mark
            self._encoder.errors = "replace"
            data = self._encoder.encode(text)
            self._encoder.errors = self.errors
            return data

    def _send(self, data: memoryview) -> None:
        while data:
            written = self._file.write(data)
            if written is None:  # a full non-blocking stream
                patience = None if self.needed else 0 if self._stuck else PATIENCE
                self._stuck = not select.select([], [self._file], [], patience)[1]
                if self._stuck:  # one wait until it accepts text again
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            data = data[written or 0 :]
        self._stuck = False

    @property
    def reader_left(self) -> bool:
        """Return whether text was dropped because its reader is gone."""
        gone = isinstance(self.lost, BrokenPipeError)
        return gone or (self._terminal and self.lost is not None and self.lost.errno == errno.EIO)

    def writable(self) -> bool:  # noqa: D102
        return True

    def isatty(self) -> bool:  # noqa: D102
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def fileno(self) -> int:  # noqa: D102
        if self._stream is None:
            raise io.UnsupportedOperation("fileno: there is no stream")
        return int(self._stream.fileno())


@contextmanager
def open_door() -> Iterator[Door]:
    r"""Replace sys.stdout and sys.stderr by doors, and prepare sys.stdin.

    Input is UTF-8, unless the environment names an encoding other than ASCII. Invalid bytes become
    U+FFFD, a byte order mark is dropped, and \r\n is a newline.

    Returns
    -------
    the door of sys.stdout; when the with statement ends, all three streams are as before
    """
    for descriptor in range(3):  # else a file of ours gets this number, and a library writes to it
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, errors = Door(sys.stdout), Door(sys.stderr)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        plain = codecs.lookup(sys.stdin.encoding).name in ("ascii", "utf-8")
        with suppress(OSError, ValueError):  # it has been read from
            sys.stdin.reconfigure(
                encoding="utf-8-sig" if plain else None, errors="replace", newline=None
            )
        with suppress(OSError, ValueError):  # else buffers fail while there is no input yet
            os.set_blocking(sys.stdin.fileno(), True)
    try:
        yield out
    finally:
        out.flush()
        errors.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def text_input() -> TextIO:
    """Return standard input; wait for its first bytes, unless it is a terminal.

    Raises
    ------
    ValueError : the input starts with the mark of UTF-16 or UTF-32, but UTF-8 is read
    """
    buffer = getattr(sys.stdin, "buffer", None)
    is_utf_8 = sys.stdin.encoding == "utf-8-sig"  # as `open_door` sets it
    if is_utf_8 and isinstance(buffer, io.BufferedReader) and not sys.stdin.isatty():
        check_encoding(buffer.peek(4), "standard input")
    return sys.stdin


def well_formed(text: str) -> str:
    """Return an argument's text with its bytes decoded as UTF-8; invalid ones become U+FFFD.

    Python keeps bytes that its locale cannot decode as surrogates. The C locale decodes only ASCII,
    so valid UTF-8 may be among them.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(text: str) -> str:
    """Return text as one printable line, so that an untrusted name cannot control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in well_formed(text))


def visible(text: str) -> str:
    """Return text for standard output: unchanged, but on a terminal without CONTROLS.

    These become U+FFFD: a model must not ring the bell, move the cursor or rename the window.
    """
    return CONTROLS.sub("\ufffd", text) if sys.stdout.isatty() else text


def text_is_lost() -> bool:
    """Return whether standard output has dropped text: then further output is useless."""
    return getattr(sys.stdout, "lost", None) is not None


def write_pieces(pieces: Iterable[str]) -> None:
    """Write a model's text to standard output as it comes, and a newline.

    Stop early if the output drops text.
    """
    try:
        for piece in pieces:
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
            if text_is_lost():
                break
    finally:  # so that an error has a line of its own
        print()


def _in_brackets(error: UnicodeError) -> tuple[str, int]:
    """Return invalid bytes in brackets, with the continuation bytes that follow them."""
    assert isinstance(error, UnicodeDecodeError)
    end = error.end
    while end < len(error.object) and 0x80 <= error.object[end] < 0xC0:
        end += 1
    return f"<{error.object[error.start : end].hex(' ').upper()}>", end


codecs.register_error("gpt2c-brackets", _in_brackets)


def spelled(data: bytes) -> str:
    r"""Return a token's bytes in quotes, as characters of one line.

    Bytes of an incomplete character are in brackets, <E4 BD>; control characters are escapes.
    """
    text = data.decode("utf-8", "gpt2c-brackets")
    shown = "".join(NAMED.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)
    return f"'{shown}'"


def has_colors() -> bool:
    """Return whether colours are shown: on a terminal, unless NO_COLOR is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def colored(text: str, color: str) -> str:
    """Return text in a colour if colours are shown."""
    return f"{color}{text}{PLAIN}" if has_colors() else text


def fitted(text: str) -> str:
    """Return text as one line that fits into the terminal's width; a longer one ends in "..."."""
    width = shutil.get_terminal_size().columns
    line = one_line(text[: width + 1])
    if text[width + 1 :] or columns(line) > width:
        while columns(line) > max(0, width - 3):
            line = line[:-1]
        line += "..."
    return line


def columns(text: str) -> int:
    """Return a text's width in terminal columns; wide characters, such as Chinese, take 2."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def padded(text: str, width: int) -> str:
    """Return text, padded with blanks to a width in columns."""
    return text + " " * (width - columns(text))
