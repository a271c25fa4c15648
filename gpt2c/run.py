"""A run's directory: what training writes, and what takes it on after a kill at any moment.

    run.json                          settings, config and a mark of the data: first, before step 1
    checkpoints/00000040/             see trainer_state
    config.json, model.safetensors    copies of the newest checkpoint's, and with the tokenizer's
                                      files a model that transformers loads as it is
    metrics.jsonl, tensorboard/       see metrics and tensorboard

Knows nothing about batches or schedules, and of losses only whether the weights gave a finite one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt2c import tokenizer_files, trainer_state
from gpt2c.checkpoint import CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE
from gpt2c.config import GPT2Config
from gpt2c.files import atomic_path, read_json, remove, remove_leftovers, shown
from gpt2c.metrics import DAMAGED as METRICS_DAMAGED
from gpt2c.metrics import FILE as METRICS_FILE
from gpt2c.metrics import Metrics, read_metrics
from gpt2c.model import GPT2
from gpt2c.optimizer import AdamW
from gpt2c.plot import LOSS_FILE, RUNS_FILE
from gpt2c.settings import TrainSettings
from gpt2c.tensorboard import Events
from gpt2c.tokenizer import Tokenizer
from gpt2c.trainer_state import Checkpoint, TrainerState

VERSION = 1
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
# What a run leaves at the top of its directory beside run.json, its tokenizer's files among it: a
# later run must not be taken for one with that tokenizer.
_FILES = (
    *(CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE, METRICS_FILE, METRICS_DAMAGED),
    *(tokenizer_files.VOCAB, tokenizer_files.MERGES, tokenizer_files.TOKENIZER),
    *(tokenizer_files.CONFIG, tokenizer_files.ADDED, LOSS_FILE, RUNS_FILE),
)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Have a run's directory to oneself; the lock ends with the process, however it ends.

    The directory itself is locked, so that there is no file to be left over. A network file system
    that has no such lock gives none.

    Raises
    ------
    FileNotFoundError : there is no such directory
    BlockingIOError : another process trains into it
    """
    if not out.is_dir():
        raise FileNotFoundError(f"{out} is not a directory; a run that can go on is one")
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process is training into {out}: wait for it, or name another directory"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def report(line: str) -> None:
    """Tell a person what happened to a run."""
    with suppress(BrokenPipeError):  # a reader that left (head) must not end the work
        print(line, flush=True)


def read_record(out: Path) -> dict[str, Any]:
    """Read a run's run.json.

    Raises
    ------
    OSError : it is missing or unreadable
    ValueError : it is damaged, or of another version
    """
    path = out / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {out} holds no run that can go on")
    record = read_json(path)
    version = record.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {shown(version)}")
    for name in ("settings", "config", "data", "backend", "threads"):
        if name not in record:
            raise ValueError(f"{path} lacks {name}")
    return record


def check_config(source: Path, entries: Any, config: GPT2Config) -> None:
    """Refuse a run of another model before there is one.

    Raises
    ------
    ValueError : `entries`, of the file `source`, are not those of `config`
    """
    try:
        found = GPT2Config.from_dict(entries) if isinstance(entries, dict) else None
    except ValueError as error:
        raise ValueError(f"{source}: its config cannot be: {error}") from None
    if found != config:
        raise ValueError(
            f"{source} holds a model of another config than its settings and this data's tokenizer"
            f" give: {found}, wanted {config}"
        )


