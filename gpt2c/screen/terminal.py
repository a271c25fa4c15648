"""The command line's one door for text: standard input, output and error as they may really be.

A full disk, a reader that has left, a terminal that is gone, a stream that was closed or does not
wait, an encoding that lacks a character: none of it ends the work. What a stream cannot take is
replaced or dropped, and the door remembers that. Text of a model's is shown so that it cannot
steer a terminal. Only the command line opens the door; the library leaves global streams alone.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import select
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

PATIENCE = 0.5  # seconds for a stream that does not wait and is full
# C0 but for tab and newline, DEL, C1; separators of lines, and what turns the direction of a line
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
PLAIN = "\x1b[0m"  # ends a colour
NAMED = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\"}


class Terminated(KeyboardInterrupt):
    """A signal that ends the program, where Ctrl-C may end a text only."""


class Door(io.TextIOBase):
    """A text stream that takes whatever is written to it; put in the place of sys.stdout.

    Each line, and each flush, is one write to the file itself: nothing waits in a buffer that
    could fail when the program ends.

    Parameters
    ----------
    stream : the stream behind it; None where the program was started without one

    Attributes
    ----------
    needed : whether its text is what the user wants: then a full stream that does not wait is
        waited for, however long
    lost : the first error for which text was dropped, or None
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
        buffer = getattr(stream, "buffer", None)  # none: a stream of characters, as io.StringIO
        self._file: Any = getattr(buffer, "raw", buffer)
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()

    def write(self, text: str) -> int:
        """Take text, whatever becomes of it."""
        self._pending += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Write what was taken."""
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
        except ValueError:  # it was closed meanwhile
            self.lost = self.lost or OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _encode(self, text: str) -> bytes:
        try:
            return self._encoder.encode(text)
        except UnicodeEncodeError:  # by the stream's own rule; ours is a question mark
            self._encoder.errors = "replace"
            data = self._encoder.encode(text)
            self._encoder.errors = self.errors
            return data

    def _send(self, data: memoryview) -> None:
        while data:
            written = self._file.write(data)
            if written is None:  # it is full and does not wait
                patience = None if self.needed else 0 if self._stuck else PATIENCE
                self._stuck = not select.select([], [self._file], [], patience)[1]
                if self._stuck:  # one wait is enough until it takes something again
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            data = data[written or 0 :]
        self._stuck = False

    @property
    def reader_left(self) -> bool:
        """Return whether text was dropped because nobody is there to read it."""
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
    r"""Put a door in the place of sys.stdout and of sys.stderr, and prepare sys.stdin.

    What is read is UTF-8 unless the environment names another encoding than ASCII: bytes that are
    none become U+FFFD, a byte order mark is dropped, and \r\n is a newline.

    Returns
    -------
    (in a with statement) the door of sys.stdout; when it ends, both streams are as before
    """
    for descriptor in range(3):  # else a file of ours gets the number, and a library writes to it
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
        with suppress(OSError, ValueError):  # it was read from already
            sys.stdin.reconfigure(
                encoding="utf-8-sig" if plain else None, errors="replace", newline=None
            )
        with suppress(OSError, ValueError):  # or Python's buffers fail where nothing is there yet
            os.set_blocking(sys.stdin.fileno(), True)
    try:
        yield out
    finally:
        out.flush()
        errors.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def text_input() -> TextIO:
    """Return standard input, whose first bytes have come: it waits for them, but for no terminal's.

    Raises
    ------
    ValueError : they are the mark of UTF-16 or UTF-32, where UTF-8 is read
    """
    buffer = getattr(sys.stdin, "buffer", None)
    is_utf_8 = sys.stdin.encoding == "utf-8-sig"  # as `open_door` sets it
    if is_utf_8 and isinstance(buffer, io.BufferedReader) and not sys.stdin.isatty():
        check_encoding(buffer.peek(4), "standard input")
    return sys.stdin


def well_formed(text: str) -> str:
    """Return an argument's text with the bytes that are not UTF-8 as U+FFFD.

    Python keeps bytes that its locale cannot decode as surrogates: in the locale C even those of
    UTF-8, which become characters here.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(text: str) -> str:
    """Return text as one printable line, whatever a stranger's name would do to a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in well_formed(text))


def visible(text: str) -> str:
    """Return text as standard output may have it: unchanged, but on a terminal without controls.

    There control characters but newline and tab become U+FFFD: a model must not ring the bell,
    move the cursor or name the window.
    """
    return CONTROLS.sub("\ufffd", text) if sys.stdout.isatty() else text


def text_is_lost() -> bool:
    """Return whether standard output dropped text: then more of it is for nobody."""
    return getattr(sys.stdout, "lost", None) is not None


def write_pieces(pieces: Iterable[str]) -> None:
    """Write a model's text to standard output as it comes, and a newline.

    It ends early where the output takes no more.
    """
    try:
        for piece in pieces:
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
            if text_is_lost():
                break
    finally:  # an error stands on a line of its own
        print()


def _in_brackets(error: UnicodeError) -> tuple[str, int]:
    """Spell bytes that begin no character, and the rest of one that began before."""
    assert isinstance(error, UnicodeDecodeError)
    end = error.end
    while end < len(error.object) and 0x80 <= error.object[end] < 0xC0:
        end += 1
    return f"<{error.object[error.start : end].hex(' ').upper()}>", end


codecs.register_error("gpt2c-brackets", _in_brackets)


def spelled(data: bytes) -> str:
    r"""Return a token's bytes in quotes, as characters of one line.

    Bytes that are a part of a character stand in brackets, <E4 BD>, control characters as escapes.
    """
    text = data.decode("utf-8", "gpt2c-brackets")
    shown = "".join(NAMED.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)
    return f"'{shown}'"


def has_colors() -> bool:
    """Return whether colours are shown: on a terminal, unless the user's NO_COLOR says no."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def colored(text: str, color: str) -> str:
    """Return text in a colour where colours are shown."""
    return f"{color}{text}{PLAIN}" if has_colors() else text


def columns(text: str) -> int:
    """Return how many columns a terminal gives a text: 2 for each wide character, as of Chinese."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def padded(text: str, width: int) -> str:
    """Return text with blanks after it up to a width in columns."""
    return text + " " * (width - columns(text))
