"""Models whose products are of 16-bit numbers: their error, what stays float32, what is kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c import GPT2, AdamW, Dropout, GPT2Config
from gpt2c.kernels.backend import get_backend
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.plan import KEPT, Activations

ODD = GPT2Config(vocab_size=61, n_positions=70, n_embd=34, n_layer=3, n_head=2, n_inner=51)
LLAMA = LlamaConfig(61, 30, 71, 2, 6, 2, 10, 70)
BOTH = pytest.mark.parametrize("config", [ODD, LLAMA], ids=["GPT-2", "Llama"])
# bfloat16 has 8 bits: a factor is rounded by 2^-9 at most
ROUNDING = 2.0**-9


def solve(model: Model, idx: Any, targets: Any) -> tuple[float, Any]:
    """Return the loss and fresh gradients."""
    model.zero_grad()
    loss = model.loss(idx, targets)
    model.backward()
    return loss, model.flat_gradients.astype(np.float64)


def distance(a: Any, b: Any) -> float:
    """Return |a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@BOTH
@pytest.mark.parametrize("lengths", [(66, 66), (3, 70, 1, 17)], ids=["rows", "ragged"])
def test_gradients_differ_by_the_rounding(
    config: Any, lengths: tuple[int, ...], backend: Any, rng: np.random.Generator
) -> None:
    """From those of fp32: by several roundings each way, which do not add up to ten."""
    idx = [rng.integers(0, 61, length) for length in lengths]
    targets = [rng.integers(0, 61, length) for length in lengths]
    exact, rounded = (
        solve(Model(config, backend=backend, precision=one), idx, targets)
        for one in ("fp32", "bf16")
    )
    assert 0 < abs(rounded[0] - exact[0]) < ROUNDING
    assert ROUNDING / 10 < distance(rounded[1], exact[1]) < 10 * ROUNDING


@BOTH
def test_gradient_is_as_near_to_the_reference_on_every_backend(
    config: Any, backend: Any, rng: np.random.Generator
) -> None:
    batch = rng.integers(0, 61, (2, 2, 66))
    exact = solve(Model(config, backend="numpy"), *batch)[1]
    errors = [
        distance(solve(Model(config, backend=one, precision="bf16"), *batch)[1], exact)
        for one in (backend, get_backend("numpy"))
    ]
    assert errors[0] < 1.5 * errors[1]


@BOTH
def test_gradient_in_halves_is_nearer_than_in_bfloat16(
    config: Any, backend: Any, rng: np.random.Generator
) -> None:
    """However small gradients are: no loss scaling, and no number that is too large."""
    batch = rng.integers(0, 61, (2, 2, 66))
    models = [Model(config, backend=backend, precision=p) for p in ("fp32", "fp16", "bf16")]
    for weight in (1.0, 1e-12, 1e12):
        gradients = []
        for model in models:
            model.zero_grad()
            model.losses(*batch)
            model.backward(weights=np.full((2, 66), weight, np.float32))
            gradients.append(model.flat_gradients / weight)
        exact, halves, bf16 = (one.astype(np.float64) for one in gradients)
        assert 0 < distance(halves, exact) < 0.7 * distance(bf16, exact)


@BOTH
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("recompute", ["light", "full"])
def test_recompute_and_threads_have_the_same_bits(
    config: Any, recompute: str, precision: Any, backend: Any, rng: np.random.Generator
) -> None:
    batch = rng.integers(0, 61, (2, 3, 66))
    expected = solve(Model(config, backend=backend, precision=precision), *batch)
    for threads in (1, 3):
        model = Model(config, 1337, backend.name, recompute, threads, precision=precision)
        loss, gradients = solve(model, *batch)
        assert loss == expected[0] and np.array_equal(gradients, expected[1])


@BOTH
@pytest.mark.parametrize("recompute", KEPT)
def test_factors_are_kept_in_16_bits(
    config: Any, recompute: str | None, backend: Any, rng: np.random.Generator
) -> None:
    """Without changing what a loss is, whether backward follows or not."""
    batch = rng.integers(0, 61, (2, 2, 66))
    dropout = Dropout(0.2, 3)
    model = Model(config, 1337, backend, recompute, precision="bf16")
    loss = model.loss(*batch, dropout=dropout)
    assert model._pending is not None
    kept = model._pending.ctx.a
    halves = {name for name, array in kept.items() if array.dtype == np.uint16}
    inside = {"ln_1", "ln_2", "attn.qkv", "attn.att", "mlp.fc", "mlp.act"}
    layers = range(config.n_layer)
    assert halves == {f"h.{layer}.{name}" for layer in layers for name in inside}
    gradients = []
    for keep in (True, False, True):
        assert model.loss(*batch, keep=keep, dropout=dropout) == loss
        if keep:
            model.zero_grad()
            model.backward()
            gradients.append(model.flat_gradients.copy())
    assert np.array_equal(*gradients)


