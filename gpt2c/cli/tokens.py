"""`gpt2c tokens`: a text in, its tokens out: pieces, ids, bytes."""

from __future__ import annotations

import argparse
import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2c.kernels.checks import counted
from gpt2c.screen.terminal import (
    PLAIN,
    colored,
    columns,
    has_colors,
    padded,
    spelled,
    text_input,
    visible,
    well_formed,
)
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.text.vocabulary import has_tokenizer

__all__ = ["add_flags", "run_tokens", "whole_characters"]

DEMO = Path("runs/demo/run")
COLORS = ("\x1b[30;46m", "\x1b[30;43m")  # black on cyan, black on yellow
PARTS = "Some characters take several tokens here; the text above joins them."


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c tokens`."""
    verb.set_defaults(any_text=True)
    verb.epilog = (
        "First the text, divided where a token ends: by | or, on a terminal, by colours. A token"
        " may be only a part of a character's bytes, so those of one character stand together. Then"
        " a line for each token: a part of a character is spelled as its bytes, <E4 BD>."
    )
    verb.add_argument(
        "text", metavar="TEXT", nargs="+", help="joined by blanks; - alone reads standard input"
    )
    verb.add_argument(
        "--special",
        action="store_true",
        help="read special tokens such as <|endoftext|> in the text as tokens",
    )
    verb.add_argument(
        "--tokenizer",
        help=f"a run or another directory with one, gpt2, or bytes (default: {DEMO}'s where it is,"
        " else bytes)",
    )


def run_tokens(options: argparse.Namespace) -> int:
    """`gpt2c tokens`."""
    name = options.tokenizer
    if name is None:
        name = str(DEMO) if has_tokenizer(DEMO) else "bytes"
    tokenizer = Tokenizer.from_spec(name)
    text = " ".join(map(well_formed, options.text))
    if text == "-":
        text = text_input().read()
    ids = tokenizer.encode(text, "all" if options.special else ())
    data = [tokenizer.token_bytes(token) for token in ids]
    print(
        f"{name}, a vocabulary of {tokenizer.vocab_size:,}: {counted(len(ids), 'token')},"
        f" {counted(len(text), 'character')}, {counted(len(text.encode()), 'byte')}"
    )
    if not ids:
        return 0
    whole = list(whole_characters(data))
    print(f"\n{_divided(whole)}\n")
    if len(whole) < len(ids):
        print(f"{PARTS}\n")
    pieces = ["piece", *map(spelled, data)]
    width = max(map(columns, pieces))
    digits = max(2, len(str(max(ids))))
    for token, piece, part in zip(["id", *ids], pieces, [None, *data], strict=True):
        hexadecimal = "bytes" if part is None else part.hex(" ").upper()
        print(f"{token:>{digits}}  {padded(piece, width)}  {hexadecimal}")
    return 0


def whole_characters(data: Sequence[bytes]) -> Iterator[str]:
    """Yield the text of each token, or of several together where a character spans them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    for part in data:
        text += decoder.decode(part)
        if not decoder.getstate()[0]:  # no character has begun
            yield text
            text = ""
    if text := text + decoder.decode(b"", final=True):
        yield text


def _divided(pieces: list[str]) -> str:
    """Return pieces side by side: on two colours in turn on a terminal, else with | between."""
    if not has_colors():
        return "|".join(map(visible, pieces))
    shown = []
    for number, piece in enumerate(pieces):
        color = COLORS[number % 2]
        lines = visible(piece).replace("\n", f"{PLAIN}\n{color}")  # else the colour fills the line
        shown.append(colored(lines, color))
    return "".join(shown)
