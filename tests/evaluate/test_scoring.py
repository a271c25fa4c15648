"""Scoring: log-probabilities, windows and choices, compared with sums by hand from the logits."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.likely import (
    CONFIG,
    GOOD,
    by_hand,
    distribution,
    random_model,
    slide,
    uniform,
    write_lines,
)

from gpt2c import GPT2Config, Tokenizer
from gpt2c.evaluate.loss import evaluate
from gpt2c.evaluate.scoring import (
    METRICS,
    Question,
    Scorer,
    accuracy,
    answer,
    encode_pair,
    ending_logprobs,
    perplexity,
    read_questions,
    token_logprobs,
)
from gpt2c.model.reader import Decoder

BYTES = Tokenizer.from_name("bytes")
# In float32 sums round by 6e-8 of their terms; int8 rounds activations, by one step in 254 where
# backends differ in the last bit of a tie.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-5, "int8": 2e-2}


@pytest.fixture
def text(rng: np.random.Generator) -> np.ndarray:
    """Return more tokens than a context holds."""
    return rng.integers(0, CONFIG.vocab_size, 45).astype(np.int32)


# ---- model.logprobs, Scorer ----------------------------------------------------------------------


@TWO_BACKENDS
@pytest.mark.parametrize("kind", TOLERANCE)
def test_logprobs_are_those_of_the_logits(backend_name: str, kind: str, rng) -> None:
    model, reference = (random_model(backend=name, kind=kind) for name in (backend_name, "numpy"))
    for B, T in ((1, 2), (3, 16)):
        idx = rng.integers(0, CONFIG.vocab_size, (B, T))
        logprobs = model.logprobs(idx)
        assert (logprobs.shape, logprobs.dtype) == ((B, T - 1), np.float32)
        expected = np.stack([by_hand(reference, row) for row in idx])
        np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=TOLERANCE[kind])
        loss = model.loss(idx[:, :-1], idx[:, 1:])
        assert -logprobs.mean(dtype=np.float64) == pytest.approx(loss, rel=1e-5)


def test_logprobs_of_a_model_without_weights() -> None:
    np.testing.assert_allclose(
        uniform().logprobs([[1, 2, 3]]), [[-math.log(61)] * 2], rtol=1e-6, atol=0
    )


def test_logprobs_refuses_bad_ids() -> None:
    model = uniform()
    for kind in (model, model.quantize("int8")):
        assert "at least 2 tokens" in refused(kind.logprobs, [[1]])
        assert "got shape (2,)" in refused(kind.logprobs, [1, 2])
        assert "token id 61 is not in [0, 61)" in refused(kind.logprobs, [[1, 61]])
        assert "context is 16 (n_positions)" in refused(kind.logprobs, np.zeros((1, 17), int))


@TWO_BACKENDS
@pytest.mark.parametrize("kind", TOLERANCE)
def test_scorer_gives_the_end_of_a_text(backend_name: str, kind: str, text) -> None:
    model = random_model(backend=backend_name, kind=kind)
    row = text[:17]  # one token more than the decoder reads
    likely = distribution(model, row[:-1])
    expected = likely[np.arange(16), row[1:]]
    row[9] = likely[8].argmax()
    likely = distribution(model, row[:-1])
    expected = likely[np.arange(16), row[1:]]
    for first in (1, 2, 9, 16):
        logprobs, likeliest = Scorer(model)(row, first)
        np.testing.assert_allclose(logprobs, expected[first - 1 :], rtol=1e-5, atol=1e-5)
        assert likeliest.tolist() == (likely.argmax(axis=1) == row[1:])[first - 1 :].tolist()
    assert likeliest.shape == (1,)
    assert Scorer(model)(row, 9)[1][0]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record each read of a decoder: its position, and its number of tokens."""
    noted: list[tuple[int, int]] = []
    real = Decoder.hidden

    def hidden(
        self: Decoder, tokens: Any, slot: int, position: int, states: Any = None
    ) -> Iterator[Any]:
        if len(tokens):
            noted.append((position, len(tokens)))
        return real(self, tokens, slot, position, states)

    monkeypatch.setattr(Decoder, "hidden", hidden)
    return noted


