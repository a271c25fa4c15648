"""Data of a method that learns texts: examples from a file or a list, or a directory of tokens.

A directory of `gpt2c prepare` holds plain text: its token files are cut into windows, each of them
an example of which all is learned. So a method that takes answers to prompts continues with the
pretraining, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from gpt2c.causal_lm import CausalLM
from gpt2c.files import atomic
from gpt2c.finetune.report import Counts, coloured, held
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.finetune.tune import Base
from gpt2c.kernels.checks import counted
from gpt2c.model.objective import CrossEntropy
from gpt2c.parallel.world import ALONE, World
from gpt2c.text.chat import teach_template
from gpt2c.text.examples import (
    Example,
    divided,
    fingerprint,
    kept,
    read_records,
    shortened,
    supervised,
)
from gpt2c.text.ragged import Order, held_out
from gpt2c.text.shards import SplitName, StoredTokens, checksums, read_shards
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.settings import setting
from gpt2c.train.stop import Check

__all__ = ["Data", "Source", "SupervisedSettings", "Windows", "open_data"]

FORMATS = ("messages", "sharegpt", "alpaca", "prompt and completion", "text")
Source = str | Path | Sequence[Mapping[str, object]]


@dataclasses.dataclass(frozen=True)
class SupervisedSettings(FinetuneSettings):
    """The settings of a method that learns texts, or answers to prompts."""

    prompt_field: str = setting("data", "", "the name of the field prompt, if it is another")
    completion_field: str = setting("data", "", "the name of the field completion")
    text_field: str = setting("data", "", "the name of the field text")


class Windows(Sequence[Example]):
    """Token files as examples, which are read when they are asked for.

    A window's last token is the first of the next, so every token but a file's first is learned
    once.

    Parameters
    ----------
    shards : (N,) token ids each; no window has tokens of two
    size : the most tokens of a window that are read; its targets end one later
    """

    def __init__(self, shards: Sequence[StoredTokens], size: int) -> None:
        self._shards, self._size = shards, size
        counts = [max(0, -(-(len(shard) - 1) // size)) for shard in shards]
        self._ends = np.cumsum([0, *counts])
        self.targets = sum(max(0, len(shard) - 1) for shard in shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        """Read a window, or several.

        Raises
        ------
        IndexError : there is no such window
        OSError : the file cannot be read
        """
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        number = range(len(self))[place]
        shard = int(np.searchsorted(self._ends, number, side="right")) - 1
        start = (number - int(self._ends[shard])) * self._size
        ids = self._shards[shard][start : start + self._size + 1].astype(np.int32)
        learned = np.arange(len(ids)) > 0
        return Example(ids, learned, f"{self._shards[shard].path}, token {start:,}")


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples of a run, and what is said of them.

    Attributes
    ----------
    format : of the records, see `gpt2c.text.examples`; "text" of token files
    train, val : the examples that are learned, and those held out
    tokens, learned : how many all examples have, and how many of these are learned
    longest : tokens of the longest example
    facts : identify the examples, in run.json
    cut : how many lost their end
    left_out : how many records were left out, as a text
    order : the examples of each step
    tokenizer : of the base
    """

    format: str
    train: Sequence[Example]
    val: Sequence[Example]
    tokens: int
    learned: int
    longest: int
    facts: Mapping[str, Any]
    cut: int
    left_out: str
    order: Order
    tokenizer: Tokenizer

    def step(self, number: int) -> list[Example]:
        """Return the examples of a step, counted from 0."""
        return [self.train[place] for place in self.order.step(number)]

    @property
    def judged(self) -> Sequence[Example]:
        """The examples of an evaluation: those held out or, without any, a step's worth."""
        return self.val or self.train[: self.order.batch_size]

    def mean_loss(
        self, model: CausalLM, most: int, check: Check | None = None, world: World = ALONE
    ) -> float:
        """Return the mean loss of the judged examples' learned tokens, in nats.

        Parameters
        ----------
        most : the most tokens that are read at once
        check : called between batches
        world : its ranks take turns with the batches
        """
        total, count = 0.0, 0
        for batch in world.turns(divided(self.judged, most), check):
            objective = CrossEntropy(np.concatenate([one.targets for one in batch]))
            total += model.loss([one.ids[:-1] for one in batch], objective, keep=False, count=1)
            count += int(np.count_nonzero(objective.live))
        total, targets = world.sum([total, count])
        return total / targets

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report before the first step."""
        count = len(self.train) + len(self.val)
        share = f"{self.learned / self.tokens:.0%} of them learned"
        told = held(len(self.val), self.cut)
        yield (
            f"{count:,} examples ({self.format}), {told}; left out: {self.left_out};"
            f" {self.tokens:,} tokens, {share}; the longest example"
            f" {'is cut to' if self.cut else 'has'} {self.longest:,} tokens"
        )
        yield f"the first example, with its learned part {coloured(self.train[0], self.tokenizer)}"


def open_data(source: Source, base: Base, settings: SupervisedSettings) -> Data:
    """Read examples, and let the base's tokenizer tell how they begin.

    Conversations give it a chat template, too.

    Parameters
    ----------
    source : a file of records or a list of them, of which val_fraction is held out; or a directory
        of `gpt2c prepare`, whose validation part is

    Raises
    ------
    OSError, ValueError : see `read_records` and `read_shards`; or nothing is left to learn from
    """
    context = base.found.config.n_positions
    most = min(settings.max_length or context, context)
    if isinstance(source, str | Path) and Path(source).is_dir():
        return _prepared(Path(source), base.tokenizer, settings, most)
    tokenizer = base.tokenizer
    tokenizer.add_bos_token = True
    found = read_records(source, FORMATS, settings.names)
    if found.format not in ("prompt and completion", "text"):
        teach_template(tokenizer)
    every, reasons = kept(
        found.records,
        lambda record: shortened(
            supervised(record, found.format, tokenizer, settings.group_field), most
        ),
        lambda one: one.content,
    )
    if not every:
        raise ValueError(f"no example is left to learn from: {Counts(reasons)}")
    out = held_out([one.group for one in every], settings.val_fraction, settings.seed)
    train = [one for one, apart in zip(every, out, strict=True) if not apart]
    return Data(
        format=found.format,
        train=train,
        val=[one for one, apart in zip(every, out, strict=True) if apart],
        tokens=sum(len(one.ids) for one in every),
        learned=sum(int(one.learned[1:].sum()) for one in every),
        longest=max(len(one.ids) for one in every),
        facts=fingerprint(every),
        cut=sum(one.cut for one in every),
        left_out=str(Counts(reasons)),
        order=Order(len(train), settings.batch_size, settings.seed),
        tokenizer=tokenizer,
    )


def _prepared(path: Path, tokenizer: Tokenizer, settings: FinetuneSettings, most: int) -> Data:
    """Open the token files of a directory; they stay open, so they may be replaced later."""
    parts: dict[SplitName, list[StoredTokens]] = {"train": [], "val": []}
    refusal = f"another process prepares {path}: wait for it, or name another directory"
    with atomic.locked(path, refusal, shared=True):
        for split in parts:
            parts[split] = read_shards(path, split, tokenizer.vocab_size, tokenizer.fingerprint)
    train, val = Windows(parts["train"], most), Windows(parts["val"], most)
    shards = [*parts["train"], *parts["val"]]
    if not train:
        tokens = counted(sum(map(len, parts["train"])), "token")
        raise ValueError(f"{path}: {tokens} for training are too few: 2 in a file are needed")
    return Data(
        format="text",
        train=train,
        val=val,
        tokens=sum(map(len, shards)),
        learned=train.targets + val.targets,
        longest=min(most + 1, max(map(len, shards))),
        facts={split: checksums(opened) for split, opened in parts.items()},
        cut=0,
        left_out="none",
        order=Order(len(train), settings.batch_size, settings.seed),
        tokenizer=tokenizer,
    )
