"""Generator: strings in, strings out; a model and a tokenizer together.

    generator = gpt2c.Generator.from_pretrained("gpt2")  # or Generator(model, tokenizer)
    for piece in generator.stream("Once upon", max_new_tokens=50, stop=["."]):
        print(piece, end="", flush=True)

A character or a stop string may span tokens, so a piece is yielded only when it is certain.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from gpt2c.formats.load import find_model
from gpt2c.generate.continuation import Look, Streamed, continue_prompts
from gpt2c.generate.sampling import FROM_GENERATOR, GenerationConfig, TextSettings, likeliest, shows
from gpt2c.kernels.backend import Backend, BackendName
from gpt2c.kernels.checks import check_kind, several, whole
from gpt2c.kernels.memory import Array
from gpt2c.model.inputs import check_prompts
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.reader import CacheType, check_cache
from gpt2c.pretrained import open_found
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Continuation", "Generator", "Token", "Writer"]

Allowed = Collection[str] | Literal["all"]
Why = Literal["end", "stop", "length"]


class Token(NamedTuple):
    """A generated token, and the model's probabilities of it and of others.

    Attributes
    ----------
    id : of the token
    data : its bytes, which may be a part of a character
    probability : the softmax of the model's logits, before temperature, top_k, top_p, min_p and
        penalties
    candidates : (id, probability) of the likeliest tokens, the likeliest first
    """

    id: int
    data: bytes
    probability: float
    candidates: list[tuple[int, float]]


class Continuation(str):
    """A generated text: a string that also knows why it ended.

    Parameters
    ----------
    text : the string
    ended : "end" (a token that ends a text), "stop" (a stop string) or "length" (it has
        max_new_tokens, or the context is full)
    """

    ended: Why

    def __new__(cls, text: str, ended: Why) -> Self:
        """Return the string, which knows why it ended."""
        self = super().__new__(cls, text)
        self.ended = ended
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[str, Why]]:  # for a copy or pickle
        return type(self), (str(self), self.ended)


class Writer:
    """Turns the tokens of one text into its characters, up to the first stop string.

    Parameters
    ----------
    tokenizer : of the tokens
    stops : strings that end the text; they are not part of it
    least : the number of tokens after which a stop string may begin
    silent : tokens without text
    ends : tokens that end the text

    Attributes
    ----------
    count : the number of tokens
    ended : why the text ends here, see `Continuation`
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        least: int,
        silent: Collection[int],
        ends: Collection[int] = (),
    ) -> None:
        self.count = 0
        self.ended: Why = "length"
        self._tokenizer = tokenizer
        self._stops = stops
        self._least = least
        self._silent = silent
        self._ends = ends
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._certain = ""  # certain, and not yet taken
        self._open = ""  # may be the beginning of a stop string

    def __call__(self, token: int) -> bool:
        """Add a token; return whether a stop string has come."""
        self.count += 1
        self.ended = "end" if token in self._ends else "length"
        if token not in self._silent:
            self._open += self._decode(self._tokenizer.token_bytes(token))
        held = 0
        if self.count > self._least:
            places = [self._open.find(stop) for stop in self._stops]
            found = [place for place in places if place >= 0]
            if found:
                self._open, self.ended = self._open[: min(found)], "stop"
            else:
                held = max((_overlap(self._open, stop) for stop in self._stops), default=0)
        size = len(self._open) - held
        self._certain += self._open[:size]
        self._open = self._open[size:]
        return self.ended == "stop"

    def take(self, last: bool = False) -> str:
        """Return the characters that became certain since the last call; with `last`, all left."""
        if last and self.ended != "stop":
            self._certain += self._open + self._decode(b"", final=True)
        piece, self._certain = self._certain, ""
        return piece

    def text(self) -> Continuation:
        """Return the characters that were not taken, all that is left."""
        return Continuation(self.take(last=True), self.ended)


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of text that could begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


# The settings of a call, and a function that makes the writer of each of its texts.
Plan = tuple[GenerationConfig, Callable[[], Writer]]


