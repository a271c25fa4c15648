"""Every op at GPT-2's shapes: a group for each op and shape, a row for each backend.

Arguments, shapes, tolerances and costs come from gpt2c.kernels.cases, as for `gpt2c bench ops`, and
each result is compared with the reference before it is timed.
"""

from __future__ import annotations

from typing import Any

import pytest

from gpt2c.bench.suite import describe
from gpt2c.bench.worker import Worker
from gpt2c.kernels.cases import EXAMPLES

WORK = [(name, shape) for name, op in EXAMPLES.items() for shape in op.shapes]


@pytest.mark.parametrize(
    ("name", "shape"), WORK, ids=["-".join([n, *map(str, s.values())]) for n, s in WORK]
)
def test_op(name: str, shape: dict[str, Any], worker: Worker, benchmark: Any) -> None:
    answer = worker.op(name, shape)
    assert answer["error"] <= answer["rtol"]
    benchmark.group = f"{name} {describe(shape)}"
    flops, size = EXAMPLES[name].cost(**shape)
    benchmark.extra_info |= {"flops": flops, "bytes": size, "error": answer["error"]}
    benchmark(worker._call)
