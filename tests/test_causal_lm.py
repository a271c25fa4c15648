"""What both doors, GPT2 and Llama, do alike: a Llama writes, reads, shrinks and is copied."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS

from gpt2c import GPT2, AdamW, Engine, Generator, GPT2Config, Llama, LlamaConfig, Tokenizer
from gpt2c.evaluate.loss import evaluate
from gpt2c.evaluate.scoring import token_logprobs
from gpt2c.formats.load import Pretrained, find_model
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.inputs import check_prompts
from gpt2c.pretrained import from_pretrained, open_found

V, T = 257, 40
CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=30,
    intermediate_size=47,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=T,
    eos_token_id=256,
)
KINDS = ["fp32", "fp16", "int8"]
PROMPT = [72, 101, 108, 108, 111]


def make(backend: Any = "auto", kind: str = "fp32") -> Llama:
    """Return a Llama with clear preferences, also in its norms."""
    model, rng = Llama(CONFIG, 1, backend), np.random.default_rng(2)
    for parameter in model.parameters.values():
        parameter += np.float32(0.1) * rng.standard_normal(parameter.shape, np.float32)
    return model if kind == "fp32" else model.quantize(kind)


def log_softmax(logits: Any) -> Any:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


# ---- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "fp16"])  # int8 rounds activations, whose noise may flip
def test_greedy_text_is_the_argmax_of_the_logits(kind: str, backend: Any) -> None:
    model, ids = make(backend, kind), list(PROMPT)
    for _ in range(20):
        ids.append(int(model([ids])[0, -1].argmax()))
    text = model.generate([PROMPT], 20, temperature=0, stop=[])
    assert text.tolist() == [ids] and len(set(ids[len(PROMPT) :])) > 2


def test_greedy_text_of_int8_is_nearly_the_argmax(backend: Any) -> None:
    model = make(backend, "int8")
    text = model.generate([PROMPT], 20, temperature=0, stop=[])
    logits = model(text)[0, len(PROMPT) - 1 : -1]
    chosen = np.take_along_axis(logits, text[0, len(PROMPT) :, None], 1)[:, 0]
    assert (chosen >= logits.max(1) - 0.05 * np.abs(logits).max()).all()


@TWO_BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_stream_yields_what_generate_returns(kind: str, backend: Any) -> None:
    model, prompts = make(backend, kind), [PROMPT, PROMPT[:2], []]
    settings: dict[str, Any] = {"top_k": 20, "seed": 3, "stop": []}
    texts, logprobs = model.generate(prompts, 9, logprobs=True, **settings)
    steps = [*model.stream(prompts, 9, logprobs=True, **settings)]
    assert np.array_equal(np.stack([step[1] for step in steps], 1), logprobs)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert [int(step[0][row]) for step in steps] == text[len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_vectors_are_those_of_the_logits(kind: str, backend: Any) -> None:
    model, idx = make(backend, kind), np.random.default_rng(5).integers(0, V, (2, T))
    logits, states = model(idx, hidden_states=True)
    expected = np.take_along_axis(log_softmax(logits)[:, :-1], idx[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(model.logprobs(idx), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.embed(idx), states[-1].mean(1), rtol=1e-4, atol=1e-5)
    scored = token_logprobs(model, idx[0])
    np.testing.assert_allclose(scored[1:], expected[0], rtol=1e-5, atol=1e-5)
    shards = [idx[0].astype(np.uint16)]
    loss = evaluate(model, shards, 1, T - 1)
    assert loss == pytest.approx(-expected[0].mean(), rel=1e-5)


@TWO_BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_engine_and_generator_take_a_llama(kind: str, backend: Any) -> None:
    model = make(backend, kind)
    with Engine(model, slots=2) as engine:
        requests = [engine.submit(PROMPT[:n], 6, temperature=0) for n in (1, 3, 5)]
        for n, request in zip((1, 3, 5), requests, strict=True):
            alone = model.generate([PROMPT[:n]], 6, temperature=0)[0, n:]
            assert request.result(60).tolist() == alone.tolist()
    generator = Generator(model, Tokenizer.from_name("bytes"))
    text = generator.generate("Hello", max_new_tokens=6, temperature=0)
    assert "".join(generator.stream("Hello", max_new_tokens=6, temperature=0)) == text


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bound"), [("fp16", 2e-3), ("int8", 0.05)])
def test_llama_is_quantized(kind: str, bound: float, backend: Any) -> None:
    exact, idx = make(backend), np.random.default_rng(6).integers(0, V, (2, T))
    model = exact.quantize(kind)
    assert type(model) is Llama and model.weights == kind and model.backend is exact.backend
    assert 1e-7 < normalised_error(model(idx), exact(idx)) < bound
    assert model.loss(idx, idx) == pytest.approx(exact.loss(idx, idx, keep=False), rel=bound)
    small = {name for name, array in model.parameters.items() if array.dtype != np.float32}
    assert small == {name for name, one in CONFIG.stack().parameters().items() if one.small}
    assert {"wte.weight", "lm_head.weight"} <= small
    size = sum(array.nbytes for array in model.parameters.values())
    assert size < {"fp16": 0.51, "int8": 0.4}[kind] * exact.flat_parameters.nbytes
    assert refused(AdamW, model).startswith(f"a model with {kind} weights has no gradients")


@TWO_BACKENDS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_llama_is_copied(way: Any, kind: str, backend: Any) -> None:
    model = make(backend, kind)
    logits, other = model([PROMPT]), way(model)
    assert type(other) is Llama and other.config == CONFIG and repr(other) == repr(model)
    assert repr(model).startswith("Llama(2 layers, 30 channels, ")
    assert np.array_equal(other([PROMPT]), logits)
    for parameter in other.parameters.values():
        parameter[...] = 1
    assert np.array_equal(model([PROMPT]), logits)


def test_frozen_llama_trains_the_rest(backend: Any) -> None:
    model, idx = make(backend), np.random.default_rng(7).integers(0, V, (2, 9))
    loss = model.loss(idx, idx)
    model.backward()
    expected = {name: gradient.copy() for name, gradient in model.gradients.items()}
    model.freeze("wte.*", "h.0.*")
    before = {name: parameter.copy() for name, parameter in model.parameters.items()}
    optimizer = AdamW(model, learning_rate=0.01)
    assert model.loss(idx, idx) == loss
    model.backward()
    assert {"lm_head.weight", "h.1.ln_1.weight"} <= model.gradients.keys()
    for name, gradient in model.gradients.items():
        assert np.array_equal(gradient, expected[name]), name
    optimizer.step()
    for name, parameter in model.parameters.items():
        assert np.array_equal(parameter, before[name]) == (name not in model.trained), name
    assert model.loss(idx, idx) < loss


# ---- kinds ---------------------------------------------------------------------------------------


def test_doors_refuse_another_kinds_config() -> None:
    gpt2 = GPT2Config(vocab_size=V, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    assert refused(Llama, gpt2).startswith("config must be a LlamaConfig, got GPT2Config(")
    assert refused(GPT2, CONFIG).startswith("config must be a GPT2Config, got LlamaConfig(")


@pytest.mark.parametrize("kind", KINDS)
def test_found_model_opens_as_its_kind(kind: str, tmp_path: Path) -> None:
    llama = make(kind=kind)
    config: Any = CONFIG
    found = Pretrained(tmp_path / "llama", "its file", config, kind, llama.parameters, [])
    stored = None if kind == "fp32" else kind
    for model in (open_found(found), Llama.from_found(found, quantize=stored)):
        assert type(model) is Llama and model.weights == kind and model.config == CONFIG
        assert np.array_equal(model([PROMPT]), llama([PROMPT]))
    assert refused(GPT2.from_found, found) == (
        f"{tmp_path}/llama holds a Llama, not a GPT2: open it with gpt2c.from_pretrained, which"
        " takes any kind"
    )
    if kind == "fp32":
        assert open_found(found, quantize="int8").weights == "int8"
    else:
        assert "its file holds" in refused(Llama.from_found, found)
        assert "no tensor wpe.weight" in refused(
            Llama.from_found,
            dataclasses.replace(found, tensors={**llama.parameters, "wpe.weight": np.ones(1)}),
            quantize=kind,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_llamas_directory_opens_as_its_kind(kind: str, tmp_path: Path) -> None:
    model = make(kind=kind)
    model.save_pretrained(tmp_path)
    stored = None if kind == "fp32" else kind
    for found in (from_pretrained(tmp_path), Llama.from_pretrained(tmp_path, quantize=stored)):
        assert type(found) is Llama and found.weights == kind
        assert found.config.to_dict() == CONFIG.to_dict()
        assert np.array_equal(found([PROMPT]), model([PROMPT]))
    message = refused(GPT2.from_pretrained, tmp_path)
    assert message.startswith(f"{tmp_path} holds a Llama, not a GPT2: open it with gpt2c.from_pr")


def test_loaded_model_recomputes_as_it_is_told(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, recompute="full")
    assert model.recompute == "full" and Llama.from_pretrained(tmp_path).recompute is None


def test_empty_prompt_starts_from_bos_or_else_from_eos() -> None:
    for ends, first in (({"eos_token_id": 2}, 2), ({"eos_token_id": 2, "bos_token_id": 1}, 1)):
        model = Llama(dataclasses.replace(CONFIG, **ends))
        assert check_prompts(model.config, [[]]) == [[first]]


def test_gpt2s_directory_is_no_llama(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=V, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    GPT2(config).save_pretrained(tmp_path)
    assert refused(Llama.from_pretrained, tmp_path).startswith(f"{tmp_path} holds a GPT2, not a ")
    assert type(open_found(find_model(tmp_path))) is GPT2
