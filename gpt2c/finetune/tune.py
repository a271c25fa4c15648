"""The frame of fine-tuning: a base model and examples -> a run's directory, whatever the method.

A run can be killed at any moment, and continues with resume=True, to the bit, as in pretraining:
each step is a function of its number, the settings, the examples, and the weights and moments
before it.

On several ranks of MPI each has a share of a step's examples. Their gradients are summed here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpt2c.causal_lm import CausalLM
from gpt2c.files.atomic import check_apart, claimed
from gpt2c.files.names import CHECKPOINTS, EVENTS, METRICS_FILE, ROLLOUTS, RUN_FILE
from gpt2c.files.untrusted import shown
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.formats.load import AnyConfig, Pretrained, find_model
from gpt2c.formats.peft import digest
from gpt2c.kernels.backend import Backend, as_precision, get_backend
from gpt2c.kernels.checks import counted
from gpt2c.kernels.memory import require
from gpt2c.model.first_values import first_values
from gpt2c.model.parameters import Tensor, check_shapes, names_that_fit
from gpt2c.model.plan import parts_needed
from gpt2c.parallel.world import World, join
from gpt2c.pretrained import MODELS
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.checkpoints import Checkpoint
from gpt2c.train.directory import (
    copy_model,
    locked_run,
    newest_checkpoint,
    read_record,
    report,
)
from gpt2c.train.hooks import Learned, evaluated
from gpt2c.train.loop import train_run
from gpt2c.train.metrics import read_before, read_metrics
from gpt2c.train.needs import on_ranks, with_scratch
from gpt2c.train.run import LostModel, Run, check_ranks, open_run
from gpt2c.train.settings import resumed
from gpt2c.train.sharded import optimizer_of
from gpt2c.train.stop import Check, StoppedError, interruptible
from gpt2c.train.tensorboard import check_tensorboard

__all__ = ["Base", "Method", "Result", "checksum", "tune"]

SMALL = 20_000_000  # parameters: below it the default learning rate teaches next to nothing
LORA_RATE = 10  # adapters' learning rate: this times a whole model's
S = TypeVar("S", bound=FinetuneSettings)


class Base(NamedTuple):
    """What a run begins with.

    Attributes
    ----------
    found : the model on disk
    tokenizer : its tokenizer
    """

    found: Pretrained
    tokenizer: Tokenizer


class Method(ABC):
    """A way of fine-tuning; tune() calls these in this order.

    Attributes
    ----------
    verb : its command
    shown : the metrics that the progress shows beside the loss
    drawn : further metrics of evaluations, which pictures show
    unit : of the loss of an evaluation
    examples : the number of examples of an epoch
    longest : tokens of the longest example
    tokenizer : of the base, which the run's directory gets, too
    facts : identify the examples, in run.json
    models : role -> checksum of each other model that the run reads, in run.json
    """

    verb: str
    shown: tuple[str, ...]
    drawn: tuple[str, ...] = ()
    unit: str
    examples: int
    longest: int
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    models: Mapping[str, str] = MappingProxyType({})

    def config(self, base: AnyConfig) -> AnyConfig:
        """Return the config of the model that is trained."""
        return base

    @property
    def loss(self) -> str:
        """The label of the losses in pictures."""
        unit = f", {self.unit.replace('/', ' per ')}" if self.unit else ""
        return f"loss{unit} (lower is better)"

    @abstractmethod
    def lines(self) -> Iterable[str]:
        """Yield the lines of the report before the first step: what is learned from."""

    def begin(self, run: Run) -> None:
        """Prepare for the steps, for instance by further files in the run's directory."""
        return

    @abstractmethod
    def learn(self, run: Run) -> Learned:
        """Compute the gradients of step `run.step` into the run's model.

        They are those of this rank's examples, `run.world.share` of the step's, divided by counts
        of the whole step. Loss, tokens and metrics are of the whole step: `run.world.sum`. The
        share is read in `run.parts`, and each backward pass gets `run.final`; `run.send` is called
        where there is none.
        """

    def publish(self, checkpoint: Path, out: Path) -> None:
        """Write the model of a checkpoint to the run's directory."""
        copy_model(checkpoint, out)

    @abstractmethod
    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        """Return figures of the present weights on the examples held out; "val_loss" is one.

        All ranks return the same; they may take turns: `run.world.turns`.
        """


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run of fine-tuning; result.json in its directory holds the same.

    Attributes
    ----------
    out : the directory: a model that `gpt2c.from_pretrained` and transformers open
    step, max_iters : steps done, and steps of the whole run
    skipped : steps without an update
    seconds : time of this call
    step_seconds : time spent in steps, of all calls that went on with the run
    before, after : figures of the evaluations, of the base model and of the last step
    interrupted : whether a signal ended the run early
    """

    out: Path
    step: int
    max_iters: int
    skipped: int
    seconds: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    interrupted: bool
    step_seconds: float = 0.0


def tune(
    verb: str,
    kind: type[S],
    make: Callable[[Base, S], Method],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    given: Mapping[str, Any],
    resume: bool = False,
    overwrite: bool = False,
    reads: Sequence[object] = (),
) -> Result:
    """Fine-tune a base model into a run's directory.

    Parameters
    ----------
    verb : the command, which run.json records
    kind : the class of its settings
    make : reads the examples and returns the method
    base : a directory of a model with its tokenizer, or a name on the hub
    out : the directory of the run
    given : settings that differ from the defaults or, with `resume`, from the run's own
    resume : continue from the newest whole checkpoint in `out`
    overwrite : `out` may exist and hold files
    reads : the files and models beside the base that are read; none may be in `out` of a new run

    Raises
    ------
    OSError, ValueError, MemoryError : see `gpt2c.train.pretrain.train`; the base or an example is
        not as it must be, and nothing was written
    """
    began, out, world = time.monotonic(), Path(out), join()
    with world.guard(LostModel), ExitStack() as stack:
        record: dict[str, Any] | None = None
        with world.agreement():
            if resume and overwrite:
                raise ValueError(
                    f"--resume continues the run in {out} and --overwrite removes it: pass one of"
                    " them"
                )
            if world.rank == 0 and not resume:
                check_apart(out, base, *reads)
            elif world.rank == 0:
                stack.enter_context(locked_run(out))
                record = read_record(out, verb)
        record = world.first(record)
        with world.agreement():
            run, method, zeros, found = _checked(verb, kind, make, base, out, given, record, world)
        stack.push(run.close)
        check_ranks(run)
        with world.agreement(), run.leading() as leads:
            if leads and record is None:
                stack.enter_context(claimed(out, overwrite))
                stack.enter_context(locked_run(out))
            if leads:
                open_run(run, record, found, overwrite, held=True, stack=stack)
        run.share()
        if world.rank == 0 and not resume:
            stack.enter_context(_cleared(run))
        before: Mapping[str, float] = {}
        after: dict[str, float] = {}

        def evaluation(check: Check | None) -> Mapping[str, float]:
            after.clear()
            after.update(method.evaluate(run, check))
            return after

        def learn() -> Learned:
            learned = method.learn(run)
            if run.exchange is not None:
                run.exchange.finish()
            if zeros is not None:  # in the sums, because ranks have sent gradients already
                np.copyto(run.model.flat_gradients[: zeros.size], 0, where=zeros)
            return learned

        with interruptible(world) as stop:
            if resume:
                before = world.by_first(lambda: read_before(out))
                after |= world.by_first(lambda: _evaluation(out, run.settings.max_iters))
                report(_continues(run, record, given))
            if run.step < run.settings.max_iters:
                told = [_adapter_lines(run), _rank_lines(run)]
                told += [] if resume else [_rate_lines(run, given)]
                for line in chain(method.lines(), *told):
                    report(line)
            if not run.step:
                try:
                    before = method.evaluate(run, stop.check)
                except StoppedError:
                    return Result(out, 0, run.settings.max_iters, 0, 0.0, {}, {}, True)
                report(f"before: {evaluated(before, method.unit, method.shown)}")
                if world.rank == 0:
                    run.finish(verb, {"before": before})
            method.begin(run)
            done = train_run(run, learn, evaluation, stop, method.shown, method.unit)
        result = Result(
            *(out, run.step, run.settings.max_iters, run.skipped, time.monotonic() - began),
            *(before, {} if done.interrupted else after, done.interrupted, run.seconds),
        )
        if world.rank == 0:
            run.finish(verb, dataclasses.asdict(result) | {"out": str(out)})
        return result


@contextmanager
def _cleared(run: Run) -> Iterator[None]:
    """Remove what a new run has written if it is refused before its first step."""
    try:
        yield
    except (ValueError, MemoryError):
        if not run.step:
            run.clear()
            for directory in (CHECKPOINTS, ROLLOUTS, EVENTS):
                with suppress(OSError):
                    (run.out / directory).rmdir()
        raise


def _adapter_lines(run: Run) -> Iterable[str]:
    """Yield what is trained, if it is not the whole model."""
    model = run.model
    if model.config.lora is not None:
        trained = sum(model.parameters[name].size for name in model.trained)
        share = trained / model.config.num_parameters()
        held = "" if model.weights == "fp32" else f", beside weights of {model.weights}"
        yield (
            f"adapters of rank {model.config.lora.r}: {trained:,} numbers are trained, {share:.2%}"
            f" of the model{held}; the learning rate is {run.settings.learning_rate:g}, usually"
            f" {LORA_RATE} times that of a whole model"
        )


def _continues(run: Run, record: Mapping[str, Any] | None, given: Mapping[str, Any]) -> str:
    """Return where a run continues, and with which new settings; or that they have no effect."""
    stored = record["settings"] if record else {}
    new = ", ".join(f"{name}={value}" for name, value in given.items() if stored.get(name) != value)
    if run.step < run.settings.max_iters or run.entry:
        told = f", now with {new}" if new else ""
        return f"the run continues after step {run.step} of {run.settings.max_iters}{told}"
    told = f", so {new} has no effect" if new else ""
    return (
        f"the run is already finished after {run.step} steps{told}: raise max_iters to train"
        " further"
    )


def _rate_lines(run: Run, given: Mapping[str, Any]) -> Iterable[str]:
    """Yield a line about the default learning rate if the model is small."""
    size = run.model.config.num_parameters()
    if "learning_rate" not in given and size < SMALL:
        small = run.settings.fields()["learning_rate"].metadata["small"]
        yield (
            f"the learning rate is the default, {run.settings.learning_rate:g}, which fits 124"
            f" million parameters, and the model has {size / 1e6:.3g}: small models take about"
            f" {small:g}"
        )


def _rank_lines(run: Run) -> Iterable[str]:
    """Yield the ranks, if there are several."""
    if run.world.report:
        yield run.world.report.removeprefix("; ")


def _checked(
    verb: str,
    kind: type[S],
    make: Callable[[Base, S], Method],
    base: str | os.PathLike[str],
    out: Path,
    given: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    world: World,
) -> tuple[Run, Method, NDArray[np.bool_] | None, Checkpoint | None]:
    """Check the arguments and files; return the run, not yet opened, and its checkpoint.

    With keep_zeros, the third of the result is where the base's matrices are 0. Without gradients
    AdamW leaves a 0 as it is, whatever its decay.
    """
    kind.check_names(given)
    if record is None:
        settings = kind(**given)
        if settings.lora and "learning_rate" not in given:
            rate = LORA_RATE * settings.learning_rate
            settings = dataclasses.replace(settings, learning_rate=rate)
    else:
        settings = resumed(kind, record["settings"], given, str(out / RUN_FILE))
    if settings.tensorboard:
        check_tensorboard()
    if settings.batch_size < world.size:
        raise ValueError(
            f"a step has {counted(settings.batch_size, 'example')} (batch_size), which {world.size}"
            " ranks cannot share: start fewer ranks"
        )
    world.timeout = settings.mpi_timeout
    threads = world.take_cores(settings.threads)
    found = find_model(base)
    if found.weights != "fp32":
        raise ValueError(f"{base} has {found.weights} weights: only fp32 weights are trained")
    if found.config.lora is not None:
        raise ValueError(f"{base} holds adapters: make one model with gpt2c merge, and train that")
    check_shapes(found.config.parameter_shapes(), found.tensors, found.source)
    if settings.random_weights:
        found = dataclasses.replace(found, tensors={})
    tokenizer = Tokenizer.from_pretrained(found.path)
    tokenizer.unused_ids(found.config.vocab_size)  # refuses one with more tokens than the model
    method = make(Base(found, tokenizer), dataclasses.replace(settings, threads=threads))
    planned = settings.planned(method.examples)
    config = dataclasses.replace(method.config(found.config), lora=settings.adapters)
    checkpoint = None
    if record is not None and world.rank == 0:
        checkpoint = newest_checkpoint(out, record, config)
    backend = get_backend(settings.backend, threads or None)
    tokens = max(method.longest, min(settings.batch_tokens, method.longest * settings.batch_size))
    weights = "fp32" if settings.quantize == "none" else settings.quantize
    precision = as_precision(settings.precision, backend)
    frozen = config.frozen()
    if settings.freeze:
        frozen |= names_that_fit(config.parameter_shapes(), settings.freeze.split(","))
    parts = parts_needed(config, 1, tokens, settings.recomputation, precision, weights, frozen)
    needs = with_scratch(
        on_ranks(parts, world.size, settings.zero),
        *(config, backend, tokens),
        row=tokens,
        precision=precision,
        divided=method.longest * settings.batch_size > settings.batch_tokens
        and config.stack().head.weight not in frozen,
    )
    mend = "lower --batch-tokens or --max-length, or pass --recompute full"
    require("fine-tuning", needs, mend, world.memory)
    model = _open(found, config, settings, backend)
    facts = {
        "verb": verb,
        "settings": dataclasses.asdict(settings),
        "data": method.facts,
        "picture": {"loss": method.loss, "metrics": [*method.shown, *method.drawn]},
        "models": dict(method.models),
        "base": {
            "path": os.fspath(base),
            "sha256": digest(model.parameters, config.frozen())
            if settings.lora
            else checksum(model),
        },
    }
    if record is not None:
        _check_same(out, record, facts)
    if settings.freeze:
        model.freeze(*settings.freeze.split(","))
    zeros = model.flat_parameters[: model.decay_size] == 0 if settings.keep_zeros else None
    optimizer, exchange = optimizer_of(
        world,
        model,
        settings.zero,
        settings.transport,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    of_model = planned, model, optimizer, method.tokenizer
    run = Run(out, *of_model, facts, method.publish, world, exchange)
    return run, method, zeros, checkpoint


def _open(
    found: Pretrained, config: AnyConfig, settings: FinetuneSettings, backend: Backend
) -> CausalLM:
    """Return the base's model with the config of the method; what only this has is random."""
    own = config.parameter_shapes()
    tensors = {
        name: _grown(tensor, own[name]) for name, tensor in found.tensors.items() if name in own
    }
    fresh = first_values(config, settings.seed, own.keys() - tensors)
    found = dataclasses.replace(found, config=config, tensors={**tensors, **fresh})
    return MODELS[type(config)].from_found(
        *(found, backend, None, None if settings.quantize == "none" else settings.quantize),
        *(settings.recomputation, settings.precision),
    )


