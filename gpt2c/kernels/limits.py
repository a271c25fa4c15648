"""The cores and the memory that the machine allows this process; only this module asks for them.

    cores     the affinity, and the CPU quotas of the process's own cgroup and of its parents
    memory    the system's free memory, the limits of those cgroups, and the process's (ulimit)

Linux reports them in /proc and in the file systems of cgroup versions 1 and 2, which may both be
mounted; a test passes another `root`. A value that the system does not report is no limit. Knows
nothing else.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

__all__ = [
    "AFFINITY",
    "CORES",
    "bind",
    "bound",
    "cgroups",
    "cpu_quota",
    "free_bytes",
    "memory_limit",
    "read",
    "system_bytes",
    "total_bytes",
    "unbound",
    "usable_cores",
]

ROOT = Path("/")
UNLIMITED = 1 << 60  # bytes: cgroup version 1 writes a larger number for no limit


def bound() -> frozenset[int]:
    """Return the cores that this thread may run on, by their numbers."""
    asked = getattr(os, "sched_getaffinity", None)
    return frozenset(asked(0) if asked else range(CORES))


CORES = os.cpu_count() or 1
# The affinity at the import of gpt2c. An OpenMP library that binds threads (OMP_PROC_BIND) binds
# this thread to a single core when it loads, and its other threads to the other cores. A forked
# child has the same AFFINITY. A process that restricts itself later must pass `threads`.
AFFINITY = bound()


BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


@contextmanager
def unbound() -> Iterator[None]:
    """Allow threads that are started within to run on all cores of AFFINITY.

    A new thread inherits the affinity of this one, which OpenMP may have bound to a single core.
    """
    asked = getattr(os, "sched_getaffinity", None)
    if asked is None or not any(map(os.environ.get, BINDING)):
        yield
        return
    before = asked(0)
    with suppress(OSError):  # cores may have been taken away since
        os.sched_setaffinity(0, AFFINITY)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def bind(cores: Collection[int]) -> None:
    """Restrict this thread, and those that it starts, to these cores; some systems cannot."""
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, cores)


@functools.cache  # the answer is read from files
def usable_cores(root: Path = ROOT) -> int:
    """Return how many threads can compute at a time: AFFINITY's cores, or fewer by a CPU quota.

    A quota of 1.5 cores counts as 2: two threads use it up, pause for the rest of the period, and
    so do 1.5 times the work of one.
    """
    quota = cpu_quota(root)
    return len(AFFINITY) if quota == math.inf else max(1, min(len(AFFINITY), math.ceil(quota)))


def cpu_quota(root: Path = ROOT) -> float:
    """Return the CPU quota of the cgroups in cores, inf if they set none."""
    quotas = [math.inf]
    for folder in cgroups("cpu", root):
        names = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")  # of version 2, then 1
        quota, period, *_ = *" ".join(read(folder / name) for name in names).split(), "", ""
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas)


def free_bytes(promised: int = 0, root: Path = ROOT) -> int:
    """Return the memory that this process may still take.

    Parameters
    ----------
    promised : bytes that it has allocated and not yet touched; the system and the cgroups count
        only touched bytes
    """
    counted = [system_bytes(root), *(room for _, room in _groups(root))]
    return max(0, int(min(min(counted) - promised, *_rooms_of_promises(root))))


def total_bytes() -> int:
    """Return the machine's physical memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def system_bytes(root: Path = ROOT) -> int:
    """Return the system's free bytes, swap included; all of its memory if it does not report it."""
    kilobytes = _table(root / "proc/meminfo")
    free = 1024 * (kilobytes.get("MemAvailable", 0) + kilobytes.get("SwapFree", 0))
    if "MemAvailable" not in kilobytes:
        free = total_bytes()
    return free


