"""The process of a row in before.py and busy.py: it works when it is told to, and times itself.

    python benchmarks/worker.py LAYERS CHANNELS HEADS VOCABULARY B T WORK

WORK is train, decode (T tokens, of which 3 are given) or prefill. It prints "ready" when it is
warm; then, for each line with a number of seconds, the mean seconds of one work in that time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

import gpt2c


def main() -> None:
    """Warm up, then work as long as each line says."""
    *sizes, name = sys.argv[1:]
    work = worker(name, *map(int, sizes))
    work()
    print("ready", flush=True)
    for line in sys.stdin:
        count, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < float(line):
            work()
            count += 1
        print(seconds / count, flush=True)


def worker(name: str, L: int, C: int, NH: int, V: int, B: int, T: int) -> Callable[[], object]:
    """Return a function that does the work once."""
    config = gpt2c.GPT2Config(
        n_layer=L, n_embd=C, n_head=NH, vocab_size=V, n_positions=max(T + 1, 64)
    )
    model = gpt2c.GPT2(config, seed=1)
    idx = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    if name == "decode":
        return lambda: model.generate(idx[:, :3], T - 3, temperature=0)
    if name == "prefill":
        return lambda: model.generate(idx, 1, temperature=0)
    optimizer = gpt2c.AdamW(model)

    def train() -> None:
        model.zero_grad()
        model.loss(idx, idx)
        model.backward()
        optimizer.step(grad_clip=1.0)

    return train


if __name__ == "__main__":
    main()
