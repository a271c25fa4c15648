"""Commands of gpt2c in messages, ready to be pasted into a shell.

Knows nothing about what the commands do.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["command"]


def command(*words: str | Path, ranks: int = 1) -> str:
    """Return a shell command that calls gpt2c as it was called now, with other arguments.

    Its hosts are not known here: several ranks are those of one machine.
    """
    launcher = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    return shlex.join([*launcher, *_program(), *map(str, words)])


def _program() -> list[str]:
    """Return the words that call this program: its name if the shell finds it by name."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py" and path.parent.name == "gpt2c":
        return [sys.orig_argv[0], "-m", "gpt2c"]
    found = shutil.which("gpt2c")
    if path.name == "gpt2c" and not (found and os.path.realpath(found) == os.path.realpath(path)):
        return [sys.argv[0]]
    return ["gpt2c"]  # also for a program that calls gpt2c.cli.main.main
