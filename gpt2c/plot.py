"""Pictures: the loss curve of a run, the roofline and the bars of a benchmark.

They need matplotlib, the extra [plot]. Knows nothing about models. Used by train and cli.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2c.files import atomic_path

# A row has its colour in every picture; one that is not of the benchmark's is grey.
COLORS = {
    "numpy": "#b9b9b9",
    "base": "#7fb069",
    "avx2": "#4a90c2",
    "avx512": "#1f3f77",
    "torch": "#e8a838",
    "torch-tuned": "#c8451b",
    "torch-compile": "#7d3c98",
}


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw training and validation loss over the steps; return False where matplotlib is missing.

    Parameters
    ----------
    metrics : the objects of metrics.jsonl
    path : the PNG file to write
    """
    steps = [entry["step"] for entry in metrics if "loss" in entry]
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    evaluated = [(entry["step"], entry["val_loss"]) for entry in metrics if "val_loss" in entry]

    try:
        figure, axes = _figure((8, 4.5))
    except ValueError:
        return False
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="training, each step")
    axes.plot(steps, _smoothed(losses), color="#1f5a9e", linewidth=1.6, label="training, smoothed")
    if evaluated:
        last_step, last = evaluated[-1]
        axes.plot(*zip(*evaluated, strict=True), "o-", color="#c8451b", ms=4, label="validation")
        axes.annotate(
            f"{last:.2f}", (last_step, last), (0, 9), textcoords="offset points", ha="center"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    _finish(figure, axes, path)
    return True


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average over about 20 values, freed of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = 0.95 * average + 0.05 * value, 0.95 * weight + 0.05
        result.append(average / weight)
    return result


def plot_roofline(
    points: Sequence[tuple[str, str, float, float]],
    peaks: Mapping[str, float],
    bandwidth: float,
    path: Path,
) -> None:
    """Draw every op of every backend under the roofs of the machine (Williams et al. 2009).

    Parameters
    ----------
    points : (op, backend, operations a byte, operations a second) of each
    peaks : backend -> operations a second that its instructions reach
    bandwidth : bytes a second from memory
    path : the PNG file to write

    Raises
    ------
    ValueError : matplotlib is missing
    """
    figure, axes = _figure((10, 6))
    rows = list(dict.fromkeys(row for _, row, _, _ in points))
    left, right = 0.04, 3000.0
    for name, peak in peaks.items():
        ridge = peak / bandwidth
        color = COLORS[name]
        axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=color, linewidth=1)
        axes.annotate(f"{name} {peak / 1e9:,.0f} GFLOP/s", (right, peak), (-4, 4), ha="right",
                      textcoords="offset points", color=color, fontsize=8)  # fmt: skip
    axes.annotate(f"memory, {bandwidth / 1e9:.0f} GB/s", (left, left * bandwidth), (6, 14),
                  textcoords="offset points", fontsize=8, rotation=38)  # fmt: skip
    for row in rows:
        mine = [(x, y) for _, name, x, y in points if name == row]
        axes.plot(*zip(*mine, strict=True), "o", color=COLORS[row], ms=5, alpha=0.8, label=row)
    for op in dict.fromkeys(op for op, *_ in points):  # forward above its points, backward below
        forward = not op.endswith("_backward")
        x, y = (max if forward else min)(
            ((x, y) for name, _, x, y in points if name == op), key=lambda point: point[1]
        )
        axes.annotate(op.replace("_", " "), (x, y), (0, 6 if forward else -6), ha="center",
                      va="bottom" if forward else "top", textcoords="offset points", fontsize=6,
                      rotation=70, color="#555555")  # fmt: skip
    speeds = [y for *_, y in points]
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_ylim(min(speeds) / 5, max(*speeds, *peaks.values()) * 4)
    axes.set_xlabel("arithmetic intensity, operations per byte of memory")
    axes.set_ylabel("operations a second")
    _finish(figure, axes, path)


def plot_speed(
    groups: Mapping[str, Mapping[str, float]], ylabel: str, path: Path, title: str = ""
) -> None:
    """Draw bars: a group for each piece of work, in it a bar for each row.

    Parameters
    ----------
    groups : work -> row -> value
    ylabel : what a value is
    path : the PNG file to write

    Raises
    ------
    ValueError : matplotlib is missing
    """
    figure, axes = _figure((9, 4.5))
    rows = list(dict.fromkeys(row for group in groups.values() for row in group))
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        places = [place + (i - (len(rows) - 1) / 2) * width for place in range(len(groups))]
        values = [group.get(row, 0.0) for group in groups.values()]
        color = COLORS.get(row, "#555555")
        bars = axes.bar(places, values, width * 0.92, color=color, label=row)
        axes.bar_label(bars, [f"{v:,.0f}" if v else "" for v in values], fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=9)
    _finish(figure, axes, path)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, path: Path
) -> None:
    """Draw lines over a logarithmic axis of powers of 2; a label with a comma is dashed.

    Parameters
    ----------
    lines : label -> points (x, y)
    path : the PNG file to write

    Raises
    ------
    ValueError : matplotlib is missing
    """
    figure, axes = _figure((8, 4.5))
    solid = [label for label in lines if "," not in label]
    colors = dict(zip(solid, list(COLORS.values())[2:], strict=False))
    for label, points in lines.items():
        style = "--" if "," in label else "o-"
        color = colors[label.split(",")[0]]
        axes.plot(*zip(*points, strict=True), style, color=color, label=label, ms=4, linewidth=1.4)
    axes.set_xscale("log", base=2)
    places = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(places, [f"{x:.0f}" for x in places])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _finish(figure, axes, path)


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=8, frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
