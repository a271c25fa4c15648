"""Products of 16-bit numbers: rounding and the order of sums, to the bit, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Guarded
from helpers.cases import CASES, Case
from numpy.typing import NDArray

from gpt2c.kernels.backend import as_precision, backends, fast_precisions, get_backend
from gpt2c.kernels.cases import normalised_error
from gpt2c.kernels.op import OPS
from gpt2c.kernels.reference.rounding import bf16, read, stored

TINY = np.float32(2.0**-126)
# a number, and the bfloat16 that it becomes
ROUNDED = {
    "one": (1.0, 1.0),
    "a tie, to the even one below": (1 + 2.0**-8, 1.0),
    "a tie, to the even one above": (1 + 3 * 2.0**-8, 1 + 2.0**-6),
    "above a tie": (1 + 2.0**-8 + 2.0**-23, 1 + 2.0**-7),
    "into the next power of two": (2 - 2.0**-23, 2.0),
    "the least that is not tiny": (TINY, TINY),
    "tiny": (np.nextafter(TINY, np.float32(0)), 0.0),
    "the largest": (2.0**127 * (2 - 2.0**-7), 2.0**127 * (2 - 2.0**-7)),
    "beyond the largest": (np.finfo(np.float32).max, np.inf),
    "infinity": (np.inf, np.inf),
    "nan": (np.nan, np.nan),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("what", ROUNDED)
def test_rounding(what: str, sign: int) -> None:
    x, expected = (np.float32(sign * value) for value in ROUNDED[what])
    found = bf16(np.array([x]))[0]
    assert np.isnan(found) if np.isnan(expected) else found == expected
    assert np.signbit(found) == np.signbit(expected) or np.isnan(expected)


def test_every_rounded_number_is_the_nearest(rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**31, 100_000, np.uint32).view(np.float32)
    x = x[np.isfinite(x) & (x >= TINY) & (x < 2.0**127)]
    found = bf16(x)
    bits = found.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    for step in (-(1 << 16), 1 << 16):
        other = (bits.astype(np.int64) + step).clip(0).astype(np.uint32).view(np.float32)
        assert (np.abs(found - x) <= np.abs(other - x)).all()


def fused(total: Any, a: Any, b: Any) -> Any:
    """Return total + a b, rounded once: the product of two bfloat16 is exact in float32."""
    return (total.astype(np.float64) + a.astype(np.float64) * b).astype(np.float32)


def in_order(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """Return x weight^T, added as the instruction adds: of each pair the second product first."""
    a, b = bf16(x), bf16(weight)
    if a.shape[1] % 2:
        a, b = (np.pad(factor, ((0, 0), (0, 1))) for factor in (a, b))
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], 2):
        for one in (k + 1, k):
            total = fused(total, a[:, one, None], b[:, one])
    return total


def in_tiles(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """Return x weight^T, added as tiles add.

    Of 32 numbers the products of the even ones and those of the odd ones have a sum each.
    """
    depth = -len(x.T) % 32
    a, b = (np.pad(bf16(factor), ((0, 0), (0, depth))) for factor in (x, weight))
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], 32):
        sums = [np.zeros_like(total), np.zeros_like(total)]
        for i in range(k, k + 32):
            sums[i % 2] = fused(sums[i % 2], a[:, i, None], b[:, i])
        total = total + (sums[0] + sums[1])
    return total


@pytest.mark.parametrize(
    ("N", "C", "OC"), [(1, 1, 1), (3, 2, 5), (17, 41, 33), (40, 300, 70), (70, 1100, 40)]
)
def test_products_have_the_bits_of_the_instruction(
    N: int, C: int, OC: int, backend_name: str, rng: np.random.Generator
) -> None:
    if backend_name == "numpy":
        pytest.skip("NumPy adds in an order of its own")
    x, weight = rng.standard_normal((N, C), np.float32), rng.standard_normal((OC, C), np.float32)
    out, backend = np.empty((N, OC), np.float32), get_backend(backend_name)
    backend.matmul_forward(out, x, weight, None, None, "bf16")
    product = in_tiles if backend_name == "amx" else in_order
    if backend_name in ("avx512bf16", "avx512fp16") and not np.array_equal(out, product(x, weight)):
        pytest.xfail("this CPU's instruction adds in another order than Intel's manual has it")
    assert np.array_equal(out, product(x, weight))
    dx, dweight, dout = np.empty_like(x), np.empty_like(weight), out / np.float32(np.sqrt(C))
    backend.matmul_backward(dx, dweight, None, dout, x, weight, None, False, "bf16")
    assert np.array_equal(dx, product(dout, weight.T))
    assert np.array_equal(dweight, product(dout.T, x.T))


def test_numbers_are_rounded_as_the_reference_rounds(backend_name: str) -> None:
    x = np.array([[sign * value[0]] for value in ROUNDED.values() for sign in (1, -1)], np.float32)
    x = x[np.isfinite(x[:, 0])]
    out = np.empty_like(x)
    get_backend(backend_name).matmul_forward(
        out, x, np.ones((1, 1), np.float32), None, None, "bf16"
    )
    assert np.array_equal(out, bf16(x))
    for value in (np.nan, np.inf, -np.inf):
        x[3] = value
        get_backend(backend_name).matmul_forward(
            out, x, np.ones((1, 1), np.float32), None, None, "bf16"
        )
        assert np.array_equal(out[3], [value], equal_nan=True)
        assert np.isfinite(np.delete(out, 3)).sum() == np.isfinite(np.delete(bf16(x), 3)).sum()


# ---- arrays that hold 16 bits --------------------------------------------------------------------

STORED = [
    case
    for case in CASES
    if any(array.factor for array in OPS[case.name].arrays)
    and ("precision" not in OPS[case.name].numbers or case.shape.get("precision") == "bf16")
][::3]  # test_kernels.py has every one with floats


@pytest.mark.parametrize("case", STORED, ids=str)
def test_16_bits_in_memory_have_the_bits_of_rounded_floats(case: Case, guarded: Guarded) -> None:
    """Inputs are rounded before, outputs after: no product and no sum knows the difference."""
    op, given = OPS[case.name], case.arguments()
    factors = {array.name for array in op.arrays if array.factor}
    each = [factors, {"x"}, {"out"}] if case.name == "matmul_forward" else [factors]

    def run(backend: Any, halves: set[str]) -> list[Any]:
        arguments: list[Any] = []
        for array, value in zip(op.arrays, given, strict=False):
            if value is None or value.dtype != np.float64:
                arguments.append(value)
                continue
            own = value.astype(np.float32)
            if array.name in factors:
                own = bf16(own)
            arguments.append(guarded.copy(stored(own) if array.name in halves else own))
        getattr(backend, case.name)(*arguments, *given[len(op.arrays) :])
        return arguments[: len(op.outputs)]

    for name in backends():
        backend = get_backend(name)
        floats = run(backend, set())
        for halves in each:
            for array, half, full in zip(op.outputs, run(backend, halves), floats, strict=True):
                if full is not None:
                    wanted = stored(full) if array.name in halves else full
                    assert half.tobytes() == wanted.tobytes(), (
                        f"{name}: {array.name} with {halves} in 16 bits"
                    )
        guarded.check(name)


@pytest.mark.parametrize("W", [1, 7, 8, 9, 16, 17, 33])
def test_numbers_are_written_as_the_reference_writes_them(W: int, backend: Any) -> None:
    values = [sign * value[0] for value in ROUNDED.values() for sign in (1, -1)]
    x = np.resize(np.array(values, np.float32), (1, 50, 2 + W + W % 2))
    x[..., :2] = 0  # the head that is turned: infinity times 0 is nan, of which NumPy warns
    out, ones = np.zeros(x.shape, np.uint16), np.ones((50, 1), np.float32)
    backend.rope_forward(out, x, ones, 0 * ones, None, 1, 0)  # copies all but the first head
    assert np.array_equal(read(out)[..., 2:], bf16(x)[..., 2:], equal_nan=True)


def test_auto_is_what_this_cpu_computes_fastest(backend: Any) -> None:
    found = as_precision("auto", backend)
    assert found in fast_precisions(backend.name)  # without the instruction 16 bits take longer
    if backend.name == "amx":
        assert found == "bf16"  # tiles multiply 16 times as fast as vectors of floats
    elif backend.name == "avx512fp16":
        assert found != "fp32"  # its multiply-adds have twice the lanes


def test_last_few_rows_of_a_block_stay_in_their_memory(
    guarded: Guarded, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product stored in 16 bits goes block by block, and the last block may have few rows.

    With 64 threads what few rows alone would take is more than what many rows take.
    """
    backend, C, OC = get_backend("base", 64), 4096, 512
    weight = rng.standard_normal((OC, C), np.float32)
    for N in range(328, 409, 16):
        x, out = stored(rng.standard_normal((N, C), np.float32)), np.zeros((N, OC), np.uint16)
        monkeypatch.setattr(
            backend, "_scratch", lambda size: backend._f(guarded.copy(np.zeros(size, np.float32)))
        )
        backend.matmul_forward(out, x, weight, None, None, "bf16")
        guarded.check(f"N={N}")
        assert normalised_error(read(out), read(x) @ bf16(weight).T) < 2.0**-8


@pytest.mark.parametrize("precision", ["bf-16", None, 16, ["bf16"]])
def test_unknown_precision_is_refused(precision: Any, backend: Any) -> None:
    with pytest.raises(ValueError, match=r"precision must be one of fp32, bf16, fp16, auto, got "):
        as_precision(precision, backend)
