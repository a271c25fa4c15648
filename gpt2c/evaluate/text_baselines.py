"""Baselines that a classifier of texts must beat: the most frequent label, words, and characters.

The last two need scikit-learn, the extra [baseline]. They count n-grams, weighted by how rare they
are (TF-IDF), and draw a linear border: on few texts, or where topics have words of their own, they
are hard to beat.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["INSTALL", "baselines", "have_sklearn"]

Labels = NDArray[np.int64]
INSTALL = "pip install scikit-learn"
WORDS = r"(?u)\w+|[^\w\s]"  # single letters and marks too, so that no text is empty


def have_sklearn() -> bool:
    """Return whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def baselines(
    texts: Sequence[str],
    labels: Labels,
    others: Sequence[str],
    balanced: bool = False,
    seed: int = 1337,
) -> dict[str, Labels]:
    """Return the labels that each baseline predicts for `others`, learned from texts and labels.

    Parameters
    ----------
    labels : (n,) whole numbers from 0 on
    balanced : weigh each text by n / (k n_c), as the classifier does with balanced class weights

    Returns
    -------
    name -> (m,); without scikit-learn the most frequent label only
    """
    most = np.bincount(labels).argmax()
    found = {"most frequent label": np.full(len(others), most, np.int64)}
    if have_sklearn() and len(np.unique(labels)) > 1:  # a border is between two
        for name, (counter, linear) in _linear(balanced, seed).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of convergence: the last border counts
                linear.fit(counter.fit_transform(texts), labels)
            found[name] = linear.predict(counter.transform(others)).astype(np.int64)
    return found


def _linear(balanced: bool, seed: int) -> dict[str, tuple[Any, Any]]:
    """Return name -> what counts n-grams, and what draws the border."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    weight = "balanced" if balanced else None
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORDS)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    return {
        "words (1-2), TF-IDF, logistic regression": (
            words,
            LogisticRegression(max_iter=1000, class_weight=weight, random_state=seed),
        ),
        "characters (2-5), TF-IDF, linear SVM": (
            characters,
            LinearSVC(class_weight=weight, random_state=seed),
        ),
    }
