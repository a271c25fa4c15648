"""Results of a benchmark, as if they were measured."""

from __future__ import annotations

from gpt2c.bench.machine import Ceilings
from gpt2c.bench.suite import Measurement

CEILINGS = Ceilings(1, {"avx2": 100e9, "base": 50e9}, {1: 10e9})


def op_results() -> list[Measurement]:
    facts = {"flops": 1e9, "bytes": 1e6}
    return [
        Measurement("matmul N=1", "numpy", [0.1, 0.2, 0.4], facts=facts),
        Measurement("matmul N=1", "avx2", [0.02, 0.02, 0.02], facts=facts),
        Measurement("matmul N=1", "torch", note="not installed", facts=facts),
    ]
