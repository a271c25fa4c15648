"""The logs of a run: metrics.jsonl and TensorBoard's events. A run does not stop for its logs.

Knows nothing about weights and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2c.files.names import EVENTS, METRICS_FILE
from gpt2c.train.directory import report
from gpt2c.train.metrics import Metrics, read_metrics
from gpt2c.train.tensorboard import Events

__all__ = ["Logs"]


class Logs:
    """The logs in a run's directory.

    Once open, they are the run's own files, even after the directory was renamed.

    Parameters
    ----------
    out : the directory
    tensorboard : whether there are events, too
    """

    def __init__(self, out: Path, tensorboard: bool) -> None:
        self._out, self._tensorboard = out, tensorboard
        self._open: dict[str, Metrics | Events] = {}
        self._told: set[str] = set()

    def open(self, step: int) -> None:
        """Open the files without their entries after a step, which will be written again."""
        entries: list[dict[str, Any]] = []
        with self.writing(METRICS_FILE):
            self._open[METRICS_FILE] = Metrics(self._out / METRICS_FILE, step, report)
            entries = read_metrics(self._out / METRICS_FILE)
        if self._tensorboard:
            with self.writing(EVENTS):
                self._open[EVENTS] = Events(self._out / EVENTS, entries)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write the metrics of a step."""
        for name, log in self._open.items():
            with self.writing(name):
                log.append(entry)

    def sync(self) -> None:
        """Wait until the metrics are on the disk."""
        for name, log in self._open.items():
            with self.writing(name):
                log.sync()

    def close(self) -> None:
        """Close the files; the next `open` opens them again."""
        for name, log in self._open.items():
            with self.writing(name):
                log.close()
        self._open = {}

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Suppress the errors of writing a file of the directory, and report the first of each."""
        try:
            yield
        except OSError as error:
            if name not in self._told:
                self._told.add(name)
                reason = error.strerror or error
                report(f"{self._out / name} cannot be written ({reason}): it is left out")
