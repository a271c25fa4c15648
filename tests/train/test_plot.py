"""Pictures: what they show, readable text, and a smoothed line that invents nothing."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c import Tokenizer
from gpt2c.bench.decoding import ENGINES
from gpt2c.bench.suite import TORCH
from gpt2c.cli.main import main
from gpt2c.kernels.backend import NAMES
from gpt2c.screen import picture
from gpt2c.text.shards import read_shards
from gpt2c.train import plot
from gpt2c.train.plot import plot_loss, plot_runs, shorten, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def entries(steps: int, height: float = 4.0) -> list[dict[str, Any]]:
    """Return metrics in which every third step was skipped and every fifth evaluated."""
    found = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": height / step, "learning_rate": 1e-3 * step}
        entry |= {"grad_norm": height, "tokens_per_second": 100.0 * step}
        entry |= {"loss": None, "grad_norm": None} if step % 3 == 0 else {}
        found.append(entry | ({"val_loss": height / step + 1} if step % 5 == 0 else {}))
    return found


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Return a function that writes a run's metrics."""

    def write(name: str, metrics: list[dict[str, Any]]) -> Path:
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(entry) + "\n" for entry in metrics)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    return write


# ---- smoothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 21, 22, 100, 1000])
def test_smoothing_keeps_a_straight_line(count: int) -> None:
    """An average of past values alone would lag by half its length."""
    line = [20.0 - 0.01 * i for i in range(count)]
    places, medians = smoothed(range(count), line)
    np.testing.assert_allclose(medians, [line[i] for i in places], rtol=1e-9)


def test_smoothing_averages_noise(rng: np.random.Generator) -> None:
    _, medians = smoothed(range(4000), list(rng.standard_normal(4000)))
    # A median of 201 numbers has sqrt(pi / 2 / 201) = 0.09 of their deviation.
    assert np.std(medians) < 0.12
    assert np.abs(medians).max() < 0.5


def test_smoothed_line_follows_the_loss_without_a_lag() -> None:
    """Also in the first hundred steps, where the loss falls fastest."""
    loss = 4 + 5 * np.exp(-np.arange(400) / 50)
    places, medians = smoothed(range(400), list(loss))
    assert places == list(range(10, 390))
    np.testing.assert_allclose(medians, loss[places], rtol=1e-12)


@pytest.mark.parametrize(
    ("count", "side"), [(1, 0), (9, 0), (10, 1), (35, 3), (100, 10), (400, 10), (800, 20)]
)
def test_only_whole_medians_are_drawn(count: int, side: int, rng: np.random.Generator) -> None:
    values = list(rng.standard_normal(count))
    steps = list(range(3, 3 + 2 * count, 2))  # every other step was skipped
    places, medians = smoothed(steps, values)
    assert places == steps[side : count - side]
    assert medians == [
        pytest.approx(sorted(values[i - side : i + side + 1])[side])
        for i in range(side, count - side)
    ]


def test_smoothed_line_invents_no_end() -> None:
    """A first or last step that is far off does not bend the curve."""
    noise = [2.0, 2.1, 1.9, 2.05, 1.95] * 60
    _, medians = smoothed(range(302), [9.0, *noise, 7.0])
    assert 1.95 <= min(medians) and max(medians) <= 2.05


def test_smoothing_keeps_a_jump() -> None:
    """A slow first step must not bend the speed after it, nor one slow step the others."""
    speed = [2000.0] * 30 + [28_000.0] * 200 + [76_000.0] + [28_000.0] * 50
    assert set(smoothed(range(281), speed)[1]) == {2000.0, 28_000.0}


def test_long_run_is_smoothed_as_a_short_one() -> None:
    line = np.linspace(9, 3, 1_000_000)
    places, medians = smoothed(range(1_000_000), line)  # type: ignore[arg-type]
    assert (places[0], places[-1]) == (25_000, 974_999) and len(places) <= plot.POINTS
    np.testing.assert_allclose(medians, line[places], rtol=1e-9)


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the figures that are drawn."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    original = plot.make_figure

    def figure(size: tuple[float, float]) -> Any:
        drawn.append(original(size))
        return drawn[-1]

    monkeypatch.setattr(plot, "make_figure", figure)
    return drawn


