"""Tasks with a verifier: problems made from a seed, and a check of each answer.

    sort      "sort 52914 ="      " 12459"
    add       "add 47+85 ="       " 231"            the sum in three digits, the lowest first
    reverse   "reverse kxqad ="   " daqxk"
    format    "tag kxqad ="       " <a>kxqad</a>"

A problem is either for training or held out, whatever the seed and the number of examples: its
text decides. So no held-out problem is ever trained on. The texts suit a tokenizer of bytes.
Knows nothing about models.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gpt2c.kernels.checks import number, whole

__all__ = ["TASKS", "Problem", "examples", "verify"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT = 8  # one problem of so many is held out
SPLITS = ("train", "val")


class Problem(NamedTuple):
    """A prompt, its right answer, and an answer as a careless teacher gives it, wrong."""

    prompt: str
    answer: str
    wrong: str


def _drawn(rng: np.random.Generator, letters: str, least: int, most: int) -> str:
    """Return a word of random letters."""
    return "".join(rng.choice(list(letters), rng.integers(least, most + 1)))


def _swapped(rng: np.random.Generator, word: str) -> str:
    """Return a word with two different neighbours swapped; without such, with a letter more."""
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word + word[0]
    i = int(rng.choice(places))
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _sort(rng: np.random.Generator) -> Problem:
    digits = _drawn(rng, "0123456789", 4, 6)
    answer = "".join(sorted(digits))
    return Problem(f"sort {digits} =", answer, _swapped(rng, answer))


def _add(rng: np.random.Generator) -> Problem:
    a, b = (int(n) for n in rng.integers(0, 100, 2))
    wrong = (a + b + int(rng.choice([-10, -1, 1, 10]))) % 1000
    return Problem(f"add {a:02}+{b:02} =", f"{a + b:03}"[::-1], f"{wrong:03}"[::-1])


def _reverse(rng: np.random.Generator) -> Problem:
    word = _drawn(rng, LETTERS, 5, 5)
    return Problem(f"reverse {word} =", word[::-1], _swapped(rng, word[::-1]))


def _format(rng: np.random.Generator) -> Problem:
    word = _drawn(rng, LETTERS, 5, 5)
    return Problem(f"tag {word} =", f"<a>{word}</a>", word)


TASKS: dict[str, Callable[[np.random.Generator], Problem]] = {
    "sort": _sort,
    "add": _add,
    "reverse": _reverse,
    "format": _format,
}


def examples(
    task: str, split: str, count: int, seed: int = 1337, noise: float = 0.0
) -> list[dict[str, str]]:
    """Return examples of a task; a longer list begins with a shorter one.

    Parameters
    ----------
    task : one of `TASKS`
    split : "train" or "val"; they have no problem in common
    count : how many
    seed : of the problems
    noise : the share of completions that are wrong

    Returns
    -------
    dicts of "prompt", "completion" (a space and the answer) and "answer", the right one

    Raises
    ------
    ValueError : another task or split, count below 1, noise outside [0, 1]

    Examples
    --------
    >>> examples("sort", "train", 1)[0]
    {'prompt': 'sort 87159 =', 'completion': ' 15789', 'answer': '15789'}
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r:.50}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r:.50}")
    if whole("count", count) < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= number("noise", noise) <= 1:
        raise ValueError(f"noise must be in [0, 1], got {noise}")
    rng = np.random.default_rng([whole("seed", seed), SPLITS.index(split)])
    found: list[dict[str, str]] = []
    while len(found) < count:
        problem, careless = TASKS[task](rng), rng.random() < noise
        held_out = zlib.crc32(problem.prompt.encode()) % HELD_OUT == 0
        if held_out == (split == "val"):
            given = problem.wrong if careless else problem.answer
            found.append(
                {"prompt": problem.prompt, "completion": f" {given}", "answer": problem.answer}
            )
    return found


def verify(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Return 1.0 for each completion that is the answer, spaces around it apart, else 0.0.

    It is a reward function, see `gpt2c.finetune.verifiers`.
    """
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]
