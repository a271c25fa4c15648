"""Chat: a conversation with a model, which remembers what was said.

    chat = gpt2c.Chat("runs/sft")
    for piece in chat.say("Why is the sky blue?"):
        print(piece, end="", flush=True)

The ids of a conversation begin with those of its first messages (gpt2c.text.chat), so the keys and
values of all earlier turns are kept, and a turn reads only what is new.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Generator as Pieces
from itertools import takewhile
from typing import Unpack

from gpt2c.generate.continuation import Text, read_prompt, step
from gpt2c.generate.sampling import FROM_GENERATOR, ChatSettings, TextSettings, shows
from gpt2c.generator import Generator
from gpt2c.kernels.checks import counted
from gpt2c.text.chat import Message, check_messages, check_template, encode_chat

__all__ = ["Chat"]

ROOM = 1024  # tokens that there is memory for at first: a Llama's whole context may be too large


class Chat:
    """A conversation with a model.

    If the context has too little room for an answer (max_new_tokens, or a quarter of the context if
    that is less), the oldest turns are forgotten, each with its answer. An answer ends where the
    context is full.

    Parameters
    ----------
    generator : a `Generator`, or a path or name that `Generator.from_pretrained` opens
    system : what the model is told before all else; never forgotten
    stop, max_new_tokens : see `Generator.generate`
    settings : the other settings of `Generator.generate`, which says what each does; no on_full.
        With a seed, the same conversation has the same answers

    Attributes
    ----------
    messages : the messages that the model remembers; a turn without an answer is not kept
    forgotten : the number of turns that were forgotten

    Raises
    ------
    ValueError : a setting is out of range, the model has scores in place of logits, or a chat
        template that is not gpt2c's; `system` is empty
    OSError : see `Generator.from_pretrained`
    TypeError : an unknown setting

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=128, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1)  # it has learned nothing, so it babbles
    >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
    >>> chat = gpt2c.Chat(generator, system="Be brief.", max_new_tokens=8, seed=1)
    >>> answer = chat.ask("Hi")
    >>> [message.role for message in chat.messages]
    ['system', 'user', 'assistant']
    """

    @shows(ChatSettings, eos_token_id=FROM_GENERATOR, cache=FROM_GENERATOR)
    def __init__(
        self,
        generator: Generator | str | os.PathLike[str],
        system: str | None = None,
        *,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 256,
        **settings: Unpack[ChatSettings],
    ) -> None:
        if not isinstance(generator, Generator):
            generator = Generator.from_pretrained(generator)
        check_template(generator.tokenizer)
        whole: TextSettings = {"on_full": "stop", **settings}
        self._config, self._writer = generator.plan(
            stop=stop, max_new_tokens=max_new_tokens, **whole
        )
        if self._config.num_return_sequences > 1 or self._config.on_full != "stop":
            raise ValueError(
                "a chat has one answer at a time, which ends where the context is full: leave"
                " num_return_sequences and on_full out"
            )
        if self._config.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1 in a chat, got 0")
        self._ends = self._config.ends(generator.model.config.vocab_size)
        self._ends |= {generator.tokenizer.eot}
        self._generator = generator
        self._context = generator.model.config.n_positions
        capacity = min(ROOM, self._context)
        self._decoder = generator.model.decoder(1, capacity, self._config.cache)
        self._cached: list[int] = []  # the tokens whose keys and values the decoder has
        self._system = [] if system is None else check_messages([Message("system", system)])
        self._answer: Pieces[str, None, None] | None = None
        self.reset()

    def __repr__(self) -> str:
        return f"Chat({self._generator!r}, {counted(len(self.messages), 'message')})"

    def reset(self) -> None:
        """Begin a new conversation, with the same system message.

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> chat = gpt2c.Chat(generator, system="Be brief.", max_new_tokens=8, seed=1)
        >>> answer = chat.ask("Hi")
        >>> chat.reset()
        >>> [message.content for message in chat.messages]
        ['Be brief.']
        """
        self._end_answer()
        self.messages = [*self._system]
        self.forgotten = 0
        self._turns = 0

    def ask(self, text: str) -> str:
        """Return the answer to a text; see `say`.

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> chat = gpt2c.Chat(generator, max_new_tokens=8, seed=1)
        >>> chat.ask("Hi") == chat.messages[-1].content
        True
        """
        return "".join(self.say(text))

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer to a text, each piece as soon as it is certain.

        The answer that was yielded is remembered, also if the caller ends it early. A new call ends
        the answer of the one before.

        Raises
        ------
        ValueError : `text` is empty or no string, or it and the system message are longer than the
            context; raised at once, not at the first piece

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> chat = gpt2c.Chat(generator, max_new_tokens=8, seed=1)
        >>> pieces = [*chat.say("Hi")]
        >>> "".join(pieces) == chat.messages[-1].content
        True
        """
        self._end_answer()
        question = check_messages([*self.messages, Message("user", text)], place="the chat")[-1]
        ids = self._make_room(question)
        self._grow(len(ids) + self._config.max_new_tokens)
        self._turns += 1
        self._answer = self._pieces(question, ids, self._turns)
        return self._answer

    def _make_room(self, question: Message) -> list[int]:
        """Forget the oldest turns until an answer has room; return the ids that it continues."""
        tokenizer, context = self._generator.tokenizer, self._context
        ids, _ = encode_chat(tokenizer, [*self._system, question], answer=True)
        if len(ids) > context:
            told = " with the system message" if self._system else ""
            name = self._generator.model.config.context_name
            raise ValueError(
                f"the question{told} is {counted(len(ids), 'token')}; this model's context is"
                f" {context} ({name}): give a shorter one"
            )
        room = min(self._config.max_new_tokens, context // 4)
        while len(self.messages) > len(self._system):
            whole, _ = encode_chat(tokenizer, [*self.messages, question], answer=True)
            if len(whole) + room <= context:
                return whole
            del self.messages[len(self._system) : len(self._system) + 2]
            self.forgotten += 1
        return ids

    def _grow(self, size: int) -> None:
        """Take memory for `size` tokens, or for the whole context, and keep what is cached."""
        old = self._decoder
        if old.capacity < min(size, self._context):
            capacity = min(max(size, 2 * old.capacity), self._context)
            self._decoder = self._generator.model.decoder(1, capacity, self._config.cache)
            self._decoder.copy(0, 0, old.capacity, old)

    def _pieces(self, question: Message, ids: list[int], turn: int) -> Pieces[str, None, None]:
        """Read what is new of a conversation, and yield its answer."""
        writer, answer = self._writer(), ""
        text = Text(
            ids, self._config, self._ends, 0, turn, should_end=writer, unused=self._generator.unused
        )
        # The last token is read again in any case: its logits choose the first one of the answer.
        known = min(_count_equal(ids, self._cached), len(ids) - 1)
        try:
            read_prompt(self._decoder, [text], known)
            while text.ended is None:
                if piece := writer.take():
                    answer += piece
                    yield piece
                step(self._decoder, [text])
            if piece := writer.take(last=True):
                answer += piece
                yield piece
        finally:
            self._generator.count += text.count
            self._cached = text.tokens[: text.position]  # none, if it ended while it read the ids
            if answer.strip():
                self.messages += [question, Message("assistant", answer)]

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()


def _count_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
