"""The reference: backward functions against calculus, forward functions against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers.cases import ALIASES, NO_CACHE, NO_DROPOUT, SHAPES, Case, small_shape

from gpt2c.kernels import reference
from gpt2c.kernels.cases import normalised_error
from gpt2c.kernels.op import OPS
from gpt2c.kernels.reference.dropout import keep_factors, philox

Array = np.ndarray
STEP = 1e-6  # central differences: error about STEP^2 from curvature, 1e-16 / STEP from rounding
RTOL = 1e-7


def check_gradient(
    rng: np.random.Generator, loss: Callable[[], float], x: Array, gradient: Array
) -> None:
    """Compare a gradient with central differences of `loss()`, by element and along a direction."""
    start = x.copy()

    def difference(direction: Array) -> float:
        x[...] = start + STEP * direction
        above = loss()
        x[...] = start - STEP * direction
        below = loss()
        x[...] = start
        return (above - below) / (2 * STEP)

    numeric = np.empty_like(x)
    for i in np.ndindex(x.shape):
        direction = np.zeros_like(x)
        direction[i] = 1
        numeric[i] = difference(direction)
    assert normalised_error(gradient, numeric) < RTOL
    direction = rng.standard_normal(x.shape)
    size = np.abs(gradient * direction).sum()
    assert abs(difference(direction) - (gradient * direction).sum()) < RTOL * size


@pytest.fixture
def normal(rng: np.random.Generator) -> Callable[..., Array]:
    return lambda *shape: rng.standard_normal(shape)


# ---- backward functions are the derivatives of forward functions ---------------------------------


FORWARD = {name: name.replace("forward", "backward") for name in OPS if "forward" in name}
DIFFERENTIATED = [
    *(Case(name, small_shape(name)) for name, backward in FORWARD.items() if backward in OPS),
    Case("encoder_forward", {"B": 3, "T": 4, "C": 5, "V": 3}),  # some tokens are used twice
    Case("matmul_forward", {"N": 4, "C": 5, "OC": 3, "bias": False}),
    Case("attention_forward", {"B": 1, "T": 1, "NH": 1, "HS": 3}),
    Case("attention_forward", {"B": 1, "T": 7, "NH": 1, "HS": 1}),
    Case("attention_forward", {"B": 2, "T": 5, "NH": 6, "HS": 3, "KV": 2}),
    Case("attention_forward", {"B": 1, "T": 11, "NH": 4, "HS": 3, "KV": 2, "S": 4}),
    Case("attention_forward", {"B": 2, "T": 5, "NH": 2, "HS": 3, "dropout": 0.3}),
    Case("attention_forward", {"B": 1, "T": 11, "NH": 4, "HS": 3, "KV": 2, "S": 4, "dropout": 0.3}),
    Case("encoder_forward", {"B": 1, "T": 9, "C": 5, "V": 3, "S": 4}),
    Case("rope_forward", {"B": 1, "T": 9, "NH": 2, "D": 3, "S": 4}),
]


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_backward_is_the_derivative_of_forward(case: Case, rng: np.random.Generator) -> None:
    """With respect to each argument that backward writes a gradient of."""
    forward, backward = OPS[case.name], OPS[FORWARD[case.name]]
    names = [array.name for array in forward.arrays] + list(forward.numbers)
    values = dict(zip(names, case.arguments(), strict=True))
    out = values[forward.outputs[0].name]
    d_out = f"d{forward.outputs[0].name}"
    numbers = {
        name: values.get(name, 0.3 if name == "scale" else default)
        for name, default in backward.numbers.items()
    }
    # an op that ends in losses takes a weight for each and a scale in place of their gradient
    values["weights"] = rng.standard_normal(len(out))
    takes_gradient = d_out in [array.name for array in backward.inputs]
    values[d_out] = rng.standard_normal(out.shape) if takes_gradient else 0.3 * values["weights"]

    def loss() -> float:
        getattr(reference, forward.name)(*(values[name] for name in names))
        return float((out * values[d_out]).sum())

    loss()
    arguments = [values[array.name[1:]] for array in backward.outputs]
    gradients = [None if value is None else np.zeros_like(value) for value in arguments]
    inputs = [values[array.name] for array in backward.inputs]
    getattr(reference, backward.name)(*gradients, *inputs, *numbers.values())
    for value, gradient in zip(arguments, gradients, strict=True):
        if gradient is not None:
            check_gradient(rng, loss, value, gradient)


def test_residual_gradients(rng: np.random.Generator, normal: Any) -> None:
    x, branch, dout = normal(6), normal(6), normal(6)
    out = np.empty(6)

    def loss() -> float:
        reference.residual_forward(out, x, branch)
        return float((out * dout).sum())

    check_gradient(rng, loss, x, dout)  # which is why the gradient has no op
    check_gradient(rng, loss, branch, dout)


def test_dropout_gradient(normal: Any, rng: np.random.Generator) -> None:
    x, dout, out, dx = normal(5, 7), normal(5, 7), *np.empty((2, 5, 7))

    def loss() -> float:
        reference.dropout_forward(out, x, 0.4, 8, 9)
        return float((out * dout).sum())

    reference.dropout_forward(dx, dout, 0.4, 8, 9)  # which is why the gradient has no op
    assert 0 < (dx == 0).sum() < dx.size
    check_gradient(rng, loss, x, dx)


# ---- forward functions have known values ---------------------------------------------------------


def test_encoder_adds_token_and_position() -> None:
    wte, wpe = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 20.0], [30.0, 40.0]])
    out = np.empty((1, 2, 2))
    reference.encoder_forward(out, np.array([[1, 0]], np.int32), wte, wpe, None, None, 0)
    assert out.tolist() == [[[13.0, 24.0], [31.0, 42.0]]]


def test_layernorm_rows_have_mean_bias_and_variance_weight_squared(normal: Any) -> None:
    N, C = 3, 64
    x, out, mean, rstd = 5 + 3 * normal(N, C), np.empty((N, C)), np.empty(N), np.empty(N)
    reference.layernorm_forward(out, mean, rstd, x, np.full(C, 2.0), np.full(C, 7.0), 1e-12)
    np.testing.assert_allclose(out.mean(axis=1), 7)
    np.testing.assert_allclose(out.var(axis=1), 4)
    np.testing.assert_allclose(mean, x.mean(axis=1))
    np.testing.assert_allclose(rstd, 1 / x.std(axis=1))


def test_layernorm_of_a_constant_row_is_the_bias(normal: Any) -> None:
    x, bias, out, mean, rstd = np.full((1, 8), 3.0), normal(8), np.empty((1, 8)), *np.empty((2, 1))
    reference.layernorm_forward(out, mean, rstd, x, normal(8), bias, 1e-4)
    assert np.array_equal(out[0], bias)
    np.testing.assert_allclose(rstd, 100)


def test_matmul_is_a_dot_product_of_rows() -> None:
    out = np.empty((1, 2))
    x, weight = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    reference.matmul_forward(out, x, weight, np.array([0.5, -1.0]), None)
    assert out.tolist() == [[1.5, 5.0]]


@pytest.mark.parametrize("kind", ["float16", "uint8"])
def test_gradient_through_small_weights_is_that_of_their_numbers(kind: str) -> None:
    case = Case("matmul_backward", {"N": 3, "C": 5, "OC": 4, "kind": kind, "accumulate": False})
    small, wide = case.arguments(), case.arguments()
    weight, scale = wide[5], wide[6]
    wide[5] = weight.astype(float) if scale is None else scale[:, None] * (weight - 128.0)
    wide[6] = None
    for arguments in (small, wide):
        reference.matmul_backward(*arguments)
    for a, b in zip(small[:3], wide[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_attention_to_one_token_is_its_value(normal: Any) -> None:
    qkv, out, lse = normal(2, 1, 12), np.empty((2, 1, 4)), np.empty((2, 2, 1))
    reference.attention_forward(out, lse, *NO_CACHE, qkv, None, 0, *NO_DROPOUT)
    np.testing.assert_allclose(out, qkv[..., 8:])
    q, k = qkv[:, 0, :4].reshape(2, 2, 2), qkv[:, 0, 4:8].reshape(2, 2, 2)
    np.testing.assert_allclose(lse[..., 0], (q * k).sum(axis=2) / math.sqrt(2))


def test_attention_to_equal_keys_is_the_mean_so_far(normal: Any) -> None:
    T, C = 6, 4
    qkv, out, lse = normal(1, T, 3 * C), np.empty((1, T, C)), np.empty((1, 1, T))
    qkv[..., C : 2 * C] = 0
    reference.attention_forward(out, lse, *NO_CACHE, qkv, None, 0, *NO_DROPOUT)
    counts = np.arange(1, T + 1)
    np.testing.assert_allclose(out[0], qkv[0, :, 2 * C :].cumsum(axis=0) / counts[:, None])
    np.testing.assert_allclose(lse[0, 0], np.log(counts))


def test_attention_does_not_see_later_tokens(normal: Any) -> None:
    qkv, out, lse = normal(2, 7, 12), np.empty((2, 7, 4)), np.empty((2, 2, 7))
    reference.attention_forward(out, lse, *NO_CACHE, qkv, None, 0, *NO_DROPOUT)
    later_out, later_lse = np.empty_like(out), np.empty_like(lse)
    qkv[:, 4:] = normal(2, 3, 12)
    reference.attention_forward(later_out, later_lse, *NO_CACHE, qkv, None, 0, *NO_DROPOUT)
    assert np.array_equal(out[:, :4], later_out[:, :4])
    assert np.array_equal(lse[..., :4], later_lse[..., :4])
    assert not np.isclose(out[:, 4:], later_out[:, 4:]).any()


@pytest.mark.parametrize("cache", ["float16", "int8"])
@pytest.mark.parametrize("KV", [1, 2, 6])
@pytest.mark.parametrize("HS", [17, 64])
def test_attention_over_a_small_cache_errs_by_its_rounding(
    HS: int, KV: int, cache: str, normal: Any
) -> None:
    """With keys k + dk and values v + dv, |dk| <= rk and |dv| <= rv, half a step each:

    A score moves by at most s = max |q| . rk / sqrt(HS), so a weight by a factor in [e^-2s, e^2s],
    because each term of the sum it is divided by moves by s too. The weights add up to 1, so the
    output moves by at most max rv + (e^2s - 1) max |v|.
    """
    T, NH = 40, 6
    qkv = normal(1, T, (NH + 2 * KV) * HS).astype(np.float32).astype(np.float64)
    outs, lse = np.empty((2, 1, T, NH * HS)), np.empty((1, NH, T))
    reference.attention_forward(outs[0], lse, *NO_CACHE, qkv, None, 0, *NO_DROPOUT)
    caches = [np.zeros((1, KV, T, HS), cache) for _ in range(2)]
    scales = [np.zeros((1, KV, T), np.float32) if cache == "int8" else None for _ in range(2)]
    reference.attention_forward(outs[1], lse, *caches, *scales, qkv, None, 0, *NO_DROPOUT)
    q, k, v = np.split(qkv[0].reshape(T, -1, HS), [NH, NH + KV], axis=1)
    if cache == "float16":  # 11 bits, or steps of 2^-24 below 2^-14
        rk, rv = (np.abs(x) * 2.0**-11 + 2.0**-25 for x in (k, v))
    else:  # 127 steps to the row's largest, which float32 computes
        rk, rv = (0 * x + np.abs(x).max(axis=2, keepdims=True) / 254 * (1 + 1e-6) for x in (k, v))
    rk, rv, v = (np.repeat(x, NH // KV, axis=1) for x in (rk, rv, v))
    moved = np.einsum("thc,uhc->htu", np.abs(q), rk).max(axis=(1, 2)) / math.sqrt(HS)
    bound = rv.max(axis=(0, 2)) + np.expm1(2 * moved) * np.abs(v).max(axis=(0, 2))
    error = np.abs(outs[1] - outs[0]).reshape(T, NH, HS).max(axis=(0, 2))
    assert (error <= bound).all() and (error > bound / 500).all()


def test_gelu_is_close_to_x_times_the_normal_distribution() -> None:
    x = np.linspace(-10, 10, 1001)
    out = np.empty_like(x)
    reference.gelu_forward(out, x)
    exact = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x]
    assert np.abs(out - exact).max() < 5e-4
    assert out[0] == 0 and out[500] == 0 and out[-1] == 10


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_has_the_words_of_random123(
    counter: tuple[int, ...], key: int, words: tuple[int, ...]
) -> None:
    a, b, c, d = (np.array([word], np.uint64) for word in counter)
    assert tuple(int(word[0]) for word in philox((a, b, c, d), key)) == words


def test_dropout_keeps_its_share_and_the_mean() -> None:
    for dropout in (0.01, 0.1, 0.5, 0.9):
        factors = keep_factors(300, 4, 1000, dropout, 1, 2)
        assert set(np.unique(factors)) == {0, 1 / (1 - dropout)}
        n, deviation = factors.size, math.sqrt(dropout / (1 - dropout))
        assert abs(factors.mean() - 1) < 4 * deviation / math.sqrt(n)
        for axis in range(3):  # each token, head and column by itself, too
            means = factors.mean(axis=tuple({0, 1, 2} - {axis}))
            z = (means - 1) / deviation * math.sqrt(n / len(means))
            assert np.abs(z).max() < 5
            assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / len(z))


def test_masks_of_neighbours_steps_places_and_heads_are_independent() -> None:
    def mask(key: int, first: int) -> Array:
        return keep_factors(300, 3, 1001, 0.5, key, first) - 1

    def same(a: Array, b: Array) -> bool:
        return abs((a * b).mean()) > 4.5 / math.sqrt(a.size)

    key, first = 1337 << 32 | 100, 7 << 32
    one = mask(key, first)
    assert same(one, mask(key, first))
    others = [(key + 1, first), (key ^ 1 << 32, first), (key, first + (1 << 32)), (0, first)]
    assert not any(same(one, mask(*other)) for other in others)
    for axis in range(3):
        for shift in (1, 2, 3, 4, 5, 8, 16, 64):
            if shift < one.shape[axis]:
                assert not same(one, np.roll(one, shift, axis))


def test_factors_of_a_token_do_not_depend_on_the_others() -> None:
    whole = keep_factors(20, 5, 33, 0.3, 11, 2**63 + 7)
    assert np.array_equal(keep_factors(9, 2, 30, 0.3, 11, 2**63 + 11), whole[4:13, :2, :30])


def test_crossentropy_of_equal_logits_is_log_v() -> None:
    N, V = 3, 50
    losses, lse, targets = np.empty(N), np.empty(N), np.array([0, -1, 49], np.int32)
    reference.crossentropy_forward(losses, lse, np.full((N, V), 5.0), targets)
    np.testing.assert_allclose(losses, [math.log(V), 0, math.log(V)])
    np.testing.assert_allclose(lse, 5 + math.log(V))


def test_crossentropy_gradient_rows_sum_to_zero(normal: Any) -> None:
    logits, losses, lse, dlogits = normal(4, 9), np.empty(4), np.empty(4), np.empty((4, 9))
    targets = np.array([1, 8, 0, 3], np.int32)
    reference.crossentropy_forward(losses, lse, logits, targets)
    reference.crossentropy_backward(dlogits, logits, lse, targets, None, 2.0)
    np.testing.assert_allclose(dlogits.sum(axis=1), 0, atol=1e-15)
    np.testing.assert_allclose(dlogits[np.arange(4), targets], 2 * (np.exp(-losses) - 1))


def test_adamw_is_the_scalar_loop(normal: Any) -> None:
    n, rate, beta1, beta2, eps, decay, scale = 5, 0.01, 0.9, 0.95, 1e-8, 0.1, 0.5
    param, m, v = normal(n), np.zeros(n), np.zeros(n)
    scalars = [[float(p), 0.0, 0.0] for p in param]
    for t in range(1, 11):
        grad = normal(n)
        reference.adamw_update(param, m, v, grad, rate, beta1, beta2, eps, decay, t, scale)
        for state, raw in zip(scalars, grad, strict=True):
            g = float(raw) * scale
            state[1] = beta1 * state[1] + (1 - beta1) * g
            state[2] = beta2 * state[2] + (1 - beta2) * g**2
            m_hat, v_hat = state[1] / (1 - beta1**t), state[2] / (1 - beta2**t)
            state[0] = state[0] - rate * (m_hat / (math.sqrt(v_hat) + eps) + decay * state[0])
        np.testing.assert_allclose(np.stack([param, m, v], axis=1), scalars, rtol=1e-12)


def test_adamw_first_step_is_the_learning_rate() -> None:
    param, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    grad = np.array([5.0, -0.01, 0.0])
    reference.adamw_update(param, m, v, grad, 0.1, 0.9, 0.95, 1e-12, 0.1, 1, 1.0)
    np.testing.assert_allclose(param, [-0.1, 0.1, 0.0])


def test_global_norm() -> None:
    assert reference.global_norm(np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)) == 5.0
    assert type(reference.global_norm(np.ones(1, np.float32))) is float
    # in float32 the squares would overflow
    assert math.isclose(reference.global_norm(np.full(4, 1e30, np.float32)), 2e30, rel_tol=1e-6)


# ---- promises of every op ------------------------------------------------------------------------


def small(shape: dict[str, Any]) -> bool:
    return math.prod(size for size in shape.values() if type(size) is int) < 2000


SMALL = [
    case
    for name in OPS
    for case in [Case(name, shape) for shape in SHAPES[name] if small(shape)][-2:]
]


# not adamw_update: its outputs are states, which the scalar loop checks
@pytest.mark.parametrize("case", [c for c in SMALL if c.name != "adamw_update"], ids=str)
def test_outputs_are_accumulated_or_written(case: Case) -> None:
    used, fresh = case.arguments(), case.arguments()
    outputs = used[: len(OPS[case.name].outputs)]
    before = [np.zeros(1) if a is None else a.copy() for a in outputs]
    for output in fresh[: len(OPS[case.name].outputs)]:
        if output is not None:
            output[...] = 0
    getattr(reference, case.name)(*used)
    getattr(reference, case.name)(*fresh)
    accumulates = case.shape.get("accumulate", True)
    for i, output in enumerate(outputs):
        if output is not None:
            array = OPS[case.name].outputs[i]
            adds = accumulates if array.mode == "+" else "add" in case.shape and array.name == "dx"
            added = before[i] if adds else 0
            np.testing.assert_allclose(output, fresh[i] + added, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALIASES)
def test_output_may_be_an_input(name: str) -> None:
    case = Case(name, SHAPES[name][8])
    apart, shared = case.arguments(), case.arguments()
    output, source = ALIASES[name]
    shared[output] = shared[source]
    getattr(reference, name)(*apart)
    getattr(reference, name)(*shared)
    for a, b in zip(
        apart[: len(OPS[case.name].outputs)], shared[: len(OPS[case.name].outputs)], strict=True
    ):
        assert np.array_equal(a, b)


class Watched(np.ndarray):
    """An array that records the dtype of every result computed from it."""

    seen: ClassVar[set[np.dtype[Any]]] = set()

    def __array_wrap__(self, result: Array, context: Any = None, as_scalar: bool = False) -> Array:
        self.seen.add(result.dtype)
        return result.view(Watched)


@pytest.mark.parametrize("case", [c for c in SMALL if c.name != "global_norm"], ids=str)
def test_float32_is_never_widened(case: Case) -> None:
    Watched.seen.clear()
    arguments = [
        a.astype(np.float32).view(Watched)
        if isinstance(a, np.ndarray) and a.dtype == np.float64
        else a
        for a in case.arguments()
    ]
    getattr(reference, case.name)(*arguments)
    exact = {np.int64} if case.shape.get("kind") == "uint8" else set()  # sums of integers
    if case.shape.get("precision") == "fp16":  # multiply-adds of halves that are rounded once
        exact |= {np.float64, np.float16, np.int32}  # int32: exponents
    assert Watched.seen <= {np.dtype(dtype) for dtype in (np.float32, np.bool_, *exact)}