class Generator:
    """Continues texts.

    Parameters
    ----------
    model : a `GPT2` or `Llama`
    tokenizer : its tokenizer
    eos_token_id : a token id or several that end a text unless a call names others; None is the
        tokenizer's end of text
    cache : the type of keys and values unless a call names another, see `gpt2c.GenerationConfig`

    Attributes
    ----------
    count : the number of tokens generated so far, by all calls
    eos_token_id, cache : see above

    Raises
    ------
    ValueError : the tokenizer has tokens that the model lacks; a model may have more, as padding,
        which are never chosen; an end that is no token of the model, or an unknown cache

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1)
    >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
    >>> text = generator.generate("hello", max_new_tokens=8, top_p=0.9, seed=1)
    >>> "".join(generator.stream("hello", max_new_tokens=8, top_p=0.9, seed=1)) == text
    True
    >>> text.ended
    'length'
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        eos_token_id: int | Collection[int] | None = None,
        cache: CacheType = "fp32",
    ) -> None:
        check_cache(cache)
        check_kind("model", model, LanguageModel, "a GPT2 or Llama")
        check_kind("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
        self.unused = tokenizer.unused_ids(model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.eot if eos_token_id is None else eos_token_id
        self.cache = cache
        self.count = 0
        GenerationConfig(eos_token_id=self.eos_token_id).ends(model.config.vocab_size)

    def __repr__(self) -> str:
        return f"Generator({self.model!r}, {self.tokenizer!r})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        backend: BackendName | Backend = "auto",
        quantize: Literal["int8", "fp16"] | None = None,
        revision: str | None = None,
        threads: int | None = None,
        cache: CacheType = "fp32",
        adapter: str | os.PathLike[str] | None = None,
        check_base: bool = True,
    ) -> Generator:
        """Load a model and its tokenizer together, from a directory or the hub.

        A text ends at the eos_token_id of generation_config.json, one or several, as in
        transformers. Without one, it ends at the tokenizer's end of text.

        Parameters
        ----------
        path_or_name, backend, revision, threads, adapter, check_base : see `GPT2.from_pretrained`
        quantize : see there; None keeps a model quantized that was saved so
        cache : see `Generator`

        Raises
        ------
        OSError : a file is missing or cannot be read or downloaded
        ValueError : a file is damaged, or model and tokenizer do not belong together

        Examples
        --------
        >>> import tempfile
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     model.save_pretrained(directory)
        ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory)
        ...     generator = gpt2c.Generator.from_pretrained(directory)
        >>> generator.model.config == model.config
        True
        """
        found = find_model(path_or_name, revision, adapter, check_base)
        model = open_found(found, backend, quantize, threads)
        tokenizer = Tokenizer.from_pretrained(found.path)
        # A smaller vocabulary lacks transformers' default, 50256.
        known = [token for token in found.ends if 0 <= token < tokenizer.vocab_size]
        return cls(model, tokenizer, known or None, cache)

    @overload
    def generate(
        self,
        prompt: str,
        *,
        num_return_sequences: Literal[1] | None = 1,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        allowed_special: Allowed = (),
        **settings: Unpack[TextSettings],
    ) -> Continuation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        num_return_sequences: int | None = 1,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        allowed_special: Allowed = (),
        **settings: Unpack[TextSettings],
    ) -> list[Continuation]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_return_sequences: int | None = 1,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        allowed_special: Allowed = (),
        **settings: Unpack[TextSettings],
    ) -> Continuation | list[Continuation]: ...

    @shows(TextSettings, eos_token_id=FROM_GENERATOR, cache=FROM_GENERATOR)
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_return_sequences: int | None = 1,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        allowed_special: Allowed = (),
        **settings: Unpack[TextSettings],
    ) -> Continuation | list[Continuation]:
        """Continue one text or several together.

        Parameters
        ----------
        prompt : a string, or several; an empty one starts a new text. `model.generate` continues
            token ids
        num_return_sequences : the number of continuations of each prompt
        stop : a string or several that end a text, and are no part of it
        max_new_tokens : the most tokens to add
        allowed_special : the names of special tokens to recognize in the prompt, or "all", see
            `Tokenizer.encode`
        eos_token_id : a token id or several that end a text; None for none; left out, the
            generator's
        cache : the type of the keys and values in memory, "fp32", "fp16" or "int8"; None is the
            generator's
        settings : others of transformers, which gpt2c lacks, at values that leave them off

        Returns
        -------
        the text after the prompt, up to the end or a stop string: a string that knows why it ended;
        for several prompts, or num_return_sequences above 1, a list of such strings

        Raises
        ------
        ValueError : a setting is out of range, or a prompt is not a string or is longer than the
            context
        TypeError : an unknown setting

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> texts = generator.generate(["Once", "Then"], max_new_tokens=8, temperature=0.8, seed=1)
        >>> len(texts)
        2
        """
        plan = self.plan(
            stop=stop,
            max_new_tokens=max_new_tokens,
            num_return_sequences=num_return_sequences,
            **settings,
        )
        copies = plan[0].num_return_sequences
        writers, steps = self._begin(_strings("prompt", prompt, "generate"), plan, allowed_special)
        for _ in steps:
            pass
        self.count += sum(writer.count for writer in writers)
        texts = [writer.text() for writer in writers]
        return texts[0] if isinstance(prompt, str) and copies == 1 else texts

    def embed(self, texts: str | Sequence[str]) -> Array:
        """Return a vector for each text, see `gpt2c.GPT2.embed`; an empty one is its end of text.

        Parameters
        ----------
        texts : a string, or several

        Returns
        -------
        (C,) float32 for a string, (N, C) for N of them

        Raises
        ------
        ValueError : no texts, or one longer than the context

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> generator.embed("hello").shape, generator.embed(["hello", "world"]).shape
        ((32,), (2, 32))
        """
        several = _strings("texts", texts, "embed")
        vectors = self.model.embed([self._ids(text) for text in several])
        return vectors[0] if isinstance(texts, str) else vectors

    @shows(TextSettings, eos_token_id=FROM_GENERATOR, cache=FROM_GENERATOR)
    def stream(
        self,
        prompt: str,
        *,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        allowed_special: Allowed = (),
        **settings: Unpack[TextSettings],
    ) -> Iterator[str]:
        """Continue one text, yielding each piece as soon as it is certain; see `generate`.

        No piece ends within a character.

        Parameters
        ----------
        prompt : a string; an empty one starts a new text
        stop : a string or several that end the text, and are no part of it
        max_new_tokens : the most tokens to add
        allowed_special, eos_token_id, cache : see `generate`
        settings : others of transformers, which gpt2c lacks, at values that leave them off

        Raises
        ------
        ValueError : see `generate`; raised at once, not at the first piece

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> pieces = [*generator.stream("Once", max_new_tokens=8, seed=1)]
        >>> "".join(pieces) == generator.generate("Once", max_new_tokens=8, seed=1)
        True
        """
        plan = self.plan(stop=stop, max_new_tokens=max_new_tokens, **settings)
        writers, steps = self._begin_one(prompt, plan, allowed_special)

        def pieces() -> Iterator[str]:
            for _ in steps:
                self.count += 1
                if piece := writers[0].take():
                    yield piece
            if piece := writers[0].take(last=True):
                yield piece

        return pieces()

    @shows(TextSettings, eos_token_id=FROM_GENERATOR, cache=FROM_GENERATOR)
    def tokens(
        self,
        prompt: str,
        candidates: int = 5,
        *,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        allowed_special: Allowed = (),
        **settings: Unpack[TextSettings],
    ) -> Iterator[Token]:
        """Continue one text token by token, with the probability of each; see `generate`.

        The token that ends the text, or completes a stop string, is yielded too.

        Parameters
        ----------
        prompt, stop, max_new_tokens, allowed_special, eos_token_id, cache : see `generate`
        candidates : the number of likeliest tokens to name beside each token
        settings : others of transformers, which gpt2c lacks, at values that leave them off

        Raises
        ------
        ValueError : see `generate`; raised at once, not at the first token

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> token = next(generator.tokens("Once", candidates=3, temperature=0))
        >>> token.id == token.candidates[0][0], len(token.candidates)
        (True, 3)
        """
        if whole("candidates", candidates) < 0:
            raise ValueError(f"candidates must be at least 0, got {candidates}")
        new: list[Token] = []

        def look(token: int, logits: NDArray[Any]) -> None:
            shares = np.exp(logits.astype(np.float64) - logits.max())
            shares /= shares.sum()
            best = likeliest(logits, candidates) if candidates else np.empty(0, np.int64)
            best = best[np.argsort(-logits[best], kind="stable")]
            best = best[logits[best] > -np.inf]  # no padding
            pairs = list(zip(best.tolist(), shares[best].tolist(), strict=True))
            data = self.tokenizer.token_bytes(token)
            new.append(Token(token, data, float(shares[token]), pairs))

        plan = self.plan(stop=stop, max_new_tokens=max_new_tokens, **settings)
        _, steps = self._begin_one(prompt, plan, allowed_special, look)

        def tokens() -> Iterator[Token]:
            for _ in steps:
                self.count += 1
                yield new.pop(0)

        return tokens()

    def _begin_one(
        self, prompt: str, plan: Plan, allowed: Allowed, look: Look | None = None
    ) -> tuple[list[Writer], Iterator[Streamed]]:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a string, got {type(prompt).__name__}")
        if plan[0].num_return_sequences > 1:
            raise ValueError("stream and tokens continue one text: leave num_return_sequences out")
        return self._begin([prompt], plan, allowed, look)

    def _begin(
        self, prompts: Sequence[str], plan: Plan, allowed: Allowed, look: Look | None = None
    ) -> tuple[list[Writer], Iterator[Streamed]]:
        config, writer = plan
        ids = [self._ids(text, allowed) for text in prompts]
        writers: list[Writer] = []
        prompts_ids = check_prompts(self.model.config, ids)
        steps = continue_prompts(self.model, prompts_ids, config, writers, look, self.unused)
        copies = config.num_return_sequences
        for _ in range(len(ids) * copies):  # after continue_prompts: it may refuse so many texts
            writers.append(writer())
        return writers, steps

    def _ids(self, text: str, allowed: Allowed = ()) -> list[int]:
        """Return the ids of a text, after `eot` if its tokenizer begins texts so."""
        start, ids = [self.tokenizer.eot], self.tokenizer.encode(text, allowed)
        adds = self.tokenizer.add_bos_token and ids[:1] != start
        return start + ids if adds else ids or start

    def plan(
        self,
        *,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        num_return_sequences: int | None = 1,
        **settings: Unpack[TextSettings],
    ) -> Plan:
        """Return the settings of a call, and a function that makes the writer of each of its texts.

        Raises
        ------
        ValueError, TypeError : see `generate`
        """
        stops = [] if stop is None else several(stop)
        for text in stops:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be strings of at least one character, got {text!r}")
        if settings.get("cache") is None:
            settings["cache"] = self.cache
        settings.setdefault("eos_token_id", self.eos_token_id)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences, **settings
        )
        if config.logprobs:
            raise ValueError("logprobs belong to tokens: use model.generate(ids, logprobs=True)")
        special = {*self.tokenizer.special_tokens.values()}
        ends = config.ends(self.model.config.vocab_size)
        silent = {self.tokenizer.eot} | (ends & special)
        return config, lambda: Writer(self.tokenizer, stops, config.min_new_tokens, silent, ends)


def _strings(name: str, texts: Any, door: str) -> list[str]:
    """Return one text or several as a list; `door` is the model's method for token ids."""
    given = several(texts)
    if not given:
        raise ValueError(f"{name} must be a string or a list of at least one, got none")
    for text in given:
        if not isinstance(text, str):
            is_id = isinstance(text, np.ndarray | np.integer | int)
            hint = f", which is for model.{door}" if is_id else ""
            raise ValueError(f"{name} must be a string or a list of them, got {text!r:.50}{hint}")
    return given
