"""Metrics of a classifier: numbers by hand, the layout of the report, and what has no denominator.

`make parity` compares them with scikit-learn's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from gpt2c.evaluate.confusion import confusion_text, plot_confusion
from gpt2c.evaluate.metrics import Report, calibration_error, compare, wilson

TRUE, FOUND = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
REPORT = """\
              precision    recall  f1-score   support

         ant       1.00      0.67      0.80         3
         bee       0.50      0.50      0.50         2
         cat       0.50      1.00      0.67         1

    accuracy                           0.67         6
   macro avg       0.67      0.72      0.66         6
weighted avg       0.75      0.67      0.68         6
"""
MATRIX = """\
      predicted
true  ant  bee  cat
 ant    2    1    0
 bee    0    1    1
 cat    0    0    1
"""


def test_metrics_by_hand() -> None:
    found = compare(TRUE, FOUND, ["ant", "bee", "cat"])
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert found.precision.tolist() == [1, 1 / 2, 1 / 2]
    assert found.recall.tolist() == [2 / 3, 1 / 2, 1]
    assert found.f1 == pytest.approx([4 / 5, 1 / 2, 2 / 3])
    assert found.accuracy == 4 / 6 and found.count == 6
    assert found.macro == pytest.approx([2 / 3, 13 / 18, (4 / 5 + 1 / 2 + 2 / 3) / 3])
    assert found.weighted == pytest.approx([4.5 / 6, 4 / 6, (12 / 5 + 1 + 2 / 3) / 6])
    # right * n - sum t p = 24 - (6 + 4 + 2); n^2 - sum p^2 = 36 - 12, n^2 - sum t^2 = 36 - 14
    assert found.matthews == pytest.approx(12 / np.sqrt(24 * 22))
    assert str(found) == REPORT and not found.notes
    assert confusion_text(found) == MATRIX


def test_ratios_without_a_denominator_are_zero_and_said() -> None:
    found = compare([0, 0, 1], [0, 0, 0], ["a", "b", "c"])
    assert found.precision.tolist() == [2 / 3, 0, 0]
    assert found.recall.tolist() == [1, 0, 0] and found.f1[1:].tolist() == [0, 0]
    assert found.notes == [
        "never predicted, so that precision counts as 0: b, c",
        "no text has the label, so that recall counts as 0: c",
    ]
    assert found.matthews == 0  # all predictions are alike


def test_matthews_of_two_labels() -> None:
    for counts, expected in (([[4, 0], [0, 3]], 1), ([[0, 4], [3, 0]], -1), ([[2, 2], [3, 3]], 0)):
        assert Report(("a", "b"), np.array(counts)).matthews == pytest.approx(expected)


def test_interval_by_hand() -> None:
    # Wilson's formula with z = 1.96 for 1 of 10, as in Newcombe 1998
    assert wilson(1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1
    assert wilson(0, 20)[1] == pytest.approx(1 - wilson(20, 20)[0])


def test_calibration_by_hand() -> None:
    # two texts are 75% certain and one of them is right; one is certain, and right
    p, true = [[0.75, 0.25], [0.25, 0.75], [1.0, 0.0]], [0, 0, 0]
    assert calibration_error(p, true) == pytest.approx((2 * 0.25 + 0) / 3)
    assert calibration_error([[1.0, 0.0]], [1]) == 1


def test_many_labels_show_the_main_errors() -> None:
    labels = [f"section {n}" for n in range(30)]
    true = np.repeat(np.arange(30), 4)
    found = true.copy()
    found[:3], found[8] = 7, 5
    lines = confusion_text(compare(true, found, labels)).splitlines()
    assert lines[1:] == ["section 0 -> section 7  3 of 4", "section 2 -> section 5  1 of 4"]
    assert confusion_text(compare(true, true, labels)) == "every text got its own label\n"


def test_names_are_lines_of_any_language() -> None:
    lines = str(compare([0, 1], [0, 1], ["名字", "two\nlines"])).splitlines()
    assert lines[2].startswith(" " * 8 + "名字 ")  # each takes two columns of 12
    assert lines[3].startswith("  two\\nlines " if "\\n" in lines[3] else "   two lines ")


def test_picture_is_drawn(tmp_path: Path) -> None:
    for K in (3, 25):
        path = tmp_path / f"{K}.png"
        plot_confusion(compare(np.arange(K), np.arange(K), [f"$l{k}$" for k in range(K)]), path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("true", "found"),
    [([], []), ([0, 1], [0]), ([0], [2]), ([-1], [0]), ([0.0], [0]), ([[0]], [[0]])],
)
def test_bad_labels_are_refused(true: list[int], found: list[int]) -> None:
    assert refused(compare, true, found, ["a", "b"]).split()[0] in ("true", "labels")
