"""`gpt2c eval`: flags in, figures out. Knows nothing that the doors do not know; used by cli."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpt2c import hub, scoring
from gpt2c.baselines import bits_per_byte
from gpt2c.generator import check_vocabulary, open_model
from gpt2c.model import GPT2
from gpt2c.progress import Progress
from gpt2c.quantized import QuantizedGPT2
from gpt2c.tokenfile import read_shards
from gpt2c.tokenizer import Tokenizer
from gpt2c.train import evaluate

LONG = 50  # windows or questions that take long enough for progress to be shown
LINES = 20  # of progress, where no one watches


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Say what `gpt2c eval` takes."""
    verb.add_argument(
        "model", metavar="RUN", help="a run or any GPT-2 directory, or a name on the hub (gpt2)"
    )
    verb.add_argument("--data", type=Path, help="what gpt2c prepare made: its held-out text")
    verb.add_argument(
        "--stride",
        type=int,
        help="with --data: slide a window of the model's length by so many tokens (default: windows"
        " side by side)",
    )
    verb.add_argument(
        "--choices",
        type=Path,
        metavar="FILE.jsonl",
        help='questions as of HellaSwag, {"ctx": "", "endings": ["", ""], "label": 0} a line',
    )
    verb.add_argument("--batch-size", type=int, default=8, help="rows at a time, side by side (8)")
    verb.add_argument("--quantize", choices=["int8", "fp16"], help="with smaller weights")
    verb.add_argument("--backend", default="auto", help="default: the fastest")
    verb.add_argument(
        "--threads", type=int, default=0, help="that compute (0: as many as the machine allows)"
    )


def run_eval(options: argparse.Namespace) -> int:
    """`gpt2c eval`."""
    if options.data is None and options.choices is None:
        raise ValueError("eval needs --data, --choices or both: there is nothing to score")
    if options.data is None and options.stride is not None:
        raise ValueError("--stride is for --data, which is not given")
    options.model = hub.find(options.model)  # once, for the model and its tokenizer
    threads = options.threads or None
    model = open_model(options.model, options.backend, options.quantize, threads)
    questions = _questions(options, model) if options.choices else []
    if options.data:
        _eval_data(options, model)
    if questions:
        _eval_choices(questions, model)
    return 0


def _questions(options: argparse.Namespace, model: GPT2 | QuantizedGPT2) -> list[scoring.Question]:
    tokenizer = Tokenizer.from_pretrained(options.model)
    check_vocabulary(model, tokenizer)
    return scoring.read_questions(options.choices, tokenizer, model.config.n_positions)


def _eval_data(options: argparse.Namespace, model: GPT2 | QuantizedGPT2) -> None:
    if not options.data.is_dir():
        raise FileNotFoundError(
            f"{options.data} is not a directory of token files; gpt2c prepare makes one"
        )
    tokenizer = Tokenizer.from_pretrained(options.data)
    shards = read_shards(options.data, "val", model.config.vocab_size)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{options.data} has a vocabulary of {tokenizer.vocab_size} tokens and {options.model}"
            f" one of {model.config.vocab_size}: they do not belong together"
        )
    shards = [tokens for tokens in shards if len(tokens) > 1] or shards
    if options.stride is None:
        loss = evaluate(model, shards, options.batch_size, model.config.n_positions)
        # the first token of a shard has nothing before it to be predicted from
        scored = np.concatenate([tokens[1:] for tokens in shards])
    else:
        with _progress() as watch:
            parts = [
                scoring.token_logprobs(model, tokens, options.stride, watch=watch)
                for tokens in shards
            ]
        logprobs = np.concatenate(parts)
        scored = np.concatenate(shards)[~np.isnan(logprobs)]
        loss = -float(np.nanmean(logprobs))
    size = int(tokenizer.token_lengths[scored].sum())
    bits = bits_per_byte(loss * len(scored), size)
    print(f"loss {loss:.4f} nats/token  perplexity {math.exp(loss):.2f}  bits per byte {bits:.4f}")


def _eval_choices(questions: list[scoring.Question], model: GPT2 | QuantizedGPT2) -> None:
    with _progress() as watch:
        right = scoring.answer(model, questions, watch)
    (acc, error), (acc_norm, error_norm) = scoring.accuracy(right)
    print(
        f"acc {_share(acc, error)}  acc_norm {_share(acc_norm, error_norm)} (per token)"
        f"  questions {len(questions)}"
    )


def _share(value: float, error: float) -> str:
    """Write a share and its standard error, which one question has not."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} +/- {error:.4f}"


@contextmanager
def _progress() -> Iterator[scoring.Watch]:
    """Give what shows how far the work is, if there is much of it."""
    shown: list[Progress] = []

    def watch(done: int, total: int, figures: str) -> None:
        if total >= LONG:
            if not shown:
                shown.append(Progress(0, total, total // LINES))
            shown[0].step(done, figures)

    try:
        yield watch
    finally:
        for progress in shown:
            progress.close()
