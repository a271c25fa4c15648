"""DPO and its kin: a model learns which of two answers people prefer, without a reward model.

    logits of both answers -> log-probabilities -> less those of the untrained model -> loss

KTO needs no pairs: it learns from single answers that were liked or not. preference.py has the
formulas, and reference.py keeps the log-probabilities of the untrained model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Unpack

import numpy as np

from gpt2c.files.names import REFERENCE_FILE
from gpt2c.files.untrusted import shown
from gpt2c.finetune.completions import (
    Send,
    learn_completions,
    lengths_of,
    log_probabilities,
)
from gpt2c.finetune.given import DPOGiven
from gpt2c.finetune.judging import Array, Judged, Judging, JudgingSettings, Source
from gpt2c.finetune.pairs import Unit, mismatched, pair_of, single_of
from gpt2c.finetune.preference import PAIR_LOSSES, PairLoss, kto, reference_point, sft
from gpt2c.finetune.reference import reference_of
from gpt2c.finetune.settings import rate
from gpt2c.finetune.tune import Base, Result, tune
from gpt2c.kernels.checks import counted
from gpt2c.model.model import Model
from gpt2c.text.examples import Example, Record, fingerprint
from gpt2c.text.ragged import parts
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.directory import report
from gpt2c.train.hooks import Learned
from gpt2c.train.run import Run
from gpt2c.train.settings import setting
from gpt2c.train.stop import Check

__all__ = ["DPOSettings", "dpo"]

NEAR = 1e-4  # of the first loss to its known value; rounding moves a log-probability by about 1e-5


LESS_LIKELY = 1.2  # times the log-probability of before: this is told


@dataclasses.dataclass(frozen=True)
class DPOSettings(JudgingSettings):
    """The settings of a run of DPO or KTO.

    Raises
    ------
    ValueError : a setting is out of range, or the loss does not have it

    Examples
    --------
    >>> gpt2c.finetune.DPOSettings().price, gpt2c.finetune.DPOSettings(loss_type="simpo").price
    (0.1, 2.0)
    """

    completion_field: str = setting("data", "", "kto: the name of the field completion")
    label_field: str = setting("data", "", "kto: the name of the field label")
    learning_rate: float = rate(1e-6, 3e-4)
    loss_type: str = setting(
        "dpo", "sigmoid", f"of pairs {', '.join(PAIR_LOSSES)}; of single answers kto", fixed=True
    )
    beta: float = setting(
        "dpo", 0.0, "how dear it is to leave the base model; 0: 0.1, or 2 with simpo", least=0
    )
    label_smoothing: float = setting(
        "dpo", 0.0, "sigmoid, robust, simpo: the share of preferences that are wrong", least=0
    )
    simpo_gamma: float = setting("dpo", 0.5, "simpo: the margin that is wanted", least=0)
    sft_weight: float = setting(
        "dpo", 0.0, "weight of the chosen answers' own loss, which keeps them likely", least=0
    )
    desirable_weight: float = setting("dpo", 1.0, "kto: weight of the liked answers", least=0)
    undesirable_weight: float = setting("dpo", 1.0, "kto: weight of the others", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type != "kto":
            self.pair_loss()
            return
        if self.label_smoothing or self.sft_weight:
            raise ValueError("label_smoothing and sft_weight are for losses of pairs, not for kto")
        if self.batch_size < 2:
            raise ValueError("kto compares the answers of a batch: batch_size must be at least 2")

    @property
    def price(self) -> float:
        """The loss's beta."""
        return self.beta or (2.0 if self.loss_type == "simpo" else 0.1)

    def pair_loss(self) -> PairLoss:
        """Return the loss of pairs.

        Examples
        --------
        >>> gpt2c.finetune.DPOSettings(label_smoothing=0.1).pair_loss().beta
        0.1
        """
        if self.loss_type not in PAIR_LOSSES:
            known = ", ".join(PAIR_LOSSES)
            raise ValueError(
                f"loss_type must be one of {known} or kto, got {shown(self.loss_type)}"
            )
        return PairLoss(self.loss_type, self.price, self.label_smoothing, self.simpo_gamma)


class Completions:
    """Values that are log-probabilities of completions."""

    def values(self, model: Model, examples: Sequence[Example], keep: bool) -> Array:
        """See `Judge`."""
        return log_probabilities(model, examples, keep)

    def push(
        self, model: Model, examples: Sequence[Example], slopes: Array, final: Send = None
    ) -> None:
        """See `Judge`."""
        learn_completions(model, examples, slopes, final)


