"""Processes: the commands of gpt2c and of tests/programs, and a model whose text is known."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from gpt2c.gpt2 import GPT2
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.text.tokenizer import Tokenizer

COMMAND = [sys.executable, "-W", "error", "-m", "gpt2c"]
TINY = (
    "--n-layer 1 --n-head 2 --n_embd 16 --block-size 16 --batch_size 4 --max-iters 20"
    " --warmup-iters 2 --learning-rate 1e-2"
)
# The line of standard error after a text.
SPEED = r"(\d+) tokens? in \d+\.\d\d s, \d+\.\d tokens/s \(loaded in \d+\.\d\d s\)\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what it was shown."""

    def isatty(self) -> bool:
        return True


def environment(**variables: str) -> dict[str, str]:
    """Return this process's variables and these; PYTHONPATH has the modules that tests import."""
    modules = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, **variables, "PYTHONPATH": modules}


def program(module: str, *arguments: str, flags: tuple[str, ...] = ()) -> list[str]:
    """Return the command of a program of tests/programs; a warning is an error there."""
    return [sys.executable, "-B", "-W", "error", *flags, "-m", module, *arguments]


def run_process(
    command: list[str], cwd: Path | None = None, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, or kill it after `timeout` seconds; return its output as text."""
    place = {"cwd": cwd, "env": environment(**variables)}
    return subprocess.run(command, **place, timeout=timeout, capture_output=True, text=True)


def crafted(directory: Path, third: int, later: int) -> str:
    """Save a model that sees positions only: token `third` comes third, then always `later`."""
    model = GPT2(GPT2Config(257, n_positions=8, n_embd=2, n_layer=1, n_head=1), seed=None)
    model.parameters["ln_f.weight"][...] = 1
    model.parameters["wpe.weight"][...] = -100, 100
    model.parameters["wpe.weight"][1] = 100, -100
    model.parameters["wte.weight"][later] = -9, 9
    model.parameters["wte.weight"][third] = 9, -9
    model.save_pretrained(directory)
    Tokenizer.from_name("bytes").save_pretrained(directory)
    return str(directory)
