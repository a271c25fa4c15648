"""Records of judged answers -> units: pairs of a chosen and a rejected answer, or single answers.

    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [...], "rejected": [...]}
    {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
    {"prompt": "2 + 2 =", "completion": " 5", "label": false}

Prompt and answer are encoded each alone, so the prompt's ids are the same in both of a pair. Each
answer has its end of text, unless it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from gpt2c.files.untrusted import shown
from gpt2c.kernels.checks import number
from gpt2c.text.chat import check_messages, encode_chat
from gpt2c.text.examples import Dropped, Example, Record, shortened, string
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Unit", "mismatched", "pair_of", "shortened_unit", "single_of", "without_end"]


class Unit(NamedTuple):
    """A pair or a single answer, which is judged at once.

    Attributes
    ----------
    examples : K of them
    liked : of a single example
    margin : by how much more the chosen should be worth
    other : the prompt of a single example with an answer to another one, for KTO
    reference : (K,), log-probabilities by the untrained model, and last that of `other` if there is
        one; empty if no reference is needed
    group : units of one group stay together when units are divided
    """

    examples: tuple[Example, ...]
    liked: bool = True
    margin: float = 0.0
    other: Example | None = None
    reference: tuple[float, ...] = ()
    group: Any = None

    @property
    def tokens(self) -> int:
        """The number of its tokens."""
        return sum(len(one.ids) for one in self.examples)

    @property
    def cut(self) -> bool:
        """Whether an end is lost."""
        return any(one.cut for one in self.examples)

    @property
    def content(self) -> tuple[bytes, bool]:
        """Its examples and its mark; units of one content are one."""
        return b"".join(one.content for one in self.examples), self.liked

    @property
    def asked(self) -> bytes:
        """The ids of its prompt."""
        one = self.examples[0]
        return one.ids[~one.learned].tobytes()

    @property
    def measured(self) -> tuple[Example, ...]:
        """The examples that have a reference."""
        return (*self.examples, self.other) if self.other else self.examples


LABELS = {"true": True, "1": True, "false": False, "0": False}  # of CSV, whose fields are strings


def pair_of(record: Record, tokenizer: Tokenizer) -> Unit:
    """Return the unit of a record with chosen and rejected.

    Raises
    ------
    ValueError : the record is damaged, both answers are equal, or their prompts differ
    """
    chosen, rejected = (_answered(record, side, tokenizer) for side in ("chosen", "rejected"))
    if np.array_equal(chosen.ids, rejected.ids):
        raise ValueError(f"{record.where}: chosen and rejected are equal, so neither is preferred")
    asked, other = (one.ids[~one.learned] for one in (chosen, rejected))
    if not np.array_equal(asked, other):
        raise ValueError(f"{record.where}: chosen and rejected answer different prompts")
    given = record.fields.get("margin", 0.0)
    with suppress(ValueError):  # in CSV it is a text
        given = float(given) if isinstance(given, str) else given
    margin = number(f"{record.where}: margin", given)
    if not math.isfinite(margin):
        raise ValueError(f"{record.where}: margin must be finite, got {margin}")
    return Unit((chosen, rejected), margin=margin)


def single_of(record: Record, tokenizer: Tokenizer) -> Unit:
    """Return the unit of a record with completion and label.

    Raises
    ------
    ValueError : the record is damaged
    """
    label = record.fields["label"]
    label = LABELS.get(str(label).lower(), label)
    if type(label) is not bool:
        raise ValueError(f"{record.where}: label must be true or false, got {shown(label)}")
    return Unit((_answered(record, "completion", tokenizer),), label)


def without_end(unit: Unit) -> Unit:
    """Return a unit whose examples lack their last token, the end of text."""
    return unit._replace(
        examples=tuple(
            one._replace(ids=one.ids[:-1], learned=one.learned[:-1]) for one in unit.examples
        )
    )


def mismatched(asked: Unit, answered: Unit, most: int) -> Example:
    """Return the prompt of one unit with the answer of another, at most `most` + 1 tokens."""
    (one,), (other,) = asked.examples, answered.examples
    prompt = ~one.learned
    ids = np.concatenate([one.ids[prompt], other.ids[other.learned]])
    learned = np.arange(len(ids)) >= np.count_nonzero(prompt)
    return shortened(Example(ids, learned, one.where), most)


def _answered(record: Record, name: str, tokenizer: Tokenizer) -> Example:
    """Return the prompt with an answer, a string or messages, of which only the answer is learned.

    Messages without a prompt of their own begin with it: all before the last is the prompt.
    """
    prompt, answer = record.fields.get("prompt", ""), record.fields[name]
    given = record.fields.get("input")
    if not prompt and isinstance(given, Mapping):  # OpenAI's
        prompt = given.get("messages")
        if not isinstance(prompt, list):
            raise ValueError(f"{record.where}: input must hold messages, got {shown(given)}")
    if isinstance(answer, list):
        asked = prompt if isinstance(prompt, list) else []
        messages = check_messages([*asked, *answer], answered=True, place=record.where)
        start = len(encode_chat(tokenizer, messages[:-1], answer=True)[0])
        ids = encode_chat(tokenizer, messages)[0]
    else:
        text = string(record, name)
        if not text.strip():
            raise ValueError(f"{record.where}: {name} is empty")
        before = [tokenizer.eot, *tokenizer.encode(string(record, "prompt") if prompt else "")]
        start, ids = len(before), [*before, *tokenizer.encode(text), tokenizer.eot]
    return Example(np.array(ids, np.int32), np.arange(len(ids)) >= start, record.where)


def shortened_unit(unit: Unit, most: int) -> Unit:
    """Return a unit whose examples are cut to `most` + 1 tokens, see `shortened`.

    Raises
    ------
    Dropped : an example has nothing to learn, or both are equal now
    """
    examples = tuple(shortened(one, most) for one in unit.examples)
    if len({one.ids.tobytes() for one in examples}) < len(examples):
        raise Dropped("whose answers are equal up to where they are cut")
    return unit._replace(examples=examples)
