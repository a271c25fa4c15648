"""`gpt2c generate`: flags in, text out. Knows nothing that the doors do not know; used by cli."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

from gpt2c.generator import Generator
from gpt2c.sampling import GenerationConfig


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Say what `gpt2c generate` takes."""
    verb.add_argument(
        "model", metavar="RUN", help="a run or any GPT-2 directory, or a name on the hub (gpt2)"
    )
    verb.add_argument("--prompt", default="", help="the start of the text (default: none)")
    verb.add_argument("--interactive", action="store_true", help="continue each line typed")
    verb.add_argument("--num-samples", type=int, default=1, help="write so many texts together (1)")
    verb.add_argument(
        "--max-new-tokens", type=int, default=200, help="the most tokens to add (200)"
    )
    verb.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (0.8)")
    verb.add_argument("--top-k", type=int, help="draw among the K likeliest tokens only")
    verb.add_argument("--top-p", type=float, help="draw among the likeliest with this share only")
    verb.add_argument("--min-p", type=float, help="draw among those at least P times the likeliest")
    verb.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (1)"
    )
    verb.add_argument(
        "--no-repeat-ngram-size", type=int, default=0, help="never repeat N tokens (0: may)"
    )
    verb.add_argument("--stop", action="append", help="end before this text; may be repeated")
    verb.add_argument("--seed", type=int, help="the same seed draws the same text")
    verb.add_argument(
        "--quantize", choices=["int8", "fp16"], help="smaller weights: faster, not exactly the same"
    )
    verb.add_argument("--backend", default="auto", help="default: the fastest")
    verb.add_argument(
        "--threads", type=int, default=0, help="that compute (0: as many as the machine allows)"
    )


def run_generate(options: argparse.Namespace) -> int:
    """`gpt2c generate`."""
    start = time.perf_counter()
    generator = Generator.from_pretrained(
        options.model, options.backend, options.quantize, threads=options.threads or None
    )
    loaded = time.perf_counter() - start
    names = {field.name for field in dataclasses.fields(GenerationConfig)}
    settings = {name: value for name, value in vars(options).items() if name in names}
    if options.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {options.num_samples}")
    if options.interactive and (options.prompt or options.num_samples > 1):
        raise ValueError("--interactive asks for prompts: give no --prompt and no --num-samples")
    start = time.perf_counter()
    seconds = 0.0
    if options.interactive:
        seconds = _converse(generator, settings)
    elif options.num_samples == 1:
        pieces = generator.stream(options.prompt, **settings)
        sys.stdout.write(options.prompt)
        _write(pieces)
    else:
        texts = generator.generate(
            options.prompt, num_return_sequences=options.num_samples, **settings
        )
        for number, text in enumerate(texts, start=1):
            print(f"--- sample {number} ---\n{options.prompt}{text}")
    seconds = seconds or time.perf_counter() - start
    sys.stdout.flush()
    print(
        f"{generator.count} tokens in {seconds:.2f} s,"
        f" {generator.count / seconds:.1f} tokens/s (loaded in {loaded:.2f} s)",
        file=sys.stderr,
    )
    return 0


def _write(pieces: Iterator[str]) -> None:
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # an error stands on a line of its own
        print()


def _converse(generator: Generator, settings: dict[str, Any]) -> float:
    """Continue each line that is typed, until the end of the input; Ctrl-C ends a text only.

    Returns the seconds of writing, without those of typing.
    """
    seconds = 0.0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return seconds
        start = time.perf_counter()
        try:
            pieces = generator.stream(line, **settings)
            if not sys.stdin.isatty():  # then nobody has seen it
                sys.stdout.write(line)
            _write(pieces)
        except KeyboardInterrupt:
            pass
        except ValueError as error:
            print(f"gpt2c: {error}", file=sys.stderr)
        seconds += time.perf_counter() - start
