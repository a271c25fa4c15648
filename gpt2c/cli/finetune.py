"""`gpt2c sft` and the other methods of fine-tuning: flags in, a run and its figures out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2c.cli.flags import add_settings, given_settings
from gpt2c.evaluate.figures import written
from gpt2c.finetune import dpo, reward, sft
from gpt2c.finetune.dpo import DPOSettings
from gpt2c.finetune.reward import RewardSettings
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.finetune.sft import SFTSettings
from gpt2c.finetune.tune import Result
from gpt2c.screen.command import command
from gpt2c.train.settings import recipe_settings

__all__ = ["add_run", "add_verbs", "given_run", "print_change", "run_method", "say_stopped"]

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
# verb -> its function, the class of its settings, its help
METHODS: dict[str, tuple[Callable[..., Result], type[FinetuneSettings], str]] = {
    "sft": (sft, SFTSettings, "fine-tune a model on examples: it learns the answers, not prompts"),
    "reward": (reward, RewardSettings, "train a reward model: a number for each text, by pairs"),
    "dpo": (dpo, DPOSettings, "teach a model which answers are preferred, by DPO or its kin"),
}


def add_verbs(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb of each method; `add` makes one of its name, function and help."""
    for name, (_, kind, text) in METHODS.items():
        verb = add(name, run_method, text)
        add_run(verb, kind)
        verb.set_defaults(method=name)


def add_run(verb: argparse.ArgumentParser, kind: type[FinetuneSettings]) -> None:
    """Add what a run begins with, its directory, and its settings."""
    verb.add_argument("base", metavar="BASE", help="a run, a directory of a model, or a name")
    verb.add_argument("data", metavar="DATA", help="a file of examples: JSONL, JSON or CSV")
    verb.add_argument("--out", type=Path, required=True, help="the run's directory")
    verb.add_argument("--config", help="a TOML file or a recipe's name; flags override it")
    verb.add_argument("--resume", action="store_true", help="continue the run in --out")
    verb.add_argument("--overwrite", action="store_true", help="replace the content of --out")
    add_settings(verb, {}, kind)


def run_method(options: argparse.Namespace) -> int:
    """Run a method of fine-tuning."""
    tune, kind, _ = METHODS[options.method]
    result = tune(*(options.base, options.data, options.out), **given_run(options, kind))
    if result.interrupted:
        return say_stopped(result, options.method, options)
    print(f"{options.out}: {result.step} steps in {result.seconds:.0f} s")
    print_change(result.before, result.after)
    return 0


def given_run(options: argparse.Namespace, kind: type[FinetuneSettings]) -> dict[str, Any]:
    """Return what the flags of `add_run` and a recipe give."""
    given = given_settings(options)
    if options.config is not None:
        given = recipe_settings(options.config, given, kind)
    return {"resume": options.resume, "overwrite": options.overwrite, **given}


def say_stopped(result: Result, verb: str, options: argparse.Namespace) -> int:
    """Say how a run that a signal has stopped goes on; return the exit code."""
    go_on = command(*verb.split(), options.base, options.data, "--out", options.out, "--resume")
    print(f"stopped after step {result.step} of {result.max_iters}; go on with: {go_on}")
    return INTERRUPTED


def print_change(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Print a table of figures before and after."""
    if not after:
        return
    width = max(map(len, after))
    print(f"{'':{width}}  {'before':>10}  {'after':>10}")
    for name, value in after.items():
        first = written(before[name]) if name in before else ""
        print(f"{name:{width}}  {first:>10}  {written(value):>10}")
