"""Adapters: their gradients, what they leave as it is, weights of 16 and 8 bits, merging."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.exact import check_differences, exact, odd_model

from gpt2c import GPT2, AdamW, GPT2Config, Llama, LoRA
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.block import Life, Pass
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.plan import KEPT, parts_needed

V = 61
ODD = GPT2Config(vocab_size=V, n_positions=40, n_embd=34, n_layer=2, n_head=2, n_inner=51)
LLAMA = LlamaConfig(V, 36, 71, 2, 6, 2, 10, 40)
KINDS = pytest.mark.parametrize("config", [ODD, LLAMA], ids=["GPT-2", "Llama"])
WEIGHTS = pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
THREE = LoRA(3, 6)
SOME = LoRA(3, 6, ("c_attn", "mlp.c_proj"))


def make(config: Any, backend: Any = "auto", **settings: Any) -> Any:
    return (GPT2 if isinstance(config, GPT2Config) else Llama)(config, 1, backend, **settings)


def adapted(config: Any, lora: LoRA = THREE, **settings: Any) -> Model:
    """Return a model whose parameters are all random, those of B, too."""
    return odd_model(dataclasses.replace(config, lora=lora), **settings)


def batch(rng: np.random.Generator, ragged: bool = False) -> tuple[Any, Any]:
    if not ragged:
        return tuple(rng.integers(0, V, (2, 2, 13)))
    return tuple([rng.integers(0, V, n) for n in (3, 40, 1)] for _ in range(2))


def learned(model: Model, given: tuple[Any, Any]) -> Any:
    model.zero_grad()
    model.loss(*given)
    model.backward()
    return model.flat_gradients.copy()


# ---- what B = 0 changes --------------------------------------------------------------------------


@TWO_BACKENDS
@KINDS
@WEIGHTS
def test_new_adapters_change_no_bit(
    config: Any, weights: str, backend_name: str, rng: np.random.Generator
) -> None:
    model = make(config, backend_name)
    model = model if weights == "fp32" else model.quantize(weights)
    (idx, targets), prompts = batch(rng), [[1, 2, 3], [4]]
    before = model.loss(idx, targets), model(idx).tobytes(), model.generate(prompts, 5, seed=1)
    parameters = {name: array.copy() for name, array in model.parameters.items()}
    model.add_lora(r=3)
    after = model.loss(idx, targets), model(idx).tobytes(), model.generate(prompts, 5, seed=1)
    assert after[:2] == before[:2]
    assert all(np.array_equal(*pair) for pair in zip(after[2], before[2], strict=True))
    assert len(model.trained) == 16
    for name, array in parameters.items():
        assert np.array_equal(model.parameters[name], array) and name not in model.trained


def test_first_values_are_those_of_peft() -> None:
    model, C = make(ODD), 34
    model.add_lora(r=400, seed=3)
    a, b = (model.parameters[f"h.1.mlp.c_fc.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((400, C), (51, 400)) and not b.any()
    assert np.abs(a).max() <= 1 / np.sqrt(C)  # kaiming_uniform with a = sqrt(5)
    assert a.std() == pytest.approx(1 / np.sqrt(3 * C), rel=0.03)
    other = make(ODD)
    other.add_lora(r=400, seed=4)
    assert not np.array_equal(other.parameters["h.1.mlp.c_fc.lora_A.weight"], a)


def test_fresh_model_with_adapters_has_the_weights_of_one_without() -> None:
    plain, model = make(ODD), make(dataclasses.replace(ODD, lora=SOME))
    assert all(np.array_equal(model.parameters[name], p) for name, p in plain.parameters.items())


# ---- gradients -----------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("lora", [THREE, SOME, LoRA(2, 5, ("c_fc",), use_rslora=True)])
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_gradients_are_central_differences(
    config: Any, lora: LoRA, ragged: bool, monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    model, given = exact(adapted(config, lora), monkeypatch), batch(rng, ragged)
    learned(model, given)
    assert len(model.gradients) == 2 * 2 * len(lora.targets)
    check_differences(model, lambda: model.loss(*given))


@KINDS
@pytest.mark.parametrize("recompute", KEPT)
def test_gradients_of_every_backend_and_policy(
    config: Any, recompute: str | None, backend_name: str, rng: np.random.Generator
) -> None:
    given = batch(rng)
    reference, model = adapted(config), adapted(config, backend=backend_name, recompute=recompute)
    expected, found = learned(reference, given), learned(model, given)
    assert normalised_error(found, expected) < 1e-5
    kept = learned(adapted(config, backend=backend_name), given)
    assert np.array_equal(found, kept)  # computed again are the same bits
    model.loss(*given)
    model.backward()  # adds
    assert normalised_error(model.flat_gradients, 2 * expected) < 1e-5


@KINDS
@pytest.mark.parametrize("recompute", KEPT)
def test_backward_reads_no_memory_that_another_array_has(
    config: Any, recompute: str | None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = adapted(config, backend="auto", recompute=recompute), batch(rng)
    expected = learned(model, given)
    model.zero_grad()
    model.loss(*given)
    assert model._pending is not None
    run = model._pending.ctx
    for slot in model._stack.slots_with_head(run.batch):
        if slot.life > KEPT[recompute] and (slot.name[:2] == "h." or slot.life is Life.SCRATCH):
            run.a[slot.name].fill(np.nan)
    monkeypatch.setattr(Pass, "take", lambda run, name: np.full_like(run.a[name], np.nan))
    model.backward()
    assert np.array_equal(model.flat_gradients, expected)


def test_full_rank_identity_has_the_gradient_of_the_weight(rng: np.random.Generator) -> None:
    given, plain = batch(rng), odd_model(ODD)
    learned(plain, given)
    model = make(ODD, "numpy")
    model.load_parameters(plain.parameters, "plain")
    model.add_lora(r=34, alpha=34, targets=("c_attn", "attn.c_proj", "c_fc"))
    for name, parameter in model.parameters.items():
        if "lora_A" in name:
            parameter[...] = np.eye(34)
    learned(model, given)
    for name, gradient in model.gradients.items():
        if "lora_B" in name:
            whole = plain.gradients[name.replace("lora_B.", "")]
            assert normalised_error(gradient, whole) < 1e-5, name


def test_scores_are_trained_beside_adapters(rng: np.random.Generator) -> None:
    config = dataclasses.replace(ODD, num_labels=3)
    for weights in ("fp32", "int8"):
        model = odd_model(config, backend="auto")
        model = model if weights == "fp32" else model.quantize(weights)
        before = model.scores([[1, 2, 3]], keep=False)
        model.add_lora(r=2)
        # scores of 8 bits become float32, so that they can be trained: x is not rounded any more
        error = 0 if weights == "fp32" else 0.01
        assert normalised_error(model.scores([[1, 2, 3]], keep=False), before) <= error
        assert model.trained[0] == "score.weight" and model.decay_size >= 3 * 34
        assert model.parameters["score.weight"].dtype == np.float32
        loss = model.loss([[1, 2], [3]], [0, 2])
        model.backward()
        AdamW(model, learning_rate=0.01).step()
        assert model.loss([[1, 2], [3]], [0, 2]) < loss


# ---- weights of 16 and 8 bits --------------------------------------------------------------------


@KINDS
def test_gradients_beside_fp16_weights_are_those_beside_the_same_fp32(
    config: Any, rng: np.random.Generator
) -> None:
    given = batch(rng)
    small = adapted(config, backend="auto").quantize("fp16")
    same = Model(small.config, None, "auto")
    for name, parameter in same.parameters.items():
        parameter[...] = small.parameters[name]
    assert normalised_error(learned(small, given), learned(same, given)) < 1e-6


@KINDS
def test_gradients_beside_int8_weights_are_the_references(
    config: Any, backend_name: str, rng: np.random.Generator
) -> None:
    """The forward pass has integers; only rounding of x at a border could differ by a step."""
    given, model = batch(rng), adapted(config, backend=backend_name).quantize("int8")
    expected = learned(adapted(config).quantize("int8"), given)
    found = learned(model, given)
    assert normalised_error(found, expected) < 0.01
    exact_weights = learned(adapted(config), given)
    angle = (found @ exact_weights) / np.linalg.norm(found) / np.linalg.norm(exact_weights)
    assert angle > 0.999  # the direction is that of fp32 weights


@WEIGHTS
def test_adapters_learn_and_the_weights_stay(weights: str, rng: np.random.Generator) -> None:
    given, model = batch(rng), make(ODD)
    model = model if weights == "fp32" else model.quantize(weights)
    model.add_lora(r=4)
    frozen = {name: p.tobytes() for name, p in model.parameters.items() if "lora" not in name}
    optimizer, before = AdamW(model, learning_rate=0.02, weight_decay=0.5), model.loss(*given)
    assert model.decay_size == 0  # decay would lead adapters back to the base
    assert optimizer.m.size == model.trained_size == model.flat_gradients.size
    assert model.flat_parameters.dtype == np.float32
    for _ in range(30):
        learned(model, given)
        optimizer.step(grad_clip=1.0)
    assert model.loss(*given) < before - 0.3
    assert optimizer.not_finite() == ""
    assert all(model.parameters[name].tobytes() == bits for name, bits in frozen.items())
    for same in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert same.loss(*given) == model.loss(*given) and same.trained == model.trained
        assert same.config.lora == LoRA(4)


@TWO_BACKENDS
@WEIGHTS
@KINDS
def test_texts_are_read_with_adapters_as_they_are_now(
    config: Any, weights: str, backend_name: str, rng: np.random.Generator
) -> None:
    model = adapted(config, backend=backend_name)
    model = model if weights == "fp32" else model.quantize(weights)
    decoder, idx = model.decoder(2, 40), rng.integers(0, V, (1, 9)).astype(np.int32)
    for factor in (1.0, -2.0):  # training changes adapters while a decoder exists
        for name in model.trained:
            model.parameters[name][...] *= factor
        for position, token in enumerate(idx[0]):
            at = np.array([position, position], np.int32)
            logits = decoder.step(np.full(2, token), np.array([1, 0], np.int32), at)
        assert np.array_equal(logits[0], logits[1])
        # one step reads fp32 weights in another order; int8 rounds x in both
        assert normalised_error(logits[0], model(idx)[0, -1]) < (
            0.02 if weights == "int8" else 1e-5
        )


@KINDS
@WEIGHTS
def test_merged_model_computes_the_same(
    config: Any, weights: str, rng: np.random.Generator
) -> None:
    model, idx = adapted(config, backend="auto"), batch(rng)[0]
    model = model if weights == "fp32" else model.quantize(weights)
    merged = model.merge()
    assert merged.config == config and merged.weights == "fp32"
    assert len(merged.trained) == len(merged.parameters) == len(config.parameter_shapes())
    assert normalised_error(merged(idx), model(idx)) < (0.05 if weights == "int8" else 1e-5)
    wanted = make(config)  # W + s B A
    wanted.load_parameters(adapted(config).merge().parameters, "merged")
    assert normalised_error(wanted(idx), merged(idx)) < (1e-6 if weights == "fp32" else 0.05)


# ---- sizes ---------------------------------------------------------------------------------------


def test_adapters_of_124m_take_little_memory_and_work() -> None:
    config = dataclasses.replace(GPT2Config(), lora=LoRA())
    trained = [s for n, s in config.parameter_shapes().items() if n not in config.frozen()]
    assert sum(map(np.prod, trained)) == 1_179_648
    whole = sum(parts_needed(GPT2Config(), 1, 512).values())
    for weights, most in (("fp32", 0.6), ("int8", 1 / 3)):
        parts = parts_needed(config, 1, 512, weights=weights)
        assert parts["gradients"] == 4 * 1_179_648 and parts["moments"] == 8 * 1_179_648
        assert sum(parts.values()) < most * whole
    assert 0.66 < config.flops_per_token(512) / GPT2Config().flops_per_token(512) < 0.72


def test_needed_memory_is_what_a_model_has() -> None:
    for weights in ("fp32", "fp16", "int8"):
        model = make(ODD)
        model = model if weights == "fp32" else model.quantize(weights)
        model.add_lora(r=3)
        parts = parts_needed(model.config, 1, 8, weights=weights)
        assert parts["weights"] == model._flat.nbytes
        assert parts["gradients"] == model.flat_gradients.nbytes


# ---- bad input -----------------------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    model = make(ODD)
    for given, wanted in [
        ({"r": 0}, "r must be in [1, 65536], got 0"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"alpha": 0}, "alpha must be positive and finite, got 0"),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        ({"targets": ["proj"]}, "no linear layer has a name that ends with 'proj'"),
        ({"targets": ["c_attn", "ln_1"]}, "no linear layer has a name that ends with 'ln_1'"),
        ({"targets": []}, "targets must name at least one"),
        *(
            ({"targets": one}, f"targets must be a list of names of linear layers, got {one!r}")
            for one in ([1], None, 5, "c_attn", np.array(3))
        ),
        *(
            ({"use_rslora": one}, f"use_rslora must be True or False, got {one!r}")
            for one in ("no", 1, [], None)
        ),
        ({"alpha": np.array(3.0)}, "alpha must be a number, got array(3.)"),
        ({"seed": -1}, "seed must be at least 0"),
    ]:
        assert wanted in refused(model.add_lora, **given)
    assert model.config == ODD
    assert refused(model.merge) == "the model has no adapters to merge"
    wanted = "lora must be a gpt2c.LoRA or None, got 8"
    assert refused(dataclasses.replace, ODD, lora=8) == wanted
    model.add_lora(targets=["c_proj"])  # the attention's and the MLP's
    assert len(model.trained) == 8
    assert "the model has adapters" in refused(model.add_lora)


@pytest.mark.parametrize("r", [np.int64(4), np.int8(4), np.array(4)])
def test_numbers_of_numpy_become_plain_ones(r: Any, tmp_path: Path) -> None:
    lora = LoRA(r, np.float32(3), np.array(["c_attn"]), np.bool_(True))  # type: ignore[arg-type]
    assert repr(lora) == "LoRA(r=4, alpha=3.0, targets=('c_attn',), use_rslora=True)"
    model = make(ODD)
    model.add_lora(r, np.float32(3), np.array(["c_attn"]), np.bool_(True))
    assert model.config.lora == lora
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_only_float32_weights_can_be_unfrozen_beside_adapters() -> None:
    model = make(ODD)
    model.add_lora(r=2)
    model.unfreeze("h.1.ln_1.*")
    assert {"h.1.ln_1.weight", "h.1.ln_1.bias"} < set(model.trained)
    small = make(ODD).quantize("int8")
    small.add_lora(r=2)
    small.unfreeze("h.1.ln_1.*")
    learned(small, ([[1, 2]], [[2, 3]]))
    assert small.gradients["h.1.ln_1.bias"].any()
    assert refused(small.unfreeze) == "wte.weight has int8 weights, which cannot be trained"
