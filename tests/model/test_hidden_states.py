"""Hidden states against the formula in float64, and the embeddings made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.cases import NO_CACHE, NO_DROPOUT

from gpt2c import GPT2, Generator, GPT2Config, Tokenizer
from gpt2c.kernels import reference
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.reader import CHUNK

V, T, END, L, C = 37, 16, 36, 3, 24
CONFIG = GPT2Config(
    V, n_positions=T, n_embd=C, n_layer=L, n_head=3, initializer_range=0.3, eos_token_id=END
)
KINDS = ["fp32", "fp16", "int8"]
BOUNDS = {"fp32": 2e-6, "fp16": 2e-3, "int8": 0.05}  # float32's sums, and rounded weights
IDX = np.arange(2 * 7).reshape(2, 7) % V
TEXTS = [[1, 2, 3], [4], list(range(T)), [], [7, 7, 7]]


def make(backend: Any = "auto", kind: str = "fp32", config: GPT2Config = CONFIG) -> Any:
    model = GPT2(config, seed=2, backend=backend)
    rng = np.random.default_rng(0)
    for parameter in model.parameters.values():
        parameter += 0.1 * rng.standard_normal(parameter.shape, np.float32)
    return model if kind == "fp32" else model.quantize(kind)


def stream(model: GPT2, idx: np.ndarray) -> list[np.ndarray]:
    """Return the hidden states between the layers, (B, T, C) each, by the formula in float64."""
    p = {name: array.astype(np.float64) for name, array in model.parameters.items()}
    B, T = idx.shape
    N, eps, heads = B * T, model.config.layer_norm_epsilon, model.config.n_head

    def layernorm(name: str, x: np.ndarray) -> np.ndarray:
        out, mean, rstd = np.empty((N, C)), np.empty(N), np.empty(N)
        weight, bias = p[name + ".weight"], p[name + ".bias"]
        reference.layernorm_forward(out, mean, rstd, x, weight, bias, eps)
        return out

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    x = (p["wte.weight"][idx] + p["wpe.weight"][:T]).reshape(N, C)
    states = [x]
    for layer in range(model.config.n_layer):
        h = f"h.{layer}."
        qkv = linear(h + "attn.c_attn", layernorm(h + "ln_1", x)).reshape(B, T, 3 * C)
        att, lse = np.empty((B, T, C)), np.empty((B, heads, T))
        reference.attention_forward(att, lse, *NO_CACHE, qkv, None, 0, *NO_DROPOUT)
        x = x + linear(h + "attn.c_proj", att.reshape(N, C))
        hidden = linear(h + "mlp.c_fc", layernorm(h + "ln_2", x))
        reference.gelu_forward(hidden, hidden.copy())
        x = x + linear(h + "mlp.c_proj", hidden)
        states.append(x)
    states[-1] = layernorm("ln_f", x)
    return [state.reshape(B, T, C) for state in states]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_formulas(kind: str, backend: Any) -> None:
    model = make(backend, kind)
    logits, states = model(IDX, hidden_states=True)
    assert logits.shape == (2, 7, V) and np.array_equal(logits, model(IDX))
    assert states.shape == (L + 1, 2, 7, C) and states.dtype == np.float32
    for number, (state, wanted) in enumerate(zip(states, stream(make(), IDX), strict=True)):
        error = normalised_error(state, wanted)
        assert error <= BOUNDS[kind], (number, error)
    kept = states.copy()
    model(IDX[::-1], hidden_states=True)
    assert np.array_equal(states, kept), "they are in memory of their own"


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_hidden_states_of_more_than_a_chunk(kind: str) -> None:
    config = GPT2Config(V, n_positions=CHUNK + 9, n_embd=C, n_layer=2, n_head=3)
    model = make("auto", kind, config)
    idx = np.arange(CHUNK + 9)[None] % V
    wanted = stream(make("auto", "fp32", config), idx)
    for state, other in zip(model(idx, hidden_states=True)[1], wanted, strict=True):
        assert normalised_error(state, other) <= (0.1 if kind == "int8" else 2e-6)


def test_hidden_states_leave_training_alone() -> None:
    model, same = make(), make()
    assert model.loss(IDX, IDX) == same.loss(IDX, IDX)
    same.backward()
    model.zero_grad()
    model(IDX, hidden_states=True)
    assert "needs a loss" in refused(model.backward), "the logits took the activations' memory"
    model.loss(IDX, IDX)
    model.backward()
    assert np.array_equal(model.flat_gradients, same.flat_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_results_that_do_not_fit_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("auto", kind)
    monkeypatch.setattr("gpt2c.kernels.memory.UNASKED", 0)
    size = 4 * IDX.size * V, 4 * IDX.size * C * (L + 1)
    decoder = 10**6  # the caches are allocated next
    for needed, asked in ((size[0], False), (sum(size), True)):
        monkeypatch.setattr(
            "gpt2c.kernels.memory.available_bytes", lambda needed=needed: needed - 1
        )
        with pytest.raises(MemoryError, match=r"^a result for 14 tokens needs .*: logits"):
            model(IDX, hidden_states=asked)
        monkeypatch.setattr("gpt2c.kernels.memory.available_bytes", lambda: decoder)
        model(IDX, hidden_states=asked)


# ---- embeddings ----------------------------------------------------------------------------------


@TWO_BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_means_of_the_last_states(kind: str, backend: Any) -> None:
    model = make(backend, kind)
    vectors = model.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), C) and vectors.dtype == np.float32
    for vector, text in zip(vectors, TEXTS, strict=True):
        wanted = stream(make(), np.array([text or [END]]))[-1][0].mean(axis=0)
        assert normalised_error(vector, wanted) <= BOUNDS[kind]
        assert np.array_equal(vector, model.embed([text])[0]), "a text is as it is alone"
    assert np.array_equal(model.embed(np.array([[1, 2, 3]]))[0], vectors[0])


def test_embeddings_refuse_bad_texts() -> None:
    model = make()
    assert "at least one" in refused(model.embed, [])
    assert "token id 37" in refused(model.embed, [[37]])
    assert f"{T + 1} tokens" in refused(model.embed, [[1] * (T + 1)])
    assert refused(model.embed, [1, 2]).endswith("pass ids[None], or [ids]")


def test_generator_embeds_strings() -> None:
    config = GPT2Config(257, n_positions=T, n_embd=C, n_layer=1, n_head=3, eos_token_id=256)
    generator = Generator(GPT2(config, seed=1), Tokenizer.from_name("bytes"))
    texts = ["ab", "", "c"]
    vectors = generator.embed(texts)
    assert np.array_equal(vectors, generator.model.embed([[97, 98], [256], [99]]))
    one = generator.embed("ab")
    assert one.shape == (C,) and np.array_equal(one, vectors[0])
    assert np.array_equal(generator.embed(tuple(texts)), vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_refuse_the_ids_of_one_text(kind: str) -> None:
    model, ids = make("auto", kind), np.arange(5)
    for call in (model, model.logprobs, model.embed, model.generate):
        assert refused(call, ids).endswith("got shape (5,): for one text pass ids[None], or [ids]")
        call(ids[None])
        call([ids])
