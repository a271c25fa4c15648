"""A run's directory: the files that training writes, and resumes from after a kill at any moment.

    run.json                          settings, config and a fingerprint of the data, before step 1
    checkpoints/00000040/             see checkpoints.py
    config.json, model.safetensors    copies of the newest checkpoint's; with the tokenizer's files
                                      they are a model that transformers can load
    metrics.jsonl, tensorboard/       see metrics and tensorboard
    result.json                       the figures that the run ended with

Knows nothing about batches or schedules, and of losses only whether the weights gave a finite one.
Computes nothing.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from gpt2c.causal_lm import CausalLM
from gpt2c.files import atomic
from gpt2c.files.atomic import atomic_path, check_link, matching, remove, remove_leftovers, through
from gpt2c.files.names import (
    ADAPTER_FILES,
    CHECKPOINTS,
    CONFUSION_FILE,
    DAMAGED_FILE,
    EVENTS,
    LOSS_FILE,
    METRICS_FILE,
    MODEL_FILES,
    MOMENTS_FILE,
    REFERENCE_FILE,
    RESULT_FILE,
    ROLLOUTS,
    RUN_FILE,
    RUNS_FILE,
    TOKENIZER_FILES,
    TOKENIZER_OTHERS,
    WEIGHTS_FILE,
)
from gpt2c.files.untrusted import read_json, shown
from gpt2c.formats import peft
from gpt2c.formats.load import config_of
from gpt2c.kernels.checks import counted
from gpt2c.model.config import ModelConfig
from gpt2c.parallel.gradients import Exchange
from gpt2c.parallel.same import check_same
from gpt2c.parallel.world import ALONE, Ranks, World
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train import checkpoints, tensorboard
from gpt2c.train.checkpoints import Checkpoint, TrainerState
from gpt2c.train.metrics import Metrics, read_metrics
from gpt2c.train.optimizer import AdamW
from gpt2c.train.settings import Settings
from gpt2c.train.sharded import ShardedAdamW
from gpt2c.train.tensorboard import Events

__all__ = [
    "LOCAL",
    "LostModel",
    "Run",
    "check_config",
    "check_never_saved",
    "check_ranks",
    "check_save",
    "copy_model",
    "locked_run",
    "newest_checkpoint",
    "open_run",
    "read_record",
    "report",
    "write_result",
]

T = TypeVar("T")
VERSION = 1
LOCAL = ("backend", "threads")  # settings that may differ from machine to machine
# What a run writes at the top of its directory.
_FILES = (RUN_FILE, *MODEL_FILES, *ADAPTER_FILES, *TOKENIZER_FILES, REFERENCE_FILE)
_LOGS = (METRICS_FILE, DAMAGED_FILE, LOSS_FILE, RUNS_FILE, RESULT_FILE, CONFUSION_FILE)


def locked_run(out: Path) -> AbstractContextManager[None]:
    """Lock a run's directory for this process; see `atomic.locked`.

    Raises
    ------
    FileNotFoundError : there is no such directory
    BlockingIOError : another process trains into it
    """
    if not out.is_dir():
        check_link(out)
        raise FileNotFoundError(f"{out} is not a directory, so it holds no run that can go on")
    return atomic.locked(
        out, f"another process is training into {out}: wait for it, or name another directory"
    )


def report(line: str) -> None:
    """Print a line about a run; if it cannot be printed, the work goes on."""
    with suppress(OSError, ValueError):  # a closed terminal, pipe or file; a full disk
        print(line, flush=True)


class LostModel(ValueError):
    """Weights, moments, or a loss or gradient from them, are not finite: they are not kept."""


def read_record(out: Path, verb: str = "train") -> dict[str, Any]:
    """Read the run.json of a run that `gpt2c verb` began.

    Raises
    ------
    OSError : it is missing or unreadable
    ValueError : it is damaged, or of another version or verb
    """
    path = out / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {out} holds no run that can go on")
    record = read_json(path)
    version = record.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {shown(version)}")
    began = record.get("verb", "train")
    if began != verb:
        raise ValueError(f"{path}: gpt2c {shown(began)[1:-1]} began this run, so go on with that")
    for name in ("settings", "config", "data", "backend", "threads"):
        if name not in record:
            raise ValueError(f"{path} lacks {name}")
    return record


def check_save(out: Path, parameters: int, overwrite: bool) -> None:
    """Check that a run's existing directory can take a save, before hours of work depend on it.

    Raises
    ------
    OSError : its files cannot be written: a link to nothing, no permission, or less room on the
        disk than a checkpoint of `parameters` parameters and a copy of its weights need
    """
    directory = out / CHECKPOINTS
    check_link(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; it must be the directory of checkpoints")
    place = directory if directory.is_dir() else out  # where it will be made
    homes = [path.parent for path in atomic.places(*(out / name for name in _FILES))]
    for parent in dict.fromkeys((out, place, *homes)):
        trial = atomic.temporary_path(parent / "trial")
        try:
            with atomic.naming(parent, {trial: parent}):
                trial.mkdir(exist_ok=True)
                (trial / "file").write_bytes(b"can be written")
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    # The checkpoints of an overwritten run are removed first.
    left = sum(path.lstat().st_size for path in directory.glob("*/*")) if overwrite else 0
    copy = through(out / WEIGHTS_FILE).parent
    weights = 4 * parameters
    checkpoint = weights + AdamW.state_bytes(parameters)
    wanted = {place: checkpoint, copy: weights}
    if os.stat(copy).st_dev == os.stat(place).st_dev:
        wanted = {place: checkpoint + weights}
    for parent, size in wanted.items():
        disk = shutil.disk_usage(parent)
        if disk.total and disk.free + left < size:  # some file systems report 0 for all
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint needs {size:,} bytes and {disk.free + left:,} are free: make room,"
                " or name another directory",
                str(parent),
            )


def check_never_saved(out: Path) -> None:
    """Refuse to begin a run again if it had checkpoints and none was found.

    Raises
    ------
    FileNotFoundError : the run had a checkpoint
    """
    steps = 0
    with suppress(OSError):
        steps = len(read_metrics(out / METRICS_FILE))
    # A run killed before its first save has an empty directory of checkpoints and no model.
    saved = any((out / name).exists() for name in (WEIGHTS_FILE, ADAPTER_FILES[1]))
    if saved or (steps and not (out / CHECKPOINTS).is_dir()):
        raise FileNotFoundError(
            f"{out} has done {steps:,} steps, but {out / CHECKPOINTS} holds no checkpoint to go on"
            " from: put it back, or begin the run again with --overwrite"
        )
    if steps:
        report(f"{out} had no checkpoint yet: it begins again with its first step")


def check_config(source: Path, entries: Any, config: ModelConfig) -> None:
    """Refuse a run of another model before the model is built.

    Raises
    ------
    ValueError : `entries`, from the file `source`, are not those of `config`
    """
    try:
        found = config_of(entries) if isinstance(entries, dict) else None
    except ValueError as error:
        raise ValueError(f"{source}: its config is invalid: {error}") from None
    own, wanted = _fields(found), _fields(dataclasses.replace(config, lora=None))  # type: ignore[type-var]
    for name, value in wanted.items():
        if own.get(name) != value:
            raise ValueError(
                f"{source} holds a model of another config: its {name} is {shown(own.get(name))},"
                f" and what the run is given now makes it {shown(value)}"
            )


def _fields(config: ModelConfig | None) -> dict[str, Any]:
    """Return the kind and the fields of a config, {} of none."""
    if config is None:
        return {}
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return {name: getattr(config, name) for name in ("model_type", *names)}


def newest_checkpoint(
    out: Path, record: Mapping[str, Any], config: ModelConfig
) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run that goes on; None if it begins again.

    Raises
    ------
    OSError, ValueError : see `checkpoints.newest`, `check_config` and `check_never_saved`
    """
    check_config(out / RUN_FILE, record["config"], config)
    check_link(out / CHECKPOINTS)
    found = checkpoints.newest(out / CHECKPOINTS, report)
    if found is None:
        check_never_saved(out)
    elif found.adapters is not None:
        lora, _ = peft.adapters_of(found.adapters, config)
        if lora != config.lora:
            raise ValueError(f"{found.path} holds {lora}; its settings give {config.lora}")
    else:
        check_config(found.path, found.config, config)
    return found


