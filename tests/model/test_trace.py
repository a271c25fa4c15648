"""Trace: every activation by name, attention's weights, and the logit lens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpt2c import GPT2, GPT2Config
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model

ODD = GPT2Config(vocab_size=61, n_positions=70, n_embd=34, n_layer=3, n_head=2, n_inner=51)
LLAMA = LlamaConfig(97, 30, 71, 2, 6, 2, 10, 70)


def test_trace_has_the_hidden_states_and_leaves_the_model_alone(
    backend: Any, rng: np.random.Generator
) -> None:
    model, ids = GPT2(ODD, backend=backend, recompute="full"), rng.integers(0, 61, (2, 33))
    logits, states = model(ids, hidden_states=True)
    model.loss(ids, ids)
    trace = model.trace(ids)
    model.backward()  # of the loss before
    inputs = ["encoded", "h.0.out", "h.1.out"]
    for name, state in zip(inputs, states, strict=False):
        assert np.array_equal(trace[name], state), name
    assert np.array_equal(trace["ln_f"], states[-1])
    assert normalised_error(trace.lens("h.2.out"), logits) <= 1e-6
    same = GPT2(ODD, backend=backend)
    same.loss(ids, ids)
    same.backward()
    assert np.array_equal(model.flat_gradients, same.flat_gradients)


def test_trace_follows_the_formulas(backend: Any, rng: np.random.Generator) -> None:
    model, ids = GPT2(ODD, backend=backend), rng.integers(0, 61, (2, 33))
    trace, p = model.trace(ids), model.parameters
    x = trace["h.0.out"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert normalised_error(trace["h.1.ln_1"], normed) <= 1e-5
    qkv = trace["h.1.ln_1"] @ p["h.1.attn.c_attn.weight"].T
    assert normalised_error(trace["h.1.attn.qkv"], qkv) <= 1e-5
    weights = trace.attention(1)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not np.triu(weights, 1).any()
    v = trace["h.1.attn.qkv"][..., 2 * 34 :].reshape(2, 33, 2, 17).swapaxes(1, 2)
    att = (weights @ v).swapaxes(1, 2).reshape(2, 33, 34)
    assert normalised_error(trace["h.1.attn.att"], att) <= 1e-5
    middle = x + trace["h.1.attn.att"] @ p["h.1.attn.c_proj.weight"].T
    assert normalised_error(trace["h.1.middle"], middle) <= 1e-5


def test_trace_of_grouped_queries(backend: Any, rng: np.random.Generator) -> None:
    model, ids = Model(LLAMA, backend=backend), rng.integers(0, 97, (2, 33))
    trace = model.trace(ids)
    weights, v = trace.attention(1), trace["h.1.attn.qkv"][..., 8 * 10 :]
    v = np.repeat(v.reshape(2, 33, 2, 10).swapaxes(1, 2), 3, axis=1)
    att = (weights @ v).swapaxes(1, 2).reshape(2, 33, 60)
    assert weights.shape == (2, 6, 33, 33)
    assert normalised_error(trace["h.1.attn.att"], att) <= 1e-5
    assert normalised_error(trace.lens("h.1.out"), model(ids)) <= 1e-6


def test_trace_names_what_it_has() -> None:
    trace = GPT2(ODD, backend="numpy").trace([[1, 2, 3]])
    layer = ["ln_1", "middle", "ln_2", "out", "attn.qkv", "attn.att", "mlp.fc", "mlp.act"]
    wanted = {"encoded", "ln_f"} | {f"h.{i}.{name}" for i in range(3) for name in layer}
    assert set(trace) == wanted and len(trace) == len(wanted)
    assert "Trace of 1 x 3 tokens: encoded, h.0.ln_1" in repr(trace)
    with pytest.raises(KeyError):
        trace["h.3.out"]
    with pytest.raises(IndexError):
        trace.attention(3)
    with pytest.raises(ValueError, match=r"the stream has 34 channels, h\.0\.mlp\.fc 51"):
        trace.lens("h.0.mlp.fc")
