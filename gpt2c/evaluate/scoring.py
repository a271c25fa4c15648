"""Scoring: log-probabilities of texts, perplexity of long texts, and choices between endings.

    loss, perplexity = scoring.perplexity(model, tokens, stride=512)
    right = scoring.answer(model, scoring.read_questions("val.jsonl", tokenizer, 1024))
    for name, (share, error) in zip(scoring.METRICS, scoring.accuracy(right), strict=True):
        print(name, share, error)

All use `Scorer`, which reads the common beginning of texts once. Independent of training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.evaluate.figures import figures, written
from gpt2c.files.untrusted import parse_json, read_text
from gpt2c.kernels.checks import check_kind, counted, whole
from gpt2c.kernels.memory import Array
from gpt2c.model.block import IntArray
from gpt2c.model.inputs import check_ids
from gpt2c.model.language_model import LanguageModel
from gpt2c.text.tokenizer import Tokenizer

__all__ = [
    "METRICS",
    "Progressed",
    "Question",
    "Scorer",
    "accuracy",
    "answer",
    "encode_pair",
    "ending_logprobs",
    "perplexity",
    "read_questions",
    "token_logprobs",
]

Progressed = Callable[[int, int, str], None]  # the number done, the number of all, figures to show
METRICS = ("acc", "acc_norm", "acc_per_token")  # the columns of `answer`


class Scorer:
    """Scores tokens, one text after another.

    The beginning that a text shares with the text before it is not read again, such as the context
    of several endings. The weights must not change between calls.

    Parameters
    ----------
    model : a `GPT2` or `Llama`
    capacity : the most tokens to read, one less than the longest text has; None is n_positions

    Raises
    ------
    ValueError : model is neither a GPT2 nor a Llama
    MemoryError : keys and values of `capacity` tokens do not fit

    Examples
    --------
    >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
    >>> scorer = gpt2c.scoring.Scorer(model)
    >>> logprobs, likeliest = scorer(np.array([1, 2, 3, 4], np.int32), first=2)
    >>> logprobs.shape, likeliest.shape  # of tokens 3 and 4
    ((2,), (2,))
    """

    def __init__(self, model: LanguageModel, capacity: int | None = None) -> None:
        check_kind("model", model, LanguageModel, "a GPT2 or Llama")
        self._decoder = model.decoder(1, capacity)
        self._known = np.empty(0, np.int32)  # the tokens that the decoder has read

    def __repr__(self) -> str:
        return f"Scorer({self._decoder!r})"

    def __call__(self, tokens: IntArray, first: int) -> tuple[Array, NDArray[np.bool_]]:
        """Score tokens[first:], each after all those before it.

        Nothing is checked: tokens (T,) must be in the vocabulary, T at most capacity + 1, and first
        from 1 to T - 1.

        Returns
        -------
        (logprobs, likeliest) : (T - first,) float32 in nats; (T - first,) bool, whether each token
            was the likeliest one

        Raises
        ------
        ValueError : the model's weights give nan or infinity
        """
        read, targets = tokens[:-1], tokens[first:]
        same = min(len(self._known), first - 1)
        differs = np.flatnonzero(self._known[:same] != read[:same])
        same = int(differs[0]) if len(differs) else same
        self._known = self._known[:same]  # still true if the reading below is interrupted
        for _ in self._decoder.hidden(read[same : first - 1], 0, same):
            pass  # only the context's keys and values are needed
        likeliest = np.empty(len(targets), np.bool_)
        losses = self._decoder.losses(read[first - 1 :], targets, first - 1, likeliest)
        if not np.isfinite(losses).all():
            raise ValueError(
                "the model gives nan or infinity: its weights have diverged or are damaged"
            )
        self._known = read.copy()
        return -losses, likeliest


# ---- long texts ----------------------------------------------------------------------------------


def token_logprobs(
    model: LanguageModel,
    tokens: ArrayLike,
    stride: int | None = None,
    max_length: int | None = None,
    watch: Progressed | None = None,
) -> NDArray[np.float64]:
    """Return the log-probability of each token of a long text, (N,) in nats, by a sliding window.

    A window of `max_length` tokens moves by `stride`. The first window scores all its tokens but
    the first, each later one its last `stride`, with at least max_length - stride tokens before
    them. So every token of the text is scored once, except the first: it has no context, and is
    nan.

    If stride is max_length, a window has one token more, as its first one is context. The last
    token of a window is not read, so at most n_positions are: with stride n_positions the windows
    are the adjacent ones of `gpt2c.evaluate.loss.evaluate`.

    Parameters
    ----------
    model : a `GPT2` or `Llama`
    tokens : (N,) token ids
    stride : from 1, the best and slowest, to max_length, at most n_positions; None is half of
        max_length
    max_length : tokens in a window, from 2 to n_positions + 1; None is n_positions
    watch : called after each window with the number done, the number of all, and the loss so far

    Raises
    ------
    ValueError : tokens are not whole numbers, are out of range or fewer than two; stride or
        max_length is out of range; the model's weights give nan or infinity

    Source: "Perplexity of fixed-length models", Hugging Face's guide, which averages the means of
    windows; here each token counts the same.

    Examples
    --------
    >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
    >>> logprobs = gpt2c.scoring.token_logprobs(model, [*range(100)], stride=8, max_length=16)
    >>> logprobs.shape, np.flatnonzero(np.isnan(logprobs)).tolist()
    ((100,), [0])
    """
    check_kind("model", model, LanguageModel, "a GPT2 or Llama")
    ids = check_ids(tokens, "tokens", 0, model.config.vocab_size)
    if ids.ndim != 1:
        raise ValueError(f"tokens must be (N,) token ids, got shape {ids.shape}")
    if len(ids) < 2:
        raise ValueError(
            f"{counted(len(ids), 'token')} cannot be scored: at least 2 are needed, as the first"
            " has nothing before it"
        )
    most = model.config.n_positions
    length = most if max_length is None else whole("max_length", max_length)
    if not 2 <= length <= most + 1:
        name = model.config.context_name
        raise ValueError(f"max_length must be from 2 to {name} + 1 = {most + 1}, got {length}")
    stride = max(1, length // 2) if stride is None else whole("stride", stride)
    if not 1 <= stride <= min(length, most):
        raise ValueError(
            f"stride must be from 1 to the window's {min(length, most)} tokens, got {stride}"
        )
    length = max(length, stride + 1)
    out = np.full(len(ids), np.nan)
    scorer = Scorer(model, min(length, len(ids)) - 1)
    starts = range(0, max(1, len(ids) - length + stride), stride)
    done, nats = 1, 0.0  # the number of tokens done, the sum of their losses
    for number, start in enumerate(starts, start=1):
        end = min(start + length, len(ids))
        out[done:end] = scorer(ids[start:end], done - start)[0]
        nats -= float(out[done:end].sum())
        done = end
        if watch:
            watch(number, len(starts), f"loss {written(figures(nats, done - 1).loss)}")
    return out


def perplexity(
    model: LanguageModel,
    tokens: ArrayLike,
    stride: int | None = None,
    max_length: int | None = None,
) -> tuple[float, float]:
    """Return (loss, perplexity) of a long text by a sliding window; see `token_logprobs`.

    The loss is in nats per token, the mean over all tokens but the first; perplexity is its
    exponential, inf if that is too large for a float.

    Raises
    ------
    ValueError : see `token_logprobs`

    Examples
    --------
    >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
    >>> loss, perplexity = gpt2c.scoring.perplexity(model, [*range(100)], stride=8, max_length=16)
    >>> 240 < perplexity < 280  # as if it chose among 257 equally likely tokens
    True
    """
    logprobs = token_logprobs(model, tokens, stride, max_length)[1:]
    loss, exponential, *_ = figures(-float(logprobs.sum()), len(logprobs))
    return loss, exponential


# ---- choices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and the index of the right one; texts are token ids.

    `characters` are the lengths of the endings in characters, before a space was put in front of
    them.

    Examples
    --------
    >>> context, endings = tuple(b"2+2="), (tuple(b"4"), tuple(b"five"))
    >>> question = gpt2c.scoring.Question(context, endings, label=0, characters=(1, 4))
    >>> question.endings
    ((52,), (102, 105, 118, 101))
    """

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    label: int
    characters: tuple[int, ...]


