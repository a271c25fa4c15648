"""Launches of ranks: the mpiexec of this environment, and the processes that it has started."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers.command import environment, program

MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
OPEN_MPI = {  # which refuses root, and more ranks than cores, unless told otherwise
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def launch(module: str, ranks: int, *arguments: object, status: int = 0) -> str:
    """Run a function of a program on so many ranks; return standard error."""
    command = [str(MPIEXEC), "-n", str(ranks), *program(module, *map(str, arguments))]
    variables = environment(GPT2C_NUM_THREADS="1", **OPEN_MPI)
    done = subprocess.run(command, env=variables, timeout=120, capture_output=True, text=True)
    assert (done.returncode == 0) == (status == 0), (done.returncode, done.stdout, done.stderr)
    return done.stderr


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
