"""Hooks, which a run calls after each step: show, log, save, evaluate.

A hook is called with the run and the result of the step. It knows nothing about the computation of
the step, so it fits every objective. A step is logged before it is saved, and saved before its
evaluation, which may take long.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from gpt2c.evaluate.figures import written
from gpt2c.files import atomic
from gpt2c.kernels.backend import fma_peak
from gpt2c.kernels.busy import BusyCores
from gpt2c.screen.progress import Progress
from gpt2c.train.run import LostModel, Run
from gpt2c.train.stop import Check, Stop

__all__ = [
    "Evaluate",
    "Evaluation",
    "Hook",
    "Learned",
    "Save",
    "Show",
    "Step",
    "evaluated",
    "log",
    "save",
    "speed",
]


MOST = 4  # figures of an evaluation in a line
SHORT = {  # names of figures in lines, which have 80 columns
    "mean_token_accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
}


class Learned(NamedTuple):
    """The result of an objective, whose gradients are in the model.

    Attributes
    ----------
    loss : of the step before its update; if it is not finite, the gradients are not used
    tokens : of the step
    metrics : other figures of the step, for metrics.jsonl
    flops : of the step; 0 if they are unknown
    """

    loss: float
    tokens: int
    metrics: Mapping[str, float] = MappingProxyType({})
    flops: float = 0.0


class Step(NamedTuple):
    """The result of a step.

    Attributes
    ----------
    learned : the objective's
    fault : which loss or gradient is not finite, so that nothing was updated; "" for none
    seconds : its duration
    waited : the seconds of it in which this rank waited for others
    late : whether a save by the clock is due on any rank
    stopped : whether a signal had come to any rank before the update
    """

    learned: Learned
    fault: str
    seconds: float
    waited: float = 0.0
    late: bool = False
    stopped: bool = False


Hook = Callable[[Run, Step], None]
# Figures of the present weights, "val_loss" among them; calls its argument between batches, if any.
Evaluation = Callable[[Check | None], Mapping[str, float]]


class Show:
    """Shows means over the steps since the last line, and reports other programs that use the CPU.

    On a terminal the means are over the last log_interval steps.

    Parameters
    ----------
    shown : metrics of the objective that stand beside the loss
    """

    def __init__(self, run: Run, progress: Progress, shown: Sequence[str] = ()) -> None:
        self._progress, self._shown = progress, shown
        self._recent: deque[Step] = deque(maxlen=run.settings.log_interval)
        # Beside other ranks the cores are busy with their work.
        self._busy = BusyCores(run.model.backend.threads) if run.world.size == 1 else None

    def __call__(self, run: Run, step: Step) -> None:
        """Show the step."""
        self._recent.append(step)
        if self._progress.step(run.step, self._figures(run)):
            self._recent.clear()
        if self._busy and (others := self._busy.others()):  # reported once
            used = f"{others:.1f} of the {self._busy.cores} cores that this run may use"
            self._progress.line(f"other programs use {used}, so it is slower")
            self._busy = None

    def _figures(self, run: Run) -> str:
        """Return the figures of a line, means over the steps where they are finite."""
        learned = [step.learned for step in self._recent]
        texts = [f"loss {written(_mean([one.loss for one in learned]), 3)}"]
        for name in self._shown:
            values = [one.metrics[name] for one in learned if name in one.metrics]
            texts.append(f"{SHORT.get(name, name)} {written(_mean(values), 3)}")
        figures = speed(run, self._recent)
        texts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
        if "share_of_peak" in figures:
            texts.append(f"{figures['share_of_peak']:.0%} of peak")
        if run.world.size > 1:
            waited = sum(step.waited for step in self._recent)
            texts.append(f"{waited / sum(step.seconds for step in self._recent):.0%} waiting")
        return "  ".join(texts)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the finite ones; nan if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def speed(run: Run, steps: Iterable[Step]) -> dict[str, Any]:
    """Return the speed in these steps' metrics; without a share of peak if it is unknown.

    A process measures the peak once. Only a step that is faster shows that other programs slowed
    the measurement; then it is made again, so the shares of later steps have a higher base.
    """
    steps, backend = list(steps), run.model.backend
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.learned.tokens for step in steps)
    flops = sum(step.learned.flops for step in steps)
    entry = {"tokens_per_second": round(tokens / seconds, 1)}
    if flops and (peak := fma_peak(backend.name, backend.threads, run.model.precision)):
        share = round(flops / seconds / (peak * run.world.size), 4)
        if share <= 1:
            entry["share_of_peak"] = share
        else:  # the base was too low
            fma_peak.cache_clear()
    return entry


def log(run: Run, step: Step) -> None:
    """Write the step's metrics, unless its evaluation will add to them."""
    if not evaluation_is_due(run):
        run.log()


