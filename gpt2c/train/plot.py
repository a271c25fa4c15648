"""Pictures: the curves of runs, and the figures of a benchmark.

They need matplotlib, the extra [plot]; gpt2c.screen.picture writes them. Independent of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.screen.picture import drawing, make_figure, why_not, write
from gpt2c.screen.terminal import columns

__all__ = [
    "COLORS",
    "LOSS",
    "POINTS",
    "color",
    "plot_lines",
    "plot_loss",
    "plot_runs",
    "plot_shares",
    "plot_speed",
    "row_label",
    "row_words",
    "shorten",
    "smoothed",
]

# A row of a benchmark has the same colour in every picture.
OWN_COLORS = {
    "numpy": "#9a9a9a",
    "base": "#7fb069",
    "avx2": "#4a90c2",
    "avx512": "#1f3f77",
    "avx512vnni": "#0b8f8f",
    "avx512bf16": "#5b3fb5",
    "avx512fp16": "#b0307f",
    "amx": "#7a0019",
}
COLORS = OWN_COLORS | {
    "torch": "#e8a838",
    "torch-tuned": "#c8451b",
    "torch-compile": "#7d3c98",
    "torch-bf16": "#8f5a1e",
    "torch-bf16-compile": "#4b1f6f",
    "transformers": "#d1a000",
    "transformers-compile": "#a0522d",
    "llama.cpp": "#c2185b",
    "onnxruntime": "#4e5bd1",
    "ctranslate2": "#3d7a36",
    "openvino": "#8e44ad",
    "llm.c": "#555555",
}
# The weights of a row -> the strength of its colour, and the pattern on its bar.
KINDS = {"fp32": (1.0, ""), "fp16": (0.65, "//"), "bf16": (0.65, "\\\\"), "int8": (0.4, "..")}
UNKNOWN = "#1c1c1c"

# The colours of runs, in the order in which the runs are named.
RUN_COLORS = (
    *("#1f5a9e", "#c8451b", "#3f8f4f", "#7d3c98", "#e8a838", "#16a3a3", "#8c564b"),
    *("#d16ba5", "#6b6b6b", "#8fb339", "#38b6ff", "#2b2b2b"),
)
POINTS = 2000  # drawn points of a curve: the picture has fewer columns of pixels
LOSS = "loss, nats per token (lower is better)"
LONGEST = 48  # characters of a run's name in a legend

Metric = tuple[list[int], list[float]]


# ---- runs ----------------------------------------------------------------------------------------


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path, loss: str = LOSS) -> bool:
    """Draw training and validation loss over the steps; return False if matplotlib is missing.

    Parameters
    ----------
    metrics : the objects of metrics.jsonl
    path : the PNG file to write, in the run's directory
    loss : the label of its axis

    Raises
    ------
    OSError : the picture cannot be written
    """
    if why_not():
        return False
    with drawing():
        figure = make_figure((8, 4.5))
        axes = figure.add_subplot()
        steps, losses = _metric(metrics, "loss")
        _line(axes, *_thinned(steps, losses), color="#9db8d9", lw=0.8, label="training, each step")
        _line(axes, *smoothed(steps, losses), color="#1f5a9e", lw=1.6, label="training, smoothed")
        steps, losses = _metric(metrics, "val_loss")
        if steps:
            thinned = _thinned(steps, losses)
            _line(axes, *thinned, marker="o", ms=4, color="#c8451b", label="validation")
            axes.annotate(
                f"{losses[-1]:.2f}",
                (steps[-1], losses[-1]),
                (7, 0),
                textcoords="offset points",
                va="center",
            )
        _steps(axes)
        axes.set_ylabel(loss)
        axes.set_title(shorten([str(path.absolute().parent)])[0], fontsize=10)
        _finish(figure, axes, path)
    return True


def plot_runs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    loss: str = LOSS,
    others: Sequence[str] = (),
) -> str:
    """Draw loss, learning rate, gradient norm, speed and others of runs over one another.

    A curve on top of an earlier run's curve is dashed, so that both are visible. The legend names
    identical runs.

    Parameters
    ----------
    runs : name or path -> the objects of metrics.jsonl
    path : the PNG file to write
    loss : the label of the losses' axis
    others : further metrics that are drawn, each with its "val_..."

    Returns
    -------
    the characters of the names that no font here has; the picture shows their codes

    Raises
    ------
    ValueError : matplotlib is missing
    OSError : the picture cannot be written
    """
    panels = {
        "loss": loss,
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "tokens_per_second": "tokens a second (higher is better)",
    } | dict(zip(others, others, strict=True))
    for name, same in _equals(runs, others).items():
        panels[same] += f", the same as {name}"
        del panels[name]
    others = [name for name in others if name in panels]
    labels = shorten(list(runs))
    with drawing():
        rows = -(-len(panels) // 2)
        figure = make_figure((11, 3.5 * rows))
        places = [*figure.subplots(rows, 2).flat]
        for place in places[len(panels) :]:
            place.set_visible(False)
        grid = dict(zip(panels, places, strict=False))
        for metric, axes in grid.items():
            curves = [_metric(metrics, metric) for metrics in runs.values()]
            twins = _twins(curves)
            for i, (steps, values) in enumerate(curves):
                style = {"color": RUN_COLORS[i % len(RUN_COLORS)], "ls": _dashes(twins, i)}
                if metric == "learning_rate":
                    _line(axes, *_thinned(steps, values), lw=1.4, **style)
                    continue
                _line(axes, *_thinned(steps, values), lw=0.6, alpha=0.3, **style | {"ls": "-"})
                _line(axes, *smoothed(steps, values), lw=1.4, **style)
                if metric == "loss" or metric in others:
                    validation = _thinned(*_metric(list(runs.values())[i], f"val_{metric}"))
                    _line(axes, *validation, marker="o", ms=4, mec="white", lw=1, **style)
            _steps(axes)
            axes.set_ylabel(panels[metric])
            if metric == "grad_norm":
                _cut_spikes(axes, [value for _, values in curves for value in values])
            _tidy(axes)
        grid["tokens_per_second"].set_ylim(bottom=0)
        grid["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
        losses = [
            [_metric(found, name) for name in ("loss", "val_loss")] for found in runs.values()
        ]
        twins, handles = _twins([loss for loss, _ in losses]), []
        for i, label in enumerate(labels):
            style = {"color": RUN_COLORS[i % len(RUN_COLORS)], "ls": _dashes(twins, i)}
            style |= _dot(losses[i][0][0])
            handles += grid["loss"].plot([], [], lw=1.6, label=label, **style)
        most = max((steps for _, (steps, _) in losses), key=len)
        if most:
            shade = RUN_COLORS[0] if len(runs) == 1 else "#777777"
            style = {"marker": "o", "ms": 4, "color": shade, "label": "validation"}
            handles += grid["loss"].plot([], [], **style | _dot(most))
        for i, first in enumerate(map(losses.index, losses)):
            if first != i and any(losses[i][0]):
                text = f"{labels[i]} is identical to {labels[first]}"
                handles += grid["loss"].plot([], [], " ", label=text)
        title = labels[0]
        if len(labels) > 1:
            title = f"{len(labels)} runs, each with its validation in one colour"
        return _legend_and_save(figure, path, handles, f"{title}: each step thin, smoothed thick")


def shorten(names: Sequence[str]) -> list[str]:
    """Return the parts of the runs' paths that differ; a long name loses its middle."""
    parts = [Path(name).parts or (".",) for name in names]
    if len(parts) == 1:
        parts = [parts[0][-2:]]
    else:
        while min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
            parts = [part[1:] for part in parts]
        while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
            parts = [part[:-1] for part in parts]
    short = [str(Path(*part)) for part in parts]
    half = LONGEST // 2 - 1
    cut = [s if len(s) <= LONGEST else f"{s[:half]}…{s[-half:]}" for s in short]
    return cut if len(set(cut)) == len(set(short)) else short