class Pairs(Completions):
    """Judges pairs by their log-probabilities."""

    def __init__(self, loss: PairLoss, sft_weight: float = 0.0) -> None:
        self._loss, self._sft_weight = loss, sft_weight

    def __call__(self, units: Sequence[Unit], values: Array) -> Judged:
        """See `Judge`."""
        lengths = np.stack([lengths_of([unit.examples[side] for unit in units]) for side in (0, 1)])
        reference = None
        if self._loss.has_reference:
            reference = np.array([unit.reference for unit in units]).T
        losses, slopes = self._loss(values, reference, lengths)
        gained = values / lengths if reference is None else values - reference
        rewards = self._loss.beta * gained
        margin = gained[0] - gained[1]
        figures = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            # what rounding decides is right by half: before the first step no answer is preferred
            "rewards/accuracies": np.where(abs(margin) < NEAR, 0.5, margin > 0),
            "logps/chosen": values[0],
            "logps/rejected": values[1],
        }
        if self._sft_weight:
            figures["preference_loss"] = losses
            figures["nll_loss"], slope = sft(values[0], lengths[0])
            losses = losses + self._sft_weight * figures["nll_loss"]
            slopes[0] += self._sft_weight * slope
        return Judged(losses, slopes, figures)


class Singles(Completions):
    """Judges answers that were liked or not by their log-probabilities.

    Parameters
    ----------
    point : see `preference.reference_point`
    """

    def __init__(self, settings: DPOSettings, point: float = 0.0) -> None:
        self._settings, self._point = settings, point

    def __call__(self, units: Sequence[Unit], values: Array) -> Judged:
        """See `Judge`."""
        of, liked = self._settings, np.array([unit.liked for unit in units])
        reference = np.array([unit.reference[0] for unit in units])
        losses, slopes = kto(
            *(values[0], reference, liked, self._point, of.price),
            *(of.desirable_weight, of.undesirable_weight),
        )
        rewards = of.price * (values[0] - reference)
        figures = {"kl": np.full(len(units), self._point)}
        for name, some in (("chosen", liked), ("rejected", ~liked)):
            figures[f"rewards/{name}"] = np.where(some, rewards, np.nan)
            figures[f"logps/{name}"] = np.where(some, values[0], np.nan)
        return Judged(losses, slopes[None], figures)


class _Referred(Judging):
    """A method that compares with the untrained model."""

    verb = "dpo"
    settings: DPOSettings

    def __init__(
        self,
        base: Base,
        settings: DPOSettings,
        source: Source,
        format: str,
        encode: Callable[[Record, Tokenizer], Unit],
    ) -> None:
        base.found.config.require_language_head("dpo")
        context = base.found.config.n_positions
        most = min(settings.max_length or context, context)
        super().__init__(base, settings, source, [format], encode, most)
        self._referred = False

    def begin(self, run: Run) -> None:
        self._refer(run, None)

    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        self._refer(run, check)
        return super().evaluate(run, check)

    def _refer(self, run: Run, check: Check | None) -> None:
        """Give the units their reference, once."""
        if self._referred:
            return
        units = [*self.train, *self.val]
        examples = [one for unit in units for one in unit.measured]
        key = {
            "examples": fingerprint(examples)["sha256"],
            "base": run.facts["base"]["sha256"],
            "precision": run.model.precision,
        }
        if not run.step:
            answers = counted(len(examples), "answer")
            report(f"the base's log-probabilities of {answers} are kept in {REFERENCE_FILE}")
        values = reference_of(
            run.model,
            examples,
            self.settings.batch_tokens,
            run.out / REFERENCE_FILE,
            key,
            not run.step,
            check,
            run.world,
        )
        ends = np.cumsum([len(unit.measured) for unit in units])[:-1]
        units = [
            unit._replace(reference=tuple(some))
            for unit, some in zip(units, np.split(values, ends), strict=True)
        ]
        self.train, self.val = units[: self.examples], units[self.examples :]
        self._referred = True


class _DPO(_Referred):
    shown = ("rewards/margins", "rewards/accuracies")
    shares = ("rewards/accuracies",)

    def __init__(self, base: Base, settings: DPOSettings, source: Source) -> None:
        super().__init__(base, settings, source, "preference", pair_of)
        self._loss = settings.pair_loss()
        self._referred = not self._loss.has_reference
        self._told = False

    def judge(self, run: Run, units: Sequence[Unit], check: Check | None) -> Pairs:
        return Pairs(self._loss, self.settings.sft_weight)

    def learn(self, run: Run) -> Learned:
        learned = super().learn(run)
        if not run.step and self._loss.has_reference:
            first = learned.metrics.get("preference_loss", learned.loss)
            with run.world.agreement():
                check_start(first, self._loss.start)
        return learned

    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        figures = super().evaluate(run, check)
        if self._loss.has_reference and not self._told:
            chosen = figures["val_logps/chosen"]
            before = chosen - figures["val_rewards/chosen"] / self._loss.beta
            if chosen < LESS_LIKELY * before:
                self._told = True
                report(
                    f"the chosen answers became less likely, too (logps/chosen {chosen:.1f}, before"
                    f" {before:.1f}): usual for DPO; --sft-weight keeps them likely"
                )
        return figures