class Run:
    """A run that this process alone goes on with: its model and optimizer, and its directory.

    Parameters
    ----------
    out : the directory, `locked`
    settings, model, optimizer, tokenizer : of the run
    data : what JSON can hold of the data, to know it again
    bytes_per_token : of the texts of "train" and "val", by which runs with different tokenizers
        are compared

    Attributes
    ----------
    step, skipped : steps done, and those of them that updated nothing
    seconds : spent in steps
    val_loss : of the weights as they are; nan if those were not evaluated
    saved : the newest checkpoint, None before the first
    good : the newest with whose weights a finite loss was computed; the older ones stay until then
    """

    def __init__(
        self,
        out: Path,
        settings: TrainSettings,
        model: GPT2,
        optimizer: AdamW,
        tokenizer: Tokenizer,
        data: Any,
        bytes_per_token: Mapping[str, float],
    ) -> None:
        self.out, self.settings, self.model, self.optimizer = out, settings, model, optimizer
        self.tokenizer, self.data = tokenizer, data
        self.bytes_per_token = bytes_per_token
        self.step = self.skipped = 0
        self.seconds = 0.0
        self.val_loss = math.nan
        self.saved: Path | None = None
        self.good: Path | None = None
        self.saved_step = -1

    def start(self) -> None:
        """Begin the directory anew; what an overwritten run left is removed.

        run.json goes first and comes first: with it a run can go on, without it none can be
        mistaken for another.
        """
        for name in (RUN_FILE, *_FILES):
            (self.out / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, EVENTS):
            if (self.out / name).is_dir():
                remove(self.out / name)
        self._open()

    def restore(self, record: Mapping[str, Any], found: Checkpoint | None) -> None:
        """Go on from a checkpoint, or from the first step if there is none.

        Raises
        ------
        ValueError : the checkpoint's moments are not of this model's size
        """
        here = self._record()
        if (record["backend"], record["threads"]) != (here["backend"], here["threads"]):
            before = f"{record['backend']} with {record['threads']} threads"
            now = f"{here['backend']} with {here['threads']}"
            report(f"{self.out} ran on {before} and goes on on {now}: not to the same bits")
        if found:
            self.model.load_parameters(found.tensors, str(found.path))
            for name in trainer_state.MOMENTS:
                moment = getattr(self.optimizer, name)
                if found.moments[name].shape != moment.shape:
                    raise ValueError(
                        f"{found.path / trainer_state.MOMENTS_FILE}: {name} must have shape"
                        f" {moment.shape}, got {found.moments[name].shape}"
                    )
                moment[...] = found.moments[name]
            state = found.state
            self.step, self.skipped, self.seconds = state.step, state.skipped, state.seconds
            self.optimizer.steps = state.step - state.skipped
            self.val_loss = math.nan if state.val_loss is None else state.val_loss
            self.saved, self.saved_step = found.path, state.step
            self.good = trainer_state.before(found.path)
        self._open()

    def _open(self) -> None:
        """Make the directory whole, whatever it lacks, and open the metrics."""
        remove_leftovers(self.out)
        if (self.out / CHECKPOINTS).is_dir():
            remove_leftovers(self.out / CHECKPOINTS)
        with atomic_path(self.out / RUN_FILE) as temporary:
            text = json.dumps(self._record(), indent=2, allow_nan=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
        self.tokenizer.save_pretrained(self.out)
        if self.saved:
            self._publish(self.saved)
            self._confirm_evaluated()
        path = self.out / METRICS_FILE
        self._metrics = Metrics(path, self.step, report)
        self._events: Events | None = None
        if self.settings.tensorboard:
            self._events = Events(self.out / EVENTS, read_metrics(path))

    def _record(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "settings": dataclasses.asdict(self.settings),
            "config": self.model.config.to_dict(),
            "data": self.data,
            "bytes_per_token": self.bytes_per_token,
            "backend": self.model.backend.name,
            "threads": getattr(self.model.backend, "threads", 1),
        }

    def log(self, entry: dict[str, Any]) -> None:
        """Write a step's metrics, which the run's time and the day's are added to."""
        entry |= {"elapsed_seconds": round(self.seconds, 4), "time": round(time.time(), 3)}
        self._metrics.append(entry)
        if self._events:
            self._events.append(entry)

    def save(self) -> None:
        """Write a checkpoint and let the directory's own model be that one.

        Raises
        ------
        OSError : it cannot be written; the last one is whole
        ValueError : a parameter or moment is not finite, so the last checkpoint is the better one
        """
        if self.step == self.saved_step:
            return
        self._check_finite()
        self._metrics.sync()  # before the checkpoint is there, the lines up to it are
        self.saved = trainer_state.save(
            self.out / CHECKPOINTS,
            TrainerState(
                self.step,
                self.skipped,
                self.seconds,
                None if math.isnan(self.val_loss) else self.val_loss,
            ),
            self.model.config.to_dict(),
            self.model.parameters,
            {name: getattr(self.optimizer, name) for name in trainer_state.MOMENTS},
        )
        self.saved_step = self.step
        self._publish(self.saved)
        self._confirm_evaluated()
        if self._events:
            self._events.flush()

    def confirm(self) -> None:
        """Let the newest checkpoint take the older ones' place: its weights gave a finite loss.

        Weights may be finite and lost. The first loss after a save is of the weights that were
        saved, and nothing is updated with one that is not finite.
        """
        if self.saved and self.saved != self.good:
            self.good = self.saved
            trainer_state.prune(self.good, self.settings.keep)

    def _confirm_evaluated(self) -> None:
        if not math.isnan(self.val_loss):
            self.confirm()

    def _check_finite(self) -> None:
        """Refuse to put a model aside for one that is lost; the norm is one pass over memory."""
        arrays = {"weights": self.model.flat_parameters, "moment m": self.optimizer.m}
        for name, array in {**arrays, "moment v": self.optimizer.v}.items():
            if not math.isfinite(self.model.backend.global_norm(array)):
                raise ValueError(
                    f"the {name} of step {self.step} are not finite, so they were not saved;"
                    f" {self.last_good()}; lower the learning rate"
                )

    def last_good(self) -> str:
        """Say where the last good checkpoint is, for an error."""
        if self.saved is None:
            return "there is no checkpoint yet (--save-interval makes some)"
        if self.good is None:
            return f"there is no good checkpoint: {self.saved} gives no finite loss"
        if self.good != self.saved:
            return f"the last good checkpoint is {self.good} (delete {self.saved} to go on from it)"
        return f"the last good checkpoint is {self.good}"

    def _publish(self, checkpoint: Path) -> None:
        """Give the directory the model of a checkpoint.

        A copy and no link: what other programs write there must not reach the checkpoint.
        """
        for source in trainer_state.model_files(checkpoint):
            with atomic_path(self.out / source.name) as temporary:
                shutil.copyfile(source, temporary)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        if self._events:
            self._events.close()
