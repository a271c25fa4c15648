"""The ops on plain arrays: right on every backend, and each bad argument is refused."""

from __future__ import annotations

import ast
import inspect
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.public_ops import GIVEN, PUBLIC, arrays_of, results_of, solved
from op_types import STUB, declaration

from gpt2c import ops
from gpt2c.kernels import reference
from gpt2c.kernels.backend import backends
from gpt2c.kernels.cases import EXAMPLES, OpShape, normalised_error
from gpt2c.kernels.op import OPS

ELEMENTWISE = [op.name for op in OPS.values() if op.inputs[0].shape == ("*",)]  # any shape does
EVERY = pytest.mark.parametrize("name", PUBLIC)
EVERY_ARRAY = pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in PUBLIC for argument in arrays_of(name)]
)


@pytest.fixture(params=["numpy", "auto"])
def either(request: pytest.FixtureRequest) -> str:
    """Return the name of the reference, then of a compiled backend: all have the same checks."""
    return request.param


# ---- results -------------------------------------------------------------------------------------


def test_ops_are_those_of_the_reference() -> None:
    assert PUBLIC.keys() == EXAMPLES.keys()
    for name, function in PUBLIC.items():
        inputs = set(inspect.signature(getattr(reference, name)).parameters)
        assert set(inspect.signature(function).parameters) <= inputs | GIVEN.keys() | {"backend"}


@EVERY
def test_results_are_the_references(name: str, backend_name: str) -> None:
    arguments, expected = solved(name)
    arrays = {key: value for key, value in arguments.items() if isinstance(value, np.ndarray)}
    before = {key: value.tobytes() for key, value in arrays.items()}
    for value in arrays.values():
        value.flags.writeable = False  # such as a mapped file's
    results = results_of(name, arguments | {"backend": backend_name})
    for result, right in zip(results, expected, strict=True):
        assert np.shape(result) == np.shape(right)
        assert normalised_error(result, right) <= EXAMPLES[name].rtol
        assert name == "global_norm" or result.dtype == np.float32
        assert not any(np.shares_memory(result, value) for value in arrays.values())
    assert before == {key: value.tobytes() for key, value in arrays.items()}


@EVERY
def test_numpy_computes_in_float64(name: str) -> None:
    arguments, expected = solved(name, np.float64)
    results = results_of(name, arguments | {"backend": "numpy"})
    for result, right in zip(results, expected, strict=True):
        assert np.array_equal(result, right)
        assert name == "global_norm" or result.dtype == np.float64


@EVERY
def test_auto_is_the_default(name: str) -> None:
    arguments, _ = solved(name)
    default, auto = results_of(name, arguments), results_of(name, arguments | {"backend": "auto"})
    for a, b in zip(default, auto, strict=True):
        assert np.array_equal(a, b)


