"""The training loop: gradients -> update -> hooks (show, log, save, evaluate).

A step depends only on its number, the settings, the data, and the weights and moments before it. So
a run continues from a checkpoint (run.py) as if it had not stopped. Knows tokens; it only compares
their tokenizer and passes it on.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.evaluate.loss import Shards
from gpt2c.files import atomic
from gpt2c.files.atomic import claim_directory
from gpt2c.files.names import CHECKPOINTS, LOSS_FILE, METRICS_FILE, RUN_FILE
from gpt2c.files.untrusted import shown
from gpt2c.kernels.backend import REQUIRES, get_backend
from gpt2c.model.block import Dropout
from gpt2c.model.config import ModelConfig
from gpt2c.pretrained import MODELS
from gpt2c.screen.progress import Progress
from gpt2c.text.batches import Batches
from gpt2c.text.shards import StoredTokens, read_shards
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train import checkpoints
from gpt2c.train.hooks import Evaluate, Hook, Save, Show, Step, log, save, speed
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
    locked_run,
    read_record,
    report,
)
from gpt2c.train.settings import OLDER, TrainSettings, resumed
from gpt2c.train.stop import Stop, StoppedError, interruptible
from gpt2c.train.tensorboard import check_tensorboard

__all__ = ["MOST_SKIPPED", "TrainResult", "reserved", "train"]

Gradients = Callable[[], tuple[float, str]]  # see `take_steps`
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


def train(
    data: Path,
    out: Path,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    held: bool = False,
) -> TrainResult:
    """Train a GPT-2 or a Llama on prepared data into a run directory.

    Parameters
    ----------
    data : the directory that `gpt2c prepare` made: train.bin, val.bin or shards of them, and the
        tokenizer's files
    out : the directory of the run
    given : fields of TrainSettings that differ from the defaults or, with `resume`, from the run's
        own
    resume : continue from the newest whole checkpoint in `out`, or from the first step if the run
        has none yet. On the same backend the result is, bit for bit, that of an uninterrupted run.
        With another `max_iters` or schedule, only the coming steps have the new learning rates
    overwrite : `out` may exist and hold files
    held : the caller has locked `out`, see `reserved`

    Raises
    ------
    OSError : a file is missing, damaged or cannot be written; an output directory is not empty;
        another process trains into `out` or prepares `data`; the run's checkpoints are gone. A
        checkpoint that cannot be written ends the run only if it is the last one
    ValueError : settings, data and checkpoint do not fit each other; `resume` and `overwrite`
        together; or a loss or gradient is not finite: it updated nothing, and the checkpoints are
        unchanged

    Before any other error after the first step, the run is saved.
    """
    if resume and overwrite:
        raise ValueError(
            f"--resume continues the run in {out} and --overwrite removes it: pass one of them"
        )
    with ExitStack() as stack:
        if resume:
            stack.enter_context(locked_run(out))
        run, batches, val_tokens = _prepare(data, out, given or {}, resume, overwrite, held, stack)
        stack.callback(run.close)
        if run.step < run.settings.max_iters:
            report(_describe(run, batches))
        with interruptible() as stop:
            return _train(run, batches, val_tokens, stop)


@contextmanager
def reserved(
    out: Path, given: Mapping[str, Any], vocab_size: int, overwrite: bool
) -> Iterator[None]:
    """Check and lock a run's directory before long work, so that the `train` after it succeeds.

    The directory is made if it does not exist, and then removed again if the work fails.

    Parameters
    ----------
    out, given, overwrite : see `train`
    vocab_size : the most tokens that the tokenizer will have

    Raises
    ------
    OSError, ValueError : see `train`
    MemoryError : the training needs more memory than is free
    """
    settings = TrainSettings(**given)
    config = settings.model_config(vocab_size)
    _fitting_backend(settings, config, order_bytes=0)  # there are no tokens yet
    with atomic.claimed(out, overwrite), locked_run(out):
        check_save(out, config.num_parameters(), overwrite)
        yield


def _fitting_backend(
    settings: TrainSettings, config: ModelConfig, order_bytes: int, resumed: bool = False
) -> Any:
    """Return the backend of a run; refuse a run for which a package or memory is missing."""
    if settings.tensorboard:
        check_tensorboard()
    backend = get_backend(settings.backend, settings.threads or None)
    check_training(config, settings, backend, order_bytes, resumed)
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
    """Check the arguments and files before anything is written, then open the run."""
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
            f"{data} does not hold the training and validation tokens of the run {out}, whose"
            f" fingerprint is in {RUN_FILE}: go on with those"
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
    model = MODELS[type(config)](
        *(config, seed, backend, settings.recomputation), precision=settings.precision
    )
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
            stack.enter_context(locked_run(out))
        check_save(out, config.num_parameters(), overwrite)
        run.start()
    else:
        if found is None or found.state.step < settings.max_iters or found.state.entry:
            check_save(out, config.num_parameters(), overwrite)
        run.restore(record, found)
    return run, batches, val_tokens


def _describe(run: Run, batches: Batches) -> str:
    """Return a description of the run, with settings that may be mistakes."""
    settings, config, model = run.settings, run.model.config, run.model
    products = "" if settings.precision == "fp32" else f", products in {model.precision}"
    if model.precision == "bf16" and "avx512bf16" not in REQUIRES[model.backend.name]:
        products += " (slow: this CPU has no instructions for them)"
    text = (
        f"{config.num_parameters():,} parameters, backend {model.backend.name}{products};"
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
    """Return the length and the checksum of each token file, which identify them."""
    return [mark for shard in tokens for mark in (len(shard), shard.checksum)]


def _train(run: Run, batches: Batches, val_tokens: Shards, stop: Stop) -> TrainResult:
    """Pretrain on the next tokens of the batches, with all hooks."""
    start, started = time.monotonic(), run.step
    progress = Progress(run.step, run.settings.max_iters, run.settings.log_interval)
    evaluate = Evaluate(val_tokens, stop, progress)
    hooks = (Show(run, progress), log, Save(stop, progress), evaluate)
    with closing(progress), suppress(StoppedError):
        if run.entry:
            evaluate.finish(run, stop.check)
        take_steps(run, partial(_gradients, run, batches), hooks, stop, progress)
    _save_last(run, stop)
    seconds = time.monotonic() - start
    return TrainResult(
        *(run.step, run.settings.max_iters, started, run.skipped, run.val_loss, seconds),
        has_plot=_draw(run),
        interrupted=run.step < run.settings.max_iters or run.entry is not None,
    )


def take_steps(
    run: Run, gradients: Gradients, hooks: Sequence[Hook], stop: Stop, progress: Progress
) -> None:
    """Take the run's steps, until the last or until a stop is asked for, and call the hooks.

    Parameters
    ----------
    gradients : the objective: computes the next step's gradients into the model; returns the loss,
        and "" or, if the loss is not finite, the fault of `Step`
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
        while run.step < run.settings.max_iters and (skips.in_a_row or not stop.asked):
            step = _step(run, gradients, schedule(run.step), skips, stop)
            for hook in hooks:
                hook(run, step)
    except BaseException as error:
        if not (isinstance(error, LostModel | StoppedError) or skips.in_a_row):
            _rescue(run, stop, progress)
        raise


