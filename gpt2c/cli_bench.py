"""`gpt2c bench`: flags in, tables, JSON and pictures out. Used by cli."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpt2c.bench import Result, bench_ops, bench_train, check_threads, choose_rows
from gpt2c.bench_generate import bench_generate, choose_generate_rows
from gpt2c.config import GPT2Config
from gpt2c.machine import measure_ceilings
from gpt2c.plot import can_plot
from gpt2c.report import (
    as_markdown,
    as_text,
    draw,
    generate_table,
    machine_lines,
    ops_table,
    train_table,
    write_json,
)

TABLES = {"ops": ops_table, "train": train_table, "generate": generate_table}


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Say what `gpt2c bench` takes."""
    verb.add_argument(
        "what",
        metavar="ops|train|generate",
        choices=["ops", "train", "generate"],
        help="every op, a training step, or reading and writing text",
    )
    verb.add_argument(
        "--backends",
        metavar="A,B",
        help="rows: default all, and PyTorch if there; generate: avx2:int8 names the weights",
    )
    verb.add_argument("--threads", type=int, help="threads of every row (default: see gpt2c info)")
    verb.add_argument("--quick", action="store_true", help="fewer shapes and samples")
    verb.add_argument(
        "--shape",
        action="append",
        metavar="BxT",
        help="train: a batch of B rows of T tokens; may be repeated (4x64)",
    )
    verb.add_argument("--recompute", choices=["light", "full"], help="train: keep less memory")
    verb.add_argument("--torch-compile", action="store_true", help="train: torch.compile as a row")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    verb.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a roofline (ops) or bars")
    verb.add_argument("--report", type=Path, metavar="FILE.md", help="add the tables in Markdown")


def run_bench(options: argparse.Namespace) -> int:
    """`gpt2c bench`."""
    threads, warning = check_threads(options.threads)
    if options.what == "generate":
        names = choose_generate_rows(options.backends, options.quick)
    else:
        names = choose_rows(options.backends, options.torch_compile and options.what == "train")
    shapes = [_shape(text) for text in options.shape or ["4x64"]]
    if options.what != "train" and (options.shape or options.recompute or options.torch_compile):
        raise ValueError("--shape, --recompute and --torch-compile belong to bench train")
    for path in (options.json, options.plot, options.report):
        if path and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no directory {path.parent}")
    if options.plot and not can_plot():
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if warning:
        print(f"gpt2c: {warning}", file=sys.stderr)
    ceilings = measure_ceilings(threads)
    report = [*machine_lines(ceilings), ""]
    print("\n".join(report), flush=True)

    def show(results: list[Result]) -> None:
        heading, table = TABLES[options.what](results, ceilings)
        print(as_text(heading, table) + "\n", flush=True)
        report.append(as_markdown(heading, table))

    if options.what == "ops":
        results, verdict = bench_ops(names, ceilings, options.quick, show)
    elif options.what == "generate":
        results, verdict = bench_generate(names, ceilings, GPT2Config(), options.quick, show)
    else:
        results, verdict = bench_train(
            names, ceilings, GPT2Config(), shapes, options.recompute, options.quick, show
        )
    print(verdict)
    if options.json:
        write_json(options.json, ceilings, results, verdict)
    if options.report:
        with open(options.report, "a", encoding="utf-8") as file:
            file.write("\n".join([f"## gpt2c bench {options.what}", "", *report, verdict, "", ""]))
    if options.plot:
        draw(options.plot, results, ceilings)
    failed = any(r.note.startswith(("WRONG", "FAILED")) for r in results)
    return 1 if failed or not any(r.seconds for r in results) else 0


def _shape(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
        raise ValueError(f"--shape must be rows x tokens, such as 4x64, got {text!r}")
    return int(rows), int(length)
