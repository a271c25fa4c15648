"""`gpt2c bench`: flags in, tables, JSON and pictures out."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt2c.bench.decoding import CONTEXT, WORKS, bench_generate, choose_generate_rows
from gpt2c.bench.machine import Quiet, distance_text, fastest, measure_ceilings
from gpt2c.bench.ranks import Team, add_speed_ups
from gpt2c.bench.report import (
    NOISY,
    as_markdown,
    as_text,
    comparison,
    draw,
    generate_table,
    machine_lines,
    ops_table,
    ranks_table,
    read_old,
    summary_table,
    train_table,
    write_json,
)
from gpt2c.bench.suite import (
    TORCH,
    Follower,
    Measurement,
    bench_ops,
    bench_train,
    check_threads,
    choose_rows,
    lacks,
    ops_work,
)
from gpt2c.formats.load import AnyConfig
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.parallel.same import check_command
from gpt2c.parallel.world import ALONE, Ranks, World, join, require_alone
from gpt2c.screen.picture import why_not

__all__ = ["add_flags", "run_bench"]

TABLES = {"ops": ops_table, "train": train_table, "generate": generate_table}
SHAPES: dict[str, AnyConfig] = {
    "gpt2": GPT2Config(),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    ),
}
LISTENS = 9  # timings before the start that show how noisy the machine is
HELP = {
    "ops": (
        "every op, forward and backward, at the shapes of GPT-2 124M",
        "B sequences of T tokens, N rows in all, C channels, OC output channels, NH heads of HS"
        " channels, V tokens of the vocabulary, R rows of a matrix, n numbers; position: the place"
        " in a cache of length P. ± is half the distance between the quartiles. The ceiling is the"
        " least time that an op's operations or bytes can take on this machine. Above 100 %, the"
        " data came from a cache, or the machine was busy when the ceiling was measured.",
    ),
    "train": (
        "a whole training step of GPT-2 124M, or another --model, clipping and AdamW included",
        "The peak is that of multiply-adds in registers, measured at the start. Memory is the peak"
        " of the row's process. Under mpiexec, the fastest backend or each of --backends has a"
        " row of one rank alone, and a row of all ranks, which share the batch. MB sent and waiting"
        " are of one rank: the bytes of a step, and the share of its time.",
    ),
    "generate": (
        "GPT-2 124M, or another --model, reading 512 tokens (prefill), and writing 1 and 8 texts"
        " (decode)",
        "Rows: each backend with fp32, fp16 and int8 weights, and, if they are installed,"
        " transformers, onnxruntime, ctranslate2, llama.cpp (llama-cpp-python) and openvino."
        " --quick takes the fastest backend and transformers. transformers-compile is measured if"
        " --backends names it. Weights are random. int8 may exceed the peak of fp32.",
    ),
}


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c bench`: a kind of work, and flags before it or after."""
    _add_flags(verb, "")
    kinds = verb.add_subparsers(dest="what", required=True, metavar="ops|train|generate")
    for what, (text, more) in HELP.items():
        kind = kinds.add_parser(what, help=text, description=f"Measure {text}.", epilog=more)
        kind.set_defaults(verb=kind)
        _add_flags(kind, what)


def _add_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flags of a kind of work, of all for ""; a kind's help hides those of the others."""

    def add(flag: str, text: str, only: str = "", **more: Any) -> None:
        is_shown = not only or what in ("", only)
        prefix = f"{only}: " if only and not what else ""
        text = prefix + text if is_shown else argparse.SUPPRESS
        # the default of a flag after the kind of work must not undo the flag before it
        given: dict[str, Any] = {"default": argparse.SUPPRESS} if what else {}
        parser.add_argument(flag, help=text, **more, **given)

    rows = "rows to measure, commas between (default: all that run here)"
    rows += (
        "; avx2:int8 names the weights, avx2:int8:fp16 keys and values too"
        if what in ("", "generate")
        else ""
    )
    add("--backends", rows, metavar="A,B")
    add("--threads", "threads of every row (default: see gpt2c info)", type=int)
    text = "gpt2, which is GPT-2 124M (default), or a Llama of this shape"
    add("--model", text, "train" if what == "ops" else "", choices=sorted(SHAPES))
    add("--quick", "fewer shapes, rows and samples", action="store_true")
    text = "a batch of B rows of T tokens; may be repeated (4x64)"
    add("--shape", text, "train", action="append", metavar="BxT")
    text = "write this many texts at a time and measure nothing else; may be repeated"
    add("--batch", text, "generate", action="append", type=int, metavar="B")
    add("--recompute", "recompute activations: less memory", "train", choices=["light", "full"])
    add("--torch-compile", "add a row: PyTorch with torch.compile", "train", action="store_true")
    add("--json", "write every sample and the machine's facts", type=Path, metavar="FILE")
    text = "print old, new and their ratio for each row of an older --json file"
    add("--compare", text, type=Path, metavar="OLD.json")
    text = "draw how near its ceiling each op comes" if what == "ops" else "draw tokens a second"
    text = text if what else "draw shares of the ceiling (ops) or tokens a second"
    add("--plot", text, type=Path, metavar="FILE.png")
    add("--report", "append the tables in Markdown", type=Path, metavar="FILE.md")


