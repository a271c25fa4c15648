"""Signals that ask a run to stop: the present step, update or save is finished first.

Knows nothing about runs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from gpt2c.parallel.world import ALONE, World

__all__ = ["SIGNALS", "Check", "Stop", "StoppedError", "interruptible"]

# Signals that end a program without a handler: of Ctrl-C, of kill and timeout, of a terminal that
# closes, of a cluster before a job's time is over.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")


class Check(Protocol):
    """`Stop.check`, as an evaluation calls it between its parts."""

    def __call__(self, here: bool = False) -> None:
        """See `Stop.check`."""


class Stop:
    """Whether a signal has asked for a stop, see `interruptible`.

    Parameters
    ----------
    world : a signal to one of its ranks stops all
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._signalled = False
        self._held = False

    @property
    def asked(self) -> bool:
        """Whether a signal has come, to any rank; all ranks ask at the same places."""
        return self._world.any(self._signalled)

    def agree(self, flag: bool) -> tuple[bool, bool]:
        """Return whether a signal has come, and whether the flag is set: each on any rank."""
        signalled, flagged = self._world.sum([self._signalled, flag])
        return signalled > 0, flagged > 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Protect an update or a save from a second Ctrl-C."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def check(self, here: bool = False) -> None:
        """End an evaluation after a signal; the resumed run will begin with that evaluation.

        Parameters
        ----------
        here : only after a signal to this rank, which then tells the others

        Raises
        ------
        StoppedError : a signal has come
        """
        if self._signalled if here else self.asked:
            raise StoppedError

    def receive(self, signum: int, frame: object) -> None:
        """Handle a signal: ask for a stop; a second Ctrl-C interrupts the step.

        One of several ranks gets Ctrl-C from the terminal and from mpiexec: it does not count them.
        """
        again = self._signalled and self._world.size == 1
        if again and signum == signal.SIGINT and not self._held:
            raise KeyboardInterrupt
        self._signalled = True


class StoppedError(Exception):
    """A signal came during an evaluation."""


@contextmanager
def interruptible(world: World = ALONE) -> Iterator[Stop]:
    """Make signals ask for a stop, so that no step is interrupted, except by a second Ctrl-C.

    A signal that the program handles itself, or ignores as under nohup, keeps its handler; only
    Ctrl-C gets a new one. Signals reach the main thread only; in another thread nothing is changed.
    Within another `interruptible` the stop is that one's: a signal to a run ends its whole chain.
    """
    stop = Stop(world)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        chain = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        if isinstance(chain, Stop):
            yield chain
            return
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        for number in numbers:
            if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
