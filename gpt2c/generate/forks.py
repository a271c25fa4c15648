"""Forks: the child process has its parent's objects, but none of the parent's threads."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["tell_of_forks"]


class LeftBehind(Protocol):
    """An object with a thread, which a fork leaves in the parent."""

    def after_fork(self) -> None:
        """Continue in the child without the thread, which may have held a lock at the fork."""


_OWNERS: weakref.WeakSet[LeftBehind] = weakref.WeakSet()


def tell_of_forks(owner: LeftBehind) -> None:
    """Call the owner's `after_fork` in the child of each fork, as long as the owner exists."""
    _OWNERS.add(owner)


def _tell() -> None:
    for owner in list(_OWNERS):
        owner.after_fork()


os.register_at_fork(after_in_child=_tell)