def test_matmul_may_have_no_bias(backend_name: str) -> None:
    arguments, _ = solved("matmul_forward")
    bias = arguments.pop("bias")
    without = ops.matmul_forward(**arguments, backend=backend_name)
    assert np.array_equal(
        without, ops.matmul_forward(**arguments, bias=np.zeros_like(bias), backend=backend_name)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_linear_layer_may_have_no_scale_and_no_bias(dtype: type, backend_name: str) -> None:
    arguments, _ = solved("matmul_forward")
    x, weight, bias = arguments["x"], arguments["weight"].astype(dtype), arguments["bias"]
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    out = ops.matmul_forward(x, weight, backend=backend_name)
    assert out.dtype == np.float32 and normalised_error(out, expected) <= 4e-6
    out = ops.matmul_forward(x, weight, bias=bias, backend=backend_name)
    assert normalised_error(out, expected + bias) <= 4e-6


SMALL: dict[str, tuple[str, OpShape]] = {
    "weights of 8 bits": ("matmul_forward", {"N": 5, "C": 9, "OC": 21, "kind": "uint8"}),
    "tokens of 8 bits": ("encoder_forward", {"B": 2, "T": 3, "C": 9, "V": 7, "kind": "uint8"}),
    "tokens of 16 bits": (
        "encoder_forward",
        {"B": 2, "T": 3, "C": 9, "V": 7, "kind": "float16", "position": 4},
    ),
    "a cache": (
        "attention_forward",
        {"B": 2, "T": 5, "NH": 3, "HS": 5, "position": 4, "P": 11},
    ),
    "a cache of 16 bits": (
        "attention_forward",
        {"B": 2, "T": 5, "NH": 3, "HS": 5, "position": 4, "P": 11, "cache": "float16"},
    ),
    "a cache of 8 bits": (
        "attention_forward",
        {"B": 2, "T": 5, "NH": 6, "HS": 5, "KV": 2, "position": 4, "P": 11, "cache": "int8"},
    ),
    "grouped queries": ("attention_forward", {"B": 2, "T": 5, "NH": 6, "HS": 5, "KV": 2}),
    "a ragged batch": ("attention_forward", {"B": 1, "T": 9, "NH": 3, "HS": 5, "S": 4}),
    "tokens of a ragged batch": ("encoder_forward", {"B": 1, "T": 9, "C": 7, "V": 7, "S": 4}),
    "tokens alone": ("encoder_forward", {"B": 2, "T": 3, "C": 9, "V": 7, "kind": "no wpe"}),
    "dropout": ("attention_forward", {"B": 2, "T": 5, "NH": 3, "HS": 5, "dropout": 0.4}),
    "a weight for each row": ("crossentropy_backward", {"N": 9, "V": 17, "kind": "weighted"}),
}


def given_with(what: str) -> tuple[Any, dict[str, Any], list[Any]]:
    """Return an op's public function, arguments of SMALL by name, and the reference's results."""
    name, shape = SMALL[what]
    given, expected = solved(name, shape=shape)
    return PUBLIC[name], given, expected


@pytest.mark.parametrize("what", SMALL)
def test_optional_arrays_are_taken(what: str, backend_name: str) -> None:
    function, given, expected = given_with(what)
    results = function(**given, backend=backend_name)
    results = results if isinstance(results, tuple) else (results,)
    for result, right in zip(results, expected, strict=True):
        assert normalised_error(result, right) <= 4e-6


@pytest.mark.parametrize(
    ("what", "changes", "named"),
    [
        ("weights of 8 bits", {"scale": None}, "scale"),
        ("weights of 8 bits", {"scale": np.ones(20, np.float32)}, "scale"),
        ("weights of 8 bits", {"scale": np.ones(21, np.float64)}, "scale"),
        ("weights of 8 bits", {"weight": np.zeros((21, 9), np.float32)}, "weight must be uint8"),
        ("tokens of 8 bits", {"scale": None}, "scale"),
        ("tokens of 16 bits", {"position": 7}, "idx"),  # T = 3, P = 9
        ("tokens of 16 bits", {"position": -1}, "position"),
        ("a cache of 8 bits", {"key_scales": None}, "key_scales"),
        ("a cache of 8 bits", {"key_scales": None, "value_scales": None}, "key_scales must be"),
        ("a cache of 8 bits", {"keys": None}, "keys"),
        ("a cache of 8 bits", {"keys": None, "values": None}, "keys"),
        (
            "a cache of 8 bits",
            {"values": np.zeros((2, 2, 11, 5), np.float32)},
            "values must be int8",
        ),
        ("a cache of 8 bits", {"value_scales": np.ones((2, 2, 10), np.float32)}, "value_scales"),
        (
            "a cache of 8 bits",
            {"value_scales": np.ones((2, 2, 11))},
            "value_scales must be float32",
        ),
        (
            "a cache of 16 bits",
            {"keys": np.zeros((2, 3, 11, 5), np.float32)},
            "values must be float32",
        ),
        (
            "a cache of 16 bits",
            {"keys": np.zeros((2, 3, 11, 5), np.uint8)},
            "keys must be float32 or",
        ),
        ("a cache", {"position": -1}, "position"),
        ("a cache", {"position": 7}, "position"),  # T = 5, P = 11
        ("a cache", {"position": 4.0}, "position must be a whole number"),
        ("a cache", {"keys": None}, "keys"),
        ("a cache", {"values": None}, "values"),
        ("a cache", {"values": np.zeros((2, 3, 10, 5), np.float32)}, "values"),
        ("a cache", {"qkv": np.zeros((2, 5, 48), np.float32)}, "n_head"),  # C = 16
        ("a cache", dict.fromkeys(("keys", "values"), np.zeros((2, 3, 11, 4), np.float32)), "keys"),
    ],
)
def test_optional_arrays_that_do_not_fit_are_refused(
    what: str, changes: dict[str, Any], named: str, either: str
) -> None:
    function, given, _ = given_with(what)
    assert refused(function, **given | changes, backend=either).startswith(named)


@pytest.mark.parametrize("offsets", [[0, 4], [1, 9], [0, 5, 5, 9], [0, 9, 4, 9], [9], [0, 10]])
def test_offsets_that_divide_no_row_are_refused(offsets: list[int], either: str) -> None:
    for what in ("a ragged batch", "tokens of a ragged batch"):
        function, given, _ = given_with(what)
        wrong = given | {"offsets": np.array(offsets, np.int32), "backend": either}
        assert refused(function, **wrong).startswith("offsets")


def test_offsets_of_several_rows_are_refused(either: str) -> None:
    function, given, _ = given_with("grouped queries")
    wrong = given | {"offsets": np.array([0, 5], np.int32), "backend": either}
    assert "a batch of B=1 row" in refused(function, **wrong)


@pytest.mark.parametrize("n_kv_head", [0, -1, 4, 5, 12])
def test_key_heads_that_divide_no_query_heads_are_refused(n_kv_head: int) -> None:
    function, given, _ = given_with("grouped queries")
    assert "KV" in refused(function, **given | {"n_kv_head": n_kv_head})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"dropout": "0.1"}, "dropout must be a number"),
        ({"key": -1}, "key"),
        ({"key": 2**64}, "key"),
        ({"key": 0.5}, "key must be a whole number"),
        ({"first": -1}, "first"),
        ({"first": 2**64}, "first"),
        ({"first": 2**33 - 1}, "first"),  # the second row would have another place
    ],
)
def test_dropout_out_of_range_is_refused(changes: dict[str, Any], named: str, either: str) -> None:
    for name in ("dropout_forward", "attention_forward", "attention_backward"):
        wrong = solved(name)[0] | changes | {"backend": either}
        assert refused(PUBLIC[name], **wrong).startswith(named)


