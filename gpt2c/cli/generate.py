"""`gpt2c generate`: flags in, text out."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2c.cli.flags import add_model
from gpt2c.files.untrusted import read_text
from gpt2c.generate.sampling import GenerationConfig
from gpt2c.generator import Generator
from gpt2c.kernels.checks import counted
from gpt2c.screen.terminal import (
    Terminated,
    colored,
    has_colors,
    padded,
    spelled,
    text_input,
    text_is_lost,
    visible,
    well_formed,
    write_pieces,
)

__all__ = ["add_flags", "run_generate"]

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
ENDS = "---"  # ends an answer that is not on one terminal with its question
# The colour of a token on a terminal: from this probability on, black on green, yellow, red.
LIKELY = ((0.5, "\x1b[30;42m"), (0.1, "\x1b[30;43m"), (0.0, "\x1b[30;41m"))
CELL = 14  # columns of a piece in the table of probabilities; a longer one takes more


EPILOG = r"""examples:
  gpt2c generate runs/demo/run --prompt "The string"
  gpt2c generate runs/demo/run --temperature 0 --stop "\n" --prompt -  < start.txt
  gpt2c generate runs/demo/run --interactive
  gpt2c generate runs/demo/run --prompt "The string" --show-probabilities 3
"""


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c generate`."""
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = EPILOG
    verb.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the start of the text (default: none); - reads standard input",
    )
    verb.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="read the start from FILE, without its last newline",
    )
    verb.add_argument(
        "--interactive",
        action="store_true",
        help="continue each line of standard input, each as a new text: nothing is remembered; a"
        " line --- ends each answer, unless a terminal shows both sides",
    )
    verb.add_argument(
        "--special",
        action="store_true",
        help="read special tokens such as <|endoftext|> in the prompt as tokens, not as text",
    )
    verb.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="how many texts to write (1)"
    )
    verb.add_argument(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="maximum number of new tokens (200)",
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
    verb.add_argument(
        "--show-probabilities",
        type=int,
        nargs="?",
        const=5,
        metavar="K",
        help="print a table: each token, its probability, the K (5) likeliest; 0: none of these",
    )
    add_model(verb)


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
    given = options.prompt or options.prompt_file
    if options.interactive and (given or options.num_samples > 1):
        raise ValueError("--interactive asks for prompts: give no --prompt and no --num-samples")
    if options.prompt and options.prompt_file:
        raise ValueError("--prompt and --prompt-file are two starts of one text: give one")
    k = options.show_probabilities
    if k is not None and (options.interactive or options.num_samples > 1):
        raise ValueError("--show-probabilities is for one text: no --interactive, no --num-samples")
    if k is not None and k < 0:
        raise ValueError(f"--show-probabilities must be at least 0, got {k}")
    settings["allowed_special"] = "all" if options.special else ()
    settings["stop"] = [_unescaped(well_formed(stop)) for stop in options.stop or []]
    prompt = _prompt(options)
    start = time.perf_counter()
    seconds = 0.0
    if options.interactive:
        seconds = _converse(generator, settings)
    elif k is not None:
        _write_table(generator, prompt, k, settings)
    elif options.num_samples == 1:
        pieces = generator.stream(prompt, **settings)
        sys.stdout.write(visible(prompt))
        write_pieces(pieces)
    else:
        texts = generator.generate(prompt, num_return_sequences=options.num_samples, **settings)
        for number, text in enumerate(texts, start=1):
            print(f"--- sample {number} ---\n{visible(prompt + text)}")
    seconds = seconds or time.perf_counter() - start
    sys.stdout.flush()
    if text_is_lost():
        return 0
    print(
        f"{counted(generator.count, 'token')} in {seconds:.2f} s,"
        f" {generator.count / seconds:.1f} tokens/s (loaded in {loaded:.2f} s)",
        file=sys.stderr,
    )
    return 0


def _prompt(options: argparse.Namespace) -> str:
    """Return the start of the text; from a file or standard input without its last newline.

    Bytes that are not UTF-8 become U+FFFD.
    """
    if options.prompt_file is not None:
        return read_text(options.prompt_file, "replace").removesuffix("\n")
    if options.prompt == "-":
        return text_input().read().removesuffix("\n")
    return well_formed(options.prompt or "")


def _unescaped(text: str) -> str:
    r"""Return a text with the characters that \n, \t, \r and \\ stand for."""
    return re.sub(r"\\([ntr\\])", lambda found: ESCAPES[found[1]], text)


def _write_table(
    generator: Generator, prompt: str, candidates: int, settings: dict[str, Any]
) -> None:
    """Write a line for each new token: its probability, and the likeliest tokens."""
    tokens = generator.tokens(prompt, candidates, **settings)
    print("the model's own probabilities: before temperature, top-k, top-p, min-p and penalties")
    if has_colors():
        print(", ".join(colored(f"from {least:.0%}", color) for least, color in LIKELY))
    others = f"  {'':7}  the {candidates} likeliest" if candidates else ""
    print(f"{'id':>6}  {padded('token', CELL if others else 0)}{others}")
    for token in tokens:
        color = next(color for least, color in LIKELY if token.probability >= least)
        cells = [colored(_cell(token.data, token.probability), color)]
        for other, probability in token.candidates:
            cells.append(_cell(generator.tokenizer.token_bytes(other), probability))
        print(f"{token.id:>6}  {'   '.join(cells)}", flush=True)
        if text_is_lost():
            break


def _cell(data: bytes, probability: float) -> str:
    return f"{padded(spelled(data), CELL)}  {probability:7.2%}"


def _converse(generator: Generator, settings: dict[str, Any]) -> float:
    """Continue each line of input; return the seconds of writing, without those of typing.

    Ctrl-C ends a text, or drops a typed line; a second one in a row ends the program. If question
    and answer are not on one terminal, a line of three dashes ends each answer, for programs.
    """
    seconds = 0.0
    pressed = False  # Ctrl-C, at the prompt
    typed = text_input().isatty()
    seen = typed and sys.stdout.isatty()  # question and answer are on one terminal
    if seen:
        with suppress(ImportError):
            import readline  # noqa: F401  input() edits lines with it
    if typed:
        print(
            "Each line is the start of a new text; nothing is remembered. Ctrl-C ends a text,"
            " Ctrl-D the program.",
            file=sys.stderr,
        )
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
            pieces = generator.stream(line, **settings)
            if not seen:
                sys.stdout.write(visible(line))
            write_pieces(pieces)
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
