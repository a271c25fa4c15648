"""The examples in docstrings: each public name and each public method has one, and they run."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import gpt2c
from gpt2c import finetune, ops, scoring
from gpt2c.generate.engine import EngineFull, Request

MODULES = (gpt2c, ops, scoring, finetune)
RESULTS = (Request, EngineFull)  # what methods return and raise
# These need no example:
EXEMPT = {
    # the package calls them
    *("GPT2.from_found", "GPT2.load_adapters", "GPT2.load_quantized", "LoRA.adapt"),
    *("GPT2.expect", "Generator.plan", "Engine.after_fork"),
    # what the functions of fine-tuning return; their examples use it
    *("Result", "Classified", "Classified.figures", "Pruned"),
    # old names, which warn
    *(f"QuantizedGPT2.{name}" for name in ("from_found", "from_model", "from_pretrained")),
}


def doors() -> Iterator[tuple[str, Any]]:
    """Yield the public names with their objects, a method of several classes once."""
    seen: set[Any] = set()
    for module in MODULES:
        yield module.__name__, module
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, ModuleType) and callable(value):
                yield name, value
                yield from methods(value, seen)
    for value in RESULTS:
        yield value.__name__, value
        yield from methods(value, seen)


def methods(kind: Any, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class that this package defines."""
    for name in dir(kind) if inspect.isclass(kind) else ():
        value = inspect.getattr_static(kind, name)
        code = getattr(value, "fget", None) or inspect.unwrap(value)
        own = inspect.isfunction(code) and code.__module__.startswith("gpt2c.")
        if own and not name.startswith("_") and code not in seen:
            seen.add(code)
            yield f"{kind.__name__}.{name}", value


DOORS = dict(doors())


@pytest.mark.parametrize("name", DOORS)
def test_examples_of_the_doors_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(DOORS[name]) or ""
    known = {"gpt2c": gpt2c, "np": np}
    test = doctest.DocTestParser().get_doctest(text, known, name, None, None)
    if not test.examples:  # the value of a property is a field's, which its first line tells
        assert name in EXEMPT or isinstance(DOORS[name], property), f"{name} has no example"
        assert text, f"{name} has no docstring"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not result.failed, "".join(said)
    assert not [*tmp_path.iterdir()], "an example leaves a file"


def test_exceptions_exist() -> None:
    assert EXEMPT <= DOORS.keys()


def test_help_of_the_package_shows_the_doors_alone() -> None:
    assert {*dir(gpt2c)} == {*gpt2c.__all__} - {"QuantizedGPT2"}  # an old name
    for name in dir(gpt2c):
        assert re.search(rf"\b{name}\b", gpt2c.__doc__ or ""), f"the first page lacks {name}"
        door = getattr(gpt2c, name)
        assert inspect.isclass(door) or inspect.isfunction(door) or inspect.ismodule(door)
