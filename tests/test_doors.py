"""The public names: mypy and the program agree on the types that they return."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pytest
from numpy.typing import NDArray

import gpt2c
from gpt2c.generate.engine import Request

Ids = NDArray[np.int64]
Logprobs = NDArray[np.float64]
IDS, IDS_OF_LENGTHS = np.array([[65, 66]]), [[65], [66, 67]]


@pytest.fixture(scope="module")
def model() -> gpt2c.GPT2:
    config = gpt2c.GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    return gpt2c.GPT2(config, backend="numpy")


def test_types_of_generate(model: gpt2c.GPT2) -> None:
    ids = model.generate(IDS, 3)
    assert_type(ids, Ids)
    assert ids.shape == (1, 5) and ids.dtype == np.int64
    either = model.generate([[65], [66]], 3)
    assert_type(either, Ids | list[Ids])
    assert isinstance(either, np.ndarray)
    texts = model.generate(IDS_OF_LENGTHS, 3)
    assert_type(texts, Ids | list[Ids])
    assert isinstance(texts, list) and [text.dtype for text in texts] == [np.int64] * 2
    pair = model.generate(IDS, 3, logprobs=True, top_k=5)
    assert_type(pair, tuple[Ids, Logprobs])
    assert pair[0].shape == (1, 5) and pair[1].shape == (1, 3) and pair[1].dtype == np.float64
    assert_type(model.generate(IDS_OF_LENGTHS, logprobs=True), tuple[Ids | list[Ids], Logprobs])


def test_types_of_stream(model: gpt2c.GPT2) -> None:
    steps = model.stream(IDS_OF_LENGTHS, 3)
    assert_type(steps, Iterator[Ids])
    assert next(steps).shape == (2,)
    pairs = model.stream(IDS, 3, logprobs=True)
    assert_type(pairs, Iterator[tuple[Ids, Logprobs]])
    ids, logprobs = next(pairs)
    assert ids.dtype == np.int64 and logprobs.dtype == np.float64


def test_types_of_the_engine(model: gpt2c.GPT2) -> None:
    with gpt2c.Engine(model) as engine:
        request = engine.submit([65], 3)
        assert_type(request, Request[int])
        tokens = request.result(60)
        assert_type(tokens, Ids)
        assert tokens.dtype == np.int64
        for token in request:
            assert_type(token, int)
        likely = engine.submit([65], 3, logprobs=True)
        result = likely.result(60)
        assert_type(result, tuple[Ids, Logprobs])
        assert result[1].dtype == np.float64
        for new, logprob in likely:
            assert_type(new, int)
            assert_type(logprob, float)


def test_types_of_the_generator(model: gpt2c.GPT2) -> None:
    generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
    assert_type(generator.generate("a", max_new_tokens=1), str)
    assert_type(generator.generate(["a"], max_new_tokens=1), list[str])
    assert_type(generator.stream("a", max_new_tokens=1), Iterator[str])
    assert_type(next(generator.tokens("a", max_new_tokens=1)).probability, float)


def test_types_of_the_models(model: gpt2c.GPT2, tmp_path: Path) -> None:
    small = model.quantize("int8")
    assert_type(small, gpt2c.GPT2)
    assert type(small) is gpt2c.GPT2
    model.save_pretrained(tmp_path)
    assert_type(gpt2c.GPT2.from_pretrained(tmp_path, quantize="fp16"), gpt2c.GPT2)
    either = gpt2c.from_pretrained(tmp_path, "numpy")
    assert_type(either, gpt2c.GPT2 | gpt2c.Llama)
    assert type(either) is gpt2c.GPT2
    assert_type(either.config.vocab_size, int)


def test_types_of_the_ops() -> None:
    x = np.ones((2, 3), np.float32)
    assert_type(gpt2c.ops.gelu_forward(x, backend="numpy"), NDArray[Any])
    assert_type(gpt2c.ops.global_norm(x, backend="numpy"), float)
    with pytest.raises(TypeError):
        gpt2c.ops.gelu_forward(y=x)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [name for name in gpt2c.__all__ if name != "ops"])
def test_no_door_returns_any(name: str) -> None:
    """Except in mappings to values of several types, such as a config's entries."""
    door: Any = getattr(gpt2c, name)
    called = [inspect.unwrap(door)]
    if inspect.isclass(door):
        members = [
            inspect.getattr_static(door, key)
            for key in ("__call__", *dir(door))
            if key == "__call__" or key[0] != "_"
        ]
        called = [getattr(m, "fget", None) or getattr(m, "__func__", m) for m in members]
    called = [function for function in called if inspect.isfunction(function)]
    assert called
    for function in called:
        returned = function.__annotations__["return"]
        assert not re.search(r"\bAny\b(?!\])", returned), f"{function.__qualname__} -> {returned}"
