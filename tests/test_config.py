"""GPT2Config: what it accepts, what follows from it, Hugging Face's config.json."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from conftest import refused

from gpt2c import GPT2Config

WHOLE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, None])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    if not (name == "n_inner" and value is None):
        assert refused(GPT2Config, **{name: value}).startswith(name)
        assert refused(GPT2Config.from_dict, {name: value, "eos_token_id": 5}).startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_embd", 770),  # 12 heads do not divide it
        *(("layer_norm_epsilon", value) for value in (0, -1e-5, math.inf, math.nan, "1e-5", None)),
        *(("initializer_range", value) for value in (0, -1, math.inf, math.nan, None)),
        *(("eos_token_id", value) for value in (-1, 50257, 1.0, [5])),
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
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ],
)
def test_other_models_are_refused(name: str, value: Any) -> None:
    message = refused(GPT2Config.from_dict, {name: value})
    assert name in message and repr(value) in message


def test_config_makes_the_round_trip() -> None:
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


def test_gpt2_has_124m_parameters() -> None:
    config = GPT2Config()
    assert config.num_parameters() == 124_439_808
    assert sum(map(math.prod, config.parameter_shapes().values())) == 124_439_808
    assert config.inner == 3072


@pytest.mark.parametrize(("T", "gigaflops"), [(1024, 0.798), (64, 0.745)])
def test_flops_per_token(T: int, gigaflops: float) -> None:
    assert GPT2Config().flops_per_token(T) == pytest.approx(gigaflops * 1e9, rel=1e-3)
