"""Ctrl-C while gpt2c imports NumPy, before the command line begins."""

from __future__ import annotations

import signal
import sys


class Press:
    """An import hook that finds no module, and presses Ctrl-C when NumPy is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "numpy":
            signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.meta_path.insert(0, Press())
    sys.argv = ["gpt2c", "info"]
    from gpt2c.__main__ import run

    sys.exit(run())
