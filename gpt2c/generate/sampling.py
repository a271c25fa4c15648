"""From logits to a token: which tokens may be drawn, and the draw.

    scores = logits, lower for tokens that the text already has, -inf for forbidden ones
    p = softmax(scores / temperature), without the unlikely tokens

Names, meaning and order are Hugging Face's (transformers.GenerationConfig and its logits
processors). Knows nothing about models and tokenizers.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NoReturn, TypedDict, TypeVar, Unpack, get_type_hints

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.checks import check_choice, check_kind, number, several, whole_or_float
from gpt2c.model.reader import CacheType, check_cache

__all__ = [
    "FROM_GENERATOR",
    "OFF",
    "ChatSettings",
    "GenerationConfig",
    "RequestSettings",
    "TextSettings",
    "TokenSettings",
    "choose",
    "distribution",
    "likeliest",
    "penalised",
    "shows",
]

F = TypeVar("F", bound=Callable[..., Any])

# Other programs' names of settings -> GenerationConfig's.
MEANT = {"stop_strings": "stop", "stop_token_ids": "stop", "n": "num_return_sequences"}
MEANT |= dict.fromkeys(("max_length", "max_tokens", "max_gen_toks"), "max_new_tokens")
MEANT |= {"min_length": "min_new_tokens"}

# transformers' settings that gpt2c lacks: name -> values that leave it off, as None always does.
ANY = None  # any value: gpt2c writes one token at a time without padding, so none changes a result
OFF: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "min_length"), (0,)),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), (False,)),
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions"), (False,)),
    **dict.fromkeys(("output_hidden_states", "return_dict_in_generate"), (False,)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "sequence_bias"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "max_time"), ()),
    **dict.fromkeys(("max_length", "stop_strings"), ()),
    **dict.fromkeys(("use_cache", "low_memory", "early_stopping", "length_penalty"), ANY),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "num_assistant_tokens"), ANY),
    **dict.fromkeys(("transformers_version", "_from_model_config"), ANY),  # of a file of settings
}


def is_off(name: str, value: Any) -> bool:
    """Return whether a setting of `OFF` has a value that changes nothing."""
    off = OFF[name]
    plain = isinstance(value, bool | int | float | np.generic)  # `in` fails for an array
    return off is ANY or value is None or (plain and value in off)


class DrawSettings(TypedDict, total=False):
    """`GenerationConfig`'s settings of every text: their names and types, for a type checker.

    Of the settings in `OFF` only the common ones are here, though all are accepted.
    """

    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    eos_token_id: int | Collection[int] | None
    seed: int | None
    num_beams: int | None
    typical_p: float | None
    use_cache: bool | None
    early_stopping: bool | str | None
    length_penalty: float | None
    pad_token_id: int | None


class ChatSettings(DrawSettings, total=False):
    """`GenerationConfig`'s settings for the answers of a chat."""

    cache: CacheType | None


class TextSettings(ChatSettings, total=False):
    """`GenerationConfig`'s settings for texts of a call."""

    on_full: Literal["slide", "stop"] | None


class TokenSettings(TextSettings, total=False):
    """`GenerationConfig`'s settings for token ids, except max_new_tokens and logprobs."""

    num_return_sequences: int | None
    stop: int | Collection[int] | None


class RequestSettings(DrawSettings, total=False):
    """`GenerationConfig`'s settings for one of the texts that share an engine's memory."""

    on_full: Literal["slide", "stop"] | None
    stop: int | Collection[int] | None


class _FromGenerator:
    def __repr__(self) -> str:
        return "<the generator's>"


FROM_GENERATOR = _FromGenerator()  # in a signature: the default is a setting of the generator


def shows(settings: type[Any], **other: object) -> Callable[[F], F]:
    """Return a decorator that writes out `**settings` in the signature and the docstring.

    So `help` lists each setting of `GenerationConfig` with its default and what it does. A type
    checker and an editor find them in the TypedDict. Written by hand, the list of 14 would stand in
    each overload of each of seven functions.

    Parameters
    ----------
    settings : the TypedDict of the function's `**settings`
    other : defaults that are not `GenerationConfig`'s
    """

    def show(function: F) -> F:
        defaults = {one.name: one.default for one in dataclasses.fields(GenerationConfig)} | other
        own = inspect.signature(function)
        *first, rest = own.parameters.values()  # `rest` stays: it takes those in `OFF`
        only = inspect.Parameter.KEYWORD_ONLY
        kinds = get_type_hints(settings)  # as types: the function's module may lack their names
        named = [
            inspect.Parameter(name, only, default=defaults[name], annotation=kind)
            for name, kind in kinds.items()
            if name in defaults
        ]
        function.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*first, *named, rest]
        )
        if function.__doc__:
            function.__doc__ = _described(function.__doc__, [one.name for one in named])
        return function

    return show