def check_ranks(run: Run) -> None:
    """Refuse ranks that would train something else; report other backends. Collective.

    Raises
    ------
    ValueError : settings, data, a model or the version differ
    """
    facts, backend = run.facts, [run.model.backend.name, run.model.precision]
    own = {
        "gpt2c": importlib.metadata.version("gpt2c"),
        "settings": dataclasses.asdict(run.settings),
        "data": facts["data"],
        "models": {
            **({"base": facts["base"]["sha256"]} if "base" in facts else {}),
            **facts.get("models", {}),
        },
    }
    check_same(run.world, own, {*LOCAL})
    for rank, other in enumerate(run.world.all(backend)):
        if other != backend:
            report(
                f"rank {rank} computes with {' in '.join(other)} and rank 0 with"
                f" {' in '.join(backend)}: the result will not be bit-for-bit that of one of them"
            )


def open_run(
    run: Run,
    record: Mapping[str, Any] | None,
    found: Checkpoint | None,
    overwrite: bool,
    held: bool,
    stack: ExitStack,
) -> None:
    """Begin a run's directory, or continue from the checkpoint `found`.

    Parameters
    ----------
    record : of run.json, None for a new run
    overwrite : a new run's directory may hold files
    held : the directory is claimed and locked already, as that of a run that goes on is locked
    stack : holds the lock

    Raises
    ------
    OSError, ValueError : see `claim_directory`, `check_save` and `Run.restore`
    """
    config = run.model.config
    parameters = run.model.trained_size if config.lora else config.num_parameters()
    if record is None:
        if not held:
            atomic.claim_directory(run.out, overwrite)
            stack.enter_context(locked_run(run.out))
        check_save(run.out, parameters, overwrite)
        run.start()
    else:
        if found is None or found.state.step < run.settings.max_iters or found.state.entry:
            check_save(run.out, parameters, overwrite)
        run.restore(record, found)


