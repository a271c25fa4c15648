"""Pretraining: a model of random weights learns the next token of prepared data.

Knows tokens; it only compares their tokenizer and passes it on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gpt2c.causal_lm import CausalLM
from gpt2c.evaluate.loss import Shards, evaluate
from gpt2c.files import atomic
from gpt2c.files.names import RESULT_FILE, RUN_FILE
from gpt2c.kernels.backend import backends, fast_precisions, get_backend
from gpt2c.model.config import ModelConfig
from gpt2c.parallel.world import ALONE, World, join
from gpt2c.pretrained import MODELS
from gpt2c.text.batches import Batches
from gpt2c.text.shards import StoredTokens, checksums, read_shards
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.checkpoints import Checkpoint
from gpt2c.train.directory import (
    check_save,
    locked_run,
    newest_checkpoint,
    read_record,
    report,
)
from gpt2c.train.hooks import Learned
from gpt2c.train.loop import TrainResult, dropout_of, train_run
from gpt2c.train.needs import check_training
from gpt2c.train.run import LostModel, Run, check_ranks, open_run
from gpt2c.train.settings import TrainSettings, resumed
from gpt2c.train.sharded import optimizer_of
from gpt2c.train.stop import Check, interruptible
from gpt2c.train.tensorboard import check_tensorboard

__all__ = ["reserved", "train"]


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
        has none yet. On the same backend and with the same settings the result is, bit for bit,
        that of an uninterrupted run. Another `max_iters` stretches the schedule: the coming steps
        have the learning rates of a run of that length, the past ones had others
    overwrite : `out` may exist and hold files
    held : the caller has locked `out`, see `reserved`

    Raises
    ------
    OSError : a file is missing, damaged or cannot be written; an output directory is not empty;
        another process trains into `out` or prepares `data`; the run's checkpoints are gone. A
        checkpoint that cannot be written ends the run only if it is the last one
    ValueError : settings, data and checkpoint do not fit each other; `resume` and `overwrite`
        together; a new run's `out` is or holds `data`; or a loss or gradient is not finite: it
        updated nothing, and the checkpoints are unchanged

    Before any other error after the first step, the run is saved.
    """
    given, world = given or {}, join()
    with world.guard(LostModel), ExitStack() as stack:
        run, settings, batches, val_tokens = _prepare(
            *(data, out, given, resume, overwrite, held), world, stack
        )
        stack.push(run.close)
        finished = run.step == settings.max_iters and not run.entry
        if run.step < settings.max_iters:
            report(_describe(run, settings, batches))
        windows = settings.batch_size, settings.block_size, settings.eval_iters

        def evaluation(check: Check | None) -> dict[str, float]:
            return {"val_loss": evaluate(run.model, val_tokens, *windows, check, world)}

        with interruptible(world) as stop:
            result = train_run(run, lambda: _learn(run, settings, batches), evaluation, stop)
        if world.rank == 0 and not (finished and (out / RESULT_FILE).exists()):
            run.finish("train", _figures(out, result))
        return result


def _figures(out: Path, result: TrainResult) -> dict[str, Any]:
    """Return the figures of a run for result.json, under the names of fine-tuning's."""
    names = ("step", "max_iters", "skipped", "seconds", "interrupted")
    after = {} if math.isnan(result.val_loss) else {"val_loss": result.val_loss}
    return {"out": str(out), **{name: getattr(result, name) for name in names}, "after": after}


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
    _fitting_backend(settings, config, 0, settings.threads)  # there are no tokens yet
    with atomic.claimed(out, overwrite), locked_run(out):
        check_save(out, config.num_parameters(), overwrite)
        yield


def _fitting_backend(
    settings: TrainSettings,
    config: ModelConfig,
    order_bytes: int,
    threads: int,
    resumed: bool = False,
    world: World = ALONE,
) -> Any:
    """Return the backend of a run; refuse a run for which a package or memory is missing."""
    if settings.tensorboard:
        check_tensorboard()
    backend = get_backend(settings.backend, threads or None)
    check_training(config, settings, backend, order_bytes, resumed, world.size, world.memory)
    return backend


