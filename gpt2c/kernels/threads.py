"""Threads: a pool of them for each Python thread that calls kernels, on memory from here.

csrc/team.c has what they do. Knows nothing about ops.
"""

from __future__ import annotations

import os
from typing import Any

from gpt2c.kernels.limits import unbound
from gpt2c.kernels.memory import aligned_zeros

__all__ = ["Pool"]


class Pool:
    """Threads that run kernels together, the caller among them: csrc/team.c, on memory from here.

    Parameters
    ----------
    lib, ffi : of the kernels
    threads : how many

    Raises
    ------
    OSError : the system does not give so many threads
    """

    def __init__(self, lib: Any, ffi: Any, threads: int) -> None:
        self._stop = None  # nothing to stop, until they are there
        self.process = os.getpid()
        self._memory = ffi.from_buffer(aligned_zeros(-(-lib.pool_size(threads) // 4)))
        self.pointer = ffi.cast("Pool *", self._memory)
        with unbound():
            started = lib.pool_start(self.pointer, threads)
        if started < threads:
            raise OSError(
                f"{threads} threads are wanted and the system gives {started}: set"
                " GPT2C_NUM_THREADS to fewer, or raise its limit of processes (ulimit -u) or of"
                " memory (ulimit -v)"
            )
        self._stop = lib.pool_stop

    def __del__(self) -> None:
        """End the threads, unless this is a child that never had them."""
        if self._stop is not None and self.process == os.getpid():
            self._stop(self.pointer)