def test_shared_prefix_is_read_once(backend_name: str, text, reads) -> None:
    model = random_model(backend=backend_name)
    context, scorer = text[:10], Scorer(model)
    rows = [np.append(context, ending) for ending in (text[10:13], text[11:17], text[20:21])]
    rows += [text[20:30], rows[0], rows[0]]
    kept = [scorer(row.astype(np.int32), 10 if i != 3 else 4) for i, row in enumerate(rows)]
    # the last token of a context is read with its ending, the last of an ending never
    assert reads[:4] == [(0, 9), (9, 3), (9, 6), (9, 1)]
    assert reads[4:6] == [(0, 3), (3, 6)], "another text begins anew"
    assert reads[6:] == [(0, 9), (9, 3), (9, 3)], "what is to be scored is read in any case"
    for (logprobs, likeliest), row in zip(kept, rows, strict=True):
        fresh = Scorer(model)(row.astype(np.int32), len(row) - len(logprobs))
        np.testing.assert_allclose(logprobs, fresh[0], rtol=0, atol=1e-5)
        if backend_name != "numpy":
            assert (logprobs == fresh[0]).all(), "not to the bit"
        assert (likeliest == fresh[1]).all()


def test_interrupted_scorer_still_scores_right(text, monkeypatch) -> None:
    model = random_model()
    scorer, real = Scorer(model), Decoder.hidden
    first, second = text[:12], np.append(text[:6], text[30:36])
    expected = Scorer(model)(first, 8)[0]
    scorer(first, 8)

    def hidden(self: Decoder, tokens: Any, slot: int, position: int) -> Iterator[Any]:
        yield from real(self, tokens, slot, position)
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "hidden", hidden)
    with pytest.raises(KeyboardInterrupt):
        scorer(second, 8)
    monkeypatch.setattr(Decoder, "hidden", real)
    assert (scorer(first, 8)[0] == expected).all()


def test_diverged_weights_are_refused(text) -> None:
    model = random_model()
    model.parameters["ln_f.bias"][3] = np.nan
    assert "weights have diverged or are damaged" in refused(token_logprobs, model, text)
    assert "diverged" in refused(answer, model, [Question((1,), ((2,), (3,)), 0, (1, 1))])
    model.parameters["ln_f.bias"][3] = np.inf
    assert "nan or infinity" in refused(perplexity, model, text)


# ---- long texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(
    ("count", "stride", "max_length"),
    [
        *((45, 1, 16), (45, 5, 16), (45, 8, 16), (45, 15, 16), (45, 16, 16), (33, 16, 16)),
        *((45, 3, 7), (45, 1, 2), (45, 2, 2), (9, 4, 16), (16, 4, 16), (17, 4, 16), (2, 1, 16)),
    ],
)
def test_windows_slide_as_in_the_guide(
    text, kind: str, count: int, stride: int, max_length: int
) -> None:
    model, tokens = random_model(kind=kind), text[:count]
    # where the guide's windows touch, its first tokens have no context and are not scored
    expected = slide(model, tokens, stride, max(max_length, stride + 1))
    logprobs = token_logprobs(model, tokens, stride, max_length)
    assert (logprobs.shape, logprobs.dtype) == ((count,), np.float64)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert np.flatnonzero(np.isnan(logprobs)).tolist() == [0]
    loss = -np.nanmean(expected)
    assert perplexity(model, tokens, stride, max_length) == pytest.approx(
        (loss, np.exp(loss)), rel=1e-5
    )


def test_every_backend_slides(backend_name: str, text) -> None:
    expected = slide(random_model(backend="numpy"), text, 8, 16)
    logprobs = token_logprobs(random_model(backend=backend_name), text, 8)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_stride_1_gives_each_token_all_the_context_that_fits(text) -> None:
    model = random_model()
    logprobs = token_logprobs(model, text, stride=1)
    for i in range(1, len(text)):
        likely = distribution(model, text[max(0, i - 15) : i])[-1]
        assert logprobs[i] == pytest.approx(likely[text[i]], abs=1e-5)


def test_context_is_not_given_logits(text, reads) -> None:
    token_logprobs(random_model(), text[:28], stride=4)
    assert reads == [(0, 15), (0, 11), (11, 4), (0, 11), (11, 4), (0, 11), (11, 4)]


def test_perplexity_of_a_zero_model_is_the_vocabulary_size(text) -> None:
    for stride in (None, 1, 16):
        assert perplexity(uniform(), text, stride) == pytest.approx((math.log(61), 61), rel=1e-6)


def test_defaults_and_kinds_of_tokens(text) -> None:
    model = random_model()
    expected = token_logprobs(model, text, 8, 16)
    for tokens in (text.tolist(), text.astype(np.uint16), text.astype(np.int64)):
        np.testing.assert_array_equal(token_logprobs(model, tokens), expected)
    assert np.isfinite(token_logprobs(model, text, max_length=3)[1:]).all(), "half of 3 is 1"
    assert np.isfinite(token_logprobs(model, text, max_length=2)[1:]).all()


