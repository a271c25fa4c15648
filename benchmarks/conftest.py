"""Fixtures of the benchmarks: backends, with the machine's facts beside every figure."""

from __future__ import annotations

from typing import Any

import pytest

from gpt2c.bench.worker import Worker
from gpt2c.kernels.backend import NAMES, backends, default_threads, fma_peak


@pytest.fixture
def threads() -> int:
    return default_threads()


@pytest.fixture(params=NAMES)
def backend_name(request: pytest.FixtureRequest, threads: int, benchmark: Any) -> str:
    """Return every backend in turn; its instruction set's measured peak goes into extra_info."""
    name: str = request.param
    if name not in backends():
        pytest.skip(f"backend {name!r} does not run here, only {', '.join(backends())}")
    peak = fma_peak(name, threads)
    benchmark.extra_info |= {"threads": threads, "peak_gflops": round(peak / 1e9, 1)}
    return name


@pytest.fixture
def worker(backend_name: str, threads: int) -> Worker:
    return Worker(backend_name, threads)
