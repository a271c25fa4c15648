"""Rewards: functions found and called as TRL calls them; a bad one is named with its completion."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c.finetune.prompts import Prompt
from gpt2c.finetune.verifiers import find_rewards, score, try_rewards

PROMPTS, COMPLETIONS = ["2+2 =", "2+2 =", "3+4 ="], [" 4", " 5.", " it is 7"]
COLUMNS = {"answer": ["4", "4", 7]}
IDS = [[1], [2, 3], [4]]


def scored(*given: Any, weights: Any = ()) -> Any:
    return score(find_rewards(given, weights), PROMPTS, COMPLETIONS, IDS, COLUMNS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exact", [1, 0, 0]),
        ("number", [1, 0, 1]),
        (r"regex:\d", [1, 0, 0]),
        (r"regex:.*\d", [1, 0, 1]),
    ],
)
def test_verifiers(name: str, expected: list[float]) -> None:
    assert scored(name).total.tolist() == expected


@pytest.mark.parametrize(
    ("completion", "answer", "passes"),
    [("-3", "3", 0), ("+3", 3, 1), ("1,000", "1000", 1), ("2.50", 2.5, 1), ("no", "no", 0)],
)
def test_numbers_are_compared_as_numbers(completion: str, answer: Any, passes: int) -> None:
    found = score(find_rewards(["number"]), ["?"], [completion], [[1]], {"answer": [answer]})
    assert found.total.tolist() == [passes]


def test_function_gets_trls_arguments_for_every_completion() -> None:
    seen: dict[str, Any] = {}

    def reward(completions: Any, **rest: Any) -> list[float]:
        seen.update(rest, completions=completions)
        return [0.0] * len(completions)

    scored(reward)
    assert seen == {
        **{"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS},
        **COLUMNS,
    }


def test_rewards_are_added_with_weights_and_none_says_nothing() -> None:
    def first(completions: Any, **_: Any) -> list[Any]:
        return [1.0, None, None]

    def second(completions: Any, **_: Any) -> Any:
        return np.array([1, 2, np.float32(3)], object) * [1, 1, 1]

    found = scored(first, second, weights=[2.0, -1.0])
    assert found.total.tolist() == [1.0, -2.0, -3.0]
    alone = scored(first)
    assert alone.total[0] == 1.0 and np.isnan(alone.total[1:]).all()
    assert set(found.each) == {"first", "second"}


def test_modules_in_the_current_directory_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **_):\n    return [-len(text) for text in completions]\nx = 3\n"
    )
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert scored("my_rewards:short").total.tolist() == [-2, -3, -8]
    assert "reward 'my_rewards:long' cannot be imported: " in refused(scored, "my_rewards:long")
    assert "ZeroDivisionError" in refused(scored, "my_broken:short")
    assert refused(scored, "my_rewards:x") == "reward 'my_rewards:x' must be a function, got 3"


def bad(*returned: Any) -> Any:
    return lambda completions, **_: [*returned]


def test_bad_rewards_are_named_with_the_completion() -> None:
    def failing(completions: Any, **_: Any) -> list[float]:
        return [1 / (text != " 5.") for text in completions]

    def needs(completions: Any, prompts: Any, **_: Any) -> list[float]:
        if len(completions) > 1:
            raise KeyError("a batch")
        return [0.0]

    assert refused(scored, failing) == (
        "reward failing raised ZeroDivisionError('division by zero') for completion ' 5.' of"
        " prompt '2+2 ='"
    )
    assert refused(scored, needs) == (
        "reward needs raised KeyError('a batch') for the batch that starts with completion ' 4' of"
        " prompt '2+2 ='"
    )
    for value in (float("nan"), float("inf"), "many", [1]):
        assert refused(scored, bad(1, 1, value)) == (
            f"reward <lambda> must return finite numbers or None, got {value!r} for completion"
            " ' it is 7' of prompt '3+4 ='"
        )
    assert "a number for each of 3 completions, got 2, for prompt '2+2 ='" in refused(
        scored, bad(1, 2)
    )
    assert "returned None for all of 3 completions" in refused(scored, bad(None, None, None))
    assert "raised TypeError" in refused(scored, lambda completions: [0, 0, 0])


def test_no_reward_ends_the_program_or_overflows() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    def leaves(completions: Any, **_: Any) -> list[float]:
        raise SystemExit(7)

    assert "raised SystemExit(7) for completion" in refused(scored, leaves)
    for value in (10**400, 1e308, math.nan, Odd(), "a"):
        assert "must return finite numbers or None, got" in refused(
            scored, lambda completions, value=value, **_: [value] * len(completions)
        )


def test_rewards_of_one_name_are_numbered() -> None:
    both = find_rewards([bad(1, 1, 1), "exact", bad(2, 2, 2)])
    assert [one.name for one in both] == ["<lambda>_1", "exact", "<lambda>_2"]
    found = scored(r"regex:\d", r"regex:.*\d")
    assert set(found.each) == {r"regex:\d", r"regex:.*\d"} and found.total.tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["exact", "number"])
@pytest.mark.parametrize("columns", [{}, {"answer": None}])
def test_every_prompt_needs_the_answer_that_is_compared(name: str, columns: Any) -> None:
    prompts = [Prompt([1], "2+2 =", {"answer": 4}), Prompt([1], "3+4 =", columns)]
    assert refused(try_rewards, find_rewards([name]), prompts, 0) == (
        f"reward {name} compares completions with the field answer, which prompt '3+4 =' lacks"
    )
    try_rewards(find_rewards([name]), prompts[:1], 0)
    try_rewards(find_rewards(["regex:a"]), prompts, 0)


def test_bad_names_are_refused() -> None:
    assert "name a reward: exact, number" in refused(find_rewards, [])
    assert "no reward 'exactly'" in refused(find_rewards, ["exactly"])
    assert "is not a pattern" in refused(find_rewards, ["regex:("])
    assert "one for each of 2 rewards, got 1" in refused(find_rewards, ["exact", "number"], [1])
    assert "must be different" in refused(find_rewards, ["exact", "exact"])
    assert "must be different" in refused(find_rewards, ["regex:a", "regex:a"])
    assert "no reward 'exact number'" in refused(find_rewards, ["exact number"])
    for weight in (float("nan"), float("inf")):
        assert "must be finite numbers" in refused(find_rewards, ["exact"], [weight])
    assert "a name or a function, got 3" in refused(find_rewards, [3])
