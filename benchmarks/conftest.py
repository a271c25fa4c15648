"""What benchmarks share: backends, and the machine's facts beside every figure."""

from __future__ import annotations

from typing import Any

import pytest

from gpt2c.backend import NAMES, backends, default_threads, fma_peak, get_backend


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """Give every backend in turn; its instruction set's measured peak goes into extra_info."""
    if request.param not in backends():
        pytest.skip(f"backend {request.param!r} does not run here, only {', '.join(backends())}")
    threads = default_threads()
    peak = fma_peak(request.param, threads)
    benchmark.extra_info |= {"threads": threads, "peak_gflops": round(peak / 1e9, 1)}
    return get_backend(request.param)
