"""Threads: a pool of C threads for each Python thread that calls kernels.

csrc/team.c implements the pool. Knows nothing about ops.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from gpt2c.kernels.limits import unbound
from gpt2c.kernels.memory import aligned_zeros

__all__ = ["Pool", "Pools"]


class Pool:
    """Threads that run kernels together with the caller; this object owns their memory.

    Parameters
    ----------
    lib, ffi : of the kernels
    threads : the number of threads, the caller included

    Raises
    ------
    OSError : the system cannot start all threads
    """

    def __init__(self, lib: Any, ffi: Any, threads: int) -> None:
        self._stop = None  # nothing to stop until the threads have started
        self.process = os.getpid()
        self._memory = ffi.from_buffer(aligned_zeros(-(-lib.pool_size(threads) // 4)))
        self.pointer = ffi.cast("Pool *", self._memory)
        with unbound():
            started = lib.pool_start(self.pointer, threads)
        if started < threads:
            raise OSError(
                f"{threads} threads are wanted and the system can start only {started}: set"
                " GPT2C_NUM_THREADS to fewer, or raise the system's limit on processes (ulimit -u)"
                " or on memory (ulimit -v)"
            )
        self._stop = lib.pool_stop

    def __del__(self) -> None:
        """Stop the threads; a forked child has none to stop."""
        if self._stop is not None and self.process == os.getpid():
            self._stop(self.pointer)


class Pools:
    """The pool of each Python thread: the GIL is released while C runs, so none can be shared.

    Parameters
    ----------
    lib, ffi, threads : see `Pool`
    """

    def __init__(self, lib: Any, ffi: Any, threads: int) -> None:
        self._making = lib, ffi, threads
        self._local = threading.local()

    def mine(self) -> Any:
        """Return the pointer to this thread's pool, which is made at its first kernel.

        Raises
        ------
        OSError : the system cannot start all threads
        MemoryError : there is too little memory for them
        """
        pool = getattr(self._local, "pool", None)
        if pool is None or pool.process != os.getpid():  # a forked child has no threads
            pool = self._local.pool = Pool(*self._making)
        return pool.pointer
