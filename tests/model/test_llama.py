"""Llama out of blocks: RMSNorm, rotary positions, SwiGLU, grouped queries, a head of its own."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c import GPT2, AdamW
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.plan import KEPT
from gpt2c.model.rope import Rope

ODD = LlamaConfig(
    vocab_size=97,
    hidden_size=30,
    intermediate_size=71,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=70,
    rope_theta=50.0,
)
TIED = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=3,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)
CONFIGS = pytest.mark.parametrize("config", [ODD, TIED], ids=["grouped", "tied"])


def odd_model(backend: Any, config: LlamaConfig = ODD, recompute: str | None = None) -> Model:
    """Return a model whose parameters are all random, also the norms' weights."""
    model, rng = Model(config, 1, backend, recompute), np.random.default_rng(1)
    for parameter in model.parameters.values():
        parameter += np.float32(0.1) * rng.standard_normal(parameter.shape, np.float32)
    return model


def oracle(config: LlamaConfig, p: Any, idx: Any) -> Any:
    """Return logits (B, T, V) in float64, by the formulas of transformers' modeling_llama."""
    p = {name: np.asarray(array, np.float64) for name, array in p.items()}
    (B, T), NH, HS = idx.shape, config.num_attention_heads, config.HS
    KV = config.num_key_value_heads or NH

    def norm(x: Any, weight: Any) -> Any:
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)

    def rotate_half(x: Any) -> Any:
        return np.concatenate([-x[..., HS // 2 :], x[..., : HS // 2]], -1)

    angles = np.arange(T)[:, None] / config.rope_theta ** (np.arange(0, HS, 2) / HS)
    cos, sin = (np.tile(f(angles), 2) for f in (np.cos, np.sin))
    x = p["wte.weight"][idx]
    for i in range(config.num_hidden_layers):
        h = f"h.{i}."
        qkv = norm(x, p[h + "ln_1.weight"]) @ p[h + "attn.c_attn.weight"].T
        heads = qkv.reshape(B, T, -1, HS).swapaxes(1, 2)
        q, k, v = np.split(heads, [NH, NH + KV], axis=1)
        q, k = (part * cos + rotate_half(part) * sin for part in (q, k))
        k, v = (np.repeat(part, NH // KV, axis=1) for part in (k, v))
        scores = q @ k.swapaxes(2, 3) / np.sqrt(HS) + np.triu(np.full((T, T), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        att = weights / weights.sum(-1, keepdims=True) @ v
        x = x + att.swapaxes(1, 2).reshape(B, T, -1) @ p[h + "attn.c_proj.weight"].T
        gate, up = np.split(norm(x, p[h + "ln_2.weight"]) @ p[h + "mlp.c_fc.weight"].T, 2, axis=-1)
        x = x + gate / (1 + np.exp(-gate)) * up @ p[h + "mlp.c_proj.weight"].T
    return norm(x, p["ln_f.weight"]) @ p.get("lm_head.weight", p["wte.weight"]).T


@CONFIGS
def test_llama_logits_are_those_of_the_formula(
    config: LlamaConfig, backend: Any, rng: np.random.Generator
) -> None:
    model = odd_model(backend, config)
    idx = rng.integers(0, config.vocab_size, (2, config.n_positions))
    assert normalised_error(model(idx), oracle(config, model.parameters, idx)) <= 1e-5


@CONFIGS
def test_llama_gradients_are_central_differences(
    config: LlamaConfig, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code on float64 numbers; each parameter along its own gradient."""
    start = odd_model("numpy", config)
    for module in ("model", "plan", "weights"):
        monkeypatch.setattr(f"gpt2c.model.{module}.aligned_zeros", np.zeros)
    model = Model(config, None, "numpy")
    for name, parameter in model.parameters.items():
        parameter[...] = start.parameters[name]
    idx = rng.integers(0, config.vocab_size, (2, 9))
    model.loss(idx, idx)
    model.backward()
    gradients = {name: gradient.copy() for name, gradient in model.gradients.items()}
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float64
        norm, own, losses = np.linalg.norm(gradient), model.parameters[name].copy(), []
        for step in (1e-4, -1e-4):
            model.parameters[name][...] = own + step * gradient / norm
            losses.append(model.loss(idx, idx, keep=False))
        model.parameters[name][...] = own
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(norm, rel=1e-6), name


@CONFIGS
@pytest.mark.parametrize("recompute", KEPT)
def test_llama_gradients_are_those_of_the_reference(
    config: LlamaConfig, recompute: str | None, backend: Any, rng: np.random.Generator
) -> None:
    idx = rng.integers(0, config.vocab_size, (2, config.n_positions))
    found = []
    for model in (odd_model(backend, config, recompute), odd_model("numpy", config)):
        for _ in range(2):  # written, then added to
            model.loss(idx, idx)
            model.backward(scale=0.5)
        found.append({name: gradient.copy() for name, gradient in model.gradients.items()})
    for name, gradient in found[0].items():
        assert normalised_error(gradient, found[1][name]) <= 2e-5, name


def test_llama_of_ragged_sequences_is_each_alone(backend: Any, rng: np.random.Generator) -> None:
    model = odd_model(backend)
    idx = [rng.integers(0, 97, length) for length in (5, 70, 1, 33)]
    for row, losses in zip(idx, model.losses(idx, idx), strict=True):
        np.testing.assert_allclose(losses, model.losses([row], [row])[0], rtol=1e-5, atol=2e-6)
    count = sum(map(len, idx))
    loss = model.loss(idx, idx)
    model.backward()
    together = model.flat_gradients.copy()
    model.zero_grad()
    parts = 0.0
    for row in idx:
        parts += model.loss([row], [row], count=count)
        model.backward()
    assert parts == pytest.approx(loss, rel=1e-6)
    assert normalised_error(model.flat_gradients, together) <= 2e-6


@CONFIGS
@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_llama_read_token_by_token_has_the_logits_of_one_pass(
    config: LlamaConfig, weights: str, backend: Any, rng: np.random.Generator
) -> None:
    model = odd_model(backend, config)
    if weights != "fp32":
        model = model.quantize(weights)
    idx = rng.integers(0, config.vocab_size, (2, config.n_positions)).astype(np.int32)
    expected = model(idx)
    decoder = model.decoder(2)
    for slot in range(2):
        decoder.read(idx[slot, :7], slot, 0)
    for t in range(7, config.n_positions):
        slots = np.arange(2, dtype=np.int32)
        logits = decoder.step(idx[:, t].copy(), slots, np.full(2, t, np.int32))
        assert normalised_error(logits, expected[:, t]) <= (1e-5 if weights != "int8" else 0.05)


def test_rope_is_exact_at_late_positions() -> None:
    rope = Rope(200_000, 128, 10_000.0)
    cos, sin = rope.tables(100_001)
    angles = 100_000 * 10_000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(cos[100_000], np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin[100_000], np.sin(angles), atol=1e-7)
    assert len(Rope(200_000, 128, 10_000.0).tables(3)[0]) == 6, "made as far as texts have come"


def test_llama_learns_a_text_by_heart(rng: np.random.Generator) -> None:
    model = Model(TIED)
    optimizer = AdamW(model, learning_rate=0.01)
    ids = rng.integers(0, 61, (1, 17))
    for _ in range(150):
        model.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        model.backward()
        optimizer.step(grad_clip=1.0)
    assert loss < 0.1


def test_llama_is_no_gpt2() -> None:
    assert "config must be a GPT2Config, got LlamaConfig(" in refused(GPT2, TIED)


def test_llama_has_the_parameters_of_its_kind() -> None:
    shapes = ODD.parameter_shapes()
    assert shapes["h.1.attn.c_attn.weight"] == ((6 + 2 * 2) * 10, 30)
    assert shapes["h.1.attn.c_proj.weight"] == (30, 60)
    assert shapes["h.1.mlp.c_fc.weight"] == (2 * 71, 30)
    assert shapes["lm_head.weight"] == shapes["wte.weight"] == (97, 30)
    assert not any(name.endswith("bias") or name.startswith("wpe") for name in shapes)
    assert "lm_head.weight" not in TIED.parameter_shapes()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers must be a whole number from 1 to 10000"),
        ({"num_key_value_heads": 5}, "divisible by num_key_value_heads, got 32 and 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
        ({"hidden_size": 100}, "divisible by num_attention_heads, got 100 and 32"),
        ({"head_dim": 7}, "an even number of channels, got 7"),
        ({"head_dim": 2**31 - 2}, "a head must have at most 65,536 channels, got 2,147,483,646"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a number from 1e-37 to 1"),
        ({"rope_theta": 0.5}, "rope_theta must be a number from 1 to 1e"),
        ({"eos_token_id": 32000}, r"eos_token_id must be in \[0, 32000\), got 32000"),
    ],
)
def test_llama_config_refuses_sizes_that_cannot_be(changes: dict[str, Any], wanted: str) -> None:
    assert re.search(wanted, refused(LlamaConfig, **changes))


SMOLLM2 = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
  "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
  "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
  "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "use_cache": true, "vocab_size": 49152
}"""


def test_config_of_smollm2_is_read() -> None:
    """As published for HuggingFaceTB/SmolLM2-135M."""
    config = LlamaConfig.from_dict(json.loads(SMOLLM2))
    assert config.num_parameters() == 134_515_008 and config.HS == 64
    assert config.tie_word_embeddings and config.rope_theta == 100_000
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_llama_round_trips() -> None:
    ends = LlamaConfig(eos_token_id=2, bos_token_id=1), LlamaConfig(eos_token_id=7)
    for config in (ODD, TIED, *ends):
        entries = json.loads(json.dumps(config.to_dict()))
        assert entries["model_type"] == "llama"
        assert LlamaConfig.from_dict(entries) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "mistral"),
        ("model_type", "gpt2"),
        ("architectures", ["LlamaForTokenClassification"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
    ],
)
def test_other_arithmetic_is_refused_by_name(name: str, value: Any) -> None:
    message = refused(LlamaConfig.from_dict, {name: value})
    assert message.startswith(f"config.json: {name} must be") and repr(value) in message


@pytest.mark.parametrize(
    ("stored", "token"), [(7, 7), ([7, 8], 7), (None, None), (32000, None), ([60000, 1], None)]
)
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_token_ids_of_llama_are_read(name: str, stored: Any, token: int | None) -> None:
    assert getattr(LlamaConfig.from_dict({name: stored}), name) == token
    for bad in (-1, "7", [[7]], True, {"a": 1}):
        assert refused(LlamaConfig.from_dict, {name: bad}).startswith(f"config.json: {name} must")
