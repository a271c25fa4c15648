"""The load of other programs on this process's cores, from /proc/stat."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gpt2c.kernels.limits import AFFINITY

__all__ = ["BusyCores"]

STAT = Path("/proc/stat")
SECONDS = 3.0  # of a run, from one look to the next: the system counts in hundredths of a second
LEAST = 0.3  # cores: any system uses a little less by itself
_IDLE = (3, 4)  # columns of a line: idle, and waiting for a disk


class BusyCores:
    """Compares the work of the cores that this process may use with the process's own work.

    Parameters
    ----------
    threads : the number of threads of this process's kernels
    apart : the least seconds from one look to the next

    Attributes
    ----------
    cores : the number of cores that this process may use
    """

    def __init__(self, threads: int, apart: float = SECONDS) -> None:
        self.cores = len(AFFINITY)
        self._threads, self._apart = threads, apart
        self._last = self._look()

    def others(self) -> float:
        """Return how many cores other programs used since the last look.

        The result is 0 if each thread of this process had a core to itself, if the last look was
        less than `apart` seconds ago, or if the system does not tell.
        """
        now, busy, own = self._look()
        seconds = now - self._last[0]
        if seconds < self._apart:
            return 0.0
        others = ((busy - self._last[1]) - (own - self._last[2])) / seconds
        self._last = now, busy, own
        crowded = others + self._threads > self.cores + LEAST / 2
        return others if others >= LEAST and crowded else 0.0

    def _look(self) -> tuple[float, float, float]:
        """Return the time, and the seconds that the cores and this process have worked."""
        busy = 0.0
        try:
            for line in STAT.read_text(encoding="utf-8").splitlines():
                name, *columns = line.split()
                if name.removeprefix("cpu").isdecimal() and int(name[3:]) in AFFINITY:
                    counts = [int(column) for column in columns[:8]]  # they include guests
                    busy += sum(n for i, n in enumerate(counts) if i not in _IDLE)
            busy /= os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            busy = 0.0
        return time.monotonic(), busy, time.process_time()