def copy_model(checkpoint: Path, out: Path) -> None:
    """Copy the model of a checkpoint: a link would let other programs write into it."""
    for source in checkpoints.model_files(checkpoint):
        with atomic_path(out / source.name) as temporary:
            shutil.copyfile(source, temporary)


def write_result(out: Path, verb: str, entries: Mapping[str, Any]) -> None:
    """Write result.json; numbers that JSON lacks become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(entry) for name, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    version = {"gpt2c": importlib.metadata.version("gpt2c")}
    text = json.dumps(plain({"verb": verb, "versions": version, **entries}), indent=2)
    with atomic_path(out / RESULT_FILE) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


class Run:
    """A run of this process: its model, its optimizer and its locked directory.

    Parameters
    ----------
    out : the directory, locked by `locked_run`
    settings, model, optimizer, tokenizer : of the run
    facts : further entries of run.json: "settings" as a resumed run reads them, "data", and others
    publish : writes the model of a checkpoint to the top of the directory
    world : the ranks that train; the first one alone reads and writes the directory

    Attributes
    ----------
    exchange : of the gradients of several ranks; None in a world of one
    final : of the backward pass of a part of a step, see `parts`
    step, skipped : the number of steps done, and of those without an update
    tokens : the number of tokens in these steps
    seconds : time spent in steps
    val_loss : of the present weights; nan if they were not evaluated
    saved : the newest checkpoint, None before the first
    tried : when the last save was tried, by the monotonic clock
    good : the newest checkpoint whose weights gave a finite loss; only older ones are removed
    entry : the last step's metrics until they are logged, after a due evaluation; then None
    torn : whether an update began and did not end: then the weights belong to no step
    """

    def __init__(
        self,
        out: Path,
        settings: Settings,
        model: CausalLM,
        optimizer: AdamW,
        tokenizer: Tokenizer,
        facts: Mapping[str, Any],
        publish: Callable[[Path, Path], None] = copy_model,
        world: World = ALONE,
        exchange: Exchange | None = None,
    ) -> None:
        self.world, self.exchange = world, exchange
        self.final: Callable[[Iterable[str]], None] | None = None
        self._write_model = publish
        self.out, self.settings, self.model, self.optimizer = out, settings, model, optimizer
        self.tokenizer, self.facts = tokenizer, facts
        self.step = self.skipped = self.tokens = 0
        self.seconds = 0.0
        self.val_loss = math.nan
        self.saved: Path | None = None
        self.tried = time.monotonic()
        self.good: Path | None = None
        self.saved_step = -1
        self.entry: dict[str, Any] | None = None
        self.torn = False
        self._stored: TrainerState | None = None  # in the newest checkpoint
        self._published: Path | None = None
        self._metrics: Metrics | None = None
        self._events: Events | None = None
        self._told: set[str] = set()
        self._place: os.stat_result | None = None  # of the locked directory
        self._locks = ExitStack()  # of directories that were made again

    def start(self) -> None:
        """Begin the directory anew: remove an overwritten run's files, but keep links to files.

        run.json is removed first and written first: with it a run can go on, and without it old
        files cannot be mistaken for a run.
        """
        self.clear()
        self._open()

    def clear(self) -> None:
        """Remove the files of a run from the directory; other files stay."""
        for name in _FILES:
            through(self.out / name).unlink(missing_ok=True)
        # A reader may take another program's tokenizer in place of the run's.
        for path in matching(self.out, TOKENIZER_OTHERS):
            path.unlink()
        for name in _LOGS:
            with self._logging(self.out / name):
                through(self.out / name).unlink(missing_ok=True)
        if (self.out / CHECKPOINTS).is_dir():
            checkpoints.clear(self.out / CHECKPOINTS)
        tensorboard.clear(self.out / EVENTS)
        for path in (self.out / ROLLOUTS).glob("*.safetensors"):
            path.unlink()

    def restore(self, record: Mapping[str, Any], found: Checkpoint | None) -> None:
        """Continue from a checkpoint, or from the first step if there is none.

        Raises
        ------
        ValueError : the checkpoint's parameters or the optimizer's state are another model's
        """
        here = self._record()
        if record["backend"] != here["backend"]:  # the number of threads changes no bit
            report(
                f"{self.out} ran on {record['backend']} and continues on {here['backend']}: the"
                " result will not be bit-for-bit that of a run on one of them"
            )
        if found:
            if found.adapters is None:
                self.model.load_parameters(found.tensors, str(found.path))
            else:
                _, tensors = peft.adapters_of(found.adapters, self.model.config)
                self.model.load_adapters(tensors, found.adapters.source)
            state = found.state
            try:
                self.optimizer.load_state(found.optimizer, state.step - state.skipped)
            except ValueError as error:
                raise ValueError(f"{found.path / MOMENTS_FILE}: {error}") from None
            self.step, self.skipped, self.seconds = state.step, state.skipped, state.seconds
            self.tokens = state.tokens
            self.val_loss = math.nan if state.val_loss is None else state.val_loss
            self.entry = state.entry
            self.saved, self.saved_step, self._stored = found.path, state.step, state
            self.good = checkpoints.before(found.path)
        self._open()

    def _open(self) -> None:
        """Write the files that the directory lacks, and open the metrics."""
        self._place = os.stat(self.out)
        remove_leftovers(self.out)
        if not self.saved or self.entry or self.step < self.settings.max_iters:
            self._write_facts()  # a finished run keeps the settings that it was trained with
        (self.out / CHECKPOINTS).mkdir(exist_ok=True)
        remove_leftovers(self.out / CHECKPOINTS)
        if self.saved:
            remove_leftovers(self.saved)
        if self.saved and not self.entry:
            self._publish(self.saved)
            self._confirm_evaluated()
        self._open_logs()

    def _open_logs(self) -> None:
        path = self.out / METRICS_FILE
        with self._logging(path):
            self._metrics = Metrics(path, self.step - bool(self.entry), report)
        if self.settings.tensorboard:
            with self._logging(self.out / EVENTS):
                self._events = Events(self.out / EVENTS, read_metrics(path))

    def _write_facts(self) -> None:
        """Write the files that a resumed run needs beside its checkpoints."""
        with atomic_path(self.out / RUN_FILE) as temporary:
            text = json.dumps(self._record(), indent=2, allow_nan=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
        self.tokenizer.save_pretrained(self.out)

    def _check_own(self) -> None:
        """Refuse to write if the run's path no longer leads to the directory that it has locked.

        The lock keeps that directory open, so no other directory can have its inode number.

        Raises
        ------
        FileNotFoundError : the path leads nowhere
        OSError : the path leads to another directory
        """
        assert self._place is not None
        if not os.path.samestat(os.stat(self.out), self._place):
            raise OSError(
                errno.ESTALE,
                "this is another directory than the one this run began in: another run may have"
                " taken its name",
                str(self.out),
            )

    def _make_again(self) -> None:
        """Make and lock the directory again, whose path leads nowhere.

        Raises
        ------
        OSError : it cannot be made; another process was faster
        """
        self.out.mkdir(parents=True)
        self._locks.enter_context(locked_run(self.out))
        self._place = os.stat(self.out)

    def _fill_again(self) -> None:
        """Write the files of a directory that lost its run.json and perhaps its checkpoints."""
        self._write_facts()
        if self.saved and not self.saved.exists():
            self.saved = self.good = self._stored = None
            self.saved_step = -1
        self._published = None
        self._close_logs()
        self._open_logs()
        logged = self.step - bool(self.entry)
        report(
            f"{self.out} was removed, renamed or emptied while the run trained: it is made again,"
            f" and its metrics go on after step {logged}"
        )

    @contextmanager
    def _logging(self, path: Path) -> Iterator[None]:
        """Suppress the errors of a log, and report the first: a run does not stop for its logs."""
        try:
            yield
        except OSError as error:
            if path.name not in self._told:
                self._told.add(path.name)
                reason = error.strerror or error
                report(f"{path} cannot be written ({reason}): the run goes on without it")

    def _record(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            **self.facts,
            "config": self.model.config.to_dict(),
            "backend": self.model.backend.name,
            "threads": self.model.backend.threads,
            "precision": self.model.precision,
        }

    def parts(self, parts: Iterable[T]) -> Iterator[T]:
        """Yield the parts of this rank's share of a step.

        With the last one, `final` sends gradients to other ranks while backward goes on.
        """
        self.final, every = None, [*parts]
        for number, part in enumerate(every, 1):
            if self.exchange is not None and number == len(every):
                self.final = self.exchange.send
            yield part

    def log(self) -> None:
        """Write the last step's metrics, with the run's duration and the time of day.

        The files are open, so they are the run's own even after the directory was renamed.
        """
        entry = self.entry
        assert entry is not None
        entry |= {"elapsed_seconds": round(self.seconds, 4), "time": round(time.time(), 3)}
        if self._metrics:
            with self._logging(self.out / METRICS_FILE):
                self._metrics.append(entry)
        if self._events:
            with self._logging(self.out / EVENTS):
                self._events.append(entry)
        self.entry = None

    def share(self) -> None:
        """Give the other ranks the weights and counts with which rank 0 goes on."""
        if self.world.size == 1:
            return
        assert isinstance(self.world, Ranks)
        state = TrainerState(**self.world.first(dataclasses.asdict(self._state())))
        self.saved_step = self.world.first(self.saved_step)
        self.optimizer.steps = self.world.first(self.optimizer.steps)
        self.step, self.skipped, self.tokens = state.step, state.skipped, state.tokens
        self.seconds, self.entry = state.seconds, state.entry
        self.val_loss = math.nan if state.val_loss is None else state.val_loss
        self.world.broadcast(self.model.flat_parameters)

    @contextmanager
    def leading(self) -> Iterator[bool]:
        """Yield whether this rank is the first, which others serve with their moments within."""
        if not isinstance(self.optimizer, ShardedAdamW):
            yield True
        elif self.world.rank:
            self.optimizer.serve()
            yield False
        else:
            try:
                yield True
            finally:
                self.optimizer.release()

    def save(self) -> None:
        """Write a checkpoint, and copy its model to the top of the directory.

        While the step's evaluation is due, the model there stays. If the step is saved already,
        only the new parts are written: the result of its evaluation, and files that an earlier call
        could not write.

        Raises
        ------
        OSError : it cannot be written, and the last one is whole; or the run's path leads to
            another directory; on rank 0 alone
        """
        try:
            with self.leading() as leads:
                if leads:
                    self._save()
        finally:
            self.saved_step = self.world.first(self.saved_step)

    def _save(self) -> None:
        try:
            self._check_own()
        except FileNotFoundError:
            self._make_again()
        if not (self.out / RUN_FILE).exists():  # someone has deleted or moved it
            self._fill_again()
        state = self._state()
        if self.saved is None or self.step != self.saved_step:
            self._sync()
            self.saved = checkpoints.save(
                self.out / CHECKPOINTS,
                state,
                self.model.save_pretrained,
                self.optimizer.state(),
            )
            self.saved_step = self.step
        elif state != self._stored:
            self._sync()
            checkpoints.amend(self.saved, state)
        self._stored = state
        if not self.entry and self._published != self.saved:
            self.publish()

    def finish(self, verb: str, entries: Mapping[str, Any]) -> None:
        """Write result.json, see `write_result`."""
        with self._logging(self.out / RESULT_FILE):
            write_result(self.out, verb, entries)

    def forget(self) -> None:
        """Remove the checkpoint of this step, whose evaluation shows that the model is lost."""
        if self.saved and self.step == self.saved_step and self.saved != self.good:
            self._check_own()
            remove(self.saved)
            self.saved, self.saved_step = self.good, -1

    def publish(self) -> None:
        """Copy the model of the newest checkpoint to the top of the directory."""
        if self.saved:
            self._check_own()
            self._publish(self.saved)
            self._confirm_evaluated()
            if self._events:
                with self._logging(self.out / EVENTS):
                    self._events.flush()

    def _state(self) -> TrainerState:
        val_loss = None if math.isnan(self.val_loss) else self.val_loss
        return TrainerState(
            *(self.step, self.skipped, self.seconds, val_loss, self.entry), tokens=self.tokens
        )

    def _sync(self) -> None:
        """Wait until the metrics are on the disk, before the checkpoint of their step is."""
        if self._metrics:
            with self._logging(self.out / METRICS_FILE):
                self._metrics.sync()

    def confirm(self) -> None:
        """Mark the newest checkpoint as good, as its weights gave a finite loss; prune older ones.

        Finite weights may be lost too, so a save alone does not make a checkpoint good. The first
        loss after a save is that of the saved weights, as one that is not finite updates nothing.
        """
        if self.saved and self.saved != self.good:
            self.good = self.saved
            try:
                self._check_own()
                checkpoints.prune(self.good, self.settings.keep)
            except OSError as error:  # the newest is whole; the next call tries again to remove
                report(f"older checkpoints cannot be removed: {error}")

    def _confirm_evaluated(self) -> None:
        if not math.isnan(self.val_loss):
            self.confirm()

    def last_good(self) -> str:
        """Return where the last good checkpoint is, for an error message."""
        if self.saved is None:
            return "there is no checkpoint yet (--save-interval makes some)"
        if self.good is None:
            return f"there is no good checkpoint: {self.saved} gives no finite loss"
        if self.good != self.saved:
            return f"the last good checkpoint is {self.good} (delete {self.saved} to go on from it)"
        return f"the last good checkpoint is {self.good}"

    def newest(self) -> str:
        """Return where the newest checkpoint is, for the message of an error in writing."""
        if self.saved is None:
            return "there is no checkpoint yet"
        try:
            self._check_own()
        except OSError:
            return "the checkpoints are in the run's own directory, if that was only renamed"
        steps = counted(self.step - self.saved_step, "step")
        return f"the newest checkpoint is {self.saved}, {steps} ago"

    def _publish(self, checkpoint: Path) -> None:
        """Write the model of a checkpoint to the top of the directory."""
        self._write_model(checkpoint, self.out)
        self._published = checkpoint

    def close(self) -> None:
        """Close the files and the exchange."""
        if self.exchange is not None:
            self.exchange.close()
        self._close_logs()
        self._locks.close()

    def _close_logs(self) -> None:
        for log, name in ((self._metrics, METRICS_FILE), (self._events, EVENTS)):
            if log:
                with self._logging(self.out / name):
                    log.close()
        self._metrics = self._events = None
