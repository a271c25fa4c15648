"""`gpt2c prune`: flags in, a smaller model and a table out."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gpt2c.evaluate.figures import written
from gpt2c.finetune import prune
from gpt2c.finetune.prune import METHODS, PruneSettings
from gpt2c.screen.command import command

__all__ = ["add_flags", "run_prune"]

EPILOG = """\
Fewer layers and inner neurons make a model smaller and faster. Weights that are 0 do not: the file
is as large, and every weight is multiplied."""
ROWS = {  # of the table -> decimals
    "val_loss": 4,
    "parameters": 0,
    "bytes": 0,
    "zeros": 3,
    "tokens_per_second": 0,
}
FIELDS = ("layers", "mlp", "sparsity", "method", "mask_structure", "calibration_tokens")


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the flags of `gpt2c prune`."""
    verb.epilog = EPILOG
    verb.add_argument("model", metavar="MODEL", help="a run, a directory of a model, or a name")
    text = "texts or other examples, or a directory of gpt2c prepare"
    verb.add_argument("data", metavar="DATA", help=text)
    verb.add_argument("--out", type=Path, required=True, help="the new model's directory")
    verb.add_argument("--layers", type=int, help="how many layers stay")
    verb.add_argument("--mlp", type=float, help="the share of the MLPs' inner neurons that stay")
    text = "the share of the layers' weights that become 0"
    verb.add_argument("--sparsity", type=float, help=text)
    text = "the score of these weights (wanda)"
    verb.add_argument("--method", choices=METHODS, default="wanda", help=text)
    text = "2:4 keeps 2 of each 4 weights of a row, in place of a sparsity"
    verb.add_argument("--mask-structure", metavar="N:M", help=text)
    most = PruneSettings.calibration_tokens
    text = f"tokens that are observed, of the training part ({most})"
    verb.add_argument("--calibration-tokens", type=int, default=most, help=text)
    verb.add_argument("--backend", default="auto", help="a name that gpt2c info lists")
    verb.add_argument("--threads", type=int, default=0, help="(0: all usable cores)")


def run_prune(options: argparse.Namespace) -> int:
    """Prune a model."""
    given = {name: getattr(options, name) for name in (*FIELDS, "backend", "threads")}
    pruned = prune(options.model, options.data, options.out, **given)
    for text in pruned.said:
        print(text)
    print(f"{'':17}  {'before':>14}  {'after':>14}")
    for name, decimals in ROWS.items():
        before, after = (
            written(figures[name], decimals, most=math.inf)
            for figures in (pruned.before, pruned.after)
        )
        print(f"{name:17}  {before:>14}  {after:>14}")
    zeros = options.sparsity is not None or options.mask_structure is not None
    if zeros:
        print("zeros bring no speed and no smaller file: every weight is multiplied")
    keep = ["--keep-zeros"] if zeros else []
    heal = command(
        *("distill", options.model, options.data, "--student", options.out, *keep),
        *("--out", f"{options.out}-healed"),
    )
    print(f"{options.out}: heal it with {heal}")
    return 0