def _step(run: Run, gradients: Gradients, learning_rate: float, skips: _Skips, stop: Stop) -> Step:
    """Take a step: the objective's gradients, an update with them, the step's metrics."""
    began = time.perf_counter()
    loss, fault = gradients()
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
        }
        run.entry |= speed(run, seconds)
        if run.settings.skip_nonfinite:
            run.entry["skipped"] = run.skipped
    return Step(loss, fault, seconds)


def _gradients(run: Run, batches: Batches) -> tuple[float, str]:
    """Compute the next step's loss and gradients; return the loss and its fault, "" for none."""
    settings, model = run.settings, run.model
    accumulate = settings.gradient_accumulation_steps
    model.zero_grad()
    loss = 0.0
    for micro in range(accumulate):
        x, y = batches.batch(run.step * accumulate + micro)
        dropout = _dropout(settings, run.step, micro * x.size)
        loss += model.loss(x, y, dropout=dropout) / accumulate
        if not math.isfinite(loss):
            return loss, f"the loss is {loss}"
        model.backward(scale=1 / accumulate)
    return loss, ""


def _dropout(settings: TrainSettings, step: int, first: int) -> Dropout | None:
    """Return the dropout of a batch whose first token is the step's token number `first`.

    Seed and step alone decide the masks, so a resumed run has those of a whole one.
    """
    return (
        Dropout(settings.dropout, settings.seed << 32 | step, first) if settings.dropout else None
    )


def _update(run: Run, learning_rate: float) -> tuple[float, str]:
    """Update the weights; return the gradients' norm and their fault, "" for none.

    Gradients that are not finite update nothing.
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
    """Save after an error that lost weights did not cause; a failing save must not hide it."""
    if run.torn or run.step in (run.saved_step, 0):
        return
    with suppress(OSError, ValueError, MemoryError):
        _save_last(run, stop)
        progress.line(f"saved after step {run.step}, to go on from with --resume")


def _draw(run: Run) -> bool:
    """Draw the loss; return whether that worked: the run does not fail without a picture."""
    try:
        return plot_loss(read_metrics(run.out / METRICS_FILE), run.out / LOSS_FILE)
    except Exception as error:
        report(f"{run.out / LOSS_FILE} cannot be drawn: {shown(error)}")
        return False


def _check_tokenizer(tokenizer: Tokenizer, data: Path, out: Path) -> None:
    """Refuse data of another tokenizer, whose vocabulary may have the same size."""
    try:
        own = Tokenizer.from_pretrained(out)
    except FileNotFoundError:  # after a kill at its start; the run will write these files
        return
    if own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{data} has another tokenizer than the run {out}: go on with the data that it was"
            " trained on"
        )


def _tell_older(stored: Mapping[str, Any], settings: TrainSettings, out: Path) -> None:
    """Report the settings that a run of another version lacks."""
    lacking = [name for name in OLDER if name not in stored]
    if lacking:
        taken = ", ".join(f"{name}={getattr(settings, name)}" for name in lacking)
        report(f"{out / RUN_FILE} is another version's; settings that it lacks become {taken}")
