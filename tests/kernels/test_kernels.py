"""Every op of every backend against the float64 reference, on guarded, unaligned memory."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Guarded
from helpers.cases import ALIASES, CASES, NO_CACHE, NO_DROPOUT, Case, small_shape

from gpt2c.kernels import reference
from gpt2c.kernels.backend import backends, fast_precisions, get_backend
from gpt2c.kernels.binding import Kernels
from gpt2c.kernels.cases import EXAMPLES, normalised_error
from gpt2c.kernels.op import OPS, Op
from gpt2c.kernels.reference.dropout import keep_factors

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "gpt2c.h"
# functions of the header that are not ops; decode_step runs many ops, see test_reader
NO_OPS = {"fma_burn", "memory_read", "line_travel", "pool_stop", "decode_step"}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Return an op's signature without annotations: a kernel takes float32, the reference more."""
    signature = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in signature if p.name != "self"]


REFERENCE_OPS = {name: getattr(reference, name) for name in reference.__all__}


@lru_cache(maxsize=1)  # a test goes through all backends
def solved(case: Case) -> tuple[list[Any], list[Any]]:
    """Return a case's arguments and its expected outputs, in float64."""
    arguments, expected = case.arguments(), case.arguments()
    result = getattr(reference, case.name)(*expected)
    return arguments, expected[: len(OPS[case.name].outputs)] or [result]


def run(backend: Any, case: Case, guarded: Guarded, alias: bool = False) -> list[Any]:
    """Run a case on float32 copies; check that its inputs are unchanged; return its outputs."""
    arguments = [
        guarded.copy(a.astype(np.float32) if a.dtype == np.float64 else a)
        if isinstance(a, np.ndarray)
        else a
        for a in solved(case)[0]
    ]
    names, outputs = (
        [p[0] for p in parameters(REFERENCE_OPS[case.name])],
        len(OPS[case.name].outputs),
    )
    inputs = range(outputs, len(arguments))
    if alias:
        output, source = ALIASES[case.name]
        arguments[output] = arguments[source]
        inputs = [i for i in inputs if i != source]
    before = {i: arguments[i].tobytes() for i in inputs if isinstance(arguments[i], np.ndarray)}
    result = getattr(backend, case.name)(*arguments)
    for i, bits in before.items():
        assert arguments[i].tobytes() == bits, f"{case}: {names[i]} is an input and was written"
    guarded.check(f"{case} on {backend.name}")
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


def on_backends(case: Case) -> list[str]:
    """Return the backends of this machine that a case runs on.

    The backend numpy is the reference itself in float32: every fifth case shows its roundings.
    """
    few = CASES.index(case) % 5
    return [name for name in backends() if name != "numpy" or few == 0]


