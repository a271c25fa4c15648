"""Examples to fine-tune on: files or lists of records -> token ids, and which are learned.

A record is an object of named fields: a line of JSONL, an entry of a JSON list, or a row of CSV.
Its fields show its format; all records of a file have the format of the first.

OpenAI's files of fine-tuning are among them: {"messages"}, in which an answer of "weight" 0 is
context and not learned, and {"input", "preferred_output", "non_preferred_output"}.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpt2c.files import untrusted
from gpt2c.text.chat import Message, check_messages, encode_chat
from gpt2c.text.ragged import parts
from gpt2c.text.tokenizer import Tokenizer

__all__ = [
    "Dropped",
    "Example",
    "Record",
    "Records",
    "divided",
    "fingerprint",
    "group_of",
    "kept",
    "messages_of",
    "read_records",
    "shortened",
    "string",
    "supervised",
    "tokens_of",
]

T = TypeVar("T")
LARGEST = 1 << 30  # bytes of a file of examples
ALTERNATIVES = {  # other names of fields -> ours
    "response": "completion",
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
}
# The fields that show a format, in the order in which they are tried.
FORMATS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "kto": ("prompt", "completion", "label"),
    "prompt and completion": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
    "prompt": ("prompt",),
}
SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant"}
SHAREGPT |= {"assistant": "assistant"}


class Record(NamedTuple):
    """An object of named fields; `where` names it in errors, such as "data.jsonl, line 3"."""

    fields: Mapping[str, Any]
    where: str


class Records(NamedTuple):
    """The records of a file, and their format, a key of FORMATS."""

    format: str
    records: list[Record]


class Example(NamedTuple):
    """A text as a model learns it.

    Attributes
    ----------
    ids : (T,) int32, with the end of text that begins each text
    learned : (T,) bool: the tokens that a model learns to write
    where : names it in errors
    group : examples of one group stay together when examples are divided
    cut : whether its end is lost
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    where: str
    group: Any = None
    cut: bool = False

    @property
    def content(self) -> bytes:
        """Its ids and marks; examples of one content are one."""
        return self.ids.tobytes() + self.learned.tobytes()

    @property
    def targets(self) -> NDArray[np.int32]:
        """The target of each token but the last, (T-1,), -1 where nothing is learned."""
        return np.where(self.learned[1:], self.ids[1:], np.int32(-1))

    @property
    def asked(self) -> int:
        """The number of tokens before the last answer; all, if the answer was cut off."""
        return int(np.flatnonzero(~self.learned)[-1]) + 1


def group_of(record: Record, field: str, own: Any) -> Any:
    """Return the group of a record: that of its field, or without one its `own`.

    Raises
    ------
    ValueError : the record has no such field
    """
    if not field:
        return own
    if field not in record.fields:
        raise ValueError(f"{record.where} has no field {untrusted.shown(field)} for its group")
    return str(record.fields[field])


class Dropped(ValueError):
    """An example cannot be learned from, and is left out; the text says why, in a few words."""


def read_records(
    source: str | Path | Sequence[Mapping[str, Any]],
    formats: Sequence[str],
    names: Mapping[str, str] | None = None,
) -> Records:
    """Read records whose format is one of `formats`.

    Parameters
    ----------
    source : a file of JSONL, of a JSON list, or of CSV or TSV with a line of names; or the records
        themselves
    formats : keys of FORMATS
    names : our name of a field -> its name in the records, where that is another

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : it is damaged or empty, has no such format, or a record has another format than the
        first

    Examples
    --------
    >>> from gpt2c.text.examples import read_records
    >>> read_records([{"prompt": "1 + 1 =", "response": " 2"}], ["prompt and completion"]).format
    'prompt and completion'
    """
    if isinstance(source, str | Path):
        name, found = str(source), list(_read(Path(source)))
    else:
        name = "the examples"
        found = [Record(fields, f"example {number}") for number, fields in enumerate(source, 1)]
    if not found:
        raise ValueError(f"{name} has no examples")
    renamed = {ours: own for ours, own in (names or {}).items() if own}
    records = []
    kind = ""
    for fields, where in found:
        if not isinstance(fields, Mapping):
            kind_of = type(fields).__name__
            raise ValueError(f"{where} must be an object of named fields, got {kind_of}")
        for ours, own in renamed.items():
            if own not in fields:
                raise ValueError(f"{where} has no field {untrusted.shown(own)} for its {ours}")
        both = [pair for pair in ALTERNATIVES.items() if fields.keys() >= {*pair}]
        fields = _renamed(fields, renamed)
        known = _format(fields, formats)
        if not known:
            there = ", ".join(map(untrusted.shown, list(fields)[:8])) or "none"
            wanted = "; or ".join(" and ".join(FORMATS[each]) for each in formats)
            raise ValueError(f"{where} has the fields {there}; wanted are {wanted}")
        if kind and known != kind:
            raise ValueError(
                f"{where} has the format {known}, and the first record has {kind}: put them into"
                " files of their own"
            )
        for other, ours in both:
            if ours in FORMATS[known] and ours not in renamed:
                raise ValueError(f"{where} has both {ours} and {other}, which mean the same")
        kind = known
        records.append(Record(fields, where))
    return Records(kind, records)


