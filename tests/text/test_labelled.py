"""Labelled texts: kinds of labels, texts that come twice, groups, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import refused

from gpt2c.text.examples import Record, read_records
from gpt2c.text.labelled import Labelled, labelled, sorted_labels, unique


def test_numbers_and_strings_are_one_label(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\ny,true\n")
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y", "label": true}\n')
    for name in ("a.csv", "a.jsonl"):
        texts = labelled(read_records(tmp_path / name, ["label"]).records)
        assert [(each.text, each.label) for each in texts] == [("x", "1"), ("y", "true")]
    assert texts[1].where == f"{tmp_path / 'a.jsonl'}, line 2"


def test_labels_are_sorted_as_numbers_or_strings() -> None:
    def sort(*labels: str) -> tuple[str, ...]:
        return sorted_labels([Labelled("", label, "", "") for label in labels])

    assert sort("10", "9", "-1", "9") == ("-1", "9", "10")
    assert sort("10", "9", "b", "B") == ("10", "9", "B", "b")


def test_each_text_counts_once() -> None:
    rows = [("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("A", "1")]
    texts, counts = unique([Labelled(*row, "", str(n)) for n, row in enumerate(rows)])
    assert [(each.text, each.label, each.where) for each in texts] == [
        ("a", "1", "0"), ("b", "1", "1"), ("A", "1", "5"),
    ]  # fmt: skip
    already = "that are there already"
    other = f"{already}, with another label: 'a' is '1' in 0 and '2' in 3"
    assert counts == {already: 2, other: 1}
    texts, counts = unique([Labelled(*row, "", str(n)) for n, row in enumerate(rows)], str.lower)
    assert [each.where for each in texts] == ["0", "1"] and counts == {already: 3, other: 1}


def test_groups_are_a_field_or_the_text() -> None:
    records = [Record({"text": "a", "label": 0, "source": 3}, "line 1")]
    assert labelled(records)[0].group == "a"
    assert labelled(records, "source")[0].group == "3"
    assert refused(labelled, records, "from") == "line 1 has no field 'from' for its group"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "", "label": 1}, "line 7: the text is empty, so it has no tokens"),
        ({"text": 5, "label": 1}, "line 7: text must be a string, got int"),
        ({"text": "a", "label": 0.5}, "line 7: label must be a string or a whole number, got 0.5"),
        ({"text": "a", "label": None}, "line 7: label must be a string or a whole number, got No"),
        ({"text": "a", "label": ""}, "line 7: label must be a string or a whole number, got ''"),
        ({"text": "a", "label": ["b"]}, "line 7: label must be a string or a whole number, got ["),
    ],
)
def test_bad_records_are_refused(fields: dict[str, Any], said: str) -> None:
    assert refused(labelled, [Record(fields, "line 7")]).startswith(said)
