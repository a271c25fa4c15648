"""One training step of GPT-2 124M, AdamW and clipping included, each backend in its own process.

The same steps as `gpt2c bench train`: a small model is compared with the reference first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gpt2c import GPT2Config
from gpt2c.bench.suite import Row

B, T = 4, 64


def test_step(backend_name: str, threads: int, benchmark: Any) -> None:
    benchmark.group = f"GPT-2 124M training step B={B} T={T}"
    config = dataclasses.asdict(GPT2Config())
    with Row(backend_name, threads) as row:
        answer = row.ask("train", config=config, B=B, T=T, recompute=None)
        assert answer["error"] <= answer["rtol"]
        first = row.ask("step")
        benchmark.pedantic(lambda: row.ask("step"), rounds=3)
        last = row.ask("step")
    assert last["loss"] < first["loss"]  # it trains: the same batch costs less after a few steps
    benchmark.extra_info |= {"tokens": B * T, "peak_memory_bytes": last["peak_memory"]}
