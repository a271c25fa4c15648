"""The training loop: batch -> loss -> backward -> step -> log -> checkpoint; and evaluation.

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
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c import trainer_state
from gpt2c.backend import fma_peak, get_backend
from gpt2c.data import Batches, windows
from gpt2c.files import claim_directory
from gpt2c.metrics import FILE as METRICS_FILE
from gpt2c.metrics import read_metrics
from gpt2c.model import GPT2
from gpt2c.needs import check_training
from gpt2c.optimizer import AdamW, NonFiniteGradient
from gpt2c.plot import LOSS_FILE, plot_loss
from gpt2c.progress import Progress
from gpt2c.quantized import QuantizedGPT2
from gpt2c.run import CHECKPOINTS, RUN_FILE, Run, check_config, locked, read_record, report
from gpt2c.settings import TrainSettings, resumed
from gpt2c.tensorboard import check_tensorboard
from gpt2c.tokenfile import read_shards
from gpt2c.tokenizer import Tokenizer

Tokens = list[NDArray[np.uint16]]  # one array for each shard
MOST_SKIPPED = 20  # steps in a row: weights that give nothing finite so often never will
_SUMMED = 1 << 20  # tokens of a checksum's block


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, validation loss in nats per token, seconds of this call.

    `started` is the step that this call began after, `skipped` counts the run's steps without an
    update. The loss is nan where the weights, as they are, were not evaluated.
    """

    step: int
    max_iters: int
    started: int
    skipped: int
    val_loss: float
    seconds: float
    has_plot: bool

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run before its last step."""
        return self.step < self.max_iters


def evaluate(
    model: GPT2 | QuantizedGPT2,
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    eval_iters: int = 0,
    overlap: int = 0,
) -> float:
    """Give the mean loss over consecutive windows of `tokens`, in nats per token.

    Parameters
    ----------
    batch_size, block_size : B windows of T tokens at a time
    eval_iters : so many batches only; 0 all
    overlap : tokens of context that a window shares with the one before, see `data.windows`
    """
    total, count = 0.0, 0
    for i, (x, y) in enumerate(windows(tokens, batch_size, block_size, overlap)):
        if eval_iters and i == eval_iters:
            break
        scored = int(np.count_nonzero(y >= 0))
        total += model.loss(x, y, keep=False) * scored
        count += scored
    return total / count


def train(
    data: Path,
    out: Path,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Train a GPT-2 on prepared data into a run directory.

    Parameters
    ----------
    data : what `gpt2c prepare` made: train.bin, val.bin or shards of them, the tokenizer's files
    out : the run
    given : fields of TrainSettings that differ from the defaults or, with `resume`, from the run's
        own
    resume : go on from the newest whole checkpoint in `out`, or from the first step if there is
        none yet: on the same backend with the same number of threads the result is, to the bit,
        that of a run never interrupted. With another `max_iters` or schedule, the steps done keep
        their learning rates and those to come have the new schedule's.
    overwrite : `out` may exist and hold something

    Raises
    ------
    OSError : a file is missing, damaged or cannot be written; an output directory is not empty;
        another process trains into `out`
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
        run, batches, val_tokens = _prepare(data, out, given or {}, resume, overwrite, stack)
        stack.callback(run.close)
        if run.step < run.settings.max_iters:
            report(_describe(run, batches))
        with _interruptible() as interrupted:
            return _loop(run, batches, val_tokens, interrupted)


def _prepare(
    data: Path,
    out: Path,
    given: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    stack: ExitStack,
) -> tuple[Run, Batches, Tokens]:
    """Check all that can be checked before anything is written, then open the run."""
    record = read_record(out) if resume else None
    if record is None:
        settings = TrainSettings(**given)
    else:
        settings = resumed(record["settings"], given, str(out / RUN_FILE))
    if settings.tensorboard:
        check_tensorboard()
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data} is not a directory of token files; gpt2c prepare makes one"
        )
    tokenizer = Tokenizer.from_pretrained(data)
    if resume:
        _check_tokenizer(tokenizer, data, out)
    vocabulary = tokenizer.vocab_size, tokenizer.fingerprint
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
        found = trainer_state.newest(out / CHECKPOINTS, report)
    if found is not None:
        check_config(found.path, found.config, config)
    backend = get_backend(settings.backend, settings.threads or None)
    check_training(config, settings, getattr(backend, "threads", 1), resumed=resume)
    seed = settings.seed if found is None else None
    model = GPT2(config, seed, backend, settings.recomputation)
    optimizer = AdamW(
        model,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    sizes = {"train": _token_size(tokens, tokenizer), "val": _token_size(val_tokens, tokenizer)}
    run = Run(out, settings, model, optimizer, tokenizer, fingerprint, sizes)
    if record is None:
        claim_directory(out, overwrite)
        stack.enter_context(locked(out))
        run.start()
    else:
        run.restore(record, found)
    return run, batches, val_tokens


def _describe(run: Run, batches: Batches) -> str:
    """Say what is about to be trained, and what may not be meant."""
    settings, config = run.settings, run.model.config
    text = (
        f"{config.num_parameters():,} parameters, backend {run.model.backend.name};"
        f" {settings.max_iters:,} steps of {settings.tokens_per_step:,} tokens, an epoch has"
        f" {batches.targets_per_epoch:,}"
    )
    if batches.left_out:
        text += (
            f"; {batches.left_out} of {len(batches.shards)} shards have fewer than block_size + 1 ="
            f" {settings.block_size + 1:,} tokens and are left out"
        )
    if settings.warmup_iters >= settings.max_iters > 1:
        text += f"; all of it is warm-up (warmup_iters {settings.warmup_iters:,})"
    return text


def _token_size(tokens: Tokens, tokenizer: Tokenizer) -> float:
    """Give the mean number of bytes of a token."""
    lengths, size = tokenizer.token_lengths, 0
    for shard in tokens:
        for start in range(0, len(shard), _SUMMED):
            size += int(lengths[shard[start : start + _SUMMED]].sum())
    return size / sum(map(len, tokens))


def _fingerprint(tokens: Tokens) -> list[int]:
    """Tell token files from others: each one's length and a checksum of all of it."""
    marks = []
    for shard in tokens:
        checksum = 0
        for start in range(0, len(shard), _SUMMED):
            checksum = zlib.crc32(shard[start : start + _SUMMED].tobytes(), checksum)
        marks += [len(shard), checksum]
    return marks


