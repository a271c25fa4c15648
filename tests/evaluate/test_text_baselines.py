"""Baselines of classifiers: what they learn, and that one of them needs no scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2c.evaluate import text_baselines
from gpt2c.evaluate.text_baselines import baselines

TEXTS = ["free money now", "win free money", "free prize", "see you at noon", "noon is fine"] * 2
LABELS = np.array([1, 1, 1, 0, 0] * 2)
OTHERS = ["free free prize", "lunch at noon", "!"]


def test_without_sklearn_there_is_the_most_frequent_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_baselines, "find_spec", lambda name: None)
    assert {name: y.tolist() for name, y in baselines(TEXTS, LABELS, OTHERS).items()} == {
        "most frequent label": [1, 1, 1]
    }


@pytest.mark.parametrize("balanced", [False, True])
def test_words_and_characters_are_learned(balanced: bool) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed, nor is it needed")
    most, words, characters = baselines(TEXTS, LABELS, OTHERS, balanced).values()
    assert most.tolist() == [1, 1, 1]
    assert words[:2].tolist() == characters[:2].tolist() == [1, 0]


def test_one_label_needs_no_border() -> None:
    assert len(baselines(TEXTS, np.zeros(10, int), OTHERS)) == 1
