"""The reports of a benchmark: tables in a terminal and in Markdown, pictures, the JSON file.

Knows results, not how they were measured.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from gpt2c.bench.machine import (
    Ceilings,
    caches,
    commit,
    compiler,
    cpu_facts,
    cpu_name,
    distance_text,
    fastest,
    peak_text,
)
from gpt2c.bench.suite import Measurement
from gpt2c.files.atomic import atomic_path
from gpt2c.files.untrusted import read_json, shown
from gpt2c.train.plot import plot_shares, plot_speed

__all__ = [
    "NOISY",
    "SCHEMA",
    "as_markdown",
    "as_text",
    "comparison",
    "draw",
    "generate_table",
    "machine_lines",
    "ops_table",
    "provenance",
    "ranks_table",
    "read_old",
    "summary_table",
    "train_table",
    "write_json",
]

Table = list[list[str]]  # the first row is the heading; the first column is aligned left

SCHEMA = 1  # of the JSON file; another number means that a key changed its meaning
# Packages whose versions belong to the figures.
PACKAGES = (
    *("numpy", "torch", "transformers", "onnxruntime", "ctranslate2", "llama-cpp-python"),
    "openvino",
)
# Variables that change the speed of gpt2c and of the engines beside it.
VARIABLES = re.compile(
    r"(GPT2C|OMP|GOMP|KMP|OPENBLAS|MKL|GLIBC|MALLOC|ATEN|ONEDNN|DNNL|TORCH)_\w*|LD_PRELOAD"
)
NOISY = "NOISY MACHINE"


def machine_lines(ceilings: Ceilings) -> list[str]:
    """Return lines about the machine: `machine_line`, a small table of its ceilings, its caches.

    The last line is the latest distance of its cores.
    """
    peaks = [[row, peak_text(row, peak)] for row, peak in ceilings.peak.items()]
    moves = [[threads_text(n), f"{size / 1e9:,.0f}"] for n, size in ceilings.bandwidth.items()]
    height = max(len(peaks), len(moves))
    table = [["peak of", ""], *peaks, *[["", ""]] * (height - len(peaks))]
    right = [["memory with", "GB/s"], *moves, *[["", ""]] * (height - len(moves))]
    rows = [[*a, *b] for a, b in zip(table, right, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        machine_line(ceilings.threads),
        *(
            f"  {a:<{widths[0]}}  {b:>{widths[1]}}    {c:<{widths[2]}}  {d:>{widths[3]}}".rstrip()
            for a, b, c, d in rows
        ),
        *([f"caches: {', '.join(found)}"] if (found := caches()) else []),
        *map(distance_text, ceilings.distances[-1:]),
    ]


def machine_line(threads: int) -> str:
    """Return the processor, the threads and the versions, in one line."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{cpu_name()}, {threads_text(threads)}; {found}"


def provenance(threads: int) -> str:
    """Return the place and time of figures in one line: `machine_line`, date, commit."""
    return f"{machine_line(threads)}; {datetime.now().date().isoformat()}, commit {commit()}"


def threads_text(count: int) -> str:
    """Return "1 thread", "2 threads" and so on."""
    return f"{count} thread{'' if count == 1 else 's'}"