def _renamed(fields: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return fields under our names; a field that was renamed hides one that has its new name."""
    out = {ALTERNATIVES.get(name, name): value for name, value in fields.items()}
    for ours, own in renamed.items():
        out[ours] = fields[own]
    return out


def _format(fields: Mapping[str, Any], formats: Sequence[str]) -> str:
    """Return the first of the formats whose fields are all there, "" for none."""
    return next(
        (each for each in FORMATS if each in formats and fields.keys() >= {*FORMATS[each]}), ""
    )


def _read(path: Path) -> Iterator[Record]:
    content = untrusted.decode(untrusted.read_bytes(path, LARGEST), str(path))
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _rows(content, str(path), "\t" if path.suffix.lower() == ".tsv" else ",")
    elif content.lstrip().startswith("["):
        entries = untrusted.parse_json_list(content, str(path))
        for number, entry in enumerate(entries, 1):
            yield Record(entry, f"{path}, entry {number:,}")
    else:
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number:,}"
                yield Record(untrusted.parse_json(line, where), where)


def _rows(content: str, name: str, delimiter: str) -> Iterator[Record]:
    """Yield the rows of CSV; all fields are strings."""
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(len(content) + 1)  # a text may be longer than csv's 131,072
    try:
        names = [*(reader.fieldnames or ())]
        if twice := next((one for one in names if names.count(one) > 1), None):
            raise ValueError(f"{name} has two columns {untrusted.shown(twice)}")
        for row in reader:
            where = f"{name}, line {reader.line_num:,}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where} does not have the {len(names)} columns of the first line"
                )
            yield Record(row, where)
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.reader.line_num:,} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def string(record: Record, name: str) -> str:
    """Return a field that must be a string.

    Raises
    ------
    ValueError : it is no string
    """
    value = record.fields[name]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{record.where}: {name} must be a string, got {kind}")
    return value


def messages_of(record: Record, format: str) -> list[Message] | None:
    """Return the conversation of a record; None of a format that has no roles.

    Raises
    ------
    ValueError : see `check_messages`
    Dropped : an answer is empty
    """
    fields = record.fields
    if format == "messages":
        given = fields["messages"]
    elif format == "sharegpt":
        turns = fields["conversations"]
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns
        ):
            raise ValueError(f"{record.where}: conversations must be a list of from and value")
        given = [
            {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
            for turn in turns
        ]
    elif format == "alpaca":
        asked = string(record, "instruction")
        if "input" in fields and string(record, "input").strip():
            asked = f"{asked.rstrip()}\n\n{fields['input']}"
        given = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": string(record, "output")},
        ]
    else:
        return None
    for message in given if isinstance(given, list) else []:
        if isinstance(message, dict) and message.get("role") == "assistant":
            if isinstance(answer := message.get("content"), str) and not answer.strip():
                raise Dropped("without an answer")
    return check_messages(given, answered=True, place=record.where)


def _context(record: Record) -> set[int]:
    """Return the places of a conversation's answers that are not learned: their weight is 0.

    Raises
    ------
    ValueError : a weight is neither 0 nor 1, or another message than an answer has weight 1
    """
    places = set()
    for place, message in enumerate(record.fields["messages"]):
        weight = message.get("weight") if isinstance(message, Mapping) else None
        at = f"{record.where}: message {place + 1}"
        if weight not in (None, 0, 1):
            raise ValueError(f"{at}: the weight must be 0 or 1, got {untrusted.shown(weight)}")
        if weight and message["role"] != "assistant":
            raise ValueError(f"{at}: only answers are learned, so the weight must be 0, got 1")
        if weight == 0:
            places.add(place)
    return places


def supervised(record: Record, format: str, tokenizer: Tokenizer, group_field: str = "") -> Example:
    """Return a record as an example: its answers are learned, or all of a text.

    An answer whose weight is 0 is context; what follows the last that is learned is left out.

    Its group is that of `group_field`, or the tokens before its first answer: two answers to one
    prompt stay together. Without a prompt it is all tokens.

    A prompt and its completion are encoded each alone, so the ids of the prompt are always the
    first of the whole; the text of a prompt yields no special tokens.

    Raises
    ------
    ValueError : the record is damaged
    Dropped : there is nothing to learn
    """
    if messages := messages_of(record, format):
        context = _context(record) if format == "messages" else ()
        ids, learned = encode_chat(tokenizer, messages, context=context)
        if not any(learned):
            raise Dropped("whose answers have weight 0")
        end = len(ids) - learned[::-1].index(True)
        ids, learned = ids[:end], learned[:end]
    elif format == "text":
        ids = [tokenizer.eot, *tokenizer.encode(string(record, "text")), tokenizer.eot]
        learned = [False] + [True] * (len(ids) - 1)
    else:
        prompt = [tokenizer.eot, *tokenizer.encode(string(record, "prompt"))]
        answer = tokenizer.encode(string(record, "completion"))
        ids = [*prompt, *answer, tokenizer.eot]
        learned = [False] * len(prompt) + [True] * (len(answer) + 1)
    if sum(learned) < 2:  # the end of text alone
        raise Dropped("without an answer" if format != "text" else "empty")
    asked = ids if format == "text" else ids[: learned.index(True)]
    group = group_of(record, group_field, tuple(asked))
    return Example(np.array(ids, np.int32), np.array(learned), record.where, group)


def shortened(example: Example, most: int) -> Example:
    """Return the first `most` + 1 tokens of an example: `most` are read, and the last is a target.

    A shorter one stays as it is.

    Raises
    ------
    Dropped : they have nothing to learn
    """
    if len(example.ids) <= most + 1:
        return example
    ids, learned = example.ids[: most + 1], example.learned[: most + 1]
    cut = example._replace(ids=ids, learned=learned, cut=True)
    if not cut.learned[1:].any():
        raise Dropped("whose prompt fills the context")
    return cut


def kept(
    records: Sequence[Record], read: Callable[[Record], T], key: Callable[[T], object]
) -> tuple[list[T], dict[str, int]]:
    """Read records; leave out what cannot be learned, and what is there already.

    Parameters
    ----------
    read : returns what is learned of a record, cut to the length that a model reads: texts that
        differ only further on are one
    key : returns what is the same for two that are one

    Returns
    -------
    what is learned, and how many records were left out for each reason
    """
    found: dict[object, T] = {}
    counts: Counter[str] = Counter()
    for record in records:
        try:
            one = read(record)
            if key(one) in found:
                raise Dropped("that are there already")
            found[key(one)] = one
        except Dropped as reason:
            counts[str(reason)] += 1
    return list(found.values()), dict(counts)


def divided(examples: Sequence[Example], most: int) -> Iterator[Sequence[Example]]:
    """Divide examples into batches of at most `most` tokens."""
    for part in parts([len(one.ids) - 1 for one in examples], most):
        yield examples[part]


def tokens_of(examples: Sequence[Example]) -> int:
    """Return the number of tokens of examples that a model reads."""
    return sum(len(one.ids) - 1 for one in examples)


def fingerprint(examples: Sequence[Example]) -> dict[str, Any]:
    """Return what identifies examples: their number, and a checksum of all ids and marks."""
    digest = hashlib.sha256()
    for one in examples:
        digest.update(one.content)
    return {"examples": len(examples), "sha256": digest.hexdigest()}
