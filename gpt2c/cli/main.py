"""The command line: it reads arguments, calls gpt2c, and prints a user's error in one line."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import math
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from gpt2c.cli import bench as cli_bench
from gpt2c.cli import chat as cli_chat
from gpt2c.cli import classify as cli_classify
from gpt2c.cli import convert as cli_convert
from gpt2c.cli import distill as cli_distill
from gpt2c.cli import eval as cli_eval
from gpt2c.cli import finetune as cli_finetune
from gpt2c.cli import generate as cli_generate
from gpt2c.cli import info as cli_info
from gpt2c.cli import merge as cli_merge
from gpt2c.cli import plot as cli_plot
from gpt2c.cli import prepare as cli_prepare
from gpt2c.cli import prune as cli_prune
from gpt2c.cli import tokens as cli_tokens
from gpt2c.cli.demo import demo, demo_recipe
from gpt2c.cli.flags import RESUME, add_settings, given_settings
from gpt2c.cli.signals import ended_as_by_ctrl_c
from gpt2c.evaluate.figures import written
from gpt2c.files.atomic import reason
from gpt2c.files.names import check_named
from gpt2c.parallel.same import check_command
from gpt2c.parallel.world import ALONE, first_voice, join, require_alone
from gpt2c.screen.command import command
from gpt2c.screen.terminal import Door, one_line, open_door
from gpt2c.train.loop import TrainResult
from gpt2c.train.pretrain import train
from gpt2c.train.run import LOCAL
from gpt2c.train.settings import recipe_settings

__all__ = ["main", "parser"]

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
LONGEST = 2000  # characters of an error that are shown
NEAR = 0.75  # of difflib's ratio: --layers is near to --n-layer, --tokenizer not to --step-size
ANY_TEXT = (
    "--prompt",
    "--stop",
    "--system",
)  # flags whose value may be any text, another flag's name too
FLAG = re.compile("--[A-Za-z][A-Za-z0-9_-]*")


class Misused(ValueError):
    """Arguments that a parser refuses."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """argparse's parser, except that it keeps a value of two dashes, and names a near choice.

    It raises its errors: argparse would end the process, and other ranks would wait for it.
    """

    def error(self, message: str) -> NoReturn:
        raise Misused(self, message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings == ["--"] and action.option_strings:
            return "--"
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _meant(str(value), map(str, action.choices or ()))
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gpt2c`; return its exit code.

    0 for success; 1 for a benchmark with a wrong or failed row, or without a timed row; 2 for a
    user's error, or if text of the result was lost; 130 for Ctrl-C. All text passes
    `gpt2c.screen.terminal`: it is no error if the reader or the terminal has gone, or if standard
    error takes no text.
    """
    with open_door() as out, warnings.catch_warnings():
        if not sys.warnoptions:  # warnings are for programmers, not for users of commands
            warnings.simplefilter("ignore")
        return _run(list(sys.argv[1:] if arguments is None else arguments), out)