def encode_pair(tokenizer: Tokenizer, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Encode a context and its ending as one text; return the tokens of both.

    Spaces at the context's end belong to the ending, for a token begins with its space. An empty
    context becomes the end-of-text token, and others follow it if the tokenizer's `add_bos_token`
    is set. If one token would hold the end of the context and the beginning of the ending, the two
    are encoded separately.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + ending)
    if not kept:
        return [tokenizer.eot], whole
    before = tokenizer.encode(kept)
    start = [tokenizer.eot] * tokenizer.add_bos_token
    if whole[: len(before)] != before:
        return start + before, tokenizer.encode(context[len(kept) :] + ending)
    return start + before, whole[len(before) :]


def read_questions(
    path: str | os.PathLike[str], tokenizer: Tokenizer, n_positions: int
) -> list[Question]:
    """Read questions, one JSON object per line, with HellaSwag's names of the fields.

    {"ctx": "She opened the door and", "endings": ["left.", "flew.", "rained."], "label": 0}

    A space is put between context and ending if neither has one. Other fields are ignored.

    Parameters
    ----------
    path : a text file
    tokenizer : the model's
    n_positions : of the model; context and ending must fit

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : it holds no questions, or a line is not a question; the message names the line

    Examples
    --------
    >>> import pathlib, tempfile
    >>> line = '{"ctx": "She opened the door and", "endings": ["left.", "flew."], "label": 0}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pathlib.Path(directory, "questions.jsonl")
    ...     size = path.write_text(line)
    ...     tokenizer = gpt2c.Tokenizer.from_name("bytes")
    ...     questions = gpt2c.scoring.read_questions(path, tokenizer, n_positions=64)
    >>> tokenizer.decode(questions[0].endings[0])
    ' left.'
    """
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # a byte order mark, also of a file that was appended
        if line.strip():
            try:
                questions.append(_question(line, tokenizer, n_positions))
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from None
    if not questions:
        raise ValueError(f"{os.fspath(path)} holds no questions, only blank lines")
    return questions


