"""How time per token grows with the length of the text and with threads: a picture and a table.

    python benchmarks/scaling.py runs/scaling.png

GPT-2 124M with 4096 positions, the fastest backend, whole training steps of at least 1024 tokens.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from datetime import date
from pathlib import Path

from gpt2c import GPT2Config
from gpt2c.bench.machine import cpu_name
from gpt2c.bench.report import provenance
from gpt2c.bench.suite import Row
from gpt2c.kernels.backend import backends, fma_peak
from gpt2c.kernels.limits import usable_cores
from gpt2c.train.plot import plot_lines

LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096]
ROUNDS = 3


def main() -> None:
    config = GPT2Config(n_positions=max(LENGTHS))
    cores = usable_cores()
    counts = sorted({min(2**i, cores) for i in range(cores.bit_length() + 1)})
    backend = backends()[0]
    lines: dict[str, list[tuple[float, float]]] = {}
    print(provenance(cores))
    print(f"{backend}; ms a token, share of peak")
    for count in counts:
        peak = fma_peak(backend, count)
        label = f"{count} thread{'s' if count > 1 else ''}"
        ideal = f"{label}, if all were multiply-adds at peak"
        for T in LENGTHS:
            B = max(1, 1024 // T)
            with Row(backend, count) as row:
                shape = {"config": dataclasses.asdict(config), "B": B, "T": T}
                answer = row.ask("train", **shape, recompute=None)
                assert answer["error"] <= answer["rtol"]
                seconds = statistics.median(row.ask("step")["seconds"] for _ in range(ROUNDS))
            floor = config.flops_per_token(T) / peak
            token = seconds / (B * T)
            lines.setdefault(label, []).append((T, token * 1e3))
            lines.setdefault(ideal, []).append((T, floor * 1e3))
            print(
                f"{label:<10} {B:>3} x {T:<5} {token * 1e3:8.3f} {floor / token:6.0%}", flush=True
            )
    title = f"GPT-2 124M, training, {backend}: {cpu_name()}, {date.today().isoformat()}"
    plot_lines(
        lines, "T, tokens in a row", "ms per token (lower is better)", Path(sys.argv[1]), title
    )


if __name__ == "__main__":
    main()
