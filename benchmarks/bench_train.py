"""One training step of GPT-2 124M, AdamW and clipping included: seconds and peak memory.

python -m pytest benchmarks/bench_train.py      every backend
python benchmarks/bench_train.py avx512 4 64    one backend at B=4, T=64, alone in its process
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import gpt2c

B, T = 4, 64


def make_step(backend: Any, batch_size: int, block_size: int) -> Callable[[], float]:
    """Give a function that does a step on random tokens: speed does not depend on their values."""
    model = gpt2c.GPT2(gpt2c.GPT2Config(), backend=backend)
    optimizer = gpt2c.AdamW(model, learning_rate=1e-4)
    rng = np.random.default_rng(1337)
    tokens = rng.integers(0, model.config.vocab_size, (batch_size, block_size + 1))

    def step() -> float:
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        model.backward()
        optimizer.step(grad_clip=1.0)
        return loss

    return step


def test_step(backend: Any, benchmark: Any) -> None:
    benchmark.group = f"GPT-2 124M training step B={B} T={T}"
    step = make_step(backend, B, T)
    first = step()
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert step() < first  # it trains: the same batch costs less after a few steps
    alone = subprocess.run(
        [sys.executable, __file__, backend.name, str(B), str(T)],
        capture_output=True,
        check=True,
        text=True,
    )
    facts = json.loads(alone.stdout.splitlines()[-1])
    benchmark.extra_info |= {"tokens": B * T, "peak_memory_bytes": facts["peak_memory_bytes"]}


def main() -> None:
    name, batch_size, block_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    step = make_step(name, batch_size, block_size)
    step()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds))
    unit = 1024 if sys.platform == "linux" else 1  # macOS counts bytes
    facts = {
        "backend": name,
        "seconds": round(median, 4),
        "tokens_per_second": round(batch_size * block_size / median, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
