"""8-bit and 16-bit weights: rounding, files, refusals, and their error."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from gpt2c import GPT2, AdamW, GPT2Config, QuantizedGPT2
from gpt2c.formats.huggingface import stored_method
from gpt2c.formats.load import find_model
from gpt2c.model.quantized import round_rows

V, T, C = 61, 24, 20
SMALL = GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=2, n_head=2, n_inner=33)
MATRICES = [name for name, shape in SMALL.parameter_shapes().items() if len(shape) == 2]
ROUNDED = [name for name in MATRICES if name != "wpe.weight"]
METHODS = ["int8", "fp16"]


def make(backend: Any = "auto", seed: int = 1) -> GPT2:
    model, rng = GPT2(SMALL, seed=seed, backend=backend), np.random.default_rng(seed)
    for parameter in model.parameters.values():
        parameter += np.float32(0.05) * rng.standard_normal(parameter.shape, np.float32)
    return model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory that holds a GPT-2."""
    make().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


# ---- rounding ------------------------------------------------------------------------------------


def rounded(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weight and scale, and in float64 the numbers that they represent."""
    weight, scale = np.empty(tensor.shape, np.uint8), np.empty(len(tensor), np.float32)
    round_rows(weight, scale, tensor)
    return weight, scale, (weight.astype(np.float64) - 128) * scale[:, None].astype(np.float64)


LARGE = float(np.float32(3e38))
FLOATS = st.floats(-LARGE, LARGE, width=32)
ROWS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2), elements=FLOATS)


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_numbers_round_to_the_nearest_step_of_their_row(tensor: np.ndarray) -> None:
    weight, scale, value = rounded(tensor)
    wide = tensor.astype(np.float64)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    # half a step; the scale and the quotient are rounded in float32, by 6e-8 of 127 steps and less
    assert (np.abs(value - wide) <= 0.5001 * largest / 127 + 1e-36).all()
    assert (weight >= 1).all(), "127 steps below 0 and as many above, never 128"
    assert (weight[tensor == 0] == 128).all()
    assert (scale >= 0).all() and np.isfinite(scale).all()


@given(ROWS)
@settings(max_examples=100, deadline=None)
def test_rounding_is_symmetric(tensor: np.ndarray) -> None:
    weight, scale, _ = rounded(tensor)
    opposite, same, _ = rounded(-tensor)
    assert np.array_equal(opposite, 256 - weight.astype(int)) and np.array_equal(scale, same)


def test_rows_are_rounded_by_themselves() -> None:
    tensor = np.array([[1, -1, 0.5], [-254, 2, 1], [0, 0, 0], [0, -3e38, 0]], np.float32)
    weight, scale, value = rounded(tensor)
    assert weight.tolist() == [[255, 1, 192], [1, 129, 128], [128] * 3, [128, 1, 128]]
    assert scale.tolist() == pytest.approx([1 / 127, 2, 0, 3e38 / 127])
    assert not value[2].any() and value[3, 1] == pytest.approx(-3e38)


def test_rounded_rows_do_not_change_when_rounded_again() -> None:
    tensor = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    weight, scale, value = rounded(tensor)
    again, scale_again, _ = rounded(value.astype(np.float32))
    assert np.array_equal(weight, again)
    np.testing.assert_allclose(scale, scale_again, rtol=2e-7)  # two roundings


@pytest.mark.parametrize("largest", [1e-45, 2.7e-43, 1e-38, 9e-37, 1.1e-36])
def test_rows_too_small_for_steps_are_zeros(largest: float) -> None:
    tensor = np.array([[largest, -largest / 2, 0]], np.float32)
    weight, scale, _ = rounded(tensor)
    if largest < 1e-36:
        assert weight.tolist() == [[128] * 3] and scale[0] == 0
    else:
        assert weight.tolist() == [[255, 64, 128]] and scale[0] > 0


# ---- models --------------------------------------------------------------------------------------


@TWO_BACKENDS
@pytest.mark.parametrize("method", METHODS)
def test_gpt2_is_rounded_as_it_is_loaded(method: str, directory: Path, backend: Any) -> None:
    model, exact = GPT2.from_pretrained(directory, backend, quantize=method), make(backend)
    assert type(model) is GPT2 and model.weights == method
    assert model.backend is exact.backend and model.config == SMALL
    p = model.parameters
    scales = [name.removesuffix("weight") + "scale" for name in ROUNDED]
    assert p.keys() == exact.parameters.keys() | set(scales if method == "int8" else [])
    for name, parameter in exact.parameters.items():
        if name not in ROUNDED:
            assert p[name].dtype == np.float32 and np.array_equal(p[name], parameter)
        elif method == "fp16":
            assert p[name].dtype == np.float16
            assert np.array_equal(p[name], parameter.astype(np.float16))
        else:
            weight, scale, _ = rounded(parameter)
            assert np.array_equal(p[name], weight)
            assert np.array_equal(p[name.removesuffix("weight") + "scale"], scale)
    for parameter in p.values():
        assert parameter.flags.c_contiguous and parameter.ctypes.data % 64 == 0
    from_memory = exact.quantize(method)
    for name, parameter in from_memory.parameters.items():
        assert parameter.tobytes() == p[name].tobytes()


@pytest.mark.parametrize(("method", "bound"), [("int8", 0.05), ("fp16", 2e-3)])
def test_logits_are_nearly_those_of_the_model(
    method: str, bound: float, backend: Any, rng: np.random.Generator
) -> None:
    """Weights lose 1/254 and 1/4096 of their size; int8 activations lose 1/254, too."""
    exact, idx = make(backend), rng.integers(0, V, (3, T))
    model = exact.quantize(method)
    expected, logits = exact(idx), model(idx)
    assert logits.shape == expected.shape and logits.dtype == np.float32
    assert 1e-7 < np.abs(logits - expected).max() / np.abs(expected).max() < bound
    assert model.loss(idx, idx) == pytest.approx(exact.loss(idx, idx), rel=bound)
    text = model.generate(idx[:, :5], 6, temperature=0)
    again = model(text)  # in one piece, unlike token by token before
    chosen = np.take_along_axis(again[:, 4:-1], text[:, 5:, None], axis=2)[..., 0]
    assert (chosen >= again[:, 4:-1].max(axis=2) - bound * np.abs(again).max()).all()


@pytest.mark.parametrize("method", METHODS)
def test_weights_take_a_quarter_and_half(method: str) -> None:
    config = GPT2Config(vocab_size=1000, n_positions=64, n_embd=96, n_layer=2, n_head=4)
    model = GPT2(config, weights=method)
    shapes = config.parameter_shapes()
    small = [name for name in shapes if len(shapes[name]) == 2 and name != "wpe.weight"]
    expected = 4 * sum(int(np.prod(shapes[name])) for name in shapes if name not in small)
    for name in small:
        rows, columns = shapes[name]
        expected += rows * (columns + 4) if method == "int8" else 2 * rows * columns
    assert sum(parameter.nbytes for parameter in model.parameters.values()) == expected
    share = expected / (4 * config.num_parameters())
    assert share < {"int8": 0.31, "fp16": 0.52}[method]


@pytest.mark.parametrize("method", METHODS)
def test_quantized_model_cannot_train(method: str, rng: np.random.Generator) -> None:
    model, idx = make().quantize(method), rng.integers(0, V, (2, 5))
    before = model.loss(idx, idx)
    assert model.trained == () and model.trained_size == model.decay_size == 0
    calls = [
        *(model.backward, lambda: model.gradients, lambda: model.flat_gradients),
        *(lambda: AdamW(model), lambda: model.freeze("wte.*"), model.unfreeze),
    ]
    for call in calls:
        assert refused(call) == (
            f"a model with {method} weights has no gradients: give it adapters with add_lora, or"
            " load it without quantize to train it"
        )
    model.zero_grad()  # of none
    assert model.loss(idx, idx, keep=False) == before == model.loss(idx, idx, keep=True)
    assert refused(model.loss, idx + V, idx).startswith("idx")
    assert refused(model.loss, idx, idx[:1]).startswith("targets")


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_logits(
    method: str, backend: Any, rng: np.random.Generator
) -> None:
    """Of a batch, of sequences of different lengths, and of a trace."""
    model = make(backend).quantize(method)
    idx, targets = rng.integers(0, V, (2, 3, T))
    logits = model(idx).astype(np.float64)
    chosen = np.take_along_axis(logits, targets[..., None], 2)[..., 0]
    expected = np.log(np.exp(logits).sum(2)) - chosen
    np.testing.assert_allclose(model.losses(idx, targets), expected, rtol=1e-5, atol=1e-5)
    assert model.loss(idx, targets) == pytest.approx(expected.mean(), rel=1e-6)
    assert model.mean_loss(idx, targets) == pytest.approx(expected.mean(), rel=1e-6)
    rows = [(idx[0, :3], targets[0, :3]), (idx[1], targets[1])]
    ragged = model.losses(*zip(*rows, strict=True))
    for losses, row in zip(ragged, (expected[0, :3], expected[1]), strict=True):
        np.testing.assert_allclose(losses, row, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.trace(idx).lens("h.1.out"), logits, rtol=1e-5, atol=1e-5)


def test_no_loss_waits_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def seen(size: int) -> np.ndarray:
        sizes.append(size)
        return np.zeros(size, np.float32)

    model, idx = make().quantize("int8"), np.arange(10).reshape(2, 5)
    monkeypatch.setattr("gpt2c.model.plan.aligned_zeros", seen)
    model.loss(idx, idx, keep=False)
    alone = max(sizes)
    sizes.clear()
    model.loss(idx, idx)
    model.losses(idx, idx)
    assert not sizes
    make().loss(idx, idx)
    assert max(sizes) > alone


@TWO_BACKENDS
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_an_argument_of_the_model(method: str, backend: Any) -> None:
    """The first values are those of a float32 model, rounded."""
    exact, model = GPT2(SMALL, 3, backend), GPT2(SMALL, 3, backend, weights=method)
    assert (exact.weights, model.weights) == ("fp32", method)
    before = exact.flat_parameters.copy()
    rounded_later = exact.quantize(method)
    assert np.array_equal(exact.flat_parameters, before) and exact.weights == "fp32"
    assert rounded_later.backend is exact.backend
    for name, parameter in rounded_later.parameters.items():
        assert parameter.tobytes() == model.parameters[name].tobytes()
        assert not np.shares_memory(parameter, exact.flat_parameters)
    model.load_parameters(make(backend).parameters, "another")
    assert np.array_equal(model([[1, 2, 3]]), make(backend).quantize(method)([[1, 2, 3]]))
    message = f"the model already has {method} weights: start from one with fp32 weights"
    assert refused(model.quantize, method) == message
    with pytest.raises(AttributeError):
        model.weights = "fp32"  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS)
def test_the_old_name_goes_on_working(method: str, directory: Path) -> None:
    expected = make().quantize(method)
    with pytest.warns(DeprecationWarning, match=r'model\.quantize\("int8"\)$') as warned:
        found = [
            QuantizedGPT2.from_model(make(), method),
            QuantizedGPT2.from_pretrained(directory, method),
            QuantizedGPT2.from_pretrained(directory, method, "auto", None, 1),
            QuantizedGPT2.from_found(find_model(directory), method),
        ]
        empty = QuantizedGPT2(SMALL, method)
    assert {warning.filename for warning in warned} == {__file__} and len(warned) == 5
    for model in found:
        for each in (model, copy.copy(model), pickle.loads(pickle.dumps(model))):
            assert type(each) is QuantizedGPT2 and isinstance(each, GPT2)
            assert each.method == each.weights == method
            assert np.array_equal(each([[1, 2, 3]]), expected([[1, 2, 3]]))
    assert empty.method == method and not empty.parameters["ln_f.bias"].any()
    assert not empty.parameters["ln_f.weight"].any()


@pytest.mark.parametrize("method", ["int4", "", "INT8", None, [], np.array(["int8", "fp16"])])
def test_unknown_method_is_refused(method: Any, directory: Path) -> None:
    assert "weights must be one of fp32, int8, fp16" in refused(GPT2, SMALL, weights=method)
    assert "quantize must be one of int8, fp16" in refused(make().quantize, method)
    if method is not None:  # null means none
        assert "int8, fp16" in refused(GPT2.from_pretrained, directory, quantize=method)


def test_too_many_channels_are_refused() -> None:
    config = GPT2Config(1, n_positions=1, n_embd=1, n_layer=1, n_head=1, n_inner=65537)
    assert "65536 channels, got 65537" in refused(GPT2, config, weights="int8")
    GPT2(config, weights="fp16")
    wide = GPT2Config(1, n_positions=1, n_embd=65600, n_layer=1, n_head=1, n_inner=8)
    assert "65536 channels, got 65600" in refused(GPT2, wide, weights="int8")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 7e4, -7e4])
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.weight", "ln_f.bias", "wpe.weight"])
def test_numbers_that_cannot_be_rounded_are_refused(
    name: str, bad: float, method: str, tmp_path: Path
) -> None:
    model = make()
    model.parameters[name].flat[3] = bad
    model.save_pretrained(tmp_path)
    fits = np.isfinite(bad) and (method == "int8" or name not in ROUNDED)
    for call, source in [
        (
            lambda: GPT2.from_pretrained(tmp_path, quantize=method),
            f"{tmp_path}/model.safetensors",
        ),
        (lambda: model.quantize(method), "the model"),
    ]:
        if fits:
            call()
        else:
            assert refused(call).startswith(f"{source}: {name} holds n")


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture(params=METHODS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Return a method, and a directory of such weights."""
    make().quantize(request.param).save_pretrained(tmp_path / request.param)
    return request.param, tmp_path / request.param


@TWO_BACKENDS
def test_saved_weights_come_back_bit_for_bit(stored: tuple[str, Path], backend: Any) -> None:
    method, path = stored
    model, expected = (
        GPT2.from_pretrained(path, backend, quantize=method),
        make(backend).quantize(method),
    )
    assert model.config == SMALL and model.weights == method
    assert model.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        assert model.parameters[name].dtype == parameter.dtype
        assert model.parameters[name].tobytes() == parameter.tobytes()
        assert model.parameters[name].flags.writeable  # memory of its own, not the file's
    idx = np.arange(12).reshape(2, 6)
    assert np.array_equal(model(idx), expected(idx))
    model.save_pretrained(path)  # over itself
    one = GPT2.from_pretrained(path / "model.safetensors", backend, quantize=method)
    assert np.array_equal(one(idx), expected(idx))
    again = GPT2.from_pretrained(path, backend, quantize=method)
    assert np.array_equal(again(idx), expected(idx))


@pytest.mark.parametrize("method", METHODS)
def test_shards_of_16_bits_are_rounded_as_their_numbers(method: str, tmp_path: Path) -> None:
    """By the same function as a GPT2: shards, a prefix, float16; and a single file."""
    model = make()
    for parameter in model.parameters.values():
        parameter[...] = parameter.astype(np.float16)
    expected = model.quantize(method).parameters
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {f"transformer.{name}": array.astype("f2") for name, array in stored.items()}
    (tmp_path / "model.safetensors").unlink()
    for number, (name, array) in enumerate(stored.items()):
        save_file({name: array}, tmp_path / f"{number}.safetensors")
    index = {"weight_map": {name: f"{n}.safetensors" for n, name in enumerate(stored)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(stored, tmp_path / "whole.safetensors")
    for path in (tmp_path, tmp_path / "whole.safetensors"):
        loaded = GPT2.from_pretrained(path, quantize=method)
        for name, parameter in expected.items():
            assert np.array_equal(loaded.parameters[name], parameter), name


def test_config_json_names_the_kind_of_weights(stored: tuple[str, Path]) -> None:
    method, path = stored
    entries = json.loads((path / "config.json").read_text())
    entry = {"quant_method": "gpt2c", "weights": method}
    assert entries == SMALL.to_dict() | {"quantization_config": entry}
    assert stored_method(entries) == method and stored_method(SMALL.to_dict()) is None
    size = (path / "model.safetensors").stat().st_size
    weights = GPT2(SMALL, weights=method).parameters.values()
    assert 0 < size - sum(parameter.nbytes for parameter in weights) < 8192  # names and shapes


def test_rounded_weights_are_not_taken_for_others(stored: tuple[str, Path]) -> None:
    method, path = stored
    other = METHODS[1 - METHODS.index(method)]
    message = refused(GPT2.from_pretrained, path)
    assert f"holds {method} weights: pass quantize='{method}'" in message
    message = refused(GPT2.from_pretrained, path, quantize=other)
    assert f"holds {method} weights, which cannot become {other}" in message


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gpt2c"},
        {"quant_method": "gpt2c", "weights": "int4"},
        {"quant_method": "gpt2c", "weights": ["int8"]},
        {"weights": "int8"},
        "int8",
        [],
    ],
)
def test_weights_rounded_by_others_are_refused(entry: Any, directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": entry}))
    for quantize in (None, "int8"):
        message = refused(GPT2.from_pretrained, directory, quantize=quantize)
        assert message.startswith(f"{file}: quantization_config")


Change = Callable[[dict[str, np.ndarray]], Any]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wte.weight", lambda t: t.pop("wte.weight")),
        ("ln_f.bias", lambda t: t.pop("ln_f.bias")),
        ("h.0.mlp.c_fc.weight", lambda t: t.update({"h.0.mlp.c_fc.weight": t["wte.weight"]})),
        ("h.2.ln_1.weight", lambda t: t.update({"h.2.ln_1.weight": t["ln_f.bias"]})),
        ("wpe.weight", lambda t: t.update({"wpe.weight": t["wpe.weight"].astype("f8")})),
        ("wte.weight", lambda t: t.update({"wte.weight": t["wte.weight"].astype("f4")})),
        ("ln_f.bias", lambda t: t.update({"ln_f.bias": t["ln_f.bias"] * np.float32(np.inf)})),
        ("wpe.weight", lambda t: t["wpe.weight"].fill(np.nan)),
    ],
)
def test_damaged_tensors_are_refused(stored: tuple[str, Path], name: str, change: Change) -> None:
    method, path = stored
    tensors = load_file(path / "model.safetensors")
    with np.errstate(invalid="ignore"):
        change(tensors)
    save_file(tensors, path / "model.safetensors")
    message = refused(GPT2.from_pretrained, path, quantize=method)
    assert message.startswith(str(path)) and name in message


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    make().quantize("int8").save_pretrained(tmp_path)
    whole, name = load_file(tmp_path / "model.safetensors"), "h.0.attn.c_attn.scale"
    assert whole[name].dtype == np.float32 and whole["h.0.attn.c_attn.weight"].dtype == np.uint8
    for bad in (None, whole[name].astype("f2"), whole[name][1:], whole[name] * np.float32(np.nan)):
        tensors = {key: array for key, array in whole.items() if key != name}
        tensors |= {} if bad is None else {name: bad}
        save_file(tensors, tmp_path / "model.safetensors")
        assert name in refused(GPT2.from_pretrained, tmp_path, quantize="int8")


