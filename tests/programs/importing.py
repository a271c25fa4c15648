"""Ctrl-C while gpt2c imports NumPy, before its command line begins; this file imports neither."""

from __future__ import annotations

import signal
import sys


class Press:
    """A finder of modules that finds none, and presses Ctrl-C when NumPy is looked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "numpy":
            signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.meta_path.insert(0, Press())
    sys.argv = ["gpt2c", "info"]
    from gpt2c.__main__ import run

    sys.exit(run())
