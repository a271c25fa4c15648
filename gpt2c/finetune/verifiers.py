"""Rewards: a number for each completion, from a function of the user's or from a verifier.

A reward function has TRL's signature:

    def reward(completions, prompts=..., completion_ids=..., answer=..., **columns): -> list

Each argument is a list with an entry for each completion: a string without its end, its token ids
with it, the prompt's string or messages, and the other fields of the prompt's example. A reward is
a number, or None where the function has nothing to say. Several functions are added up with
weights.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2c.finetune.prompts import Prompt
from gpt2c.finetune.tasks import verify
from gpt2c.kernels.checks import counted, number

__all__ = ["Function", "Reward", "Rewards", "find_rewards", "score", "try_rewards"]

Function = Callable[..., Sequence[float | None]]
Floats = NDArray[np.float64]
LARGEST = 1e30  # of a reward
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


class Reward(NamedTuple):
    """A reward function, its name in metrics, and its weight in the sum."""

    name: str
    function: Function
    weight: float = 1.0


class Rewards(NamedTuple):
    """The rewards of S completions: the sum (S,), and those of each function, (S,) by its name.

    A completion about which no function says anything has nan.
    """

    total: Floats
    each: dict[str, Floats]


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def _number(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
    """Return 1.0 where the last number of the completion is the last one of the answer."""
    pairs = zip(completions, answer, strict=True)
    wanted = [(_last_number(text), _last_number(str(right))) for text, right in pairs]
    return [float(a is not None and a == b) for a, b in wanted]


def _exact(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
    """Return 1.0 where the completion is the answer, spaces around both apart."""
    return verify(completions, [str(right).strip() for right in answer])


def _matching(pattern: str) -> Function:
    """Return a function that gives 1.0 to completions which match a pattern as a whole."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward regex:{pattern!r:.50} is not a pattern: {error}") from None
    return lambda completions, **_: [
        float(compiled.fullmatch(text.strip()) is not None) for text in completions
    ]


VERIFIERS: dict[str, Function] = {"exact": _exact, "number": _number}


def find_rewards(
    given: Sequence[str | Function], weights: Sequence[float] = ()
) -> tuple[Reward, ...]:
    """Return the reward functions that names stand for.

    Parameters
    ----------
    given : functions, or names: "exact" and "number" compare the completion with the field answer,
        "regex:PATTERN" wants a match, "module:function" imports a function, also from the current
        directory. That is code, and it runs with your rights
    weights : one for each; none for all 1

    Raises
    ------
    ValueError : a name that cannot be found, another number of weights
    """
    if not given:
        raise ValueError(f"name a reward: {', '.join(VERIFIERS)}, regex:PATTERN or module:function")
    weights = [number("reward_weights", weight) for weight in weights] or [1.0] * len(given)
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"reward_weights must be finite numbers, got {weights}")
    if len(weights) != len(given):
        raise ValueError(
            f"reward_weights must be one for each of {counted(len(given), 'reward')}, got"
            f" {len(weights)}"
        )
    found = [_found(one) if isinstance(one, str) else (_name(one), one) for one in given]
    names = [name for name, _ in found]
    if len({*found}) < len(found) or len({*given}) < len(given):
        raise ValueError(f"rewards must be different, got {names}")
    own = [
        name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]
    return tuple(
        Reward(name, function, weight)
        for name, (_, function), weight in zip(own, found, weights, strict=True)
    )


def _name(function: Function) -> str:
    if not callable(function):
        raise ValueError(f"a reward must be a name or a function, got {function!r:.50}")
    return str(getattr(function, "__name__", type(function).__name__))


