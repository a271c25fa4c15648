"""GPT2Config: accepted values, derived figures, and Hugging Face's config.json."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c import GPT2Config, LlamaConfig

WHOLE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, None, 2**31, 10**4000, [4], {}])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    if not (name == "n_inner" and value is None):
        assert refused(GPT2Config, **{name: value}).startswith(name)
        message = refused(GPT2Config.from_dict, {name: value, "eos_token_id": 5})
        assert message.startswith(f"config.json: {name} must be a whole number from 1 to")
        assert len(message) < 200  # not all digits of an untrusted number


def test_numbers_of_numpy_become_plain_ones() -> None:
    given = {"n_layer": np.int64(1), "vocab_size": np.uint16(257), "eos_token_id": np.int32(256)}
    config = GPT2Config(**given, layer_norm_epsilon=np.float32(0.5))
    assert config == GPT2Config(257, n_layer=1, eos_token_id=256, layer_norm_epsilon=0.5)
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config = LlamaConfig(num_hidden_layers=np.int64(2), rope_theta=np.float32(500))
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong in (np.int64(0), np.float32(2), np.bool_(True)):
        assert refused(GPT2Config, n_layer=wrong).startswith("n_layer must be a whole number from")


def test_sizes_may_be_large() -> None:
    """Up to int32; a config allocates no memory."""
    config = GPT2Config(2**31 - 1, n_positions=2**31 - 1, n_layer=10_000)
    assert config.num_parameters() == sum(map(math.prod, config.parameter_shapes().values()))
    assert refused(GPT2Config, n_layer=10_001).startswith(
        "n_layer must be a whole number from 1 to"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_embd", 770),  # 12 heads do not divide it
        *(("layer_norm_epsilon", value) for value in (0, -1e-5, math.inf, math.nan, "1e-5", None)),
        *(("layer_norm_epsilon", value) for value in (True, 1e300, 10**400, 1.1, 1e-40, [], {})),
        *(("initializer_range", value) for value in (0, -1, math.inf, math.nan, None)),
        *(("initializer_range", value) for value in (True, 1e39, 10**400, 1e-40, "0.02")),
        *(("eos_token_id", value) for value in (-1, 50257, 1.0, [5], True, False, "5")),
    ],
)
def test_bad_settings_are_refused(name: str, value: Any) -> None:
    assert refused(GPT2Config, **{name: value}).startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),  # the other form
        ("activation_function", "quick_gelu"),
        ("activation_function", None),
        ("activation_function", ["gelu_new"]),
        ("add_cross_attention", True),
        ("architectures", ["GPT2ForTokenClassification"]),
        ("architectures", ["GPT2DoubleHeadsModel"]),
        ("architectures", ["GPT2LMHeadCustomModel"]),
        ("architectures", "GPT2LMHeadModel"),
        ("architectures", []),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ],
)
def test_other_models_are_refused(name: str, value: Any) -> None:
    message = refused(GPT2Config.from_dict, {name: value})
    assert message.startswith(f"config.json: {name} must be") and repr(value) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("architectures", ["GPT2Model"]), ("architectures", None), ("reorder_and_upcast_attn", True)]
    + [("activation_function", f"gelu_{f}") for f in ("new", "pytorch_tanh", "fast", "accurate")],
)
def test_other_names_of_the_same_gelu_are_taken(name: str, value: Any) -> None:
    assert GPT2Config.from_dict({name: value}) == GPT2Config()


def test_long_value_is_shortened_in_the_error() -> None:
    for name in ("model_type", "activation_function", "architectures", "n_embd", "eos_token_id"):
        for value in ("x" * 10**6, ["x"] * 10**5, {"x\n" * 9999: 1}):
            assert len(refused(GPT2Config.from_dict, {name: value})) < 400


ALIASES = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"} | {
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_other_names_of_sizes_in_transformers_are_taken(alias: str, name: str) -> None:
    """If num_attention_heads were ignored, the model would have 12 heads and give other logits."""
    expected = GPT2Config(**{name: 24})
    assert (
        GPT2Config.from_dict({alias: 24}) == GPT2Config.from_dict({alias: 24, name: 24}) == expected
    )
    message = refused(GPT2Config.from_dict, {alias: 24, name: 36})
    assert message == f"config.json: {alias} and {name} must be equal, got 24 and 36"
    assert refused(GPT2Config.from_dict, {alias: "24"}).startswith(f"config.json: {name} must be")


@pytest.mark.parametrize(
    ("stored", "eos"),
    [
        (7, 7),
        ([7], 7),
        ([7, 8], 7),
        (None, None),
        (50257, None),
        (10**30, None),
        ([60000, 1], None),
    ],
)
def test_eos_token_id_is_read(stored: Any, eos: int | None) -> None:
    assert GPT2Config.from_dict({"eos_token_id": stored}).eos_token_id == eos


@pytest.mark.parametrize("stored", [-1, True, "7", [], [True], [[7]], {"a": 7}, 7.0])
def test_bad_eos_token_id_is_refused(stored: Any) -> None:
    assert refused(GPT2Config.from_dict, {"eos_token_id": stored}).startswith(
        "config.json: eos_tok"
    )


def test_config_round_trips() -> None:
    for config in (
        GPT2Config(),
        GPT2Config(n_embd=30, n_head=3, n_inner=71),
        GPT2Config(eos_token_id=50256, layer_norm_epsilon=1e-6),
    ):
        text = json.dumps(config.to_dict())
        assert GPT2Config.from_dict(json.loads(text)) == config


def test_hugging_faces_gpt2_is_the_default() -> None:
    """The config.json of openai-community/gpt2, as published."""
    published = json.loads("""{
      "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
      "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
      "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
      "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
      "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
      "summary_type": "cls_index", "summary_use_proj": true,
      "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
      "vocab_size": 50257
    }""")
    assert GPT2Config.from_dict(published) == GPT2Config(eos_token_id=50256)
    assert GPT2Config.from_dict(published | {"vocab_size": 256}).eos_token_id is None


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),  # gpt2
        (24, 16, 1024, 354_823_168),  # gpt2-medium
        (36, 20, 1280, 774_030_080),  # gpt2-large
        (48, 25, 1600, 1_557_611_200),  # gpt2-xl
    ],
)
def test_four_sizes_of_gpt2(n_layer: int, n_head: int, n_embd: int, parameters: int) -> None:
    """On the hub their config.json differ in three numbers; transformers counted the parameters."""
    config = GPT2Config.from_dict({"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd})
    assert config.num_parameters() == parameters
    assert sum(map(math.prod, config.parameter_shapes().values())) == parameters
    assert config.inner == 4 * n_embd and (config.vocab_size, config.n_positions) == (50257, 1024)


def test_prefill_is_decoding_without_the_logits_of_all_tokens_but_the_last() -> None:
    config, T = GPT2Config(), 100
    decoded = sum(config.decode_flops(t + 0.5) for t in range(T))  # T / 2 keys on average
    head = 2 * config.vocab_size * config.n_embd
    assert config.prefill_flops(T) == pytest.approx(decoded - (T - 1) * head)


@pytest.mark.parametrize(("T", "gigaflops"), [(1024, 0.798), (64, 0.745)])
def test_flops_per_token(T: int, gigaflops: float) -> None:
    assert GPT2Config().flops_per_token(T) == pytest.approx(gigaflops * 1e9, rel=1e-3)