def _question(line: str, tokenizer: Tokenizer, n_positions: int) -> Question:
    fields = parse_json(line, "the question")
    if missing := [name for name in ("ctx", "endings", "label") if name not in fields]:
        raise ValueError(f"the field {missing[0]} is missing")
    context, endings, label = fields["ctx"], fields["endings"], fields["label"]
    if not isinstance(context, str):
        raise ValueError(f"ctx must be a string, got {type(context).__name__}")
    if not isinstance(endings, list) or len(endings) < 2:
        got = len(endings) if isinstance(endings, list) else type(endings).__name__
        raise ValueError(f"endings must be a list of at least 2 strings, got {got}")
    for number, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise ValueError(f"ending {number} must be a string that is not blank, got {ending!r}")
    if isinstance(label, str) and label.isascii() and label.isdecimal():
        label = int(label)  # as in some of HellaSwag's files
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(
            f"label must be a whole number from 0 to {len(endings) - 1}, got {label!r}"
        )
    pairs = []
    for number, ending in enumerate(endings):
        apart = not context or context[-1].isspace() or ending[0].isspace()
        pairs.append(encode_pair(tokenizer, context, ending if apart else " " + ending))
        size = len(pairs[-1][0]) + len(pairs[-1][1])
        if size > n_positions + 1:  # the last token is not read
            raise ValueError(
                f"ctx and ending {number} have {size} tokens, at most one more than the context ="
                f" {n_positions + 1} can be scored"
            )
    return Question(
        tuple(pairs[0][0]),
        tuple(tuple(pair[1]) for pair in pairs),
        label,
        tuple(map(len, endings)),
    )