def _equals(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> dict[str, str]:
    """Return metric -> an earlier metric that has the same numbers in all runs."""
    found: dict[str, Any] = {}
    equals = {}
    for name in names:
        numbers = [[_metric(own, one) for one in (name, f"val_{name}")] for own in runs.values()]
        same = next((one for one, known in found.items() if known == numbers), None)
        if same is not None and any(steps for pair in numbers for steps, _ in pair):
            equals[name] = same
        else:
            found[name] = numbers
    return equals


def _steps(axes: Any) -> None:
    """Label the axis of steps, which are whole numbers."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(_locator(integer=True))


def _cut_spikes(axes: Any, values: Sequence[float]) -> None:
    """End the axis at twice what 99% of the values do not exceed, and say how many are above.

    A single spike would flatten the curve.
    """
    top = 2 * float(np.percentile(values, 99, method="lower")) if values else 0.0
    if above := sum(value > top for value in values):
        axes.set_ylim(0, top or None)
        axes.set_ylabel(f"{axes.get_ylabel()}, {above:,} higher")


def _twins(curves: Sequence[Metric]) -> list[int]:
    """Return for each curve the index of the first curve that it lies on, often its own."""
    return [
        next((j for j in range(i) if _lies_on(curve, curves[j])), i)
        for i, curve in enumerate(curves)
    ]


def _lies_on(one: Metric, other: Metric) -> bool:
    """Return whether two curves are the same as far as the shorter one goes."""
    count = min(len(one[0]), len(other[0]))
    return count > 0 and [a[:count] for a in one] == [b[:count] for b in other]


def _dashes(twins: Sequence[int], i: int) -> Any:
    """Return the line style of curve i: solid, or dashes with gaps for the curves below it."""
    number = twins[:i].count(twins[i])
    if number == 0:
        return "-"
    gap = 4 * twins.count(twins[i])
    return (gap - 4 * number, (4, gap - 4))


def _metric(metrics: Sequence[Mapping[str, Any]], name: str) -> Metric:
    """Return the steps with a finite number of this name, and the numbers."""
    found = [(entry["step"], entry[name]) for entry in metrics if entry.get(name) is not None]
    found = [(step, value) for step, value in found if abs(value) < 1e300]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(steps: Sequence[int], values: Sequence[float]) -> Metric:
    """Replace each value by the median of a window around it.

    The window has on each side a fortieth of all values, at least 10, but no more than a tenth.
    Values near both ends, which lack a full window, are left out: a smaller window would bend the
    curve towards the first and last value. A steady rise or fall is unchanged.

    Parameters
    ----------
    steps, values : (N,), of `_metric`

    Returns
    -------
    (steps, medians), at no more than POINTS places
    """
    numbers = np.asarray(values, np.float64)
    count = len(numbers)
    side = min(max(10, count // 40), count // 10)
    inner = count - 2 * side
    places = side + np.unique(np.linspace(0, max(0, inner - 1), min(inner, POINTS)).astype(int))
    medians = [float(np.median(numbers[i - side : i + side + 1])) for i in places]
    return [steps[i] for i in places], medians


def _thinned(steps: Sequence[int], values: Sequence[float]) -> Metric:
    """Leave out points that no picture can show; each part keeps its lowest and highest value."""
    if len(steps) <= 2 * POINTS:
        return list(steps), list(values)
    numbers = np.asarray(values)
    kept = {0, len(numbers) - 1}
    for part in np.array_split(np.arange(len(numbers)), POINTS):
        kept |= {int(part[numbers[part].argmin()]), int(part[numbers[part].argmax()])}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def _line(axes: Any, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """Draw a curve; a curve of a single point is a dot, as a line would not show it."""
    axes.plot(steps, values, **style | _dot(steps))


def _dot(steps: Sequence[int]) -> dict[str, Any]:
    """Return the style of a curve of one point, in the picture and in its legend: a dot."""
    return {"marker": "o", "ms": 6, "ls": ""} if len(steps) == 1 else {}


# ---- benchmarks ----------------------------------------------------------------------------------


def row_words(row: str) -> tuple[str, str, str]:
    """Return the words of a row's name: the engine, the type of its weights, and of its cache.

    One that the name lacks is "": "avx2:int8" has the type of its weights alone.
    """
    engine, kind, cache = (*row.split(":", 2), "", "")[:3]
    return engine, kind, cache


def color(row: str) -> Any:
    """Return the colour of a benchmark's row, such as "torch" or "avx2:int8", as (r, g, b)."""
    engine, kind, cache = row_words(row)
    code = COLORS.get(engine, UNKNOWN)
    strength = KINDS.get(kind, KINDS["fp32"])[0] * (0.75 if cache else 1.0)
    return tuple(1 - strength * (1 - int(code[i : i + 2], 16) / 255) for i in (1, 3, 5))


def row_label(row: str) -> str:
    """Return a row's name in pictures: "avx2:int8" becomes "gpt2c avx2 int8"."""
    own = row_words(row)[0] in OWN_COLORS
    return f"{'gpt2c ' if own else ''}{row.replace(':', ' ')}"


def plot_shares(shares: Mapping[str, Mapping[str, float]], path: Path, title: str = "") -> None:
    """Draw the share of its ceiling that each op reaches: a line for each op, a dot for each row.

    Parameters
    ----------
    shares : op -> row -> the least time that the op can take, divided by the time it took
    path : the PNG file to write

    Raises
    ------
    ValueError : matplotlib is missing
    OSError : the picture cannot be written
    """
    rows = list(dict.fromkeys(row for found in shares.values() for row in found))
    with drawing():
        figure = make_figure((10, 1.6 + len(shares) * max(0.24, 0.06 * len(rows))))
        axes = figure.add_subplot()
        step = 0.7 / len(rows)
        for i, row in enumerate(rows):
            offset = (i - (len(rows) - 1) / 2) * step
            points = [(found[row], y) for y, found in enumerate(shares.values()) if row in found]
            axes.plot(
                [100 * share for share, _ in points],
                [y + offset for _, y in points],
                "o" if row_words(row)[0] in OWN_COLORS else "D",
                color=color(row),
                ms=5,
                label=row_label(row),
            )
        axes.axvline(100, color="#333333", lw=1)
        for y in range(len(shares) - 1):
            axes.axhline(y + 0.5, color="#dddddd", lw=0.6)
        axes.set_yticks(range(len(shares)), list(shares), fontsize=8)
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("% of ceiling: what arithmetic or memory allow (higher is better)")
        axes.set_title(title, fontsize=9)
        _finish(figure, axes, path)


def plot_speed(
    groups: Mapping[str, Mapping[str, float]], xlabel: str, path: Path, title: str = ""
) -> None:
    """Draw bars: a panel for each piece of work, with a bar for each row.

    Parameters
    ----------
    groups : work -> row -> value
    xlabel : the name and unit of a value
    path : the PNG file to write

    Raises
    ------
    ValueError : matplotlib is missing
    OSError : the picture cannot be written
    """
    rows = list(dict.fromkeys(row for group in groups.values() for row in group))
    with drawing():
        figure = make_figure((3 + 3 * len(groups), 1.4 + 0.28 * len(rows)))
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, (work, values) in zip(panels, groups.items(), strict=True):
            most = max(values.values(), default=0.0)
            for y, row in enumerate(rows):
                value = values.get(row)
                _, kind, cache = row_words(row)
                hatch = KINDS.get(kind, KINDS["fp32"])[1] + ("--" if cache else "")
                axes.barh(y, value or 0, 0.8, color=color(row), hatch=hatch, ec="white", lw=0)
                text = " not measured" if value is None else f" {value:,.{0 if most > 99 else 1}f}"
                axes.text(value or 0, y, text, va="center", fontsize=7, color="#333333")
            axes.set_yticks(range(len(rows)), [row_label(row) for row in rows], fontsize=8)
            axes.set_xlim(0, (most or 1) * 1.25)  # room for the last figure
            axes.set_xlabel(f"{xlabel} (higher is better)", fontsize=8)
            axes.set_title(work, fontsize=9)
            axes.tick_params(axis="x", labelsize=7)
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_major_locator(_locator(nbins=4))
            _tidy(axes)
        panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the panels share it
        figure.suptitle(title, fontsize=9)
        write(figure, path)


def _locator(**how: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(**how)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    path: Path,
    title: str = "",
) -> None:
    """Draw lines over a logarithmic axis of powers of 2; a label with a comma is dashed.

    Parameters
    ----------
    lines : label -> points (x, y); "a, b" has the colour of "a"
    path : the PNG file to write

    Raises
    ------
    ValueError : matplotlib is missing
    OSError : the picture cannot be written
    """
    with drawing():
        figure = make_figure((8, 4.5))
        axes = figure.add_subplot()
        solid = list(dict.fromkeys(label.split(",")[0] for label in lines))
        for label, points in lines.items():
            shade = RUN_COLORS[solid.index(label.split(",")[0]) % len(RUN_COLORS)]
            style = "--" if "," in label else "o-"
            axes.plot(*zip(*points, strict=True), style, color=shade, label=label, ms=4, lw=1.4)
        axes.set_xscale("log", base=2)
        places = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(places, [f"{x:.0f}" for x in places])
        axes.xaxis.set_minor_formatter("")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(title, fontsize=9)
        _finish(figure, axes, path)


# ---- shared by both ------------------------------------------------------------------------------


def _tidy(axes: Any) -> None:
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    _tidy(axes)
    _legend_and_save(figure, path, axes.get_legend_handles_labels()[0])


def _legend_and_save(figure: Any, path: Path, handles: Sequence[Any], title: str = "") -> str:
    """Put a legend above the panels, with as many columns as the longest label leaves room for."""
    longest = max(columns(handle.get_label()) for handle in handles)
    room = int(figure.get_size_inches()[0] * 14)  # characters of 8 points, and the lines beside
    across = max(1, min(len(handles), room // (longest + 8)))
    style = {"frameon": False, "fontsize": 8, "title": title, "handlelength": 4}
    figure.legend(handles=handles, loc="outside upper center", ncols=across, **style)
    return write(figure, path)
