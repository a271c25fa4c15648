"""`gpt2c generate`: flags in, text out."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from gpt2c.cli.flags import add_model
from gpt2c.cli.texts import (
    add_sampling,
    answer_lines,
    given_sampling,
    open_generator,
    write_speed,
)
from gpt2c.files.untrusted import read_text
from gpt2c.generator import Generator
from gpt2c.screen.terminal import (
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

# The colour of a token on a terminal: from this probability on, black on green, yellow, red.
LIKELY = ((0.5, "\x1b[30;42m"), (0.1, "\x1b[30;43m"), (0.0, "\x1b[30;41m"))
CELL = 14  # columns of a piece in the table of probabilities; a longer one takes more


EPILOG = r"""examples:
  gpt2c generate runs/demo/run --prompt "The string"
  gpt2c generate runs/demo/run --temperature 0 --stop "\n" --prompt -  < start.txt
  gpt2c generate runs/demo/run --interactive
  gpt2c generate runs/demo/run --prompt "The string" --show-probabilities 3

From Python the defaults are others, Hugging Face's temperature of 1 and 64 new tokens.
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
    add_sampling(verb, 200)
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
    generator, loaded = open_generator(options)
    settings = given_sampling(options)
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
    prompt = _prompt(options)
    start = time.perf_counter()
    seconds = 0.0
    if options.interactive:
        seconds = _answer_each(generator, settings)
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
    write_speed(generator, seconds or time.perf_counter() - start, loaded)
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


def _answer_each(generator: Generator, settings: dict[str, Any]) -> float:
    """Continue each line of input as a new text; return the seconds."""

    def answer(line: str, seen: bool) -> None:
        pieces = generator.stream(line, **settings)
        if not seen:
            sys.stdout.write(visible(line))
        write_pieces(pieces)

    return answer_lines(
        "Each line is the start of a new text; nothing is remembered. Ctrl-C ends a text,"
        " Ctrl-D the program.",
        answer,
    )
