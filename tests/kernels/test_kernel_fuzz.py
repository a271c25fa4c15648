"""Any shape and argument for the public functions: a right result or an error, never a crash.

GPT2C_FUZZ_EXAMPLES is the number of examples for each op and function, 15 by default.
tests/sanitize.sh runs this on kernels that notice a read or a write outside of an array.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.public_ops import PUBLIC, arrays_of, results_of, solved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2c import GPT2, Engine, GenerationConfig, GPT2Config
from gpt2c.kernels.backend import PRECISIONS, backends, get_backend
from gpt2c.kernels.cases import EXAMPLES

REFUSALS = (ValueError, TypeError, MemoryError, OSError)
# test_kernels checks the precision. Here two numbers may cancel, which costs digits; a read from a
# wrong place would give an entirely different number.
TOLERANCE = 1e-3
# Rarely a number lies almost half way between two 8-bit steps, and rounds the other way: by 1/127
# of the largest in its row, which later layers pass on. test_kernels checks that every backend
# rounds the same row to the same integers.
ROUNDED = 5e-2

fuzzed = settings(
    max_examples=int(os.environ.get("GPT2C_FUZZ_EXAMPLES", "15")),
    derandomize="GPT2C_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def numbers_may_be_none() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def same(result: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    a, b = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    largest = np.abs(b).max(initial=1)
    return a.shape == b.shape and bool((np.abs(a - b) <= tolerance * largest).all())


VALID = st.sampled_from([True, False])  # the simplest, which is tried first, is valid


def attempt(valid: bool, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return a call's results, or None where it is refused; valid arguments must not be refused."""
    try:
        return call(*arguments)
    except REFUSALS:
        if valid:
            raise
        return None


# ---- arguments -----------------------------------------------------------------------------------

SIZE = st.sampled_from([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65]) | st.integers(1, 80)
FEW = st.integers(1, 4)
# Kernels share their work among threads from 16,384 numbers on.
WIDE = SIZE | st.sampled_from([129, 257, 300])
LENGTH = st.integers(1, 5000) | st.integers(16_384, 40_000)
SIZE_OF = {"B": FEW, "NH": FEW}  # else by how many sizes there are


@st.composite
def op_shapes(draw: Any, name: str) -> dict[str, Any]:
    example = EXAMPLES[name]
    usual = {1: LENGTH, 2: WIDE}.get(len(example.letters), SIZE)
    shape = {letter: draw(SIZE_OF.get(letter, usual)) for letter in example.letters}
    if example.kinds and draw(st.booleans()):
        shape["kind"] = draw(st.sampled_from(sorted(example.kinds)))
    if name.startswith("matmul"):
        shape["precision"] = draw(st.sampled_from(PRECISIONS))
    return shape


def misaligned(array: Any) -> Any:
    memory = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:]
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def read_only(array: Any) -> Any:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


# The same numbers in another form; a call that accepts it must compute the same.
FORMS: list[Callable[[Any], Any]] = [
    misaligned,
    read_only,
    np.asfortranarray,
    lambda array: np.flip(np.flip(array).copy()),  # negative strides
    lambda array: np.repeat(array[..., None], 2, -1)[..., 0],
    lambda array: array.astype(array.dtype.newbyteorder()),
    lambda array: array.astype(np.float64 if array.dtype.kind == "f" else np.int64),
    lambda array: array.astype(object),
    lambda array: array.view(np.ma.MaskedArray),
    lambda array: array.tolist(),
]
LARGE = [2**40, 2**42]  # more than any memory, so that nothing tries


def resized(array: Any, axis: int, size: int) -> Any:
    """Give an axis another size, however large: it takes no memory."""
    shape = list(array.shape)
    shape[axis] = size
    return np.broadcast_to(array.reshape(-1)[:1].reshape([1] * len(shape)), shape)