def test_nonfinite_float16_weights_are_refused(tmp_path: Path) -> None:
    make().quantize("fp16").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["wte.weight"][3, 3] = np.inf
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused(GPT2.from_pretrained, tmp_path, quantize="fp16")
    assert "wte.weight holds nan or infinity" in message


@pytest.mark.parametrize(("method", "bits"), [("int8", 8), ("fp16", 16)])
def test_nonfinite_weights_are_not_rounded(method: str, bits: int) -> None:
    model = make()
    model.parameters["wte.weight"][3, 3] = np.nan
    message = refused(model.quantize, method)
    assert message.endswith(
        f"wte.weight holds nan or infinity; only finite weights can be rounded to {bits} bits"
    )


def test_cut_file_is_refused(stored: tuple[str, Path]) -> None:
    method, path = stored
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "not a whole safetensors file" in refused(GPT2.from_pretrained, path, quantize=method)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        GPT2.from_pretrained(path, quantize=method)


def test_gpt2s_file_is_no_quantized_one(stored: tuple[str, Path]) -> None:
    """8-bit weights under a GPT-2's config are refused, and not read as floats."""
    _, path = stored
    (path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    wrong = refused(GPT2.from_pretrained, path)
    assert re.search(r"has dtype U8|must be \(\d+, \d+\)", wrong)


# ---- the error -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[GPT2, np.ndarray]:
    """Return a small trained model, and held-out tokens of its text.

    Random weights would show little: training makes some weights and channels large.
    """
    topics = pytest.importorskip("pydoc_data.topics").topics  # the text of Python's help
    text = "".join(topics[name] for name in sorted(topics)).encode()
    tokens = np.frombuffer(text, np.uint8).astype(np.int64)
    cut = len(tokens) * 9 // 10
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = GPT2(config, seed=1)
    optimizer, rng = AdamW(model, learning_rate=3e-3, weight_decay=0.1), np.random.default_rng(0)
    for _ in range(300):
        starts = rng.integers(0, cut - 65, 8)
        rows = np.stack([tokens[start : start + 65] for start in starts])
        model.zero_grad()
        model.loss(rows[:, :-1], rows[:, 1:])
        model.backward()
        optimizer.step(grad_clip=1.0)
    held_out = tokens[cut:]
    return model, held_out[: len(held_out) // 65 * 65].reshape(-1, 65)[:100]


@pytest.mark.parametrize(("method", "rise"), [("int8", 5e-3), ("fp16", 5e-4)])
def test_loss_hardly_rises(method: str, rise: float, trained: tuple[GPT2, np.ndarray]) -> None:
    model, rows = trained
    exact = model.loss(rows[:, :-1], rows[:, 1:], keep=False)
    assert exact < 3.0, "it has learnt: bytes of a text by chance are 5.5 nats, by frequency 3.3"
    loss = model.quantize(method).loss(rows[:, :-1], rows[:, 1:])
    assert exact * (1 - rise) < loss < exact * (1 + rise)
