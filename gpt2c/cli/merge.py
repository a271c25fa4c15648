"""`gpt2c merge`: a model and its adapters become one model, for every other program."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from gpt2c.files.atomic import check_apart, check_directory
from gpt2c.formats.load import find_model, model_kind
from gpt2c.kernels.checks import counted
from gpt2c.pretrained import open_found
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.text.vocabulary import has_tokenizer

__all__ = ["add_flags", "run_merge"]

PROBE = 64  # tokens on which both are compared


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c merge`."""
    verb.add_argument("model", metavar="RUN", help="a run with --lora, or the base of --adapter")
    verb.add_argument("--adapter", metavar="DIR", help="LoRA adapters for it, gpt2c's or PEFT's")
    verb.add_argument(
        "--any-base", action="store_true", help="take adapters of a base with other weights, too"
    )
    verb.add_argument("--out", type=Path, required=True, help="the directory of the merged model")
    verb.add_argument("--overwrite", action="store_true", help="replace files in --out")


def run_merge(options: argparse.Namespace) -> int:
    """`gpt2c merge`."""
    found = find_model(options.model, None, options.adapter, not options.any_base)
    if found.config.lora is None:
        raise ValueError(f"{options.model} holds no adapters to merge; --adapter names some")
    if model_kind(options.out) == "adapters":
        raise ValueError(f"{options.out} holds adapters: name another directory")
    check_apart(options.out, options.model, options.adapter, found.name)
    check_directory(options.out, options.overwrite)
    model = open_found(found)
    merged = model.merge()
    rng, most = np.random.default_rng(1), min(PROBE, found.config.n_positions)
    probe = rng.integers(0, found.config.vocab_size, (1, most))
    before, after = model(probe), merged(probe)
    apart = np.abs(after - before).max() / (np.abs(before).max() or 1)
    merged.save_pretrained(options.out)
    if has_tokenizer(found.path):
        Tokenizer.from_pretrained(found.path).save_pretrained(options.out)
    what = "logits" if found.config.num_labels is None else "scores"
    print(
        f"{options.out}: the model of {found.name} with its adapters of rank"
        f" {found.config.lora.r}; {what} of {counted(most, 'random token')} differ by"
        f" {apart:.1e} of the largest"
    )
    return 0