@st.composite
def spoiled(draw: Any, array: Any) -> Any:
    """Return another object in place of an array."""
    if not array.ndim or not array.size:
        return draw(WRONG)
    axis = draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    what = draw(st.integers(0, 6))
    if what == 0:
        return resized(array, axis, draw(st.sampled_from([0, size - 1, size + 1]))).copy()
    if what == 1:
        return resized(array, axis, draw(st.sampled_from(LARGE)))
    if what == 2:
        return draw(st.sampled_from([array[None], array[0], array.ravel(), array.T]))
    if what == 3:
        dtype = draw(st.sampled_from(["f2", "f4", "f8", "i4", "u4", "i8", "u1", "?", "c8", "S1"]))
        return array.astype(dtype)
    if what == 4:
        return draw(WRONG)
    array = array.copy()
    numbers = [-(2**31), -2, -1, array.max() + 1, 2**31 - 1]
    if array.dtype.kind == "f":
        numbers = [np.nan, np.inf, -np.inf, 3e38, 1e-45, -1e20, -0.0]
    with np.errstate(all="ignore"):
        values = np.array(numbers).astype(array.dtype)
    array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(list(values)))
    return array


WRONG = st.sampled_from(
    [
        *(None, True, 0, -1, 1, 3, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, -(10**400)),
        *(0.0, 1.5, -1.0, 1e-300, 1e300, float("nan"), float("inf"), 1j, "2", b"2", object()),
        *(np.float32(1), np.int64(3), np.uint64(2**64 - 1), np.arange(2), [1, 2], [[1], [1, 2]]),
        *([], {}, [[]], np.zeros((0, 3), np.int32), np.zeros((2, 2), "f4,i4"), np.array("2", "M8")),
    ]
)

# ---- ops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_any_shape_gets_the_references_result(name: str) -> None:
    taken = 0

    @fuzzed
    @given(VALID, op_shapes(name), st.sampled_from(backends()), st.data())
    def check(valid: bool, shape: dict[str, Any], backend: str, data: st.DataObject) -> None:
        nonlocal taken
        arguments, expected = solved(name, shape=shape)
        for key, value in arguments.items():
            if not valid and isinstance(value, np.ndarray) and data.draw(st.booleans()):
                arguments[key] = data.draw(st.sampled_from(FORMS))(value)
        results = attempt(valid, results_of, name, arguments | {"backend": backend})
        if results is None:
            return
        taken += 1
        for result, right in zip(results, expected, strict=True):
            assert same(result, right)

    check()
    assert taken


@pytest.mark.parametrize("name", [name for name in PUBLIC if len(arrays_of(name)) > 1])
def test_shapes_larger_than_memory_are_refused(name: str) -> None:
    """The error suggests no copy, which would not help. Some sizes of the first array are free."""
    arguments, _ = solved(name)
    for key in arrays_of(name)[1:]:
        huge = resized(arguments[key], arguments[key].ndim - 1, LARGE[0])
        assert "copy" not in refused(PUBLIC[name], **arguments | {key: huge})


@pytest.mark.parametrize("name", PUBLIC)
def test_any_argument_gets_a_result_or_a_refusal(name: str) -> None:
    @fuzzed
    @given(op_shapes(name), st.sampled_from(backends()), st.data())
    def check(shape: dict[str, Any], backend: str, data: st.DataObject) -> None:
        arguments, _ = solved(name, shape=shape)
        for key in data.draw(st.sets(st.sampled_from(sorted(arguments)), min_size=1, max_size=2)):
            value = arguments[key]
            isarray = isinstance(value, np.ndarray)
            arguments[key] = data.draw(spoiled(value) if isarray else WRONG)
        try:
            results_of(name, arguments | {"backend": backend})
        except REFUSALS:
            return

    check()


# ---- models --------------------------------------------------------------------------------------

CONFIGS = [
    GPT2Config(vocab_size=V, n_positions=P, n_embd=C, n_layer=L, n_head=NH, n_inner=F)
    for V, P, C, L, NH, F in [
        *((5, 3, 2, 1, 1, 1), (37, 9, 24, 2, 3, None), (70, 17, 65, 1, 5, 33)),
        (70, 9, 256, 1, 4, None),  # threads share a step of N * C * F >= 200,000
    ]
]


ASKED = ("max_new_tokens", "do_sample", "on_full")  # else they change too little


@cache
def model_of(number: int, stored: str, backend: str) -> Any:
    model = GPT2(CONFIGS[number], seed=number, backend=get_backend(backend, 2))
    # So large that no two logits are nearly equal, and so small that rounding decides no softmax.
    model.flat_parameters *= min(10, 50 / CONFIGS[number].n_embd ** 0.5)
    return model if stored == "fp32" else model.quantize(stored)


