"""Chat: which conversations are refused, and the ids and learned tokens of the others."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from gpt2c import Tokenizer
from gpt2c.text.chat import (
    Message,
    check_messages,
    encode_chat,
)
from gpt2c.text.splits import LLAMA3

BYTES = Tokenizer.from_name("bytes")
TEXTS = ["user:\nWhat is a cat?\n\nassistant:\nA cat is an animal.\n\nsystem:\nBe brief."] * 3
BPE = Tokenizer.train(TEXTS, 300)
BPE_OF_LLAMA = Tokenizer(BPE._ranks, BPE.eot, split=LLAMA3)  # a line end joins punctuation
TALK = [
    Message("system", " Be brief.\n"),
    Message("user", "Hi"),
    Message("assistant", "\tHello!"),
    Message("user", "A\n\ncat?"),
    Message("assistant", "Yes."),
]
# Contents that try to look like the template, and whitespace of every kind around them.
HARD = st.sampled_from(
    ["<|endoftext|>", "user:\n", "\n\nassistant:\n", "'s", "\x1c", "\u3000", "7"]
)
CONTENTS = st.lists(HARD | st.text(max_size=4), min_size=1, max_size=4).map("".join)
CONTENTS = CONTENTS.filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    return [Message(role, draw(CONTENTS)) for role in roles]


def test_the_text_and_what_is_learned() -> None:
    ids, learned = encode_chat(BYTES, TALK)
    assert BYTES.decode(ids) == (
        "<|endoftext|>system:\nBe brief.\n\nuser:\nHi\n\nassistant:\nHello!<|endoftext|>"
        "user:\nA\n\ncat?\n\nassistant:\nYes.<|endoftext|>"
    )
    live = [token for token, live in zip(ids, learned, strict=True) if live]
    assert BYTES.decode(live) == "Hello!<|endoftext|>Yes.<|endoftext|>"
    asked, none = encode_chat(BYTES, TALK[:2], answer=True)
    assert BYTES.decode(asked).endswith("user:\nHi\n\nassistant:\n") and not any(none)


@pytest.mark.parametrize("tokenizer", [BPE, BPE_OF_LLAMA])
@given(conversations())
def test_ids_begin_with_those_of_a_shorter_conversation(
    tokenizer: Tokenizer, talk: list[Message]
) -> None:
    ids, learned = encode_chat(tokenizer, talk)
    for count in range(1, len(talk)):
        shorter = encode_chat(tokenizer, talk[:count], answer=talk[count].role == "assistant")
        size = len(shorter[0])
        assert size < len(ids) and (ids[:size], learned[:size]) == shorter
        assert learned[size] == (talk[count].role == "assistant")  # the first token after it


@given(conversations())
def test_only_the_template_has_special_tokens(talk: list[Message]) -> None:
    ids, learned = encode_chat(BPE, talk)
    answers = [message.content.strip() for message in talk if message.role == "assistant"]
    assert ids.count(BPE.eot) == 1 + len(answers) and ids[0] == BPE.eot
    live = [token for token, live in zip(ids, learned, strict=True) if live]
    expected = [token for answer in answers for token in [*BPE.encode(answer), BPE.eot]]
    assert live == expected


def test_messages_are_checked() -> None:
    assert check_messages([message._asdict() for message in TALK], answered=True) == TALK
    assert check_messages(TALK[:2]) == TALK[:2] and check_messages(tuple(TALK[1:])) == TALK[1:]
    more = {"role": "user", "content": "Hi", "name": "Ann"}
    assert check_messages([more]) == [Message("user", "Hi")]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "talk has no messages"),
        ("Hi", "talk must be a list of messages, got 'Hi'"),
        ({"role": "user", "content": "Hi"}, "talk must be a list of messages, got {"),
        (None, "talk must be a list of messages, got None"),
        (["Hi"], "talk: message 1 must have a role and a content, got 'Hi'"),
        ([{"role": "user"}], "talk: message 1 must have a role and a content"),
        (
            [("tool", "x")],
            "talk: message 1 has the role 'tool'; system, user or assistant is wanted",
        ),
        ([(["user"], "x")], "talk: message 1 has the role ['user']; system"),
        ([("assistant", "x")], "message 1 must be the system's or the user's, not the assistant's"),
        (
            [("system", "x"), ("assistant", "x")],
            "message 2 must be the user's, not the assistant's",
        ),
        ([("user", "x"), ("user", "x")], "message 2 must be the assistant's, not the user's"),
        ([("user", "x"), ("system", "x")], "message 2 must be the assistant's, not the system's"),
        (
            [("user", "x"), ("assistant", "x"), ("assistant", "x")],
            "message 3 must be the user's, not the assistant's",
        ),
        ([("user", None)], "message 1: the content must be a string, got None"),
        ([("user", [{"type": "text"}])], "message 1: the content must be a string, got [{"),
        ([("user", "x"), ("assistant", " \n")], "message 2: the assistant's content is empty"),
        ([("user", "x")], "the last message must be the assistant's, not the user's"),
        ([("system", "x")], "the last message must be the assistant's, not the system's"),
    ],
)
def test_a_wrong_conversation_is_refused_with_its_place(messages: Any, reason: str) -> None:
    pairs = isinstance(messages, list) and all(isinstance(pair, tuple) for pair in messages)
    given = (
        [dict(zip(("role", "content"), pair, strict=True)) for pair in messages]
        if pairs
        else messages
    )
    assert reason in refused(check_messages, given, answered=True, place="talk")
