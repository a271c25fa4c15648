"""Folds: shares of labels, whole groups, the same ones for a seed, and what cannot be divided."""

from __future__ import annotations

import numpy as np
from conftest import refused

from gpt2c.evaluate.folds import stratified_folds


def test_labels_are_spread_evenly(rng: np.random.Generator) -> None:
    labels = rng.choice(4, 203, p=[0.6, 0.25, 0.1, 0.05])
    folds = stratified_folds(labels, 5)
    counts = np.array([np.bincount(labels[folds == fold], minlength=4) for fold in range(5)])
    assert (np.ptp(counts, axis=0) <= 1).all() and np.ptp(counts.sum(1)) <= 4
    assert np.array_equal(folds, stratified_folds(labels, 5))
    assert not np.array_equal(folds, stratified_folds(labels, 5, seed=2))


def test_groups_stay_whole(rng: np.random.Generator) -> None:
    groups = [f"source {n}" for n in rng.integers(0, 40, 400)]
    labels = rng.integers(0, 3, 400)
    folds = stratified_folds(labels, 4, groups=groups)
    assert len({*zip(groups, folds.tolist(), strict=True)}) == len(set(groups))
    counts = np.array([np.bincount(labels[folds == fold], minlength=3) for fold in range(4)])
    assert counts.min() > 20 and np.ptp(counts.sum(1)) < 20  # 33 and 100 if it were exact


def test_what_cannot_be_divided_is_refused() -> None:
    assert refused(stratified_folds, [0, 1], 1) == "cross-validation needs at least 2 folds, got 1"
    said = refused(stratified_folds, [0, 0, 0, 1], 2, names=["ham", "spam"])
    assert said.startswith("the label 'spam' has 1 text, and 2 folds need at least 2: take fewer")
    said = refused(stratified_folds, [0, 0, 0, 1, 1], 2, groups=[1, 2, 3, 4, 4])
    assert said.startswith("the label 1 has 1 group, and 2 folds need at least 2")
    labels, groups = [1, 0, 1, 0, 0, 1], [4, 1, 1, 0, 0, 4]
    said = refused(stratified_folds, labels, 2, groups=groups, names=["ham", "spam"])
    assert said.startswith("fold 2 of 2 has no text of the label 'ham', because groups stay whole")
