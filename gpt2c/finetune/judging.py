"""Learning from judgements: of two answers the better, or of one answer whether it is liked.

    units -> values of their examples -> losses and slopes -> gradients

A unit is judged at once: two examples, the chosen before the rejected, or one. The model computes a
value of each example: a log-probability, or a reward.

Letters: U units of K examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2c.evaluate.metrics import wilson
from gpt2c.finetune.completions import Send, lengths_of
from gpt2c.finetune.pairs import Unit, shortened_unit
from gpt2c.finetune.report import Counts, coloured, held
from gpt2c.finetune.settings import FinetuneSettings, rate
from gpt2c.finetune.tune import Base, Method
from gpt2c.kernels.checks import counted
from gpt2c.model.model import Model
from gpt2c.parallel.world import World
from gpt2c.text.chat import teach_template
from gpt2c.text.examples import Example, Record, fingerprint, group_of, kept, read_records
from gpt2c.text.ragged import Order, held_out, parts
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.hooks import Learned
from gpt2c.train.run import Run
from gpt2c.train.settings import setting
from gpt2c.train.stop import Check

__all__ = ["Array", "Judge", "Judged", "Judging", "JudgingSettings", "Source"]

Array = NDArray[np.float64]
Source = str | Path | Sequence[Mapping[str, object]]  # of examples


@dataclasses.dataclass(frozen=True)
class JudgingSettings(FinetuneSettings):
    """The settings of methods that learn from judgements.

    Raises
    ------
    ValueError : a setting is out of range
    """

    learning_rate: float = rate(2e-5, 3e-4)
    prompt_field: str = setting("data", "", "the name of the field prompt, if it is another")
    chosen_field: str = setting("data", "", "the name of the field chosen")
    rejected_field: str = setting("data", "", "the name of the field rejected")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:  # or the untrained model would not equal its reference
            raise ValueError(f"dropout must be 0 to learn from judgements, got {self.dropout}")


class Judged(NamedTuple):
    """The judgement of U units.

    Attributes
    ----------
    losses : (U,)
    slopes : (K,U), of the sum of losses, in the values
    figures : name -> (U,), nan for a unit that has none
    """

    losses: Array
    slopes: Array
    figures: Mapping[str, Array]


class Judge(Protocol):
    """Values of examples, and judgements by them."""

    def values(self, model: Model, examples: Sequence[Example], keep: bool) -> Array:
        """Return a value for each example; with `keep` the model keeps what `push` needs."""

    def push(
        self, model: Model, examples: Sequence[Example], slopes: Array, final: Send = None
    ) -> None:
        """Add the gradient of sum(slopes * values), for the values computed last.

        `final` is that of `Model.backward`.
        """

    def __call__(self, units: Sequence[Unit], values: Array) -> Judged:
        """Judge units by their values (K,U)."""


class Judging(Method):
    """A method that learns from judgements.

    Parameters
    ----------
    formats : of the records, see `read_records`
    encode : returns the unit of a record
    most : the most tokens of an example that are read, beside a last one that is only a target
    """

    unit = ""
    unread = 1  # the last token of an example, which is only a target
    shares: tuple[str, ...] = ()  # figures that are shares of all units: they get an interval

    def __init__(
        self,
        base: Base,
        settings: JudgingSettings,
        source: Source,
        formats: Sequence[str],
        encode: Callable[[Record, Tokenizer], Unit],
        most: int,
    ) -> None:
        self.tokenizer, self.settings, self.most = base.tokenizer, settings, most
        self.tokenizer.add_bos_token = True
        records = read_records(source, formats, settings.names).records
        answers = [
            record.fields.get("chosen", record.fields.get("completion")) for record in records
        ]
        if any(isinstance(answer, list) for answer in answers):
            teach_template(self.tokenizer)
        field = settings.group_field

        def read(record: Record) -> Unit:
            unit = encode(record, base.tokenizer)
            unit = unit._replace(group=group_of(record, field, unit.asked))
            return shortened_unit(unit, most)

        units, self._reasons = kept(records, read, lambda unit: unit.content)
        if not units:
            raise ValueError(f"no example is left to learn from: {Counts(self._reasons)}")
        out = held_out([unit.group for unit in units], settings.val_fraction, settings.seed)
        self.train = [unit for unit, apart in zip(units, out, strict=True) if not apart]
        self.val = [unit for unit, apart in zip(units, out, strict=True) if apart]
        self.examples = len(self.train)
        self.longest = max(unit.tokens for unit in units)
        marks = repr([(unit.liked, unit.margin) for unit in units]).encode()
        self.facts = fingerprint([one for unit in units for one in unit.examples]) | {
            "marks": hashlib.sha256(marks).hexdigest()
        }
        self.order = Order(self.examples, settings.batch_size, settings.seed)

    @abstractmethod
    def judge(self, run: Run, units: Sequence[Unit], check: Check | None) -> Judge:
        """Return the judge of a step or an evaluation, whose units these are, of all ranks."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report before the first step."""
        units = [*self.train, *self.val]
        told = held(len(self.val), sum(unit.cut for unit in units))
        noun = "pair" if len(units[0].examples) == 2 else "judged answer"
        longest = max(len(one.ids) for unit in units for one in unit.examples) - self.unread
        yield (
            f"{counted(len(units), noun)}, {told}; left out: {Counts(self._reasons)}; of the"
            f" longest answer with its prompt the model reads {longest:,} tokens"
        )
        if len(units[0].examples) == 2:
            yield lengths_of_pairs(units)
        for one, name in zip(units[0].examples, self.sides(units[0]), strict=True):
            yield f"the first {name}, with its learned part {coloured(one, self.tokenizer)}"

    def sides(self, unit: Unit) -> Sequence[str]:
        """Return the names of a unit's examples."""
        return ("chosen", "rejected")

    def learn(self, run: Run) -> Learned:
        """See `Method`."""
        units = [self.train[n] for n in self.order.step(run.step)]
        own, tokens = units[run.world.share(len(units))], sum(unit.tokens for unit in units)
        run.model.zero_grad()
        judge, found = self.judge(run, units, None), []
        for part in run.parts(self._parts(own)):
            examples, values = self._read(judge, run.model, own[part], keep=True)
            found.append(judge(own[part], values))
            if not np.isfinite(found[-1].losses).all():
                run.send()
                break
            slopes = found[-1].slopes.reshape(-1) / len(units)
            judge.push(run.model, examples, slopes, run.final)
        loss, figures = _means(run.world, found)
        return Learned(loss, tokens, figures) if math.isfinite(loss) else Learned(math.nan, tokens)

    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        """See `Method`."""
        units = self.val or self.train[: self.settings.batch_size]
        judge, found = self.judge(run, units, check), []
        for part in run.world.turns(self._parts(units), check):
            _, values = self._read(judge, run.model, units[part], keep=False)
            found.append(judge(units[part], values))
        loss, figures = _means(run.world, found)
        every = {"val_loss": loss}
        for name, value in figures.items():
            every[f"val_{name}"] = value
            if name in self.shares:
                interval = wilson(round(value * len(units)), len(units))
                every[f"val_{name}/low"], every[f"val_{name}/high"] = interval
        return every

    def _parts(self, units: Sequence[Unit]) -> Iterator[slice]:
        """Divide units into parts that are read at once."""
        return parts([unit.tokens for unit in units], self.settings.batch_tokens)

    def _read(
        self, judge: Judge, model: Model, units: Sequence[Unit], keep: bool
    ) -> tuple[list[Example], Array]:
        """Return the examples of units side by side, and their values (K,U)."""
        sides = zip(*(unit.examples for unit in units), strict=True)
        examples = [one for side in sides for one in side]
        return examples, judge.values(model, examples, keep).reshape(-1, len(units))


