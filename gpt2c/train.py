"""The training loop: batch -> loss -> backward -> step -> log -> checkpoint; and evaluation.

A run is a directory that transformers can load as it is (config.json, model.safetensors, the
tokenizer's files), and beside them trainer.safetensors, metrics.jsonl and loss.png. Knows nothing
about text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c import checkpoint
from gpt2c.backend import fma_peak
from gpt2c.config import GPT2Config
from gpt2c.data import Batches, windows
from gpt2c.files import atomic_path, claim_directory
from gpt2c.model import GPT2
from gpt2c.optimizer import AdamW
from gpt2c.plot import plot_loss
from gpt2c.progress import Progress
from gpt2c.quantized import QuantizedGPT2
from gpt2c.settings import TrainSettings, resumed
from gpt2c.tokenfile import read_shards
from gpt2c.tokenizer import Tokenizer

Tokens = list[NDArray[np.uint16]]  # one array for each shard


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, validation loss in nats per token, seconds of this call."""

    step: int
    max_iters: int
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
    resume : go on from the checkpoint in `out`: on the same backend with the same number of threads
        the result is, to the bit, that of a run never interrupted
    overwrite : `out` may exist and hold something

    Raises
    ------
    OSError : a file is missing, damaged or cannot be written; an output directory is not empty
    ValueError : settings, data and checkpoint do not fit each other
    """
    stored = checkpoint.load_checkpoint(out) if resume else None
    if stored is None:
        settings = TrainSettings(**(given or {}))
    else:
        missing = {"settings", "data", "val_loss"} - stored[3].keys()
        if missing:
            raise ValueError(f"{out / checkpoint.TRAINER_FILE} lacks {', '.join(sorted(missing))}")
        settings = resumed(stored[3]["settings"], given or {}, str(out))
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data} is not a directory of token files; gpt2c prepare makes one"
        )
    tokenizer = Tokenizer.from_pretrained(data)
    if resume:
        _check_tokenizer(data, out)
    tokens = read_shards(data, "train", tokenizer.vocab_size)
    val_tokens = read_shards(data, "val", tokenizer.vocab_size)
    fingerprint = _fingerprint(tokens)
    if stored is not None and stored[3]["data"] != fingerprint:
        raise ValueError(
            f"{data} does not hold the training tokens of the run {out}: go on with those"
        )
    batches = Batches(tokens, settings.batch_size, settings.block_size, settings.seed)
    config = settings.model_config(tokenizer.vocab_size, tokenizer.eot)
    seed = settings.seed if stored is None else None
    recompute = None if settings.recompute == "none" else settings.recompute
    model = GPT2(config, seed, settings.backend, recompute)
    optimizer = AdamW(
        model,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    run = _Run(out, settings, model, optimizer, tokenizer, fingerprint)
    if stored is None:
        claim_directory(out, overwrite)
        run.start()
    else:
        run.restore(*stored)
    with _interruptible() as interrupted:
        return _loop(run, batches, val_tokens, interrupted)


def _fingerprint(tokens: Tokens) -> list[int]:
    """Tell token files from others: each one's length and a checksum of its first million."""
    return [n for shard in tokens for n in (len(shard), zlib.crc32(shard[: 1 << 20].tobytes()))]


def _loop(
    run: _Run, batches: Batches, val_tokens: Tokens, interrupted: threading.Event
) -> TrainResult:
    settings, model = run.settings, run.model
    schedule = settings.learning_rates()
    accumulate = settings.gradient_accumulation_steps
    tokens_per_step = settings.batch_size * settings.block_size * accumulate
    flops = model.config.flops_per_token(settings.block_size)
    peak = fma_peak(model.backend.name, getattr(model.backend, "threads", 1))
    progress = Progress(run.step, settings.max_iters, settings.log_interval)
    start = time.perf_counter()
    try:
        while run.step < settings.max_iters and not interrupted.is_set():
            began = time.perf_counter()
            model.zero_grad()
            loss = 0.0
            for micro in range(accumulate):
                x, y = batches.batch(run.step * accumulate + micro)
                loss += model.loss(x, y) / accumulate
                model.backward(scale=1 / accumulate)
            learning_rate = schedule(run.step)
            norm = run.optimizer.step(learning_rate, settings.grad_clip or None)
            run.step += 1
            speed = tokens_per_step / (time.perf_counter() - began)
            entry = {
                "step": run.step,
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": norm,
            }
            entry["tokens_per_second"] = round(speed, 1)
            figures = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
            if peak:
                entry["share_of_peak"] = round(flops * speed / peak, 4)
                figures += f"  {flops * speed / peak:.0%} of peak"
            progress.step(run.step, figures)
            last = run.step == settings.max_iters
            if last or (settings.eval_interval and run.step % settings.eval_interval == 0):
                run.val_loss = evaluate(
                    model, val_tokens, settings.batch_size, settings.block_size, settings.eval_iters
                )
                entry["val_loss"] = run.val_loss
                progress.line(f"step {run.step}: validation loss {run.val_loss:.4f} nats/token")
            run.log(entry)
            if settings.save_interval and run.step % settings.save_interval == 0 and not last:
                run.save()
    finally:
        progress.close()
    run.save()
    seconds = time.perf_counter() - start
    has_plot = plot_loss(run.metrics, run.out / "loss.png")
    return TrainResult(run.step, settings.max_iters, run.val_loss, seconds, has_plot)


