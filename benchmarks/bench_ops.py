"""Every op at GPT-2's shapes: a group for each op and shape, a row for each backend.

The inputs come from the table that drives the kernel tests, and each result is compared with the
reference before it is timed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import OPS, Shape, normalised_error

from gpt2c import reference

SHAPES: dict[str, Shape] = {
    "encoder_forward": {"B": 4, "T": 256, "C": 768, "V": 50257},
    "encoder_backward": {"B": 4, "T": 256, "C": 768, "V": 50257},
    "layernorm_forward": {"N": 1024, "C": 768},
    "layernorm_backward": {"N": 1024, "C": 768},
    "matmul_forward": {"N": 1024, "C": 768, "OC": 3072},
    "matmul_backward": {"N": 1024, "C": 768, "OC": 3072},
    "attention_forward": {"B": 4, "T": 256, "NH": 12, "HS": 64},
    "attention_backward": {"B": 4, "T": 256, "NH": 12, "HS": 64},
    "gelu_forward": {"n": 1024 * 3072},
    "gelu_backward": {"n": 1024 * 3072},
    "residual_forward": {"n": 1024 * 768},
    "residual_backward": {"n": 1024 * 768},
    "crossentropy_forward": {"N": 256, "V": 50257},
    "crossentropy_backward": {"N": 256, "V": 50257},
    "adamw_update": {"n": 10_000_000},
    "global_norm": {"n": 10_000_000},
}


def test_every_op_is_benchmarked() -> None:
    assert SHAPES.keys() == OPS.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_op(name: str, backend: Any, benchmark: Any) -> None:
    op, shape = OPS[name], SHAPES[name]
    wide = op.make(np.random.default_rng(1337), **shape)
    narrow = [_narrow(argument) for argument in wide]
    benchmark.group = f"{name} {' '.join(f'{letter}={size}' for letter, size in shape.items())}"
    if name == "matmul_forward":
        benchmark.extra_info["gflop"] = 2e-9 * shape["N"] * shape["C"] * shape["OC"]
    expected = getattr(reference, name)(*wide)
    got = getattr(backend, name)(*narrow)
    results = (
        zip(narrow[: op.outputs], wide[: op.outputs], strict=True)
        if op.outputs
        else [(got, expected)]
    )
    for value, wanted in results:
        assert value is None or normalised_error(value, wanted) <= op.rtol
    benchmark(getattr(backend, name), *narrow)


def _narrow(argument: Any) -> Any:
    is_wide = isinstance(argument, np.ndarray) and argument.dtype == np.float64
    return argument.astype(np.float32) if is_wide else argument
