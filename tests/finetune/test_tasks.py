"""Tasks: right answers pass, wrong ones do not, and no held-out problem is trained on."""

from __future__ import annotations

import doctest

import pytest
from conftest import refused

from gpt2c.finetune import tasks
from gpt2c.finetune.tasks import TASKS, examples, verify


def expected(prompt: str) -> str:
    """Return the right answer of a prompt."""
    verb, given, _ = prompt.split()
    if verb == "add":
        return f"{sum(map(int, given.split('+'))):03}"[::-1]
    return {"sort": "".join(sorted(given)), "reverse": given[::-1], "tag": f"<a>{given}</a>"}[verb]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    for one in examples(task, "train", 200, seed=3):
        assert one["answer"] == expected(one["prompt"])
        assert one["completion"] == " " + one["answer"]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_problems_are_apart_whatever_the_seed(task: str) -> None:
    train, val = (
        {one["prompt"] for seed in (1, 2) for one in examples(task, split, 500, seed)}
        for split in ("train", "val")
    )
    assert len(val) > 200 and not train & val


@pytest.mark.parametrize("task", TASKS)
def test_longer_lists_begin_with_shorter_ones_and_seeds_differ(task: str) -> None:
    assert examples(task, "val", 9, 5)[:4] == examples(task, "val", 4, 5)
    assert examples(task, "val", 9, 5) != examples(task, "val", 9, 6)


@pytest.mark.parametrize("task", TASKS)
def test_careless_teacher_is_wrong_as_often_as_is_said(task: str) -> None:
    clean, noisy = (examples(task, "train", 500, 1, noise) for noise in (0.0, 0.3))
    assert [one["prompt"] for one in clean] == [one["prompt"] for one in noisy]
    right = verify([one["completion"] for one in noisy], [one["answer"] for one in noisy])
    assert 0.6 < sum(right) / 500 < 0.8


@pytest.mark.parametrize(
    ("completion", "passes"),
    [("123", 1.0), (" 123\n", 1.0), ("132", 0.0), ("1234", 0.0), ("", 0.0), ("1 23", 0.0)],
)
def test_verifier(completion: str, passes: float) -> None:
    assert verify([completion, " 9"], ["123", "9"], prompts=["", ""]) == [passes, 1.0]


def test_bad_arguments_are_named() -> None:
    assert refused(examples, "chess", "train", 1) == (
        "task must be one of sort, add, reverse, format, got 'chess'"
    )
    assert refused(examples, "sort", "test", 1) == "split must be one of train, val, got 'test'"
    assert refused(examples, "sort", "val", 0) == "count must be at least 1, got 0"
    assert refused(examples, "sort", "val", 1, noise=1.5) == "noise must be in [0, 1], got 1.5"


def test_example() -> None:
    assert doctest.testmod(tasks).attempted == 1 and not doctest.testmod(tasks).failed
