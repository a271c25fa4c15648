"""Labelled texts, for classifiers: records -> texts and labels, each text once.

A label is a string or a whole number, and both are one: 1 in JSON is "1" in CSV. True and false are
"true" and "false".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from gpt2c.files.untrusted import shown
from gpt2c.text.examples import Record, group_of, string

__all__ = ["Labelled", "labelled", "sorted_labels", "unique"]


class Labelled(NamedTuple):
    """A text and its label.

    Attributes
    ----------
    group : texts of one group stay together when texts are divided
    where : names it in errors, such as "data.jsonl, line 3"
    """

    text: str
    label: str
    group: Any
    where: str


def labelled(records: Iterable[Record], group_field: str = "") -> list[Labelled]:
    """Return the texts of records that have the fields text and label.

    Parameters
    ----------
    group_field : names the group; "" makes each text its own

    Raises
    ------
    ValueError : a text is no string or is empty, a label is none of the kinds above, or a group is
        missing
    """
    found = []
    for record in records:
        text = string(record, "text")
        if not text:
            raise ValueError(f"{record.where}: the text is empty, so it has no tokens")
        group = group_of(record, group_field, text)
        found.append(Labelled(text, _label(record), group, record.where))
    return found


def _label(record: Record) -> str:
    label = record.fields["label"]
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    if not isinstance(label, str) or not label:
        raise ValueError(
            f"{record.where}: label must be a string or a whole number, got {shown(label)}"
        )
    return label


def unique(
    texts: Iterable[Labelled], key: Callable[[str], Hashable] = str
) -> tuple[list[Labelled], dict[str, int]]:
    """Return each text once, with its first label, and how many others were left out, by reason.

    Parameters
    ----------
    key : returns what is the same for two texts that are one
    """
    first: dict[Hashable, Labelled] = {}
    counts: Counter[str] = Counter()
    other = ""  # names the first text with two labels
    for each in texts:
        kept = first.setdefault(key(each.text), each)
        if kept is not each and kept.label == each.label:
            counts["that are there already"] += 1
        elif kept is not each:
            other = other or (
                f"that are there already, with another label: {shown(each.text)} is"
                f" {shown(kept.label)} in {kept.where} and {shown(each.label)} in {each.where}"
            )
            counts[other] += 1
    return list(first.values()), dict(counts)


def sorted_labels(texts: Iterable[Labelled]) -> tuple[str, ...]:
    """Return the labels, sorted: as numbers if all are, else as strings."""
    found = {each.label for each in texts}
    try:
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(found))
