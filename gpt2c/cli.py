"""The command line: arguments in, doors called, one line for an error a user can cause.

Knows nothing that the doors do not know.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2c import cli_bench, cli_convert, cli_eval, cli_generate, cli_info, cli_plot, cli_prepare
from gpt2c.command import command
from gpt2c.demo import demo, demo_recipe
from gpt2c.settings import TrainSettings, find_recipe, read_recipe
from gpt2c.train import TrainResult, train

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended
LONGEST = 2000  # characters of an error that are shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gpt2c`; return its exit code.

    0, 1 for a benchmark with a wrong or failed row or with none, 2 for an error of the user's, 130
    for Ctrl-C.
    """
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        options.verb.error(_unknown_flag(unknown[0], options.verb))
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except (
        BrokenPipeError
    ):  # the reader (head, less) has gone: nothing more to say, and no second complaint at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("gpt2c: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        named = error.filename and error.strerror
        _complain(f"{error.filename}: {error.strerror}" if named else str(error))
    except (ValueError, OverflowError) as error:  # a number too large for C, or for a float
        _complain(str(error))
    except MemoryError as error:
        _complain(f"not enough memory: {error}" if str(error) else "not enough memory")
    return 2


def _complain(text: str) -> None:
    """Print one line, whatever the names in a stranger's file do to a terminal."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:LONGEST])
    print(f"gpt2c: {shown}{'...' if text[LONGEST:] else ''}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """Give the whole command line."""
    top = argparse.ArgumentParser(
        prog="gpt2c", description="Train and run GPT-2 on an ordinary CPU."
    )
    version = importlib.metadata.version("gpt2c")
    top.add_argument("--version", action="version", version=f"gpt2c {version}")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    verb = _verb(verbs, "demo", run_demo, "the main job: text to tokens to a model to text")
    verb.add_argument("--text", type=Path, help="learn this file instead of Python's documentation")
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    verb.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    _add_settings(verb, demo_recipe())

    text = "text files to token files"
    cli_prepare.add_flags(_verb(verbs, "prepare", cli_prepare.run_prepare, text))

    verb = _verb(verbs, "train", run_train, "train on token files, or go on with --resume")
    verb.add_argument("--data", type=Path, required=True, help="what gpt2c prepare made")
    verb.add_argument("--out", type=Path, required=True, help="the run's directory")
    verb.add_argument(
        "--config", help="a TOML file, or demo or shakespeare-char; flags override it"
    )
    verb.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    verb.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    _add_settings(verb, {})

    text = "loss, perplexity and bits per byte on held-out text; right answers to questions"
    cli_eval.add_flags(_verb(verbs, "eval", cli_eval.run_eval, text))
    cli_generate.add_flags(_verb(verbs, "generate", cli_generate.run_generate, "continue a text"))
    text = "draw metrics.jsonl: loss, learning rate, gradient norm, tokens a second"
    cli_plot.add_flags(_verb(verbs, "plot", cli_plot.run_plot, text))
    text = "a model, tokenizer or token files for llm.c, llama.cpp, nanoGPT or transformers"
    cli_convert.add_flags(_verb(verbs, "convert", cli_convert.run_convert, text))
    cli_bench.add_flags(
        _verb(
            verbs,
            "bench",
            cli_bench.run_bench,
            "backends and PyTorch side by side, verified, in turn",
        )
    )
    cli_info.add_flags(_verb(verbs, "info", cli_info.run_info, "CPU, backends, threads, versions"))
    return top


def _unknown_flag(flag: str, verb: argparse.ArgumentParser) -> str:
    name = flag.partition("=")[0]
    near = difflib.get_close_matches(name, verb._option_string_actions, n=1)
    return f"unrecognized argument {flag}" + (f"; did you mean {near[0]}?" if near else "")


def _verb(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run, verb=verb)
    return verb


def _add_settings(verb: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Add a flag for each field of TrainSettings; one that is not given leaves no trace."""
    group = verb.add_argument_group("settings of the run", "names of a TOML recipe's keys")
    for field in dataclasses.fields(TrainSettings):
        kind = type(field.default)
        value = {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(
            *dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}")),
            dest=field.name,
            default=argparse.SUPPRESS,
            **({"action": argparse.BooleanOptionalAction} if kind is bool else value),
            help=f"{field.metadata['help']} ({defaults.get(field.name, field.default)})".replace(
                "%", "%%"
            ),
        )


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    return {name: value for name, value in vars(options).items() if name in names}


def run_demo(options: argparse.Namespace) -> int:
    """`gpt2c demo`."""
    result = demo(options.text, options.out, _given(options), options.overwrite)
    return (
        _interrupted(result, options.out / "data", options.out / "run") if result.interrupted else 0
    )


def run_train(options: argparse.Namespace) -> int:
    """`gpt2c train`."""
    recipe = read_recipe(find_recipe(options.config)) if options.config else {}
    given = recipe | _given(options)
    result = train(options.data, options.out, given, options.resume, options.overwrite)
    if result.interrupted:
        return _interrupted(result, options.data, options.out)
    steps = result.step - result.started
    done = f"{steps} steps in {result.seconds:.0f} s"
    if not steps:
        done = f"was finished already, after {result.step} steps (a larger --max-iters goes on)"
    elif result.started:
        done += f", {result.step} in all"
    if result.skipped:
        done += f" ({result.skipped} skipped)"
    if not math.isnan(result.val_loss):  # of a run stopped before, these weights have none
        done += f", validation loss {result.val_loss:.4f} nats/token"
    print(f"{options.out}: {done}")
    return 0


def _interrupted(result: TrainResult, data: Path, out: Path) -> int:
    print(
        f"stopped and saved after step {result.step} of {result.max_iters}; go on with:"
        f" {command('train', '--data', data, '--out', out, '--resume')}"
    )
    return INTERRUPTED
