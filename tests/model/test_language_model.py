"""Continuing prompts of several lengths, scoring texts, and refusals before any work."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS

from gpt2c import GPT2, GPT2Config

V, T, END = 37, 16, 36
CONFIG = GPT2Config(
    V, n_positions=T, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3, eos_token_id=END
)
PROMPTS = [[1, 2, 3], [4], list(range(T)), [], [7, 7, 7, 7, 7, 7]]
KINDS = ["fp32", "fp16", "int8"]


def make(backend: Any = "auto", kind: str = "fp32", config: GPT2Config = CONFIG) -> Any:
    model = GPT2(config, seed=2, backend=backend)
    return model if kind == "fp32" else model.quantize(kind)


def lists(texts: Any) -> list[list[int]]:
    return [text.tolist() for text in texts]


# ---- prompts -------------------------------------------------------------------------------------


@TWO_BACKENDS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 5, "top_k": 20}])
def test_prompts_of_several_lengths_give_their_texts_alone(
    settings: dict[str, Any], kind: str, backend: Any
) -> None:
    """The i-th text of a call has the i-th random numbers; temperature 0 needs none."""
    model = make(backend, kind)
    texts = model.generate(PROMPTS, 20, **settings)
    assert isinstance(texts, list) and all(text.dtype == np.int64 for text in texts)
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        assert text.shape == (len(prompt) + 20,) and text[: len(prompt)].tolist() == prompt
        before = [[9] * (place + 1) for place in range(row)]  # other texts, other lengths
        if "seed" in settings:
            other = model.generate([*before, prompt, [3]], 20, **settings)[row]
        else:
            other = model.generate([prompt], 20, **settings)[0]
        assert np.array_equal(text, other)
    assert len({tuple(text[-20:]) for text in texts}) == len(PROMPTS)


@TWO_BACKENDS
def test_prompts_may_be_lists_tuples_or_arrays(backend: Any) -> None:
    model, settings = make(backend), {"max_new_tokens": 4, "temperature": 0}
    expected = lists(model.generate(PROMPTS, **settings))
    for form in (
        tuple(map(tuple, PROMPTS)),
        [np.array(prompt, np.int64) for prompt in PROMPTS],  # an empty one too
        [np.array(prompt, np.uint8) for prompt in PROMPTS],
        [np.array(PROMPTS[0]), *PROMPTS[1:]],
    ):
        assert lists(model.generate(form, **settings)) == expected
    whole = np.array([[1, 2, 3], [4, 5, 6]])
    for form in (whole, whole.tolist(), list(whole), whole.astype("u2"), whole[:, ::-1][:, ::-1]):
        texts = model.generate(form, **settings)
        assert isinstance(texts, np.ndarray) and texts.shape == (2, 7)
        assert np.array_equal(texts, model.generate(whole, **settings))
    before = whole.copy()
    model.generate(whole, 4)
    assert np.array_equal(whole, before)


@TWO_BACKENDS
def test_generated_ids_can_be_continued(backend: Any) -> None:
    model = make(backend)
    texts = model.generate(PROMPTS[:2], 5, temperature=0)
    on = model.generate(texts, 4, temperature=0)
    assert lists(on) == lists(model.generate(PROMPTS[:2], 9, temperature=0))


@TWO_BACKENDS
def test_empty_prompt_starts_from_the_end_of_a_text(backend: Any) -> None:
    model = make(backend)
    text = model.generate([[]], 5, temperature=0)
    assert np.array_equal(text[0], model.generate([[END]], 5, temperature=0)[0, 1:])
    ids, logprobs = model.generate([[], []], 3, logprobs=True, seed=1)
    assert ids.shape == logprobs.shape == (2, 3)
    no_end = GPT2Config(V, n_positions=T, n_embd=24, n_layer=1, n_head=3)
    for empty in ([[]], [[1], []], np.empty((1, 0), int), [np.empty(0)]):
        assert "eos_token_id" in refused(make(config=no_end).generate, empty)


@TWO_BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_several_texts_of_each_prompt(kind: str, backend: Any) -> None:
    model, settings = make(backend, kind), {"max_new_tokens": 12, "seed": 3}
    texts = model.generate([[1, 2], [3]], num_return_sequences=3, **settings)
    repeated = [[1, 2]] * 3 + [[3]] * 3
    assert lists(texts) == lists(model.generate(repeated, **settings))
    assert len({tuple(text) for text in lists(texts)}) == 6
    same = model.generate([[1, 2]], num_return_sequences=3, **settings)
    assert isinstance(same, np.ndarray) and same.shape == (3, 14)
    assert same.tolist() == lists(texts[:3])


@TWO_BACKENDS
def test_texts_end_by_themselves(backend: Any) -> None:
    model, settings = make(backend), {"max_new_tokens": 12, "temperature": 0}
    free = lists(model.generate(PROMPTS, **settings))
    stop = free[0][len(PROMPTS[0]) + 3]
    for ends in ({"stop": stop}, {"eos_token_id": stop}, {"stop": [stop], "eos_token_id": stop}):
        texts = lists(model.generate(PROMPTS, **settings, **ends))
        for prompt, text, whole in zip(PROMPTS, texts, free, strict=True):
            new = whole[len(prompt) :]
            count = new.index(stop) + 1 if stop in new else len(new)
            assert text == whole[: len(prompt) + count], "each of a list ends where it ended"
    same = [prompt[:1] or [END] for prompt in PROMPTS]
    whole, ended = (model.generate(same, **settings, stop=s) for s in (None, stop))
    assert ended.ndim == 2 and ended.shape[1] <= whole.shape[1]
    for row, text in zip(whole.tolist(), ended.tolist(), strict=True):
        count = row.index(stop, 1) if stop in row[1:] else len(row) - 1
        expected = row[: count + 1] + [stop] * (len(text) - count - 1)
        assert text == expected[: len(text)], "of an array they repeat their last token"


@TWO_BACKENDS
def test_generate_may_add_nothing(backend: Any) -> None:
    model = make(backend)
    assert lists(model.generate(PROMPTS, 0)) == PROMPTS
    assert np.array_equal(model.generate([[1, 2]], 0), [[1, 2]])
    ids, logprobs = model.generate([[1, 2], [3, 4]], 0, logprobs=True, num_return_sequences=2)
    assert ids.shape == (4, 2) and logprobs.shape == (4, 0)
    assert list(model.stream([[1, 2]], 0)) == []


@TWO_BACKENDS
def test_stream_gives_what_generate_gives(backend: Any) -> None:
    model, settings = make(backend), {"max_new_tokens": 9, "seed": 1, "logprobs": True}
    steps = list(model.stream(PROMPTS, **settings))
    ids, logprobs = model.generate(PROMPTS, **settings)
    for row, (text, prompt) in enumerate(zip(ids, PROMPTS, strict=True)):
        assert [int(step[0][row]) for step in steps] == text[len(prompt) :].tolist()
    assert np.array_equal(np.stack([step[1] for step in steps], axis=1), logprobs)


# ---- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_logprobs_are_those_of_the_text(kind: str, backend: Any) -> None:
    """Whichever filters drew the tokens. Reading one by one or at once differs by about 1e-5."""
    model, idx = make(backend, kind), np.array([[1, 2, 3], [30, 20, 10]])
    settings = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 2}
    text, logprobs = model.generate(idx, T - 3, logprobs=True, **settings)
    assert text.shape == (2, T) and logprobs.shape == (2, T - 3) and logprobs.dtype == np.float64
    np.testing.assert_allclose(logprobs, model.logprobs(text)[:, 2:], atol=1e-5, rtol=1e-5)
    assert np.array_equal(text, model.generate(idx, T - 3, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_loss_is_the_loss(kind: str, backend: Any, rng: np.random.Generator) -> None:
    model, idx, targets = make(backend, kind), *rng.integers(0, V, (2, 3, T))
    targets[0, 5:] = targets[1, 0] = -1
    assert model.mean_loss(idx, targets) == pytest.approx(
        model.loss(idx, targets, keep=False), rel=1e-6
    )
    assert refused(model.mean_loss, idx, targets[:1]).startswith("targets")
    assert "all -1" in refused(model.mean_loss, idx, np.full_like(idx, -1))


# ---- the context is full -------------------------------------------------------------------------


def slid(model: Any, prompt: list[int], count: int) -> list[int]:
    """Continue greedily; compute each token by a whole forward pass over the kept tokens."""
    text, seen = list(prompt), list(prompt)
    for _ in range(count):
        text.append(int(model([seen])[0, -1].argmax()))
        seen = [*seen, text[-1]] if len(seen) < T else text[-(T // 2) :]
    return text


@TWO_BACKENDS
@pytest.mark.parametrize("length", [1, T])
def test_model_goes_on_after_its_context_is_full(length: int, backend: Any) -> None:
    model, prompt = make(backend), list(range(length))
    expected = slid(model, prompt, 2 * T)
    assert model.generate([prompt], 2 * T, temperature=0)[0].tolist() == expected
    together = model.generate([[5, 6], prompt, prompt], 2 * T, temperature=0, on_full="slide")
    assert together[1].tolist() == together[2].tolist() == expected


@TWO_BACKENDS
@pytest.mark.parametrize("length", [1, T])
def test_model_stops_when_its_context_is_full(length: int, backend: Any) -> None:
    model, prompt = make(backend), list(range(length))
    text = model.generate([prompt], 2 * T, temperature=0, on_full="stop")
    assert text.shape == (1, T + 1), "n_positions tokens were read, one more follows from them"
    assert text[0].tolist() == slid(model, prompt, T + 1 - length)
    longer = model.generate([prompt], T - length, temperature=0, on_full="stop")
    assert longer.tolist() == text[:, :T].tolist(), "it is not full yet"


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a model that fails if it begins to compute."""
    model = make()

    def decoder(*arguments: Any) -> None:
        raise AssertionError("it has begun to work")

    monkeypatch.setattr(model, "decoder", decoder)
    return model


