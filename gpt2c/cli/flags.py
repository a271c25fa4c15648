"""Flags that several verbs share: those of a model, and those of a training run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt2c.train.settings import TABLES, TrainSettings

__all__ = ["add_model", "add_settings", "given_settings"]


def add_model(verb: argparse.ArgumentParser) -> None:
    """Add a model for inference, and how it computes: `model`, `quantize`, `backend`, `threads`."""
    verb.add_argument(
        "model",
        metavar="RUN",
        help="a run, a directory of a GPT-2 or Llama, or a name on the hub (gpt2)",
    )
    verb.add_argument(
        "--quantize", choices=["int8", "fp16"], help="smaller weights: faster, less exact"
    )
    verb.add_argument(
        "--backend", default="auto", help="a name that gpt2c info lists (default: the fastest)"
    )
    verb.add_argument(
        "--threads", type=int, default=0, help="how many threads (0: as many as the machine allows)"
    )


def add_settings(verb: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Add a flag for each field of TrainSettings; one that is not given sets nothing."""
    verb.add_argument_group(
        "settings",
        "each is a key of a TOML recipe, too, with _ for -, in the table that is named here",
    )
    groups = {table: verb.add_argument_group(f"[{table}]") for table in TABLES}
    for field in dataclasses.fields(TrainSettings):
        kind = type(field.default)
        value = {"type": kind, "metavar": kind.__name__.upper()}
        groups[field.metadata["table"]].add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=argparse.SUPPRESS,
            **({"action": argparse.BooleanOptionalAction} if kind is bool else value),
            help=f"{field.metadata['help']} ({defaults.get(field.name, field.default)})".replace(
                "%", "%%"
            ),
        )


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line gives."""
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    return {name: value for name, value in vars(options).items() if name in names}
