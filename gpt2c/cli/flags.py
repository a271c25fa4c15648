"""Flags that several verbs share: those of a model, and those of a training run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from gpt2c.parallel.world import launched
from gpt2c.train.settings import Settings, TrainSettings

__all__ = ["RESUME", "add_model", "add_settings", "given_settings"]

RESUME = (
    "continue from the checkpoint in --out, with the same bits as a run without a break; another"
    " --max-iters stretches the learning-rate schedule, so the result is not that of one long run"
)


def add_model(verb: argparse.ArgumentParser) -> None:
    """Add a model for inference, and how it computes.

    These are `model`, `adapter`, `any_base`, `quantize`, `backend` and `threads`.
    """
    verb.add_argument(
        "model",
        metavar="RUN",
        help="a run, a directory of a GPT-2 or Llama, or a name on the hub (gpt2)",
    )
    verb.add_argument("--adapter", metavar="DIR", help="LoRA adapters for it, gpt2c's or PEFT's")
    verb.add_argument(
        "--any-base", action="store_true", help="take adapters of a base with other weights, too"
    )
    verb.add_argument(
        "--quantize", choices=["int8", "fp16"], help="smaller weights: faster, less exact"
    )
    verb.add_argument(
        "--backend", default="auto", help="a name that gpt2c info lists (default: the fastest)"
    )
    verb.add_argument(
        "--threads",
        type=int,
        default=0,
        help="number of threads (default: GPT2C_NUM_THREADS, else all usable cores)",
    )


def add_settings(
    verb: argparse.ArgumentParser,
    defaults: Mapping[str, Any],
    kind: type[Settings] = TrainSettings,
) -> None:
    """Add a flag for each setting of a kind of run; one that is not given sets nothing."""
    verb.add_argument_group(
        "settings",
        "each is a key of a TOML recipe, too, with _ for -, in the table that is named here",
    )
    fields = kind.fields()
    for table, names in kind.tables().items():
        group = verb.add_argument_group(f"[{table}]")
        for name in names:
            default = fields[name].default
            value = {"type": type(default), "metavar": type(default).__name__.upper()}
            text = f"{fields[name].metadata['help']} ({defaults.get(name, default)})"
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                default=argparse.SUPPRESS,
                **({"action": argparse.BooleanOptionalAction} if type(default) is bool else value),
                help=text.replace("%", "%%"),
            )
    verb.set_defaults(settings=kind)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line gives.

    Raises
    ------
    ValueError : a flag for several ranks, without a launcher of them; a recipe may have it
    """
    kind: type[Settings] = options.settings
    given = {name: value for name, value in vars(options).items() if name in kind.fields()}
    for name in ("zero", "transport"):
        if name in given and launched() is None:
            raise ValueError(
                f"--{name} {given[name]} is for several ranks, and this process is alone: begin the"
                f" command with mpiexec -n 2, or leave --{name} out"
            )
    return given