def _described(docstring: str, names: Sequence[str]) -> str:
    """Return a docstring whose entry `settings` follows those of these names in `GenerationConfig`.

    An entry that the docstring has itself is not added.
    """
    text = inspect.cleandoc(docstring)
    entry = re.compile(r"(?m)^(\w[\w, ]*) : .+(?:\n    .+)*")  # "name, name : what they are"
    own = {name for one in entry.finditer(text) for name in one[1].split(", ")}
    config = inspect.cleandoc(GenerationConfig.__doc__ or "")
    known = {one[1]: one[0] for one in entry.finditer(config)}
    added = "".join(f"{known[name]}\n" for name in names if name not in own)
    return re.sub(r"(?m)^(?=settings : )", lambda _: added, text, count=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a text is continued.

    None means the default, except for eos_token_id: there it means that no token ends a text. Whole
    numbers may be floats, such as 2.0.

    Parameters
    ----------
    max_new_tokens : the most tokens to add
    min_new_tokens : the least tokens before the end
    do_sample : False takes the likeliest token each time, as temperature=0 does
    temperature : divides the logits; 1 is the model's own distribution, 0 takes the likeliest token
    top_k : draw among the k likeliest tokens only (the lower ids of equals); None or 0 is off
    top_p : draw among the likeliest tokens only, the fewest whose probabilities add up to p
        (nucleus sampling, Holtzman et al., arXiv:1904.09751); None or 1 is off, 0 keeps one token
    min_p : draw among the tokens at least p times as likely as the likeliest (Nguyen et al.,
        arXiv:2407.01082); None or 0 is off
    repetition_penalty : above 1 makes tokens that the text already has less likely: their logits
        are divided by it, negative ones multiplied (Keskar et al., arXiv:1909.05858)
    no_repeat_ngram_size : n forbids each token that would repeat a sequence of n tokens; 0 is off
    num_return_sequences : the number of continuations of each prompt
    eos_token_id : a token id or several that end a text
    stop : further token ids that end a text; `gpt2c.Generator` takes strings
    seed : the same seed draws the same tokens; None takes a fresh one
    logprobs : also return each token's log-probability in nats, by the model's own distribution
    on_full : when the text fills the context, "slide" forgets its first half, "stop" ends it
    cache : the type of the keys and values that a text leaves in memory, "fp32", "fp16" or "int8":
        a half and about a quarter of the bytes are faster to read, and rounded
    settings : others of transformers, which gpt2c lacks: only values that leave them off, see `OFF`

    Raises
    ------
    ValueError : a value is out of range or of another type; the message names the setting
    TypeError : an unknown setting; the message names the one that was probably meant

    Examples
    --------
    >>> config = gpt2c.GenerationConfig(temperature=0.8, top_k=50)
    >>> config.top_k
    50
    >>> gpt2c.GenerationConfig(top_p=2)
    Traceback (most recent call last):
    ValueError: top_p must be from 0 to 1, got 2
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    eos_token_id: int | Collection[int] | None = None
    stop: int | Collection[int] | None = None
    seed: int | None = None
    logprobs: bool = False
    on_full: Literal["slide", "stop"] = "slide"
    cache: CacheType = "fp32"

    def __init__(
        self,
        *,
        max_new_tokens: int | None = 64,
        logprobs: bool = False,
        **settings: Unpack[TokenSettings],
    ) -> None:
        given: dict[str, Any] = {
            **{"max_new_tokens": max_new_tokens, "logprobs": logprobs},
            **settings,
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in given.items():
            if name not in defaults and not (name in OFF and is_off(name, value)):
                _refuse(name, value, defaults)
        for name, default in defaults.items():
            value = given.get(name)
            object.__setattr__(self, name, default if value is None else value)
        least = {"max_new_tokens": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0}
        least |= {"num_return_sequences": 1, "top_k": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None:  # top_k or seed
                continue
            count = whole_or_float(name, value)
            if count < low:
                fresh = ", or left out for a fresh one" if name == "seed" else ""
                raise ValueError(f"{name} must be at least {low}{fresh}, got {value!r}")
            object.__setattr__(self, name, count)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens, {self.max_new_tokens},"
                f" got {self.min_new_tokens}"
            )
        if not 0 <= number("temperature", self.temperature) < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= number(name, value) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        if not 1e-3 <= number("repetition_penalty", self.repetition_penalty) <= 1e3:
            raise ValueError(
                f"repetition_penalty must be from 0.001 to 1000, got {self.repetition_penalty}"
            )
        for name in ("do_sample", "logprobs"):
            check_kind(name, getattr(self, name), bool | np.bool_, "True or False")
        check_choice("on_full", self.on_full, ("slide", "stop"))
        check_cache(self.cache)

    @property
    def greedy(self) -> bool:
        """Return whether the likeliest token is taken each time."""
        return not self.do_sample or self.temperature == 0

    def ends(self, vocab_size: int) -> frozenset[int]:
        """Return the token ids that end a text.

        Raises
        ------
        ValueError : an id is not a whole number, or is outside the vocabulary

        Examples
        --------
        >>> sorted(gpt2c.GenerationConfig(eos_token_id=256, stop=[10, 13]).ends(vocab_size=257))
        [10, 13, 256]
        """
        ids: set[int] = set()
        for name in ("eos_token_id", "stop"):
            value = getattr(self, name)
            if value is None:
                continue
            for token in several(value) if isinstance(value, Collection) else [value]:
                if name == "stop" and isinstance(token, str):
                    raise ValueError(
                        f"{name} must be token ids, got {token!r}: gpt2c.Generator takes strings"
                    )
                number = isinstance(token, int | np.integer) and not isinstance(token, bool)
                if not number or not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name}: {token!r:.50} is not a token id in [0, {vocab_size})"
                    )
                ids.add(int(token))
        return frozenset(ids)