def _found(name: str) -> tuple[str, Function]:
    if name in VERIFIERS:
        return name, VERIFIERS[name]
    module, colon, rest = name.partition(":")
    if not (colon and module and rest):
        raise ValueError(
            f"no reward {name!r:.50}; the rewards are {', '.join(VERIFIERS)}, regex:PATTERN and"
            " module:function, several with ' + ' between"
        )
    if module == "regex":
        return name, _matching(rest)
    if module.endswith(".py"):
        right = f"{module.removesuffix('.py').replace('/', '.')}:{rest}"
        raise ValueError(f"reward {name!r:.70} must name a module, not a file: write {right:.70}")
    sys.path.insert(0, os.getcwd())  # as python does for a script there
    try:
        function = getattr(importlib.import_module(module), rest)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module does, sys.exit too
        raise ValueError(f"reward {name!r:.70} cannot be imported: {_text(error)}") from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"reward {name!r:.70} must be a function, got {function!r:.50}")
    return rest, function


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Rewards:
    """Return the rewards of S completions.

    Parameters
    ----------
    prompts, completions, completion_ids : S each
    columns : the other fields of the examples, S each

    Raises
    ------
    ValueError : a function raises, or returns another number of rewards, or something that is no
        finite number, or None for all: the message names the function and the completion
    """
    arguments = _arguments(prompts, completions, completion_ids, columns)
    each = {reward.name: _of(reward, arguments) for reward in rewards}
    table = np.stack([each[reward.name] for reward in rewards])
    weights = np.array([[reward.weight] for reward in rewards])
    said = ~np.isnan(table)
    total = np.where(said.any(axis=0), np.nansum(table * weights, axis=0), np.nan)
    if not said.any():
        names = ", ".join(each)
        raise ValueError(
            f"reward {names} returned None for all of {counted(len(completions), 'completion')}:"
            " nothing can be learned"
        )
    return Rewards(total, each)


def try_rewards(rewards: Sequence[Reward], prompts: Sequence[Prompt], end: int) -> None:
    """Call each function with an empty completion, before long work depends on it.

    Parameters
    ----------
    prompts : all that are sampled from
    end : the token id of an empty completion

    Raises
    ------
    ValueError : see `score`, but None is fine; a prompt lacks the answer that a verifier needs
    """
    first = prompts[0]
    columns = {name: [value] for name, value in first.columns.items()}
    arguments = _arguments([first.text], [""], [[end]], columns)
    lacking = [one for one in prompts if one.columns.get("answer") is None]
    for reward in rewards:
        if lacking and reward.function in VERIFIERS.values():
            raise ValueError(
                f"reward {reward.name} compares completions with the field answer, which prompt"
                f" {lacking[0].text!r:.70} lacks"
            )
        _of(reward, arguments)


def _arguments(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, list[Any]]:
    """Return what a reward function is called with."""
    return {
        "prompts": list(prompts),
        "completions": list(completions),
        "completion_ids": [[*map(int, ids)] for ids in completion_ids],
        **{name: list(values) for name, values in columns.items()},
    }


def _of(reward: Reward, arguments: Mapping[str, list[Any]]) -> Floats:
    """Return a function's rewards (S,), nan for None."""
    texts = arguments["completions"]
    try:
        returned = list(reward.function(**arguments))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's function does, sys.exit too
        raise ValueError(_blame(reward, arguments, error)) from error
    if len(returned) != len(texts):
        raise ValueError(
            f"reward {reward.name} must return a number for each of"
            f" {counted(len(texts), 'completion')}, got {len(returned)}, for prompt"
            f" {arguments['prompts'][0]!r:.70} and those after it"
        )
    values = np.full(len(texts), np.nan)
    for i, value in enumerate(returned):
        if value is None:
            continue
        try:
            values[i] = float(value)
        except Exception:  # whatever the user's object does
            values[i] = math.nan
        if not abs(values[i]) <= LARGEST:  # so that sums and squares of rewards are finite
            raise ValueError(
                f"reward {reward.name} must return finite numbers or None, got {_text(value)} for"
                f" {_rollout(arguments, i)}"
            )
    return values


def _text(value: Any) -> str:
    """Return a value of a user's class for an error, whose repr may fail."""
    try:
        return f"{value!r:.200}"
    except Exception:
        return f"a {type(value).__name__}"


def _blame(reward: Reward, arguments: Mapping[str, list[Any]], error: BaseException) -> str:
    """Return the sentence about an error, with the first completion that alone causes one."""
    where = f"the batch that starts with {_rollout(arguments, 0)}"
    for i in range(len(arguments["completions"])):
        try:
            reward.function(**{name: [values[i]] for name, values in arguments.items()})
        except KeyboardInterrupt:
            raise
        except BaseException as again:  # as above
            where, error = _rollout(arguments, i), again
            break
    return f"reward {reward.name} raised {_text(error)} for {where}"


def _rollout(arguments: Mapping[str, list[Any]], i: int) -> str:
    return (
        f"completion {arguments['completions'][i]!r:.70} of prompt {arguments['prompts'][i]!r:.70}"
    )
