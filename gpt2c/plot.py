"""The loss curve of a run as a picture, where matplotlib is installed (the extra [plot]).

Knows nothing about models: it reads metrics.jsonl. Used by train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2c.files import atomic_path


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw training and validation loss over the steps; return False where matplotlib is missing.

    Parameters
    ----------
    metrics : the objects of metrics.jsonl
    path : the PNG file to write
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [entry["step"] for entry in metrics if "loss" in entry]
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    evaluated = [(entry["step"], entry["val_loss"]) for entry in metrics if "val_loss" in entry]

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average over about 20 values, freed of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = 0.95 * average + 0.05 * value, 0.95 * weight + 0.05
        result.append(average / weight)
    return result
