"""Metrics of a classifier: accuracy, precision, recall, F1 and more, and the report of them.

All but the calibration come from the confusion matrix, so pooling folds is adding matrices. The
conventions are scikit-learn's, and the report is printed as its classification_report. Independent
of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.screen.terminal import columns, one_line

__all__ = ["Averages", "Report", "calibration_error", "compare", "wilson"]

CountArray = NDArray[np.int64]
Floats = NDArray[np.float64]
HEADINGS = ("precision", "recall", "f1-score", "support")


class Averages(NamedTuple):
    """Precision, recall and F1, averaged over the labels."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Report:
    """The metrics of a classifier's answers. `str(report)` is scikit-learn's report.

    Parameters
    ----------
    labels : the K names, in the order of the matrix
    confusion : (K, K) int64, how often a text of the label of the row got that of the column

    A ratio without a denominator is 0, as with scikit-learn's zero_division=0: the precision of a
    label that was never predicted, the recall of one that no text has.

    Examples
    --------
    >>> from gpt2c.evaluate.metrics import compare
    >>> report = compare([0, 0, 1, 1], [0, 1, 1, 1], ["ham", "spam"])
    >>> report.accuracy, report.precision.tolist()
    (0.75, [1.0, 0.6666666666666666])
    """

    labels: tuple[str, ...]
    confusion: CountArray

    @property
    def count(self) -> int:
        """The number of texts."""
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        """The number of texts that got their own label."""
        return int(np.trace(self.confusion))

    @property
    def support(self) -> CountArray:
        """The number of texts of each label, (K,)."""
        return self.confusion.sum(1)  # type: ignore[no-any-return]

    @property
    def predicted(self) -> CountArray:
        """How often each label was predicted, (K,)."""
        return self.confusion.sum(0)  # type: ignore[no-any-return]

    @property
    def precision(self) -> Floats:
        """The share of a label's predictions that are right, (K,)."""
        return _ratio(self.confusion.diagonal(), self.predicted)

    @property
    def recall(self) -> Floats:
        """The share of a label's texts that are found, (K,)."""
        return _ratio(self.confusion.diagonal(), self.support)

    @property
    def f1(self) -> Floats:
        """The harmonic mean of precision and recall, (K,)."""
        return _ratio(2 * self.confusion.diagonal(), self.predicted + self.support)

    @property
    def accuracy(self) -> float:
        """The share of all texts that got their own label."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Where the accuracy on more texts lies with 95% confidence; see `wilson`."""
        return wilson(self.right, self.count)

    @property
    def macro(self) -> Averages:
        """The averages over labels: a rare one counts as much as a frequent one."""
        return Averages(*(float(each.mean()) for each in self._each()))

    @property
    def weighted(self) -> Averages:
        """The averages over labels, weighted by their number of texts."""
        return Averages(*(float(np.average(each, weights=self.support)) for each in self._each()))

    @property
    def matthews(self) -> float:
        """The correlation of labels and predictions: 1 all right, 0 as by chance, -1 at worst.

        0 if all texts have one label, or got one. Source: Gorodkin 2004, doi:10.1016/
        j.compbiolchem.2004.09.006, R_K, which for two labels is Matthews 1975.
        """
        n, true, found = self.count, self.support.tolist(), self.predicted.tolist()
        both = self.right * n - sum(t * p for t, p in zip(true, found, strict=True))
        spread = math.prod(n * n - sum(x * x for x in each) for each in (true, found))
        return both / math.sqrt(spread) if spread else 0.0

    def _each(self) -> tuple[Floats, Floats, Floats]:
        return self.precision, self.recall, self.f1

    def __str__(self) -> str:
        """Write precision, recall, F1 and support of each label, and their averages."""
        names, averages = [*map(one_line, self.labels)], ("macro avg", "weighted avg")
        width = max(map(columns, (*names, *averages)))
        lines = [_line("", HEADINGS, width), ""]
        for name, *row in zip(names, *self._each(), self.support, strict=True):
            lines.append(_line(name, _cells(row), width))
        lines += ["", _line("accuracy", ("", "", *_cells([self.accuracy, self.count])), width)]
        for name, average in zip(averages, (self.macro, self.weighted), strict=True):
            lines.append(_line(name, _cells([*average, self.count]), width))
        return "\n".join(lines) + "\n"

    @property
    def notes(self) -> list[str]:
        """Sentences about ratios that have no denominator and are written as 0."""
        never = [self.labels[k] for k in np.flatnonzero(self.predicted == 0)]
        absent = [self.labels[k] for k in np.flatnonzero(self.support == 0)]
        said = []
        if never:
            said.append(f"never predicted, so that precision counts as 0: {_listed(never)}")
        if absent:
            said.append(f"no text has the label, so that recall counts as 0: {_listed(absent)}")
        return said


def compare(true: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> Report:
    """Return the report of predictions.

    Parameters
    ----------
    true, predicted : (n,) whole numbers, the place of each text's label in `labels`
    labels : the K names

    Raises
    ------
    ValueError : no texts, arrays of different lengths, or a number that is no label
    """
    K = len(labels)
    pairs = [np.asarray(each) for each in (true, predicted)]
    if pairs[0].shape != pairs[1].shape or pairs[0].ndim != 1 or not pairs[0].size:
        shapes = " and ".join(str(each.shape) for each in pairs)
        raise ValueError(f"true and predicted labels must be (n,) of one length, got {shapes}")
    for each in pairs:
        if each.dtype.kind not in "iu" or each.min() < 0 or each.max() >= K:
            raise ValueError(f"labels must be whole numbers in [0, {K}), got {each!r:.50}")
    cells = pairs[0].astype(np.int64) * K + pairs[1].astype(np.int64)
    return Report(tuple(labels), np.bincount(cells, minlength=K * K).reshape(K, K))


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a share, from `right` of `count`.

    Unlike plus and minus a standard error it stays within 0 and 1, also for shares near them.
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.

    Examples
    --------
    >>> from gpt2c.evaluate.metrics import wilson
    >>> [round(end, 3) for end in wilson(95, 100)]
    [0.888, 0.978]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(probabilities: ArrayLike, true: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error: how far confidence is from the share that is right.

    Texts are put into bins of equal width by the probability of their likeliest label. The error is
    the mean over texts of |confidence - accuracy| of the bin. Source: Guo et al. 2017,
    arXiv:1706.04599.

    Parameters
    ----------
    probabilities : (n, K)
    true : (n,) label numbers
    """
    p = np.asarray(probabilities, np.float64)
    confidence, right = p.max(1), p.argmax(1) == np.asarray(true)
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, confidence, bins) - np.bincount(bin_of, right, bins)
    return float(np.abs(gaps).sum() / len(p))


def _ratio(part: CountArray, whole: CountArray) -> Floats:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0)


def _cells(row: Sequence[Any]) -> tuple[str, ...]:
    return (*(f"{value:.2f}" for value in row[:-1]), str(row[-1]))


def _line(name: str, cells: Sequence[str], width: int) -> str:
    return " " * (width - columns(name)) + name + " " + "".join(f" {cell:>9}" for cell in cells)


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(one_line, names[:most])) + more
