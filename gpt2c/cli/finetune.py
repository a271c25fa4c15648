"""`gpt2c sft` and the other methods of fine-tuning: flags in, a run and its figures out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gpt2c.cli.flags import RESUME, add_settings, given_settings
from gpt2c.evaluate.figures import written
from gpt2c.files.atomic import check_directory
from gpt2c.files.names import RUN_FILE
from gpt2c.finetune import dpo, grpo, reward, sft
from gpt2c.finetune.beginner import beginner
from gpt2c.finetune.data import SupervisedSettings
from gpt2c.finetune.dpo import DPOSettings
from gpt2c.finetune.grpo import GRPOSettings
from gpt2c.finetune.reward import RewardSettings
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.finetune.sft import SFTSettings
from gpt2c.finetune.tasks import TASKS
from gpt2c.finetune.tune import Result
from gpt2c.parallel.world import join, require_alone
from gpt2c.screen.command import command
from gpt2c.train.settings import recipe_settings
from gpt2c.train.stop import interruptible

__all__ = [
    "add_run",
    "add_verbs",
    "given_run",
    "print_change",
    "print_done",
    "run_method",
    "say_stopped",
]

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
AGAIN = ("--overwrite", "--resume")  # say what becomes of an earlier run
PAIRS = """\
DATA is JSONL, a JSON list, or CSV with a line of names; prompt, chosen and rejected are strings or
lists of messages:
  {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
  {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}
  {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
"""
DATA = {  # verb -> the fields of its examples
    "sft": """\
DATA is JSONL, a JSON list, or CSV with a line of names:
  {"prompt": "2+2=", "completion": "4"}
  {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
  {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
  {"instruction": "Add.", "input": "2+2", "output": "4"}
  {"text": "all of it is learned"}
or a directory of gpt2c prepare, whose text is learned as in pretraining.
""",
    "reward": f"""\
{PAIRS}\
"margin": 1.5 says by how much the chosen should be worth more, if that is known.
""",
    "dpo": f"""\
{PAIRS}\
with --loss-type kto single answers, which were liked or not:
  {{"prompt": "2+2=", "completion": "4", "label": true}}
""",
    "grpo": """\
DATA is JSONL, a JSON list, or CSV with a line of names; other fields go to the reward functions:
  {"prompt": "2+2=", "answer": "4"}
  {"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}
""",
}
# verb -> its function, the class of its settings, its help
METHODS: dict[str, tuple[Callable[..., Result], type[FinetuneSettings], str]] = {
    "sft": (sft, SFTSettings, "fine-tune a model on examples: it learns the answers, not prompts"),
    "reward": (reward, RewardSettings, "train a reward model: a number for each text, by pairs"),
    "dpo": (dpo, DPOSettings, "teach a model which answers are preferred, by DPO or its kin"),
    "grpo": (grpo, GRPOSettings, "train a model by rewards of its texts: GRPO, RLOO, PPO, RFT"),
}


def add_verbs(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb of each method; `add` makes one of its name, function and help."""
    for name, (_, kind, text) in METHODS.items():
        verb = add(name, run_method, text)
        add_run(verb, kind)
        verb.formatter_class = argparse.RawDescriptionHelpFormatter
        verb.epilog = DATA[name]
        verb.set_defaults(method=name)


def add_run(verb: argparse.ArgumentParser, kind: type[FinetuneSettings]) -> None:
    """Add what a run begins with, its directory, and its settings."""
    optional = "?" if "task" in kind.fields() else None  # a task makes both
    text = "a run, a directory of a model, or a name"
    verb.add_argument("base", metavar="BASE", nargs=optional, help=text)
    text = "a file of examples: JSONL, JSON or CSV"
    if issubclass(kind, SupervisedSettings):
        text += "; of texts also a directory of gpt2c prepare"
    verb.add_argument("data", metavar="DATA", nargs=optional, help=text)
    verb.add_argument("--out", type=Path, required=True, help="the run's directory")
    verb.add_argument("--config", help="a TOML file or a recipe's name; flags override it")
    verb.add_argument("--resume", action="store_true", help=RESUME)
    verb.add_argument("--overwrite", action="store_true", help="replace the content of --out")
    add_settings(verb, {}, kind)


def run_method(options: argparse.Namespace) -> int:
    """Run a method of fine-tuning."""
    tune, kind, _ = METHODS[options.method]
    chain = options.base is None
    with interruptible(join()) if chain else nullcontext():
        if chain and not _begin(options):
            return INTERRUPTED
        result = tune(*(options.base, options.data, options.out), **given_run(options, kind))
    if result.interrupted:
        return say_stopped(result, options.method, options)
    print_done(options, [result])
    print_change(result.before, result.after)
    return 0


def _begin(options: argparse.Namespace) -> bool:
    """Make the base that options lack, a beginner at a task, in --out; the run moves into it, too.

    With --resume each run that had begun continues.

    Returns
    -------
    whether it is there; a signal may have ended it
    """
    with join().agreement():
        given = given_settings(options)
        if "task" not in given:
            raise ValueError(f"name a base, or a task to begin with: --task {'|'.join(TASKS)}")
    home, words = options.out, [word for word in options.words if word not in AGAIN]
    options.base, options.out = home / "sft", home / options.method
    options.config = options.config or options.method
    if options.resume and join().by_first((options.out / RUN_FILE).exists):
        return True
    require_alone("the making of a beginner")
    resume, options.resume = options.resume, False
    check_directory(options.out, options.overwrite)
    shared = {name: given[name] for name in ("threads", "backend", "seed") if name in given}
    if beginner(given["task"], home, overwrite=options.overwrite, resume=resume, **shared):
        return True
    print(f"stopped before {options.out}; continue with: {command(*words, '--resume')}")
    return False


def given_run(options: argparse.Namespace, kind: type[FinetuneSettings]) -> dict[str, Any]:
    """Return what the flags of `add_run` and a recipe give."""
    with join().agreement():
        given = given_settings(options)
        if options.config is not None:
            given = recipe_settings(options.config, given, kind)
    return {"resume": options.resume, "overwrite": options.overwrite, **given}


def say_stopped(result: Result, verb: str, options: argparse.Namespace, *flags: str) -> int:
    """Say how to continue a run that a signal has stopped; return the exit code."""
    data = [] if options.data is None else [options.data]
    rest = (*data, *flags, "--out", options.out, "--resume")
    again = command(*verb.split(), options.base, *rest, ranks=join().size)
    print(f"stopped after step {result.step} of {result.max_iters}; continue with: {again}")
    return INTERRUPTED


def print_done(options: argparse.Namespace, runs: Sequence[Result]) -> None:
    """Print the steps of runs, and their time."""
    step, seconds = sum(run.step for run in runs), sum(run.seconds for run in runs)
    whole = f"; {sum(run.step_seconds for run in runs):.0f} s of steps in all, before --resume too"
    print(f"{options.out}: {step} steps in {seconds:.0f} s{whole * options.resume}")


def print_change(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Print a table of figures before and after."""
    if not after:
        return
    width = max(map(len, after))
    print(f"{'':{width}}  {'before':>10}  {'after':>10}")
    for name, value in after.items():
        first = written(before[name]) if name in before else ""
        print(f"{name:{width}}  {first:>10}  {written(value):>10}")
