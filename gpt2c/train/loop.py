"""The training loop: batch -> loss -> backward -> step -> log -> checkpoint.

What a step does depends on its number, the settings and the data alone, and on the weights and
moments before it; so a run goes on from a checkpoint (run.py) as if it had not stopped. Knows
tokens; their tokenizer is only compared and handed on.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.evaluate.figures import written
from gpt2c.evaluate.loss import Shards, evaluate
from gpt2c.files import atomic
from gpt2c.files.atomic import claim_directory
from gpt2c.files.names import CHECKPOINTS, LOSS_FILE, METRICS_FILE, RUN_FILE
from gpt2c.files.untrusted import shown
from gpt2c.gpt2 import GPT2
from gpt2c.kernels.backend import fma_peak, get_backend
from gpt2c.kernels.busy import Load
from gpt2c.kernels.checks import counted
from gpt2c.model.config import GPT2Config
from gpt2c.screen.progress import Progress
from gpt2c.text.batches import Batches
from gpt2c.text.shards import StoredTokens, read_shards
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train import checkpoints
from gpt2c.train.metrics import read_metrics
from gpt2c.train.needs import check_training
from gpt2c.train.optimizer import AdamW, NonFiniteGradient
from gpt2c.train.plot import plot_loss
from gpt2c.train.run import (
    LostModel,
    Run,
    check_config,
    check_never_saved,
    check_save,
    locked,
    read_record,
    report,
)
from gpt2c.train.settings import OLDER, TrainSettings, resumed
from gpt2c.train.tensorboard import check_tensorboard

# What ends a program that does not listen: Ctrl-C, kill and timeout, a terminal that closes, what a
# cluster sends before a job's time is over.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")
MOST_SKIPPED = 20  # steps in a row: weights that give nothing finite so often never will


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, validation loss in nats per token, seconds of this call.

    `started` is the step that this call began after, `skipped` counts the run's steps without an
    update. The loss is nan where the weights, as they are, were not evaluated. `interrupted` says
    whether a signal such as Ctrl-C ended the run before its last step or that one's evaluation.
    """

    step: int
    max_iters: int
    started: int
    skipped: int
    val_loss: float
    seconds: float
    has_plot: bool
    interrupted: bool


def train(
    data: Path,
    out: Path,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    held: bool = False,
) -> TrainResult:
    """Train a GPT-2 on prepared data into a run directory.

    Parameters
    ----------
    data : what `gpt2c prepare` made: train.bin, val.bin or shards of them, the tokenizer's files
    out : the run
    given : fields of TrainSettings that differ from the defaults or, with `resume`, from the run's
        own
    resume : go on from the newest whole checkpoint in `out`, or from the first step if the run was
        stopped before it had one: on the same backend the result is, to the bit, that of a run
        never interrupted. With another `max_iters` or schedule, the
        steps done keep their learning rates and those to come have the new schedule's.
    overwrite : `out` may exist and hold something
    held : `out` is the caller's, see `reserved`

    Raises
    ------
    OSError : a file is missing, damaged or cannot be written; an output directory is not empty;
        another process trains into `out` or prepares `data`; the run's checkpoints are gone. An
        error that comes after steps were done, and that is none of the weights', ends in a save.
        A checkpoint that cannot be written ends the run only if it is the last one
    ValueError : settings, data and checkpoint do not fit each other, or a loss or gradient is not
        finite: then nothing was updated with it, and the checkpoints are as they were; `resume` and
        `overwrite` together
    """
    if resume and overwrite:
        raise ValueError(
            f"--resume goes on with the run in {out} and --overwrite removes it: give one of them"
        )
    with ExitStack() as stack:
        if resume:
            stack.enter_context(locked(out))
        run, batches, val_tokens = _prepare(data, out, given or {}, resume, overwrite, held, stack)
        stack.callback(run.close)
        if run.step < run.settings.max_iters:
            report(_describe(run, batches))
        with _interruptible() as stop:
            return _loop(run, batches, val_tokens, stop)