def checksum(model: CausalLM) -> str:
    """Return what identifies a model's weights."""
    return hashlib.sha256(model.flat_parameters.data).hexdigest()


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a table with as many rows as the config has: the further ones are 0."""
    if len(shape) != 2 or tensor.shape[1:] != shape[1:] or tensor.shape[0] >= shape[0]:
        return tensor
    more = np.zeros((shape[0] - tensor.shape[0], shape[1]), np.float32)
    return np.concatenate([np.asarray(tensor), more])


def _check_same(out: Path, record: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to continue with other examples, another base, or another model beside it."""
    if record.get("data") != facts["data"]:
        raise ValueError(
            f"the examples are not those of the run {out}, whose fingerprint is in {RUN_FILE}:"
            " continue with those"
        )
    stored = record.get("base")
    if not isinstance(stored, dict) or stored.get("sha256") != facts["base"]["sha256"]:
        path = shown(stored.get("path")) if isinstance(stored, dict) else "another one"
        raise ValueError(f"the base has other weights than that of the run {out}, {path}")
    others = record.get("models")
    for role, sha256 in facts["models"].items():
        if not isinstance(others, dict) or others.get(role) != sha256:
            raise ValueError(f"the {role} has other weights than that of the run {out}")


def _evaluation(out: Path, step: int) -> dict[str, float]:
    """Return the figures of an evaluated step, which metrics.jsonl has before result.json."""
    steps: list[dict[str, Any]] = []
    with suppress(OSError):
        steps = read_metrics(out / METRICS_FILE)
    return {
        name: math.nan if value is None else value
        for entry in steps
        if entry["step"] == step
        for name, value in entry.items()
        if name.startswith("val_")
    }
