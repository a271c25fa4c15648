"""The training loop: gradients -> update -> hooks (show, log, save, evaluate).

An objective computes the gradients, whatever they are of: pretraining (pretrain.py), or a method of
the wing finetune. A step depends only on its number, the settings, the data, and the weights and
moments before it. So a run continues from a checkpoint (run.py) as if it had not stopped. Knows
nothing about data.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress

import numpy as np

from gpt2c.files.names import LOSS_FILE
from gpt2c.files.untrusted import shown
from gpt2c.model.block import Dropout
from gpt2c.screen.progress import Progress
from gpt2c.train.directory import report
from gpt2c.train.hooks import (
    Evaluate,
    Evaluation,
    Hook,
    Learned,
    Save,
    Show,
    Step,
    log,
    save,
    speed,
)
from gpt2c.train.metrics import read_figures
from gpt2c.train.optimizer import NonFiniteGradient
from gpt2c.train.plot import LOSS, plot_loss
from gpt2c.train.run import LostModel, Run
from gpt2c.train.settings import Settings
from gpt2c.train.stop import Stop, StoppedError

__all__ = ["MOST_SKIPPED", "TrainResult", "dropout_of", "take_steps", "train_run"]

MOST_SKIPPED = 20  # steps in a row: weights that fail so often never give a finite result again


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run: steps done, validation loss in nats per token, seconds of this call.

    `started` is the number of steps before this call, `skipped` counts the run's steps without an
    update. The loss is nan if the present weights were not evaluated. `interrupted` tells whether a
    signal such as Ctrl-C ended the run before its last step or the evaluation of that step.
    """

    step: int
    max_iters: int
    started: int
    skipped: int
    val_loss: float
    seconds: float
    has_plot: bool
    interrupted: bool


def train_run(
    run: Run,
    learn: Callable[[], Learned],
    evaluation: Evaluation,
    stop: Stop,
    shown: Sequence[str] = (),
    unit: str = "nats/token",
) -> TrainResult:
    """Train a run to its last step, or to a stop, with all hooks.

    Parameters
    ----------
    learn, evaluation, unit : see `take_steps` and `Evaluate`
    shown : the metrics of the objective that are shown beside the loss
    """
    start, started = time.monotonic(), run.step
    progress = Progress(run.step, run.settings.max_iters, run.settings.log_interval)
    evaluate = Evaluate(evaluation, stop, progress, unit, shown)
    hooks = (Show(run, progress, shown), log, Save(stop, progress), evaluate)
    with closing(progress), suppress(StoppedError):
        if run.entry:
            evaluate.finish(run, stop.check)
        take_steps(run, learn, hooks, stop, progress)
    _save_last(run, stop)
    seconds = time.monotonic() - start
    return TrainResult(
        *(run.step, run.settings.max_iters, started, run.skipped, run.val_loss, seconds),
        has_plot=_draw(run),
        interrupted=run.step < run.settings.max_iters or run.entry is not None,
    )


def take_steps(
    run: Run,
    learn: Callable[[], Learned],
    hooks: Sequence[Hook],
    stop: Stop,
    progress: Progress,
) -> None:
    """Take the run's steps, until the last or until a stop is asked for, and call the hooks.

    Parameters
    ----------
    learn : the objective: computes the gradients of step `run.step` into the model
    hooks : called after each step, in this order
    progress : shows the skipped steps

    Raises
    ------
    LostModel : a step is not finite and may not be skipped, or too many in a row were skipped
    StoppedError : a signal stopped a hook

    Before any other error of the objective or a hook is raised, the steps done are saved.
    """
    schedule, skips = run.settings.learning_rates(), _Skips(run, progress)
    try:
        # Lost weights may have caused a skipped step: a stop, which saves, waits for a good step.
        stopped = stop.asked
        while run.step < run.settings.max_iters and (skips.in_a_row or not stopped):
            run.world.doing = f"step {run.step + 1}"
            step = _step(run, learn, schedule(run.step), skips, stop)
            for hook in hooks:
                hook(run, step)
            # Ranks agreed in the step, before the update; one process sees a later signal, too.
            stopped = step.stopped or (run.world.size == 1 and stop.asked)
    except BaseException as error:
        if not (isinstance(error, LostModel | StoppedError) or skips.in_a_row):
            _rescue(run, stop, progress)
        raise


