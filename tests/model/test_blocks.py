"""Blocks: how long arrays live, gradients in their memory, ragged batches, weighted losses."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS

from gpt2c import GPT2, AdamW, Dropout, GPT2Config
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.memory import Array
from gpt2c.model.block import FLOATS, Life, Pass
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.plan import KEPT

ODD = GPT2Config(vocab_size=61, n_positions=70, n_embd=34, n_layer=3, n_head=2, n_inner=51)
LLAMA = LlamaConfig(61, 30, 71, 2, 6, 2, 10, 70)
BOTH = pytest.mark.parametrize(
    ("config", "taken_in_a_layer"), [(ODD, 4), (LLAMA, 5)], ids=["GPT-2", "Llama"]
)
PRECISION = pytest.mark.parametrize("precision", ["fp32", "bf16"])
LENGTHS = (3, 70, 1, 17)


def sequences(rng: np.random.Generator, low: int = 0) -> list[Any]:
    return [rng.integers(low, 61, length) for length in LENGTHS]


def gradients(model: Model) -> Array:
    return model.flat_gradients.copy()


# ---- lives ---------------------------------------------------------------------------------------


@BOTH
@PRECISION
@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 3)], ids=["", "dropout"])
@pytest.mark.parametrize("recompute", KEPT)
def test_take_of_memory_that_is_not_the_activations_changes_no_bit(
    config: Any,
    taken_in_a_layer: int,
    precision: str,
    dropout: Dropout | None,
    recompute: str | None,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idx = rng.integers(0, 61, (2, 33))
    model = Model(config, recompute=recompute, precision=precision)
    model.loss(idx, idx, dropout=dropout)
    model.backward()
    expected, taken, take = gradients(model), 0, Pass.take

    def fresh(ctx: Pass, name: str) -> Array:
        nonlocal taken
        taken += 1
        return np.full_like(take(ctx, name), np.nan)

    monkeypatch.setattr(Pass, "take", fresh)
    model.zero_grad()
    model.loss(idx, idx, dropout=dropout)
    model.backward()
    assert taken == taken_in_a_layer * config.n_layer
    assert np.array_equal(gradients(model), expected)


@BOTH
@PRECISION
@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 3)], ids=["", "dropout"])
@pytest.mark.parametrize("recompute", KEPT)
def test_backward_reads_no_activation_whose_life_has_ended(
    config: Any,
    taken_in_a_layer: int,
    precision: str,
    dropout: Dropout | None,
    recompute: str | None,
    rng: np.random.Generator,
) -> None:
    idx = rng.integers(0, 61, (2, 33))
    model = Model(config, recompute=recompute, precision=precision)
    model.loss(idx, idx, dropout=dropout)
    model.backward()
    expected = gradients(model)
    model.zero_grad()
    model.loss(idx, idx, dropout=dropout)
    assert model._pending is not None
    run = model._pending.ctx
    ended = [
        slot.name
        for slot in model._stack.slots_with_head(run.batch)
        if slot.life > model._memory.kept
        and (slot.name.startswith("h.") or slot.life in (Life.SCRATCH, Life.LOGITS))
    ]
    ended += [name for name in run.a if name.endswith(FLOATS)]
    for name in ended:
        run.a[name].view(np.uint8).fill(255)  # a NaN of 32 and of 16 bits
    model.backward()
    assert ended and np.array_equal(gradients(model), expected)


def test_recompute_cannot_be_changed() -> None:
    model = GPT2(ODD, recompute="light")
    with pytest.raises(AttributeError):
        model.recompute = "full"  # type: ignore[misc]
    assert model.recompute == "light"


# ---- ragged batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", KEPT)
def test_ragged_losses_are_those_of_each_sequence_alone(
    recompute: str | None, backend: Any, rng: np.random.Generator
) -> None:
    model = GPT2(ODD, backend=backend, recompute=recompute)
    idx, targets = sequences(rng), sequences(rng, -1)
    targets[1][0] = 5
    together = model.losses(idx, targets)
    assert [len(part) for part in together] == list(LENGTHS)
    for row, wanted, losses in zip(idx, targets, together, strict=True):
        alone = model.losses([row], [wanted])
        np.testing.assert_allclose(losses, alone[0], rtol=1e-5, atol=1e-6)
    counts = sum(int((wanted >= 0).sum()) for wanted in targets)
    mean = sum(part.sum(dtype=np.float64) for part in together) / counts
    assert model.loss(idx, targets) == pytest.approx(mean, rel=1e-6)


def test_ragged_gradients_are_the_sums_of_the_sequences(
    backend: Any, rng: np.random.Generator
) -> None:
    model = GPT2(ODD, backend=backend)
    idx, targets = sequences(rng), sequences(rng, -1)
    count = float(sum(int((wanted >= 0).sum()) for wanted in targets))
    loss = model.loss(idx, targets)
    model.backward()
    expected, parts = gradients(model), 0.0
    model.zero_grad()
    for row, wanted in zip(idx, targets, strict=True):
        parts += model.loss([row], [wanted], count=count)
        model.backward()
    assert parts == pytest.approx(loss, rel=1e-6)
    assert np.abs(gradients(model) - expected).max() <= 1e-6 * np.abs(expected).max()


def test_sequences_of_a_ragged_batch_do_not_see_each_other(
    backend: Any, rng: np.random.Generator
) -> None:
    model = GPT2(ODD, backend=backend)
    idx, targets = sequences(rng), sequences(rng)
    weights = [np.full(length, float(number != 1)) for number, length in enumerate(LENGTHS)]
    before = model.losses(idx, targets)
    model.backward(weights=weights)
    expected = gradients(model)
    idx[1] = (idx[1] + 1) % 61
    model.zero_grad()
    after = model.losses(idx, targets)
    model.backward(weights=weights)
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, False]
    assert np.array_equal(gradients(model), expected)


def test_ragged_batch_of_bad_sequences_is_refused(rng: np.random.Generator) -> None:
    model, idx = GPT2(ODD), sequences(rng)
    assert "sequences of 3, 70, 1, 17 tokens" in refused(model.loss, idx, idx[:3])
    assert "(2, 5)" in refused(model.loss, idx, np.ones((2, 5), int))
    assert "from 1 to 70 tokens" in refused(model.loss, [[1], []], [[1], []])
    assert "from 1 to 70 tokens" in refused(model.loss, [[1], [1] * 71], [[1], [1] * 71])
    assert "token id 61" in refused(model.loss, [[1], [61, 2]], [[1], [1, 2]])


# ---- counts and weights --------------------------------------------------------------------------


def test_eight_batches_of_one_add_up_to_one_of_eight(
    backend: Any, rng: np.random.Generator
) -> None:
    model = GPT2(ODD, backend=backend)
    idx, targets = rng.integers(0, 61, (8, 20)), rng.integers(0, 61, (8, 20))
    for number, row in enumerate(targets):
        row[number:] = -1 if number else row[number:]
    count = int((targets >= 0).sum())
    loss = model.loss(idx, targets)
    model.backward()
    expected, sum_of_losses = gradients(model), 0.0
    model.zero_grad()
    for row, wanted in zip(idx, targets, strict=True):
        sum_of_losses += model.loss(row[None], wanted[None], count=count)
        model.backward()
    assert sum_of_losses == pytest.approx(loss, rel=1e-6)
    assert np.abs(gradients(model) - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("count", [0, -1, np.nan, np.inf, 1e-40])
def test_count_must_be_positive(count: float) -> None:
    ids = np.ones((1, 3), int)
    assert "count must be positive" in refused(GPT2(ODD).loss, ids, ids, count=count)


def test_count_allows_a_batch_without_targets() -> None:
    model, ids = GPT2(ODD), np.ones((1, 3), int)
    assert model.loss(ids, -ids, count=5) == 0
    model.backward()
    assert not model.flat_gradients.any()
    assert "all -1" in refused(model.loss, ids, -ids)


def test_equal_weights_give_the_bits_of_the_mean(backend: Any, rng: np.random.Generator) -> None:
    model, ids = GPT2(ODD, backend=backend), rng.integers(0, 61, (4, 9))
    loss = model.loss(ids, ids)
    model.backward()
    expected = gradients(model)
    model.zero_grad()
    losses = model.losses(ids, ids)
    assert losses.shape == (4, 9)
    assert losses.mean(dtype=np.float64) == pytest.approx(loss, rel=1e-6)
    model.backward(scale=1 / ids.size)
    assert np.array_equal(gradients(model), expected)
    model.zero_grad()
    model.losses(ids, ids)
    model.backward(weights=np.full((4, 9), 1 / ids.size))
    assert np.array_equal(gradients(model), expected)


def test_weights_make_the_weighted_sum_of_each_tokens_gradient(
    backend: Any, rng: np.random.Generator
) -> None:
    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=6, n_layer=1, n_head=2)
    model = GPT2(config, backend=backend)
    ids, targets = rng.integers(0, 11, (2, 6)), rng.integers(0, 11, (2, 6))
    weights = rng.standard_normal((2, 6))
    weights[0, 1:4] = 0
    model.losses(ids, targets)
    model.backward(scale=0.5, weights=weights)
    weighted, expected = gradients(model), np.zeros(model.flat_gradients.size)
    for place in np.ndindex(2, 6):
        alone = np.full((2, 6), -1)
        alone[place] = targets[place]
        model.zero_grad()
        model.loss(ids, alone)
        model.backward()
        expected += 0.5 * weights[place] * model.flat_gradients
    assert np.abs(weighted - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("weights", [3, [1, 2], "x", np.ones((4, 8)), [np.ones(9)] * 3])
def test_weights_of_another_shape_are_refused(weights: Any) -> None:
    model, ids = GPT2(ODD), np.ones((4, 9), int)
    model.losses(ids, ids)
    assert "the shape of losses, [(4, 9)]" in refused(model.backward, weights=weights)
    model.backward(weights=np.ones((4, 9)))


def test_weights_that_are_not_finite_are_refused() -> None:
    model, ids = GPT2(ODD), np.ones((1, 2), int)
    model.losses(ids, ids)
    assert "weights must be finite" in refused(model.backward, weights=[[1, np.nan]])
    model.loss(ids, ids)
    assert "weights are for losses" in refused(model.backward, weights=[[1, 1]])


# ---- frozen parameters ---------------------------------------------------------------------------

FREEZE = [
    ("w[tp]e.*",),
    ("wte.*", "h.0.*"),
    ("w?e.*", "h.0.*", "h.1.*"),
    ("w?e.*", "h.0.*", "h.1.ln_1.*", "h.1.attn.*"),
    ("w?e.*", "h.0.*", "h.1.ln_1.*", "h.1.attn.c_attn.*"),
    ("w?e.*", "h.0.*", "h.1.ln_1.*", "h.1.attn.*", "h.1.ln_2.*"),
    ("w?e.*", "h.*"),
    ("*.bias",),
    ("*.weight",),
]


@TWO_BACKENDS
@pytest.mark.parametrize("recompute", KEPT)
@pytest.mark.parametrize("patterns", FREEZE, ids="-".join)
def test_frozen_parameters_change_no_bit_of_the_others_gradients(
    patterns: tuple[str, ...], recompute: str | None, backend: Any, rng: np.random.Generator
) -> None:
    ids = rng.integers(0, 61, (2, 9))
    model = GPT2(ODD, backend=backend, recompute=recompute)
    parameters = {name: array.copy() for name, array in model.parameters.items()}
    for _ in range(2):  # written, then added to
        model.loss(ids, ids)
        model.backward(scale=0.5)
    expected = {name: array.copy() for name, array in model.gradients.items()}
    model.freeze(*patterns)
    assert {name: array.tobytes() for name, array in model.parameters.items()} == {
        name: array.tobytes() for name, array in parameters.items()
    }
    for _ in range(2):
        model.loss(ids, ids)
        model.backward(scale=0.5)
    assert set(model.gradients) == set(model.trained)
    assert 0 < len(model.gradients) < len(expected)
    assert model.flat_gradients.size == model.trained_size < model.flat_parameters.size
    for name, gradient in model.gradients.items():
        assert np.array_equal(gradient, expected[name]), name


@pytest.mark.parametrize("patterns", FREEZE, ids="-".join)
def test_optimizer_moves_what_is_trained_alone(
    patterns: tuple[str, ...], rng: np.random.Generator
) -> None:
    ids = rng.integers(0, 61, (2, 9))
    model = GPT2(ODD)
    model.freeze(*patterns)
    optimizer = AdamW(model)
    before = {name: array.copy() for name, array in model.parameters.items()}
    model.loss(ids, ids)
    model.backward()
    optimizer.step(0.1)
    moved = {name for name, array in model.parameters.items() if (array != before[name]).any()}
    assert moved == set(model.trained)
    assert optimizer.m.size == model.trained_size


@TWO_BACKENDS
@pytest.mark.parametrize("patterns", [("lm_head.*",), ("wte.*",), ("wte.*", "h.0.*")])
def test_frozen_tables_of_a_llama_change_no_bit_of_the_others_gradients(
    patterns: tuple[str, ...], backend: Any, rng: np.random.Generator
) -> None:
    ids, model = rng.integers(0, 61, (2, 9)), Model(LLAMA, backend=backend)
    for _ in range(2):  # written, then added to
        model.loss(ids, ids)
        model.backward()
    expected = {name: array.copy() for name, array in model.gradients.items()}
    model.freeze(*patterns)
    for _ in range(2):
        model.loss(ids, ids)
        model.backward()
    for name, gradient in model.gradients.items():
        assert np.array_equal(gradient, expected[name]), name


def test_optimizer_of_other_parameters_is_refused() -> None:
    model, ids = GPT2(ODD), np.ones((1, 2), int)
    optimizer = AdamW(model)
    model.freeze("wpe.*")
    model.loss(ids, ids)
    model.backward()
    assert "make a new AdamW" in refused(optimizer.step)
    model.unfreeze("wpe.*")
    model.loss(ids, ids)
    model.backward()
    optimizer.step()


def test_frozen_model_computes_nothing_below_its_lowest_trained_layer(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, model, called = rng.integers(0, 61, (2, 9)), GPT2(ODD, backend="numpy"), []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(get_backend("numpy"), name)

    model.freeze("w?e.*", "h.[01].*", "h.2.ln_1.*", "h.2.attn.*")
    model.loss(ids, ids)
    model.backend = Counted()  # type: ignore[assignment]
    model._pending.ctx.ops = model.backend  # type: ignore[union-attr, assignment]
    model.backward()
    assert called == [
        "layernorm_backward",  # ln_f
        *("matmul_backward", "gelu_backward", "matmul_backward"),
        "layernorm_backward",  # ln_2
    ]


def test_copies_and_pickles_keep_what_is_frozen(rng: np.random.Generator) -> None:
    ids, model = rng.integers(0, 61, (2, 9)), GPT2(ODD)
    model.freeze("h.0.*")
    model.loss(ids, ids)
    model.backward()
    for same in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert same.trained == model.trained
        assert np.array_equal(same.flat_gradients, model.flat_gradients)
        assert np.array_equal(same.flat_parameters, model.flat_parameters)
    model.unfreeze("*")
    assert not model.flat_gradients.any()
    assert same.trained != model.trained == tuple(GPT2(ODD).gradients)


def test_freeze_refuses_names_that_are_none_and_a_model_without_a_rest() -> None:
    model = GPT2(ODD)
    for patterns in (("h.3.*",), ("wte",), ("wte.*", "")):
        assert "no parameter has a name like" in refused(model.freeze, *patterns)
    assert "leave some to train" in refused(model.freeze, "*")
    assert len(model.trained) == len(model.parameters)


def test_freeze_refuses_what_is_no_name_and_helps_with_a_name_that_is_short() -> None:
    model = GPT2(ODD)
    assert "must be a string, got ['wte.*']" in refused(model.freeze, ["wte.*"])
    assert "did you mean 'h.0.*'?" in refused(model.freeze, "h.0")
    assert "name what to freeze" in refused(model.freeze)
    model.freeze("wte.*", "h.0.*")
    model.unfreeze()
    assert len(model.trained) == len(model.parameters)


def test_freeze_that_is_interrupted_loses_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2(ODD)
    before = {name: array.copy() for name, array in model.parameters.items()}
    ends, files = 0, ("model/model.py", "model/weights.py", "kernels/memory.py")

    def interrupted(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename.endswith(files):
            left -= event == "line"
            if left == 0:
                raise KeyboardInterrupt
        return interrupted

    for number in range(1, 400):
        left = number
        sys.settrace(interrupted)
        try:
            model.freeze("h.0.*")
            model.unfreeze()
        except KeyboardInterrupt:
            ends += 1
        finally:
            sys.settrace(None)
        for name, array in model.parameters.items():
            assert np.array_equal(array, before[name]), (number, name)
            assert np.array_equal(model._parameters[name], before[name]), (number, name)
        model.unfreeze()
    assert ends > 50
