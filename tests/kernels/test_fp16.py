"""Products of halves: rounding, scales and the order of sums, to the bit, on every backend."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.reference.rounding import BLOCK, halves, product


def nearest_half(x: Fraction) -> float:
    """Return the nearest number of half precision by the definition; x is below 65520."""
    exponent = max(-14, math.frexp(float(abs(x)))[1] - 1) if x else 0
    step = Fraction(2) ** (exponent - 10)
    return float(round(x / step) * step)  # round() takes the even one of two


# a sum, a factor and another: what one multiply-add makes of them is rounded once
ADDED = {
    "exact": (1.0, 2.0, 3.0),
    "a tie, to the even one below": (1.0, 2.0**-6, 2.0**-5),
    "a tie, to the even one above": (1 + 2.0**-10, 2.0**-6, 2.0**-5),
    "a little above a tie": (1.0, (1 + 2.0**-10) * 2.0**-6, (1 + 2.0**-10) * 2.0**-5),
    "a little below a tie": (1.0, (1 - 2.0**-11) * 2.0**-6, (1 + 2.0**-10) * 2.0**-5),
    "far below a sum's last bit": (12.0, 2.0**-14, 2.0**-14),
    "a tie but for what a float would lose": (1.0, 2.0**-11 * (1 + 2.0**-10), 1 - 2.0**-10),
    "a denormal": (0.0, 2.0**-12, 3 * 2.0**-11),
    "a tie of denormals": (2.0**-24, 2.0**-13, 2.0**-12),
    "the sum vanishes": (-6.0, 2.0, 3.0),
    "all but a little vanishes": (-6.0, 2 + 2.0**-9, 3.0),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("what", ADDED)
def test_each_multiply_add_is_rounded_once(what: str, sign: int, backend_name: str) -> None:
    """Two products, and two more with 0: each row has an 8, so that nothing is scaled."""
    total, a, b = ADDED[what]
    x = np.array([[sign * total, sign * a, 8, 0]] * 17, np.float32)
    other, out = np.array([[1, b, 0, 8]], np.float32), np.empty((17, 1), np.float32)
    get_backend(backend_name).matmul_forward(out, x, other, None, None, "fp16")
    expected = nearest_half(Fraction(sign * total) + Fraction(sign * a) * Fraction(b))
    assert (out == expected).all()


def test_halves_are_the_nearest(rng: np.random.Generator) -> None:
    x = rng.standard_normal((40, 50)) * np.exp(rng.normal(0, 30, (40, 1)))
    x[rng.random(x.shape) < 0.3] *= 1e-6
    found, power = halves(x.astype(np.float32))
    assert (np.abs(found).max(axis=1) >= 8).all() and np.abs(found).max() <= 16
    for number, row in zip(found.flat, (x.astype(np.float32) * power).flat, strict=True):
        assert number == nearest_half(Fraction(float(row)))


@pytest.mark.parametrize(
    ("N", "C", "OC"), [(17, 1, 1), (19, 3, 5), (25, 64, 70), (40, 200, 65), (33, 1000, 40)]
)
def test_products_have_the_bits_of_the_reference(
    N: int, C: int, OC: int, backend_name: str, rng: np.random.Generator
) -> None:
    """With rows of any size, numbers that are denormals, and sums that vanish."""
    x, weight = (rng.standard_normal((rows, C), np.float32) for rows in (N, OC))
    for factor in (x, weight):
        factor *= np.exp(rng.normal(0, 9, (len(factor), 1))).astype(np.float32)
        factor[rng.random(factor.shape) < 0.3] *= np.float32(1e-6)
        factor[:, C // 2 :] = np.where(rng.random() < 0.5, factor[:, : C - C // 2], 0)
    x[3] = 0.0
    backend = get_backend(backend_name)
    out, dx, dweight = np.empty((N, OC), np.float32), np.empty_like(x), np.empty_like(weight)
    backend.matmul_forward(out, x, weight, None, None, "fp16")
    assert np.array_equal(out, product(x, weight, "fp16"))
    dout = rng.standard_normal((N, OC), np.float32)
    backend.matmul_backward(dx, dweight, None, dout, x, weight, None, False, "fp16")
    assert np.array_equal(dx, product(dout, weight.T, "fp16"))
    assert np.array_equal(dweight, product(dout.T, x.T, "fp16"))


@pytest.mark.parametrize("kind", ["normal", "positive", "outlier", "tiny", "huge"])
def test_error_is_below_that_of_bfloat16(
    kind: str, backend_name: str, rng: np.random.Generator
) -> None:
    """Of sums of products that have both signs, as those of a model; none is too large."""
    x, weight = rng.standard_normal((20, 768), np.float32), rng.standard_normal((30, 768))
    if kind == "positive":
        x = np.abs(x)
    if kind == "outlier":
        x[:, 5] *= 300
    x *= np.float32({"tiny": 1e-30, "huge": 1e30}.get(kind, 1))
    exact, found = x.astype(np.float64) @ weight.T, []
    for precision in ("fp16", "bf16"):
        out = np.empty(exact.shape, np.float32)
        get_backend(backend_name).matmul_forward(
            out, x, weight.astype(np.float32), None, None, precision
        )
        found.append(np.linalg.norm(out - exact))
    assert found[0] < 0.8 * found[1]


def test_largest_block_is_a_half(backend_name: str) -> None:
    """Of numbers that are rounded up to 16: the sum of a block is a fourth of the largest half."""
    x = np.full((17, BLOCK), np.nextafter(np.float32(16), np.float32(0)))
    out = np.empty((17, 17), np.float32)
    get_backend(backend_name).matmul_forward(out, x, x, None, None, "fp16")
    assert (out == 256 * BLOCK).all()


NANS = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)


@pytest.mark.parametrize("value", [*NANS, np.inf, -np.inf])
def test_what_is_not_finite_is_not_lost(value: Any, backend_name: str) -> None:
    """It reaches its row, or its column, and no other; a run's count of skipped steps needs it."""
    backend, ones = get_backend(backend_name), np.ones((20, 70), np.float32)
    for place in ((0, 0), (7, 63), (19, 69)):
        x, out = ones.copy(), np.empty((20, 20), np.float32)
        x[place] = value
        with np.errstate(invalid="ignore"):
            backend.matmul_forward(out, x, ones, None, None, "fp16")
            assert not np.isfinite(out[place[0]]).any()
            assert np.array_equal(np.delete(out, place[0], 0), np.full((19, 20), 70.0))
            backend.matmul_forward(out, ones, x, None, None, "fp16")
            assert not np.isfinite(out[:, place[0]]).any()
            assert np.isfinite(np.delete(out, place[0], 1)).all()