# A test is a case on all backends: it is solved once, and a test of its own for each would take
# longer to begin and to end than to compute.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_reference_with_the_same_bits_on_two_threads(
    case: Case, guarded: Guarded
) -> None:
    for name in on_backends(case):
        one, two = (run(get_backend(name, threads=n), case, guarded) for n in (1, 2))
        check(case, name, one)
        for a, b in zip(one, two, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{case} on {name}"


@pytest.mark.parametrize(
    "case",
    # where dx is added to, it is not x; of the others a third, among them each op
    [case for case in CASES if case.name in ALIASES and "add" not in case.shape][::3],
    ids=str,
)
def test_output_may_be_an_input(case: Case, guarded: Guarded) -> None:
    for name in on_backends(case):
        check(case, name, run(get_backend(name), case, guarded, alias=True))


# rows and columns of a product are divided among the threads in turn; 1032 rows, and a depth of 768
# in floats or halves, are the most that are packed at once
DIVIDED = [(5, 30, 300), (300, 30, 5), (130, 40, 129), (97, 769, 200), (40, 1600, 33)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("N", "C", "OC"), DIVIDED)
def test_products_do_not_depend_on_threads(
    N: int, C: int, OC: int, precision: str, backend_name: str, rng: np.random.Generator
) -> None:
    """Nor do parts overlap or leave anything out, whether all threads have one or not."""
    if backend_name == "numpy":
        pytest.skip("numpy has threads of its own")
    x, weight = (rng.standard_normal((n, C), np.float32) for n in (N, OC))
    dout, bias = rng.standard_normal((N, OC), np.float32), rng.standard_normal(OC, np.float32)
    held = rng.standard_normal((OC, C), np.float32)
    found = []
    for threads in (1, 2, 3, 5, 64):
        backend = get_backend(backend_name, threads)
        out, dx, dweight = np.full((N, OC), np.nan, np.float32), np.full_like(x, np.nan), held + 0
        backend.matmul_forward(out, x, weight, bias, None, precision)
        backend.matmul_backward(dx, dweight, None, dout, x, weight, None, True, precision)
        found.append((out, dx, dweight))
    for one in found[1:]:
        assert all(map(np.array_equal, one, found[0]))
    x, weight, dout = (array.astype(np.float64) for array in (x, weight, dout))
    exact = x @ weight.T + bias, dout @ weight, dout.T @ x + held
    for array, wanted in zip(found[0], exact, strict=True):
        assert normalised_error(array, wanted) < (1e-6 if precision == "fp32" else 0.02)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_scratch_of_products_is_large_enough(
    precision: str,
    threads: int,
    guarded: Guarded,
    backend_name: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the most rows, columns and depth that a thread packs, divided by rows and by columns."""
    if backend_name == "numpy":
        pytest.skip("numpy has no scratch memory")
    if precision not in fast_precisions(backend_name) and threads > 1:
        pytest.skip("emulated: takes long")
    backend = get_backend(backend_name, threads)
    monkeypatch.setattr(
        backend, "_scratch", lambda n: backend._f(guarded.copy(np.full(n, np.nan, np.float32)))
    )
    for N, OC in ((1032 * threads, 257), (1032, 257 * threads + 1032)):
        x, weight = (rng.standard_normal((n, 768), np.float32) for n in (N, OC))
        out = np.empty((N, OC), np.float32)
        backend.matmul_forward(out, x, weight, None, None, precision)
        guarded.check(f"{N} {OC}")
        assert normalised_error(out, x @ weight.T) < (1e-5 if precision == "fp32" else 0.01)


@pytest.mark.parametrize("n", [1, 1025, 100_003])
def test_global_norm_does_not_depend_on_threads(
    n: int, backend_name: str, rng: np.random.Generator
) -> None:
    grad = rng.standard_normal(n, np.float32)
    assert len({get_backend(backend_name, threads=t).global_norm(grad) for t in (1, 2, 3)}) == 1


@pytest.mark.parametrize(
    "name",
    [
        op.name
        for op in OPS.values()
        if op.inputs[0].shape == ("*",) and op.outputs and not op.numbers
    ],
)
def test_elementwise_ops_take_any_shape(name: str, backend: Any, rng: np.random.Generator) -> None:
    count = len(parameters(REFERENCE_OPS[name]))
    arrays = [rng.standard_normal((2, 3, 5), np.float32) for _ in range(count)]
    expected = [array.astype(np.float64) for array in arrays]
    getattr(backend, name)(*arrays)
    getattr(reference, name)(*expected)
    for a, b in zip(arrays, expected, strict=True):
        assert normalised_error(a, b) <= EXAMPLES[name].rtol


OPTIONAL = [
    (op.name, array.name)
    for op in OPS.values()
    for array in op.outputs
    if array.optional and array.mode != "~"
]


@pytest.mark.parametrize(("name", "output"), OPTIONAL)
def test_output_that_is_not_wanted_changes_no_bit_of_the_others(
    name: str, output: str, backend: Any
) -> None:
    def outputs(left_out: str) -> dict[str, Any]:
        arguments = [narrow(a) for a in Case(name, small_shape(name)).arguments()]
        names = [array.name for array in OPS[name].outputs]
        if left_out:
            arguments[names.index(left_out)] = None
        getattr(backend, name)(*arguments)
        return dict(zip(names, arguments, strict=False))

    everything, others = outputs(""), outputs(output)
    assert others[output] is None
    for other in everything.keys() - {output}:
        assert np.array_equal(everything[other], others[other]), other


# ---- ragged batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("KV", [1, 2, 6])
def test_attention_of_a_ragged_batch_has_the_bits_of_each_sequence_alone(
    KV: int, backend: Any, rng: np.random.Generator
) -> None:
    NH, HS, lengths = 6, 17, (1, 70, 64, 3, 130)
    offsets = np.array([0, *np.cumsum(lengths)], np.int32)
    T, C = int(offsets[-1]), NH * HS
    qkv = rng.standard_normal((1, T, (NH + 2 * KV) * HS), np.float32)
    dout = rng.standard_normal((1, T, C), np.float32)
    out, lse, dqkv = np.empty_like(dout), np.empty((1, NH, T), np.float32), np.empty_like(qkv)
    backend.attention_forward(out, lse, *NO_CACHE, qkv, offsets, 0, *NO_DROPOUT)
    backend.attention_backward(dqkv, dout, qkv, out, lse, offsets, *NO_DROPOUT)
    for start, end in pairwise(offsets.tolist()):
        rows = slice(start, end)
        one = [np.empty_like(array[:, rows]) for array in (out, qkv)]
        own_lse = np.empty((1, NH, end - start), np.float32)
        backend.attention_forward(one[0], own_lse, *NO_CACHE, qkv[:, rows], None, 0, *NO_DROPOUT)
        backend.attention_backward(
            one[1], dout[:, rows], qkv[:, rows], one[0], own_lse, None, *NO_DROPOUT
        )
        assert np.array_equal(one[0], out[:, rows])
        assert np.array_equal(own_lse, lse[:, :, rows])
        assert np.array_equal(one[1], dqkv[:, rows])


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1, 3, 5, 63, 64, 65, 769])
@pytest.mark.parametrize("dropout", [0.0, 1e-9, 0.1, 0.5, 0.999])
def test_dropout_has_the_references_bits(dropout: float, C: int, backend: Any) -> None:
    x, key, first = np.ones((40, C), np.float32), 2**64 - 5, 2**64 - 40
    outs = np.empty((2, 40, C), np.float32)
    for out, ops in zip(outs, (backend, reference), strict=True):
        ops.dropout_forward(out, x, dropout, key, first)
    assert np.array_equal(outs[0], outs[1])


def test_attention_drops_the_weights_of_the_reference(backend: Any) -> None:
    """Each key's value is a channel of its own, so the output shows each weight."""
    B, T, NH, KV, dropout, key, first = 2, 130, 6, 2, 0.3, 77, 5 << 32 | 9
    qkv = np.zeros((B, T, NH + 2 * KV, T), np.float32)
    qkv[:, :, -KV:] = np.eye(T)[None, :, None]
    out, lse = np.empty((B, T, NH * T), np.float32), np.empty((B, NH, T), np.float32)
    backend.attention_forward(
        out, lse, *NO_CACHE, qkv.reshape(B, T, -1), None, 0, dropout, key, first
    )
    factors = keep_factors(B * T, NH, T, dropout, key, first).reshape(B, T, NH, T)
    weights = np.tri(T)[:, None] / np.arange(1, T + 1)[:, None, None]
    assert np.array_equal(out.reshape(B, T, NH, T) == 0, factors * weights == 0)
    assert normalised_error(out.reshape(B, T, NH, T), factors * weights) < 1e-6
    np.testing.assert_allclose(lse, np.broadcast_to(np.log(np.arange(1, T + 1)), lse.shape), 1e-6)


def test_dropout_of_a_batch_is_that_of_its_parts(backend: Any, rng: np.random.Generator) -> None:
    """Rows one by one, and sequences of a ragged batch, have the masks of their place in it."""
    B, T, NH, HS, numbers = 3, 70, 2, 8, (0.2, 5, 1 << 40)
    qkv = rng.standard_normal((B, T, 3 * NH * HS), np.float32)
    dout = rng.standard_normal((B, T, NH * HS), np.float32)
    offsets = np.arange(0, B * T + 1, T, dtype=np.int32)

    def both(qkv: Any, dout: Any, offsets: Any, start: int) -> list[Any]:
        own = (*numbers[:2], numbers[2] + start)
        out, lse = np.empty_like(dout), np.empty((len(qkv), NH, qkv.shape[1]), np.float32)
        dqkv, dropped = np.empty_like(qkv), np.empty_like(dout)
        backend.attention_forward(out, lse, *NO_CACHE, qkv, offsets, 0, *own)
        backend.attention_backward(dqkv, dout, qkv, out, lse, offsets, *own)
        backend.dropout_forward(dropped.reshape(-1, NH * HS), dout.reshape(-1, NH * HS), *own)
        return [array.reshape(-1, array.shape[-1]) for array in (out, dqkv, dropped)]

    whole = both(qkv, dout, None, 0)
    ragged = both(qkv.reshape(1, B * T, -1), dout.reshape(1, B * T, -1), offsets, 0)
    rows = [both(qkv[i : i + 1], dout[i : i + 1], None, i * T) for i in range(B)]
    for number, expected in enumerate(whole):
        assert np.array_equal(ragged[number], expected)
        assert np.array_equal(np.concatenate([row[number] for row in rows]), expected)


# ---- NaN stays NaN -------------------------------------------------------------------------------


# where attention masks, the reference multiplies a NaN by 0 and the kernels multiply nothing
@pytest.mark.parametrize("name", [name for name in OPS if "attention" not in name])
@pytest.mark.parametrize("size", [1, 17, 33, 768])
def test_nan_is_where_the_reference_has_it(name: str, size: int, backend: Any) -> None:
    """From a NaN at seven places of each input of floats, the first and the last among them."""
    shape = small_shape(name)
    case = Case(name, shape | {list(shape)[-1]: size})
    outputs = len(OPS[name].outputs)
    for position, array in enumerate(OPS[name].arrays):
        values = case.arguments()[position]
        is_input = array.mode == "~" or position >= outputs
        if values is None or array.kind != "floats" or not is_input:
            continue
        for place in np.linspace(0, values.size - 1, 7).astype(int):
            wide = case.arguments()
            wide[position].flat[place] = np.nan
            arguments = [narrow(argument) for argument in wide]
            expected = getattr(reference, name)(*wide)
            result = getattr(backend, name)(*arguments)
            for a, b in zip(
                [*arguments[:outputs], result], [*wide[:outputs], expected], strict=True
            ):
                same = a is None or np.array_equal(np.isnan(a), np.isnan(b))
                assert same, f"{name}: NaN in {array.name}, at {place} of {values.size}"


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


def test_swiglu_is_closed_far_below_0_and_open_far_above(backend: Any) -> None:
    gate = np.array([-3e38, -1e20, -100, 100, 1e20, 3e38], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    out, dx = np.empty((1, 6), np.float32), np.empty_like(x)
    backend.swiglu_forward(out, x)
    backend.swiglu_backward(dx, np.ones_like(out), x)
    for values, above in [(out, gate[3:]), (dx[:, :6], np.ones(3)), (dx[:, 6:], gate[3:])]:
        assert np.array_equal(values[0, 3:], above) and (np.abs(values[0, :3]) < 1e-36).all()


@pytest.mark.parametrize(("N", "C", "OC"), [(3, 5, 7), (13, 33, 40), (7, 300, 18)])
def test_matmul_passes_nan_on(N: int, C: int, OC: int, backend: Any) -> None:
    x, weight = np.ones((N, C), np.float32), np.zeros((OC, C), np.float32)
    x[1, C - 1] = np.nan  # times a weight of 0, which is a NaN too
    out = np.zeros((N, OC), np.float32)
    backend.matmul_forward(out, x, weight, None, None)
    assert np.isnan(out[1]).all()
    assert np.isfinite(np.delete(out, 1, axis=0)).all()
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    backend.matmul_backward(dx, dweight, None, np.ones_like(out), x, weight, None)
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
        backend.attention_forward(out, lse, *NO_CACHE, qkv, None, 0, *NO_DROPOUT)
        channels = slice(0, 1) if part == "v" else slice(0, HS)
        assert np.isnan(out[0, first_rows, channels]).all(), f"a NaN in {part} was lost"
        assert np.isfinite(out[1]).all() and np.isfinite(out[0, :, HS:]).all(), "it spread"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float32", "float16", "uint8"])
@pytest.mark.parametrize(("N", "C"), [(1, 1), (3, 40), (6, 17), (17, 33), (130, 70)])
def test_linear_passes_nan_and_infinity_on(
    N: int, C: int, kind: str, bad: float, backend: Any, rng: np.random.Generator
) -> None:
    """8-bit integers have no NaN, so the row's scale must carry it."""
    shape = {"N": N, "C": C, "OC": 21, "kind": kind}
    arguments = [narrow(a) for a in EXAMPLES["matmul_forward"].make(rng, **shape)]
    row = N // 2
    arguments[1][row, C - 1] = bad
    with np.errstate(invalid="ignore"):  # the reference computes inf - inf
        backend.matmul_forward(*arguments)
    out = arguments[0]
    assert not np.isfinite(out[row]).any()
    assert np.isnan(out[row]).all() or kind != "uint8"
    assert np.isfinite(np.delete(out, row, axis=0)).all(), "it spread"


@pytest.mark.parametrize("cache", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("T", "position"), [(1, 0), (1, 100), (20, 50), (70, 64)])
def test_cache_attention_passes_nan_on(
    T: int, position: int, cache: str, backend: Any, rng: np.random.Generator
) -> None:
    """A NaN in a row of 8 bits is its scale's, so it is in all channels."""
    NH, HS, P = 2, 8, 200
    C, end, before = NH * HS, position + T, position // 2
    for part, first in [("q", 0), ("k", T // 2), ("v", T // 2), ("keys", 0), ("values", 0)]:
        if part in ("keys", "values") and position == 0:
            continue
        caches = rng.standard_normal((2, 1, NH, P, HS), np.float32).astype(cache)
        scales = np.ones((2, 1, NH, P), np.float32) if cache == "int8" else (None, None)
        marked = scales if cache == "int8" else caches
        marked[:, 0, :, position:] = np.nan  # written up to the end, never read beyond
        qkv, out = rng.standard_normal((T, 3 * C), np.float32), np.zeros((T, C), np.float32)
        if part in ("keys", "values"):
            marked[int(part == "values"), 0, 0, before, ...].flat[:1] = np.nan
        else:
            qkv[first, "qkv".index(part) * C] = np.nan
        lse = np.zeros((1, NH, T), np.float32)
        given = out[None], lse, *caches, *scales, qkv[None]
        backend.attention_forward(*given, None, position, *NO_DROPOUT)
        rows = slice(first, first + 1) if part == "q" else slice(first, T)
        one = part in ("v", "values") and cache != "int8"
        channels = slice(0, 1) if one else slice(0, HS)
        assert np.isnan(out[rows, channels]).all(), f"a NaN in {part} was lost"
        assert np.isfinite(out[:, HS:]).all(), "it spread"
        assert np.isnan(marked[:, 0, :, end:]).all() and np.isfinite(marked[:, 0, 1, :end]).all()


# ---- caches of 16 and 8 bits ---------------------------------------------------------------------


def stored(backend: Any, rows: np.ndarray, cache: str) -> tuple[Any, ...]:
    """Return the keys (T, HS), and their scales (T,) or None, that a cache holds of rows."""
    T, HS = rows.shape
    caches = np.zeros((2, 1, 1, T, HS), cache)
    scales = np.zeros((2, 1, 1, T), np.float32) if cache == "int8" else (None, None)
    qkv = np.concatenate([np.zeros_like(rows), rows, rows], axis=1)[None]
    out, lse = np.empty((1, T, HS), np.float32), np.empty((1, 1, T), np.float32)
    with np.errstate(all="ignore"):  # of infinity
        backend.attention_forward(out, lse, *caches, *scales, qkv, None, 0, *NO_DROPOUT)
    for keys_and_values in (caches, scales):
        np.testing.assert_array_equal(*keys_and_values)
    return caches[0, 0, 0], None if scales[0] is None else scales[0][0, 0]


def test_cache_of_16_bits_rounds_to_the_nearest_half(backend: Any) -> None:
    """Every half, what lies between two of them, and on both sides of there; beyond, infinity."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.append(halves, np.float32(65536))  # the next, if there were one
    middle = (halves[:-1] + halves[1:]) / 2
    numbers = [halves, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.inf)]
    x = np.concatenate([*numbers, [1e-45, 1e-9, 65519, 65520, 1e5, 3e38]]).astype(np.float32)
    x = np.concatenate([x, -x, np.zeros(-2 * len(x) % 101, np.float32)]).reshape(-1, 101)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert stored(backend, x, "float16")[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("HS", [1, 3, 17, 64, 130])
def test_cache_of_8_bits_has_the_references_bits(
    HS: int, backend: Any, rng: np.random.Generator
) -> None:
    """Also for what is half way between two steps, rows of zeros, and tiny and huge rows."""
    x = rng.standard_normal((12, HS), np.float32)
    x[0] = rng.integers(-254, 255, HS) / 2
    x[1], x[3] = 0, -x[2]
    x[4:10] *= np.array([1e-45, 1e-40, 1e-36, 1e-30, 1e30, 1e38], np.float32)[:, None]
    keys, scales = stored(backend, x, "int8")
    expected, expected_scales = stored(reference, x, "int8")
    assert np.array_equal(keys, expected) and np.array_equal(scales, expected_scales)
    steps = x.astype(np.float64) - scales[:, None].astype(np.float64) * keys
    assert (np.abs(steps) <= np.abs(x).max(axis=1, keepdims=True) / 254 * 1.00001 + 1e-36).all()
    assert np.array_equal(keys[2], -keys[3].astype(int)) and not keys[1].any()
    bad = np.array([[np.nan], [np.inf], [-np.inf], [1]], np.float32) * np.ones(HS, np.float32)
    assert np.isnan(stored(backend, bad, "int8")[1]).tolist() == [True, True, True, False]


# ---- weights of 16 and 8 bits --------------------------------------------------------------------


def narrow(argument: Any) -> Any:
    is_wide = isinstance(argument, np.ndarray) and argument.dtype == np.float64
    return argument.astype(np.float32) if is_wide else argument


def linear(backend: Any, *inputs: Any) -> np.ndarray:
    out = np.full((len(inputs[0]), len(inputs[1])), np.nan, np.float32)
    backend.matmul_forward(out, *inputs)
    return out


@pytest.mark.parametrize("N", [16, 17])  # read in place, and widened first
def test_every_float16_is_converted_exactly(N: int, backend: Any) -> None:
    """Subnormals too, down to 6e-8."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 16)
    x = np.zeros((N, 16), np.float32)
    x[np.arange(16), np.arange(16)] = 1
    assert np.array_equal(linear(backend, x, halves, None, None)[:16].T, halves)
    column = halves.reshape(-1, 1)  # rows of one, which fill no vector
    assert np.array_equal(
        linear(backend, np.ones((N, 1), np.float32), column, None, None)[0], column[:, 0]
    )


@pytest.mark.parametrize(("N", "C", "OC"), [(1, 768, 40), (5, 333, 17), (130, 65, 9)])
def test_8_bits_round_as_the_reference_in_float32(
    N: int, C: int, OC: int, backend: Any, rng: np.random.Generator
) -> None:
    """For any x, also for numbers half way between two steps, which round to even.

    Had one number gone to another step, its row would differ by that step times a weight: by more
    than 1/127 of 1/C of the largest possible sum, 1e-5 at C = 768. Only a few roundings after the
    sums may differ, each of 6e-8.
    """
    weight, scale = rng.integers(1, 256, (OC, C), np.uint8), rng.random(OC, np.float32)
    x = rng.standard_normal((N, C), np.float32)
    x[0] = rng.integers(-254, 255, C) / 2  # steps and what is just between them
    x[0, 0] = 127
    expected = linear(reference, x, weight, None, scale)
    assert normalised_error(linear(backend, x, weight, None, scale), expected) <= 3e-7


def test_sums_of_8_bits_do_not_overflow(backend: Any) -> None:
    """With the most channels and the largest numbers: 128 x 127 x 65536 = 63.5 x 2^24, exactly."""
    C = 65536
    weight = np.repeat(np.array([[0], [255], [1]], np.uint8), C, axis=1)
    x = np.repeat(np.array([[127], [-127]], np.float32), C, axis=1)
    out = linear(backend, x, weight, None, np.ones(3, np.float32))
    expected = np.array([[-128, 127, -127]]) * np.array([[127], [-127]]) * C
    assert np.array_equal(out, expected.astype(np.float32))


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, 1e-37, 1e-36, 1e-30, 1e30, 3e38])
def test_8_bits_for_small_and_large_rows(
    largest: float, backend: Any, rng: np.random.Generator
) -> None:
    """The factor 127 / largest must stay finite; rows below 1e-36 may count as zeros."""
    weight, bias = rng.integers(1, 256, (7, 33), np.uint8), rng.standard_normal(7, np.float32)
    scale = np.full(7, 1e-3, np.float32)
    x = rng.uniform(-1, 1, (3, 33)).astype(np.float32)
    x[1] *= np.float32(largest)
    out, others = linear(backend, x, weight, bias, scale), [0, 2]
    wide = x.astype(np.float64) @ (scale[:, None] * (weight.astype(np.float64) - 128)).T + bias
    for row in range(3):  # half a step in each of 33 channels, times the largest weight
        bound = 33 * float(np.abs(x[row]).max()) / 254 * 128e-3 + 1e-6
        assert (np.abs(out[row] - wide[row]) <= bound).all()
    assert np.array_equal(linear(backend, x[others], weight, bias, scale), out[others])
    if largest < 1e-36:
        assert np.array_equal(out[1], bias)


@pytest.mark.parametrize("kind", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("C", [24, 100])
def test_row_gets_the_same_bits_alone_and_among_others(
    kind: str, C: int, backend_name: str, rng: np.random.Generator
) -> None:
    """For the number of rows that are read together; NumPy's own products do not promise it."""
    if backend_name == "numpy" and kind != "uint8":
        pytest.skip("NumPy's products of one row and of several are summed in another order")
    shape = {"N": 16, "C": C, "OC": 70, "kind": kind}
    _, x, *rest = (narrow(a) for a in EXAMPLES["matmul_forward"].make(rng, **shape))
    for threads in (1, 2):
        backend = get_backend(backend_name, threads)
        together = linear(backend, x, *rest)
        for N in range(1, 16):
            assert np.array_equal(linear(backend, x[:N], *rest), together[:N])
        for row in range(16):
            assert np.array_equal(linear(backend, x[row : row + 1], *rest)[0], together[row])


# ---- one list of ops -----------------------------------------------------------------------------


def test_every_op_is_declared_and_has_examples() -> None:
    assert EXAMPLES.keys() == OPS.keys()
    assert REFERENCE_OPS.keys() == OPS.keys()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_declaration_is_the_reference(op: Op) -> None:
    names = [array.name for array in op.arrays] + list(op.numbers)
    signature = parameters(REFERENCE_OPS[op.name])
    assert [name for name, _, _ in signature] == names
    assert parameters(getattr(Kernels, op.name)) == signature


@pytest.mark.skipif(not HEADER.exists(), reason="csrc/gpt2c.h is not there: not a source tree")
def test_declarations_are_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^(?:void|double) (\w+)\(([^)]*)\);", text, flags=re.MULTILINE)
    header = {
        name: [argument.split()[-1].lstrip("*") for argument in arguments.split(",")]
        for name, arguments in found
        if name not in NO_OPS
    }
    declared = {
        op.name: [
            *(array.name for array in op.arrays),
            *op.numbers,
            *("scratch" if word.endswith(")") else word for word in op.told),
            "team",
        ]
        for op in OPS.values()
    }
    assert header == declared