GOOD = [[1, 2], [3]]


@pytest.mark.parametrize(
    ("idx", "settings", "message"),
    [
        ([], {}, "idx must hold at least one prompt, got none"),
        ((), {}, "idx must hold at least one prompt, got none"),
        (
            [[0] * (T + 1)],
            {},
            f"the prompt is {T + 1} tokens; this model's context is {T} (n_positions): give a",
        ),
        (
            [[1], [0] * (T + 9)],
            {},
            f"the prompt is {T + 9} tokens; this model's context is {T} (n_positions): give a",
        ),
        (
            np.zeros((2, T + 1), int),
            {},
            f"the prompt is {T + 1} tokens; this model's context is {T} (n_positions): give a",
        ),
        ([[1], [V]], {}, f"idx: token id {V} is not in [0, {V})"),
        ([[1], [2, -1]], {}, f"idx: token id -1 is not in [0, {V})"),
        ([[1], [0.5]], {}, "idx must be whole numbers, got dtype float64"),
        ("ab", {}, "idx must be whole numbers, got 'ab'"),
        (["ab"], {}, "idx must be whole numbers, got ['ab']"),
        (None, {}, "idx must be whole numbers, got None"),
        ({}, {}, "idx must be whole numbers, got {}"),
        (5, {}, "idx must be (B, T) token ids, got shape ()"),
        ([[1], ["a"]], {}, "idx must be whole numbers"),
        ([[1], [[2]]], {}, "idx must be (B, T) token ids, got a row of shape (1, 1)"),
        ([[1], [[2], [3, 4]]], {}, "idx must be an array of whole numbers"),
        ([1, 2], {}, "idx must be (B, T) token ids, got shape (2,): for one text pass ids[None]"),
        ([np.array(1)], {}, "idx must be (B, T) token ids, got shape (1,)"),
        (GOOD, {"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        (GOOD, {"min_new_tokens": 65}, "min_new_tokens must be at most max_new_tokens, 64, got 65"),
        (GOOD, {"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        (GOOD, {"temperature": np.nan}, "temperature must be finite and at least 0, got nan"),
        (GOOD, {"temperature": "0.7"}, "temperature must be a number, got '0.7'"),
        (GOOD, {"top_k": -1}, "top_k must be at least 0, got -1"),
        (GOOD, {"top_p": 1.01}, "top_p must be from 0 to 1, got 1.01"),
        (GOOD, {"min_p": 2}, "min_p must be from 0 to 1, got 2"),
        (GOOD, {"stop": V}, f"stop: {V} is not a token id in [0, {V})"),
        (GOOD, {"stop": [1, -1]}, f"stop: -1 is not a token id in [0, {V})"),
        (GOOD, {"eos_token_id": V}, f"eos_token_id: {V} is not a token id in [0, {V})"),
        (GOOD, {"stop": np.array(3)}, "stop: array(3) is not a token id in"),
        (GOOD, {"eos_token_id": np.array(3)}, "eos_token_id: array(3) is not a token id in"),
        (GOOD, {"eos_token_id": b"x"}, "eos_token_id: b'x' is not a token id in"),
        (GOOD, {"eos_token_id": "x"}, "eos_token_id: 'x' is not a token id in"),
        (GOOD, {"stop": "."}, "stop must be token ids, got '.': gpt2c.Generator takes strings"),
        (GOOD, {"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        (GOOD, {"on_full": "forget"}, "on_full must be one of slide, stop, got 'forget'"),
    ],
)
def test_model_refuses_mistakes_before_any_work(
    idx: Any, settings: dict[str, Any], message: str, idle: Any
) -> None:
    for call in (idle.generate, idle.stream):  # `stream` raises at the call, not at its first token
        assert refused(call, idx, **settings).startswith(message)


def test_unknown_settings_are_refused(idle: Any) -> None:
    for call in (idle.generate, idle.stream):
        with pytest.raises(TypeError, match="beams"):
            call(GOOD, 5, beams=3)
        with pytest.raises(TypeError, match=r"'max_length'; did you mean max_new_tokens\?"):
            call(GOOD, max_length=5)
        with pytest.raises(TypeError):  # only max_new_tokens goes without its name
            call(GOOD, 5, 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_do_not_fit_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the memory of their caches: prompt and new tokens, at most n_positions, of all texts."""
    model = make(kind=kind)
    monkeypatch.setattr("gpt2c.kernels.memory.UNASKED", 0)
    per_token, logits = 2 * CONFIG.n_layer * CONFIG.n_embd, V
    for count, capacity in [(3, 5), (1000, T)]:
        needed = 4 * 4 * (per_token * capacity + logits)  # of two prompts, twice
        monkeypatch.setattr("gpt2c.kernels.memory.available_bytes", lambda needed=needed: needed)
        model.generate(GOOD, count, num_return_sequences=2, stop=list(range(V)))
        monkeypatch.setattr(
            "gpt2c.kernels.memory.available_bytes", lambda needed=needed: needed - 1
        )
        for call in (model.generate, model.stream):
            with pytest.raises(MemoryError, match=f"^reading 4 texts of {capacity} tokens needs"):
                call(GOOD, count, num_return_sequences=2)


def test_far_too_many_texts_are_refused_at_once() -> None:
    start = time.perf_counter()
    for call in (make().generate, make().stream):
        with pytest.raises(MemoryError, match="reading 1,000,000,000 texts"):
            call([[1]], num_return_sequences=10**9)
    assert time.perf_counter() - start < 1


def test_text_that_is_full_ends_alone_and_among_others() -> None:
    model, settings = GPT2(CONFIG, backend="base"), {"temperature": 0, "on_full": "stop"}
    prompts = [[1] * (model.config.n_positions - 2), [2, 3]]
    together = model.generate(prompts, 9, **settings)
    for row, prompt in zip(together, prompts, strict=True):
        assert np.array_equal(row, model.generate([prompt], 9, **settings)[0])
    assert len(together[0]) == model.config.n_positions + 1
