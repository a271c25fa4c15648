"""The examples in docstrings: each public name has one, and they run."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2c
from gpt2c import finetune, ops, scoring

METHODS = [door for door in map(vars(finetune).get, finetune.__all__) if inspect.isfunction(door)]
DOORS = [gpt2c, ops, scoring, *(getattr(gpt2c, name) for name in gpt2c.__all__ if name != "ops")]
DOORS += METHODS


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_examples_of_the_doors_run(
    door: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(door) or ""
    known = {"gpt2c": gpt2c, "np": np}
    test = doctest.DocTestParser().get_doctest(text, known, door.__name__, None, None)
    assert test.examples, f"{door.__name__} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner().run(test, out=said.append)
    assert not result.failed, "".join(said)
    assert not [*tmp_path.iterdir()], "an example leaves a file"
