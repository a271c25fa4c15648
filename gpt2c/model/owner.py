"""Owner: one thread computes with a model at a time, and a second is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Owner"]


class Owner:
    """Knows the thread that computes with a model, and the one whose loss lies in its memory."""

    def __init__(self) -> None:
        self._claims: dict[object, threading.Thread] = {}  # of threads that compute or are refused
        self._of_loss: threading.Thread | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse a second thread: it would write over the first one's activations.

        No lock: Ctrl-C may come before a `with` has noted that it has one, and a fork may leave its
        owner behind. The claim of a thread that is gone, or of this thread's past, counts for
        nothing.

        Raises
        ------
        RuntimeError : another thread computes, or a signal's handler has computed meanwhile
        """
        me, claim = threading.current_thread(), object()
        try:
            self._claims[claim] = me  # no other thread sees half of this step or of those below
            for other, thread in list(self._claims.items()):
                if other is claim:
                    break  # the first of the claims that stand
                if thread is not me and thread in threading.enumerate():
                    raise RuntimeError(
                        "another thread computes with this model: let one wait for the other, or"
                        " give each thread a model; generate and logprobs have memory of their own"
                    )
                self._claims.pop(other, None)
            yield
            if claim not in self._claims:
                raise RuntimeError(
                    "the handler of a signal computed with this model in the middle of this: call"
                    " it again"
                )
        finally:
            self._claims.pop(claim, None)

    def note_loss(self) -> None:
        """Note that this thread has computed the last loss."""
        self._of_loss = threading.current_thread()

    def check_loss(self) -> None:
        """Refuse a thread that has not computed the last loss.

        Raises
        ------
        RuntimeError : another thread has
        """
        if self._of_loss is not threading.current_thread():
            raise RuntimeError(
                "another thread computed the last loss of this model: call loss(idx, targets)"
                " and backward() in one thread"
            )
