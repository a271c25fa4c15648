"""Owner: one thread at a time computes with a model; a second thread gets an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Owner"]


class Owner:
    """The thread that computes with a model, and the thread that computed its last loss."""

    def __init__(self) -> None:
        self._claims: dict[object, threading.Thread] = {}  # one per call of `alone`, oldest first
        self._of_loss: threading.Thread | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse a second thread: it would overwrite the first thread's activations.

        A lock could stay locked for ever: Ctrl-C may come before `with` is ready to release it, and
        a forked child may lack the thread that took it. A claim does not count if its thread has
        ended, or if it is an older claim of this thread.

        Raises
        ------
        RuntimeError : another thread computes, or a signal handler computed during this call
        """
        me, claim = threading.current_thread(), object()
        try:
            self._claims[claim] = me  # atomic, as is each use of the dict below
            for other, thread in list(self._claims.items()):
                if other is claim:
                    break  # no older claim counts
                if thread is not me and thread in threading.enumerate():
                    raise RuntimeError(
                        "another thread computes with this model: wait for it, or give each thread"
                        " its own model; generate and logprobs can run at the same time"
                    )
                self._claims.pop(other, None)
            yield
            if claim not in self._claims:
                raise RuntimeError(
                    "a signal handler interrupted this call and computed with this model: call it"
                    " again"
                )
        finally:
            self._claims.pop(claim, None)

    def note_loss(self) -> None:
        """Note that this thread computed the last loss."""
        self._of_loss = threading.current_thread()

    def check_loss(self) -> None:
        """Refuse all threads but the one that computed the last loss.

        Raises
        ------
        RuntimeError : another thread computed it
        """
        if self._of_loss is not threading.current_thread():
            raise RuntimeError(
                "another thread computed the last loss of this model: call loss(idx, targets)"
                " and backward() in one thread"
            )