shows(TokenSettings)(GenerationConfig.__init__)


def _refuse(name: str, value: Any, known: Collection[str]) -> NoReturn:
    """Raise the error about a setting that `GenerationConfig` does not take."""
    near = difflib.get_close_matches(name, known, n=1)
    meant = MEANT.get(name) or (near[0] if near and name not in OFF else None)
    if meant is None and name in OFF:
        wanted = " or ".join(map(repr, OFF[name] or (None,)))
        raise ValueError(
            f"{name} must be {wanted}, for gpt2c lacks this setting, got {value!r:.50}"
        )
    hint = f"did you mean {meant}?" if meant else f"its settings are {', '.join(sorted(known))}"
    raise TypeError(f"GenerationConfig has no setting {name!r}; {hint}")


def penalised(
    logits: NDArray[Any],
    settings: GenerationConfig,
    text: Sequence[int],
    forbidden: Collection[int],
) -> NDArray[Any]:
    """Return logits (V,), lower for repeated tokens, -inf for forbidden ones; a copy if changed.

    Parameters
    ----------
    logits : (V,) floats
    settings : repetition_penalty and no_repeat_ngram_size are used
    text : the token ids so far, prompt and new
    forbidden : ids that must not be chosen now
    """
    if not forbidden and settings.repetition_penalty == 1 and not settings.no_repeat_ngram_size:
        return logits
    scores = logits.copy()
    if settings.repetition_penalty != 1:
        seen = np.unique(np.asarray(text, np.int64))
        penalty = settings.repetition_penalty
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    n = settings.no_repeat_ngram_size
    if n and len(text) >= n:
        ngrams = np.lib.stride_tricks.sliding_window_view(np.asarray(text, np.int64), n)
        begun = (ngrams[:, :-1] == text[len(text) - n + 1 :]).all(axis=1)
        scores[ngrams[begun, -1]] = -np.inf
    scores[list(forbidden)] = -np.inf
    return scores


def distribution(
    logits: NDArray[Any], settings: GenerationConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that may be drawn and their probabilities, up to a common factor.

    Temperature is applied first, then top_k, then top_p to the remaining tokens, then min_p.

    Parameters
    ----------
    logits : (V,) floats; -inf for a token that must not be drawn
    settings : with a temperature above 0

    Returns
    -------
    (ids, weights) : (K,) int64 ascending, (K,) float64
    """
    top_k, top_p, min_p = settings.top_k, settings.top_p, settings.min_p
    ids = likeliest(logits, top_k) if top_k else np.arange(len(logits))
    # With a tiny temperature all weights but the largest are exp(-inf) = 0.
    with np.errstate(over="ignore"):
        weights = np.exp((logits[ids].astype(np.float64) - logits.max()) / settings.temperature)
    if top_p is not None:
        cumulative = np.cumsum(np.sort(weights)[::-1])
        count = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
        kept = likeliest(weights, count)
        ids, weights = ids[kept], weights[kept]
    if min_p is not None:
        likely = weights >= min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def likeliest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` largest values, ascending; the first ones of equals.

    An argsort of a whole vocabulary would take longer than reading the token.
    """
    if count >= len(values):
        return np.arange(len(values))
    cut = np.partition(values, -count)[-count]
    taken = values > cut
    taken[np.flatnonzero(values == cut)[: count - np.count_nonzero(taken)]] = True
    return np.flatnonzero(taken)


def choose(
    logits: NDArray[Any],
    settings: GenerationConfig,
    rng: np.random.Generator,
    text: Sequence[int] = (),
    forbidden: Collection[int] = (),
) -> int:
    """Return the next token: the likeliest (the first of equals), or one drawn with one number.

    Parameters
    ----------
    logits : (V,) floats of the token that follows the text
    text, forbidden : see `penalised`

    Raises
    ------
    ValueError : logits hold nan or infinity, or every token is forbidden
    """
    if not math.isfinite(logits[logits.argmax()]):  # nan counts as the largest
        raise ValueError(
            "logits hold nan or infinity; the model's weights have diverged or are damaged"
        )
    scores = penalised(logits, settings, text, forbidden)
    best = int(scores.argmax())
    if scores is not logits and scores[best] == -np.inf:
        raise ValueError(
            "no token is left to continue with: no_repeat_ngram_size and min_new_tokens forbid all"
        )
    if settings.greedy:
        return best
    ids, weights = distribution(scores, settings)
    cumulative = np.cumsum(weights)
    return int(ids[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])
