"""Pictures of runs: what is drawn where, and a smoothed line that is not late."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c import plot
from gpt2c.cli import main
from gpt2c.plot import plot_loss, plot_runs, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def entries(steps: int, height: float = 4.0) -> list[dict[str, Any]]:
    """Give metrics in which every third step was skipped and every fifth evaluated."""
    found = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": height / step, "learning_rate": 1e-3 * step}
        entry |= {"grad_norm": height, "tokens_per_second": 100.0 * step}
        entry |= {"loss": None, "grad_norm": None} if step % 3 == 0 else {}
        found.append(entry | ({"val_loss": height / step + 1} if step % 5 == 0 else {}))
    return found


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Give a way to write a run's metrics."""

    def write(name: str, metrics: list[dict[str, Any]]) -> Path:
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(entry) + "\n" for entry in metrics)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    return write


# ---- smoothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 21, 22, 100, 1000])
def test_a_straight_line_stays_where_it_is(count: int) -> None:
    """An average that looks back only would be late by half its length."""
    line = 20.0 - 0.01 * np.arange(count)
    np.testing.assert_allclose(smoothed(list(line)), line, rtol=1e-9)


def test_noise_is_averaged(rng: np.random.Generator) -> None:
    noise = rng.standard_normal(4000)
    # A mean of 201 numbers has 1/sqrt(201) = 0.07 of their deviation, the line's end twice that.
    assert np.std(smoothed(list(noise))[100:-100]) < 0.1
    assert np.abs(smoothed(list(noise))).max() < 0.5


def test_it_falls_with_the_loss() -> None:
    """The first hundred steps, where the loss falls fastest, are drawn without a lag."""
    loss = 4 + 5 * np.exp(-np.arange(400) / 50)
    # A line over 10 steps to each side misses the end of a parabola by 10^2 / 3 of its curvature,
    # which is 5 / 50^2.
    assert np.abs(smoothed(list(loss)) - loss).max() < 0.067


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what is drawn."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    original = plot._figure

    def figure(size: tuple[float, float]) -> Any:
        drawn.append(original(size))
        return drawn[-1]

    monkeypatch.setattr(plot, "_figure", figure)
    return drawn


def test_runs_are_drawn_over_one_another(tmp_path: Path, figures: list[Any]) -> None:
    runs = {"a": entries(40), "b": entries(20, 2.0), "c": entries(1)}
    plot_runs(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    loss, rate, norm, speed = figures[0].axes
    assert [axes.get_ylabel().split(",")[0] for axes in (loss, rate, norm, speed)] == [
        "loss",
        "learning rate",
        "gradient norm before clipping",
        "tokens a second",
    ]
    rates = rate.get_lines()
    assert [list(line.get_xdata()) for line in rates] == [
        list(range(1, n + 1)) for n in (40, 20, 1)
    ]
    assert len({line.get_color() for line in rates}) == 3
    raw = [line for line in loss.get_lines() if line.get_alpha() == 0.3]
    assert [step for step in raw[0].get_xdata()] == [n for n in range(1, 41) if n % 3]
    evaluated = [
        line for line in loss.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata())
    ]
    assert list(evaluated[0].get_xdata()) == list(range(5, 41, 5))
    assert list(evaluated[0].get_ydata()) == [4 / n + 1 for n in range(5, 41, 5)]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c", "validation"]


def test_every_line_of_runs_shows_its_numbers(tmp_path: Path, figures: list[Any]) -> None:
    runs = {"a": entries(40), "b": entries(20, 2.0)}
    plot_runs(runs, tmp_path / "plot.png")
    panels = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    for name, axes in zip(panels, figures[0].axes, strict=True):
        wanted = []
        for metrics in runs.values():
            points = [(m["step"], m[name]) for m in metrics if m[name] is not None]
            steps, values = (list(part) for part in zip(*points, strict=True))
            wanted.append((steps, values))
            if name != "learning_rate":
                wanted.append((steps, list(smoothed(values))))
            if name == "loss":
                evaluated = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
                wanted.append(tuple(list(part) for part in zip(*evaluated, strict=True)))
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        assert [line for line in drawn if line[0]] == wanted  # those of the legend are empty


def test_the_name_of_a_run_is_no_formula(tmp_path: Path, figures: list[Any]) -> None:
    plot_runs({"r$x_{1$": entries(3), "$a$": entries(3)}, tmp_path / "plot.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["r$x_{1$", "$a$"]
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_the_loss_of_a_run(tmp_path: Path, figures: list[Any]) -> None:
    assert plot_loss(entries(40), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    each, smooth, validation = figures[0].axes[0].get_lines()
    assert len(each.get_xdata()) == len(smooth.get_xdata()) == 27
    assert len(validation.get_xdata()) == 8


@pytest.mark.parametrize("count", [1, 2, 12])
def test_more_runs_than_colors_and_fewer_steps_than_a_line(
    tmp_path: Path, figures: list[Any], count: int
) -> None:
    plot_runs({f"a long name of run {n}": entries(n % 3 + 1) for n in range(count)}, tmp_path / "p")
    assert len(figures[0].axes[1].get_lines()) == count


def test_the_command(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    a, b = run("a", entries(9)), run("b", entries(5))
    assert main(["plot", str(a)]) == 0
    assert capsys.readouterr().out == f"{a / 'plot.png'}\n"
    assert main(["plot", str(a), str(b), "--out", str(tmp_path / "both.png")]) == 0
    for path in (a / "plot.png", tmp_path / "both.png"):
        assert path.read_bytes().startswith(PNG)
    for name in ("k1.svg", "k1"):
        out = tmp_path / name
        assert main(["plot", str(a), "--out", str(out)]) == 2
        message = f"gpt2c: {out}: a picture is a PNG file; give --out a name that ends in .png\n"
        assert capsys.readouterr().err == message and not out.exists()
    empty = run("empty", [])
    assert main(["plot", str(empty)]) == 2
    message = f"gpt2c: {empty / 'metrics.jsonl'} holds no step that can be drawn\n"
    assert capsys.readouterr().err == message


def test_without_matplotlib(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    wanted = "a picture needs matplotlib: pip install matplotlib"
    assert refused(plot_runs, {"a": entries(3)}, tmp_path / "plot.png") == wanted
    assert main(["plot", str(run("a", entries(3)))]) == 2
    assert capsys.readouterr().err == f"gpt2c: {wanted}\n"
    assert not plot_loss(entries(3), tmp_path / "loss.png")
    assert not list(tmp_path.glob("*.png"))