def test_dropout_with_a_cache_is_refused(either: str) -> None:
    function, given, _ = given_with("a cache")
    assert refused(function, **given | {"dropout": 0.1, "backend": either}).startswith("dropout")


def test_backend_may_stand_in_its_old_place() -> None:
    arguments, expected = solved("matmul_forward")
    given = (arguments["x"], arguments["weight"], arguments["bias"], "numpy")
    assert normalised_error(ops.matmul_forward(*given), expected[0]) <= 4e-6
    qkv = solved("attention_forward")[0]["qkv"]
    assert np.array_equal(
        ops.attention_forward(qkv, 3, "numpy")[0], ops.attention_forward(qkv, 3, backend="numpy")[0]
    )


def test_old_names_work_and_warn_with_the_new_one(backend_name: str) -> None:
    _, given, expected = given_with("weights of 8 bits")
    with pytest.warns(DeprecationWarning, match="matmul_forward"):
        out = ops.linear_forward(
            given["x"], given["weight"], given["scale"], given["bias"], backend_name
        )
    assert normalised_error(out, expected[0]) <= 4e-6
    _, given, expected = given_with("a cache")
    one = (given[name][1] for name in ("qkv", "keys", "values"))
    with pytest.warns(DeprecationWarning, match="attention_forward"):
        results = ops.cache_attention_forward(*one, given["position"], backend_name)
    for result, right in zip(results, (expected[0], *expected[2:]), strict=True):
        assert normalised_error(result, right[1]) <= 4e-6
    dout = np.ones((2, 3), np.float32)
    with pytest.warns(DeprecationWarning, match="both terms"):
        assert all(np.array_equal(d, dout) for d in ops.residual_backward(dout, backend_name))


def test_nonfinite_16_bit_weights_are_refused(backend_name: str) -> None:
    x, weight = np.ones((2, 3), np.float32), np.ones((4, 3), np.float16)
    for bad in (np.nan, np.inf, -np.inf):
        weight[3, 2] = bad
        assert refused(ops.matmul_forward, x, weight, backend=backend_name).startswith("weight")
    wide = ops.matmul_forward(x, weight.astype(np.float32), backend=backend_name)
    assert not np.isfinite(wide[:, 3]).any() and np.isfinite(wide[:, :3]).all()


