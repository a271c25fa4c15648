"""`gpt2c chat`: a conversation with a model; a line in, an answer out."""

from __future__ import annotations

import argparse
import re
import sys

from gpt2c.chat import Chat
from gpt2c.cli.flags import add_model
from gpt2c.cli.texts import (
    add_sampling,
    answer_lines,
    given_sampling,
    open_generator,
    write_speed,
)
from gpt2c.kernels.checks import counted
from gpt2c.screen.terminal import well_formed, write_pieces

__all__ = ["add_flags", "run_chat"]

HELP = "/reset begins a new conversation, Ctrl-C ends an answer, Ctrl-D the program."

EPILOG = """examples:
  gpt2c chat runs/sft
  gpt2c chat runs/sft --system "Answer in one word." --temperature 0
  gpt2c chat runs/sft --seed 1 < questions.txt
"""


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c chat`."""
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = EPILOG
    verb.add_argument(
        "--system", metavar="TEXT", help="what the model is told before all else (default: nothing)"
    )
    add_sampling(verb, 256)
    add_model(verb)


def run_chat(options: argparse.Namespace) -> int:
    """`gpt2c chat`."""
    generator, loaded = open_generator(options)
    system = None if options.system is None else well_formed(options.system)
    chat = Chat(generator, system, **given_sampling(options))
    if generator.tokenizer.chat_template is None:
        print(
            f"{options.model} has no chat template: it has not learned from conversations, as gpt2c"
            " sft teaches; gpt2c generate continues a prompt",
            file=sys.stderr,
        )

    def answer(line: str, seen: bool) -> None:
        if line == "/reset":
            chat.reset()
        elif re.fullmatch(r"/\w+", line):
            print(HELP if line == "/help" else f"no command {line}; {HELP}", file=sys.stderr)
        elif line.strip():
            before = chat.forgotten
            pieces = chat.say(line)
            if forgotten := chat.forgotten - before:
                turns = counted(forgotten, "turn")
                print(f"(the context is full; forgotten, from the start: {turns})", file=sys.stderr)
            write_pieces(pieces)

    seconds = answer_lines(f"Each line is a message. {HELP}", answer)
    if generator.count:
        write_speed(generator, seconds, loaded)
    return 0