def _loop(
    run: Run, batches: Batches, val_tokens: Tokens, interrupted: threading.Event
) -> TrainResult:
    settings, started = run.settings, run.step
    schedule = settings.learning_rates()
    kernels = run.model.backend.name, getattr(run.model.backend, "threads", 1)
    peak = fma_peak(*kernels)
    progress = Progress(run.step, settings.max_iters, settings.log_interval)
    skips = _Skips(run, progress)
    start = time.perf_counter()
    try:
        # What was skipped may be the fault of weights that are lost, so it does not end in a save.
        while run.step < settings.max_iters and (skips.in_a_row or not interrupted.is_set()):
            began = time.perf_counter()
            learning_rate = schedule(run.step)
            loss, norm, fault = _update(run, batches, learning_rate)
            if math.isfinite(loss):
                run.confirm()
            skips.count(fault)
            run.step += 1
            run.val_loss = math.nan
            seconds = time.perf_counter() - began
            run.seconds += seconds
            entry = {
                "step": run.step,
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": norm,
                **_speed(run, seconds, peak),
            }
            if entry.get("share_of_peak", 0) > 1:  # the machine was busy when it was measured
                del entry["share_of_peak"]
                fma_peak.cache_clear()
                peak = fma_peak(*kernels)
            if settings.skip_nonfinite:
                entry["skipped"] = run.skipped
            progress.step(run.step, _figures(entry))
            last = run.step == settings.max_iters
            evaluated = last or _due(run.step, settings.eval_interval)
            if evaluated:
                run.val_loss = entry["val_loss"] = evaluate(
                    *(run.model, val_tokens, settings.batch_size, settings.block_size),
                    settings.eval_iters,
                )
            run.log(entry)
            if evaluated:
                _check_validation(run)
                progress.line(f"step {run.step}: validation loss {run.val_loss:.4f} nats/token")
            if not fault and _due(run.step, settings.save_interval):
                run.save()
    finally:
        progress.close()
    run.save()
    seconds = time.perf_counter() - start
    has_plot = plot_loss(read_metrics(run.out / METRICS_FILE), run.out / LOSS_FILE)
    return TrainResult(
        run.step, settings.max_iters, started, run.skipped, run.val_loss, seconds, has_plot
    )


def _update(run: Run, batches: Batches, learning_rate: float) -> tuple[float, float, str]:
    """Take the next step: its loss, its gradients' norm, and what is not finite.

    Where something is not finite, nothing was updated.
    """
    settings, model = run.settings, run.model
    accumulate = settings.gradient_accumulation_steps
    model.zero_grad()
    loss = 0.0
    for micro in range(accumulate):
        x, y = batches.batch(run.step * accumulate + micro)
        loss += model.loss(x, y) / accumulate
        if not math.isfinite(loss):
            return loss, math.nan, f"the loss is {loss}"
        model.backward(scale=1 / accumulate)
    try:
        return loss, run.optimizer.step(learning_rate, settings.grad_clip or None), ""
    except NonFiniteGradient:
        for name, gradient in model.gradients.items():
            bad = gradient[~np.isfinite(gradient)]
            if bad.size:
                return loss, math.nan, f"the gradient of {name} holds {bad[0]}"
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


def _figures(entry: Mapping[str, Any]) -> str:
    """Give a step's metrics for a line."""
    share = f"  {entry['share_of_peak']:.0%} of peak" if "share_of_peak" in entry else ""
    return f"loss {entry['loss']:.3f}  {entry['tokens_per_second']:,.0f} tokens/s{share}"


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
            raise ValueError(
                f"{fault} at step {step}, so the run stopped before its update; {run.last_good()};"
                " lower the learning rate, or leave such steps out with --skip-nonfinite"
            )
        if self.in_a_row == MOST_SKIPPED:
            raise ValueError(
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
        raise ValueError(
            f"the validation loss is {run.val_loss} after step {run.step}, so its weights were not"
            f" saved; {run.last_good()}; lower the learning rate"
        )


def _check_tokenizer(tokenizer: Tokenizer, data: Path, out: Path) -> None:
    """Refuse to go on with tokens that mean something else: two vocabularies may be of one size."""
    try:
        own = Tokenizer.from_pretrained(out)
    except FileNotFoundError:  # what a kill at the start left out comes with the next start
        return
    if own.vocab_and_merges() != tokenizer.vocab_and_merges():
        raise ValueError(
            f"{data} has another tokenizer than the run {out}: go on with the data that it was"
            " trained on"
        )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Make the first Ctrl-C set an event, so that no step is cut in half; the second interrupts.

    Signals reach the main thread only; elsewhere nothing is changed.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(signum: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
