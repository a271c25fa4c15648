"""Hooks, which a run calls after each step: show, log, save, evaluate.

A hook is called with the run and the result of the step. It knows nothing about the computation of
the step, so it fits every objective. A step is logged before it is saved, and saved before its
evaluation, which may take long.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from gpt2c.evaluate.figures import written
from gpt2c.evaluate.loss import Shards, evaluate
from gpt2c.files import atomic
from gpt2c.kernels.backend import fma_peak
from gpt2c.kernels.busy import BusyCores
from gpt2c.screen.progress import Progress
from gpt2c.train.run import LostModel, Run
from gpt2c.train.stop import Stop

__all__ = ["Evaluate", "Hook", "Save", "Show", "Step", "log", "save", "speed"]


@dataclasses.dataclass(frozen=True)
class Step:
    """The result of a step.

    Parameters
    ----------
    loss : of its batches before the update, in nats per token
    fault : which loss or gradient is not finite, so that nothing was updated; "" for none
    seconds : its duration
    """

    loss: float
    fault: str
    seconds: float


Hook = Callable[[Run, Step], None]


class Show:
    """Shows means over the steps since the last line, and reports other programs that use the CPU.

    On a terminal the means are over the last log_interval steps.
    """

    def __init__(self, run: Run, progress: Progress) -> None:
        self._progress = progress
        self._recent: deque[Step] = deque(maxlen=run.settings.log_interval)
        self._busy: BusyCores | None = BusyCores(run.model.backend.threads)

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
        """Return the figures of a line; the loss is the mean over steps with a finite loss."""
        finite = [step.loss for step in self._recent if math.isfinite(step.loss)]
        loss = sum(finite) / len(finite) if finite else math.nan
        figures = speed(run, sum(step.seconds for step in self._recent) / len(self._recent))
        share = f"  {figures['share_of_peak']:.0%} of peak" if "share_of_peak" in figures else ""
        return f"loss {written(loss, 3)}  {figures['tokens_per_second']:,.0f} tokens/s{share}"


def speed(run: Run, seconds: float) -> dict[str, Any]:
    """Return the speed in a step's metrics; without a share of peak if the peak is unknown."""
    tokens, backend = run.settings.tokens_per_step, run.model.backend
    entry = {"tokens": run.step * tokens, "tokens_per_second": round(tokens / seconds, 1)}
    if peak := fma_peak(backend.name, backend.threads, run.model.precision):
        flops = run.model.config.flops_per_token(run.settings.block_size) * tokens
        share = round(flops / seconds / peak, 4)
        if share <= 1:
            entry["share_of_peak"] = share
        else:  # the machine was busy when the peak was measured: measure it again
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
        self._saved = time.monotonic()

    def __call__(self, run: Run, step: Step) -> None:
        """Save the run if that is due; after a fault there is nothing new to save."""
        settings = run.settings
        due = run.step == settings.max_iters or _due(run.step, settings.save_interval)
        if settings.save_minutes and time.monotonic() - self._saved > 60 * settings.save_minutes:
            due = True
        if due and not step.fault:
            save_or_tell(run, self._stop, self._progress)
            self._saved = time.monotonic()


class Evaluate:
    """Evaluates a step if that is due: adds the loss to its metrics, and both to its checkpoint.

    Parameters
    ----------
    tokens : the validation tokens
    """

    def __init__(self, tokens: Shards, stop: Stop, progress: Progress) -> None:
        self._tokens, self._stop, self._progress = tokens, stop, progress

    def __call__(self, run: Run, step: Step) -> None:
        """Evaluate the step if that is due."""
        if run.entry:  # a stop causes a save, which must not follow a skipped step
            self.finish(run, None if step.fault else self._stop.check)

    def finish(self, run: Run, check: Callable[[], None] | None) -> None:
        """Finish a step that is not logged yet, by the present settings.

        Raises
        ------
        StoppedError : raised by `check`, which is called between batches; the step stays unfinished
        LostModel : the validation loss is not finite
        """
        settings, entry = run.settings, run.entry
        assert entry
        evaluated = evaluation_is_due(run)
        if evaluated:
            run.val_loss = entry["val_loss"] = evaluate(
                run.model,
                self._tokens,
                settings.batch_size,
                settings.block_size,
                settings.eval_iters,
                check,
            )
        run.log()
        if evaluated:
            _check_validation(run)
            loss = written(run.val_loss)
            self._progress.line(f"step {run.step}: validation loss {loss} nats/token")
        if run.step == run.saved_step:
            save_or_tell(run, self._stop, self._progress)  # with the evaluation's result


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
            f"step {run.step}: {atomic.reason(error)}; {run.newest()}; the run goes on and tries"
            " again with its next checkpoint"
        )
