"""GPT2LM: a model for EleutherAI's lm-evaluation-harness, which must be installed to import this.

    lm = gpt2c.lm_eval.GPT2LM(model, tokenizer)
    lm_eval.simple_evaluate(lm, tasks=["hellaswag"])

Encodes, truncates and slides as the harness' own HFLM does, so that figures can be compared.
Nothing else of gpt2c knows this module or needs the harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2c.generator import Writer, check_vocabulary
from gpt2c.language_model import LanguageModel
from gpt2c.sampling import GenerationConfig
from gpt2c.scoring import Scorer
from gpt2c.tokenizer import END_OF_TEXT, Tokenizer

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gpt2c.lm_eval is an adapter for lm-evaluation-harness: pip install lm_eval", name="lm_eval"
    ) from error

MAX_GEN_TOKS = 256  # where a task says nothing
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the same
OTHERS = {"top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "seed"}

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings, context, continuation


class GPT2LM(TemplateLM):  # type: ignore[misc]
    """A model and its tokenizer, as the harness wants them.

    `loglikelihood`, of (context, continuation), is TemplateLM's: it encodes both as one text, with
    spaces at the context's end given to the continuation and the end-of-text token for an empty
    context, and calls `_loglikelihood_tokens`.

    Parameters
    ----------
    model : a `GPT2` or `QuantizedGPT2`
    tokenizer : its tokenizer

    Raises
    ------
    ValueError : the tokenizer has more tokens than the model
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        check_vocabulary(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which an empty context is."""
        return self.tokenizer.eot

    @property
    def max_length(self) -> int:
        """How many tokens are read at most."""
        return self.model.config.n_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a string; "<|endoftext|>" in it is the token, as in transformers."""
        first, *others = map(self.tokenizer.encode, string.split(END_OF_TEXT))
        return first + [token for part in others for token in (self.tokenizer.eot, *part)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Give the log-probability of each continuation, and whether it is the greedy one.

        What does not fit n_positions is cut from the left.
        """
        rows = []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation must have from 1 to n_positions = {self.max_length} tokens,"
                    f" got {len(continuation)}"
                )
            rows.append(((context or [self.eot_token_id]) + continuation)[-self.max_length - 1 :])
        scorer = Scorer(self.model)
        answers = [(0.0, False)] * len(rows)
        # Sorted, texts stand beside those that begin as they do, and what they share is read once.
        order = sorted(range(len(rows)), key=rows.__getitem__)
        for i in tqdm(order, desc="loglikelihood", disable=disable_tqdm):
            strings, _, continuation = requests[i]
            row = np.array(rows[i], np.int32)
            logprobs, likeliest = scorer(row, len(row) - len(continuation))
            answers[i] = (float(logprobs.sum(dtype=np.float64)), bool(likeliest.all()))
            if strings is not None:  # None is a window of loglikelihood_rolling
                self.cache_hook.add_partial("loglikelihood", strings, answers[i])
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Give the log-probability of whole texts, each begun by the end-of-text token.

        Those longer than n_positions are cut into windows that do not overlap, but for the last,
        which is filled up with context.
        """
        out = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (string,) = request.args
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, self.max_length, context_len=1
            )
            windows: list[Request] = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            total = sum(score for score, _ in self._loglikelihood_tokens(windows, True))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
            out.append(total)
        return out

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts, greedily unless a task wants samples, up to one of its `until`.

        A context is cut from the left to leave room for max_gen_toks tokens, 256 or half of
        n_positions unless given.
        """
        out = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, wanted = request.args
            until, settings = self._settings(wanted)
            room = self.max_length - settings.max_new_tokens
            prompt = self.tok_encode(context)[-room:] or [self.eot_token_id]
            writer = Writer(self.tokenizer, until, 0)
            for _ in self.model.continue_prompts([prompt], settings, [writer]):
                pass
            out.append(writer.take(last=True))
            self.cache_hook.add_partial("generate_until", (context, wanted), out[-1])
        return out

    def _settings(self, wanted: dict[str, Any]) -> tuple[list[str], GenerationConfig]:
        """Turn a task's generation_kwargs into stop strings and gpt2c's settings."""
        entries = dict(wanted)
        until = entries.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        lengths = [entries.pop(name, None) for name in LENGTHS]
        default = min(MAX_GEN_TOKS, self.max_length // 2)
        length = next((int(value) for value in lengths if value is not None), default)
        if not 0 <= length < self.max_length:
            raise ValueError(
                f"max_gen_toks must leave room for a context in n_positions = {self.max_length}"
                f" tokens, got {length}"
            )
        sample, temperature = entries.pop("do_sample", None), entries.pop("temperature", None)
        if sample is None:
            sample = bool(temperature)
        if unknown := entries.keys() - OTHERS:
            raise ValueError(f"generation_kwargs: gpt2c has no {', '.join(sorted(unknown))}")
        config = GenerationConfig(
            max_new_tokens=length,
            do_sample=sample,
            temperature=(1.0 if temperature is None else float(temperature)) if sample else 1.0,
            eos_token_id=self.eot_token_id,
            **entries,
        )
        return [stop for stop in stops if stop], config