def _run(arguments: list[str], out: Door) -> int:
    top, words = parser(), list(arguments)
    if not arguments:
        top.print_help()
        return 0
    verb, place = top, 0
    while place < len(arguments) and (inner := _verbs_of(verb).get(arguments[place])):
        verb, place = inner, place + 1
    own = (
        *(run_train, run_demo, cli_finetune.run_method, cli_classify.run_train),
        cli_distill.run_distill,
    )
    trains = verb.get_default("run") in own  # they have handlers of their own
    world = ALONE
    try:
        if trains and verb.get_default("run") is not run_demo and not {"-h", "--help"} & {*words}:
            world = join()
            check_command(world, _spoken(words, place))
        if place:
            arguments[place:] = _for_argparse(arguments[place:], verb)
        with world.agreement(), first_voice(errors=True):
            options, unknown = top.parse_known_args(arguments)
            if unknown:
                options.verb.error(_unknown_flag(unknown[0], options.verb))
    except Misused as error:
        with first_voice(errors=True):
            argparse.ArgumentParser.error(error.parser, str(error))
    except ValueError as error:
        _complain(str(error))
        return 2
    options.words = words
    out.needed = options.shows
    try:
        with first_voice() if trains else ended_as_by_ctrl_c():
            code: int = options.run(options)
        out.flush()
        if code == 0 and out.needed and out.lost and not out.reader_left:
            _complain(f"standard output: {out.lost.strerror or out.lost}: some of the text is lost")
            code = 2
        return code
    except KeyboardInterrupt:
        again = ""
        if trains and options.run is not run_demo and not options.out.exists():
            again = f"; begin again with: {command(*words)}"
        print(f"gpt2c: interrupted{again}", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        _complain(reason(error))
    except (ValueError, OverflowError, Warning) as error:  # a number too large for C or a float
        _complain(str(error))
    except MemoryError as error:
        _complain(f"not enough memory: {error}" if str(error) else "not enough memory")
    return 2


def _spoken(words: Sequence[str], place: int) -> str:
    """Return a command without values, of which ranks may have other ones or tell more clearly.

    Parameters
    ----------
    place : the number of words of the verb
    """
    flags = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    return " ".join(["gpt2c", *words[:place], *sorted(flags - {f"--{name}" for name in LOCAL})])


def _verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the verbs of the command line, or those of a verb such as `classify`; {} for none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _for_argparse(arguments: list[str], verb: argparse.ArgumentParser) -> list[str]:
    """Return a verb's arguments as argparse takes them: --n_layer as --n-layer, values joined.

    argparse takes a value that begins with a dash only if it is joined to its flag, as in
    --prompt=-->. A value that is also a flag of the verb stays a value where any text may stand.
    """
    flags = verb._option_string_actions
    texts: list[str] = []  # arguments without a flag, of a verb that takes any text as such
    taken: list[str] = []
    left = list(reversed(arguments))
    while left:
        argument = left.pop()
        name, equals, _ = argument.partition("=")
        dashed = name.replace("_", "-")
        if name not in flags and name.startswith("--") and dashed in flags:
            argument, name = dashed + argument[len(name) :], dashed
        if argument == "--":
            texts += reversed(left)
            break
        if name not in flags:
            is_text = verb.get_default("any_text") and not FLAG.fullmatch(name)
            (texts if is_text else taken).append(argument)
        elif equals or flags[name].nargs not in (None, "?"):
            taken.append(argument)
        elif flags[name].nargs == "?":  # a number may follow, and nothing else
            number = left and left[-1].removeprefix("-").isdecimal()
            taken.append(f"{name}={left.pop() if number else flags[name].const}")
        elif not left or (name not in ANY_TEXT and left[-1].partition("=")[0] in {*flags, "--"}):
            taken.append(argument)
        else:
            taken.append(f"{name}={left.pop()}")
    return [*taken, "--", *texts] if texts else taken


def _complain(text: str) -> None:
    print(f"gpt2c: {one_line(text[:LONGEST])}{'...' if text[LONGEST:] else ''}", file=sys.stderr)


@cache
def parser() -> argparse.ArgumentParser:
    """Return the whole command line, built once."""
    top = Parser(prog="gpt2c", description="Train and run GPT-2 and Llama on an ordinary CPU.")
    version = importlib.metadata.version("gpt2c")
    top.add_argument("--version", action="version", version=f"gpt2c {version}")
    verbs = top.add_subparsers(required=True, metavar="COMMAND", title="commands")

    verb = _verb(
        verbs,
        "demo",
        run_demo,
        "all steps: prepare a text, train a model on it, compare it, let it write",
    )
    verb.add_argument(
        "--text",
        type=Path,
        help="train on this file or directory of texts instead of Python's documentation",
    )
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    verb.add_argument("--overwrite", action="store_true", help="replace the content of --out")
    add_settings(verb, demo_recipe())

    text = "turn text files into token files"
    cli_prepare.add_flags(_verb(verbs, "prepare", cli_prepare.run_prepare, text))

    verb = _verb(verbs, "train", run_train, "train on token files, or continue a run with --resume")
    verb.add_argument("--data", type=Path, required=True, help="a directory of gpt2c prepare")
    verb.add_argument("--out", type=Path, required=True, help="the run's directory")
    verb.add_argument(
        "--config", help="a TOML file, or demo or shakespeare-char; flags override it"
    )
    verb.add_argument("--resume", action="store_true", help=RESUME)
    verb.add_argument("--overwrite", action="store_true", help="replace the content of --out")
    add_settings(verb, {})

    cli_finetune.add_verbs(partial(_verb, verbs))
    text = "label texts: train a classifier, evaluate it, predict with it"
    inner = verbs.add_parser("classify", help=text, description=text).add_subparsers(
        required=True, metavar="COMMAND", title="commands"
    )
    cli_classify.add_verbs(partial(_verb, inner))
    text = "teach a small model what a large one predicts"
    cli_distill.add_flags(_verb(verbs, "distill", cli_distill.run_distill, text))
    text = "remove layers or neurons of a model, or set weights to 0"
    cli_prune.add_flags(_verb(verbs, "prune", cli_prune.run_prune, text))

    text = "score a model: its loss on held-out text, its answers to questions"
    cli_eval.add_flags(_verb(verbs, "eval", cli_eval.run_eval, text, shows=True))
    text = "continue a text"
    cli_generate.add_flags(_verb(verbs, "generate", cli_generate.run_generate, text, shows=True))
    text = "talk with a model that gpt2c sft has taught to answer"
    cli_chat.add_flags(_verb(verbs, "chat", cli_chat.run_chat, text, shows=True))
    text = "show a text as a tokenizer cuts it: pieces, ids, bytes"
    cli_tokens.add_flags(_verb(verbs, "tokens", cli_tokens.run_tokens, text, shows=True))
    text = "draw runs: loss, learning rate, gradient norm, tokens a second"
    cli_plot.add_flags(_verb(verbs, "plot", cli_plot.run_plot, text))
    text = "convert a model, tokenizer or token files for llm.c, llama.cpp and others, or from them"
    cli_convert.add_flags(_verb(verbs, "convert", cli_convert.run_convert, text))
    text = "make one model of a base and its adapters"
    cli_merge.add_flags(_verb(verbs, "merge", cli_merge.run_merge, text))
    text = "measure backends and PyTorch in turn; their results are verified"
    cli_bench.add_flags(_verb(verbs, "bench", cli_bench.run_bench, text, shows=True))
    text = "show the CPU, backends, threads, versions"
    cli_info.add_flags(_verb(verbs, "info", cli_info.run_info, text, shows=True))
    return top


def _unknown_flag(flag: str, verb: argparse.ArgumentParser) -> str:
    near = _meant(flag.partition("=")[0], verb._option_string_actions)
    return f"unrecognized argument {flag}{near}"


def _meant(word: str, known: Iterable[str]) -> str:
    """Return a question about the nearest of the known words, for an error; "" if none is near."""
    near = difflib.get_close_matches(word, [*known], n=1, cutoff=NEAR)
    return f"; did you mean {near[0]}?" if near else ""


def _verb(
    verbs: Any, name: str, run: Any, text: str, shows: bool = False
) -> argparse.ArgumentParser:
    """Add a verb; `shows` means that its result is its text on standard output."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run, verb=verb, shows=shows)
    verb.register("type", Path, _path)
    return verb


def _path(text: str) -> Path:
    """Return an argument as a path; refuse "", which would be the current directory."""
    try:
        check_named("it", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def run_demo(options: argparse.Namespace) -> int:
    """`gpt2c demo`."""
    require_alone("gpt2c demo")
    result = demo(options.text, options.out, given_settings(options), options.overwrite)
    return (
        _interrupted(result, options.out / "data", options.out / "run") if result.interrupted else 0
    )


def run_train(options: argparse.Namespace) -> int:
    """`gpt2c train`."""
    with join().agreement():
        given = given_settings(options)
        if options.config is not None:
            given = recipe_settings(options.config, given)
    result = train(options.data, options.out, given, options.resume, options.overwrite)
    return _ended(result, options)


def _ended(result: TrainResult, options: argparse.Namespace) -> int:
    """Tell how a run has ended; return the exit code."""
    if result.interrupted:
        return _interrupted(result, options.data, options.out)
    steps = result.step - result.started
    done = f"{steps} steps in {result.seconds:.0f} s"
    if not steps:
        done = f"is already finished after {result.step} steps: raise --max-iters to train further"
    elif result.started:
        done += f", {result.step} in all"
    if result.skipped:
        done += f" ({result.skipped} skipped)"
    if not math.isnan(result.val_loss):  # of a run stopped before, these weights have none
        done += f", validation loss {written(result.val_loss)} nats/token"
    print(f"{options.out}: {done}")
    return 0


def _interrupted(result: TrainResult, data: Path, out: Path) -> int:
    words = "train", "--data", data, "--out", out, "--resume"
    print(
        f"stopped and saved after step {result.step} of {result.max_iters}; continue with:"
        f" {command(*words, ranks=join().size)}"
    )
    return INTERRUPTED