def versions() -> dict[str, str]:
    """Return the versions of gpt2c, Python and the packages that are compared, where installed."""
    found = {"gpt2c": importlib.metadata.version("gpt2c"), "Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def ops_table(results: Sequence[Measurement], ceilings: Ceilings) -> tuple[str, Table]:
    """Return the heading and table of one op: ms, rate, share of the ceiling, ratio to numpy."""
    facts = results[0].facts
    flops, size = facts["flops"], facts["bytes"]
    by_memory = ceilings.seconds("", 0, size) > ceilings.seconds("", flops, 0)
    bound = "memory" if by_memory else "arithmetic"
    heading = f"{results[0].group}   ({_count(flops)}FLOP, {_count(size)}B: {bound} is the limit)"
    unit, work = ("GB/s", size) if by_memory else ("GFLOP/s", flops)
    numpy = next((r.median for r in results if r.row == "numpy" and r.seconds), None)
    table = [["", "ms", "±", unit, "% of ceiling", *(["times as fast as numpy"] if numpy else [])]]
    for r in results:
        if not r.seconds or r.note:
            table.append([r.row, r.note])
            continue
        share = ceilings.seconds(r.row, flops, size) / r.median
        ratio = [f"{numpy / r.median:.2f}"] if numpy else []
        rate = f"{work / r.median / 1e9:,.1f}"
        table.append(
            [r.row, f"{r.median * 1e3:,.3f}", f"{r.spread:.0%}", rate, f"{share:.0%}", *ratio]
        )
    return heading, table


def train_table(results: Sequence[Measurement], ceilings: Ceilings) -> tuple[str, Table]:
    """Return the heading and table of one shape: s, tokens/s, share of peak, memory, ratio."""
    name, seconds = _baseline(results)
    columns = ["", "s a step", "±", "tokens/s", "% of peak", "memory, GB"]
    table = [[*columns, f"times as fast as {name}"]]
    for r in results:
        if not r.seconds or r.note:
            table.append([r.row, r.note])
            continue
        share = ceilings.seconds(r.row, r.facts["flops"], 0) / r.median
        table.append(
            [
                r.row,
                f"{r.median:.3f}",
                f"{r.spread:.0%}",
                f"{r.facts['tokens'] / r.median:,.1f}",
                f"{share:.0%}",
                f"{r.facts['peak_memory'] / 1e9:.2f}",
                f"{seconds / r.median:.2f}",
            ]
        )
    return f"{results[0].group}   (B x T tokens a step)", table


def ranks_table(results: Sequence[Measurement], ceilings: Ceilings) -> tuple[str, Table]:
    """Return the heading and table of one shape: one rank alone, and several ranks together."""
    columns = ["", "s a step", "±", "tokens/s", "% of peak", "memory, GB"]
    table = [[*columns, "speed-up", "efficiency", "MB sent", "waiting"]]
    for r in results:
        if not r.seconds or r.note:
            table.append([r.row, r.note])
            continue
        facts, name = r.facts, r.row.rpartition(" ")[2]
        least = ceilings.seconds(name, facts["flops"], 0) / facts.get("ranks", 1)
        table.append(
            [
                r.row,
                f"{r.median:.3f}",
                f"{r.spread:.0%}",
                f"{facts['tokens'] / r.median:,.1f}",
                f"{least / r.median:.0%}",
                f"{facts['peak_memory'] / 1e9:.2f}",
                f"{facts['speed_up']:.2f}" if "speed_up" in facts else "",
                f"{facts['efficiency']:.0%}" if "efficiency" in facts else "",
                f"{facts['mpi_bytes'] / 1e6:,.1f}" if "ranks" in facts else "",
                f"{facts['mpi_share']:.0%}" if "ranks" in facts else "",
            ]
        )
    return f"{results[0].group}   (B x T tokens a step; memory, MB sent: of a rank)", table


def generate_table(results: Sequence[Measurement], ceilings: Ceilings) -> tuple[str, Table]:
    """Return the heading and table of one work: ms, tokens/s, how near the limit, memory, ratio."""
    prefill = results[0].group.startswith("prefill")
    rate, limit = ("GFLOP/s", "% of fp32 peak") if prefill else ("GB/s", "% of bandwidth")
    name, seconds = _baseline(results)
    columns = ["", "ms", "±", "tokens/s", rate, limit, "memory, MB"]
    table = [[*columns, f"times as fast as {name}"]]
    for r in results:
        if not r.seconds or r.note:
            table.append([r.row, r.note])
            continue
        work = r.facts["flops" if prefill else "bytes"] / r.median
        backend = r.row.partition(":")[0]
        ceiling = 1 / ceilings.seconds(backend, 1, 0) if prefill else ceilings.full_bandwidth
        memory = r.facts.get("memory")
        table.append(
            [
                r.row,
                f"{r.median * 1e3:,.2f}",
                f"{r.spread:.0%}",
                f"{r.facts['tokens'] / r.median:,.1f}",
                f"{work / 1e9:,.1f}",
                f"{work / ceiling:.0%}",
                f"{memory / 1e6:,.0f}" if memory else "",
                f"{seconds / r.median:.2f}",
            ]
        )
    return results[0].group, table


def _baseline(results: Sequence[Measurement]) -> tuple[str, float]:
    """Return name and seconds of the baseline: the best PyTorch, else the slowest row."""
    timed = [r for r in results if r.seconds and not r.note]
    torch = [r.median for r in timed if r.row.startswith(("torch", "transformers"))]
    if torch:
        return "best PyTorch", min(torch)
    slowest = max(timed, key=lambda r: r.median, default=None)
    return (slowest.row, slowest.median) if slowest else ("the slowest", 0.0)


def summary_table(results: Sequence[Measurement], ceilings: Ceilings) -> tuple[str, Table]:
    """Return the heading and table of all works at once.

    For ops: a line for each op and a column for each row, with the speed relative to numpy and the
    share of the ceiling. For other works: a line for each row, with tokens a second.
    """
    rows = list(dict.fromkeys(r.row for r in results))
    works = list(dict.fromkeys(r.group for r in results))
    cells = {(r.group, r.row): r for r in results}
    if kind_of(results) != "ops":
        table = [["", *works]]
        for row in rows:
            found = [cells.get((work, row)) for work in works]
            rates = [
                f"{r.facts['tokens'] / r.median:,.1f}" if _timed(r) else _why(r) for r in found
            ]
            table.append([row, *rates])
        return "summary: tokens a second", table
    table = [["", *rows]]
    ratios: dict[str, list[float]] = {row: [] for row in rows}
    for work in works:
        numpy, line = cells.get((work, "numpy")), [work]
        for row in rows:
            r = cells.get((work, row))
            if not _timed(r):
                line.append(_why(r))
                continue
            share = ceilings.seconds(row, r.facts["flops"], r.facts["bytes"]) / r.median
            if _timed(numpy):
                ratios[row].append(numpy.median / r.median)
                line.append(f"{ratios[row][-1]:.1f} / {share:.0%}")
            else:
                line.append(f"{share:.0%}")
        table.append(line)
    if not any(ratios.values()):
        return "summary: % of ceiling", table
    means = [f"{np.exp(np.mean(np.log(found))):.1f}" if found else "-" for found in ratios.values()]
    table.append(["geometric mean", *means])
    return "summary: times as fast as numpy / % of ceiling", table


def _timed(result: Measurement | None) -> TypeGuard[Measurement]:
    return result is not None and bool(result.seconds) and not result.note


def _why(result: Measurement | None) -> str:
    """Return why there is no figure: WRONG, FAILED, or a dash."""
    word = result.note.partition(":")[0] if result else ""
    return word if word.isupper() else "-"


def kind_of(results: Sequence[Measurement]) -> str:
    """Return the benchmark that results are of: "ops", "train" or "generate"."""
    if not results or "tokens" not in results[0].facts:
        return "ops"
    return "train" if results[0].group.startswith("train") else "generate"


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "


def as_text(heading: str, table: Table) -> str:
    """Return a table as aligned text for a terminal; a shorter row is a note."""
    widths = [
        max(len(row[i]) for row in table if len(row) == len(table[0])) for i in range(len(table[0]))
    ]
    widths[0] = max(widths[0], *(len(row[0]) for row in table))
    lines = [heading]
    for row in table:
        if len(row) == len(table[0]):
            rest = "  ".join(
                cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
            )
        else:
            rest = row[1]
        lines.append(f"  {row[0].ljust(widths[0])}  {rest}".rstrip())
    return "\n".join(lines)


def as_markdown(heading: str, table: Table) -> str:
    """Return a table in Markdown."""
    width = len(table[0])
    lines = [f"**{heading}**", "", "| " + " | ".join(table[0]) + " |"]
    lines.append("|---|" + "---:|" * (width - 1))
    lines += ["| " + " | ".join([*row, *[""] * (width - len(row))]) + " |" for row in table[1:]]
    return "\n".join(lines) + "\n"


def draw(path: Path, results: Sequence[Measurement], ceilings: Ceilings, verdict: str = "") -> None:
    """Draw how near their ceilings ops come, or bars of tokens a second.

    Raises
    ------
    ValueError : nothing was timed, or matplotlib is missing
    OSError : the picture cannot be written
    """
    timed = [r for r in results if r.seconds and not r.note]
    if not timed:
        raise ValueError("nothing was timed, so there is nothing to draw")
    day = datetime.now().astimezone().date().isoformat()
    noise = f", {NOISY}" if verdict.startswith(NOISY) else ""
    machine = f"{cpu_name()}, {threads_text(ceilings.threads)}, {day}{noise}"
    groups: dict[str, dict[str, float]] = {}
    for r in timed:
        found = groups.setdefault(r.group, {})
        if kind_of(timed) == "ops":
            least = ceilings.seconds(r.row, r.facts["flops"], r.facts["bytes"])
            found[r.row] = least / r.median
        else:
            found[r.row] = r.facts["tokens"] / r.median
    if kind_of(timed) == "ops":
        plot_shares(groups, path, machine)
        return
    trained = kind_of(timed) == "train"
    model = "a Llama, " if all(group.endswith("Llama") for group in groups) else "GPT-2 124M, "
    title = model + ("fp32, AdamW included" if trained else "reading and writing")
    plot_speed(groups, "tokens a second", path, f"{title}\n{machine}")


def write_json(
    path: Path, ceilings: Ceilings, results: Sequence[Measurement], verdict: str
) -> None:
    """Write every sample and fact of a benchmark.

    Raises
    ------
    OSError : it cannot be written
    """
    kernels = sorted(Path(__file__).parents[1].glob(f"_kernels_{fastest()}.*"))
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind_of(results),
        "noise": verdict,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_lines(ceilings),
        "cpu": cpu_facts(),
        "caches": caches(),
        "system": platform.platform(),
        "commit": commit(),
        "compiler": compiler(kernels[0]) if kernels else "",
        "versions": versions(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k)},
        "threads": ceilings.threads,
        "peak_flops": ceilings.peak,
        "bandwidth": {str(count): size for count, size in ceilings.bandwidth.items()},
        "core_distance_ns": ceilings.distances,  # at the start and at the end; 0 is unknown
        "results": [
            dataclasses.asdict(r) | ({"median": r.median} if r.seconds else {}) for r in results
        ],
    }
    with atomic_path(path) as temporary:
        text = json.dumps(_finite(content), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replace nan and infinity, such as a wrong row's error, by None: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_old(path: Path, kind: str) -> dict[str, Any]:
    """Return the content of a file of `write_json`, for a comparison with this kind of benchmark.

    Raises
    ------
    OSError : it is missing or cannot be read
    ValueError : it is not such a file, or of another schema or kind
    """
    content = read_json(path)
    found = content.get("schema")
    if type(found) is not int or found != SCHEMA:
        has = "no schema" if found is None else f"schema {shown(found)}"
        raise ValueError(
            f"{path} has {has}, and this gpt2c compares with schema {SCHEMA}: measure the old"
            " version again with this one's gpt2c bench --json"
        )
    if content.get("kind") != kind:
        raise ValueError(
            f"{path} is of gpt2c bench {shown(content.get('kind'))}, and cannot be compared with"
            f" gpt2c bench {kind}"
        )
    results = content.get("results")
    if not isinstance(results, list) or not all(map(_is_result, results)):
        raise ValueError(f"{path}: its results are not of the form that gpt2c bench --json writes")
    return content


def _is_result(found: Any) -> bool:
    if not (isinstance(found, dict) and {"group", "row"} <= found.keys()):
        return False
    median = found.get("median", 1.0)
    named = isinstance(found["group"], str) and isinstance(found["row"], str)
    return named and type(median) in (int, float) and 0 < median < float("inf")


def comparison(
    path: Path, old: dict[str, Any], results: Sequence[Measurement], threads: int
) -> tuple[str, Table]:
    """Return the heading and table that compare results with older ones, see `read_old`.

    Parameters
    ----------
    path : the older file, for the heading
    threads : of the new results
    """
    before = {(r["group"], r["row"]): r["median"] for r in old["results"] if "median" in r}
    table = [["", "old, ms", "new, ms", "times as fast as old"]]
    for r in results:
        median = before.pop((r.group, r.row), None)
        name = f"{r.group}  {r.row}"
        if not r.seconds or r.note:
            table.append([name, r.note])
        elif median is None:
            table.append([name, "not in the old"])
        else:
            ms = [f"{seconds * 1e3:,.3f}" for seconds in (median, r.median)]
            table.append([name, *ms, f"{median / r.median:.2f}"])
    table += [[f"{group}  {row}", "not measured now"] for group, row in before]
    facts = [str(old[name]) for name in ("date", "commit") if old.get(name)]
    noise = str(old.get("noise"))
    facts += [NOISY] if noise.startswith(NOISY) else []
    for name, now in (("cpu", cpu_facts()), ("threads", threads)):
        if old.get(name) != now:
            facts.append(f"other {name}: {shown(old.get(name))}")
    return f"compared with {path}" + (f" ({', '.join(facts)})" if facts else ""), table
