"""What `gpt2c generate` and `gpt2c chat` share: flags of sampling, lines of input, the speed."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gpt2c.generate.sampling import GenerationConfig
from gpt2c.generator import Generator
from gpt2c.kernels.checks import counted
from gpt2c.screen.terminal import Terminated, text_input, text_is_lost, well_formed

__all__ = ["add_sampling", "answer_lines", "given_sampling", "open_generator", "write_speed"]

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
ENDS = "---"  # ends an answer that is not on one terminal with its question


def add_sampling(verb: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add a flag for each setting of `GenerationConfig` that a user of commands needs."""
    verb.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"maximum number of new tokens ({max_new_tokens})",
    )
    verb.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="higher: more random; 0: always the likeliest token (0.8)",
    )
    verb.add_argument(
        "--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (0: all)"
    )
    verb.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="nucleus sampling: draw among the fewest tokens with probability P together (1: all)",
    )
    verb.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw among tokens at least P times as likely as the likeliest (0: all)",
    )
    verb.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        default=1.0,
        help="above 1: make repeated tokens less likely (1: off)",
    )
    verb.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        metavar="N",
        default=0,
        help="forbid repeating any N tokens in a row (0: off)",
    )
    verb.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help=r"end before this text; may be repeated; \n, \t, \r and \\ are escapes",
    )
    verb.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed draws the same text (default: another each time)",
    )
    verb.add_argument(
        "--cache",
        choices=["fp32", "fp16", "int8"],
        default="fp32",
        help="keys and values of the text in memory: fp32, fp16 or int8, which are smaller and"
        " faster to read in long texts (fp32)",
    )


def given_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the flags of `add_sampling`."""
    names = {field.name for field in dataclasses.fields(GenerationConfig)}
    settings = {name: value for name, value in vars(options).items() if name in names}
    return settings | {"stop": [_unescaped(well_formed(stop)) for stop in options.stop or []]}


def _unescaped(text: str) -> str:
    r"""Return a text with the characters that \n, \t, \r and \\ stand for."""
    return re.sub(r"\\([ntr\\])", lambda found: ESCAPES[found[1]], text)


def open_generator(options: argparse.Namespace) -> tuple[Generator, float]:
    """Return the model of the flags of `add_model`, and the seconds that loading it took."""
    start = time.perf_counter()
    generator = Generator.from_pretrained(
        *(options.model, options.backend, options.quantize),
        threads=options.threads or None,
        adapter=options.adapter,
        check_base=not options.any_base,
    )
    return generator, time.perf_counter() - start


def answer_lines(greeting: str, answer: Callable[[str, bool], None]) -> float:
    """Answer each line of input; return the seconds of writing, without those of typing.

    Ctrl-C ends an answer, or drops a typed line; a second one in a row ends the program. If
    question and answer are not on one terminal, a line of three dashes ends each answer, for
    programs.

    Parameters
    ----------
    greeting : shown to a user who types
    answer : writes the answer to a line; also gets whether question and answer are on one terminal
    """
    seconds = 0.0
    pressed = False  # Ctrl-C, at the prompt
    typed = text_input().isatty()
    seen = typed and sys.stdout.isatty()  # question and answer are on one terminal
    if seen:
        with suppress(ImportError):
            import readline  # noqa: F401  input() edits lines with it
    if typed:
        print(greeting, file=sys.stderr)
    while not text_is_lost():
        try:
            line = input("> " if seen else "")
        except EOFError:
            if seen:
                print()
            break
        except Terminated:
            raise
        except KeyboardInterrupt:
            if pressed or not typed:
                raise
            pressed = True
            print("\n(Ctrl-D or Ctrl-C again ends the program)", file=sys.stderr)
            continue
        pressed = False
        start = time.perf_counter()
        try:
            answer(line, seen)
        except Terminated:
            raise
        except KeyboardInterrupt:
            pass
        except ValueError as error:
            print(f"gpt2c: {error}", file=sys.stderr)
        if not seen:
            print(ENDS)
        seconds += time.perf_counter() - start
    return seconds


def write_speed(generator: Generator, seconds: float, loaded: float) -> None:
    """Write how many tokens were generated, and how fast, unless the text itself was lost."""
    sys.stdout.flush()
    if text_is_lost():
        return
    print(
        f"{counted(generator.count, 'token')} in {seconds:.2f} s,"
        f" {generator.count / seconds:.1f} tokens/s (loaded in {loaded:.2f} s)",
        file=sys.stderr,
    )
