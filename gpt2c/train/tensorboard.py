"""TensorBoard's event files: a copy of metrics.jsonl for users of TensorBoard.

They need tensorboardX, the extra [tensorboard]. Events cannot be removed from a file, so a resumed
run replaces its files with one made from metrics.jsonl, which has every step once. The first event
of that file tells an open TensorBoard to forget the events that it read before.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2c.files.atomic import naming

__all__ = ["Events", "check_tensorboard", "clear"]

FLUSHED = 10.0  # seconds after which TensorBoard can see a step
PREFIX = "events"  # of a file's name
NOT_SCALARS = ("step", "time")


def clear(directory: Path) -> None:
    """Remove the event files of a directory; the directory and other files stay."""
    for path in directory.glob(f"{PREFIX}*"):
        path.unlink()


class Events:
    """An event file that grows with a run.

    tensorboardX's SummaryWriter hands events to a thread: on a full disk that thread dies, and the
    run would wait for it forever. So this class writes them itself, with EventsWriter.

    Parameters
    ----------
    directory : of the event file; earlier event files there are removed
    entries : the run's metrics up to now

    Raises
    ------
    OSError : the directory cannot be written
    """

    def __init__(self, directory: Path, entries: Iterable[Mapping[str, Any]]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self.directory, self._flushed = directory, time.monotonic()
        clear(directory)
        with naming(directory):
            directory.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(directory / PREFIX))
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(step=0, session_log=start))
        for entry in entries:
            self.append(entry)
        self.sync()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add every number of a step's metrics as a scalar of its name, at the step's time."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in entry.items()
            if name not in NOT_SCALARS and value is not None
        ]
        event = self._event(
            step=entry["step"], wall_time=entry.get("time"), summary=self._summary(value=values)
        )
        with naming(self.directory):
            self._writer.write_event(event)
        if time.monotonic() - self._flushed > FLUSHED:
            self.sync()

    def sync(self) -> None:
        """Wait until all events are on the disk."""
        self._flushed = time.monotonic()
        with naming(self.directory):
            self._writer.flush()

    def close(self) -> None:
        """Write the remaining events and close the file."""
        with naming(self.directory):
            self._writer.close()


def check_tensorboard() -> None:
    """Refuse to begin without tensorboardX; import it, which takes seconds, before a run does.

    Raises
    ------
    ValueError : tensorboardX is not installed
    """
    try:
        importlib.import_module("tensorboardX.event_file_writer")
    except ImportError:
        raise ValueError("tensorboard needs tensorboardX: pip install tensorboardX") from None
