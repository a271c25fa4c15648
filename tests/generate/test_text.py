"""The decoding loop: what it reads, seeds, ends of texts, and full contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from gpt2c.generate.continuation import Text, read_prompt, step, stream
from gpt2c.generate.sampling import GenerationConfig

V = 11
Logits = Callable[[list[int]], np.ndarray]


def successor(seen: list[int]) -> np.ndarray:
    """Return logits that make (last token + 1) mod V certain."""
    logits = np.zeros(V)
    logits[(seen[-1] + 1) % V] = 1e4
    return logits


def random_logits(seen: list[int]) -> np.ndarray:
    """Return logits that depend on every token so far and on its place."""
    key = sum(place * (token + 1) for place, token in enumerate(seen, start=1))
    return np.random.default_rng(key).normal(size=V) * 2


class FakeReader:
    """A decoder that checks and records its calls; a function gives its logits."""

    def __init__(self, logits: Logits = successor, slots: int = 4, capacity: int = 200) -> None:
        self.capacity = capacity
        self.seen: list[list[int]] = [[] for _ in range(slots)]
        self.calls: list[tuple[Any, ...]] = []
        self._logits = logits
        self._out = np.empty((slots, V))

    def read(self, tokens: np.ndarray, slot: int, position: int) -> np.ndarray:
        assert tokens.dtype == np.int32 and tokens.ndim == 1 and len(tokens) > 0
        assert position <= len(self.seen[slot]), "a gap before what is read"
        assert position + len(tokens) <= self.capacity
        self.calls.append(("read", slot, position, len(tokens)))
        self.seen[slot][position:] = tokens.tolist()
        return self._logits(self.seen[slot])

    def step(self, tokens: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        assert tokens.dtype == slots.dtype == positions.dtype == np.int32
        assert tokens.shape == slots.shape == positions.shape == (len(set(slots.tolist())),)
        self.calls.append(("step", *slots.tolist()))
        self._out[...] = np.nan  # the result of the last call is no longer valid
        for row, (token, slot, position) in enumerate(zip(tokens, slots, positions, strict=True)):
            assert position == len(self.seen[slot]) < self.capacity
            self.seen[slot].append(int(token))
            self._out[row] = self._logits(self.seen[slot])
        return self._out[: len(tokens)]

    def copy(self, source: int, target: int, length: int) -> None:
        self.calls.append(("copy", source, target, length))
        self.seen[target][:] = self.seen[source][:length]


def tokens_of(
    prompts: Sequence[Sequence[int]],
    count: int,
    reader: FakeReader | None = None,
    logits: Logits = successor,
    ends: Sequence[int] = (),
    **settings: Any,
) -> np.ndarray:
    """Return all steps of a stream, (B, steps)."""
    config = GenerationConfig(max_new_tokens=count, **settings)
    reader = reader or FakeReader(logits)
    return np.stack(list(stream(reader, prompts, config, ends)), axis=1)


# ---- each token is read once ---------------------------------------------------------------------


def test_each_token_is_fed_back() -> None:
    prompts = [[5, 0], [5, 8]]
    out = tokens_of(prompts, 5)
    np.testing.assert_array_equal(out, [[1, 2, 3, 4, 5], [9, 10, 0, 1, 2]])
    assert out.dtype == np.int64
    assert prompts == [[5, 0], [5, 8]]


def test_every_token_is_read_once() -> None:
    reader = FakeReader()
    tokens_of([[1, 2, 3], [7]], 4, reader)
    assert reader.seen[:2] == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]], "the last is never read"
    reads, steps = [("read", 0, 0, 3), ("read", 1, 0, 1)], [("step", 0, 1)] * 3
    assert reader.calls == reads + steps


def test_first_token_needs_only_the_prompts() -> None:
    reader = FakeReader()
    steps = stream(reader, [[1, 2]], GenerationConfig(max_new_tokens=9), ())
    assert not reader.calls
    assert next(steps) == [3] and reader.calls == [("read", 0, 0, 2)]


def test_finished_text_is_not_read() -> None:
    reader = FakeReader()
    tokens_of([[0], [4], [1]], 6, reader, ends=[3])
    steps = [call[1:] for call in reader.calls if call[0] == "step"]
    assert steps == [(0, 1, 2), (0, 1), (1,), (1,), (1,)]


def test_no_new_tokens_may_be_asked_for() -> None:
    reader = FakeReader()
    assert list(stream(reader, [[0]], GenerationConfig(max_new_tokens=0), ())) == []
    assert not reader.calls


# ---- seeds ---------------------------------------------------------------------------------------


def test_seeds_reproduce() -> None:
    prompts = [[0], [0]]
    first = tokens_of(prompts, 30, logits=random_logits, seed=1)
    assert np.array_equal(first, tokens_of(prompts, 30, logits=random_logits, seed=1))
    assert (first != tokens_of(prompts, 30, logits=random_logits, seed=2)).any()
    assert (first != tokens_of(prompts, 30, logits=random_logits)).any()
    assert (first[0] != first[1]).any(), "equal prompts have random numbers of their own"


def test_text_does_not_see_the_others() -> None:
    settings: dict[str, Any] = {"logits": random_logits, "seed": 5, "top_k": 7, "top_p": 0.9}
    together = tokens_of([[1, 2], [3], [4, 5, 6]], 20, **settings)
    assert np.array_equal(together[0], tokens_of([[1, 2]], 20, **settings)[0])
    other = tokens_of([[9, 9, 9, 9], [3], [0]], 20, **settings)
    assert np.array_equal(together[1], other[1]) and (together[0] != other[0]).any()
    ended = tokens_of([[1, 2], [3], [4, 5, 6]], 20, ends=[int(together[0, 0])], **settings)
    assert (ended[0] == together[0, 0]).all(), "it has ended and draws no more"
    count = next((k for k, t in enumerate(together[1]) if t == together[0, 0]), 20)
    assert np.array_equal(together[1, :count], ended[1, :count])


# ---- ends ----------------------------------------------------------------------------------------


def test_token_that_ends_is_yielded_and_ends_the_loop() -> None:
    np.testing.assert_array_equal(tokens_of([[0]], 100, ends={3, 7}), [[1, 2, 3]])


def test_text_that_is_over_repeats_its_last_token() -> None:
    out = tokens_of([[0], [4]], 100, ends={2, 9})
    np.testing.assert_array_equal(out, [[1, 2, 2, 2, 2], [5, 6, 7, 8, 9]])


def test_end_in_the_prompt_ends_nothing() -> None:
    np.testing.assert_array_equal(tokens_of([[2, 3]], 2, ends={3, 2}), [[4, 5]])


@pytest.mark.parametrize(("least", "count"), [(0, 1), (1, 8), (7, 8), (8, 12), (12, 12)])
def test_no_end_before_min_new_tokens(least: int, count: int) -> None:
    """The first and eighth token would be the end; the next likeliest replaces each."""

    def logits(seen: list[int]) -> np.ndarray:
        scores = np.zeros(V)
        scores[[1, 2]] = 1, (2 if len(seen) % 7 == 1 else 0)
        return scores

    out = tokens_of([[0]], 12, logits=logits, ends={2}, min_new_tokens=least, temperature=0)
    assert out.tolist() == [[1] * (count - 1) + [2 if count < 12 else 1]]


def test_should_end_sees_the_tokens_of_its_row_and_may_end_it() -> None:
    told: list[list[int]] = [[], [], []]

    def until(row: int, last: int) -> Callable[[int], bool]:
        return lambda token: told[row].append(token) or token == last

    should_end = [until(0, 3), until(1, V), until(2, 6)]
    config = GenerationConfig(max_new_tokens=5)
    out = np.stack(list(stream(FakeReader(), [[0], [1], [4]], config, {5}, should_end)), axis=1)
    assert told == [[1, 2, 3], [2, 3, 4, 5], [5]]
    np.testing.assert_array_equal(out, [[1, 2, 3, 3], [2, 3, 4, 5], [5, 5, 5, 5]])


def test_look_sees_the_logits_of_each_choice() -> None:
    seen: list[tuple[int, int]] = []
    config = GenerationConfig(max_new_tokens=3)
    steps = stream(
        FakeReader(), [[0]], config, (), look=lambda *pair: seen.append((pair[0], pair[1].argmax()))
    )
    assert [step.tolist() for step in steps] == [[1], [2], [3]]
    assert seen == [(1, 1), (2, 2), (3, 3)]


# ---- several texts of a prompt -------------------------------------------------------------------


def test_prompt_is_read_once_for_all_its_texts() -> None:
    reader = FakeReader(random_logits, slots=6)
    out = tokens_of([[1, 2, 3], [4]], 10, reader, num_return_sequences=3, seed=0)
    assert out.shape == (6, 10)
    copies = [("copy", 0, 1, 3), ("copy", 0, 2, 3), ("copy", 3, 4, 1), ("copy", 3, 5, 1)]
    assert reader.calls[:6] == [("read", 0, 0, 3), *copies[:2], ("read", 3, 0, 1), *copies[2:]]
    assert len({tuple(row) for row in out}) == 6
    one_by_one = tokens_of(
        [[1, 2, 3]] * 3 + [[4]] * 3, 10, FakeReader(random_logits, slots=6), seed=0
    )
    assert np.array_equal(out, one_by_one)


# ---- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    config = GenerationConfig(
        max_new_tokens=12, logprobs=True, seed=3, temperature=0.7, top_k=4, repetition_penalty=1.5
    )
    ends = {2, 5}
    steps = list(stream(FakeReader(random_logits), [[1, 2], [9]], config, ends))
    ids, logprobs = (np.stack([pair[part] for pair in steps], axis=1) for part in (0, 1))  # type: ignore[index]
    assert ids.dtype == np.int64 and logprobs.dtype == np.float64
    ended = False
    for row, prompt in enumerate([[1, 2], [9]]):
        text, over = list(prompt), False
        for token, logprob in zip(ids[row].tolist(), logprobs[row], strict=True):
            if over:
                assert logprob == 0 and token == text[-1]
                continue
            logits = random_logits(text)
            expected = logits[token] - np.log(np.exp(logits).sum())
            assert logprob == pytest.approx(expected, rel=1e-12)
            text.append(token)
            over = token in ends
        ended = ended or over
    assert ended, "the test is to see a text that is over"


# ---- a full context ------------------------------------------------------------------------------


def slid(prompt: list[int], count: int, capacity: int) -> list[int]:
    """Continue greedily; forget the first half of a full context before the next token."""
    text, seen = list(prompt), list(prompt)
    for _ in range(count):
        text.append(int(random_logits(seen).argmax()))
        seen = [*seen, text[-1]] if len(seen) < capacity else text[-max(1, capacity // 2) :]
    return text[len(prompt) :]


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 8])
def test_full_context_forgets_its_first_half(capacity: int) -> None:
    prompts = [[3] * length for length in range(1, capacity + 1)]
    reader = FakeReader(random_logits, slots=capacity, capacity=capacity)
    out = tokens_of(prompts, 30, reader, temperature=0)
    for row, prompt in zip(out, prompts, strict=True):
        assert row.tolist() == slid(prompt, 30, capacity)
    again = [call[3] for call in reader.calls[len(prompts) :] if call[0] == "read"]
    assert set(again) == {max(1, capacity // 2)}
    if capacity > 2:
        assert len(again) <= capacity * -(-30 // (capacity - capacity // 2)), "not with each token"


@pytest.mark.parametrize("capacity", [1, 2, 7])
def test_full_context_ends_the_text_with_the_setting(capacity: int) -> None:
    for length in range(1, capacity + 1):
        reader = FakeReader(random_logits, capacity=capacity)
        out = tokens_of([[3] * length], 30, reader, temperature=0, on_full="stop")
        count = capacity - length + 1  # what follows the last token that fits is still given
        assert out[0].tolist() == slid([3] * length, 30, capacity)[:count]


def test_texts_of_several_lengths_fill_their_contexts_in_turn() -> None:
    reader = FakeReader(capacity=6)
    out = tokens_of([[0, 1, 2, 3], [0], [0, 1]], 9, reader, on_full="stop")
    lengths = [3, 6, 5]
    for row, start, length in zip(out, [4, 1, 2], lengths, strict=True):
        expected = (start + np.arange(length)) % V
        assert np.array_equal(row[:length], expected) and (row[length:] == expected[-1]).all()
    assert out.shape == (3, 6)


# ---- one text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "should_end", "on_full", "why", "count"),
    [
        ((), None, "slide", "length", 4),
        ((), None, "stop", "length", 3),
        ((2,), None, "slide", "end", 2),
        ((), lambda token: token == 1, "slide", "end", 1),
        ((4,), None, "slide", "end", 4),  # both at once
    ],
)
def test_text_records_why_it_ended(
    ends: tuple[int, ...], should_end: Any, on_full: str, why: str, count: int
) -> None:
    config = GenerationConfig(max_new_tokens=4, on_full=on_full)
    reader = FakeReader(capacity=3)
    text = Text([0], config, ends, slot=0, should_end=should_end)
    read_prompt(reader, [text])
    while text.ended is None:
        step(reader, [text])
    assert (text.ended, text.count) == (why, count)
    assert text.tokens == list(range(count + 1))