@BOTH
def test_what_is_kept_in_16_bits_adds_little_to_the_error(
    config: Any, backend: Any, rng: np.random.Generator
) -> None:
    """To that of the products, whose factors are rounded with or without it."""
    batch = rng.integers(0, 61, (2, 2, 66))
    exact = solve(Model(config, backend="numpy"), *batch)[1]
    errors = []
    for halves in (True, False):
        model = Model(config, backend=backend, precision="bf16")
        model._memory = Activations(model._stack.slots_with_head, None, halves)
        errors.append(distance(solve(model, *batch)[1], exact))
    assert errors[0] != errors[1] and errors[0] < 1.2 * errors[1]


def test_copies_pickles_and_smaller_weights_keep_it(rng: np.random.Generator) -> None:
    model = GPT2(ODD, precision="bf16")
    idx = rng.integers(0, 61, (2, 66))
    for same in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert same.precision == "bf16" and np.array_equal(same(idx), model(idx))
    for weights in ("fp16", "int8"):
        assert model.quantize(weights).precision == "bf16"
    assert "products in bf16" in repr(model) and "bf16" not in repr(GPT2(ODD))


def test_reading_has_the_precision(backend: Any, rng: np.random.Generator) -> None:
    idx = rng.integers(0, 61, (2, 66))
    model, other = (GPT2(ODD, backend=backend, precision=one) for one in ("bf16", "fp32"))
    for read in (GPT2.logprobs, GPT2.embed):
        found, exact = read(model, idx), read(other, idx)
        assert 0 < distance(found, exact) < 10 * ROUNDING
    assert abs(model.mean_loss(idx, idx) - model.loss(idx, idx)) < 1e-5
    assert not np.array_equal(model.trace(idx)["h.1.out"], other.trace(idx)["h.1.out"])


@BOTH
@pytest.mark.parametrize("weights", ["fp32", "fp16"])
@pytest.mark.parametrize("texts", [1, 6, 40])
def test_steps_have_the_precision(
    config: Any, weights: str, texts: int, backend: Any, rng: np.random.Generator
) -> None:
    """One token as well as many: the logits are as far from those of fp32 as the reference's."""
    tokens, slots = rng.integers(0, 61, (9, texts), np.int32), np.arange(texts, dtype=np.int32)
    found = []
    for one, precision in ((backend, "bf16"), ("numpy", "bf16"), ("numpy", "fp32")):
        model = Model(config, backend=one, precision=precision)
        decoder = (model if weights == "fp32" else model.quantize(weights)).decoder(texts, 9)
        steps = [decoder.step(row, slots, slots * 0 + t).copy() for t, row in enumerate(tokens)]
        found.append(np.array(steps))
    ours, reference = (distance(logits, found[2]) for logits in found[:2])
    assert ROUNDING / 10 < ours < 1.5 * reference < 10 * ROUNDING


@BOTH
def test_each_product_of_a_step_has_the_precision(config: Any, monkeypatch: Any) -> None:
    found: list[Any] = []
    backend = get_backend("base")
    monkeypatch.setattr(backend, "bind_step", lambda stages: found.extend(stages))
    model = Model(config, backend=backend, precision="bf16")
    model.decoder(2, 9)._bind()
    products = [stage.precision for stage in found if stage.op == "matmul"]
    assert len(products) == 4 * config.n_layer + 1 and set(products) == {"bf16"}


def test_bytes_are_multiplied_alike_in_both(backend: Any, rng: np.random.Generator) -> None:
    """A step with int8 weights has no products that could be rounded to 16 bits."""
    tokens, slots = rng.integers(0, 61, 20, np.int32), np.arange(20, dtype=np.int32)
    models = [
        GPT2(ODD, backend=backend, precision=one).quantize("int8") for one in ("bf16", "fp32")
    ]
    steps = [model.decoder(20, 9).step(tokens, slots, 0 * slots) for model in models]
    assert np.array_equal(*steps) == (backend.name != "numpy")  # which rounds q, k and p, too


def test_it_learns_as_fp32_does(rng: np.random.Generator) -> None:
    idx = rng.integers(0, 61, (2, 24))
    losses = []
    for precision in ("fp32", "bf16", "fp16"):
        model = GPT2(ODD, precision=precision)
        optimizer = AdamW(model, learning_rate=1e-2)
        for _ in range(60):
            loss, _ = solve(model, idx[:, :-1], idx[:, 1:])
            optimizer.step()
        losses.append(loss)
    assert max(losses) < 0.1 and len({*losses}) == 3
    assert model.flat_parameters.dtype == model.flat_gradients.dtype == np.float32


@pytest.mark.parametrize("wrong", ["fp8", "half", None, 16, np.array(["bf16"]), np.array([1, 2])])
def test_model_refuses_an_unknown_precision(wrong: Any) -> None:
    message = f"precision must be one of fp32, bf16, fp16, auto, got {wrong!r}"
    assert refused(GPT2, ODD, precision=wrong) == message
