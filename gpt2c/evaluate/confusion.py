"""The confusion matrix of a classifier, as text and as a picture (matplotlib, the extra [plot])."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpt2c.evaluate.metrics import Report
from gpt2c.screen.picture import drawing, make_figure, write
from gpt2c.screen.terminal import columns, one_line

__all__ = ["confusion_text", "plot_confusion"]

WIDEST = 100  # columns of a matrix as text
MOST_PAIRS = 15  # lines in its place
MOST_NUMBERS = 20  # labels of a picture whose cells have room for numbers
LONGEST = 24  # characters of a label in a picture


def confusion_text(report: Report) -> str:
    """Return the matrix as lines, a row for each true label; if it is too wide, the main errors."""
    names = [*map(one_line, report.labels)]
    cells = [[str(count) for count in row] for row in report.confusion.tolist()]
    left = max(map(columns, ("true", *names)))
    widths = [
        max(map(columns, (n, *c))) for n, c in zip(names, zip(*cells, strict=True), strict=True)
    ]
    if left + sum(widths) + 2 * len(widths) > WIDEST:
        return _errors(report, names)
    lines = [" " * (left + 2) + "predicted", _row("true", names, left, widths)]
    lines += [_row(name, row, left, widths) for name, row in zip(names, cells, strict=True)]
    return "\n".join(lines) + "\n"


def _errors(report: Report, names: list[str]) -> str:
    """Return the pairs that are confused most often, one a line."""
    errors = report.confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order]
    pairs = [(true, found) for true, found in pairs if errors[true, found]]
    if not pairs:
        return "every text got its own label\n"
    left = max(columns(names[true]) for true, _ in pairs)
    most = len(str(errors.max()))
    lines = ["the most frequent errors, true label -> predicted"]
    for true, found in pairs:
        of = f"{errors[true, found]:>{most}} of {report.support[true]}"
        lines.append(f"{_right(names[true], left)} -> {names[found]}  {of}")
    return "\n".join(lines) + "\n"


def _row(name: str, cells: list[str], left: int, widths: list[int]) -> str:
    row = "".join("  " + _right(cell, width) for cell, width in zip(cells, widths, strict=True))
    return _right(name, left) + row


def _right(text: str, width: int) -> str:
    return " " * (width - columns(text)) + text


def plot_confusion(report: Report, path: Path, title: str = "") -> str:
    """Draw the matrix; a cell's shade is its share of the texts of its true label.

    Parameters
    ----------
    path : the PNG file to write

    Returns
    -------
    the characters that no font here has, see `gpt2c.screen.picture.write`

    Raises
    ------
    ValueError : matplotlib is missing
    OSError : the picture cannot be written
    """
    K, shares = len(report.labels), report.confusion / np.maximum(report.support, 1)[:, None]
    names = [one_line(name)[:LONGEST] for name in report.labels]
    side = min(16.0, 3 + 0.42 * K)
    with drawing():
        figure = make_figure((side + 1, side))
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(K), names, rotation=90, fontsize=8)
        axes.set_yticks(range(K), names, fontsize=8)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(title or f"accuracy {report.accuracy:.3f}", fontsize=10)
        if K <= MOST_NUMBERS:
            for (true, found), count in np.ndenumerate(report.confusion):
                shade = "white" if shares[true, found] > 0.5 else "#333333"
                place = {"ha": "center", "va": "center", "fontsize": 7}
                axes.text(found, true, str(count), color=shade, **place)
        figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true label's texts")
        return write(figure, path)
