"""The settings of each method are found where its docstring says."""

from __future__ import annotations

import dataclasses
import re

import pytest

import gpt2c.finetune

METHODS = ("classify", "distill", "dpo", "grpo", "prune", "reward", "sft")


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_name_the_settings(name: str) -> None:
    (found,) = re.findall(
        r"fields of `gpt2c\.finetune\.(\w+)`", getattr(gpt2c.finetune, name).__doc__
    )
    assert found in gpt2c.finetune.__all__
    assert dataclasses.is_dataclass(getattr(gpt2c.finetune, found))