def _check_tokenizer(data: Path, out: Path) -> None:
    """Refuse to go on with tokens that mean something else: two vocabularies may be of one size."""
    for name in ("vocab.json", "merges.txt"):
        if (data / name).read_bytes() != (out / name).read_bytes():
            raise ValueError(
                f"{data} has another tokenizer than the run {out}: {name} differs; go on with the"
                " data that it was trained on"
            )


class _Run:
    """A run directory and what is in it."""

    def __init__(
        self,
        out: Path,
        settings: TrainSettings,
        model: GPT2,
        optimizer: AdamW,
        tokenizer: Tokenizer,
        fingerprint: list[int],
    ) -> None:
        self.out, self.settings, self.model, self.optimizer = out, settings, model, optimizer
        self.tokenizer, self.fingerprint = tokenizer, fingerprint
        self.step = 0
        self.val_loss = math.nan
        self.metrics: list[dict[str, Any]] = []

    def start(self) -> None:
        # Without its trainer's state an overwritten run cannot be resumed by mistake for this one.
        for name in (checkpoint.TRAINER_FILE, checkpoint.WEIGHTS_FILE, "loss.png"):
            (self.out / name).unlink(missing_ok=True)
        self.tokenizer.save_pretrained(self.out)
        self._write_metrics()

    def restore(
        self,
        entries: Mapping[str, Any],
        tensors: dict[str, Any],
        moments: Mapping[str, Any],
        state: Mapping[str, Any],
    ) -> None:
        """Take over a checkpoint; what metrics.jsonl says of steps after it is dropped."""
        found = GPT2Config.from_dict(entries)
        if found != self.model.config:
            raise ValueError(
                f"{self.out} holds a model of another config than its settings and this data's"
                f" tokenizer give: {found}, wanted {self.model.config}"
            )
        self.model.load_parameters(tensors, str(self.out))
        for name in ("m", "v"):
            moment = getattr(self.optimizer, name)
            if name not in moments or moments[name].shape != moment.shape:
                raise ValueError(
                    f"{self.out / checkpoint.TRAINER_FILE}: {name} must have shape {moment.shape}"
                )
            moment[...] = moments[name]
        self.step = self.optimizer.steps = state["step"]
        self.val_loss = math.nan if state["val_loss"] is None else state["val_loss"]
        path = self.out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            entries_read = [json.loads(line) for line in lines if line.endswith("}")]
            self.metrics = [entry for entry in entries_read if entry["step"] <= self.step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: delete it and resume") from error
        self._write_metrics()

    def _write_metrics(self) -> None:
        with atomic_path(self.out / "metrics.jsonl") as temporary:
            lines = (json.dumps(entry) + "\n" for entry in self.metrics)
            temporary.write_text("".join(lines), encoding="utf-8")

    def log(self, entry: dict[str, Any]) -> None:
        """Add an object to metrics.jsonl; closing the file flushes it."""
        self.metrics.append(entry)
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self) -> None:
        """Write the model and all that a resumed run needs."""
        state = {
            "step": self.step,
            "val_loss": None if math.isnan(self.val_loss) else self.val_loss,
            "settings": dataclasses.asdict(self.settings),
            "data": self.fingerprint,
        }
        moments = {"m": self.optimizer.m, "v": self.optimizer.v}
        config = self.model.config.to_dict()
        checkpoint.save_checkpoint(self.out, config, self.model.parameters, moments, state)


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