@pytest.mark.parametrize("size", [1e38, 1e35, 1e30, 1e-30, 1e-36, 1e-40])
@pytest.mark.parametrize("depth", [1, 768])
def test_no_power_of_two_is_too_large(depth: int, size: float, backend_name: str) -> None:
    """Rows of any size, times columns of the opposite size; their product is a number.

    All products are equal: so may be their errors, 64 times 2^-12 of half of a block's sum.
    """
    x, other = (np.full((17, depth), one, np.float32) for one in (size, min(1 / size, 1e38)))
    for a, b in ((x, other), (other, x)):
        out = np.empty((17, 17), np.float32)
        get_backend(backend_name).matmul_forward(out, a, b, None, None, "fp16")
        exact = a[0].astype(np.float64) @ b[0].astype(np.float64)
        assert np.isfinite(out).all() and (np.abs(out / exact - 1) < 2.0**-7).all()
    a = np.zeros((17, depth), np.float32)
    get_backend(backend_name).matmul_forward(out, a, x, None, None, "fp16")
    assert not out.any()


def test_few_rows_are_products_of_floats(backend: Any, rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((16, 40), np.float32), rng.standard_normal((9, 40), np.float32)
    found: list[NDArray[Any]] = []
    for precision in ("fp16", "fp32"):
        found.append(np.empty((16, 9), np.float32))
        backend.matmul_forward(found[-1], x, weight, None, None, precision)
    assert np.array_equal(*found)