def run_bench(options: argparse.Namespace) -> int:
    """`gpt2c bench`: of several ranks the first one measures, and the others serve it."""
    if options.what != "train":
        require_alone(f"gpt2c bench {options.what}")
    world = join()
    if not isinstance(world, Ranks):
        return _bench(options, *check_threads(options.threads))
    check_command(world, "gpt2c bench train")
    with world.agreement():
        _check_ranks(options, world)
        threads, warning = check_threads(world.take_cores(options.threads or 0))
    team = Team(world, threads)
    if world.rank:
        with world.guard():
            team.serve()
        return 0
    options.backends = options.backends or fastest()
    try:
        return _bench(options, threads, warning, team)
    finally:
        team.end()


def _check_ranks(options: argparse.Namespace, world: World) -> None:
    """Refuse what several ranks cannot do; the other flags are checked as in one process."""
    check_threads(options.threads)
    names = [name.strip() for name in (options.backends or "").split(",")]
    if options.torch_compile or set(names) & {*TORCH}:
        raise ValueError(
            "PyTorch is measured in one process: start gpt2c bench train without mpiexec, or leave"
            " PyTorch out"
        )
    for B, T in _shapes(options):
        if B % world.size:
            raise ValueError(
                f"{world.size} ranks cannot share {B} rows equally: pass a --shape such as"
                f" {world.size * max(1, B // world.size)}x{T}"
            )


