"""The command line in a process of its own: a small run, and a model whose text is known."""

from __future__ import annotations

import sys
from pathlib import Path

from gpt2c.gpt2 import GPT2
from gpt2c.model.config import GPT2Config
from gpt2c.text.tokenizer import Tokenizer

COMMAND = [sys.executable, "-W", "error", "-m", "gpt2c"]
TINY = (
    "--n-layer 1 --n-head 2 --n_embd 16 --block-size 16 --batch_size 4 --max-iters 20"
    " --warmup-iters 2 --learning-rate 1e-2"
)


def crafted(directory: Path, third: int, later: int) -> str:
    """Save a model of bytes that sees positions only: a third token, then always another."""
    model = GPT2(GPT2Config(257, n_positions=8, n_embd=2, n_layer=1, n_head=1), seed=None)
    model.parameters["ln_f.weight"][...] = 1
    model.parameters["wpe.weight"][...] = -100, 100
    model.parameters["wpe.weight"][1] = 100, -100
    model.parameters["wte.weight"][later] = -9, 9
    model.parameters["wte.weight"][third] = 9, -9
    model.save_pretrained(directory)
    Tokenizer.from_name("bytes").save_pretrained(directory)
    return str(directory)
