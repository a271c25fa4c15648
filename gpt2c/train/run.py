"""A run of this process: it writes its directory (directory.py), and continues from what is there.

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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gpt2c.causal_lm import CausalLM
from gpt2c.files import atomic
from gpt2c.files.atomic import atomic_path, matching, reason, remove, remove_leftovers, through
from gpt2c.files.names import (
    CHECKPOINTS,
    EVENTS,
    MOMENTS_FILE,
    RESULT_FILE,
    ROLLOUTS,
    RUN_FILE,
    TOKENIZER_OTHERS,
)
from gpt2c.formats import peft
from gpt2c.kernels.checks import counted
from gpt2c.parallel.gradients import Exchange
from gpt2c.parallel.same import check_same
from gpt2c.parallel.world import ALONE, Ranks, World
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train import checkpoints, tensorboard
from gpt2c.train.checkpoints import Checkpoint, TrainerState
from gpt2c.train.directory import (
    FILES,
    LOGS,
    VERSION,
    check_save,
    copy_model,
    locked_run,
    report,
    write_result,
)
from gpt2c.train.logs import Logs
from gpt2c.train.optimizer import AdamW
from gpt2c.train.settings import Settings
from gpt2c.train.sharded import ShardedAdamW

__all__ = ["LOCAL", "LostModel", "Run", "check_ranks", "open_run"]

T = TypeVar("T")
LOCAL = ("backend", "threads")  # settings that may differ from machine to machine


class LostModel(ValueError):
    """Weights, moments, or a loss or gradient from them, are not finite: they are not kept."""


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
    held : the directory is claimed and locked already, as that of a resumed run is
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
    tried : when the last save was tried, or the run began, by the monotonic clock
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
        self._logs = Logs(out, settings.tensorboard)
        self._place: os.stat_result | None = None  # of the locked directory
        self._locks = ExitStack()  # of directories that were made again

    def start(self) -> None:
        """Begin the directory anew: remove an overwritten run's files, but keep links to files.

        run.json is removed first and written first: with it a run can be resumed; without it, old
        files cannot be mistaken for one.
        """
        self.clear()
        self._open()

    def clear(self) -> None:
        """Remove the files of a run from the directory; other files stay."""
        for name in FILES:
            through(self.out / name).unlink(missing_ok=True)
        # A reader may take another program's tokenizer in place of the run's.
        for path in matching(self.out, TOKENIZER_OTHERS):
            path.unlink()
        for name in LOGS:
            with self._logs.writing(name):
                through(self.out / name).unlink(missing_ok=True)
        if (self.out / CHECKPOINTS).is_dir():
            checkpoints.clear(self.out / CHECKPOINTS)
        with self._logs.writing(EVENTS):
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
        """Write the files that the directory lacks, and open the logs."""
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
        self._logs.open(self.step - bool(self.entry))

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
        logged = self.step - bool(self.entry)
        self._logs.close()
        self._logs.open(logged)
        report(
            f"{self.out} was removed, renamed or emptied while the run trained: it is made again,"
            f" and its metrics continue after step {logged}"
        )

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

        With the last one, `final` sends gradients to other ranks while backward goes on. A share
        may have no parts.
        """
        self.final, every = None, [*parts]
        for number, part in enumerate(every, 1):
            if self.exchange is not None and number == len(every):
                self.final = self.exchange.send
            yield part
        if not every:
            self.send()

    def send(self) -> None:
        """Send the gradients as they are, where no backward pass does: others wait for them."""
        if self.exchange is not None:
            self.exchange.send(self.model.trained)

    def log(self) -> None:
        """Write the last step's metrics, with the run's duration and the time of day."""
        entry = self.entry
        assert entry is not None
        entry |= {"elapsed_seconds": round(self.seconds, 4), "time": round(time.time(), 3)}
        self._logs.append(entry)
        self.entry = None

    def share(self) -> None:
        """Give the other ranks the weights and counts with which rank 0 continues."""
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
        refused: OSError | None = None
        try:
            with self.leading() as leads:
                if leads:
                    self._save()
        except OSError as error:  # after which all ranks go on; another error ends them
            refused = error
        self.saved_step = self.world.first(self.saved_step)
        if refused:
            raise refused

    def _save(self) -> None:
        try:
            self._check_own()
        except FileNotFoundError:
            self._make_again()
        if not (self.out / RUN_FILE).exists():  # someone has deleted or moved it
            self._fill_again()
        state = self._state()
        if self.saved is None or self.step != self.saved_step:
            self._logs.sync()  # the checkpoint must not come before the metrics of its step
            self.saved = checkpoints.save(
                self.out / CHECKPOINTS,
                state,
                self.model.save_pretrained,
                self.optimizer.state(),
            )
            self.saved_step = self.step
        elif state != self._stored:
            self._logs.sync()
            checkpoints.amend(self.saved, state)
        self._stored = state
        if not self.entry and self._published != self.saved:
            self.publish()

    def finish(self, verb: str, entries: Mapping[str, Any]) -> None:
        """Write result.json, see `write_result`."""
        with self._logs.writing(RESULT_FILE):
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

    def _state(self) -> TrainerState:
        val_loss = None if math.isnan(self.val_loss) else self.val_loss
        return TrainerState(
            *(self.step, self.skipped, self.seconds, val_loss, self.entry), tokens=self.tokens
        )

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
                report(f"older checkpoints cannot be removed: {reason(error)}")

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
            return (
                f"the last good checkpoint is {self.good} (delete {self.saved} to resume from it)"
            )
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

    def close(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """Close the files and, where all ranks end alike, the exchange.

        After an error of this rank alone the others may send nothing more: `World.guard` ends them.

        Parameters
        ----------
        kind : the type of the error that ends the run, which comes as to an exit of `with`
        """
        alike = kind is None or issubclass(kind, LostModel) or self.world.is_agreed
        try:
            if self.exchange is not None and alike:
                self.exchange.close()
        finally:  # also where other ranks are gone
            self._logs.close()
            self._locks.close()