def _step(
    run: Run, learn: Callable[[], Learned], learning_rate: float, skips: _Skips, stop: Stop
) -> Step:
    """Take a step: the objective's gradients, an update with them, the step's metrics."""
    began, world = time.perf_counter(), run.world
    sent, waited = world.bytes_sent, world.waited
    learned = learn()
    loss = learned.loss
    # Ranks agree now: after the update a message would wait behind the weights on their way.
    stopped, late = stop.agree(_late(run))
    fault = "" if math.isfinite(loss) else f"the loss is {loss}"
    with stop.held():
        if not fault:
            run.confirm()
        norm, fault = (math.nan, fault) if fault else _update(run, learning_rate)
        skips.count(fault)
        run.step += 1
        run.tokens += learned.tokens
        run.torn = False
        run.val_loss = math.nan
        times = time.perf_counter() - began, world.waited - waited
        step = Step(learned, fault, *times, late, stopped)
        run.seconds += step.seconds
        run.entry = {
            "step": run.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens": run.tokens,
        }
        run.entry |= speed(run, [step])
        run.entry |= learned.metrics
        if world.size > 1:
            run.entry |= {
                "mpi_bytes": world.bytes_sent - sent,
                "mpi_share": round(step.waited / step.seconds, 4),
            }
        if run.settings.skip_nonfinite:
            run.entry["skipped"] = run.skipped
    return step


def _late(run: Run) -> bool:
    """Return whether a save by the clock is due."""
    minutes = run.settings.save_minutes
    return bool(minutes) and time.monotonic() - run.tried > 60 * minutes


def dropout_of(settings: Settings, step: int, first: int) -> Dropout | None:
    """Return the dropout of a batch whose first token is the step's token number `first`.

    Seed and step alone decide the masks, so a resumed run has those of a whole one.
    """
    return (
        Dropout(settings.dropout, settings.seed << 32 | step, first) if settings.dropout else None
    )


def _update(run: Run, learning_rate: float) -> tuple[float, str]:
    """Update the weights; return the gradients' norm and their fault, "" for none.

    Gradients that are not finite update nothing. On several ranks their sums are not, and those of
    one rank may be.
    """
    run.torn = True
    try:
        return run.optimizer.step(learning_rate, run.settings.grad_clip or None), ""
    except NonFiniteGradient as error:
        for name, gradient in run.model.gradients.items():
            bad = gradient[~np.isfinite(gradient)]
            if bad.size:
                return math.nan, f"the gradient of {name} holds {bad[0]}"
        if run.world.size > 1:
            return math.nan, f"the gradient norm is {error.norm}"
        raise


class _Skips:
    """Counts the skipped steps, or stops the run if a step must not be skipped."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self.in_a_row = 0
        self._quiet_until = 0

    def count(self, fault: str) -> None:
        """Count the next step if it has a fault; "" is none.

        Raises
        ------
        LostModel : steps may not be skipped, or too many in a row were skipped
        """
        if not fault:
            self.in_a_row = 0
            return
        run, step = self._run, self._run.step + 1
        self.in_a_row += 1
        if not run.settings.skip_nonfinite:
            raise LostModel(
                f"{fault} at step {step}, so the run stopped before its update; {run.last_good()};"
                " lower the learning rate, or leave such steps out with --skip-nonfinite"
            )
        if self.in_a_row == MOST_SKIPPED:
            raise LostModel(
                f"{fault} at step {step}, the {MOST_SKIPPED}th in a row that would be skipped, so"
                f" the run stopped; {run.last_good()}; lower the learning rate"
            )
        run.skipped += 1
        if step >= self._quiet_until:
            self._quiet_until = step + run.settings.log_interval
            self._progress.line(
                f"step {step}: {fault}, so nothing is updated ({run.skipped} skipped by now)"
            )


def _save_last(run: Run, stop: Stop) -> None:
    """Save at the end of the run: here an error is raised, as no later save follows."""
    try:
        with stop.held():
            save(run, stop)
            if run.entry:
                run.publish()
    except OSError as error:
        message = f"{error.strerror or error}; {run.newest()}"
        if error.errno is None:  # gpt2c's own message
            raise OSError(message) from error
        raise OSError(error.errno, message, error.filename) from error


def _rescue(run: Run, stop: Stop, progress: Progress) -> None:
    """Save after an error that lost weights did not cause; a failing save must not hide it.

    Several ranks cannot: an error of one does not stop the others where they could help.
    """
    if run.world.size > 1 or run.torn or run.step in (run.saved_step, 0):
        return
    with suppress(OSError, ValueError, MemoryError):
        _save_last(run, stop)
        progress.line(f"saved after step {run.step}; continue with --resume")


def _draw(run: Run) -> bool:
    """Draw the loss; return whether that worked: the run does not fail without a picture."""
    if run.world.rank:
        return False
    try:
        loss = run.facts.get("picture", {}).get("loss", LOSS)
        return plot_loss(read_figures(run.out), run.out / LOSS_FILE, loss)
    except Exception as error:
        report(f"{run.out / LOSS_FILE} cannot be drawn: {shown(error)}")
        return False
