"""The decoding loop: each step adds a token to each text, with random numbers of that text.

Knows a decoder, which reads tokens and returns logits; knows nothing about weights or strings.
`stream` serves the batch of one call; in gpt2c.generate.engine requests join and leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2c.generate.sampling import GenerationConfig, choose
from gpt2c.model.language_model import LanguageModel

__all__ = [
    "Ids",
    "Logprobs",
    "Look",
    "Streamed",
    "Text",
    "continue_prompts",
    "read_newest",
    "read_prompt",
    "step",
    "stream",
]

IntArray = NDArray[np.int32]
ShouldEnd = Callable[[int], bool]
Look = Callable[[int, NDArray[Any]], None]
Ids = NDArray[np.int64]
Logprobs = NDArray[np.float64]
Streamed = Ids | tuple[Ids, Logprobs]


class DecoderLike(Protocol):
    """The part of `gpt2c.model.reader.Decoder` that the decoding loop uses."""

    capacity: int

    def read(self, tokens: IntArray, slot: int, position: int) -> NDArray[Any]: ...
    def step(self, tokens: IntArray, slots: IntArray, positions: IntArray) -> NDArray[Any]: ...
    def copy(self, source: int, target: int, length: int) -> None: ...


class Text:
    """A text that is being continued.

    Parameters
    ----------
    prompt : token ids to begin with, at least one
    settings : of its generation; max_new_tokens is at least 1
    ends : token ids that end it
    slot : its place in the decoder
    number : its index in the call; seed and number together determine the random numbers
    should_end : called with each new token; if it returns True, the text ends
    look : called with each new token and the logits (V,) that it was chosen from
    unused : ids of the model that have no token, such as padding: they are never chosen, and their
        probability is 0

    Attributes
    ----------
    tokens : prompt and new token ids
    count : the number of new tokens
    ended : why it ended: "end" (an id of `ends`, or `should_end` returned True) or "length" (it has
        max_new_tokens, or the context is full); None before its end
    logprob : log-probability of the newest token in nats, if settings.logprobs
    position : the number of tokens in the decoder's slot
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: GenerationConfig,
        ends: Collection[int],
        slot: int,
        number: int = 0,
        should_end: ShouldEnd | None = None,
        look: Look | None = None,
        unused: Sequence[int] = (),
    ) -> None:
        self.tokens = list(prompt)
        self.count = 0
        self.ended: Literal["end", "length"] | None = None
        self.logprob = 0.0
        self.position = 0
        self.slot = slot
        self._settings = settings
        self._ends = ends
        self._should_end = should_end
        self._look = look
        self._unused = unused
        seed = None if settings.seed is None else (settings.seed, number)
        self._rng = np.random.default_rng(seed)

    def choose(self, logits: NDArray[Any]) -> int:
        """Choose the next token by its logits (V,), append and return it; set `ended` at the end.

        The logits of unused ids become -inf.
        """
        settings = self._settings
        if self._unused:
            logits[self._unused] = -np.inf
        forbidden = self._ends if self.count < settings.min_new_tokens else ()
        token = choose(logits, settings, self._rng, self.tokens, forbidden)
        if settings.logprobs:
            largest = float(logits.max())
            total = np.exp(logits - largest, dtype=np.float64).sum()
            self.logprob = float(logits[token]) - largest - math.log(total)
        if self._look is not None:
            self._look(token, logits)
        self.tokens.append(token)
        self.count += 1
        if (self._should_end is not None and self._should_end(token)) or token in self._ends:
            self.ended = "end"
        elif self.count == settings.max_new_tokens:
            self.ended = "length"
        return token

    def make_room(self, capacity: int) -> IntArray:
        """Make room for the newest token: if the context is full, forget tokens or end the text.

        Keys depend on positions, so the tokens that stay must be read again from position 0. Half
        the context stays: with more, such a read would be necessary more often.

        Returns
        -------
        (T,) int32, the tokens to read again, with the newest; empty if there is room or at the end
        """
        if self.position == capacity and self._settings.on_full == "stop":
            self.ended = "length"
        if self.position < capacity or self.ended is not None:
            return np.empty(0, np.int32)
        self.position = 0
        return np.array(self.tokens[-max(1, capacity // 2) :], np.int32)


def read_prompt(decoder: DecoderLike, texts: Sequence[Text], known: int = 0) -> None:
    """Read the prompt of texts that share it, once; then each text chooses its next token.

    The slot of the first text already holds the first `known` tokens, of which it has more.
    """
    first = texts[0]
    tokens = np.array(first.tokens, np.int32)
    logits = decoder.read(tokens[known:], first.slot, known)
    for text in texts:
        if text is not first:
            decoder.copy(first.slot, text.slot, len(tokens))
        text.position = len(tokens)
        text.choose(logits)


def read_newest(decoder: DecoderLike, texts: Sequence[Text]) -> NDArray[Any]:
    """Read the newest token of each text, all at once; return the logits (N, V) of the next."""
    tokens = np.array([text.tokens[-1] for text in texts], np.int32)
    slots = np.array([text.slot for text in texts], np.int32)
    positions = np.array([text.position for text in texts], np.int32)
    logits = decoder.step(tokens, slots, positions)
    for text in texts:
        text.position += 1
    return logits


def step(decoder: DecoderLike, texts: Sequence[Text]) -> None:
    """Read the newest token of each text, which is still unread, and choose the next one.

    A text that fills its context, with on_full="stop", ends here without a new token.
    """
    going = []
    for text in texts:
        kept = text.make_room(decoder.capacity)
        if len(kept):
            text.position = len(kept)
            text.choose(decoder.read(kept, text.slot, 0))
        elif text.ended is None:
            going.append(text)
    if going:
        for text, logits in zip(going, read_newest(decoder, going), strict=True):
            text.choose(logits)


def stream(
    decoder: DecoderLike,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    ends: Collection[int],
    should_ends: Sequence[ShouldEnd] | None = None,
    look: Look | None = None,
    unused: Sequence[int] = (),
) -> Iterator[Streamed]:
    """Continue prompts together, yielding each step's tokens as soon as they are chosen.

    A text that has ended repeats its last token until all have ended. The token that ends a text is
    yielded too.

    Parameters
    ----------
    decoder : with a slot for each text
    prompts : token ids, at least one each
    settings, ends, look, unused : see `Text`
    should_ends : one for each text, in the order of the rows

    Returns
    -------
    an iterator of (B,) int64 token ids, B = len(prompts) * num_return_sequences; with logprobs, of
    pairs of them and their log-probabilities (B,) float64 in nats, 0 for texts that have ended
    """
    copies = settings.num_return_sequences
    texts = [
        Text(
            prompt,
            settings,
            ends,
            slot,
            slot,
            should_ends[slot] if should_ends else None,
            look,
            unused,
        )
        for slot, prompt in enumerate(prompt for prompt in prompts for _ in range(copies))
    ]
    if settings.max_new_tokens == 0:
        return
    for first in range(0, len(texts), copies):
        read_prompt(decoder, texts[first : first + copies])
    count = 1
    while any(text.count == count for text in texts):
        ids = np.array([text.tokens[-1] for text in texts], np.int64)
        if settings.logprobs:
            new = [text.logprob if text.count == count else 0.0 for text in texts]
            yield ids, np.array(new)
        else:
            yield ids
        step(decoder, [text for text in texts if text.ended is None])
        count += 1


def continue_prompts(
    model: LanguageModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    should_ends: Sequence[ShouldEnd] | None = None,
    look: Look | None = None,
    unused: Sequence[int] = (),
) -> Iterator[Streamed]:
    """Continue prompts with a model; for `should_ends`, `look` and `unused` see `stream`."""
    ends = config.ends(model.config.vocab_size)
    longest = max(len(prompt) for prompt in prompts) + config.max_new_tokens
    capacity = min(longest, model.config.n_positions)
    count = len(prompts) * config.num_return_sequences
    decoder = model.decoder(count, capacity, config.cache)
    return stream(decoder, prompts, config, ends, should_ends, look, unused)