def memory_limit(root: Path = ROOT) -> float:
    """Return the bytes that the cgroups allow, inf if they set no limit."""
    return min((limit for limit, _ in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield each cgroup's memory limit, and what is left of it, in bytes.

    Cached files count as used, but the system drops them on demand. Above memory.high a process is
    not killed, but waits for memory that nothing frees, so memory.high is a limit too.
    """
    for folder in cgroups("memory", root):
        counts = _table(folder / "memory.stat")
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")
        texts = [text for text in (read(folder / name) for name in names) if text.isdecimal()]
        # of version 1: includes parents that cannot be seen
        limits = [*map(int, texts), counts.get("hierarchical_memory_limit", UNLIMITED)]
        if min(limits) >= UNLIMITED:
            continue
        used = read(folder / "memory.current") or read(folder / "memory.usage_in_bytes")
        total = "total_" if (folder / "memory.limit_in_bytes").exists() else ""
        files = sum(counts.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
        yield min(limits), min(limits) - (int(used) if used.isdecimal() else 0) + files


def _rooms_of_promises(root: Path) -> Iterator[float]:
    """Yield what is left, in bytes, of each limit that counts allocated and not touched memory.

    These are the limits of ulimit on address space and data, and the limit of a system that
    allocates no more than it has.
    """
    yield math.inf
    kilobytes = _table(root / "proc/meminfo")
    if read(root / "proc/sys/vm/overcommit_memory") == "2" and "CommitLimit" in kilobytes:
        yield 1024 * (kilobytes["CommitLimit"] - kilobytes.get("Committed_AS", 0))
    with suppress(ImportError):  # not on Windows
        resource = importlib.import_module("resource")
        kilobytes = _table(root / "proc/self/status")
        for limit, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
            soft = resource.getrlimit(getattr(resource, limit))[0]
            if soft != resource.RLIM_INFINITY:
                yield soft - 1024 * kilobytes.get(used, 0)


def cgroups(controller: str, root: Path = ROOT) -> list[Path]:
    """Return the directories of the process's own cgroup and of all parents that can be seen.

    Those of both versions are returned, so some may not exist or lack the controller's files.

    Parameters
    ----------
    controller : "cpu" or "memory"
    """
    own = {}  # version -> the cgroup's path in its hierarchy
    for line in read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):
            own["cgroup"] = path
        elif (number, names) == ("0", ""):
            own["cgroup2"] = path
    mounts: dict[str, list[tuple[str, str]]] = {"cgroup2": [], "cgroup": []}
    for line in read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (version, _, options) = before.split(), [*after.split(), "", "", ""][:3]
        if len(fields) > 4 and version in mounts:
            if version == "cgroup2" or controller in options.split(","):
                mounts[version].append((_unescaped(fields[3]), _unescaped(fields[4])))
    if not any(mounts.values()):  # no mount is listed: the usual places
        mounts["cgroup2"] = [("/", "/sys/fs/cgroup")]
        mounts["cgroup"] = [("/", f"/sys/fs/cgroup/{controller}")]
    folders = []
    for version, places in mounts.items():
        group = PurePosixPath(own.get(version, "/"))
        # A mount shows one part of the hierarchy, from `top` down. In a container the path may lie
        # outside that part, or outside its namespace ("/.."); then the container sees only `top`.
        seen = [(top, point) for top, point in places if group.is_relative_to(top)]
        for top, point in seen or places[-1:]:
            inner = group.relative_to(top) if seen else PurePosixPath()
            inner = PurePosixPath() if ".." in inner.parts else inner
            folders += [root / point[1:] / part for part in (inner, *inner.parents)]
    return list(dict.fromkeys(folders))


def _unescaped(text: str) -> str:
    """Return a path of mountinfo with its octal escapes decoded, such as a blank's."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def read(path: Path) -> str:
    """Return the text of a system file, "" if it is missing or not text."""
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def _table(path: Path) -> dict[str, int]:
    """Return name -> number of a file with a name and a number on each line."""
    found = re.findall(r"^(\w+):?\s+(\d+)(?: kB)?$", read(path), re.MULTILINE)
    return {name: int(number) for name, number in found}