def test_too_many_channels_of_8_bits_are_refused(backend_name: str) -> None:
    scale = np.ones(1, np.float32)
    for channels in (65536, 65537):
        x, weight = np.ones((1, channels), np.float32), np.full((1, channels), 130, np.uint8)
        if channels == 65536:
            out = ops.matmul_forward(x, weight, scale=scale, backend=backend_name)
            assert out[0, 0] == pytest.approx(2 * channels, rel=1e-6)
        else:
            assert "65536" in refused(
                ops.matmul_forward, x, weight, scale=scale, backend=backend_name
            )


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 5)])
def test_elementwise_ops_take_any_shape(
    shape: tuple[int, ...], backend_name: str, rng: np.random.Generator
) -> None:
    x, v = np.asarray(rng.standard_normal(shape), np.float32), np.ones(shape, np.float32)
    assert ops.gelu_forward(x, backend=backend_name).shape == shape
    assert ops.residual_forward(x, x, backend=backend_name).shape == shape
    assert all(a.shape == shape for a in ops.adamw_update(x, x, v, x, backend=backend_name))
    assert ops.global_norm(x, backend=backend_name) == pytest.approx(np.linalg.norm(x.ravel()))


# ---- bad arguments -------------------------------------------------------------------------------


@EVERY_ARRAY
@pytest.mark.parametrize("dtype", ["f2", ">f4", "i8", "c8", "O", "U1"])
def test_another_dtype_is_refused(name: str, argument: str, dtype: str, either: str) -> None:
    declared = next(array for array in OPS[name].arrays if array.name == argument)
    if dtype == "f2" and declared.kind == "weights":
        pytest.skip("a weight may have 16 bits")
    arguments, _ = solved(name)
    arguments[argument] = np.zeros(arguments[argument].shape, dtype)
    message = refused(PUBLIC[name], **arguments | {"backend": either})
    assert message.startswith(argument) and str(np.dtype(dtype)) in message


@EVERY
def test_float64_is_for_numpy(name: str, either: str) -> None:
    if either == "numpy":
        pytest.skip("numpy computes in float64")
    arguments, _ = solved(name, np.float64)
    assert "float32" in refused(PUBLIC[name], **arguments | {"backend": either})


@EVERY_ARRAY
def test_floats_of_two_sizes_are_refused(name: str, argument: str, either: str) -> None:
    arguments, _ = solved(name)
    floats = [value for value in arguments.values() if getattr(value, "dtype", None) == np.float32]
    if arguments[argument].dtype != np.float32 or (len(floats) == 1 and either == "numpy"):
        pytest.skip("no float, or the only one")
    arguments[argument] = arguments[argument].astype(np.float64)
    assert "float64" in refused(PUBLIC[name], **arguments | {"backend": either})


@EVERY_ARRAY
def test_arrays_with_gaps_are_refused(name: str, argument: str, either: str) -> None:
    arguments, _ = solved(name)
    right = arguments[argument]
    wide = np.repeat(right, 2, axis=-1)
    arguments[argument] = wide[..., ::2]
    assert np.array_equal(arguments[argument], right, equal_nan=True)
    message = refused(PUBLIC[name], **arguments | {"backend": either})
    assert message.startswith(argument) and "contiguous" in message
    if right.ndim > 1:  # right shape, wrong order
        arguments[argument] = np.asfortranarray(right)
        assert refused(PUBLIC[name], **arguments | {"backend": either}).startswith(argument)


@EVERY_ARRAY
def test_empty_arrays_are_refused(name: str, argument: str, either: str) -> None:
    arguments, _ = solved(name)
    arguments[argument] = arguments[argument][:0]
    assert refused(PUBLIC[name], **arguments | {"backend": either}).startswith(argument)


