"""Windows of a text: parts that tiktoken encodes at a time, cut where no token crosses the cut.

A text comes in pieces of any size. `split_text` makes pieces for tiktoken of them, `Reader` holds
enough of them to look beyond the end of a window, and `whole_window` chooses where it ends.

Knows nothing about vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpt2c.text.splits import Split

__all__ = ["SPACES", "TRIES", "WINDOW", "Reader", "is_inside", "split_text", "whole_window"]

WINDOW = 1 << 16  # characters that tiktoken encodes at a time
# What the pattern's \\s matches. Python's own \\s and isspace match four more, 0x1c to 0x1f.
SPACES = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# tiktoken matches the pattern with a stack of about a million entries and panics beyond; stay well
# below.
_MAX_SPACES = 400_000
TRIES = 16  # cuts that are tried before the window grows


def split_text(pieces: Iterable[str]) -> Iterator[str]:
    """Split a text that comes in pieces into pieces of at most about `WINDOW` characters.

    A pair of surrogates becomes its character. A lone surrogate, which has no UTF-8, becomes
    U+FFFD.

    Raises
    ------
    ValueError : a run of whitespace is too long for tiktoken
    """
    held, run = "", 0
    for piece in pieces:
        for start in range(0, len(piece), WINDOW):
            part = held + piece[start : start + WINDOW]
            held = ""
            if "\ud800" <= part[-1] <= "\udbff":  # the other half may begin the next piece
                part, held = part[:-1], part[-1]
            inner = part.lstrip(SPACES)
            run += len(part) - len(inner)
            if run >= _MAX_SPACES:
                raise ValueError(
                    f"the text has a run of {_MAX_SPACES} or more whitespace characters, "
                    "more than the tokenizer can split; shorten it"
                )
            if inner:
                run = len(inner) - len(inner.rstrip(SPACES))
            if part:
                yield _with_bytes(part)
    if held:
        yield _with_bytes(held)


def _with_bytes(text: str) -> str:
    """Replace surrogates as `split_text` describes; most texts have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def whole_window(text: str, size: int, ended: bool, split: Split) -> tuple[int, bool]:
    """Choose how much of a text to encode at once, about `size` characters.

    Returns
    -------
    the number of characters, and whether a cut there keeps the ids of the whole text. No token has
    whitespace after another character, so no token crosses a cut between the two; but some splits
    keep line ends with the punctuation before them
    """
    if ended and len(text) <= size:
        return len(text), True
    end = size + 1
    for _ in range(TRIES):
        last = max(text.rfind(space, 0, end) for space in SPACES)
        place = len(text[: last + 1].rstrip(SPACES))
        if not (place and split.keeps_line_ends and text[place] in "\r\n"):
            break
        if text[place - 1].isalnum():
            break
        end = place
    else:
        place = 0
    return (place, True) if place else (size, False)


def is_inside(text: str, place: int) -> bool:
    """Return whether a place is within letters or within punctuation, for `keeps_line_ends`.

    There one character of punctuation belongs to the letters behind it, and digits are counted.
    """
    around = text[place - 1 : place + 2]
    return around[:2].isalpha() or not any(map(str.isalnum, around))


class Reader:
    """A buffer of a text in pieces, to look beyond the end of a window."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._parts = split_text(pieces)
        self.text = ""
        self.ended = False

    def fill(self, size: int) -> None:
        """Read until there are more than `size` characters, or the text ends."""
        parts = [self.text]
        have = len(self.text)
        while have <= size and not self.ended:
            if part := next(self._parts, ""):
                parts.append(part)
                have += len(part)
            else:
                self.ended = True
        self.text = "".join(parts)

    def take(self, size: int) -> str:
        """Return the first `size` characters and drop them."""
        taken, self.text = self.text[:size], self.text[size:]
        return taken