@contextmanager
def reserved(
    out: Path, given: Mapping[str, Any], vocab_size: int, overwrite: bool
) -> Iterator[None]:
    """Have a run's directory for a `train` that comes after long work, so that it refuses before.

    The directory is locked, and made if need be; it is removed where the work fails.

    Parameters
    ----------
    out, given, overwrite : see `train`
    vocab_size : the most tokens that the tokenizer will have

    Raises
    ------
    OSError, ValueError : see `train`
    MemoryError : the training does not fit into memory
    """
    settings = TrainSettings(**given)
    config = settings.model_config(vocab_size)
    _fitting_backend(settings, config, order_bytes=0)  # as there are no tokens yet
    with atomic.claimed(out, overwrite), locked(out):
        check_save(out, config.num_parameters(), overwrite)
        yield


def _fitting_backend(
    settings: TrainSettings, config: GPT2Config, order_bytes: int, resumed: bool = False
) -> Any:
    """Return the backend of a run that this machine has all for."""
    if settings.tensorboard:
        check_tensorboard()
    backend = get_backend(settings.backend, settings.threads or None)
    check_training(config, settings, backend.threads, order_bytes, resumed)
    return backend


def _prepare(
    data: Path,
    out: Path,
    given: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    held: bool,
    stack: ExitStack,
) -> tuple[Run, Batches, Shards]:
    """Check all that can be checked before anything is written, then open the run."""
    record = read_record(out) if resume else None
    if record is None:
        settings = TrainSettings(**given)
    else:
        settings = resumed(record["settings"], given, str(out / RUN_FILE))
        _tell_older(record["settings"], settings, out)
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data} is not a directory of token files; gpt2c prepare makes one"
        )
    if not (out.is_dir() and out.samefile(data)):
        refusal = f"another process prepares {data}: wait for it, or name another directory"
        stack.enter_context(atomic.locked(data, refusal, shared=True))
    tokenizer = Tokenizer.from_pretrained(data)
    if resume:
        _check_tokenizer(tokenizer, data, out)
    vocabulary = tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.token_lengths
    tokens = read_shards(data, "train", *vocabulary)
    val_tokens = read_shards(data, "val", *vocabulary)
    fingerprint = {"train": _fingerprint(tokens), "val": _fingerprint(val_tokens)}
    if record is not None and record["data"] != fingerprint:
        raise ValueError(
            f"{data} does not hold the training and validation tokens of the run {out}, as data in"
            f" {RUN_FILE} has them: go on with those"
        )
    batches = Batches(
        tokens, settings.batch_size, settings.block_size, settings.seed, settings.batch_order
    )
    config = settings.model_config(tokenizer.vocab_size, tokenizer.eot)
    found = None
    if record is not None:
        check_config(out / RUN_FILE, record["config"], config)
        atomic.check_link(out / CHECKPOINTS)
        found = checkpoints.newest(out / CHECKPOINTS, report)
        if found is None:
            check_never_saved(out)
    if found is not None:
        check_config(found.path, found.config, config)
    backend = _fitting_backend(settings, config, batches.order_bytes, resume)
    seed = settings.seed if found is None else None
    model = GPT2(config, seed, backend, settings.recomputation)
    optimizer = AdamW(
        model,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    sizes = {"train": _token_size(tokens), "val": _token_size(val_tokens)}
    run = Run(out, settings, model, optimizer, tokenizer, fingerprint, sizes)
    if record is None:
        if not held:
            claim_directory(out, overwrite)
            stack.enter_context(locked(out))
        check_save(out, config.num_parameters(), overwrite)
        run.start()
    else:
        if found is None or found.state.step < settings.max_iters or found.state.entry:
            check_save(out, config.num_parameters(), overwrite)
        run.restore(record, found)
    return run, batches, val_tokens


def _describe(run: Run, batches: Batches) -> str:
    """Say what is about to be trained, and what may not be meant."""
    settings, config = run.settings, run.model.config
    text = (
        f"{config.num_parameters():,} parameters, backend {run.model.backend.name};"
        f" {settings.max_iters:,} steps of {settings.tokens_per_step:,} tokens, an epoch has"
        f" {batches.targets_per_epoch:,} tokens"
    )
    if batches.left_out:
        text += (
            f"; {batches.left_out} of {len(batches.shards)} shards have fewer than block_size + 1 ="
            f" {settings.block_size + 1:,} tokens and are left out"
        )
    if settings.warmup_iters >= settings.max_iters > 1:
        text += f"; all of it is warm-up (warmup_iters {settings.warmup_iters:,})"
    return text


def _token_size(tokens: Sequence[StoredTokens]) -> float:
    """Return the mean number of bytes of a token."""
    return sum(shard.text_bytes for shard in tokens) / sum(map(len, tokens))


def _fingerprint(tokens: Sequence[StoredTokens]) -> list[int]:
    """Tell token files from others: each one's length and a checksum of all of it."""
    return [mark for shard in tokens for mark in (len(shard), shard.checksum)]


class Stop:
    """What a signal asks for, see `_interruptible`."""

    def __init__(self) -> None:
        self.asked = False
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no second Ctrl-C cut an update or a save in half."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def check(self) -> None:
        """End an evaluation, which the run begins with when it goes on.

        Raises
        ------
        StoppedError : a signal has come
        """
        if self.asked:
            raise StoppedError

    def receive(self, signum: int, frame: object) -> None:
        """Take note of a signal; a second Ctrl-C does not wait for the end of the step."""
        if self.asked and signum == signal.SIGINT and not self._held:
            raise KeyboardInterrupt
        self.asked = True


class StoppedError(Exception):
    """A signal came during an evaluation."""


def _loop(run: Run, batches: Batches, val_tokens: Shards, stop: Stop) -> TrainResult:
    settings, started = run.settings, run.step
    schedule = settings.learning_rates()
    kernels = run.model.backend.name, run.model.backend.threads
    peak = fma_peak(*kernels)
    progress = Progress(run.step, settings.max_iters, settings.log_interval)
    skips = _Skips(run, progress)
    recent, load = _Recent(run), Load(kernels[1])
    start = saved = time.monotonic()
    crowded = False
    try:
        if run.entry:
            _evaluate_and_log(run, val_tokens, progress, stop, stop.check)
        # What was skipped may be the fault of weights that are lost, so it does not end in a save.
        while run.step < settings.max_iters and (skips.in_a_row or not stop.asked):
            began = time.perf_counter()
            learning_rate = schedule(run.step)
            loss, fault = _gradients(run, batches)
            with stop.held():
                if math.isfinite(loss):
                    run.confirm()
                norm, fault = (math.nan, fault) if fault else _update(run, learning_rate)
                skips.count(fault)
                run.step += 1
                run.torn = False
                run.val_loss = math.nan
                seconds = time.perf_counter() - began
                run.seconds += seconds
                run.entry = {
                    "step": run.step,
                    "loss": loss,
                    "learning_rate": learning_rate,
                    "grad_norm": norm,
                    **_speed(run, seconds, peak),
                }
                if settings.skip_nonfinite:
                    run.entry["skipped"] = run.skipped
            if run.entry.get("share_of_peak", 0) > 1:  # the machine was busy when it was measured
                del run.entry["share_of_peak"]
                fma_peak.cache_clear()
                peak = fma_peak(*kernels)
            recent.add(loss, seconds)
            if progress.step(run.step, recent.figures(peak)):
                recent.clear()
            if not crowded and (others := load.others()):
                crowded = True
                progress.line(_crowded(others, load.cores))
            due = _due(run.step, settings.save_interval) or (
                settings.save_minutes and time.monotonic() - saved > 60 * settings.save_minutes
            )
            if not _evaluation_is_due(run):
                _log(run)
            elif run.step == settings.max_iters:
                due = True
            if due and not fault:  # before an evaluation, which may take long
                _save(run, stop, progress)
                saved = time.monotonic()
            if run.entry:
                check = None if fault else stop.check
                _evaluate_and_log(run, val_tokens, progress, stop, check)
    except StoppedError:
        pass
    except BaseException as error:
        if not (isinstance(error, LostModel) or skips.in_a_row):
            _rescue(run, stop, progress)
        raise
    finally:
        progress.close()
    _save_last(run, stop)
    seconds = time.monotonic() - start
    return TrainResult(
        *(run.step, settings.max_iters, started, run.skipped, run.val_loss, seconds),
        has_plot=_draw(run),
        interrupted=run.step < settings.max_iters or run.entry is not None,
    )


def _evaluation_is_due(run: Run) -> bool:
    return run.step == run.settings.max_iters or _due(run.step, run.settings.eval_interval)


def _evaluate_and_log(
    run: Run,
    val_tokens: Shards,
    progress: Progress,
    stop: Stop,
    check: Callable[[], None] | None,
) -> None:
    """End a step whose evaluation is due, by the settings as they are now."""
    settings, entry = run.settings, run.entry
    assert entry
    evaluated = _evaluation_is_due(run)
    if evaluated:
        run.val_loss = entry["val_loss"] = evaluate(
            *(run.model, val_tokens, settings.batch_size, settings.block_size),
            settings.eval_iters,
            check=check,
        )
    _log(run)
    if evaluated:
        _check_validation(run)
        loss = written(run.val_loss)
        progress.line(f"step {run.step}: validation loss {loss} nats/token")
    if run.step == run.saved_step:
        _save(run, stop, progress)  # what the evaluation gave


def _log(run: Run) -> None:
    assert run.entry
    run.log(run.entry)
    run.entry = None


def _save(run: Run, stop: Stop, progress: Progress) -> None:
    """Save and go on, even where the disk refuses: it may have room again the next time."""
    try:
        with stop.held():
            run.save()
    except OSError as error:
        progress.line(
            f"step {run.step}: {atomic.reason(error)}; {_newest(run)}; the run goes on and tries"
            " again with its next checkpoint"
        )


def _save_last(run: Run, stop: Stop) -> None:
    """Save at the end, after which there is no next time."""
    try:
        with stop.held():
            run.save()
            if run.entry:
                run.publish()
    except OSError as error:
        message = f"{error.strerror or error}; {_newest(run)}"
        raise OSError(error.errno, message, error.filename) from error


def _newest(run: Run) -> str:
    """Say what is on the disk where something could not be written."""
    if run.saved is None:
        return "there is no checkpoint yet"
    steps = counted(run.step - run.saved_step, "step")
    return f"the newest checkpoint is {run.saved}, {steps} ago"


def _rescue(run: Run, stop: Stop, progress: Progress) -> None:
    """Save on the way out of an error that is none of the weights'; that error is to be told."""
    if run.torn or run.step in (run.saved_step, 0):
        return
    with suppress(OSError, ValueError, MemoryError):
        _save_last(run, stop)
        progress.line(f"saved after step {run.step}, to go on from with --resume")


def _draw(run: Run) -> bool:
    """Draw the loss; a picture that cannot be drawn is no failure of the run."""
    try:
        return plot_loss(read_metrics(run.out / METRICS_FILE), run.out / LOSS_FILE)
    except Exception as error:
        report(f"{run.out / LOSS_FILE} cannot be drawn: {shown(error)}")
        return False


def _crowded(others: float, cores: int) -> str:
    """Say that other programs are in the way."""
    used = f"{others:.1f} of the {cores} cores that this run may use"
    return f"other programs use {used}, so it is slower"


def _gradients(run: Run, batches: Batches) -> tuple[float, str]:
    """Compute the next step's loss and gradients; return the loss, and what is not finite of it."""
    settings, model = run.settings, run.model
    accumulate = settings.gradient_accumulation_steps
    model.zero_grad()
    loss = 0.0
    for micro in range(accumulate):
        x, y = batches.batch(run.step * accumulate + micro)
        loss += model.loss(x, y) / accumulate
        if not math.isfinite(loss):
            return loss, f"the loss is {loss}"
        model.backward(scale=1 / accumulate)
    return loss, ""


def _update(run: Run, learning_rate: float) -> tuple[float, str]:
    """Update the weights; return the gradients' norm, and what is not finite of them.

    Where something is not finite, nothing was updated.
    """
    run.torn = True
    try:
        return run.optimizer.step(learning_rate, run.settings.grad_clip or None), ""
    except NonFiniteGradient:
        for name, gradient in run.model.gradients.items():
            bad = gradient[~np.isfinite(gradient)]
            if bad.size:
                return math.nan, f"the gradient of {name} holds {bad[0]}"
        raise


def _due(step: int, interval: int) -> bool:
    """Whether what is done every so many steps is due; 0 is never."""
    return bool(interval) and step % interval == 0


def _speed(run: Run, seconds: float, peak: float) -> dict[str, Any]:
    """Give what a step's metrics say of its speed; `peak` in operations a second, 0 unknown."""
    settings = run.settings
    tokens = settings.tokens_per_step
    entry = {"tokens": run.step * tokens, "tokens_per_second": round(tokens / seconds, 1)}
    if peak:
        flops = run.model.config.flops_per_token(settings.block_size) * tokens
        entry["share_of_peak"] = round(flops / seconds / peak, 4)
    return entry


class _Recent:
    """The means since the last line that was printed; on a terminal, of as many steps at most."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps: deque[tuple[float, float]] = deque(maxlen=run.settings.log_interval)

    def add(self, loss: float, seconds: float) -> None:
        """Take note of a step."""
        self._steps.append((loss, seconds))

    def clear(self) -> None:
        """Begin anew, after a line."""
        self._steps.clear()

    def figures(self, peak: float) -> str:
        """Return them for a line; the loss is that of the steps that have one."""
        losses, seconds = zip(*self._steps, strict=True)
        finite = [loss for loss in losses if math.isfinite(loss)]
        loss = sum(finite) / len(finite) if finite else math.nan
        speed = _speed(self._run, sum(seconds) / len(seconds), peak)
        share = f"  {speed['share_of_peak']:.0%} of peak" if "share_of_peak" in speed else ""
        return f"loss {written(loss, 3)}  {speed['tokens_per_second']:,.0f} tokens/s{share}"


class _Skips:
    """Counts the steps that are left out, or stops the run."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self.in_a_row = 0
        self._quiet_until = 0

    def count(self, fault: str) -> None:
        """Take note of the next step, with what is not finite of it, or "" where all is."""
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


def _check_validation(run: Run) -> None:
    """Stop the run of a model that is lost before it takes a good one's place."""
    if not math.isfinite(run.val_loss):
        run.forget()
        raise LostModel(
            f"the validation loss is {run.val_loss} after step {run.step}, so its weights were not"
            f" kept; {run.last_good()}; lower the learning rate"
        )


def _check_tokenizer(tokenizer: Tokenizer, data: Path, out: Path) -> None:
    """Refuse to go on with tokens that mean something else: two vocabularies may be of one size."""
    try:
        own = Tokenizer.from_pretrained(out)
    except FileNotFoundError:  # what a kill at the start left out comes with the next start
        return
    if own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{data} has another tokenizer than the run {out}: go on with the data that it was"
            " trained on"
        )


def _tell_older(stored: Mapping[str, Any], settings: TrainSettings, out: Path) -> None:
    """Say which settings a run of another version had not."""
    lacking = [name for name in OLDER if name not in stored]
    if lacking:
        taken = ", ".join(f"{name}={getattr(settings, name)}" for name in lacking)
        report(f"{out / RUN_FILE} is another version's; what it lacks is taken as {taken}")


@contextmanager
def _interruptible() -> Iterator[Stop]:
    """Make signals ask for a stop, so that no step is cut in half; a second Ctrl-C interrupts.

    What a program handles itself, or ignores as under nohup, stays as it is, but for Ctrl-C.
    Signals reach the main thread only; elsewhere nothing is changed.
    """
    stop = Stop()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        for number in numbers:
            if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