@pytest.fixture
def figures(pictures: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect figures whose lines and words are looked at, without their pixels."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(PNG))
    return pictures


def test_runs_are_drawn_over_one_another(tmp_path: Path, pictures: list[Any]) -> None:
    runs = {"a": entries(40), "b": entries(20, 2.0), "c": entries(1)}
    plot_runs(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    loss, rate, norm, speed = pictures[0].axes
    assert [axes.get_ylabel().split(",")[0] for axes in (loss, rate, norm, speed)] == [
        "loss",
        "learning rate",
        "gradient norm before clipping",
        "tokens a second (higher is better)",
    ]
    assert loss.get_ylabel() == "loss, nats per token (lower is better)"
    rates = rate.get_lines()
    assert [list(line.get_xdata()) for line in rates] == [
        list(range(1, n + 1)) for n in (40, 20, 1)
    ]
    assert len({line.get_color() for line in rates}) == 3
    raw = [line for line in loss.get_lines() if line.get_alpha() == 0.3]
    assert [step for step in raw[0].get_xdata()] == [n for n in range(1, 41) if n % 3]
    evaluated = [line for line in loss.get_lines() if line.get_marker() == "o"][:2]
    assert list(evaluated[0].get_xdata()) == list(range(5, 41, 5))
    assert list(evaluated[0].get_ydata()) == [4 / n + 1 for n in range(5, 41, 5)]
    (legend,) = pictures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c", "validation"]


def test_spike_does_not_flatten_the_gradient_norms(tmp_path: Path, figures: list[Any]) -> None:
    metrics = [
        {"step": n, "loss": 3.0, "grad_norm": 60.0 if n == 43 else 1.0 + n / 100}
        for n in range(1, 101)
    ]
    plot_runs({"a": metrics}, tmp_path / "plot.png")
    axes = figures[0].axes[2]
    assert axes.get_ylim() == (0, 4.0)
    assert axes.get_ylabel() == "gradient norm before clipping, 1 higher"
    plot_runs({"a": metrics[43:]}, tmp_path / "plot.png")
    axes = figures[1].axes[2]
    assert axes.get_ylabel() == "gradient norm before clipping" and axes.get_ylim()[1] < 2.2


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
                wanted.append(smoothed(steps, values))
            if name == "loss":
                evaluated = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
                wanted.append(tuple(list(part) for part in zip(*evaluated, strict=True)))
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        assert [line for line in drawn if line[0]] == wanted  # those of the legend are empty


def test_name_of_a_run_is_no_formula(tmp_path: Path, figures: list[Any]) -> None:
    plot_runs({"r$x_{1$": entries(3), "$a$": entries(3)}, tmp_path / "plot.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["r$x_{1$", "$a$"]
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_picture_of_a_run_shows_its_loss(tmp_path: Path, pictures: list[Any]) -> None:
    assert plot_loss(entries(40), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    each, smooth, validation = pictures[0].axes[0].get_lines()
    assert len(each.get_xdata()) == 27 and len(smooth.get_xdata()) == 27 - 2 * 2  # a tenth
    assert len(validation.get_xdata()) == 8


@pytest.mark.parametrize("count", [1, 2, 12])
def test_more_runs_than_colors_and_fewer_steps_than_a_line(
    tmp_path: Path, figures: list[Any], count: int
) -> None:
    plot_runs({f"a long name of run {n}": entries(n % 3 + 1) for n in range(count)}, tmp_path / "p")
    assert len(figures[0].axes[1].get_lines()) == count


def test_plot_command_draws_runs(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    a, b = run("a", entries(9)), run("b", entries(5))
    assert main(["plot", str(a)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(
        "9 steps, training loss 1.4786 nats per token (mean of the last 6 steps), validation loss"
        " 1.8000 nats per token (lowest 1.8000), 500 tokens/s"
    )
    long = run("long", [{"step": n, "loss": 9.0 if n <= 20 else n / 10} for n in range(1, 31)])
    assert main(["plot", str(long), str(run("one", entries(1)))]) == 0
    out_long, out_one, _ = capsys.readouterr().out.splitlines()
    assert (
        out_long
        == "long: 30 steps, training loss 2.5500 nats per token (mean of the last 10 steps)"
    )
    assert "training loss 4.0000 nats per token (of one step)" in out_one
    assert out[1:] == [f"{a / 'plot.png'}"]
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


def test_error_names_the_extra_for_pictures(
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


def test_broken_matplotlib_is_one_sentence(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise ValueError("a picture needs matplotlib, which does not load: another NumPy's")

    monkeypatch.setattr(picture, "_style", broken)
    assert main(["plot", str(run("a", entries(3)))]) == 2
    assert capsys.readouterr().err.startswith("gpt2c: a picture needs matplotlib, which does not")


# ---- runs that lie on each other -----------------------------------------------------------------


def test_identical_runs_are_both_seen(tmp_path: Path, figures: list[Any]) -> None:
    runs = {"x/a/run": entries(40), "x/b/run": entries(40, 2.0), "x/c/run": entries(40)}
    plot_runs(runs, tmp_path / "plot.png")
    (legend,) = figures[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["a", "b", "c", "validation", "c is identical to a"]
    for axes in figures[0].axes:
        first, _, third = [
            line for line in axes.get_lines() if line.get_lw() == 1.4 and len(line.get_xdata())
        ]
        assert first.get_linestyle() == "-" and third.get_linestyle() == "--"
        assert first.get_color() != third.get_color()
        assert list(first.get_ydata()) == list(third.get_ydata())


@pytest.mark.parametrize("steps", [(20, 40), (40, 20)])
def test_longer_run_does_not_hide_a_shorter_one(
    tmp_path: Path, figures: list[Any], steps: tuple[int, int]
) -> None:
    plot_runs({name: entries(n) for name, n in zip("ab", steps, strict=True)}, tmp_path / "p.png")
    rates = figures[0].axes[1].get_lines()
    assert [line.get_linestyle() for line in rates] == ["-", "--"]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "validation"]


def test_runs_without_a_number_are_not_identical(tmp_path: Path, figures: list[Any]) -> None:
    nothing = [{"step": 1, "loss": None}]
    plot_runs({"a": nothing, "b": nothing}, tmp_path / "plot.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["runs/demo/run"], ["demo/run"]),
        (["run"], ["run"]),
        (["runs/demo/run", "runs/zh/run"], ["demo", "zh"]),
        (["/a/b/run1", "/a/b/run2"], ["run1", "run2"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["x" * 100, "y"], ["x" * 23 + "…" + "x" * 23, "y"]),
        (["x" * 100 + "1" + "x" * 100, "x" * 201], ["x" * 100 + "1" + "x" * 100, "x" * 201]),
    ],
)
def test_names_are_shortened_to_their_differences(names: list[str], short: list[str]) -> None:
    assert shorten(names) == short


# ---- strange runs --------------------------------------------------------------------------------


def test_single_step_is_a_dot(tmp_path: Path, figures: list[Any]) -> None:
    plot_runs({"a": entries(1)}, tmp_path / "plot.png")
    assert plot_loss(entries(1), tmp_path / "loss.png")
    lines = [line for figure in figures for axes in figure.axes for line in axes.get_lines()]
    single = [line for line in lines if len(line.get_xdata()) == 1]
    assert len(single) == 9
    assert {(line.get_marker(), line.get_linestyle()) for line in single} == {("o", "None")}


def legend_styles(figure: Any) -> dict[str, tuple[str, str]]:
    """Return the marker and the line beside each name in a legend."""
    (legend,) = figure.legends
    lines = [line for line in legend.get_lines() if len(line.get_xdata()) > 1]
    return {
        text.get_text(): (line.get_marker(), line.get_linestyle())
        for text, line in zip(legend.get_texts(), lines, strict=True)
    }


@pytest.mark.parametrize(
    ("steps", "validation"), [(9, ("o", "None")), (12, ("o", "-"))], ids=["one point", "two"]
)
def test_legend_shows_the_marker_of_the_picture(
    tmp_path: Path, figures: list[Any], steps: int, validation: tuple[str, str]
) -> None:
    plot_runs({"a": entries(steps)}, tmp_path / "plot.png")
    assert plot_loss(entries(steps), tmp_path / "loss.png")
    plot_runs({"a": entries(steps), "b": entries(40), "c": entries(1)}, tmp_path / "three.png")
    one, loss, three = map(legend_styles, figures)
    assert one["validation"] == loss["validation"] == validation
    assert three["validation"] == ("o", "-")  # one of them has a line
    assert three["a"] == one["a"] == ("None", "-") and three["c"] == ("o", "None")


@pytest.mark.parametrize("count", [2, 5, 11])
def test_legend_of_wide_characters_stays_in_the_picture(
    count: int, tmp_path: Path, pictures: list[Any]
) -> None:
    runs = {
        f"中文模型第{number}号训练很长很长的名字": entries(9, 2.0 + number)
        for number in range(count)
    }
    if plot_runs(runs, tmp_path / "plot.png"):
        pytest.skip("no font here has Chinese")
    (legend,) = pictures[0].legends
    box, width = legend.get_window_extent(), pictures[0].bbox.width
    assert 0 <= box.x0 < box.x1 <= width


def test_run_without_steps_gives_an_empty_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_loss([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_nonfinite_losses_are_left_out(run: Any, tmp_path: Path, figures: list[Any]) -> None:
    good = json.dumps(entries(1)[0])
    path = run("a", entries(2)) / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "loss": NaN}\n{"step": 4, "loss": Infinity}\n{"step": 5, "lo\n')
        file.write('[1]\n\x00\x00\n{"step": 6, "loss": "x"}\n{"step": 7, "loss": 1e308}\n')
        file.write('{"step": 8, "loss": 2.5, "grad_norm": 1e307}\n' + good)
    assert main(["plot", str(path.parent)]) == 0
    each = figures[0].axes[0].get_lines()[0]
    assert (list(each.get_xdata()), list(each.get_ydata())) == ([1, 2, 8], [4.0, 2.0, 2.5])


def test_long_run_is_thinned_and_keeps_its_extremes(tmp_path: Path, figures: list[Any]) -> None:
    metrics = [{"step": n, "loss": 3.0 + (n == 77_777) - (n == 5)} for n in range(1, 100_001)]
    plot_runs({"a": metrics}, tmp_path / "plot.png")
    each = figures[0].axes[0].get_lines()[0]
    steps, losses = list(each.get_xdata()), list(each.get_ydata())
    assert len(steps) < 5000 and (steps[0], steps[-1]) == (1, 100_000)
    assert losses[steps.index(77_777)] == 4.0 and losses[steps.index(5)] == 2.0


# ---- losses of different tokenizers --------------------------------------------------------------


def tokenized(path: Path, text: str, bytes_per_token: Any) -> Path:
    """Write the tokenizer of a text, and a run.json, into a run."""
    Tokenizer.train([text], 270).save_pretrained(path)
    (path / "run.json").write_text(json.dumps({"bytes_per_token": bytes_per_token}))
    return path


def test_losses_of_different_tokenizers_are_in_bits_per_byte(
    run: Any, figures: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    a = tokenized(run("a", entries(20)), "to be or not to be " * 9, {"train": 2.0, "val": 4.0})
    b = tokenized(run("b", entries(20)), "the cat sat " * 9, {"train": 1.0, "val": 1.0})
    assert main(["plot", str(a), str(b)]) == 0
    loss = figures[0].axes[0]
    assert loss.get_ylabel() == "loss, bits per byte (lower is better)"
    first, _, validation = loss.get_lines()[:3]
    assert first.get_ydata()[0] == pytest.approx(4.0 / math.log(2) / 2)
    assert validation.get_ydata()[0] == pytest.approx((4.0 / 5 + 1) / math.log(2) / 4)
    assert "bits per byte" in capsys.readouterr().out
    figures.clear()
    assert main(["plot", str(a), str(a.parent / "a")]) == 0  # one tokenizer: the losses are in nats
    assert "nats per token (" in figures[0].axes[0].get_ylabel()


def test_runs_of_fine_tuning_show_their_own_metrics(
    run: Any, figures: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def tuned(name: str, picture: Any) -> str:
        steps = [entry | {"reward": 0.1 * entry["step"]} for entry in entries(10)]
        path = run(name, [*steps[:-1], steps[-1] | {"val_reward": 0.9}])
        (path / "run.json").write_text(json.dumps({"verb": "grpo", "picture": picture}))
        (path / "result.json").write_text('{"before": {"val_loss": 5.0, "val_reward": 0.1}}')
        return str(path)

    a = tuned("a", {"loss": "loss of the policy", "metrics": ["reward", "entropy"]})
    assert main(["plot", a]) == 0
    loss, *_, reward, entropy = (axes for axes in figures[0].axes if axes.get_visible())
    assert loss.get_ylabel() == "loss of the policy"
    assert (reward.get_ylabel(), entropy.get_ylabel()) == ("reward", "entropy")
    each, _, validation = reward.get_lines()
    assert list(each.get_ydata()) == [pytest.approx(0.1 * step) for step in range(1, 11)]
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([0, 10], [0.1, 0.9])
    assert all(tick == int(tick) for tick in reward.get_xticks())
    assert not any(len(line.get_xdata()) for line in entropy.get_lines())
    said = capsys.readouterr().out
    assert "validation loss 1.4000 (lowest 1.4000), reward 0.5500 (validation 0.9000), 550" in said
    for number, (content, label) in enumerate(
        [
            (None, "loss (lower is better)"),
            (3, "loss (lower is better)"),
            ({"loss": 3, "metrics": 3}, "loss (lower is better)"),
            ({"loss": "loss", "metrics": [3, "\x1b"]}, "loss"),
        ]
    ):
        figures.clear()
        path = tuned(f"b{number}", content)
        assert main(["plot", path]) == 0
        assert figures[0].axes[0].get_ylabel() == label
        assert len(figures[0].axes) == 4
    figures.clear()
    assert main(["plot", a, str(run("c", entries(3)))]) == 0
    assert figures[0].axes[0].get_ylabel() == "losses of different kinds: do not compare"


def test_equal_metrics_are_drawn_once(tmp_path: Path, figures: list[Any]) -> None:
    steps = [entry | {"a": entry["step"], "b": entry["step"], "c": 1} for entry in entries(9)]
    plot_runs({"run": steps}, tmp_path / "plot.png", others=["a", "b", "c", "d"])
    shown = [axes.get_ylabel() for axes in figures[0].axes if axes.get_visible()]
    assert shown[4:] == ["a, the same as b", "c", "d"]


def test_run_records_its_bytes_per_token(tmp_path: Path, figures: list[Any]) -> None:
    from gpt2c.text.prepare import prepare
    from gpt2c.train.pretrain import train

    text = "the cat sat on the mat. " * 40
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 1}
    losses, sizes = [], []
    for name in ("bytes", "bpe:262"):
        data, out = tmp_path / name / "data", tmp_path / name / "run"
        prepared = prepare([text[:-99], text[-99:]], data, name, val_fraction=0.1)
        losses.append(train(data, out, {**small, "max_iters": 2}).val_loss)
        sizes.append(json.loads((out / "run.json").read_text())["bytes_per_token"])
        tokens = read_shards(data, "val")[0][:]
        decoded = Tokenizer.from_pretrained(data).decode(tokens).encode()
        size = len(decoded.replace(b"<|endoftext|>", b""))
        assert sizes[-1]["val"] == pytest.approx(size / len(tokens))
        assert prepared.vocab_size in (257, 262)
    assert 0.9 < sizes[0]["train"] < 1 < sizes[1]["train"]
    figures.clear()
    assert main(["plot", *(str(tmp_path / name / "run") for name in ("bytes", "bpe:262"))]) == 0
    loss = figures[0].axes[0]
    assert loss.get_ylabel() == "loss, bits per byte (lower is better)"
    drawn = [line for line in loss.get_lines() if line.get_mec() == "white"]
    for line, value, size in zip(drawn, losses, sizes, strict=True):
        assert line.get_ydata()[-1] == pytest.approx(value / math.log(2) / size["val"])


@pytest.mark.parametrize("sizes", [None, {"train": 2.0}, {"train": 0, "val": 1}, "x"])
def test_incomparable_losses_are_marked(
    run: Any, figures: list[Any], sizes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    a = tokenized(run("a", entries(20)), "to be or not to be " * 9, {"train": 2.0, "val": 4.0})
    b = tokenized(run("b", entries(20)), "the cat sat " * 9, sizes)
    assert main(["plot", str(a), str(b)]) == 0
    assert "tokenizers differ, do not compare" in figures[0].axes[0].get_ylabel()
    assert str(b) in capsys.readouterr().err


# ---- readable text -------------------------------------------------------------------------------


def texts_of(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_characters_without_a_glyph_are_written_as_codes(
    run: Any,
    pictures: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a machine that has only matplotlib's own font."""
    monkeypatch.setattr(
        picture, "_lacking", lambda name, characters: {c for c in characters if ord(c) > 0x2E7F}
    )
    path = run("模型", entries(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["plot", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("模型/plot.png\n") and "no font here has 模型" in err
    assert any("\\u6a21\\u578b" in text for text in texts_of(pictures[0]))
    assert not any("模" in text for text in texts_of(pictures[0]))


def test_strange_names_cause_no_warning_and_no_error(
    run: Any, tmp_path: Path, pictures: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    names = ["中文", "a\x07b", "$x_{1$", "हिन्दी 😀", "two\nlines", "caf\udce9", "\ufdd0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lacking = plot_runs({name: entries(3) for name in names}, tmp_path / "p.png")
        assert plot_loss(entries(3), run("运行", []) / "loss.png")
    assert {"\x07", "\udce9", "\ufdd0"} <= set(lacking)
    assert any("\\udce9" in text for text in texts_of(pictures[0]))
    assert capfd.readouterr() == ("", "")


def test_font_with_chinese_is_taken_where_there_is_one() -> None:
    pytest.importorskip("matplotlib")
    with picture.drawing():
        families, lacking = picture._fonts(set("模型 run"))
    if lacking:
        pytest.skip("no font here has Chinese")
    assert families[0] == "DejaVu Sans" and len(families) > 1
    assert not any(picture.BOXES.search(name) for name in families)


def test_style_of_the_user_is_left_alone(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"text.usetex": True, "font.family": "No Such Font"}):
        plot_runs({"a": entries(3)}, tmp_path / "plot.png")
        assert matplotlib.rcParams["text.usetex"]


# ---- benchmarks ----------------------------------------------------------------------------------

ROWS = (*NAMES, *TORCH, "transformers", "transformers-compile", "llm.c")
ROWS += tuple(f"{name}:{kind}" for name in (*NAMES, *ENGINES) for kind in ("fp32", "fp16", "int8"))


def test_every_row_has_a_colour_of_its_own() -> None:
    colors = {row: plot.color(row) for row in ROWS}
    assert len(set(colors.values())) == len({row.removesuffix(":fp32") for row in ROWS})
    assert {name.partition(":")[0] for name in ROWS} == plot.COLORS.keys()
    assert plot.color("neon") not in colors.values()


def test_shares_of_every_row_are_drawn(tmp_path: Path, figures: list[Any]) -> None:
    shares = {f"op {n}": {row: 0.01 * (n + i) for i, row in enumerate(ROWS)} for n in range(3)}
    del shares["op 1"]["torch"]
    plot.plot_shares(shares, tmp_path / "ops.png", "a machine, 2 threads, a day")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines.keys() >= {plot.row_label(row) for row in ROWS}
    assert list(lines["gpt2c avx512vnni int8"].get_xdata()) == pytest.approx(
        [100 * shares[op]["avx512vnni:int8"] for op in shares]
    )
    assert len(lines["torch"].get_xdata()) == 2
    assert axes.get_title() == "a machine, 2 threads, a day"


def test_bars_of_every_row_are_drawn(tmp_path: Path, figures: list[Any]) -> None:
    groups = {work: {row: 10.0 + i for i, row in enumerate(ROWS)} for work in ("a", "b", "c")}
    del groups["c"]["llm.c"]
    plot.plot_speed(groups, "tokens a second", tmp_path / "bars.png", "a machine")
    for axes, work in zip(figures[0].axes, groups, strict=True):
        assert len(axes.patches) == len(ROWS) and axes.get_title() == work
        assert axes.get_xlabel() == "tokens a second (higher is better)"
        colors = {patch.get_facecolor()[:3] for patch in axes.patches}
        assert len(colors) == len({row.removesuffix(":fp32") for row in ROWS})
    values = [text.get_text() for text in figures[0].axes[2].texts]
    assert values.count(" not measured") == 1


def test_no_two_labels_of_a_benchmark_overlap(tmp_path: Path, pictures: list[Any]) -> None:
    speeds = {work: {row: 1000.0 + i for i, row in enumerate(ROWS)} for work in ("a", "b")}
    plot.plot_speed(speeds, "tokens a second", tmp_path / "bars.png", "a machine")
    shares = {f"op {n}": {row: 0.5 for row in ROWS} for n in range(40)}
    plot.plot_shares(shares, tmp_path / "ops.png", "a machine")
    for figure in pictures:
        for axes in figure.axes:
            labels = [*axes.texts, *axes.get_yticklabels(), axes.title]
            boxes = [text.get_window_extent() for text in labels if text.get_text()]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_lines_of_many_threads_are_drawn(tmp_path: Path, pictures: list[Any]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for count in (1, 2, 4, 8, 16, 32, 64, 96):
        lines[f"{count} threads"] = lines[f"{count} threads, at peak"] = [(64, 2.0), (128, 1.0)]
    plot.plot_lines(lines, "T", "ms per token", tmp_path / "lines.png", "a machine")
    solid, dashed = pictures[0].axes[0].get_lines()[:2]
    assert solid.get_color() == dashed.get_color() and dashed.get_linestyle() == "--"