@st.composite
def ids(draw: Any, valid: bool, low: int, high: int, *shape: int) -> Any:
    """Return int32 numbers in [low, high); if not valid, something else half of the time."""
    count = int(np.prod(shape))
    numbers = draw(st.lists(st.integers(low, high - 1), min_size=count, max_size=count))
    array = np.array(numbers, np.int32).reshape(shape)
    if valid or draw(st.booleans()):
        return array
    return draw(st.sampled_from(FORMS))(array) if draw(st.booleans()) else draw(spoiled(array))


@st.composite
def asked(draw: Any, valid: bool, config: GPT2Config) -> dict[str, Any]:
    """Return arguments for each public method of a model; valid ones suit them all."""
    V, P = config.vocab_size, config.n_positions
    B, T, N = draw(st.integers(1, 2)), draw(st.integers(1 + valid, P)), draw(st.integers(0, 2))
    last = P - T if valid else P
    mostly = {"new": st.integers(0, 4), "slot": st.integers(0, 1), "position": st.integers(0, last)}
    targets, slots = draw(ids(valid, -1, V, B, T)), draw(ids(valid, 0, 2, N))
    if valid:
        targets[0, 0] = 0  # not all of them ignored
        slots = np.array(draw(st.permutations([0, 1])), np.int32)[:N]
    settings_ = st.dictionaries(
        st.sampled_from(
            [field.name for field in fields(GenerationConfig) if field.name not in ASKED]
        ),
        st.integers(0, 3) | WRONG,
        max_size=2,
    )
    return {
        **{"idx": draw(ids(valid, 0, V, B, T)), "targets": targets},
        **{"row": draw(ids(valid, 0, V, T)), "wanted": draw(ids(valid, -1, V, T))},
        **{"tokens": draw(ids(valid, 0, V, N)), "slots": slots},
        "positions": draw(ids(valid, 0, P, N)),
        **{n: draw(right if valid else right | right | WRONG) for n, right in mostly.items()},
        "settings": {"temperature": 0, "on_full": "stop", "seed": 1}
        | ({} if valid else draw(settings_)),
    }


def loss(model: Any, a: dict[str, Any]) -> list[Any]:
    results = [model.loss(a["idx"], a["targets"], keep=True)]
    if model.trained:
        model.backward()
        results += [gradient.copy() for gradient in model.gradients.values()]
        model.zero_grad()
    return results


def submit(model: Any, a: dict[str, Any]) -> list[Any]:
    with Engine(model, slots=2) as engine:
        return [engine.submit(a["row"], a["new"], **a["settings"]).result(timeout=60)]


def step(model: Any, a: dict[str, Any]) -> list[Any]:
    decoder = model.decoder(2)
    decoder.keys[...], decoder.values[...] = 0.5, 0.25
    return [decoder.step(a["tokens"], a["slots"], a["positions"])]


DOORS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "call": lambda model, a: model(a["idx"]),
    "loss": loss,
    "mean_loss": lambda model, a: [model.mean_loss(a["idx"], a["targets"])],
    "logprobs": lambda model, a: model.logprobs(a["idx"]),
    "generate": lambda model, a: model.generate(a["idx"], a["new"], **a["settings"]),
    "submit": submit,
    "step": step,
    "read": lambda model, a: model.decoder(2).read(a["row"], a["slot"], a["position"]),
    "losses": lambda model, a: model.decoder().losses(a["row"], a["wanted"]),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stored", ["fp32", "fp16", "int8"])
def test_any_ids_get_the_references_result_or_a_refusal(door: str, stored: str) -> None:
    taken = 0

    @fuzzed
    @given(VALID, st.integers(0, len(CONFIGS) - 1), st.sampled_from(backends()), st.data())
    def check(valid: bool, number: int, backend: str, data: st.DataObject) -> None:
        nonlocal taken
        arguments = data.draw(asked(valid, CONFIGS[number]))
        results = attempt(valid, DOORS[door], model_of(number, stored, backend), arguments)
        if results is None:
            return
        taken += 1
        expected = DOORS[door](model_of(number, stored, "numpy"), arguments)
        if arguments["settings"].get("seed", 1) is None:  # drawn, so others
            return
        for result, right in zip(results, expected, strict=True):
            assert same(result, right, ROUNDED if stored == "int8" else TOLERANCE)

    check()
    assert taken
