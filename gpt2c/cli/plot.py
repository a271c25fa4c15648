"""`gpt2c plot`: flags in, a picture out, and a line for each run."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2c.evaluate.figures import figures, written
from gpt2c.files.names import METRICS_FILE, RUN_FILE, RUNS_FILE, meant
from gpt2c.files.untrusted import read_json
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.metrics import read_figures
from gpt2c.train.plot import LOSS, plot_runs, shorten

__all__ = ["add_flags", "run_plot"]

Entries = list[dict[str, Any]]
TOKENS = "nats per token"
BYTES = "bits per byte"
LAST = 10  # losses that are averaged, as in a line of training: a single one is noisy


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c plot`."""
    verb.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run of any verb that trains"
    )
    verb.add_argument(
        "--out", type=Path, metavar="FILE.png", help="default: plot.png in the first run"
    )


def run_plot(options: argparse.Namespace) -> int:
    """`gpt2c plot`."""
    out = options.out or options.runs[0] / RUNS_FILE
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: a picture is a PNG file; give --out a name that ends in .png")
    runs: dict[Path, Entries] = {}
    for path in options.runs:
        if not (path / METRICS_FILE).is_file():
            raise FileNotFoundError(
                f"{path} is not a run: it has no {METRICS_FILE}{meant(path, METRICS_FILE)}"
            )
        entries = read_figures(path)
        if not entries:
            raise ValueError(f"{path / METRICS_FILE} holds no step that can be drawn")
        runs[path] = entries
    pictures = {path: _picture(path) for path in runs}
    unit, (loss, *different) = TOKENS, dict.fromkeys(own.loss for own in pictures.values())
    if different:
        loss = "losses of different kinds: do not compare"
    if loss == LOSS and not _one_tokenizer(runs):
        sizes = {path: _bytes_per_token(path) for path in runs}
        if all(sizes.values()):
            unit = BYTES
            runs = {path: _in_bits(entries, sizes[path]) for path, entries in runs.items()}
        else:
            unit = f"{TOKENS}: tokenizers differ, do not compare"
            unknown = ", ".join(str(path) for path, size in sizes.items() if not size)
            print(
                f"gpt2c: the runs have different tokenizers, and {unknown} does not say how many"
                " bytes a token of its text has: losses are drawn in nats per token, which must"
                " not be compared; gpt2c eval gives bits per byte",
                file=sys.stderr,
            )
        loss = LOSS.replace(TOKENS, unit)
    others = [*dict.fromkeys(name for own in pictures.values() for name in own.metrics)]
    named = {str(path): entries for path, entries in runs.items()}
    lacking = plot_runs(named, out, loss, others)
    if shown := "".join(c for c in lacking if c.isprintable()):  # a control character has no font
        print(
            f"gpt2c: no font here has {shown}: the picture shows their codes; install a font"
            " such as Noto Sans CJK",
            file=sys.stderr,
        )
    _tell(runs, pictures, unit)
    print(out)
    return 0


class Picture(NamedTuple):
    """What a run's picture shows: the label of its losses, and metrics beside them."""

    loss: str
    metrics: Sequence[str]


def _picture(path: Path) -> Picture:
    """Return what run.json says of a run's picture; a run without one is of pretraining."""
    try:
        record = read_json(path / RUN_FILE)
    except (OSError, ValueError):
        return Picture(LOSS, ())
    if "verb" not in record:
        return Picture(LOSS, ())
    found = record.get("picture")
    entries = found if isinstance(found, dict) else {}
    loss, metrics = entries.get("loss"), entries.get("metrics")
    names = metrics if isinstance(metrics, list) else []
    return Picture(
        loss if isinstance(loss, str) else "loss (lower is better)",
        [name for name in names if isinstance(name, str) and name.isprintable()],
    )


def _one_tokenizer(paths: Iterable[Path]) -> bool:
    """Return whether no two runs have different tokenizers; a run without one fits all."""
    found = set()
    for path in paths:
        try:
            found.add(Tokenizer.from_pretrained(path).fingerprint)
        except (OSError, ValueError):
            continue
    return len(found) <= 1


def _bytes_per_token(path: Path) -> dict[str, float]:
    """Return the bytes per token of a run's texts, "train" and "val"; {} if unknown."""
    try:
        sizes = read_json(path / RUN_FILE).get("bytes_per_token")
    except (OSError, ValueError):
        return {}
    if not isinstance(sizes, dict):
        return {}
    known: dict[str, Any] = {split: sizes.get(split) for split in ("train", "val")}
    return (
        known if all(type(x) in (int, float) and 0 < x < math.inf for x in known.values()) else {}
    )


def _in_bits(entries: Entries, sizes: dict[str, float]) -> Entries:
    """Return a run's metrics, with losses in bits per byte of its texts, not nats per token."""
    splits = {"loss": sizes["train"], "val_loss": sizes["val"]}
    found = []
    for entry in entries:
        losses = {
            name: figures(entry[name], 1).bits_per_token / size
            for name, size in splits.items()
            if entry.get(name) is not None
        }
        found.append(entry | losses)
    return found


def _tell(runs: dict[Path, Entries], pictures: Mapping[Path, Picture], unit: str) -> None:
    """Print a line for each run: its steps, last losses, other metrics and speed."""
    labels = shorten([str(path) for path in runs])
    for label, (path, entries) in zip(labels, runs.items(), strict=True):
        parts = [f"{entries[-1]['step']:,} steps"]
        own = f" {unit}" if pictures[path].loss == LOSS else ""
        losses, validation = (_values(entries, name) for name in ("loss", "val_loss"))
        if losses:
            last = losses[-LAST:]
            of = f"mean of the last {len(last)} steps" if len(last) > 1 else "of one step"
            parts.append(f"training loss {written(_mean(last))}{own} ({of})")
        if validation:
            lowest = f"lowest {written(min(validation))}"
            parts.append(f"validation loss {written(validation[-1])}{own} ({lowest})")
        for name in pictures[path].metrics:
            if values := _values(entries, name):
                checked = _values(entries, f"val_{name}")
                held = f" (validation {written(checked[-1])})" if checked else ""
                parts.append(f"{name} {written(_mean(values[-LAST:]))}{held}")
        speeds = [e["tokens_per_second"] for e in entries if e.get("tokens_per_second")]
        if speeds:
            parts.append(f"{np.median(speeds):,.0f} tokens/s")
        print(f"{label}: {', '.join(parts)}")


def _values(entries: Entries, name: str) -> list[float]:
    return [entry[name] for entry in entries if entry.get(name) is not None]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
