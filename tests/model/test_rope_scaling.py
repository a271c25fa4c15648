"""Rotary scaling: its formulas, and the entries of config.json that describe it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c.model.llama import LlamaConfig
from gpt2c.model.rope import Rope
from gpt2c.model.rope_scaling import RopeScaling, read_rope

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 128)


def llama3(frequency: float) -> float:
    """Return what Llama 3 makes of a frequency, by cases of its wavelength."""
    length = 2 * math.pi / frequency
    if length < 128 / 4.0:
        return frequency
    if length > 128 / 1.0:
        return frequency / 8.0
    part = (128 / length - 1.0) / (4.0 - 1.0)
    return (1 - part) * frequency / 8.0 + part * frequency


@pytest.mark.parametrize(
    ("scaling", "formula"),
    [
        (RopeScaling("linear", 2.5), lambda frequency: frequency / 2.5),
        (RopeScaling("dynamic", 2.5), lambda frequency: frequency),
        (LLAMA3, llama3),
    ],
)
def test_frequencies_are_those_of_the_formula(scaling: RopeScaling, formula: Any) -> None:
    plain = 500.0 ** -(np.arange(0, 32, 2) / 32)
    wanted = np.array([formula(frequency) for frequency in plain])
    kinds = {"kept": (wanted == plain).any(), "divided": (wanted == plain / 8).any()}
    assert scaling != LLAMA3 or (all(kinds.values()) and len({*(wanted / plain)}) > 4)
    np.testing.assert_allclose(scaling.scaled(plain), wanted, rtol=1e-14)
    cos, sin = Rope(100, 32, 500.0, scaling).tables(100)
    np.testing.assert_allclose(cos[99], np.cos(99 * wanted), atol=1e-6)
    np.testing.assert_allclose(sin[99], np.sin(99 * wanted), atol=1e-6)


FIELDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("entries", "theta", "scaling"),
    [
        ({}, None, None),
        ({"rope_theta": 7e3, "rope_scaling": None}, 7e3, None),
        ({"rope_theta": 7e3, "rope_scaling": {"type": "linear", "factor": 2}}, 7e3, "linear"),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}}, None, "linear"),
        ({"rope_parameters": {"rope_theta": 7e3, "rope_type": "default"}}, 7e3, None),
        ({"rope_parameters": {"rope_theta": 7e3}, "rope_theta": 7e3}, 7e3, None),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, None, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", **FIELDS}}, None, "llama3"),
        ({"partial_rotary_factor": 1.0}, None, None),
    ],
)
def test_both_versions_of_transformers_are_read(
    entries: dict[str, Any], theta: float | None, scaling: str | None
) -> None:
    found = read_rope(entries, 128)
    assert found.get("rope_theta") == theta
    made = found["rope_scaling"]
    assert (made and made.rope_type) == scaling
    assert scaling != "llama3" or made == LLAMA3
    config = LlamaConfig.from_dict({"max_position_embeddings": 128, **entries})
    assert config.rope_theta == (theta or 10000.0) and config.rope_scaling == made


def test_old_length_may_stand_beside() -> None:
    entries = {"original_max_position_embeddings": 64, "rope_scaling": {"type": "llama3", **FIELDS}}
    found = read_rope(entries, 128)["rope_scaling"]
    assert found.original_max_position_embeddings == 64


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta": 1}}, "got 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "got 'longrope'"),
        ({"rope_scaling": {"type": ["linear"]}}, r"one of linear, dynamic, llama3, got ['linear']"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic"}}, "rope_type is both"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is both 10000.0"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a number from 1 to 1e+06, got None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number from 1"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number from 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "linear has no 'x'"),
        ({"rope_scaling": {"type": "linear", **FIELDS}}, "linear has no low_freq_factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor must be a number"),
        (
            {"rope_scaling": {"type": "llama3", **FIELDS, "low_freq_factor": 4}},
            "low_freq_factor must be lower than high_freq_factor, got 4 and 4.0",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "original_max_position_embeddings": 0,
                    **FIELDS,
                }
            },
            "original_max_position_embeddings must be a whole number",
        ),
        ({"rope_scaling": "linear"}, "must be objects, got 'linear'"),
        ({"rope_scaling": {"linear": 2}, "rope_parameters": [1]}, "must be objects, got [1]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor must be 1"),
        ({"rope_theta": "x"}, "rope_theta must be a number"),
    ],
)
def test_other_positions_are_refused_by_name(entries: dict[str, Any], said: str) -> None:
    message = refused(LlamaConfig.from_dict, entries)
    assert message.startswith("config.json: ") and said in message and len(message) < 200


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), LLAMA3], ids=str)
def test_scaling_is_written_and_hashed(scaling: RopeScaling | None) -> None:
    config = LlamaConfig(rope_theta=5e5, rope_scaling=scaling)
    entries = json.loads(json.dumps(config.to_dict()))
    again = LlamaConfig.from_dict(entries)
    assert again == config and hash(again) == hash(config)
    assert None not in (entries["rope_scaling"] or {}).values()


def test_config_takes_only_a_scaling() -> None:
    entries: Any = {"rope_type": "linear", "factor": 2.0}
    assert "must be a RopeScaling or None, got {'rope" in refused(LlamaConfig, rope_scaling=entries)