def test_perplexity_may_be_infinite(text) -> None:
    model = random_model()
    model.parameters["ln_f.weight"][...] *= 1e5
    loss, infinite = perplexity(model, text, 8)
    assert loss == pytest.approx(-token_logprobs(model, text, 8)[1:].mean())
    assert loss > 1000 and infinite == math.inf


def test_windows_side_by_side_are_those_of_evaluate(text) -> None:
    model = random_model()
    for count in (2, 16, 17, 18, 33, 34, 45):
        expected = evaluate(model, [text[:count].astype(np.uint16)], 2, 16)
        for max_length in (None, 17):  # the 17th is not read
            loss, _ = perplexity(model, text[:count], 16, max_length)
            assert loss == pytest.approx(expected, rel=1e-5)


def test_watch_is_called_for_every_window(text) -> None:
    told: list[tuple[int, int, str]] = []
    model = random_model()
    loss, _ = perplexity(model, text, 8)
    token_logprobs(model, text, 8, watch=lambda *figures: told.append(figures))
    assert [(done, total) for done, total, _ in told] == [(n, 5) for n in range(1, 6)]
    assert told[-1][2] == f"loss {loss:.4f}"
    first = -by_hand(model, text[:16]).mean()
    assert float(told[0][2].removeprefix("loss ")) == pytest.approx(first, abs=1e-4)


def test_windows_refuse_bad_strides_and_lengths(text) -> None:
    model = uniform()
    for wrong, message in (
        ({"stride": 0}, "stride must be from 1 to the window's 16 tokens, got 0"),
        ({"stride": 17}, "to the window's 16 tokens, got 17"),
        ({"stride": 5, "max_length": 4}, "to the window's 4 tokens, got 5"),
        ({"stride": 2.0}, "stride must be a whole number"),
        ({"max_length": "16"}, "max_length must be a whole number"),
        ({"stride": 17, "max_length": 17}, "to the window's 16 tokens, got 17"),
        ({"max_length": 1}, "max_length must be from 2 to n_positions + 1 = 17, got 1"),
        ({"max_length": 18}, "n_positions + 1 = 17, got 18"),
    ):
        assert message in refused(token_logprobs, model, text, **wrong)
        assert message in refused(perplexity, model, text, **wrong)
    for call in (token_logprobs, perplexity):
        assert "1 token cannot be scored: at least 2" in refused(call, model, text[:1])
        for nothing in ([], text[:0]):
            assert "0 tokens cannot be scored: at least 2" in refused(call, model, nothing)
    assert "got shape (1, 45)" in refused(token_logprobs, model, text[None])
    assert "token id 61 is not in [0, 61)" in refused(token_logprobs, model, [1, 61])
    assert "whole numbers, got dtype float64" in refused(token_logprobs, model, [1.0, 2.0])


# ---- questions -----------------------------------------------------------------------------------


def test_read_questions(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "x.jsonl",
        json.dumps(GOOD) + "\r",
        "",
        GOOD | {"ctx": "a cat  ", "label": "2", "ind": 24, "split": "val"},
        {"ctx": "", "endings": ["x", "\ny"], "label": 1},
        json.dumps({"ctx": "\u2028", "endings": ["\u00e9", "y"], "label": 0}, ensure_ascii=False),
        "  ",
    )
    first, second, third, fourth = read_questions(path, BYTES, 64)

    def decoded(question: Question) -> tuple[str, list[str]]:
        return BYTES.decode(question.context), [BYTES.decode(end) for end in question.endings]

    assert decoded(first) == ("a cat", [" sat", " ran away", " barked"])
    assert decoded(second) == ("a cat", ["  sat", "   ran away", "  barked"])
    assert (third.context, third.endings) == ((256,), ((ord("x"),), (10, ord("y"))))
    assert fourth.context == (256,), "U+2028 is a space, and ends no line"
    assert [q.label for q in (first, second, third, fourth)] == [0, 2, 1, 0]
    assert first.characters == second.characters == (3, 9, 6), "without the space put in front"
    assert (third.characters, fourth.characters) == ((1, 2), (1, 1))
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\xef\xbb\xbf" + content)
    assert read_questions(path, BYTES, 64) == [first, second, third, fourth] * 2


