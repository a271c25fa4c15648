"""A signal that asks a run to stop lets the step, the update or the save end first.

Knows nothing about runs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SIGNALS", "Stop", "StoppedError", "interruptible"]

# What ends a program that does not listen: Ctrl-C, kill and timeout, a terminal that closes, what a
# cluster sends before a job's time is over.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")


class Stop:
    """What a signal asks for, see `interruptible`."""

    def __init__(self) -> None:
        self.asked = False
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no second Ctrl-C cut an update or a save in half."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def check(self) -> None:
        """End an evaluation, which the run begins with when it goes on.

        Raises
        ------
        StoppedError : a signal has come
        """
        if self.asked:
            raise StoppedError

    def receive(self, signum: int, frame: object) -> None:
        """Take note of a signal; a second Ctrl-C does not wait for the end of the step."""
        if self.asked and signum == signal.SIGINT and not self._held:
            raise KeyboardInterrupt
        self.asked = True


class StoppedError(Exception):
    """A signal came during an evaluation."""


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Make signals ask for a stop, so that no step is cut in half; a second Ctrl-C interrupts.

    What a program handles itself, or ignores as under nohup, stays as it is, but for Ctrl-C.
    Signals reach the main thread only; elsewhere nothing is changed.
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