def _prepare(
    data: Path,
    out: Path,
    given: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    held: bool,
    world: World,
    stack: ExitStack,
) -> tuple[Run, TrainSettings, Batches, Shards]:
    """Check the arguments and files before anything is written, then open the run.

    Rank 0 alone looks at the run's directory. An error of any rank ends all.
    """
    record: dict[str, Any] | None = None
    with world.agreement():
        if resume and overwrite:
            raise ValueError(
                f"--resume continues the run in {out} and --overwrite removes it: pass one of them"
            )
        if world.rank == 0 and not resume:
            atomic.check_apart(out, data)
        elif world.rank == 0:
            stack.enter_context(locked_run(out))
            record = read_record(out)
    record = world.first(record)
    with world.agreement():
        run, settings, found, batches, val_tokens = _checked(
            *(data, out, given, record, world), stack
        )
    check_ranks(run)
    with world.agreement(), run.leading() as leads:
        if leads:
            open_run(run, record, found, overwrite, held, stack)
    run.share()
    run.tokens = run.step * settings.tokens_per_step  # older runs did not store it
    return run, settings, batches, val_tokens


def _checked(
    data: Path,
    out: Path,
    given: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    world: World,
    stack: ExitStack,
) -> tuple[Run, TrainSettings, Checkpoint | None, Batches, Shards]:
    """Check the arguments and files; return the run, not yet opened, and its checkpoint."""
    if record is None:
        settings = TrainSettings(**given)
    else:
        settings = resumed(TrainSettings, record["settings"], given, str(out / RUN_FILE))
        _tell_older(record["settings"], settings, out)
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data} is not a directory of token files; gpt2c prepare makes one"
        )
    if not (out.is_dir() and out.samefile(data)):
        refusal = f"another process prepares {data}: wait for it, or name another directory"
        stack.enter_context(atomic.locked(data, refusal, shared=True))
    tokenizer = Tokenizer.from_pretrained(data)
    if record is not None and world.rank == 0:
        _check_tokenizer(tokenizer, data, out)
    vocabulary = tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.token_lengths
    tokens = read_shards(data, "train", *vocabulary)
    val_tokens = read_shards(data, "val", *vocabulary)
    fingerprint = {"train": checksums(tokens), "val": checksums(val_tokens)}
    if record is not None and record["data"] != fingerprint:
        raise ValueError(
            f"{data} does not hold the training and validation tokens of the run {out}, whose"
            f" fingerprint is in {RUN_FILE}: continue with those"
        )
    batches = Batches(
        tokens, settings.batch_size, settings.block_size, settings.seed, settings.batch_order
    )
    config = settings.model_config(tokenizer.vocab_size, tokenizer.eot)
    found = None
    if record is not None and world.rank == 0:
        found = newest_checkpoint(out, record, config)
    _check_shares(settings, world)
    world.timeout = settings.mpi_timeout
    threads = world.take_cores(settings.threads)
    backend = _fitting_backend(
        *(settings, config, batches.order_bytes, threads, record is not None, world)
    )
    # Rank 0 gives the others its weights.
    seed = settings.seed if found is None and world.rank == 0 else None
    kind: type[CausalLM] = MODELS[type(config)]
    precision = settings.precision
    if precision == "auto" and record is not None and record["backend"] == backend.name:
        precision = record.get("precision", precision)  # measured anew it could change the bits
    model = kind(config, seed, backend, settings.recomputation, precision=precision)
    optimizer, exchange = optimizer_of(
        world,
        model,
        settings.zero,
        settings.transport,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    facts = {
        "settings": dataclasses.asdict(settings),
        "data": fingerprint,
        "bytes_per_token": {"train": _token_size(tokens), "val": _token_size(val_tokens)},
    }
    run = Run(out, settings, model, optimizer, tokenizer, facts, world=world, exchange=exchange)
    return run, settings, found, batches, val_tokens


def _check_shares(settings: TrainSettings, world: World) -> None:
    """Refuse ranks that cannot have the same number of windows in a step."""
    if settings.windows_per_step % world.size:
        raise ValueError(
            f"a step has {settings.windows_per_step} windows, batch_size {settings.batch_size} x"
            f" gradient_accumulation_steps {settings.gradient_accumulation_steps}, which"
            f" {world.size} ranks cannot share equally: start a number of ranks that divides it"
        )


def _describe(run: Run, settings: TrainSettings, batches: Batches) -> str:
    """Return a description of the run, with settings that may be mistakes."""
    config, model = run.model.config, run.model
    products = "" if settings.precision == "fp32" else f", products in {model.precision}"
    if model.precision not in fast_precisions(model.backend.name):
        others = [name for name in backends() if model.precision in fast_precisions(name)]
        who = f"--backend {others[0]} has" if others else "this CPU has no"
        products += f" (slow: {who} instructions for them)"
    text = (
        f"{config.num_parameters():,} parameters, backend {model.backend.name}{products};"
        f" {settings.max_iters:,} steps of {settings.tokens_per_step:,} tokens; an epoch is"
        f" {batches.targets_per_epoch:,} tokens"
    )
    if batches.left_out:
        text += (
            f"; {batches.left_out} of {len(batches.shards)} shards have fewer than block_size + 1 ="
            f" {settings.block_size + 1:,} tokens and are left out"
        )
    if settings.warmup_iters >= settings.max_iters > 1:
        text += f"; the learning rate rises to the end: warmup_iters is {settings.warmup_iters:,}"
    return text + run.world.report


def _token_size(tokens: Sequence[StoredTokens]) -> float:
    """Return the mean number of bytes of a token."""
    return sum(shard.text_bytes for shard in tokens) / sum(map(len, tokens))


def _learn(run: Run, settings: TrainSettings, batches: Batches) -> Learned:
    """Compute the next step's loss and gradients, those of this rank's windows.

    The windows of a step are dealt to the ranks in order. Each rank takes them in batches of at
    most batch_size, which count by their share of all windows.
    """
    model, world, exchange = run.model, run.world, run.exchange
    windows = settings.windows_per_step
    own = windows // world.size
    count = -(-own // settings.batch_size)
    ends = [own * (micro + 1) // count for micro in range(count)]
    model.zero_grad()
    loss, flops, first = 0.0, model.config.flops_per_token(settings.block_size), 0
    for end in ends:
        place, rows = world.rank * own + first, end - first
        x, y = batches.windows(run.step * windows + place, rows)
        dropout = dropout_of(settings, run.step, place * settings.block_size)
        loss += model.loss(x, y, dropout=dropout) / (windows / rows)
        if not math.isfinite(loss) and exchange is None:  # other ranks wait for gradients
            break
        final = exchange.send if exchange is not None and end == own else None
        model.backward(scale=1 / (windows / rows), final=final)
        first = end
    if exchange is not None:
        exchange.finish()
    tokens = settings.tokens_per_step
    return Learned(world.sum([loss])[0], tokens, flops=flops * tokens)


def _check_tokenizer(tokenizer: Tokenizer, data: Path, out: Path) -> None:
    """Refuse data of another tokenizer, whose vocabulary may have the same size."""
    try:
        own = Tokenizer.from_pretrained(out)
    except FileNotFoundError:  # after a kill at its start; the run will write these files
        return
    if own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{data} has another tokenizer than the run {out}: continue with the data that it"
            " was trained on"
        )


def _tell_older(stored: Mapping[str, Any], settings: TrainSettings, out: Path) -> None:
    """Report the settings that a run of another version lacks."""
    lacking = [name for name in settings.older() if name not in stored]
    if lacking:
        taken = ", ".join(f"{name}={getattr(settings, name)}" for name in lacking)
        report(f"{out / RUN_FILE} is another version's; settings that it lacks become {taken}")