class Save:
    """Saves at the settings' intervals, in steps and minutes, and after the last step."""

    def __init__(self, stop: Stop, progress: Progress) -> None:
        self._stop, self._progress = stop, progress

    def __call__(self, run: Run, step: Step) -> None:
        """Save the run if that is due; after a fault there is nothing new to save."""
        settings = run.settings
        due = run.step == settings.max_iters or _due(run.step, settings.save_interval)
        if (due or step.late) and not step.fault:
            save_or_tell(run, self._stop, self._progress)
            run.tried = time.monotonic()


class Evaluate:
    """Evaluates a step if that is due: adds the loss to its metrics, and both to its checkpoint.

    Parameters
    ----------
    evaluation : returns figures of the present weights, "val_loss" among them
    unit : of the loss
    shown : see `evaluated`
    """

    def __init__(
        self,
        evaluation: Evaluation,
        stop: Stop,
        progress: Progress,
        unit: str = "nats/token",
        shown: Sequence[str] = (),
    ) -> None:
        self._evaluation, self._stop, self._progress = evaluation, stop, progress
        self._unit, self._shown = unit, shown

    def __call__(self, run: Run, step: Step) -> None:
        """Evaluate the step if that is due."""
        if run.entry:  # a stop causes a save, which must not follow a skipped step
            self.finish(run, None if step.fault else self._stop.check)

    def finish(self, run: Run, check: Check | None) -> None:
        """Finish a step that is not logged yet, by the present settings.

        Raises
        ------
        StoppedError : raised by `check`, which is called between batches; the step stays unfinished
        LostModel : the validation loss is not finite
        """
        entry = run.entry
        assert entry
        found = self._evaluation(check) if evaluation_is_due(run) else {}
        if found:
            entry |= found
            run.val_loss = entry["val_loss"]
        run.log()
        if found:
            _check_validation(run)
            self._progress.line(f"step {run.step}: {evaluated(found, self._unit, self._shown)}")
        if run.step == run.saved_step:
            save_or_tell(run, self._stop, self._progress)  # with the evaluation's result


def evaluated(found: Mapping[str, float], unit: str, shown: Sequence[str] = ()) -> str:
    """Return the figures of an evaluation for a line.

    Parameters
    ----------
    unit : of the loss
    shown : the metrics beside the loss that stand in the line if there are more than MOST
    """
    names = [name.removeprefix("val_") for name in found]
    if len(names) > MOST:
        names = [name for name in names if name in ("loss", *shown)]
    texts = [f"{SHORT.get(name, name)} {written(found[f'val_{name}'])}" for name in names]
    if unit:
        texts[names.index("loss")] += f" {unit}"
    return f"validation {'  '.join(texts)}"


def evaluation_is_due(run: Run) -> bool:
    """Return whether the step ends with an evaluation."""
    return run.step == run.settings.max_iters or _due(run.step, run.settings.eval_interval)


def _due(step: int, interval: int) -> bool:
    """Return whether a task that is done every `interval` steps is due; 0 is never."""
    return bool(interval) and step % interval == 0


def _check_validation(run: Run) -> None:
    """Stop the run of a lost model before it replaces a good one."""
    if not math.isfinite(run.val_loss):
        run.forget()
        raise LostModel(
            f"the validation loss is {run.val_loss} after step {run.step}, so its weights were not"
            f" kept; {run.last_good()}; lower the learning rate"
        )


def save(run: Run, stop: Stop) -> None:
    """Save the run, unless its model is lost and would replace a good checkpoint.

    Raises
    ------
    OSError : it cannot be written
    LostModel : a parameter or moment is not finite, so the last checkpoint is better
    """
    with stop.held():
        if run.step != run.saved_step and (lost := run.optimizer.not_finite()):
            raise LostModel(
                f"the {lost} of step {run.step} are not finite, so they were not saved;"
                f" {run.last_good()}; lower the learning rate"
            )
        run.save()


def save_or_tell(run: Run, stop: Stop, progress: Progress) -> None:
    """Save and continue, even if the disk refuses: it may have room at the next save."""
    try:
        save(run, stop)
    except OSError as error:
        progress.line(
            f"step {run.step}: {atomic.reason(error)}; {run.newest()}; the run continues and tries"
            " again with its next checkpoint"
        )