WRONG: list[tuple[Any, str]] = [
    ("{'ctx': 1}", "the question is not valid JSON: Expecting property name"),
    ("[" * 100_000, "the question is not valid JSON: "),
    ('{"ctx": "a", "endings": ["b", "c"], "label": 0, "label": 1}', "'label' is there twice"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": 0, "ind": NaN}', "NaN is not a number in JSON"),
    ("[1]", "the question must hold a JSON object, got list"),
    ({"endings": ["a", "b"], "label": 0}, "the field ctx is missing"),
    ({"ctx": "a", "label": 0}, "the field endings is missing"),
    ({"ctx": "a", "endings": ["a", "b"]}, "the field label is missing"),
    (GOOD | {"ctx": None}, "ctx must be a string, got NoneType"),
    (GOOD | {"endings": []}, "endings must be a list of at least 2 strings, got 0"),
    (GOOD | {"endings": ["a"]}, "endings must be a list of at least 2 strings, got 1"),
    (GOOD | {"endings": "ab"}, "endings must be a list of at least 2 strings, got str"),
    (GOOD | {"endings": ["a", ""]}, "ending 1 must be a string that is not blank, got ''"),
    (GOOD | {"endings": [" \n", "b"]}, r"ending 0 must be .* not blank, got ' \\n'"),
    (GOOD | {"endings": ["a", 3]}, "ending 1 must be a string that is not blank, got 3"),
    (GOOD | {"label": 3}, "label must be a whole number from 0 to 2, got 3"),
    (GOOD | {"label": -1}, "label must be a whole number from 0 to 2, got -1"),
    (GOOD | {"label": "3"}, "label must be a whole number from 0 to 2, got 3"),
    (GOOD | {"label": ""}, "label must be a whole number from 0 to 2, got ''"),
    (GOOD | {"label": "-1"}, "label must be .* got '-1'"),
    (GOOD | {"label": "\u0661"}, "label must be .* got '\u0661'"),
    (GOOD | {"label": 1.0}, r"label must be .* got 1\.0"),
    (GOOD | {"label": True}, "label must be .* got True"),
    (GOOD | {"label": None}, "label must be .* got None"),
    (
        GOOD | {"ctx": "a" * 57},
        r"ctx and ending 1 have 66 tokens, at most one more than the context = 65",
    ),
]


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", GOOD, "", row, GOOD)
    got = refused(read_questions, path, BYTES, 64)
    assert got.startswith(f"{path}, line 3: ")
    assert re.search(message, got), got


def test_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl does not exist"):
        read_questions(tmp_path / "x.jsonl", BYTES, 64)
    path = write_lines(tmp_path / "x.jsonl", " ", "")
    assert (
        refused(read_questions, path, BYTES, 64) == f"{path} holds no questions, only blank lines"
    )
    path.write_bytes(b"\xef\xbb\xbf\r\n")
    assert "holds no questions" in refused(read_questions, path, BYTES, 64)
    path.write_bytes(b"")
    assert "is empty" in refused(read_questions, path, BYTES, 64)
    path.write_bytes(b"\xff")
    assert "is not UTF-8" in refused(read_questions, path, BYTES, 64)


def test_longest_question_that_fits(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", GOOD | {"ctx": "a" * 56})
    (question,) = read_questions(path, BYTES, 64)
    assert max(len(question.context) + len(ending) for ending in question.endings) == 65
    config = GPT2Config(257, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    assert np.isfinite(ending_logprobs(Scorer(uniform(config)), question)).all()


def test_context_and_answer_are_encoded_as_one_text() -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat, the cat ran"] * 9, 280)
    for context, ending in (
        ("the cat", " sat"),
        ("the cat  ", "sat"),
        ("the cat\n", " ran"),
        ("", "the"),
    ):
        before, after = encode_pair(tokenizer, context, ending)
        if context:
            assert before == tokenizer.encode(context.rstrip())
            assert before + after == tokenizer.encode(context + ending)
        else:
            assert (before, after) == ([tokenizer.eot], tokenizer.encode("the"))
    assert len(tokenizer.encode("the cat")) == 2, "the text has taught it nothing"
    for context, ending in (("the c", "at"), ("the ca", "t sat"), ("t", "he")):
        before, after = encode_pair(tokenizer, context, ending)  # no token ends at their border
        assert (before, after) == (tokenizer.encode(context), tokenizer.encode(ending))
    cat, sat = encode_pair(tokenizer, "the cat ", "sat")
    assert (tokenizer.decode(cat), tokenizer.decode(sat)) == ("the cat", " sat")
    tokenizer.add_bos_token = True
    assert encode_pair(tokenizer, "the cat ", "sat") == ([tokenizer.eot, *cat], sat)
    assert encode_pair(tokenizer, "the ca", "t sat")[0] == [
        tokenizer.eot,
        *tokenizer.encode("the ca"),
    ]
    assert encode_pair(tokenizer, "", "the")[0] == [tokenizer.eot]


@TWO_BACKENDS
@pytest.mark.parametrize("kind", TOLERANCE)
def test_answers_are_those_of_whole_texts(backend_name: str, kind: str, text, reads) -> None:
    model = random_model(backend=backend_name, kind=kind)
    rng = np.random.default_rng(3)
    questions, expected = [], []
    for number in range(12):
        n = int(rng.integers(1, 9))
        context = tuple(rng.integers(0, 61, n).tolist())
        endings = tuple(tuple(rng.integers(0, 61, rng.integers(1, 8)).tolist()) for _ in range(4))
        characters = tuple(rng.integers(1, 30, 4).tolist())
        questions.append(Question(context, endings, number % 4, characters))
        sums = [by_hand(model, np.array(context + ending))[n - 1 :].sum() for ending in endings]
        np.testing.assert_allclose(
            ending_logprobs(Scorer(model), questions[-1]), sums, rtol=1e-5, atol=1e-5
        )
        by_character = np.array(sums) / characters
        by_token = [total / len(ending) for total, ending in zip(sums, endings, strict=True)]
        expected.append(
            [np.argmax(scores) == number % 4 for scores in (sums, by_character, by_token)]
        )
    assert 0 < np.sum(expected) < 36
    columns = np.array(expected).T.tolist()
    assert all(columns.count(column) == 1 for column in columns), "they cannot be told apart"
    reads.clear()
    told: list[tuple[int, int, str]] = []
    right = answer(model, questions, lambda *figures: told.append(figures))
    assert right.tolist() == expected
    # the context without its last token, and then each ending in the same place
    assert sum(count for _, count in reads) <= sum(
        len(q.context) - 1 + sum(map(len, q.endings)) for q in questions
    )
    shares = zip(METRICS, accuracy(right), strict=True)
    assert told[-1] == (12, 12, "  ".join(f"{name} {share:.4f}" for name, (share, _) in shares))


def test_choices_by_hand() -> None:
    # Each token costs log(61). The sum is best for the fewest tokens; per character the endings
    # cost 3/4, 2/2 and 3/7 of it; per token all cost the same, so the first is chosen.
    endings = ((1, 2, 3), (4, 5), (6, 7, 8))
    questions = [Question((9,), endings, label, (4, 2, 7)) for label in (0, 1, 2)]
    right = answer(uniform(), questions)
    assert right.tolist() == [[False, False, True], [True, False, False], [False, True, False]]
    third = math.sqrt(1 / 3 * 2 / 3 / 2)
    assert accuracy(right) == [pytest.approx((1 / 3, third))] * 3


def test_error_is_that_of_a_mean(rng) -> None:
    right = rng.random((20, 2)) < 0.4
    errors = right.std(axis=0, ddof=1) / math.sqrt(20)
    expected = list(zip(right.mean(axis=0), errors, strict=True))
    assert accuracy(right) == [pytest.approx(pair) for pair in expected]
    assert accuracy(np.array([[True, False]])) == [
        pytest.approx((x, math.nan), nan_ok=True) for x in (1, 0)
    ]


def test_answer_refuses_bad_arguments() -> None:
    assert "at least one question" in refused(answer, uniform(), [])
    for question in (
        Question((), ((1,),), 0, (1,)),
        Question((1,), ((2,), ()), 0, (1, 1)),
        Question((1,), (), 0, ()),
    ):
        assert "a context and endings, none of them empty" in refused(answer, uniform(), [question])
    for label in (-1, 2):
        wrong = Question((1,), ((2,), (3,)), label, (1, 1))
        assert f"label must be from 0 to 1, got {label}" in refused(answer, uniform(), [wrong])
    for characters in ((1,), (1, 0), (1, 2, 3)):
        wrong = Question((1,), ((2,), (3,)), 0, characters)
        assert "must be 2 numbers of at least 1" in refused(answer, uniform(), [wrong])
    wrong = Question((1,), ((2,), (61,)), 0, (1, 1))
    assert "a question: token id 61 is not in [0, 61)" in refused(answer, uniform(), [wrong])
    assert "at least one answer is wanted" in refused(accuracy, np.empty((0, 3), bool))
    long = Question((1,) * 10, ((2,) * 7, (3,) * 8), 0, (1, 1))
    assert "has 18 tokens with an ending, at most n_positions + 1 = 17" in refused(
        answer, uniform(), [long]
    )


def test_adapter_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gpt2c.evaluate.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="adapter for lm-evaluation-harness: pip install"):
        importlib.import_module("gpt2c.evaluate.lm_eval")