def _bench(
    options: argparse.Namespace, threads: int, warning: str, team: Team | None = None
) -> int:
    """Check the flags, measure, and show the results."""
    if options.what == "generate":
        names = choose_generate_rows(options.backends, options.quick)
    else:
        names = choose_rows(options.backends, options.torch_compile and options.what == "train")
    shapes = _shapes(options)
    if options.what == "ops" and options.model:
        raise ValueError("--model belongs to bench train and bench generate")
    if options.what != "train" and (options.shape or options.recompute or options.torch_compile):
        raise ValueError("--shape, --recompute and --torch-compile belong to bench train")
    if options.what != "generate" and options.batch:
        raise ValueError("--batch belongs to bench generate")
    if any(B < 1 for B in options.batch or []):
        raise ValueError(f"--batch must be at least 1, got {min(options.batch)}")
    readings = [("decode", B, CONTEXT) for B in dict.fromkeys(options.batch or [])] or WORKS
    for path in (options.json, options.plot, options.report):
        _check_output(path)
    if options.plot and options.plot.suffix.lower() != ".png":
        raise ValueError(f"{options.plot}: a picture is a PNG file; give --plot a name in .png")
    if options.plot and (why := why_not()):
        raise ValueError(f"--plot: {why}")
    old = read_old(options.compare, options.what) if options.compare else None
    if warning:
        print(f"gpt2c: {warning}", file=sys.stderr)
    missing: dict[str, list[str]] = {}
    for name in names:
        if lacking := lacks(name):
            missing.setdefault(lacking, []).append(name)
    absent = [name for found in missing.values() for name in found]
    names = [name for name in names if name not in absent]
    said = [f"{', '.join(rows)} (pip install {found})" for found, rows in missing.items()]
    if not names:
        raise ValueError(f"not installed: {', '.join(said)}")
    ceilings = measure_ceilings(threads)
    lines = machine_lines(ceilings) + ([f"not installed: {'; '.join(said)}"] if said else [])
    lines += [team.world.report.removeprefix("; ")] if team else []
    if (noise := _listen(threads)).startswith(NOISY):
        lines.insert(0, f"{noise} before the start: its other programs slow some rows down")
    print("\n".join([*lines, ""]), flush=True)
    config = SHAPES[options.model or "gpt2"]
    works = {"ops": len(ops_work(options.quick)), "train": len(shapes), "generate": len(readings)}
    follower = _Shown(works[options.what])
    tables: list[tuple[str, list[list[str]]]] = []

    results: list[Measurement] = []
    interrupted = False

    def show(found: list[Measurement]) -> None:
        results.extend(found)
        if team:
            add_speed_ups(found)
        tables.append((ranks_table if team else TABLES[options.what])(found, ceilings))
        follower.print(as_text(*tables[-1]) + "\n")

    try:
        if options.what == "ops":
            _, verdict = bench_ops(names, ceilings, options.quick, show, follower)
        elif options.what == "generate":
            _, verdict = bench_generate(
                names, ceilings, config, options.quick, show, follower, readings
            )
        else:
            _, verdict = bench_train(
                *(names, ceilings, config, shapes, options.recompute, options.quick),
                *(show, follower),
                begin=team.begin if team else None,
                world=team.world if team else ALONE,
            )
    except KeyboardInterrupt:  # the results so far took minutes: keep them
        if not results:
            raise
        interrupted = True
        verdict = f"STOPPED by Ctrl-C after {len(tables)} of {follower.total} pieces of work"
    finally:
        follower.close()
    ceilings = ceilings.best(measure_ceilings(threads))  # other programs may have come or gone
    for distance in ceilings.distances[-1:]:
        print(f"at the end {distance_text(distance)}\n")
    if len(tables) > 1:
        tables.append(summary_table(results, ceilings))
        print(as_text(*tables[-1]) + "\n")
    if old is not None:
        tables.append(comparison(options.compare, old, results, threads))
        print(as_text(*tables[-1]) + "\n")
    print(verdict)
    if options.json:
        write_json(options.json, ceilings, results, verdict)
    if options.report:
        parts = [f"## gpt2c bench {options.what}", "", verdict, "", "```", *lines, "```", ""]
        with open(options.report, "a", encoding="utf-8") as file:
            file.write("\n".join([*parts, *(as_markdown(*table) for table in tables), "", ""]))
    if options.plot:
        draw(options.plot, results, ceilings, verdict)
    if interrupted:
        raise KeyboardInterrupt
    failed = any(r.note.startswith(("WRONG", "FAILED")) for r in results)
    return 1 if failed or not any(r.seconds for r in results) else 0


class _Shown(Follower):
    """Shows the progress of a benchmark: a bar on a terminal, lines elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self._number = total, 0
        layout = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"
        self._bar = (
            tqdm(total=total, bar_format=layout, file=sys.stderr, dynamic_ncols=True, leave=False)
            if sys.stderr is not None and sys.stderr.isatty()
            else None
        )
        self._group = ""

    def work(self, group: str) -> None:
        """See `Follower.work`."""
        self._number, self._group = self._number + 1, group
        if self._bar is None:
            print(f"measuring {self._number} of {self.total}: {group}", file=sys.stderr)
        else:
            self._bar.update(self._number - 1 - self._bar.n)
            self._bar.set_description_str(group)

    def now(self, text: str) -> None:
        """See `Follower.now`."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self._group}: {text}")

    def print(self, text: str) -> None:
        """Print text that stays, above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _listen(threads: int) -> str:
    """Return how evenly the machine works now, see `Quiet.verdict`."""
    quiet = Quiet(threads)
    for _ in range(LISTENS):
        quiet.listen()
    return quiet.verdict()


def _check_output(path: Path | None) -> None:
    """Refuse, before minutes of measuring, a file that cannot be written after them."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path}: the directory {path.parent} cannot be written to")


def _shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
    return [_shape(text) for text in options.shape or ["4x64"]]


def _shape(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
        raise ValueError(f"--shape must be rows x tokens, such as 4x64, got {text!r}")
    return int(rows), int(length)
