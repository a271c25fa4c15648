"""Launches of ranks: the mpiexec of this environment, and the processes that it has started."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
OPEN_MPI = {  # which refuses root, and more ranks than cores, unless told otherwise
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def rank_processes(launcher: int) -> list[int]:
    """Return the ids of the Python processes that descend from a launcher."""
    parents: dict[int, int] = {}
    pythons = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (path / "stat").read_text(), (path / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        pid = int(path.name)
        parents[pid] = int(stat.rpartition(")")[2].split()[1])
        if command.split(b"\0")[0] == sys.executable.encode():
            pythons.append(pid)
    return [pid for pid in pythons if launcher in ancestors(pid, parents)]


def ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    """Yield the ids of a process's parent, of the parent's parent, and so on."""
    while pid in parents:
        pid = parents[pid]
        yield pid
