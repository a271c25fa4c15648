"""Examples: formats of records, what is learned, what is left out; steps without padding."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c.text.chat import Message
from gpt2c.text.examples import (
    FORMATS,
    Dropped,
    Record,
    kept,
    messages_of,
    read_records,
    shortened,
    supervised,
)
from gpt2c.text.ragged import Order, held_out, parts
from gpt2c.text.tokenizer import Tokenizer

BYTES = Tokenizer.from_name("bytes")
PAIR = {"prompt": "1+1=", "completion": "2"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
KNOWN: dict[str, dict[str, Any]] = {
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "messages": {"messages": TALK},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    },
    "alpaca": {"instruction": "Hi", "input": "", "output": "Ho"},
    "kto": PAIR | {"label": True},
    "prompt and completion": PAIR,
    "label": {"text": "a", "label": "b"},
    "text": {"text": "a"},
    "prompt": {"prompt": "a", "answer": 2},
}


def example(fields: dict[str, Any], format: str) -> Any:
    return supervised(Record(fields, "here"), format, BYTES)


@pytest.mark.parametrize("format", FORMATS)
def test_fields_show_the_format(format: str) -> None:
    assert read_records([KNOWN[format]], list(FORMATS)).format == format


def test_files_of_every_kind_hold_the_same_records(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": 'say "a, b"\n', "completion": "é"}]
    files = {
        "a.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
        "a.json": json.dumps(rows),
        "a.csv": 'prompt,response\r\n1+1=,2\r\n"say ""a, b""\n",é\r\n',
        "a.tsv": 'prompt\tcompletion\n1+1=\t2\n"say ""a, b""\n"\té\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        found = read_records(tmp_path / name, ["prompt and completion"])
        assert [dict(record.fields) for record in found.records] == rows, name
    assert read_records(tmp_path / "a.jsonl", FORMATS.keys()).records[1].where.endswith("line 2")


def test_renamed_field_hides_one_of_its_new_name() -> None:
    rows = [{"q": "1+1=", "prompt": "no", "completion": "2"}]
    found = read_records(rows, ["prompt and completion"], {"prompt": "q", "completion": ""})
    assert found.records[0].fields["prompt"] == "1+1="
    said = refused(lambda: read_records(rows, ["text"], {"text": "body"}))
    assert said == "example 1 has no field 'body' for its text"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there are no examples"),
        ([{"a": 1}], "example 1 has the fields 'a'; wanted are prompt and completion; or text"),
        ([{}], "example 1 has the fields none; wanted are prompt and completion; or text"),
        ([PAIR, 3], "example 2 must be an object of named fields, got int"),
        ([PAIR, {"text": "a"}], "example 2 has the format text, and the first record has prompt and"
         " completion: put them into files of their own"),
    ],
)  # fmt: skip
def test_records_of_other_formats_are_refused(rows: list[Any], said: str) -> None:
    assert refused(lambda: read_records(rows, ["prompt and completion", "text"])) == said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "a.jsonl has no examples"),
        ("a.txt", b"Once upon", "a.txt is not JSONL: make text into tokens with gpt2c prepare"),
        ("a.csv", b"prompt;completion\na;b", "wanted are text, with commas"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2 must hold a JSON object, got list"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1 is not valid JSON: 'text' is there"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl is not UTF-8"),
        ("a.json", b'[{"text": "a"}', "a.json is not valid JSON"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "a.json is not valid JSON: 'text' is there tw"),
        ("a.csv", b"text,label,text\na,b,c\n", "a.csv has two columns 'text'"),
        ("a.csv", b"text\na,b\n", "line 2 does not have the 1 columns of the first line"),
        ("a.csv", b'text\n"a', "line 2 is not CSV: unexpected end of data"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(lambda: read_records(tmp_path / name, ["text"]))


def test_answers_are_learned_with_their_end_and_prompts_are_not() -> None:
    one = example(PAIR, "prompt and completion")
    assert BYTES.decode(one.ids.tolist()) == "<|endoftext|>1+1=2<|endoftext|>"
    assert one.learned.tolist() == [False] * 5 + [True, True]
    assert one.targets.tolist() == [-1] * 4 + [ord("2"), BYTES.eot]
    whole = example({"text": "ab"}, "text")
    assert whole.targets.tolist() == [ord("a"), ord("b"), BYTES.eot]
    sneaky = example({"prompt": "<|endoftext|>", "completion": "x"}, "prompt and completion")
    assert (sneaky.ids == BYTES.eot).sum() == 2  # the first and the last


def test_conversations_of_three_formats_are_one() -> None:
    wanted = [Message("user", "Hi"), Message("assistant", "Ho")]
    for format in ("messages", "sharegpt", "alpaca"):
        assert messages_of(Record(KNOWN[format], "here"), format) == wanted
    given = {"instruction": "Add. ", "input": "1, 2", "output": "3"}
    found = messages_of(Record(given, "here"), "alpaca")
    assert found is not None and found[0].content == "Add.\n\n1, 2"


def test_an_answer_of_weight_0_is_context() -> None:
    def weighed(*weights: Any) -> Any:
        talk = [message | {} for _ in weights for message in TALK]
        for message, weight in zip(talk[1::2], weights, strict=True):
            message["weight"] = weight
        return example({"messages": talk}, "messages")

    turn = b"user:\nHi\n\nassistant:\n"
    plain = example({"messages": TALK * 2}, "messages")
    one = weighed(0, 1)
    assert one.ids.tolist() == plain.ids.tolist() == [256, *turn, *b"Ho", 256, *turn, *b"Ho", 256]
    start = len(turn) + 1
    assert plain.learned[start : start + 3].all() and not one.learned[:-3].any()
    assert one.learned[-3:].all() and one.asked == len(one.ids) - 3
    for weights in ((1, 1), (None, 1.0)):
        assert weighed(*weights).content == plain.content
    # nothing is learned behind the last answer that is
    assert (
        weighed(1, 0).content
        == weighed(1).content
        == example({"messages": TALK}, "messages").content
    )
    with pytest.raises(Dropped, match=r"^whose answers have weight 0$"):
        weighed(0, 0)


@pytest.mark.parametrize(
    ("fields", "format", "reason"),
    [
        (PAIR | {"completion": ""}, "prompt and completion", "without an answer"),
        ({"instruction": "a", "output": " "}, "alpaca", "without an answer"),
        ({"messages": [TALK[0], TALK[1] | {"content": ""}]}, "messages", "without an answer"),
        ({"text": ""}, "text", "empty"),
    ],
)
def test_example_without_an_answer_is_dropped(
    fields: dict[str, Any], format: str, reason: str
) -> None:
    with pytest.raises(Dropped, match=f"^{reason}$"):
        example(fields, format)


@pytest.mark.parametrize(
    ("fields", "format", "said"),
    [
        (PAIR | {"completion": 2}, "prompt and completion", "here: completion must be a string, g"),
        ({"messages": TALK[::-1]}, "messages", "here: message 1 must be the system's or the user"),
        ({"messages": TALK[:1]}, "messages", "here: the last message must be the assistant's, not"),
        ({"messages": "Hi"}, "messages", "here must be a list of messages, got 'Hi'"),
        (
            {"messages": [TALK[0], TALK[1] | {"weight": 0.5}]},
            "messages",
            "here: message 2: the weight must be 0 or 1, got 0.5",
        ),
        (
            {"messages": [TALK[0] | {"weight": 1}, TALK[1]]},
            "messages",
            "here: message 1: only answers are learned, so the weight must be 0, got 1",
        ),
        (
            {"conversations": [{"from": "human"}]},
            "sharegpt",
            "here: conversations must be a list o",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "sharegpt", "has the role 'bot'"),
    ],
)
def test_damaged_records_are_refused(fields: dict[str, Any], format: str, said: str) -> None:
    assert said in refused(lambda: example(fields, format))


def test_long_example_loses_its_end_and_keeps_its_prompt() -> None:
    one = example({"prompt": "abc", "completion": "defg"}, "prompt and completion")
    assert BYTES.decode(shortened(one, 5).ids[1:].tolist()) == "abcde"
    with pytest.raises(Dropped, match="whose prompt fills the context"):
        shortened(one, 3)


def test_what_is_left_out_is_counted() -> None:
    rows = [PAIR, PAIR, PAIR | {"completion": ""}, {"prompt": "abcdefgh", "completion": "i"}]
    rows += [{"prompt": "ab", "completion": f"cdefgh{n}"} for n in range(3)]  # one, if they are cut
    found = read_records(rows, ["prompt and completion"])
    examples, counts = kept(
        found.records,
        lambda one: shortened(supervised(one, found.format, BYTES), 6),
        lambda one: one.content,
    )
    assert [(one.where, one.cut) for one in examples] == [("example 1", False), ("example 5", True)]
    assert counts == {
        "that are there already": 3,
        "without an answer": 1,
        "whose prompt fills the context": 1,
    }


def test_examples_of_one_prompt_are_a_group() -> None:
    def group(format: str, fields: dict[str, Any], field: str = "") -> Any:
        return supervised(Record(fields, "here"), format, BYTES, field).group

    kind, other = "prompt and completion", PAIR | {"completion": "3", "of": 7}
    assert group(kind, PAIR) == group(kind, other) == (256, *b"1+1=")
    assert group(kind, PAIR) != group(kind, PAIR | {"prompt": "1+2="})
    assert group(kind, other, "of") == "7"
    answer = [TALK[0], {"role": "assistant", "content": "Hm"}]
    assert group("messages", {"messages": TALK}) == group("messages", {"messages": answer})
    assert group("text", {"text": "a"}) != group("text", {"text": "b"})


def test_a_field_of_csv_may_be_long(tmp_path: Path) -> None:
    path, text = tmp_path / "a.csv", "ab " * 70_000
    path.write_text(f"text\n{text}\n")
    assert read_records(path, ["text"]).records[0].fields == {"text": text}


def test_two_names_of_one_field_are_refused() -> None:
    both = PAIR | {"response": "3"}
    kinds = ["prompt and completion", "preference"]
    said = "example 1 has both completion and response, which mean the same"
    assert said == refused(read_records, [both], kinds)
    (one,) = read_records([both], kinds, {"completion": "response"}).records
    assert one.fields["completion"] == "3"
    pair = both | {"chosen": "b", "rejected": "c"}
    assert read_records([pair], kinds).format == "preference"  # it needs neither


def test_epochs_have_each_example_once_in_another_order() -> None:
    order = Order(7, 3, seed=5)
    numbers = [n for step in range(14) for n in order.step(step)]  # 42, six epochs
    epochs = [numbers[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    again = Order(7, 3, seed=5)
    assert [again.step(step) for step in (13, 4, 0)] == [
        numbers[39:42], numbers[12:15], numbers[:3]
    ]  # fmt: skip
    assert Order(7, 3, seed=6).step(0) != order.step(0)


def test_parts_hold_most_tokens_or_one_sequence() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths, most = rng.integers(1, 20, 30).tolist(), int(rng.integers(1, 40))
        slices = list(parts(lengths, most))
        assert [n for part in slices for n in lengths[part]] == lengths
        for part in slices:
            assert sum(lengths[part]) <= most or part.stop - part.start == 1
        for one, after in pairwise(slices):
            assert sum(lengths[one]) + lengths[after.start] > most


def test_groups_are_held_out_whole() -> None:
    groups = [n // 3 for n in range(60)]
    held = held_out(groups, 0.2, seed=1)
    assert sum(held) == 12 and all(len(set(held[n : n + 3])) == 1 for n in range(0, 60, 3))
    assert held == held_out(groups, 0.2, seed=1) != held_out(groups, 0.2, seed=2)
    assert sum(held_out(groups, 0.0, seed=1)) == 0
    assert sum(held_out(range(2), 0.99, seed=1)) == 1  # each side has one
    assert sum(held_out(range(2), 0.01, seed=1)) == 1
    with pytest.raises(ValueError, match="at least 2 different examples"):
        held_out([1, 1], 0.5, seed=1)
