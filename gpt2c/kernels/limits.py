"""What the machine allows this process: cores and memory, asked in this one place.

    cores     affinity, and the CPU quota of the process's own cgroup and of that one's parents
    memory    what the system has left, the limits of those cgroups, and the process's (ulimit)

Linux tells this in /proc and in the file systems of cgroup's two versions, which may both be there;
`root` is where a test keeps its own. A fact that a system does not tell is no limit. Knows nothing
else.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

__all__ = [
    "AFFINITY",
    "CORES",
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
UNLIMITED = 1 << 60  # bytes: version 1 writes a number beyond it where there is no limit


def _affinity() -> frozenset[int]:
    """Return the cores that this thread may run on, by their numbers."""
    asked = getattr(os, "sched_getaffinity", None)
    return frozenset(asked(0) if asked else range(CORES))


CORES = os.cpu_count() or 1
# As it was when gpt2c was imported: an OpenMP library that is told to bind threads (OMP_PROC_BIND)
# binds this one to a single core when it loads, and the others to the rest. A forked child has the
# same; a process that restricts itself later says how many threads it wants.
AFFINITY = _affinity()


BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


@contextmanager
def unbound() -> Iterator[None]:
    """Let the threads that are started within run on all of AFFINITY.

    Threads inherit where they may run, and OpenMP may have bound this one to a core.
    """
    asked = getattr(os, "sched_getaffinity", None)
    if asked is None or not any(map(os.environ.get, BINDING)):
        yield
        return
    bound = asked(0)
    with suppress(OSError):  # cores may have been taken away since
        os.sched_setaffinity(0, AFFINITY)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, bound)


@functools.cache  # the answer is in files
def usable_cores(root: Path = ROOT) -> int:
    """Return how many threads can compute at a time: the affinity, or less by a CPU quota.

    A quota of one core and a half counts as two: two threads that use it up pause together for the
    rest of a period, so that they do half as much again as one.
    """
    quota = cpu_quota(root)
    return len(AFFINITY) if quota == math.inf else max(1, min(len(AFFINITY), math.ceil(quota)))


def cpu_quota(root: Path = ROOT) -> float:
    """Return the cores' worth of time that the cgroups give, inf where they set no limit."""
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
    promised : bytes that it has been given and not yet touched: the system and the cgroups, which
        count what is touched, do not know of them
    """
    counted = [system_bytes(root), *(room for _, room in _groups(root))]
    return max(0, int(min(min(counted) - promised, *_rooms_of_promises(root))))


def total_bytes() -> int:
    """Return the bytes of memory that are built into the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def system_bytes(root: Path = ROOT) -> int:
    """Return what the whole system has left, swap included, or all it has where it does not say."""
    kilobytes = _table(root / "proc/meminfo")
    free = 1024 * (kilobytes.get("MemAvailable", 0) + kilobytes.get("SwapFree", 0))
    if "MemAvailable" not in kilobytes:
        free = total_bytes()
    return free


def memory_limit(root: Path = ROOT) -> float:
    """Return the bytes that the cgroups allow, inf where they set no limit."""
    return min((limit for limit, _ in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield each cgroup's limit of memory in bytes, and what is left of it.

    Files that were read count as used, but make room for whoever asks. Above memory.high a process
    is not ended, but waits for memory that nobody gives back, so it is a limit too.
    """
    for folder in cgroups("memory", root):
        counts = _table(folder / "memory.stat")
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")
        texts = [text for text in (read(folder / name) for name in names) if text.isdecimal()]
        # of version 1: also of parents that are not to be seen
        limits = [*map(int, texts), counts.get("hierarchical_memory_limit", UNLIMITED)]
        if min(limits) >= UNLIMITED:
            continue
        used = read(folder / "memory.current") or read(folder / "memory.usage_in_bytes")
        total = "total_" if (folder / "memory.limit_in_bytes").exists() else ""
        files = sum(counts.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
        yield min(limits), min(limits) - (int(used) if used.isdecimal() else 0) + files


def _rooms_of_promises(root: Path) -> Iterator[float]:
    """Yield what those leave who count what is promised, not what is touched.

    They are ulimit, for the address space and for the data, and a system that promises no more than
    it has.
    """
    yield math.inf
    kilobytes = _table(root / "proc/meminfo")
    if read(root / "proc/sys/vm/overcommit_memory") == "2" and "CommitLimit" in kilobytes:
        yield 1024 * (kilobytes["CommitLimit"] - kilobytes.get("Committed_AS", 0))
    with suppress(ImportError):  # another system
        resource = importlib.import_module("resource")
        kilobytes = _table(root / "proc/self/status")
        for limit, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
            soft = resource.getrlimit(getattr(resource, limit))[0]
            if soft != resource.RLIM_INFINITY:
                yield soft - 1024 * kilobytes.get(used, 0)


def cgroups(controller: str, root: Path = ROOT) -> list[Path]:
    """Return where the process's own cgroup is, and its parents as far up as they can be seen.

    Some may not exist, or not have the controller's files: those of both versions are returned.

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
    if not any(mounts.values()):  # nobody says where: where they usually are
        mounts["cgroup2"] = [("/", "/sys/fs/cgroup")]
        mounts["cgroup"] = [("/", f"/sys/fs/cgroup/{controller}")]
    folders = []
    for version, places in mounts.items():
        group = PurePosixPath(own.get(version, "/"))
        # A mount shows one part of the hierarchy, from `top` down. A container may be told a path
        # from outside of that part, or of a namespace's outside, "/..": then it sees its own top.
        seen = [(top, point) for top, point in places if group.is_relative_to(top)]
        for top, point in seen or places[-1:]:
            inner = group.relative_to(top) if seen else PurePosixPath()
            inner = PurePosixPath() if ".." in inner.parts else inner
            folders += [root / point[1:] / part for part in (inner, *inner.parents)]
    return list(dict.fromkeys(folders))


def _unescaped(text: str) -> str:
    """Return a path of mountinfo, where a blank is a backslash and 040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def read(path: Path) -> str:
    """Return what a file of the system's says, or nothing where it is not there or no text."""
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def _table(path: Path) -> dict[str, int]:
    """Return the numbers of a file that has a name and a number on each line."""
    found = re.findall(r"^(\w+):?\s+(\d+)(?: kB)?$", read(path), re.MULTILINE)
    return {name: int(number) for name, number in found}
