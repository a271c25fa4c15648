"""The model on every backend: gradients against calculus, batches, memory, texts and files."""

from __future__ import annotations

import gc
import json
import math
import re
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from safetensors.numpy import load_file, save_file

from gpt2c import GPT2, AdamW, Dropout, GPT2Config
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.plan import bytes_needed

V, C, NH, L, T, B = 97, 30, 3, 2, 29, 3
ODD = GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=NH, n_inner=71)
TINY = GPT2Config(vocab_size=13, n_positions=8, n_embd=12, n_layer=2, n_head=2)
# float32 against float64: some hundred roundings of 6e-8 add up, in loss and gradients alike
RTOL = 1e-5

Batch = tuple[np.ndarray, np.ndarray]


def odd_model(backend: Any, config: GPT2Config = ODD, seed: int = 1) -> GPT2:
    """Return a model whose parameters are all random, also biases and layernorm weights."""
    model, rng = GPT2(config, seed=seed, backend=backend), np.random.default_rng(seed)
    for name, parameter in model.parameters.items():
        noise = rng.standard_normal(parameter.shape, np.float32)
        parameter += np.float32(0.1) * noise if "ln" in name else np.float32(0.05) * noise
    return model


def batch_of(rng: np.random.Generator, B: int = B, T: int = T, V: int = V) -> Batch:
    ids = rng.integers(0, V, (B, T + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def solve(
    model: GPT2, batch: Batch, dropout: Dropout | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss, and copies of fresh gradients."""
    model.zero_grad()
    loss = model.loss(*batch, dropout=dropout)
    model.backward()
    return loss, {name: gradient.copy() for name, gradient in model.gradients.items()}


def check_gradients(actual: Any, expected: Any, rtol: float = RTOL) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        error = normalised_error(gradient, expected[name])
        assert error <= rtol, f"gradient of {name}: error {error:.1e}"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Callable[[GPT2], GPT2]:
    """Return a function that copies a model in float64: the same code, on wider numbers."""

    def copy(model: GPT2) -> GPT2:
        for module in ("model", "plan", "weights"):
            monkeypatch.setattr(f"gpt2c.model.{module}.aligned_zeros", np.zeros)
        wide = GPT2(model.config, seed=None, backend="numpy")
        wide.load_parameters(model.parameters, "a copy")
        assert wide.flat_parameters.dtype == wide.flat_gradients.dtype == np.float64
        return wide

    return copy


# ---- fresh models --------------------------------------------------------------------------------


def test_fresh_model_has_the_loss_of_a_uniform_guess(
    backend: Any, rng: np.random.Generator
) -> None:
    loss = GPT2(ODD, backend=backend).loss(*batch_of(rng))
    assert abs(loss - math.log(V)) < 0.05


def test_fresh_weights_are_gpt2s() -> None:
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=96, n_layer=8, n_head=4)
    for name, parameter in GPT2(config).parameters.items():
        if parameter.ndim == 1:
            assert (parameter == (1 if re.search(r"ln_\w+\.weight", name) else 0)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        spread = 5 / math.sqrt(parameter.size)  # five standard deviations of the estimates
        assert abs(parameter.mean() / std) < spread, name
        assert abs(parameter.std() / std - 1) < spread / math.sqrt(2), name


def test_seeds_give_weights() -> None:
    one, same, other = (GPT2(TINY, seed=seed).flat_parameters for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert not GPT2(TINY, seed=None).flat_parameters.any()


@pytest.mark.parametrize(
    ("seed", "wanted"),
    [
        (-1, "seed must be at least 0, or None to leave the weights 0, got -1"),
        (1.5, "seed must be a whole number, got 1.5"),
        (True, "seed must be a whole number, got True"),
        ("1", "seed must be a whole number, got '1'"),
    ],
)
def test_seed_is_a_whole_number(seed: Any, wanted: str) -> None:
    assert refused(GPT2, TINY, seed=seed) == wanted


def test_weights_do_not_depend_on_the_backend(backend: Any) -> None:
    model = GPT2(TINY, seed=1, backend=backend)
    assert np.array_equal(model.flat_parameters, GPT2(TINY, seed=1).flat_parameters)


# ---- memory --------------------------------------------------------------------------------------


def test_views_cover_the_flat_buffers() -> None:
    model = GPT2(ODD, seed=None)
    shapes = ODD.parameter_shapes()
    for views, flat in [
        (model.parameters, model.flat_parameters),
        (model.gradients, model.flat_gradients),
    ]:
        assert {name: view.shape for name, view in views.items()} == shapes
        for view in views.values():
            assert view.dtype == np.float32 and view.flags.c_contiguous
            assert view.ctypes.data % 64 == 0 and np.shares_memory(view, flat)
            assert not view.any(), "another view wrote here"
            view.fill(1)
        padding = flat.size - ODD.num_parameters()
        assert np.count_nonzero(flat == 0) == padding < 16 * len(views)
    for name, view in model.parameters.items():
        view.fill(2)
        decays = (model.flat_parameters[: model.decay_size] == 2).any()
        assert decays == (view.ndim == 2), name
        view.fill(1)


def test_padding_stays_zero(backend: Any, rng: np.random.Generator) -> None:
    model = odd_model(backend)
    optimizer, batch = AdamW(model), batch_of(rng)
    for _ in range(2):
        solve(model, batch)
        optimizer.step()
    for views, flat in [
        (model.parameters, model.flat_parameters),
        (model.gradients, model.flat_gradients),
    ]:
        for view in views.values():
            view.fill(0)
        assert not flat.any()


# ---- gradients -----------------------------------------------------------------------------------

SHAPES = [(B, T), (B, 1), (1, T), (1, 1), (2, 17)]
DROPOUTS = [None, Dropout(0.3, seed=5, first=9)]
CONFIGS = [ODD, TINY, GPT2Config(vocab_size=5, n_positions=3, n_embd=1, n_layer=1, n_head=1)]


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("config", CONFIGS, ids=["odd", "tiny", "least"])
def test_gradients_are_derivatives(
    config: GPT2Config,
    dropout: Dropout | None,
    exact: Callable[[GPT2], GPT2],
    rng: np.random.Generator,
) -> None:
    """Central differences of the loss along random directions, tensor by tensor, in float64.

    With a step h their error is about h^2 from curvature and 1e-16 / h from rounding, so 1e-10.
    """
    h = 1e-5
    model = exact(odd_model("numpy", config))
    idx, targets = batch_of(rng, B, config.n_positions, config.vocab_size)
    targets[0, 1:] = -1
    _, gradients = solve(model, (idx, targets), dropout)
    for name, parameter in model.parameters.items():
        start, direction = parameter.copy(), rng.standard_normal(parameter.shape)
        losses = []
        for step in (h, -h):
            parameter[...] = start + step * direction
            losses.append(model.loss(idx, targets, dropout=dropout))
        parameter[...] = start
        numeric = (losses[0] - losses[1]) / (2 * h)
        size = np.abs(gradients[name] * direction).sum()
        assert abs(numeric - (gradients[name] * direction).sum()) < 1e-7 * size + 1e-10, name


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize(("B", "T"), SHAPES)
def test_backends_agree_with_float64(
    B: int,
    T: int,
    dropout: Dropout | None,
    backend: Any,
    exact: Callable[[GPT2], GPT2],
    rng: np.random.Generator,
) -> None:
    model, batch = odd_model(backend), batch_of(rng, B, T)
    loss, gradients = solve(model, batch, dropout)
    expected_loss, expected = solve(exact(model), batch, dropout)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    check_gradients(gradients, expected)


def test_batch_is_the_mean_of_its_halves(backend: Any, rng: np.random.Generator) -> None:
    model, (idx, targets) = odd_model(backend), batch_of(rng, B=4)
    loss, whole = solve(model, (idx, targets))
    model.zero_grad()
    losses = []
    for half in (slice(0, 2), slice(2, 4)):
        losses.append(model.loss(idx[half], targets[half]))
        model.backward(scale=0.5)
    assert np.mean(losses) == pytest.approx(loss, rel=1e-6)
    check_gradients(model.gradients, whole)


def test_ignored_targets_do_not_count(backend: Any, rng: np.random.Generator) -> None:
    model, (idx, targets) = odd_model(backend), batch_of(rng, B=2)
    loss, gradients = solve(model, (idx[:1, :11], targets[:1, :11]))
    targets[0, 11:] = targets[1] = -1  # later tokens and other rows do not touch what is left
    padded_loss, padded = solve(model, (idx, targets))
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    check_gradients(padded, gradients)


@pytest.mark.parametrize("rows", [0, 1, 7, B * T - 1, B * T])
def test_blocks_of_logits_give_the_same_result(
    rows: int, backend: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (idx, targets) = odd_model(backend), batch_of(rng)
    targets[0, 5:9] = -1
    loss, gradients = solve(model, (idx, targets))
    monkeypatch.setattr("gpt2c.model.head.LOGITS_FLOATS", rows * V + 1)
    block_loss, block_gradients = solve(odd_model(backend), (idx, targets))
    assert block_loss == pytest.approx(loss, rel=1e-6)
    check_gradients(block_gradients, gradients)


# ---- the order of calls --------------------------------------------------------------------------


def test_backward_needs_a_loss_of_its_own(backend: Any, rng: np.random.Generator) -> None:
    model, batch = odd_model(backend), batch_of(rng)
    for call in (
        lambda: None,
        lambda: solve(model, batch),
        lambda: (model.loss(*batch), model(batch[0])),
    ):
        call()
        before = model.flat_gradients.copy()
        assert "loss" in refused(model.backward)
        assert np.array_equal(model.flat_gradients, before)


@TWO_BACKENDS
@pytest.mark.parametrize("scale", [None, math.nan, -math.inf, 1e39, "2", "x", 10**400, True])
def test_scale_that_is_no_finite_number_is_refused(
    scale: Any, backend: Any, rng: np.random.Generator
) -> None:
    model, batch = odd_model(backend), batch_of(rng)
    _, expected = solve(model, batch)
    model.zero_grad()
    model.loss(*batch)
    assert refused(model.backward, scale).startswith("scale must be ")
    model.backward()
    for name, gradient in expected.items():
        assert np.array_equal(model.gradients[name], gradient)


def test_reading_between_loss_and_backward_changes_nothing(
    backend: Any, rng: np.random.Generator
) -> None:
    """A decoder has its own memory, so a text may be generated in the middle of a step."""
    model, batch = odd_model(backend), batch_of(rng)
    loss, expected = solve(model, batch)
    model.zero_grad()
    assert model.loss(*batch) == loss
    model.generate(batch[0][:, :5], 8, seed=1)
    next(model.stream(batch[0][:, :7], 3, seed=1))
    model.logprobs(batch[0])
    model.mean_loss(*batch)
    model.backward()
    check_gradients(model.gradients, expected, rtol=0)


def test_batches_leave_no_trace_in_later_ones(backend: Any, rng: np.random.Generator) -> None:
    fresh, model = odd_model(backend), odd_model(backend)
    batch = batch_of(rng, 2, 5)
    expected_loss, expected = solve(fresh, batch)
    for B, T in SHAPES:  # larger and smaller ones
        solve(model, batch_of(rng, B, T))
    model(batch_of(rng)[0])
    loss, gradients = solve(model, batch)
    assert loss == expected_loss
    check_gradients(gradients, expected, rtol=0)


def test_loss_sees_changed_parameters(backend: Any, rng: np.random.Generator) -> None:
    model, other, batch = odd_model(backend), odd_model(backend, seed=2), batch_of(rng)
    first = model.loss(*batch)
    model.load_parameters(other.parameters, "another model")
    assert model.loss(*batch) == other.loss(*batch) != first


def test_batch_may_change_after_its_loss(backend: Any, rng: np.random.Generator) -> None:
    model, batch = odd_model(backend), batch_of(rng)
    _, expected = solve(model, batch)
    model.zero_grad()
    idx, targets = (np.ascontiguousarray(ids, np.int32) for ids in batch)
    model.loss(idx, targets)
    idx[...], targets[...] = 0, 0  # a loader that fills one array again and again
    model.backward()
    check_gradients(model.gradients, expected, rtol=0)


def test_gradients_accumulate_until_zero_grad(backend: Any, rng: np.random.Generator) -> None:
    model, batch = odd_model(backend), batch_of(rng)
    _, once = solve(model, batch)
    model.loss(*batch)
    model.backward()
    check_gradients(model.gradients, {name: 2 * gradient for name, gradient in once.items()}, 1e-6)
    model.zero_grad()
    assert not model.flat_gradients.any()


@TWO_BACKENDS
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(
    "order",
    [
        "zero loss back",
        "loss zero back",
        "zero loss look back",
        "zero loss zero back",
        "loss loss back",
    ],
)
def test_order_of_calls_makes_no_difference(
    order: str, scale: float, backend: Any, rng: np.random.Generator
) -> None:
    """A loss computes a part of the gradients, which must not show before backward."""
    model, (first, second) = odd_model(backend), (batch_of(rng), batch_of(rng))
    once = solve(odd_model(backend), second)[1]
    held = solve(model, first)[1]
    for call in order.split():
        if call == "loss":
            seen = None if model._void else model.flat_gradients.copy()
            model.loss(*second)
            assert seen is None or np.array_equal(model.flat_gradients, seen)
        elif call == "look":
            assert not model.flat_gradients.any()
        else:
            {"zero": model.zero_grad, "back": lambda: model.backward(scale)}[call]()
    kept = held if order == "loss loss back" else dict.fromkeys(held, np.float32(0))
    expected = {name: kept[name] + np.float32(scale) * once[name] for name in once}
    check_gradients(model.gradients, expected, 1e-6)


def test_loss_without_keep_leaves_gradients_alone(backend: Any, rng: np.random.Generator) -> None:
    model, batch = odd_model(backend), batch_of(rng)
    model.zero_grad()
    for keep in (True, False):
        model.loss(*batch, keep=keep)
    assert not model.flat_gradients.any()
    _, gradients = solve(model, batch)
    model.loss(*batch)
    check_gradients(model.gradients, gradients, rtol=0)


@pytest.mark.parametrize("recompute", ["light", "full"])
def test_recompute_gives_the_same_bits(
    recompute: str, backend: Any, rng: np.random.Generator
) -> None:
    batches = [batch_of(rng, B, T) for B, T in [(3, 9), (1, 2), (3, 9)]]

    def run(policy: str | None) -> tuple[list[float], GPT2]:
        model = GPT2(ODD, seed=3, backend=backend, recompute=policy)
        optimizer, losses = AdamW(model, learning_rate=0.01), []
        for batch in batches:
            losses.append(solve(model, batch)[0])
            optimizer.step()
        return losses, model

    (losses, model), (same_losses, same) = run(None), run(recompute)
    assert losses == same_losses
    assert np.array_equal(model.flat_parameters, same.flat_parameters)
    assert np.array_equal(model.flat_gradients, same.flat_gradients)


def test_recompute_needs_less_memory() -> None:
    plain, light, full = (bytes_needed(GPT2Config(), 4, 1024, r) for r in (None, "light", "full"))
    per_token_and_channel = 4 * 4096 * 768 * 4  # bytes of 4 channels of one layer
    assert plain - light > 11 * per_token_and_channel  # 6 of 16 channels in 11 of 12 layers
    assert light - full > 2 * 11 * per_token_and_channel
    assert full < 2.7e9 and light < 3.8e9 and plain < 4.9e9


def test_16_bits_need_less_memory() -> None:
    plain, light, full = (
        bytes_needed(GPT2Config(), 4, 1024, r, "bf16") for r in (None, "light", "full")
    )
    assert full < light < plain < 3.3e9


def test_unknown_recompute_lists_the_known() -> None:
    assert "'light', 'full'" in refused(lambda: GPT2(TINY, recompute="some"))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_runs_repeat_bit_for_bit(threads: int, backend_name: str, rng: np.random.Generator) -> None:
    batches = [batch_of(rng) for _ in range(3)]

    def run() -> tuple[list[float], bytes]:
        model = GPT2(ODD, seed=3, backend=get_backend(backend_name, threads=threads))
        optimizer, losses = AdamW(model, learning_rate=1e-3), []
        for batch in batches:
            losses.append(solve(model, batch)[0])
            optimizer.step(grad_clip=1.0)
        return losses, model.flat_parameters.tobytes()

    assert run() == run()


def test_model_memorises_one_batch(backend: Any, rng: np.random.Generator) -> None:
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    model, batch = GPT2(config, backend=backend), batch_of(rng, 2, 16, 31)
    optimizer = AdamW(model, learning_rate=1e-2, weight_decay=0.0)
    losses = []
    while len(losses) < 200 and min(losses, default=1.0) >= 0.01:
        losses.append(solve(model, batch)[0])
        optimizer.step(grad_clip=1.0)
    assert losses[-1] < 0.01 < losses[0]


# ---- logits and text -----------------------------------------------------------------------------


def test_logits_agree_with_the_loss(backend: Any, rng: np.random.Generator) -> None:
    model, (idx, targets) = odd_model(backend), batch_of(rng)
    logits = model(idx)
    assert logits.shape == (B, T, V) and logits.dtype == np.float32
    wide = logits.astype(np.float64)
    chosen = np.take_along_axis(wide, targets[..., None], axis=2)[..., 0]
    loss = (np.log(np.exp(wide).sum(axis=2)) - chosen).mean()
    assert model.loss(idx, targets) == pytest.approx(loss, rel=1e-6)
    kept = logits.copy()
    model(idx[::-1])
    assert np.array_equal(logits, kept), "logits have memory of their own"


def test_logits_see_no_later_token(backend: Any, rng: np.random.Generator) -> None:
    model, (idx, _) = odd_model(backend), batch_of(rng)
    changed = idx.copy()
    changed[:, 20:] = (changed[:, 20:] + 1) % V
    before, after = model(idx), model(changed)
    assert np.array_equal(before[:, :20], after[:, :20])
    assert not np.array_equal(before[:, 20:], after[:, 20:])
    assert normalised_error(model(idx[:, :7]), before[:, :7]) <= 1e-6


def test_greedy_text_is_the_largest_logit(backend: Any, rng: np.random.Generator) -> None:
    model, prompt = odd_model(backend), batch_of(rng, 2, 4)[0]
    text = model.generate(prompt, 10, temperature=0)
    assert text.shape == (2, 14) and text.dtype == np.int64
    assert np.array_equal(text[:, :4], prompt)
    assert np.array_equal(text[:, 4:], model(text)[:, 3:-1].argmax(axis=2))
    assert np.array_equal(text, model.generate(prompt, 10, temperature=0, seed=5))
    for row in range(2):
        alone = model.generate(prompt[row : row + 1], 10, temperature=0)
        assert np.array_equal(alone[0], text[row])
    steps = list(model.stream(prompt, 10, temperature=0))
    assert np.array_equal(np.stack(steps, axis=1), text[:, 4:])


# ---- bad batches ---------------------------------------------------------------------------------

GOOD = np.zeros((2, 3), np.int64)
BAD_IDS = {
    "floats": GOOD.astype(float),
    "booleans": GOOD.astype(bool),
    "text": [["a", "b"]],
    "nothing": None,
    "too large": GOOD + V,
    "far too large": GOOD + 2**32,  # 0 as int32
    "far too small": GOOD - 2**32,
    "huge": [[2**70]],
}
BAD_IDX = BAD_IDS | {
    "negative": GOOD - 1,
    "one axis": GOOD[0],
    "three axes": GOOD[None],
    "no rows": GOOD[:0],
    "no columns": GOOD[:, :0],
    "a number": 1,
}


@TWO_BACKENDS
@pytest.mark.parametrize("wrong", [*BAD_IDX, "too long"])
def test_bad_idx_is_refused(wrong: str, backend: Any) -> None:
    model, idx = odd_model(backend), {**BAD_IDX, "too long": np.zeros((1, T + 1), int)}[wrong]
    for call in (model, lambda ids: model.loss(ids, ids), model.logprobs):
        assert refused(call, idx).startswith("idx")
    refusal = "the prompt is 30 tokens" if wrong == "too long" else "idx"
    assert refused(model.generate, idx).startswith(refusal)
    assert refused(model.stream, idx, 1).startswith(refusal)  # at the call, not at the first token


@TWO_BACKENDS
@pytest.mark.parametrize("wrong", [*BAD_IDS, "below -1", "another shape", "flat", "all ignored"])
def test_bad_targets_are_refused(wrong: str, backend: Any) -> None:
    more = {"below -1": GOOD - 2, "another shape": GOOD.T, "flat": GOOD[0], "all ignored": GOOD - 1}
    message = refused(odd_model(backend).loss, GOOD, {**BAD_IDS, **more}[wrong])
    assert message.startswith("targets")


@TWO_BACKENDS
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", ">i4", "u4", "i8", "u8"])
def test_ids_may_be_any_whole_numbers(dtype: str, backend: Any, rng: np.random.Generator) -> None:
    model, (idx, targets) = odd_model(backend), batch_of(rng)
    expected = model.loss(idx, targets)
    assert model.loss(idx.astype(dtype), targets.astype(dtype)) == expected
    assert model.loss(idx.tolist(), np.asfortranarray(targets)) == expected
    greedy = model.generate(idx, 2, temperature=0)
    assert np.array_equal(model.generate(idx.astype(dtype), 2, temperature=0), greedy)


def test_model_refuses_an_unknown_backend() -> None:
    assert "'cuda'" in refused(GPT2, TINY, backend="cuda")
    for wrong in (None, 1, [], np.array(["base", "numpy"])):
        message = f"backend must be a name of gpt2c.backends(), 'auto' or a backend, got {wrong!r}"
        assert refused(GPT2, TINY, backend=wrong) == message


# ---- files ---------------------------------------------------------------------------------------


@TWO_BACKENDS
def test_saved_model_loads_with_the_same_bits(
    backend: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    model, batch = odd_model(backend), batch_of(rng)
    model.save_pretrained(tmp_path / "model")
    copy = GPT2.from_pretrained(tmp_path / "model", backend=backend)
    assert copy.config == ODD
    assert copy.flat_parameters.tobytes() == model.flat_parameters.tobytes()
    assert copy.loss(*batch) == model.loss(*batch)
    assert copy.backend is model.backend


@pytest.mark.parametrize("name", ["wpe.weight", "h.1.attn.c_attn.bias", "h.0.mlp.c_fc.weight"])
@pytest.mark.parametrize("wrong", ["missing", "another shape"])
def test_tensors_that_do_not_fit_are_refused(name: str, wrong: str, tmp_path: Path) -> None:
    odd_model("numpy").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (stored,) = (key for key in tensors if key.endswith(name))
    tensor = tensors.pop(stored)
    if wrong == "another shape":
        tensors[stored] = np.ascontiguousarray(tensor[1:])
    save_file(tensors, file)
    message = refused(GPT2.from_pretrained, tmp_path)
    assert str(tmp_path) in message and name in message


@pytest.mark.parametrize("name", ["h.2.ln_1.weight", "score.weight", "h.0.attn.c_attn.scale"])
def test_unknown_tensors_are_refused(name: str, tmp_path: Path) -> None:
    odd_model("numpy").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: np.ones(C, np.float32)}, file)
    assert name in refused(GPT2.from_pretrained, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"n_layer": 1}, {"n_layer": 3}, {"n_embd": 33}, {"vocab_size": V + 1}, {"n_inner": None}],
)
def test_another_config_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    odd_model("numpy").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert str(tmp_path) in refused(GPT2.from_pretrained, tmp_path)


def test_refused_tensors_change_nothing() -> None:
    model, other = odd_model("numpy"), dict(odd_model("numpy", seed=2).parameters)
    before = model.flat_parameters.copy()
    other["ln_f.bias"] = np.zeros(C + 1, np.float32)
    assert "ln_f.bias" in refused(model.load_parameters, other, "a test")
    assert np.array_equal(model.flat_parameters, before)


def test_loss_that_keeps_nothing_is_the_same(backend: Any, rng: np.random.Generator) -> None:
    model = odd_model(backend)
    x, y = batch_of(rng)
    kept = model.loss(x, y)
    assert model.loss(x, y, keep=False) == kept
    assert "call loss" in refused(model.backward)


@TWO_BACKENDS
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_parameters_of_another_dtype_are_converted(dtype: Any, backend: Any) -> None:
    model, other = odd_model(backend), odd_model("numpy", seed=2)
    wanted = {name: p.astype(dtype) for name, p in other.parameters.items()}
    model.load_parameters({n: np.asfortranarray(p) for n, p in wanted.items()}, "a test")
    for name, parameter in model.parameters.items():
        assert np.array_equal(parameter, wanted[name].astype(np.float32))


def test_parameters_may_be_filled_and_not_replaced() -> None:
    """The C code trusts their sizes."""
    model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=3))
    model.parameters["ln_f.bias"][...] = 2
    for arrays in (model.parameters, model.gradients):
        with pytest.raises(TypeError, match="item assignment"):
            arrays["ln_f.bias"] = np.zeros(1, np.float32)  # type: ignore[index]


@TWO_BACKENDS
@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight", "ln_f.bias"])
def test_arrays_whose_shape_is_changed_in_place_do_not_reach_c(name: str, backend: Any) -> None:
    model, idx = odd_model(backend, TINY), np.arange(8).reshape(2, 4)
    logits, (loss, gradients) = model(idx), solve(model, (idx, idx + 1))
    for arrays in (model.parameters, model.gradients):
        arrays[name].shape = (1, -1)
    model.flat_gradients.shape = (2, -1)
    assert np.array_equal(model(idx), logits)
    model.zero_grad()
    assert model.loss(idx, idx + 1) == loss
    model.backward()
    for key, gradient in model.gradients.items():
        assert np.array_equal(gradient.ravel(), gradients[key].ravel())
    assert name in refused(model.generate, idx, 2)


def test_memory_is_free_when_the_model_goes() -> None:
    """At once: the garbage collector may come much later, and a model may be most of the memory."""
    gc.disable()
    try:
        model = GPT2(GPT2Config(vocab_size=61, n_layer=1, n_head=2, n_embd=16), seed=1)
        model.loss([[1, 2, 3]], [[2, 3, 4]])
        model.backward()
        model.generate([[1]], max_new_tokens=2)
        small = model.quantize("int8")
        model.add_lora(r=2)
        gone = [weakref.ref(each) for each in (model, small, model.merge())]
        del model, small
        assert [each() for each in gone] == [None, None, None]
    finally:
        gc.enable()


# ---- threads and interrupts ----------------------------------------------------------------------


def in_thread(call: Callable[[], Any]) -> Any:
    out: list[Any] = []

    def work() -> None:
        try:
            out.append(call())
        except BaseException as error:
            out.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return out[0]


@pytest.mark.parametrize("name", ["quantize", "merge", "freeze"])
def test_weights_are_not_read_or_moved_while_another_thread_computes(name: str) -> None:
    model = GPT2(GPT2Config(vocab_size=61, n_layer=1, n_head=2, n_embd=16), seed=1)
    model.add_lora(r=2)
    arguments = {"quantize": ["int8"], "merge": [], "freeze": ["*.lora_A.weight"]}[name]
    with model._owner.alone():
        error = in_thread(lambda: getattr(model, name)(*arguments))
    assert isinstance(error, RuntimeError) and "another thread computes" in str(error)
    in_thread(lambda: getattr(model, name)(*arguments))


def interrupted_at(number: int, call: Callable[[], Any]) -> bool:
    """Call; raise KeyboardInterrupt before this bytecode instruction around the claim, if any."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        code = frame.f_code
        if code.co_name != "alone" and not code.co_filename.endswith("contextlib.py"):
            return trace if code.co_name == "<lambda>" else None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        if event == "opcode" and count == number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_interrupt_leaves_a_model_usable() -> None:
    idx = np.arange(8).reshape(2, 4)
    model = odd_model(get_backend("base", 1), TINY)
    expected, number = model.loss(idx, idx), 1
    while interrupted_at(number, lambda: model.loss(idx, idx)):
        assert model.loss(idx, idx) == expected, number  # the same thread has it again
        assert in_thread(lambda: model.loss(idx, idx)) == expected, number  # and then any thread
        gone = in_thread(lambda n=number: interrupted_at(n, lambda: model.loss(idx, idx)))
        assert gone is True and model.loss(idx, idx) == expected, number  # of an ended thread
        assert not model._owner._claims
        number += 1
    assert number > 50, "the claim is what is interrupted"


def test_call_reports_a_signal_handler_that_used_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    idx = np.arange(8).reshape(2, 4)
    model = odd_model("numpy", TINY)
    start, expected = model._start, model.loss(idx, idx)

    def handled(*arguments: Any) -> Any:
        run = start(*arguments)
        monkeypatch.setattr(model, "_start", start)
        assert model.loss(idx, idx) == expected
        return run

    monkeypatch.setattr(model, "_start", handled)
    with pytest.raises(RuntimeError, match="signal handler"):
        model.loss(idx, idx)
    assert model.loss(idx, idx) == expected


def test_backward_is_refused_in_another_thread_than_the_loss() -> None:
    a, b = np.arange(8).reshape(2, 4), np.arange(4).reshape(1, 4)
    model = odd_model("numpy", TINY)
    model.loss(a, a)
    assert in_thread(lambda: model.loss(b, b)) > 0
    with pytest.raises(RuntimeError, match="another thread computed the last loss"):
        model.backward()
    assert not any(gradient.any() for gradient in model.gradients.values())
    model.loss(a, a)
    model.backward()
