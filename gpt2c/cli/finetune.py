"""`gpt2c sft` and the other methods of fine-tuning: flags in, a run and its figures out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2c.cli.flags import add_settings, given_settings
from gpt2c.evaluate.figures import written
from gpt2c.files.names import RUN_FILE
from gpt2c.finetune import grpo, sft
from gpt2c.finetune.beginner import beginner
from gpt2c.finetune.grpo import GRPOSettings
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.finetune.sft import SFTSettings
from gpt2c.finetune.tasks import TASKS
from gpt2c.finetune.tune import Result
from gpt2c.screen.command import command
from gpt2c.train.settings import recipe_settings

__all__ = ["add_verbs", "run_method"]

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
# verb -> its function, the class of its settings, its help
METHODS: dict[str, tuple[Callable[..., Result], type[FinetuneSettings], str]] = {
    "sft": (sft, SFTSettings, "fine-tune a model on examples: it learns the answers, not prompts"),
    "grpo": (
        grpo,
        GRPOSettings,
        "train a model by rewards of what it writes: GRPO, RLOO, PPO, RFT",
    ),
}


def add_verbs(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb of each method; `add` makes one of its name, function and help."""
    for name, (_, kind, text) in METHODS.items():
        verb = add(name, run_method, text)
        optional = "?" if "task" in kind.fields() else None  # a task makes them
        text = "a run, a directory of a model, or a name"
        verb.add_argument("base", metavar="BASE", nargs=optional, help=text)
        text = "a file of examples: JSONL, JSON or CSV"
        verb.add_argument("data", metavar="DATA", nargs=optional, help=text)
        verb.add_argument("--out", type=Path, required=True, help="the run's directory")
        verb.add_argument("--config", help="a TOML file or a recipe's name; flags override it")
        verb.add_argument("--resume", action="store_true", help="continue the run in --out")
        verb.add_argument("--overwrite", action="store_true", help="replace the content of --out")
        add_settings(verb, {}, kind)
        verb.set_defaults(method=name)


def run_method(options: argparse.Namespace) -> int:
    """Run a method of fine-tuning."""
    tune, kind, _ = METHODS[options.method]
    given = given_settings(options)
    if options.base is None:
        return _from_nothing(options, given)
    if options.config is not None:
        given = recipe_settings(options.config, given, kind)
    result = tune(
        *(options.base, options.data, options.out),
        resume=options.resume,
        overwrite=options.overwrite,
        **given,
    )
    return _ended(options, result)


def _from_nothing(options: argparse.Namespace, given: dict[str, Any]) -> int:
    """Make a beginner at a task in --out, and train it by rewards, with the recipe of the method.

    With --resume, what the beginner needs is made again unless the training by rewards had begun.
    """
    given = recipe_settings(options.config or options.method, given, GRPOSettings)
    out = options.out
    options.base, options.out = out / "sft", out / options.method
    goes_on = options.resume and (options.out / RUN_FILE).exists()
    if not goes_on:
        if not given.get("task"):
            raise ValueError(f"name a base, or a task to begin with: --task {'|'.join(TASKS)}")
        shared = {name: given[name] for name in ("threads", "backend", "seed") if name in given}
        if (
            beginner(given["task"], out, overwrite=options.overwrite or options.resume, **shared)
            is None
        ):
            print(f"stopped before {options.out}; begin again with --overwrite")
            return INTERRUPTED
    result = grpo(
        *(options.base, None, options.out),
        resume=goes_on,
        overwrite=options.overwrite or (options.resume and not goes_on),
        **given,
    )
    return _ended(options, result)


def _ended(options: argparse.Namespace, result: Result) -> int:
    """Print how a run ended, and return the exit code."""
    if result.interrupted:
        data = [] if options.data is None else [options.data]
        verb = command(options.method, options.base, *data, "--out", options.out, "--resume")
        print(f"stopped after step {result.step} of {result.max_iters}; go on with: {verb}")
        return INTERRUPTED
    print(f"{options.out}: {result.step} steps in {result.seconds:.0f} s")
    print_change(result.before, result.after)
    return 0


def print_change(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Print a table of figures before and after."""
    if not after:
        return
    width = max(map(len, after))
    print(f"{'':{width}}  {'before':>10}  {'after':>10}")
    for name, value in after.items():
        first = written(before[name]) if name in before else ""
        print(f"{name:{width}}  {first:>10}  {written(value):>10}")
