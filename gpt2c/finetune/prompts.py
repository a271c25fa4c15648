"""Prompts to sample completions of: read from a file or a list, or made by a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt2c.finetune import tasks
from gpt2c.text.chat import check_messages, encode_chat, teach_template
from gpt2c.text.examples import Record, group_of, read_records, string
from gpt2c.text.ragged import held_out
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Prompt", "Prompts", "read_prompts", "task_prompts"]

ARGUMENTS = ("prompts", "completions", "completion_ids")  # that reward functions get beside columns
VAL_SEED = 0  # of a task's held-out problems, which are the same for every run


class Prompt(NamedTuple):
    """A prompt.

    Attributes
    ----------
    ids : token ids, the end of text first
    text : what reward functions see: the string, or the messages
    columns : the other fields of its example
    """

    ids: list[int]
    text: Any
    columns: Mapping[str, Any]


class Prompts(NamedTuple):
    """Prompts to learn from, those held out, and how many were left out for each reason."""

    train: list[Prompt]
    val: list[Prompt]
    left_out: dict[str, int]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the prompts: their number, and a checksum of their ids and columns."""
        digest = hashlib.sha256()
        for one in (*self.train, *self.val):
            digest.update(json.dumps([one.ids, dict(one.columns)], default=repr).encode())
        return {"examples": len(self.train) + len(self.val), "sha256": digest.hexdigest()}


def read_prompts(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    most: int,
    prompt_field: str,
    val_fraction: float,
    seed: int,
    group_field: str = "",
) -> Prompts:
    """Read prompts.

    Parameters
    ----------
    source : see `read_records`: records with a prompt, or messages, of which the last is the user's
    tokenizer : encodes them; messages give it a chat template
    most : the most tokens of a prompt; longer ones are left out, and so is what is there already
    prompt_field : the name of the field prompt, "" for that
    val_fraction, seed : see `held_out`
    group_field : see `group_of`; without it each prompt is its own group

    Raises
    ------
    OSError, ValueError : see `read_records`; no prompt is left; the tokenizer has another chat
        template than gpt2c's
    """
    found = read_records(source, ("messages", "prompt"), {"prompt": prompt_field})
    if found.format == "messages":
        teach_template(tokenizer)
    prompts: dict[tuple[int, ...], Prompt] = {}
    groups: list[Any] = []
    left_out: dict[str, int] = {}
    for record in found.records:
        one = _prompt(record, found.format, tokenizer)
        reason = "that are there already" if tuple(one.ids) in prompts else ""
        if len(one.ids) > most:
            reason = "that leave no room for a completion"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            prompts[tuple(one.ids)] = one
            groups.append(group_of(record, group_field, tuple(one.ids)))
    if not prompts:
        many = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"no prompt is left to sample from: {many}; the model's context less"
            f" max_completion_length has room for {max(0, most)} tokens"
        )
    out = held_out(groups, val_fraction, seed)
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for one, held in zip(prompts.values(), out, strict=True):
        sides[held].append(one)
    return Prompts(*sides, left_out)


def task_prompts(
    task: str, tokenizer: Tokenizer, most: int, count: int, val_count: int, seed: int
) -> Prompts:
    """Make prompts of a task: `count` by the seed, and `val_count` that are always the same.

    Raises
    ------
    ValueError : see `tasks.examples`; a prompt has more than `most` tokens
    """
    sides = [
        [
            _prompt(Record(fields, f"task {task}"), "prompt", tokenizer)
            for fields in tasks.examples(task, split, many, own)
        ]
        for split, many, own in (("train", count, seed), ("val", val_count, VAL_SEED))
    ]
    longest = max(len(one.ids) for side in sides for one in side)
    if longest > most:
        raise ValueError(
            f"a prompt of task {task} has {longest} tokens, and the model's context less"
            f" max_completion_length has room for {max(0, most)}: lower max_completion_length"
        )
    return Prompts(sides[0], sides[1], {})


def _prompt(record: Record, format: str, tokenizer: Tokenizer) -> Prompt:
    """Return a record as a prompt.

    Raises
    ------
    ValueError : the record is damaged, its last message is the assistant's, or a field has the name
        of another argument of reward functions
    """
    if taken := [name for name in ARGUMENTS if name in record.fields]:
        raise ValueError(
            f"{record.where}: reward functions get an argument {taken[0]} of gpt2c's own, so no"
            " field may have that name"
        )
    columns = {
        name: value
        for name, value in record.fields.items()
        if name not in ("prompt", "messages", "completion")
    }
    if format == "prompt":
        text = string(record, "prompt")
        return Prompt([tokenizer.eot, *tokenizer.encode(text)], text, columns)
    given = record.fields["messages"]
    messages = check_messages(given, place=record.where)
    if messages[-1].role != "user":
        raise ValueError(f"{record.where}: the last message must be the user's, to be answered")
    return Prompt(encode_chat(tokenizer, messages, answer=True)[0], given, columns)
