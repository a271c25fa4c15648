"""Every op of every backend against the float64 reference, on guarded, unaligned memory."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import ALIASES, CASES, Case
from conftest import Guarded

from gpt2c import reference
from gpt2c.backend import NAMES, get_backend
from gpt2c.cases import OPS, normalised_error

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "gpt2c.h"
MACHINE = {"fma_burn", "memory_read"}  # functions of the header that are not ops
TOLD = {"scratch", "threads", "B", "T", "C", "N", "n", "V", "NH", "OC"}  # C is told, arrays know


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Give an op's signature without annotations: a kernel takes float32, the reference more."""
    signature = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in signature if p.name != "self"]


REFERENCE_OPS = {
    name: function
    for name, function in inspect.getmembers(reference, inspect.isfunction)
    if function.__module__ == reference.__name__ and not name.startswith("_")
}


@lru_cache(maxsize=1)  # the tests go through one case after the other
def solved(case: Case) -> tuple[list[Any], list[Any]]:
    """Give a case's arguments and its expected outputs, in float64."""
    arguments, expected = case.arguments(), case.arguments()
    result = getattr(reference, case.name)(*expected)
    return arguments, expected[: case.op.outputs] or [result]


def run(backend: Any, case: Case, guarded: Guarded, alias: bool = False) -> list[Any]:
    """Run a case on float32 copies, check that its inputs are unchanged, give its outputs."""
    arguments = [
        guarded.copy(a.astype(np.float32) if a.dtype == np.float64 else a)
        if isinstance(a, np.ndarray)
        else a
        for a in solved(case)[0]
    ]
    names, outputs = [p[0] for p in parameters(REFERENCE_OPS[case.name])], case.op.outputs
    inputs = range(outputs, len(arguments))
    if alias:
        output, source = ALIASES[case.name]
        arguments[output] = arguments[source]
        inputs = [i for i in inputs if i != source]
    before = {i: arguments[i].tobytes() for i in inputs if isinstance(arguments[i], np.ndarray)}
    result = getattr(backend, case.name)(*arguments)
    for i, bits in before.items():
        assert arguments[i].tobytes() == bits, f"{case}: {names[i]} is an input and was written"
    return arguments[:outputs] or [result]


def check(case: Case, backend_name: str, actual: list[Any]) -> None:
    """Compare outputs with the reference."""
    expected, names = solved(case)[1], [p[0] for p in parameters(REFERENCE_OPS[case.name])]
    for name, a, b in zip(names, actual, expected, strict=False):
        if b is None:
            continue
        error = normalised_error(a, b)
        assert error <= case.rtol, (  # not `not error > rtol`: a NaN must fail
            f"{case} on {backend_name}: error of {name} is {error:.2e}, allowed is {case.rtol:.1e}"
        )


def every(cases: Iterable[Case], *more: Iterable[Any]) -> list[Any]:
    """Give the product of cases, backends and more, a case at a time: it is solved once."""
    return [pytest.param(*run, id="-".join(map(str, run))) for run in product(cases, NAMES, *more)]


@pytest.mark.parametrize(
    ("case", "backend_name", "threads"), every(CASES, [1, 2]), indirect=["backend_name"]
)
def test_kernel_matches_reference(
    case: Case, backend_name: str, threads: int, guarded: Guarded
) -> None:
    check(case, backend_name, run(get_backend(backend_name, threads=threads), case, guarded))


@pytest.mark.parametrize(
    ("case", "backend_name"),
    every(case for case in CASES if case.name in ALIASES),
    indirect=["backend_name"],
)
def test_output_may_be_an_input(case: Case, backend_name: str, guarded: Guarded) -> None:
    check(case, backend_name, run(get_backend(backend_name), case, guarded, alias=True))


