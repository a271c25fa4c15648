"""Folds for cross-validation: stratified by label, groups whole, decided by the seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.checks import counted

__all__ = ["stratified_folds"]


def stratified_folds(
    labels: ArrayLike,
    folds: int,
    seed: int = 1337,
    groups: Sequence[Hashable] | None = None,
    names: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """Return the fold of each text, (n,) whole numbers from 0 on.

    The shares of labels in a fold are as near to those of all texts as groups allow: without groups
    two folds differ by at most one text of a label.

    Parameters
    ----------
    labels : (n,) whole numbers from 0 on
    folds : how many, at least 2
    seed : shuffles the texts, or groups
    groups : the group of each text; the texts of a group get one fold. None: each is its own
    names : of the labels, for errors

    Raises
    ------
    ValueError : fewer than 2 folds, or a label that is not in each fold

    Examples
    --------
    >>> from gpt2c.evaluate.folds import stratified_folds
    >>> stratified_folds([0, 0, 0, 0, 1, 1], 2, groups=list("aabbcd")).tolist()
    [0, 0, 1, 1, 0, 1]
    """
    y = np.asarray(labels)
    if folds < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, got {folds}")
    first: dict[Hashable, int] = {}
    of = np.array([first.setdefault(key, len(first)) for key in groups or range(len(y))])
    K, total = int(y.max()) + 1, np.bincount(y)
    held = np.zeros((len(first), K), np.int64)  # texts of each label in a group
    np.add.at(held, (of, y), 1)
    _check_spread((held > 0).sum(0), total, folds, groups is not None, names)
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(-held[order].sum(1), kind="stable")]  # large groups first
    have, sizes = np.zeros((folds, K)), np.zeros(folds)
    fold_of = np.empty(len(first), np.int64)
    for group in order:
        # the fold that has least of what the group holds, a rare label counting more; then the
        # smallest one
        fullness = have @ (held[group] / np.maximum(total, 1) ** 2)
        fold = np.lexsort((sizes, fullness.round(12)))[0]
        have[fold] += held[group]
        sizes[fold] += held[group].sum()
        fold_of[group] = fold
    for label, fold in np.argwhere(have.T == 0).tolist():
        if total[label]:
            raise ValueError(
                f"fold {fold + 1} of {folds} has no text of {_name(label, names)}, because groups"
                " stay whole: take fewer folds, or another seed"
            )
    return np.take(fold_of, of)


def _check_spread(
    spread: NDArray[np.int64],
    total: NDArray[np.int64],
    folds: int,
    grouped: bool,
    names: Sequence[str] | None,
) -> None:
    """Refuse a label that has fewer texts, or groups, than there are folds."""
    for label in np.flatnonzero((spread < folds) & (total > 0)).tolist():
        has = counted(int(spread[label]), "group" if grouped else "text")
        raise ValueError(
            f"{_name(label, names)} has {has}, and {folds} folds need at least {folds}: take fewer"
            " folds, or remove the label"
        )


def _name(label: int, names: Sequence[str] | None) -> str:
    return f"the label {label if names is None else repr(names[label])}"
