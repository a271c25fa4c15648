"""The report before the first step: what was kept and left out, and an example in colour."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpt2c.screen.terminal import colored, has_colors, visible
from gpt2c.text.examples import Example
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Counts", "coloured", "held"]

GREEN = "\x1b[32m"
LONGEST = 400  # tokens of an example that are shown


class Counts(dict[str, int]):
    """How many examples were left out, for each reason, as a text."""

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.items()) or "none"

    def __init__(self, counts: Mapping[str, int]) -> None:
        super().__init__(counts)


def held(count: int, cut: int = 0) -> str:
    """Return how many examples are held out, perhaps none, and how many of all are cut."""
    told = f"{count:,} held out" if count else "none held out, so the figures are of learned ones"
    return f"{told}, {cut:,} cut at the end" if cut else told


def coloured(example: Example, tokenizer: Tokenizer) -> str:
    """Return how its learned part is marked, and the text: in green, or between [[ and ]]."""
    first, marks = example.ids[:LONGEST], example.learned[:LONGEST]
    changes = np.flatnonzero(np.diff(marks)) + 1
    texts = []
    for ids, learned in zip(np.split(first, changes), np.split(marks, changes), strict=True):
        text = visible(tokenizer.decode(ids.tolist()))
        if learned[0]:
            text = colored(text, GREEN) if has_colors() else f"[[{text}]]"
        texts.append(text)
    how = "in green" if has_colors() else "between [[ and ]]"
    rest = " ..." if len(example.ids) > LONGEST else ""
    return f"{how}:\n{''.join(texts)}{rest}"
