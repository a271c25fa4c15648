"""Signals that ask a run to stop: the present step, update or save is finished first.

Knows nothing about runs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SIGNALS", "Stop", "StoppedError", "interruptible"]

# Signals that end a program without a handler: of Ctrl-C, of kill and timeout, of a terminal that
# closes, of a cluster before a job's time is over.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")


class Stop:
    """Whether a signal has asked for a stop, see `interruptible`."""

    def __init__(self) -> None:
        self.asked = False
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Protect an update or a save from a second Ctrl-C."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def check(self) -> None:
        """End an evaluation after a signal; the resumed run will begin with that evaluation.

        Raises
        ------
        StoppedError : a signal has come
        """
        if self.asked:
            raise StoppedError

    def receive(self, signum: int, frame: object) -> None:
        """Handle a signal: ask for a stop; a second Ctrl-C interrupts the step."""
        if self.asked and signum == signal.SIGINT and not self._held:
            raise KeyboardInterrupt
        self.asked = True


class StoppedError(Exception):
    """A signal came during an evaluation."""


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Make signals ask for a stop, so that no step is interrupted, except by a second Ctrl-C.

    A signal that the program handles itself, or ignores as under nohup, keeps its handler; only
    Ctrl-C gets a new one. Signals reach the main thread only; in another thread nothing is changed.
    """
    stop = Stop()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        for number in numbers:
            if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