def lengths_of_pairs(units: Sequence[Unit]) -> str:
    """Return how long the answers of pairs are, and how often the longer is preferred."""
    lengths = np.array([lengths_of(unit.examples) for unit in units])
    means = lengths.mean(axis=0)
    text = f"answers have {means[0]:.1f} tokens in the mean if chosen, {means[1]:.1f} if rejected"
    longer = np.sign(lengths[:, 0] - lengths[:, 1])
    right, count = int((longer > 0).sum()), int((longer != 0).sum())
    if count:
        low, high = wilson(right, count)
        text += (
            f"; of {counted(count, 'pair')} of different lengths, the longer is chosen in"
            f" {right / count:.1%} ({low:.1%} to {high:.1%})"
        )
    return text


def _means(world: World, found: Sequence[Judged]) -> tuple[float, dict[str, float]]:
    """Return the mean loss and figures over the units of all ranks, each of which has found some.

    Of "min_..." and "max_..." it is the extreme.
    """
    own = [
        (one.losses.tolist(), {name: figure.tolist() for name, figure in one.figures.items()})
        for one in found
    ]
    every = [one for some in world.all(own) for one in some]
    figures = {}
    for name in every[0][1]:
        values = np.concatenate([known[name] for _, known in every])
        values = values[~np.isnan(values)]
        if values.size:
            how = {"min": np.min, "max": np.max}.get(name.partition("_")[0], np.mean)
            figures[name] = float(how(values))
    return float(np.mean(np.concatenate([losses for losses, _ in every]))), figures
