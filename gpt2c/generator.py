"""Generator: strings in, strings out; a model and a tokenizer together.

    generator = gpt2c.Generator.from_pretrained("gpt2")  # or Generator(model, tokenizer)
    for piece in generator.stream("Once upon", max_new_tokens=50, stop=["."]):
        print(piece, end="", flush=True)

A character or a stop string may span tokens, so a piece is yielded only when it is certain.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from gpt2c.formats.load import find_model
from gpt2c.generate.continuation import Look, continue_prompts
from gpt2c.generate.sampling import GenerationConfig, TextSettings, likeliest
from gpt2c.kernels.backend import Backend
from gpt2c.kernels.checks import check_kind, whole
from gpt2c.kernels.memory import Array
from gpt2c.model.inputs import check_prompts
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.reader import check_cache
from gpt2c.pretrained import open_found
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Generator", "StringSettings", "Token", "Writer"]


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


class StringSettings(TextSettings, total=False):
    """`GenerationConfig`'s settings for strings, and the special tokens of their prompts."""

    allowed_special: Collection[str] | Literal["all"]


class Writer:
    """Turns the tokens of one text into its characters, up to the first stop string.

    Parameters
    ----------
    tokenizer : of the tokens
    stops : strings that end the text; they are not part of it
    least : the number of tokens after which a stop string may begin
    silent : tokens without text
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], least: int, silent: Collection[int]
    ) -> None:
        self.count = 0
        self._tokenizer = tokenizer
        self._stops = stops
        self._least = least
        self._silent = silent
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._certain = ""  # certain, and not yet taken
        self._open = ""  # may be the beginning of a stop string
        self._stopped = False

    def __call__(self, token: int) -> bool:
        """Add a token; return whether a stop string has come."""
        self.count += 1
        if token not in self._silent:
            self._open += self._decode(self._tokenizer.token_bytes(token))
        held = 0
        if self.count > self._least:
            places = [self._open.find(stop) for stop in self._stops]
            found = [place for place in places if place >= 0]
            if found:
                self._open, self._stopped = self._open[: min(found)], True
            else:
                held = max((_overlap(self._open, stop) for stop in self._stops), default=0)
        size = len(self._open) - held
        self._certain += self._open[:size]
        self._open = self._open[size:]
        return self._stopped

    def take(self, last: bool = False) -> str:
        """Return the characters that became certain since the last call; with `last`, all left."""
        if last and not self._stopped:
            self._certain += self._open + self._decode(b"", final=True)
        piece, self._certain = self._certain, ""
        return piece


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of text that could begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


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
        which are never chosen; or an unknown cache

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1)
    >>> generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
    >>> text = generator.generate("hello", max_new_tokens=8, top_p=0.9, seed=1)
    >>> "".join(generator.stream("hello", max_new_tokens=8, top_p=0.9, seed=1)) == text
    True
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        eos_token_id: int | Collection[int] | None = None,
        cache: str = "fp32",
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

    def __repr__(self) -> str:
        return f"Generator({self.model!r}, {self.tokenizer!r})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        backend: str | Backend = "auto",
        quantize: str | None = None,
        revision: str | None = None,
        threads: int | None = None,
        cache: str = "fp32",
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
        **settings: Unpack[StringSettings],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        num_return_sequences: int | None = 1,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        **settings: Unpack[StringSettings],
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_return_sequences: int | None = 1,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        **settings: Unpack[StringSettings],
    ) -> str | list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_return_sequences: int | None = 1,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        **settings: Unpack[StringSettings],
    ) -> str | list[str]:
        """Continue one text or several together.

        Parameters
        ----------
        prompt : a string, or several; an empty one starts a new text. `model.generate` continues
            token ids
        settings : fields of `gpt2c.GenerationConfig`; `stop` takes a string or several, and the
            defaults of eos_token_id and cache are the generator's. allowed_special, see
            `Tokenizer.encode`: the names of special tokens to recognize in the prompt, or "all"

        Returns
        -------
        the text after the prompt, up to the end or a stop string: a string; for several prompts, or
        num_return_sequences above 1, a list of strings

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
        given: dict[str, Any] = {
            **{"num_return_sequences": num_return_sequences, "stop": stop},
            **{"max_new_tokens": max_new_tokens, **settings},
        }
        writers, steps, copies = self._begin(_strings("prompt", prompt, "generate"), given)
        for _ in steps:
            pass
        self.count += sum(writer.count for writer in writers)
        texts = [writer.take(last=True) for writer in writers]
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

    def stream(
        self,
        prompt: str,
        *,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        **settings: Unpack[StringSettings],
    ) -> Iterator[str]:
        """Continue one text, yielding each piece as soon as it is certain; see `generate`.

        No piece ends within a character.

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
        given: dict[str, Any] = {**settings, "stop": stop, "max_new_tokens": max_new_tokens}
        writers, steps = self._begin_one(prompt, given)

        def pieces() -> Iterator[str]:
            for _ in steps:
                self.count += 1
                if piece := writers[0].take():
                    yield piece
            if piece := writers[0].take(last=True):
                yield piece

        return pieces()

    def tokens(
        self,
        prompt: str,
        candidates: int = 5,
        *,
        stop: str | Collection[str] | None = None,
        max_new_tokens: int | None = 64,
        **settings: Unpack[StringSettings],
    ) -> Iterator[Token]:
        """Continue one text token by token, with the probability of each; see `generate`.

        The token that ends the text, or completes a stop string, is yielded too.

        Parameters
        ----------
        prompt, settings : see `generate`
        candidates : the number of likeliest tokens to name beside each token

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

        given: dict[str, Any] = {**settings, "stop": stop, "max_new_tokens": max_new_tokens}
        _, steps = self._begin_one(prompt, given, look)

        def tokens() -> Iterator[Token]:
            for _ in steps:
                self.count += 1
                yield new.pop(0)

        return tokens()

    def _begin_one(
        self, prompt: str, settings: dict[str, Any], look: Look | None = None
    ) -> tuple[list[Writer], Iterator[Any]]:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a string, got {type(prompt).__name__}")
        writers, steps, copies = self._begin([prompt], settings, look)
        if copies > 1:
            raise ValueError("stream and tokens continue one text: leave num_return_sequences out")
        return writers, steps

    def _begin(
        self, prompts: Sequence[str], settings: dict[str, Any], look: Look | None = None
    ) -> tuple[list[Writer], Iterator[Any], int]:
        allowed = settings.pop("allowed_special", ())
        config, writer = self.plan(settings)
        ids = [self._ids(text, allowed) for text in prompts]
        copies = config.num_return_sequences
        writers: list[Writer] = []
        prompts_ids = check_prompts(self.model.config, ids)
        steps = continue_prompts(self.model, prompts_ids, config, writers, look, self.unused)
        for _ in range(len(ids) * copies):  # after continue_prompts: it may refuse so many texts
            writers.append(writer())
        return writers, steps, copies

    def _ids(self, text: str, allowed: Any = ()) -> list[int]:
        """Return the ids of a text, after `eot` if its tokenizer begins texts so."""
        start, ids = [self.tokenizer.eot], self.tokenizer.encode(text, allowed)
        adds = self.tokenizer.add_bos_token and ids[:1] != start
        return start + ids if adds else ids or start

    def plan(self, settings: dict[str, Any]) -> tuple[GenerationConfig, Callable[[], Writer]]:
        """Return the settings of a call, and a function that makes the writer of each of its texts.

        Raises
        ------
        ValueError, TypeError : see `generate`
        """
        stop = settings.pop("stop", None)
        several = isinstance(stop, list | tuple | set | frozenset)
        stops = list(stop) if several else [] if stop is None else [stop]
        for text in stops:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be strings of at least one character, got {text!r}")
        if settings.get("cache") is None:
            settings["cache"] = self.cache
        config = GenerationConfig(**{"eos_token_id": self.eos_token_id} | settings)
        if config.logprobs:
            raise ValueError("logprobs belong to tokens: use model.generate(ids, logprobs=True)")
        special = {*self.tokenizer.special_tokens.values()}
        silent = {self.tokenizer.eot} | (config.ends(self.model.config.vocab_size) & special)
        return config, lambda: Writer(self.tokenizer, stops, config.min_new_tokens, silent)


def _strings(name: str, texts: Any, door: str) -> list[str]:
    """Return one text or several as a list; `door` is the model's method for token ids."""
    one = isinstance(texts, str | bytes) or not isinstance(texts, Iterable)
    several = [texts] if one else list(texts)
    if not several:
        raise ValueError(f"{name} must be a string or a list of at least one, got none")
    for text in several:
        if not isinstance(text, str):
            is_id = isinstance(text, np.ndarray | np.integer | int)
            hint = f", which is for model.{door}" if is_id else ""
            raise ValueError(f"{name} must be a string or a list of them, got {text!r:.50}{hint}")
    return several
