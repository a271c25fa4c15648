"""A fresh process: a training step prints nothing, and running engines do not delay the exit."""

from __future__ import annotations

import numpy as np

import gpt2c
from gpt2c.kernels.backend import BackendName
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


if __name__ == "__main__":
    main(globals())
