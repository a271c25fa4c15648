"""Disks: writes fail beyond a size, a file shrinks while it is read, and a run stays locked."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.cli import main as cli
from gpt2c.formats import convert
from gpt2c.formats.huggingface import save_weights
from gpt2c.train.directory import locked_run
from programs.common import main


def limit_files(size: int) -> None:
    """Make a write fail that would make a file longer than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def command(size: str, *arguments: str) -> None:
    """Run gpt2c where no file may be longer than `size` bytes."""
    limit_files(int(size))
    sys.exit(cli.main(list(arguments)))


def save(directory: str, part: str) -> None:
    """Save a model of which one part, "config" or "model", does not fit; print the error."""
    large, small = np.ones(5000, np.float32), np.ones(5, np.float32)
    config = {"text": "x" * 20000} if part == "config" else {}
    limit_files(8192)
    try:
        save_weights(directory, config, {"wte.weight": large if part == "model" else small})
    except OSError as error:
        print(error)
    else:
        sys.exit("the save did not fail")


def shrink(path: str, *arguments: str) -> None:
    """Run gpt2c convert; cut its source short after it was opened and before it is read."""
    claim = convert._claim

    def claim_then_cut(*arguments: Any) -> None:
        claim(*arguments)
        os.truncate(path, 1 << 16)

    convert._claim = claim_then_cut  # type: ignore[assignment]
    sys.exit(cli.main(["convert", *arguments]))


def hold(out: str) -> None:
    """Lock a run until this process is killed."""
    with locked_run(Path(out)):
        print("locked", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(globals())