@EVERY_ARRAY
def test_other_objects_than_arrays_are_refused(name: str, argument: str, either: str) -> None:
    arguments, _ = solved(name)
    own = arguments[argument]
    for wrong in (own.tolist(), np.ma.array(own), 1.0, "text", None):
        optional = any(a.name == argument and a.optional for a in OPS[name].inputs)
        if not (optional and wrong is None):
            bad = arguments | {argument: wrong, "backend": either}
            assert refused(PUBLIC[name], **bad).startswith(argument)


@EVERY_ARRAY
@pytest.mark.parametrize("axes", ["more", "fewer"])
def test_another_number_of_axes_is_refused(
    name: str, argument: str, axes: str, either: str
) -> None:
    arguments, _ = solved(name)
    arrays = arrays_of(name)
    if name in ELEMENTWISE and len(arrays) == 1:
        pytest.skip("any shape will do")
    right = arguments[argument]
    arguments[argument] = right[None] if axes == "more" else right[0, ...].copy()
    message = refused(PUBLIC[name], **arguments | {"backend": either})
    named = arrays if name in ELEMENTWISE else [argument]
    assert message.startswith(tuple(named))


@EVERY_ARRAY
def test_sizes_that_do_not_fit_are_refused(name: str, argument: str, either: str) -> None:
    """One more of a size that other arrays have; of two that differ, either may be named."""
    arguments, _ = solved(name)
    declared = {array.name: array for array in OPS[name].arrays if array.name in arrays_of(name)}
    right = arguments[argument]
    for axis, letter in enumerate(declared[argument].letters):
        alike = [array.name for array in declared.values() if letter in array.letters]
        one_more = np.concatenate([right, right.take([0], axis)], axis)
        if len(alike) > 1:
            wrong = arguments | {argument: one_more, "backend": either}
            named = tuple(alike) if len(alike) == 2 else argument
            assert refused(PUBLIC[name], **wrong).startswith(named)


def test_heads_that_do_not_divide_the_channels_are_refused(either: str) -> None:
    arguments, _ = solved("attention_backward")
    lse = np.zeros((2, 4, 5), np.float32)  # C = 15
    wrong = arguments | {"lse": lse, "backend": either}
    assert refused(ops.attention_backward, **wrong).startswith("lse")


@pytest.mark.parametrize(
    ("name", "argument", "wrong"),
    [
        *(("encoder_forward", "idx", token) for token in (-1, 19, 2**31 - 1)),
        *(("encoder_backward", "idx", token) for token in (-1, 19, -(2**31))),
        *(("crossentropy_forward", "targets", token) for token in (-2, 19, 2**31 - 1)),
        *(("crossentropy_backward", "targets", token) for token in (-2, 19, -(2**31))),
    ],
)
def test_ids_out_of_range_are_refused(name: str, argument: str, wrong: int, either: str) -> None:
    arguments, _ = solved(name)
    arguments[argument].flat[-1] = wrong
    message = refused(PUBLIC[name], **arguments | {"backend": either})
    assert message.startswith(argument) and str(wrong) in message


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("encoder_forward", {"wpe": np.zeros((4, 17), np.float32)}, "idx"),  # T = 5
        ("encoder_backward", {"n_positions": 4}, "idx"),
        ("encoder_backward", {"n_positions": 0}, "idx"),
        ("encoder_backward", {"vocab_size": 0}, "idx"),
        ("attention_forward", {"n_head": 0}, "n_head"),
        ("attention_forward", {"n_head": -1}, "n_head"),
        ("attention_forward", {"n_head": 2}, "n_head"),  # C = 15
        ("attention_forward", {"n_head": 30}, "n_head"),
        ("rope_forward", {"heads": 0}, "heads must be such that 1 <= heads"),
        ("rope_forward", {"heads": 6}, "heads must be such that"),  # C = 70, D = 7
        ("rope_forward", {"qkv": np.zeros((2, 5, 77), np.float32)}, "qkv must be such that"),
        ("rope_forward", {"position": -1}, "position must be such that 0 <= position"),
        ("rope_backward", {"position": 6}, "position must be such that"),  # T = 5, P = 10
        ("adamw_update", {"t": 0}, "t must"),
        ("adamw_update", {"t": -1}, "t must"),
        ("adamw_update", {"t": 1.5}, "t must be a whole number"),
        ("adamw_update", {"t": True}, "t must be a whole number"),
        ("adamw_update", {"eps": Fraction(10**400)}, "eps must be a number"),
        ("layernorm_forward", {"eps": Fraction(10**400)}, "eps must be a number"),
        ("layernorm_forward", {"eps": -1e-5}, "eps must be such that 0 <= eps, got eps=-1e-05"),
        ("layernorm_forward", {"eps": np.nan}, "eps must be such that 0 <= eps, got eps=nan"),
        ("adamw_update", {"eps": -1e-8}, "eps must be such that 0 <= eps, got eps=-1e-08"),
        ("adamw_update", {"eps": np.nan}, "eps must be such that 0 <= eps, got eps=nan"),
        ("encoder_backward", {"vocab_size": 2**31}, "vocab_size must be at most 2147483647, got "),
        ("encoder_backward", {"vocab_size": 10**30}, "vocab_size must be at most 2147483647, got "),
        ("encoder_backward", {"n_positions": 10**18}, "n_positions must be at most 2147483647, "),
        ("attention_forward", {"n_head": 1.0}, "n_head must be a whole number"),
        ("encoder_backward", {"vocab_size": 11.0}, "vocab_size must be a whole number"),
        ("encoder_backward", {"n_positions": True}, "n_positions must be a whole number"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    name: str, changes: dict[str, Any], named: str, either: str
) -> None:
    arguments, _ = solved(name)
    assert refused(PUBLIC[name], **arguments | changes | {"backend": either}).startswith(named)


