"""`gpt2c eval`: flags in, figures out."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2c.cli.flags import add_model
from gpt2c.evaluate import scoring
from gpt2c.evaluate.figures import MEANING, figures, written
from gpt2c.evaluate.loss import evaluate
from gpt2c.formats.load import find_model
from gpt2c.model.model import Model
from gpt2c.pretrained import open_found
from gpt2c.screen.progress import Progress
from gpt2c.text.shards import read_shards
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["add_flags", "run_eval"]

LONG = 50  # as many windows or questions take long, so progress is shown
LINES = 5  # of progress, without a terminal


HELP = f"""\
{MEANING}. All tokens of the held-out text are scored except the first of each file, which has
nothing before it. --stride scores the same tokens, each with more text before it. acc is the share
of right answers if the likeliest ending is chosen; acc_norm, if the likeliest per character is
chosen (both as in lm-evaluation-harness); acc_per_token, if the likeliest per token is chosen."""


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the flags of `gpt2c eval`."""
    verb.epilog = HELP
    verb.add_argument(
        "--data", type=Path, help="score the held-out text in a directory of gpt2c prepare"
    )
    verb.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="with --data: slide a window of n_positions tokens by N, so that each token has at"
        " least n_positions - N before it; this is slower, and mostly gives a lower loss (default:"
        " windows side by side as in training, as with N = n_positions)",
    )
    verb.add_argument(
        "--choices",
        type=Path,
        metavar="FILE.jsonl",
        help='questions as in HellaSwag, a line each: {"ctx": "", "endings": ["", ""], "label": 0}',
    )
    verb.add_argument("--batch-size", type=int, default=8, help="windows at a time (8)")
    add_model(verb)


def run_eval(options: argparse.Namespace) -> int:
    """`gpt2c eval`."""
    if options.data is None and options.choices is None:
        raise ValueError("eval needs --data, --choices or both: there is nothing to score")
    if options.data is None and options.stride is not None:
        raise ValueError("--stride is for --data, which is not given")
    found = find_model(options.model, None, options.adapter, not options.any_base)
    found.config.require_language_head("gpt2c eval")
    model = open_found(found, options.backend, options.quantize, options.threads or None)
    questions = _questions(options.choices, found.path, model) if options.choices else []
    if options.data:
        _eval_data(options, found.path, model)
    if questions:
        _eval_choices(questions, model)
    return 0


def _questions(choices: Path, path: Path, model: Model) -> list[scoring.Question]:
    tokenizer = Tokenizer.from_pretrained(path)
    tokenizer.unused_ids(model.config.vocab_size)  # refuses another model's
    return scoring.read_questions(choices, tokenizer, model.config.n_positions)


def _eval_data(options: argparse.Namespace, path: Path, model: Model) -> None:
    if not options.data.is_dir():
        raise FileNotFoundError(
            f"{options.data} is not a directory of token files; gpt2c prepare makes one"
        )
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    tokenizer = Tokenizer.from_pretrained(options.data)
    _check_tokenizer(options, path, model, tokenizer)
    lengths = tokenizer.token_lengths
    vocabulary = tokenizer.vocab_size, tokenizer.fingerprint, lengths
    shards = read_shards(options.data, "val", *vocabulary)
    shards = [tokens for tokens in shards if len(tokens) > 1] or shards
    count = sum(len(tokens) - 1 for tokens in shards)  # the first has nothing before it
    size = sum(tokens.text_bytes - int(lengths[tokens[:1]][0]) for tokens in shards)
    if options.stride is None:
        nats = count * evaluate(model, shards, options.batch_size, model.config.n_positions)
    else:
        nats = 0.0
        for tokens in shards:
            with _progress("window") as watch:
                logprobs = scoring.token_logprobs(model, tokens, options.stride, watch=watch)
            nats -= float(logprobs[1:].sum())
    found = figures(nats, count, size)
    perplexity = written(found.perplexity, 2, 1e9)
    bits = "none, as the text has no bytes"
    if not math.isnan(found.bits_per_byte):
        bits = written(found.bits_per_byte)
    loss = written(found.loss)
    print(f"loss {loss} nats/token  perplexity {perplexity}  bits per byte {bits}")


def _check_tokenizer(
    options: argparse.Namespace, path: Path, model: Model, tokenizer: Tokenizer
) -> None:
    """Refuse data whose tokens mean something else to the model.

    A model may have more tokens than its tokenizer, as padding. A model without a tokenizer beside
    it fits if it has at least as many tokens as the data, and the same end of text.
    """
    apart = (
        ": they do not belong together; make data with the model's own tokenizer (gpt2c prepare"
        " --tokenizer DIRECTORY)"
    )
    size, end = model.config.vocab_size, model.config.eos_token_id
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"{options.data} has a vocabulary of {tokenizer.vocab_size} tokens and {options.model}"
            f" one of {size}{apart}"
        )
    try:
        own = Tokenizer.from_pretrained(path)
    except FileNotFoundError as error:
        if end is not None and end < size and end != tokenizer.eot:
            raise ValueError(
                f"{options.data} has {tokenizer.eot} for its end of text and {options.model}"
                f" {end}{apart}"
            ) from None
        print(
            f"gpt2c: only the sizes of the vocabularies could be compared, {tokenizer.vocab_size}"
            f" of {options.data} and {size} of {options.model}: {error}",
            file=sys.stderr,
        )
        return
    if not own.covers(tokenizer):
        raise ValueError(
            f"{options.data} was made with another tokenizer than that of {options.model}{apart}"
        )


def _eval_choices(questions: list[scoring.Question], model: Model) -> None:
    with _progress("question") as watch:
        right = scoring.answer(model, questions, watch)
    acc, acc_norm, acc_per_token = (_share(*pair) for pair in scoring.accuracy(right))
    print(
        f"acc {acc}  acc_norm {acc_norm} (per character)  acc_per_token {acc_per_token}"
        f"  questions {len(questions)}"
    )


def _share(value: float, error: float) -> str:
    """Return a share with its standard error; a single question has none."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} +/- {error:.4f}"


@contextmanager
def _progress(noun: str) -> Iterator[scoring.Progressed]:
    """Return a function that shows the progress of long work; `noun` names what is counted."""
    shown: list[Progress] = []

    def watch(done: int, total: int, figures: str) -> None:
        if total >= LONG:
            if not shown:
                shown.append(Progress(0, total, -(-total // LINES), noun))
            shown[0].step(done, figures)

    try:
        yield watch
    finally:
        for progress in shown:
            progress.close()
