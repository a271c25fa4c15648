"""Pictures: the curves of runs, the roofline and the bars of a benchmark.

They need matplotlib, the extra [plot]. Knows nothing about models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files import atomic_path

# In a run's directory: what train draws, and what `gpt2c plot` does.
LOSS_FILE = "loss.png"
RUNS_FILE = "plot.png"

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


# The lines of runs, in the order in which they are named.
RUN_COLORS = ("#1f5a9e", "#c8451b", "#3f8f4f", "#7d3c98", "#e8a838", "#16a3a3", "#8c564b")

Metric = tuple[list[int], list[float]]


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw training and validation loss over the steps; return False where matplotlib is missing.

    Parameters
    ----------
    metrics : the objects of metrics.jsonl
    path : the PNG file to write
    """
    try:
        figure = _figure((8, 4.5))
    except ValueError:
        return False
    axes = figure.add_subplot()
    steps, losses = _metric(metrics, "loss")
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="training, each step")
    axes.plot(steps, smoothed(losses), color="#1f5a9e", linewidth=1.6, label="training, smoothed")
    steps, losses = _metric(metrics, "val_loss")
    if steps:
        axes.plot(steps, losses, "o-", color="#c8451b", ms=4, label="validation")
        axes.annotate(
            f"{losses[-1]:.2f}",
            (steps[-1], losses[-1]),
            (7, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    _finish(figure, axes, path)
    return True


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw loss, learning rate, gradient norm and speed of runs over one another.

    Parameters
    ----------
    runs : name -> the objects of metrics.jsonl
    path : the PNG file to write

    Raises
    ------
    ValueError : matplotlib is missing
    """
    figure = _figure((11, 7))
    panels = {
        "loss": "loss, nats per token",
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "tokens_per_second": "tokens a second",
    }
    grid = dict(zip(panels, figure.subplots(2, 2).flat, strict=True))
    handles = []
    for i, (name, metrics) in enumerate(runs.items()):
        color = RUN_COLORS[i % len(RUN_COLORS)]
        for metric, axes in grid.items():
            steps, values = _metric(metrics, metric)
            if metric == "learning_rate":
                axes.plot(steps, values, color=color, linewidth=1.4)
                continue
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            axes.plot(steps, smoothed(values), color=color, linewidth=1.4)
        handles += grid["loss"].plot([], [], color=color, label=name)
        steps, values = _metric(metrics, "val_loss")
        grid["loss"].plot(steps, values, "o--", color=color, ms=4, mec="white", linewidth=1)
    for metric, axes in grid.items():
        axes.set_xlabel("step")
        axes.set_ylabel(panels[metric])
        _tidy(axes)
    grid["tokens_per_second"].set_ylim(bottom=0)
    grid["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
    handles += grid["loss"].plot([], [], "o--", color="#777777", ms=4, label="validation")
    _legend_and_save(figure, path, handles)


def _metric(metrics: Sequence[Mapping[str, Any]], name: str) -> Metric:
    """Give the steps that have a number of this name, and the numbers."""
    found = [(entry["step"], entry[name]) for entry in metrics if entry.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """Average each value with its neighbours before and after it, so that nothing is drawn late.

    Those are a fortieth of all on each side, at least 10 (where there are so many). At both ends,
    which lack neighbours, a line through the first and the last window stands for the average: a
    filter of Savitzky and Golay (1964), of the first order.
    """
    numbers = np.asarray(values, np.float64)
    side = min(max(10, len(numbers) // 40), (len(numbers) - 1) // 2)
    if side < 1:
        return numbers
    window = 2 * side + 1
    x = np.arange(window)
    first, last = (np.polyfit(x, part, 1) for part in (numbers[:window], numbers[-window:]))
    middle = np.convolve(numbers, np.full(window, 1 / window), "valid")
    return np.concatenate([np.polyval(first, x[:side]), middle, np.polyval(last, x[side + 1 :])])


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
    figure = _figure((10, 6))
    axes = figure.add_subplot()
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
    figure = _figure((9, 4.5))
    axes = figure.add_subplot()
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
    figure = _figure((8, 4.5))
    axes = figure.add_subplot()
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


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    _tidy(axes)
    _legend_and_save(figure, path, axes.get_legend_handles_labels()[0])


def _legend_and_save(figure: Any, path: Path, handles: Sequence[Any]) -> None:
    columns = 8 if sum(len(handle.get_label()) for handle in handles) < 100 else 2
    legend = figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=8
    )
    for text in legend.get_texts():  # a run may be called what would be a broken formula
        text.set_parse_math(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