@pytest.mark.parametrize(("case", "backend_name"), every(CASES), indirect=["backend_name"])
def test_same_call_gives_the_same_bits(case: Case, backend_name: str, guarded: Guarded) -> None:
    backend = get_backend(backend_name, threads=2)
    first, second = run(backend, case, guarded), run(backend, case, guarded)
    for a, b in zip(first, second, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{case} on {backend_name}"


@pytest.mark.parametrize("n", [1, 1025, 100_003])
def test_global_norm_does_not_depend_on_threads(
    n: int, backend_name: str, rng: np.random.Generator
) -> None:
    grad = rng.standard_normal(n, np.float32)
    assert len({get_backend(backend_name, threads=t).global_norm(grad) for t in (1, 2, 3)}) == 1


@pytest.mark.parametrize(
    "name", ["gelu_forward", "gelu_backward", "residual_forward", "residual_backward"]
)
def test_elementwise_ops_take_any_shape(name: str, backend: Any, rng: np.random.Generator) -> None:
    count = len(parameters(REFERENCE_OPS[name]))
    arrays = [rng.standard_normal((2, 3, 5), np.float32) for _ in range(count)]
    expected = [array.astype(np.float64) for array in arrays]
    getattr(backend, name)(*arrays)
    getattr(reference, name)(*expected)
    for a, b in zip(arrays, expected, strict=True):
        assert normalised_error(a, b) <= OPS[name].rtol


# ---- a NaN is not lost ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 16, 33])
def test_elementwise_ops_pass_nan_on(n: int, backend: Any) -> None:
    for position in range(n):
        x, other = np.ones(n, np.float32), np.ones(n, np.float32)
        x[position] = np.nan
        expected = np.isnan(x)
        for name, inputs in [
            ("gelu_forward", [x]),
            ("gelu_backward", [x, other]),
            ("gelu_backward", [other, x]),
            ("residual_forward", [x, other]),
            ("residual_forward", [other, x]),
        ]:
            out = np.zeros(n, np.float32)
            getattr(backend, name)(out, *inputs)
            assert np.array_equal(np.isnan(out), expected), f"{name}, NaN at {position} of {n}"


@pytest.mark.parametrize("C", [1, 5, 16, 33, 768])
def test_row_ops_pass_nan_on(C: int, backend: Any) -> None:
    row, position = 1, C // 2
    x, targets = np.ones((3, C), np.float32), np.zeros(3, np.int32)
    x[row, position] = np.nan
    weight, bias = np.ones(C, np.float32), np.zeros(C, np.float32)
    out, mean, rstd = np.zeros_like(x), np.zeros(3, np.float32), np.zeros(3, np.float32)
    backend.layernorm_forward(out, mean, rstd, x, weight, bias, 1e-5)
    losses, lse = np.zeros(3, np.float32), np.zeros(3, np.float32)
    backend.crossentropy_forward(losses, lse, x, targets)
    dlogits = np.zeros_like(x)
    backend.crossentropy_backward(dlogits, x, lse, targets, 1.0)
    for name, result in [
        ("layernorm out", out),
        ("layernorm mean", mean),
        ("layernorm rstd", rstd),
        ("losses", losses),
        ("lse", lse),
        ("dlogits", dlogits),
    ]:
        assert np.isnan(result[row]).all(), f"{name} lost the NaN of its row"
        assert np.isfinite(np.delete(result, row, axis=0)).all(), f"{name}: the NaN spread"


def test_gelu_does_not_overflow(backend_name: str) -> None:
    if backend_name == "numpy":
        pytest.skip("in float32 the reference's x^3 overflows; the kernels' must not")
    backend = get_backend(backend_name)
    x = np.array([-1e18, -1e12, -1e5, 1e5, 1e12, 1e18], np.float32)
    out, dx = np.empty_like(x), np.empty_like(x)
    backend.gelu_forward(out, x)
    backend.gelu_backward(dx, np.ones_like(x), x)
    assert np.array_equal(out[3:], x[3:]) and np.array_equal(dx[3:], np.ones(3, np.float32))
    assert (np.abs(dx[:3]) < 1e-30).all() and (np.abs(out[:3]) < 1e-18).all()


@pytest.mark.parametrize(("N", "C", "OC"), [(3, 5, 7), (13, 33, 40), (7, 300, 18)])
def test_matmul_passes_nan_on(N: int, C: int, OC: int, backend: Any) -> None:
    x, weight = np.ones((N, C), np.float32), np.zeros((OC, C), np.float32)
    x[1, C - 1] = np.nan  # times a weight of 0, which is a NaN too
    out = np.zeros((N, OC), np.float32)
    backend.matmul_forward(out, x, weight, None)
    assert np.isnan(out[1]).all()
    assert np.isfinite(np.delete(out, 1, axis=0)).all()
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    backend.matmul_backward(dx, dweight, None, np.ones_like(out), x, weight)
    assert np.isnan(dweight[:, C - 1]).all()
    assert np.isfinite(dweight[:, : C - 1]).all()
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("T", [1, 20, 130])
def test_attention_passes_nan_on(T: int, backend: Any, rng: np.random.Generator) -> None:
    B, NH, HS = 2, 2, 8
    C, t = NH * HS, T // 2
    for part, first_rows in [("q", slice(t, t + 1)), ("k", slice(t, T)), ("v", slice(t, T))]:
        qkv = rng.standard_normal((B, T, 3 * C), np.float32)
        qkv[0, t, "qkv".index(part) * C] = np.nan  # the first channel of the first head
        out, lse = np.zeros((B, T, C), np.float32), np.zeros((B, NH, T), np.float32)
        backend.attention_forward(out, lse, qkv)
        channels = slice(0, 1) if part == "v" else slice(0, HS)
        assert np.isnan(out[0, first_rows, channels]).all(), f"a NaN in {part} was lost"
        assert np.isfinite(out[1]).all() and np.isfinite(out[0, :, HS:]).all(), "it spread"


# ---- one list of ops -----------------------------------------------------------------------------


def test_cases_cover_the_reference() -> None:
    assert OPS.keys() == REFERENCE_OPS.keys()


def test_binding_has_the_signatures_of_the_reference() -> None:
    from gpt2c.kernels import Kernels

    methods = {name for name, _ in inspect.getmembers(Kernels, inspect.isfunction)}
    assert REFERENCE_OPS.keys() <= methods
    for name, function in REFERENCE_OPS.items():
        assert parameters(getattr(Kernels, name)) == parameters(function), name


@pytest.mark.skipif(not HEADER.exists(), reason="csrc/gpt2c.h is not there: not a source tree")
def test_header_has_the_ops_of_the_reference() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^(?:void|double) (\w+)\(([^)]*)\);", text, flags=re.MULTILINE)
    declared = {
        name: [argument.split()[-1].lstrip("*") for argument in arguments.split(",")]
        for name, arguments in found
        if name not in MACHINE
    }
    assert declared.keys() == REFERENCE_OPS.keys()
    for name, arguments in declared.items():
        told_once = [argument for argument in arguments if argument not in TOLD]
        assert told_once == [p[0] for p in parameters(REFERENCE_OPS[name])], name