class _KTO(_Referred):
    shown = ("rewards/chosen", "rewards/rejected")

    def __init__(self, base: Base, settings: DPOSettings, source: Source) -> None:
        super().__init__(base, settings, source, "kto", single_of)
        self.train, self.val = self._mismatched(self.train), self._mismatched(self.val)
        every = (*self.train, *self.val)
        self.longest = max(len(one.ids) for unit in every for one in unit.measured)

    def _mismatched(self, units: Sequence[Unit]) -> list[Unit]:
        """Give each unit the answer of another of its side, so that no side sees the other's."""
        # half of all further on: answers to one prompt often stand side by side
        others = [*units[len(units) // 2 :], *units[: len(units) // 2]]
        return [
            unit._replace(other=mismatched(unit, other, self.most))
            for unit, other in zip(units, others, strict=True)
        ]

    def lines(self) -> Iterator[str]:
        yield from super().lines()
        liked = self.train[0].liked
        if all(unit.liked == liked for unit in self.train):
            kind, change = ("liked", "more") if liked else ("not liked", "less")
            yield (
                f"all answers to learn from are {kind}: kto learns in what both kinds differ, and"
                f" makes all of these {change} likely"
            )

    def sides(self, unit: Unit) -> Sequence[str]:
        return ("liked answer" if unit.liked else "answer that is not liked",)

    def judge(self, run: Run, units: Sequence[Unit], check: Check | None) -> Singles:
        others = [unit.other for unit in units if unit.other]
        policy = np.zeros(len(units))
        batches = parts([len(one.ids) - 1 for one in others], self.settings.batch_tokens)
        for part in run.world.turns(batches, check):
            policy[part] = log_probabilities(run.model, others[part], keep=False)
        policy = np.array(run.world.sum(policy.tolist()))
        reference = np.array([unit.reference[-1] for unit in units])
        return Singles(self.settings, reference_point(policy, reference))

    def learn(self, run: Run) -> Learned:
        learned = super().learn(run)
        if not run.step:
            of = self.settings
            weights = [
                of.desirable_weight if self.train[n].liked else of.undesirable_weight
                for n in self.order.step(0)
            ]
            with run.world.agreement():
                check_start(learned.loss, sum(weights) / len(weights) / 2)
        return learned


def check_start(first: float, wanted: float) -> None:
    """Refuse a run whose first loss is not that of equal models.

    Raises
    ------
    ValueError : they are further apart than rounding explains
    """
    if not abs(first - wanted) <= NEAR * max(1.0, wanted):
        raise ValueError(
            f"the first loss is {first:.6f} and must be {wanted:.6f}, as nothing is trained yet:"
            f" {REFERENCE_FILE} is not of this model, begin the run again with --overwrite"
        )


def dpo(
    base: str | os.PathLike[str],
    examples: Source,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Unpack[DPOGiven],
) -> Result:
    """Teach a model which answers people prefer, by DPO or one of its kin.

    Parameters
    ----------
    base : a directory of a model with its tokenizer, or a name on the hub
    examples : a file (JSONL, a JSON list, CSV), or a list of dicts: {"prompt", "chosen",
        "rejected"}, strings or lists of messages, or OpenAI's {"input", "preferred_output",
        "non_preferred_output"}; with loss_type="kto" {"prompt", "completion", "label"}, whose label
        says whether the completion is liked
    out : the directory of the run, which becomes a model's
    resume : continue the run in `out`
    overwrite : `out` may exist and hold files
    settings : fields of `gpt2c.finetune.DPOSettings`

    Raises
    ------
    OSError, ValueError, MemoryError : see `gpt2c.finetune.tune.tune`; the first loss is not that of
        an untrained model

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=257)
    >>> pairs = [{"prompt": f"{a}?", "chosen": "yes", "rejected": "no"} for a in range(40)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/base")
    ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/base")
    ...     result = gpt2c.finetune.dpo(
    ...         directory + "/base", pairs, directory + "/run", learning_rate=1e-3
    ...     )  # doctest: +ELLIPSIS
    40 pairs, 2 held out; ...
    >>> result.after["val_rewards/accuracies"]
    1.0
    """

    def make(opened: Base, own: DPOSettings) -> Judging:
        return (_KTO if own.loss_type == "kto" else _DPO)(opened, own, examples)

    return tune("dpo", DPOSettings, make, base, out, settings, resume, overwrite, [examples])
