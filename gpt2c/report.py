"""What people read of a benchmark: tables in a terminal and in Markdown, and the JSON file.

Knows results, not how they were taken. Used by cli.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2c.bench import Result, torch_version
from gpt2c.files import atomic_path
from gpt2c.machine import Ceilings, cpu_name
from gpt2c.plot import plot_roofline, plot_speed

Table = list[list[str]]  # the first row is the heading; the first column stands left


def machine_lines(ceilings: Ceilings) -> list[str]:
    """Say what the machine is and what it reaches."""
    versions = [("numpy", importlib.metadata.version("numpy"))]
    versions += [("torch", torch_version())] if torch_version() else []
    own = f"gpt2c {importlib.metadata.version('gpt2c')}, Python {platform.python_version()}"
    peaks = [f"{name} {peak / 1e9:,.0f}" for name, peak in ceilings.peak.items()]
    reads = [f"{size / 1e9:.0f} on {count}" for count, size in ceilings.bandwidth.items()]
    return [
        f"{cpu_name()}, {ceilings.threads} threads; " + ", ".join([own, *map(" ".join, versions)]),
        f"multiply-adds reach {', '.join(peaks)} GFLOP/s; memory moves {', '.join(reads)}"
        f" thread{'s' if ceilings.threads > 1 else ''}, GB/s",
    ]


def ops_table(results: Sequence[Result], ceilings: Ceilings) -> tuple[str, Table]:
    """Give the heading and table of one op: ms, rate, share of the ceiling, ratio to numpy."""
    facts = results[0].facts
    flops, size = facts["flops"], facts["bytes"]
    by_memory = ceilings.seconds("", 0, size) > ceilings.seconds("", flops, 0)
    bound = "memory" if by_memory else "arithmetic"
    heading = f"{results[0].group}   ({_count(flops)}FLOP, {_count(size)}B: {bound} is the limit)"
    unit, work = ("GB/s", size) if by_memory else ("GFLOP/s", flops)
    numpy = next((r.median for r in results if r.row == "numpy" and r.seconds), None)
    table = [["", "ms", "±", unit, "of ceiling", *(["x numpy"] if numpy else [])]]
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


def train_table(results: Sequence[Result], ceilings: Ceilings) -> tuple[str, Table]:
    """Give the heading and table of one shape: s, tokens/s, share of peak, peak memory."""
    best_torch = [r.median for r in results if r.row.startswith("torch") and r.seconds]
    columns = ["", "s a step", "±", "tokens/s", "of peak", "memory, GB"]
    table = [[*columns, "x best PyTorch"] if best_torch else columns]
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
                *([f"{min(best_torch) / r.median:.2f}"] if best_torch else []),
            ]
        )
    return f"{results[0].group}   (B x T tokens a step)", table


def generate_table(results: Sequence[Result], ceilings: Ceilings) -> tuple[str, Table]:
    """Give the heading and table of one work: ms a call, tokens/s, and how near the limit."""
    prefill = results[0].group.startswith("prefill")
    rate, limit = ("GFLOP/s", "of fp32 peak") if prefill else ("GB/s", "of bandwidth")
    peers = [r.median for r in results if r.row == "transformers" and r.seconds]
    columns = ["", "ms", "±", "tokens/s", rate, limit]
    table = [[*columns, "x transformers"] if peers else columns]
    for r in results:
        if not r.seconds or r.note:
            table.append([r.row, r.note])
            continue
        work = r.facts["flops" if prefill else "bytes"] / r.median
        backend = r.row.partition(":")[0]
        ceiling = 1 / ceilings.seconds(backend, 1, 0) if prefill else ceilings.full_bandwidth
        table.append(
            [
                r.row,
                f"{r.median * 1e3:,.2f}",
                f"{r.spread:.0%}",
                f"{r.facts['tokens'] / r.median:,.1f}",
                f"{work / 1e9:,.1f}",
                f"{work / ceiling:.0%}",
                *([f"{peers[0] / r.median:.2f}"] if peers else []),
            ]
        )
    return results[0].group, table


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "


def as_text(heading: str, table: Table) -> str:
    """Line a table up for a terminal; a row that is shorter is a note."""
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
    """Write a table in Markdown."""
    width = len(table[0])
    lines = [f"**{heading}**", "", "| " + " | ".join(table[0]) + " |"]
    lines.append("|---|" + "---:|" * (width - 1))
    lines += ["| " + " | ".join([*row, *[""] * (width - len(row))]) + " |" for row in table[1:]]
    return "\n".join(lines) + "\n"


def draw(path: Path, results: Sequence[Result], ceilings: Ceilings) -> None:
    """Draw a roofline of ops, or bars of training steps.

    Raises
    ------
    ValueError : matplotlib is missing
    OSError : the picture cannot be written
    """
    timed = [r for r in results if r.seconds and not r.note]
    if not timed:
        raise ValueError("nothing was timed, so there is nothing to draw")
    if "tokens" not in timed[0].facts:
        points = [
            (r.group.split()[0], r.row, flops / r.facts["bytes"], flops / r.median)
            for r in timed
            if (flops := r.facts["flops"])
        ]
        shown = {row for _, row, _, _ in points}
        roofs = {name: peak for name, peak in ceilings.peak.items() if name in shown}
        plot_roofline(points, roofs or ceilings.peak, ceilings.full_bandwidth, path)
        return
    groups: dict[str, dict[str, float]] = {}
    for r in timed:
        groups.setdefault(r.group, {})[r.row] = r.facts["tokens"] / r.median
    trained = timed[0].group.startswith("train")
    title = "GPT-2 124M, " + ("fp32, AdamW included" if trained else "reading and writing")
    title += f": {cpu_name()}, {ceilings.threads} threads"
    plot_speed(groups, "tokens a second", path, title)


def write_json(path: Path, ceilings: Ceilings, results: Sequence[Result], verdict: str) -> None:
    """Write every sample and fact of a benchmark.

    Raises
    ------
    OSError : it cannot be written
    """
    content: dict[str, Any] = {
        "machine": machine_lines(ceilings),
        "noise": verdict,
        "threads": ceilings.threads,
        "peak_flops": ceilings.peak,
        "bandwidth": {str(count): size for count, size in ceilings.bandwidth.items()},
        "results": [
            dataclasses.asdict(r) | ({"median": r.median} if r.seconds else {}) for r in results
        ],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