@pytest.mark.parametrize("size", ["vocab_size", "n_positions"])
def test_results_that_do_not_fit_are_refused(
    size: str, either: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2c.kernels.memory.free_bytes", lambda untouched: 10**9)
    arguments, _ = solved("encoder_backward")
    with pytest.raises(MemoryError, match=r"^encoder_backward needs .* MB are free: take smaller"):
        PUBLIC["encoder_backward"](**arguments | {size: 2**31 - 1, "backend": either})


@EVERY
def test_argument_that_is_missing_or_unknown_names_the_function(name: str) -> None:
    arguments, _ = solved(name)
    with pytest.raises(TypeError, match=f"^{name}: got an unexpected keyword argument 'abc'$"):
        PUBLIC[name](**arguments, abc=1)
    first = next(iter(inspect.signature(PUBLIC[name]).parameters))
    with pytest.raises(TypeError, match=f"^{name}: missing a required argument: '{first}'$"):
        PUBLIC[name]()


@EVERY
def test_docstrings_list_every_parameter_with_its_default(name: str) -> None:
    text = PUBLIC[name].__doc__.split("Parameters\n----------\n")[1].split("\n\nReturns")[0]
    listed = dict(line.split(" : ", 1) for line in text.splitlines())
    parameters = inspect.signature(PUBLIC[name]).parameters
    assert list(listed) == list(parameters)
    for parameter in parameters.values():
        if isinstance(parameter.default, int | float | str):
            assert listed[parameter.name].endswith(f"default {parameter.default}")


@EVERY
def test_declared_types_are_those_of_the_function(name: str) -> None:
    """mypy and editors read the declarations in op_types.pyi; the table makes the functions."""
    body = ast.parse(STUB.read_text()).body
    declared = {one.name: ast.unparse(one) for one in body if isinstance(one, ast.FunctionDef)}
    assert list(declared) == list(PUBLIC)
    assert declared[name] == ast.unparse(ast.parse(declaration(name))), (
        "run python tests/op_types.py"
    )


@EVERY
def test_results_have_the_declared_type(name: str) -> None:
    returned = str(inspect.signature(PUBLIC[name]).return_annotation)
    result = PUBLIC[name](**solved(name)[0])
    if returned.startswith("tuple"):
        assert isinstance(result, tuple) and all(isinstance(a, np.ndarray) for a in result)
        assert returned == "tuple[Array, ...]" or len(result) == returned.count("Array")
    else:
        assert isinstance(result, {"Array": np.ndarray, "float": float}[returned])


@EVERY
def test_unknown_backend_is_refused(name: str) -> None:
    arguments, _ = solved(name)
    message = refused(PUBLIC[name], **arguments | {"backend": "cuda"})
    assert "'cuda'" in message and message.endswith(", ".join(backends()))
