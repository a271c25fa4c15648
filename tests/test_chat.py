"""Chat: what the model reads and remembers, full contexts, answers that end early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c import GPT2, Chat, Generator, GPT2Config, Tokenizer
from gpt2c.kernels.backend import get_backend
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.reader import Decoder
from gpt2c.text.chat import CHAT_TEMPLATE, Message, encode_chat

BYTES = Tokenizer.from_name("bytes")
BPE = Tokenizer.train(["the assistant and the user: hello, hello"] * 3, 280)


class Upper:
    """A decoder of bytes that answers a question in capitals, and keeps what it read."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen: list[int] = []
        self.reads: list[int] = []  # how many tokens each read had
        self.interrupt = False

    def read(self, tokens: np.ndarray, slot: int, position: int) -> np.ndarray:
        assert slot == 0 and 0 < len(tokens) and position <= len(self.seen)
        self.seen[position:] = []  # what is there is overwritten, or is no longer valid
        if self.interrupt:
            raise KeyboardInterrupt
        return self._add(tokens)

    def step(self, tokens: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        assert len(tokens) == 1 and positions[0] == len(self.seen)
        return self._add(tokens)[None]

    def _add(self, tokens: np.ndarray) -> np.ndarray:
        self.reads.append(len(tokens))
        self.seen += tokens.tolist()
        assert len(self.seen) <= self.capacity
        question, answer = self.text.rsplit("user:\n", 1)[1].split("\n\nassistant:\n")
        left = question.upper()[len(answer) :].encode()
        logits = np.zeros(BYTES.vocab_size)
        logits[left[0] if left else BYTES.eot] = 1e4
        return logits

    @property
    def text(self) -> str:
        return BYTES.decode(self.seen)


class Capitals(LanguageModel):
    """A model whose only decoder is an `Upper`."""

    def __init__(self, capacity: int) -> None:
        config = GPT2Config(257, n_positions=capacity, n_embd=1, n_layer=1, n_head=1)
        super().__init__(config, get_backend("numpy"))
        self.upper = Upper(capacity)

    def decoder(self, slots: int = 1, capacity: int | None = None, cache: str = "fp32") -> Any:
        return self.upper


def capitals(capacity: int = 400, system: str | None = None, **settings: Any) -> tuple[Chat, Upper]:
    model = Capitals(capacity)
    return Chat(Generator(model, BYTES), system, temperature=0, **settings), model.upper


def babbling(tokenizer: Tokenizer = BYTES, **settings: Any) -> Chat:
    """Return a chat with a random model: its answers depend on all that it reads."""
    config = GPT2Config(tokenizer.vocab_size, n_positions=400, n_embd=32, n_layer=2, n_head=2)
    model = GPT2(config, seed=2)
    for array in model.parameters.values():
        array *= 20 if array.ndim == 2 else 1
    return Chat(Generator(model, tokenizer), **settings)


# ---- what is read and remembered -----------------------------------------------------------------


def test_a_conversation_is_remembered() -> None:
    chat, upper = capitals(system=" Shout. ")
    assert chat.ask("hi") == "HI" and chat.ask(" well?\n") == "WELL?"
    assert chat.messages == [
        *[Message("system", " Shout. "), Message("user", "hi"), Message("assistant", "HI")],
        *[Message("user", " well?\n"), Message("assistant", "WELL?")],
    ]
    assert upper.text == (
        "<|endoftext|>system:\nShout.\n\nuser:\nhi\n\nassistant:\nHI<|endoftext|>"
        "user:\nwell?\n\nassistant:\nWELL?"
    )
    assert chat._generator.count == 9 and repr(chat).endswith(", 5 messages)")


def test_a_turn_reads_only_what_is_new() -> None:
    chat, upper = capitals(system="Shout.")
    chat.ask("hi")
    upper.reads.clear()
    chat.ask("well?")
    new = ["<|endoftext|>", *"user:\nwell?\n\nassistant:\n"]
    assert upper.reads == [len(new), *[1] * len("WELL?")]
    chat.reset()
    upper.reads.clear()
    chat.ask("so")
    assert upper.reads[0] == len("so\n\nassistant:\n")  # the system and "user:" are still there
    upper.reads.clear()
    chat.reset()
    chat.ask("so")
    assert upper.reads[0] == 1  # all of it is there but the logits


def test_blanks_around_an_answer_are_forgotten() -> None:
    chat, upper = capitals()
    pieces = chat.say("a b")
    assert next(pieces) + next(pieces) == "A "
    assert chat.ask("d") == "D" and chat.messages[1] == Message("assistant", "A ")
    assert upper.seen == encode_chat(BYTES, chat.messages)[0][:-1]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("room", [10, 1024])
def test_answers_are_those_of_a_conversation_that_is_read_at_once(
    tokenizer: Tokenizer, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept keys and values change nothing, also where their memory grows."""
    settings = {"system": "Be brief.", "temperature": 0, "max_new_tokens": 12}
    monkeypatch.setattr("gpt2c.chat.ROOM", room)
    chat = babbling(tokenizer, **settings)
    monkeypatch.undo()
    assert chat._decoder.capacity == min(room, 400)
    reads = []
    read = Decoder.read

    def counting(self: Decoder, tokens: Any, slot: int, position: int) -> Any:
        reads.append((position, len(tokens)))
        return read(self, tokens, slot, position)

    for question in ("Hi", "Why?", "And then?"):
        other = babbling(tokenizer, **settings)
        other.messages = [*chat.messages]
        expected = other.ask(question)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "read", counting)
            assert chat.ask(question) == expected and len(expected) > 1
    assert len({message.content for message in chat.messages[2::2]}) == 3
    assert reads[0][0] == 0 and all(position > 20 for position, _ in reads[1:])
    assert 100 < chat._decoder.capacity <= 400


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_chat_has_the_cache_that_it_is_told_also_where_its_memory_grows(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2c.chat.ROOM", 60)
    chat = babbling(temperature=0, max_new_tokens=12, cache=cache)
    for question in ("Hi", "Why?", "And then?"):
        assert chat.ask(question)
        assert chat._decoder.keys.dtype == {"fp16": np.float16, "int8": np.int8}[cache]
    assert chat._decoder.capacity > 60


def test_the_same_seed_has_the_same_conversation() -> None:
    def talk(seed: int) -> list[str]:
        chat = babbling(temperature=5, max_new_tokens=6, seed=seed)
        chat.ask("Hi")
        first = chat.messages[:]
        chat.reset()
        answers = [chat.ask("Hi"), chat.ask("Hi")]
        assert chat.messages[:2] == first  # a reset draws the same again
        return answers

    assert talk(1) == talk(1) != talk(2) and len(set(talk(1))) == 2


# ---- a full context ------------------------------------------------------------------------------


def test_the_oldest_turns_are_forgotten_whole() -> None:
    chat, upper = capitals(100, system="Shout.", max_new_tokens=20)
    forgotten = []
    for number in range(6):
        assert chat.ask(f"number {number}") == f"NUMBER {number}"
        assert upper.seen == encode_chat(BYTES, chat.messages)[0][:-1]
        assert chat.messages[0] == Message("system", "Shout.")
        forgotten.append(chat.forgotten)
        kept = [message.content for message in chat.messages[1::2]]
        assert kept == [f"number {n}" for n in range(chat.forgotten, number + 1)]
    assert forgotten == [0, 0, 1, 2, 3, 4]  # the first two take 80 tokens and room for 20
    chat.reset()
    assert chat.forgotten == 0


def test_room_for_an_answer_is_a_quarter_of_the_context_at_most() -> None:
    turn = 1 + len("user:\nab\n\nassistant:\nAB")
    for context, turns in ((4 * turn, 3), (4 * turn - 4, 2)):
        chat, _ = capitals(context, max_new_tokens=1000)
        for _ in range(6):
            chat.ask("ab")
        assert len(chat.messages) == 2 * turns


def test_an_answer_ends_where_the_context_is_full() -> None:
    size = 1 + len("user:\nabcdef\n\nassistant:\n")
    chat, upper = capitals(size + 2)
    assert chat.ask("abcdef") == "ABC" and len(upper.seen) == size + 2  # the last is not read
    assert chat.ask("abcdef") == "ABC" and chat.forgotten == 1
    chat, _ = capitals(size)
    assert chat.ask("abcdef") == "A"


def test_a_question_longer_than_the_context_is_refused_and_nothing_forgotten() -> None:
    chat, _ = capitals(60, system="Shout.")
    chat.ask("hi")
    before = chat.messages[:]
    assert refused(chat.say, "x" * 25) == (
        "the question with the system message is 61 tokens; this model's context is 60"
        " (n_positions): give a shorter one"
    )
    assert (chat.messages, chat.forgotten) == (before, 0)
    assert chat.ask("ok") == "OK"
    chat, _ = capitals(30)
    assert refused(chat.say, "x" * 20).startswith("the question is 40 tokens; ")


# ---- answers that end early ----------------------------------------------------------------------


def test_what_was_said_of_an_answer_is_remembered() -> None:
    chat, upper = capitals()
    pieces = chat.say("hello")
    assert next(pieces) + next(pieces) == "HE"
    assert chat.ask("hi") == "HI"  # the new question ends the answer before
    assert list(pieces) == []
    assert [message.content for message in chat.messages] == ["hello", "HE", "hi", "HI"]
    assert upper.seen == encode_chat(BYTES, chat.messages)[0][:-1]


def test_a_turn_without_an_answer_is_not_kept() -> None:
    chat, upper = capitals()
    chat.say("hello")
    upper.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        chat.ask("hello")
    upper.interrupt = False
    assert chat.messages == []
    assert chat.ask("hi") == "HI" and len(chat.messages) == 2
    upper.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        chat.ask("hello")
    upper.interrupt = False
    assert chat.ask("so") == "SO"
    assert upper.seen == encode_chat(BYTES, chat.messages)[0][:-1]


def test_settings_end_an_answer() -> None:
    assert capitals(max_new_tokens=3)[0].ask("hello") == "HEL"
    assert capitals(stop="LL")[0].ask("hello") == "HE"
    assert capitals(eos_token_id=ord("O"))[0].ask("hello") == "HELLO"
    chat, _ = capitals(eos_token_id=ord("O"))
    assert chat.ask("hi") == "HI"  # the end of text, too


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"system": " "}, "message 1: the system's content is empty"),
        ({"system": 5}, "message 1: the content must be a string, got 5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1 in a chat, got 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"stop": ""}, "stop must be strings of at least one character"),
        ({"on_full": "slide"}, "leave num_return_sequences and on_full out"),
        ({"num_return_sequences": 2}, "leave num_return_sequences and on_full out"),
    ],
)
def test_bad_settings_are_refused(settings: Any, reason: str) -> None:
    assert reason in refused(babbling, **settings)


def test_bad_messages_are_refused() -> None:
    chat, _ = capitals()
    assert refused(chat.say, "\n") == "the chat: message 1: the user's content is empty"
    assert "must be a string, got None" in refused(chat.say, None)
    with pytest.raises(TypeError, match="no setting 'colour'"):
        babbling(colour=1)


def test_a_chat_opens_a_directory(tmp_path: Path) -> None:
    config = GPT2Config(257, n_positions=64, n_embd=4, n_layer=1, n_head=1)
    GPT2(config, seed=1).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_name("bytes")
    tokenizer.chat_template = f"{CHAT_TEMPLATE}\n"
    tokenizer.save_pretrained(tmp_path)
    chat = Chat(tmp_path, max_new_tokens=3, seed=1)
    assert chat.ask("Hi") and Chat(str(tmp_path / "model.safetensors"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert refused(Chat, tmp_path) == (
        "the model has a chat template of its own; gpt2c speaks only its plain one, which gpt2c sft"
        " teaches"
    )


def test_a_classifier_cannot_chat() -> None:
    config = GPT2Config(257, n_positions=64, n_embd=4, n_layer=1, n_head=1, num_labels=2)
    assert "reading text" in refused(Chat, Generator(GPT2(config), BYTES))
