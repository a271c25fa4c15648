"""GPT2LM: a model for EleutherAI's lm-evaluation-harness, which must be installed to import this.

    lm = gpt2c.evaluate.lm_eval.GPT2LM(model, tokenizer)
    lm_eval.simple_evaluate(lm, tasks=["hellaswag"])

Encodes and truncates texts and slides windows as the harness' own HFLM does, so that figures can be
compared. HFLM ends the whole evaluation at a continuation that has no tokens of its own, or more
than the model reads; here both are scored. Only gpt2c.lm_eval imports this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2c.evaluate.scoring import Scorer
from gpt2c.generate.continuation import continue_prompts
from gpt2c.generate.sampling import OFF, GenerationConfig, TextSettings
from gpt2c.generator import Writer
from gpt2c.kernels.checks import whole_or_float
from gpt2c.model.language_model import LanguageModel
from gpt2c.text.tokenizer import END_OF_TEXT, Tokenizer

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as error:
    if error.name != "lm_eval":  # lm_eval is installed, but a package that it needs is not
        raise
    raise ModuleNotFoundError(
        "gpt2c.evaluate.lm_eval is an adapter for lm-evaluation-harness: pip install lm_eval",
        name="lm_eval",
    ) from error

__all__ = ["GPT2LM"]

MAX_GEN_TOKS = 256  # the default of a task
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # synonyms
# The settings of a task that are passed on; its lengths and its `until` are converted instead.
KNOWN = TextSettings.__annotations__.keys() | OFF.keys() | {"num_return_sequences"}

Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # strings, context, continuation


class GPT2LM(TemplateLM):  # type: ignore[misc]
    """A model and its tokenizer, with the methods that the harness calls.

    Parameters
    ----------
    model : a `GPT2` or `Llama`
    tokenizer : its tokenizer

    Raises
    ------
    ValueError : the tokenizer has more tokens than the model
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._unused = tokenizer.unused_ids(model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which replaces an empty context."""
        return self.tokenizer.eot

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self.model.config.n_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a string; "<|endoftext|>" in it becomes that token, as in transformers.

        As the harness' HFLM does by default, it adds none, whatever `Tokenizer.add_bos_token` is.
        """
        first, *others = map(self.tokenizer.encode, string.split(END_OF_TEXT))
        return first + [token for part in others for token in (self.tokenizer.eot, *part)]

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability in nats, and whether a greedy choice gives it.

        A continuation longer than n_positions is scored piece by piece, each piece with as much
        context as fits. An empty one has 0.0 and True.
        """
        rows: list[Scored] = [
            (request.args, *self._encode_pair(*request.args)) for request in requests
        ]
        return self._loglikelihood_tokens(rows, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both as one text, and split it after as many tokens as the context alone has.

        Spaces at the context's end belong to the continuation. An empty context becomes the
        end-of-text token, taken from the continuation if that begins with it. If no token is left
        for the continuation, as the context's last token includes it, the two are encoded
        separately.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before, whole = self.tok_encode(kept), self.tok_encode(kept + continuation)
        if not before:
            start = whole[:1] == [self.eot_token_id]
            return [self.eot_token_id], whole[start:]
        return before, whole[len(before) :] or self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score token ids; a context that does not fit n_positions is cut from the left."""
        pieces = [self._pieces(*request[1:]) for request in requests]
        scorer = Scorer(self.model)
        answers = [(0.0, True)] * len(pieces)
        # In sorted order, texts with the same beginning follow each other, and it is read once.
        order = sorted(range(len(pieces)), key=pieces.__getitem__)
        for i in tqdm(order, desc="loglikelihood", disable=disable_tqdm):
            for tokens, first in pieces[i]:
                logprobs, likeliest = scorer(np.array(tokens, np.int32), first)
                total, greedy = answers[i]
                total += float(logprobs.sum(dtype=np.float64))
                answers[i] = total, greedy and bool(likeliest.all())
            if (strings := requests[i][0]) is not None:  # None: a window of loglikelihood_rolling
                self.cache_hook.add_partial("loglikelihood", strings, answers[i])
        return answers

    def _pieces(self, context: list[int], continuation: list[int]) -> list[tuple[list[int], int]]:
        """Cut a text into pieces that fit the model, each with the index of its first target."""
        row, most = (context or [self.eot_token_id]) + continuation, self.max_length
        pieces = []
        for start in range(len(row) - len(continuation), len(row), most):
            end = min(start + most, len(row))
            begin = max(0, end - most - 1)  # the last token is not read
            pieces.append((row[begin:end], start - begin))
        return pieces

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability in nats of whole texts, each after the end-of-text token.

        Texts longer than n_positions are cut into windows that do not overlap, except the last,
        which is filled up with context.
        """
        out = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (string,) = request.args
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, self.max_length, context_len=1
            )
            windows: list[Scored] = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            total = sum(score for score, _ in self._loglikelihood_tokens(windows, True))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
            out.append(total)
        return out

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts, greedily unless a task asks for samples, up to a string of `until`.

        A context is cut from the left to leave room for max_gen_toks tokens, by default 256 or half
        of n_positions if that is less. max_length counts the context's tokens too.
        """
        out = []
        every = [self._settings(request.args[1]) for request in requests]  # errors before any work
        watched = tqdm(requests, desc="generate_until", disable=disable_tqdm)
        for request, (until, settings, total) in zip(watched, every, strict=True):
            context, wanted = request.args
            room = self.max_length - settings.max_new_tokens
            prompt = self.tok_encode(context)[-room:] or [self.eot_token_id]
            left = max(0, min(settings.max_new_tokens, total - len(prompt)))
            settings = dataclasses.replace(
                settings,
                max_new_tokens=left,
                min_new_tokens=min(settings.min_new_tokens, left),
            )
            writer = Writer(self.tokenizer, until, 0, {self.eot_token_id})
            for _ in continue_prompts(self.model, [prompt], settings, [writer], None, self._unused):
                pass
            out.append(writer.take(last=True))
            self.cache_hook.add_partial("generate_until", (context, wanted), out[-1])
        return out

    def _settings(self, wanted: dict[str, Any]) -> tuple[list[str], GenerationConfig, int]:
        """Return a task's generation_kwargs as stop strings, gpt2c's settings and max_length."""
        entries = {name: value for name, value in wanted.items() if value is not None}
        until = entries.pop("until", [])
        stops = list(until) if isinstance(until, list | tuple | set) else [until]
        if wrong := [stop for stop in stops if not isinstance(stop, str)]:
            raise ValueError(f"generation_kwargs: until must be strings, got {wrong[0]!r:.50}")
        default = min(MAX_GEN_TOKS, self.max_length // 2)
        lengths = [entries.pop(name) for name in LENGTHS if name in entries] or [default]
        total = whole_or_float("max_length", entries.pop("max_length", self.max_length))
        if unknown := sorted(entries.keys() - KNOWN):
            got = ", ".join(f"{name}={entries[name]!r}" for name in unknown)
            raise ValueError(f"generation_kwargs: gpt2c has no {got}; take it out of the task")
        given = {
            "max_new_tokens": lengths[0],
            "eos_token_id": self.eot_token_id,
            "do_sample": bool(entries.get("temperature")),
        }
        try:
            config = GenerationConfig(**given | entries)
        except (TypeError, ValueError) as error:
            raise ValueError(f"generation_kwargs: {error}") from None
        if config.num_return_sequences != 1:
            raise ValueError(
                "generation_kwargs: num_return_sequences must be 1, for a task wants one text, got"
                f" {config.num_return_sequences}"
            )
        if config.max_new_tokens >= self.max_length:
            raise ValueError(
                "max_gen_toks must leave room for a context in"
                f" {self.model.config.context_name} = {self.max_length} tokens, got"
                f" {config.max_new_tokens}"
            )
        return [stop for stop in stops if stop], config, total