def answer(
    model: LanguageModel, questions: Sequence[Question], watch: Progressed | None = None
) -> NDArray[np.bool_]:
    """Answer questions; return which answers are right, (Q, 3) bool, a column per `METRICS`.

    acc chooses the ending with the largest log-probability, acc_norm the one with the largest per
    character, acc_per_token the one with the largest per token, so that long endings have no
    disadvantage. acc and acc_norm are lm-evaluation-harness' metrics of these names; llm.c calls
    acc_per_token acc_norm. Of equals the first is chosen. The context is read once for all endings.

    Parameters
    ----------
    model : a `GPT2` or `Llama`
    questions : from `read_questions`
    watch : called after each question with the number done, the number of all, the shares so far

    Raises
    ------
    ValueError : there are no questions, a question has no tokens or more than fit, an id or a label
        is out of range, or the model's weights give nan or infinity

    Examples
    --------
    >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
    >>> question = gpt2c.scoring.Question((1, 2), ((3,), (4, 5)), label=0, characters=(1, 2))
    >>> right = gpt2c.scoring.answer(model, [question])
    >>> right.shape, gpt2c.scoring.METRICS
    ((1, 3), ('acc', 'acc_norm', 'acc_per_token'))
    """
    if not questions:
        raise ValueError("at least one question is wanted, got none")
    sizes = [_check_question(question, model) for question in questions]
    scorer = Scorer(model, max(sizes) - 1)
    right = np.empty((len(questions), len(METRICS)), np.bool_)
    for number, question in enumerate(questions, start=1):
        logprobs = ending_logprobs(scorer, question)
        tokens = [len(ending) for ending in question.endings]
        scores = logprobs, logprobs / question.characters, logprobs / tokens
        right[number - 1] = [score.argmax() == question.label for score in scores]
        if watch:
            shares = zip(METRICS, right[:number].mean(axis=0), strict=True)
            watch(number, len(questions), "  ".join(f"{name} {x:.4f}" for name, x in shares))
    return right


def _check_question(question: Question, model: LanguageModel) -> int:
    """Return the number of tokens of the context and its longest ending, if they can be scored."""
    lengths = [len(ending) for ending in question.endings]
    if not question.context or not lengths or not min(lengths):
        raise ValueError("a question must have a context and endings, none of them empty")
    if not 0 <= question.label < len(lengths):
        raise ValueError(
            f"a question's label must be from 0 to {len(lengths) - 1}, got {question.label}"
        )
    if len(question.characters) != len(lengths) or min(question.characters) < 1:
        raise ValueError(
            f"a question's characters must be {len(lengths)} numbers of at least 1, one for each"
            f" ending, got {question.characters}"
        )
    size = len(question.context) + max(lengths)
    if size > model.config.n_positions + 1:
        raise ValueError(
            f"a question has {size} tokens with an ending, at most {model.config.context_name} + 1"
            f" = {model.config.n_positions + 1} can be scored"
        )
    for ids in (question.context, *question.endings):
        check_ids(ids, "a question", 0, model.config.vocab_size)
    return size


def ending_logprobs(scorer: Scorer, question: Question) -> NDArray[np.float64]:
    """Return each ending's log-probability, (E,) float64 in nats; nothing is checked."""
    first = len(question.context)
    rows = [np.array(question.context + ending, np.int32) for ending in question.endings]
    return np.array([scorer(row, first)[0].sum(dtype=np.float64) for row in rows])


def accuracy(right: NDArray[Any]) -> list[tuple[float, float]]:
    """Return (share, standard error) of each column of (Q, K) right answers.

    The error is that of the mean, from the sample's variance with Q - 1; nan for one question.

    Raises
    ------
    ValueError : there are no answers

    Examples
    --------
    >>> gpt2c.scoring.accuracy(np.array([[True], [True], [True], [False]]))
    [(0.75, 0.25)]
    """
    count = len(right)
    if not count:
        raise ValueError("at least one answer is wanted, got none")
    shares = [float(share) for share in right.mean(axis=0)]
    return [
        (share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan)
        for share in shares
    ]
