"""How often loading a model opens each of its files. An audit hook stays, so: a process."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import gpt2c
from programs.common import main


def count(path: str) -> None:
    """Load a model; print how often Python opens each file of its directory."""
    opened = Counter[str]()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        # open() with an opener reports itself, with its mode, and the os.open inside, without
        if event == "open" and arguments[1] and str(arguments[0]).startswith(path):
            opened[os.path.relpath(arguments[0], path)] += 1

    sys.addaudithook(note)
    gpt2c.from_pretrained(path)
    print(*(f"{name} {times}" for name, times in sorted(opened.items())), sep="\n")


if __name__ == "__main__":
    main(globals())
