"""gpt2c chat: lines in, answers out; its commands, Ctrl-C, full contexts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.command import SPEED, Terminal

from gpt2c import GPT2, Chat, Generator, GPT2Config, Tokenizer
from gpt2c.screen.terminal import visible
from gpt2c.text.chat import CHAT_TEMPLATE

Run = Callable[[str], tuple[int, str, str]]
HELP = "/reset begins a new conversation, Ctrl-C ends an answer, Ctrl-D the program."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model that babbles: it sees all that was said before."""
    path = tmp_path_factory.mktemp("world")
    model = GPT2(GPT2Config(257, n_positions=100, n_embd=16, n_layer=1, n_head=2), seed=2)
    for array in model.parameters.values():
        array *= 20 if array.ndim == 2 else 1
    tokenizer = Tokenizer.from_name("bytes")
    for name, template in ("base", None), ("other", "{{ messages }}"), ("run", CHAT_TEMPLATE):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path / name)
        model.save_pretrained(path / name)
    return path


@pytest.fixture(autouse=True)
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes a text the standard input; there is none otherwise."""

    def say(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    say("")
    return say


def answers(world: Path, *lines: str, system: str | None = None) -> list[str]:
    chat = Chat(Generator.from_pretrained(world / "run"), system, temperature=0, max_new_tokens=5)
    return [chat.ask(line) for line in lines]


CALL = "chat run --temperature 0 --max-new-tokens 5"


def test_each_line_is_a_message(gpt2c: Run, world: Path, say: Callable[[str], None]) -> None:
    first, second = answers(world, "Hi", "Why?")
    assert first != answers(world, "Why?")[0] != second
    say("Hi\n\nWhy?")
    code, out, err = gpt2c(CALL)
    assert (code, out) == (0, f"{first}\n---\n---\n{second}\n---\n")
    assert int(re.fullmatch(SPEED, err)[1]) == 10
    say("Hi\n")
    told = answers(world, "Hi", system="-x")[0]
    assert told != first and gpt2c(f"{CALL} --system -x")[:2] == (0, f"{told}\n---\n")
    say("")
    assert gpt2c(CALL) == (0, "", "")


def test_commands(gpt2c: Run, world: Path, say: Callable[[str], None]) -> None:
    say("Hi\n/reset\nHi\n/help\n/rest\n")
    code, out, err = gpt2c(CALL)
    assert (code, out) == (0, f"{answers(world, 'Hi')[0]}\n---\n---\n" * 2 + "---\n")
    assert err.startswith(f"{HELP}\nno command /rest; {HELP}\n")
    said = answers(world, "/help me", "/")
    say("/help me\n/\n")
    assert gpt2c(CALL)[1] == "".join(f"{answer}\n---\n" for answer in said)


def test_a_full_context_is_said(gpt2c: Run, world: Path, say: Callable[[str], None]) -> None:
    say("0123456789\n" * 3 + "x" * 99)
    code, out, err = gpt2c(CALL)
    told = "(the context is full; forgotten, from the start: 1 turn)\n"
    assert code == 0 and out.count("---\n") == 4
    assert err.startswith(f"{told}gpt2c: the question is 119 tokens; this model's context is 1")


def test_flags_of_sampling(gpt2c: Run, say: Callable[[str], None]) -> None:
    texts = []
    for seed in (1, 1, 2):
        say("Hi\nHi\n")
        texts.append(gpt2c(f"chat run --temperature 9 --max-new-tokens 5 --seed {seed}")[1])
    assert texts[0] == texts[1] != texts[2]
    say("Hi\n")
    greedy = gpt2c(CALL)[1]
    for flags in ("--top-k 1", "--top-p 0.001", "--min-p 1", "--quantize fp16 --top-k 1"):
        say("Hi\n")
        assert gpt2c(f"{CALL.replace(' 0', ' 9')} {flags}")[1] == greedy
    say("Why?\n")
    answer = gpt2c(CALL)[1]
    say("Why?\n")
    place = next(place for place, letter in enumerate(answer) if letter.isalnum())
    assert gpt2c(f"{CALL} --stop {answer[place]}")[1] == f"{answer[:place]}\n---\n"


def test_a_model_without_a_template_is_told_apart(
    gpt2c: Run, world: Path, say: Callable[[str], None]
) -> None:
    say("Hi\n")
    code, out, err = gpt2c(CALL.replace("run", "base"))
    assert (code, out) == (0, f"{answers(world, 'Hi')[0]}\n---\n")
    assert err.startswith(
        "base has no chat template: it has not learned from conversations, as gpt2c sft"
    )
    code, out, err = gpt2c("chat other")
    assert (code, out) == (2, "") and err.startswith("gpt2c: the model has a chat template of its")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("chat missing", "the file or directory missing does not exist here"),
        ("chat run --max-new-tokens 0", "max_new_tokens must be at least 1 in a chat"),
        ("chat run --system= ", "message 1: the system's content is empty"),
        ("chat run --top-k -1", "top_k must be at least 0"),
        ("chat run --seed -1", "seed must be at least 0"),
    ],
)
def test_bad_input_is_one_line(gpt2c: Run, arguments: str, reason: str) -> None:
    code, out, err = gpt2c(arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err


# ---- a terminal ----------------------------------------------------------------------------------


class Keys(Terminal):
    """A terminal whose user types lines, or presses a key: an exception."""

    def __init__(self, *typed: str | type[BaseException]) -> None:
        super().__init__()
        self._typed = iter(typed)

    def readline(self, size: int = -1) -> str:
        line = next(self._typed, "")
        if isinstance(line, str):
            return line
        raise line


def test_ctrl_c_ends_the_answer_only(
    gpt2c: Run, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Chat.say

    def stopped(self: Chat, text: str) -> Iterator[str]:
        pieces = right(self, text)
        if text != "stop":
            return pieces

        def first() -> Iterator[str]:
            yield next(pieces)
            raise KeyboardInterrupt

        return first()

    monkeypatch.setattr(Chat, "say", stopped)
    monkeypatch.setattr("sys.stdin", Keys("stop\n", "Hi\n", KeyboardInterrupt, "Why?\n"))
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    code, _, err = gpt2c(CALL)
    assert code == 0
    shown = screen.getvalue()
    chat = Chat(Generator.from_pretrained(world / "run"), temperature=0, max_new_tokens=5)
    begun = next(right(chat, "stop"))
    expected = [begun, chat.ask("Hi"), chat.ask("Why?")]
    assert [message.content for message in chat.messages[1::2]] == expected
    assert shown.count("> ") == 5 and "---" not in shown
    assert err.startswith(f"Each line is a message. {HELP}\n\n(Ctrl-D or Ctrl-C again ends")
    assert all(visible(answer) in shown for answer in expected)


def test_ctrl_c_twice_at_the_prompt_ends_the_program(
    gpt2c: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = Keys("Hi\n", KeyboardInterrupt, KeyboardInterrupt, "never\n")
    monkeypatch.setattr("sys.stdin", typed)
    code, _, err = gpt2c(CALL)
    assert code == 130 and err.endswith("gpt2c: interrupted\n") and typed.readline() == "never\n"
