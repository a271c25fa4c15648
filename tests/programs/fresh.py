"""A fresh process: what it prints, imports, reads and computes, and that it can end."""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np

import gpt2c
from gpt2c.cli.main import main as command
from gpt2c.kernels.backend import BackendName, get_backend
from gpt2c.parallel import world
from gpt2c.screen.terminal import open_door
from gpt2c.text.shards import read_tokens
from programs.common import main

CONFIG = gpt2c.GPT2Config(vocab_size=11, n_positions=64, n_embd=12, n_layer=1, n_head=3)


def step(backend: BackendName) -> None:
    model = gpt2c.GPT2(CONFIG, backend=backend)
    optimizer = gpt2c.AdamW(model)
    idx = np.arange(8).reshape(1, 8)
    model.loss(idx, idx)
    model.backward()
    optimizer.step(grad_clip=1.0)
    print(model.generate(idx, 2, temperature=0).shape)


def leave_engines() -> None:
    """End while one engine is idle and another one generates."""
    idle = gpt2c.Engine(gpt2c.GPT2(CONFIG))
    busy = gpt2c.Engine(gpt2c.GPT2(CONFIG))
    request = busy.submit([1, 2, 3], max_new_tokens=100_000_000)
    print(type(next(iter(request))).__name__, len({idle, busy}))


def imports(*arguments: str) -> None:
    """Run a command, then print the names of all modules."""
    command(arguments)
    print(*sys.modules)


def teams() -> None:
    """Print how many threads the kernels have, of which the first may be bound to a core."""
    print(*(get_backend(name).threads for name in ("auto", "base", "auto")))


def compute(name: str) -> None:
    """Read a model and token ids; write the model as it is now, and its logits."""
    file = Path(name)
    model, idx = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps((model, model(idx))))


def read_and_truncate(name: str) -> None:
    """Read all tokens of a file, and print their sum when the file has none any more."""
    tokens = read_tokens(Path(name))
    os.truncate(name, 0)
    print(tokens.sum(dtype=int))


def number_of_a_file() -> None:
    """Print the number that a file gets while the door is open."""
    with open_door():
        print(os.dup(0))


def join_world() -> None:
    world.join()
    print(*sys.modules)


def join_late() -> None:
    """Train on a rank, with a limit of two seconds; the other one sleeps before it starts MPI."""
    launched = world.launched()
    if launched and launched.rank:
        time.sleep(60)
    sys.argv = ["gpt2c", "train", "--data", "none", "--out", "none", "--mpi-timeout", "2"]
    command()


if __name__ == "__main__":
    main(globals())
