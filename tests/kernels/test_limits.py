"""Limits: /proc and both versions of cgroup, in the layouts that occur."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2c.kernels import limits
from gpt2c.kernels.limits import cgroups, cpu_quota, free_bytes, memory_limit, usable_cores

Root = Callable[..., Path]
MEMINFO = "MemTotal: 9000 kB\nMemAvailable: 7000 kB\n"
UNLIMITED = 9223372036854771712  # version 1's figure for no limit
V2_MOUNT = "31 23 0:28 {top} {point} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {top} {point} rw,relatime - cgroup cgroup rw,{names}"


def v2(top: str = "/", point: str = "/sys/fs/cgroup") -> str:
    return V2_MOUNT.format(top=top, point=point)


def v1(names: str, top: str = "/", point: str = "") -> str:
    return V1_MOUNT.format(top=top, point=point or f"/sys/fs/cgroup/{names}", names=names)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Return a function that makes a machine of files: /proc and cgroups."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)

    def make(own: str | None, mounts: list[str] | None, files: dict[str, object]) -> Path:
        proc = {"meminfo": MEMINFO}
        proc |= {} if own is None else {"self/cgroup": own}
        proc |= {} if mounts is None else {"self/mountinfo": "\n".join(mounts)}
        everything = {f"proc/{name}": text for name, text in proc.items()}
        for name, content in {**everything, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return make


# ---- cores ---------------------------------------------------------------------------------------

G = "sys/fs/cgroup"
V1 = "4:memory:/a/b\n2:cpu,cpuacct:/a/b\n1:name=systemd:/c"


@pytest.mark.parametrize(
    ("own", "mounts", "files", "quota"),
    [
        # version 2: the own group, its parents, the strictest of them
        ("0::/a/b", [v2()], {f"{G}/a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", [v2()], {f"{G}/a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", [v2()], {f"{G}/a/b/cpu.max": "max 100000"}, math.inf),
        (
            "0::/a/b",
            [v2()],
            {f"{G}/a/b/cpu.max": "300000 100000", f"{G}/a/cpu.max": "400000 200000"},
            2,
        ),
        ("0::/a/b", [v2()], {f"{G}/other/cpu.max": "1000 100000"}, math.inf),
        # in a namespace: the own group is the top
        ("0::/", [v2()], {f"{G}/cpu.max": "100000 100000"}, 1),
        # bound into a container, which is told its path outside
        ("0::/a/b", [v2("/a/b")], {f"{G}/cpu.max": "100000 100000"}, 1),
        ("0::/a/b/c", [v2("/a")], {f"{G}/b/cpu.max": "100000 100000"}, 1),
        ("0::/a/b", [v2("/elsewhere")], {f"{G}/cpu.max": "100000 100000"}, 1),
        ("0::/a/b", [v2()], {f"{G}/cpu.max": "100000 100000"}, 1),  # /a/b is not visible
        ("0::/../x", [v2()], {f"{G}/cpu.max": "100000 100000"}, 1),
        ("0::/", [v2("/../..")], {f"{G}/cpu.max": "100000 100000"}, 1),
        ("0::/gone (deleted)", [v2()], {f"{G}/cpu.max": "100000 100000"}, 1),
        # version 1
        (
            V1,
            [v1("memory"), v1("cpu,cpuacct")],
            {
                f"{G}/cpu,cpuacct/a/cpu.cfs_quota_us": 25000,
                f"{G}/cpu,cpuacct/a/cpu.cfs_period_us": 100000,
            },
            0.25,
        ),
        (
            V1,
            [v1("cpu,cpuacct", "/a/b", "/mnt/c\\040g")],
            {"mnt/c g/cpu.cfs_quota_us": 200000, "mnt/c g/cpu.cfs_period_us": 100000},
            2,
        ),
        (
            V1,
            [v1("cpu,cpuacct")],
            {
                f"{G}/cpu,cpuacct/a/b/cpu.cfs_quota_us": -1,
                f"{G}/cpu,cpuacct/a/b/cpu.cfs_period_us": 100000,
            },
            math.inf,
        ),
        # both: the controller is of version 1, the hierarchy of version 2 has none
        (
            V1 + "\n0::/a",
            [v1("cpu,cpuacct"), v2("/", f"/{G}/unified")],
            {
                f"{G}/cpu,cpuacct/a/b/cpu.cfs_quota_us": 100000,
                f"{G}/cpu,cpuacct/a/b/cpu.cfs_period_us": 100000,
                f"{G}/unified/a/cgroup.procs": "",
            },
            1,
        ),
        # no file says where they are
        (None, None, {f"{G}/cpu.max": "100000 100000"}, 1),
        (None, [], {f"{G}/cpu/cpu.cfs_quota_us": 5, f"{G}/cpu/cpu.cfs_period_us": 10}, 0.5),
        (None, None, {}, math.inf),
        # garbage
        ("nonsense\n::\n0", ["", "-", " - ", "1 2 3 - cgroup2", "x - cgroup"], {}, math.inf),
        ("0::/", [v2()], {f"{G}/cpu.max": ""}, math.inf),
        ("0::/", [v2()], {f"{G}/cpu.max": "0 0"}, math.inf),
        ("0::/", [v2()], {f"{G}/cpu.max": "1e5 100000"}, math.inf),
        ("0::/", [v2()], {f"{G}/cpu.max": "100000 -1"}, math.inf),
        ("0::/", [v2()], {f"{G}/cpu.max": "100000"}, math.inf),
        ("0::/", [v2()], {f"{G}/cpu.max/is a directory": ""}, math.inf),
    ],
)
def test_cpu_quota_is_the_strictest_of_the_cgroups(
    own: str | None, mounts: list[str] | None, files: dict[str, object], quota: float, root: Root
) -> None:
    assert cpu_quota(root(own, mounts, files)) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "threads"),
    [(8, "max", 8), (8, "50000", 1), (8, "100000", 1), (8, "150000", 2), (2, "800000", 2)],
)
def test_threads_are_no_more_than_affinity_and_quota(
    affinity: int, quota: str, threads: int, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "AFFINITY", frozenset(range(affinity)))
    made = root("0::/", [v2()], {f"{G}/cpu.max": f"{quota} 100000"})
    usable_cores.cache_clear()  # it may have cached the answer for another test's root
    assert usable_cores(made) == threads


def test_cores_are_counted_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert limits.bound() == {0, 3, 5}
    monkeypatch.delattr(os, "sched_getaffinity")
    assert limits.bound() == set(range(os.cpu_count() or 1))


def test_cgroups_are_listed_from_the_own_one_upwards(root: Root) -> None:
    made = root("0::/a/b", [v2()], {})
    assert cgroups("memory", made) == [made / G / "a/b", made / G / "a", made / G]


# ---- memory --------------------------------------------------------------------------------------

M1 = f"{G}/memory"
LIMIT_1, USED_1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
FILES_1 = "cache 9\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200"
FILES_2 = "anon 9\ninactive_file 300\nactive_file 200"


def group(limit: object, used: object, files: str = "") -> dict[str, object]:
    """Return the files of a group of version 2 in /a/b."""
    return {
        f"{G}/a/b/memory.max": limit,
        f"{G}/a/b/memory.current": used,
        f"{G}/a/b/memory.stat": files,
    }


ROOM = 7000 * 1024


@pytest.mark.parametrize(
    ("own", "mounts", "files", "limit", "free"),
    [
        ("0::/a/b", [v2()], {}, math.inf, ROOM),
        ("0::/a/b", [v2()], group("max", 5000, FILES_2), math.inf, ROOM),
        ("0::/a/b", [v2()], group(5000, 4000, FILES_2), 5000, 1500),
        ("0::/a/b", [v2()], group(4000, 5000, FILES_2), 4000, 0),  # over its limit, for a moment
        ("0::/a/b", [v2()], group(5000, 1000) | {f"{G}/a/b/memory.high": 3000}, 3000, 2000),
        ("0::/a/b", [v2()], group("max", 1000) | {f"{G}/a/b/memory.high": "max"}, math.inf, ROOM),
        # a parent with less, which others use too
        (
            "0::/a/b",
            [v2()],
            group(5000, 1000) | {f"{G}/a/memory.max": 6000, f"{G}/a/memory.current": 5900},
            5000,
            100,
        ),
        ("0::/x/a/b/c", [v2("/x")], group(5000, 4000, FILES_2), 5000, 1500),
        # version 1
        (
            "4:memory:/a",
            [v1("memory")],
            {f"{M1}/a/{LIMIT_1}": 5000, f"{M1}/a/{USED_1}": 4000, f"{M1}/a/memory.stat": FILES_1},
            5000,
            1500,
        ),
        (
            "4:memory:/a",
            [v1("memory")],
            {
                f"{M1}/a/{LIMIT_1}": UNLIMITED,
                f"{M1}/a/{USED_1}": 4000,
                f"{M1}/{LIMIT_1}": UNLIMITED,
            },
            math.inf,
            ROOM,
        ),
        (
            "4:memory:/docker/1",
            [v1("memory", "/docker/1")],
            {  # a parent that the container does not see
                f"{M1}/{LIMIT_1}": UNLIMITED,
                f"{M1}/{USED_1}": 4000,
                f"{M1}/memory.stat": f"{FILES_1}\nhierarchical_memory_limit 5000",
            },
            5000,
            1500,
        ),
        # both versions mounted, the controller of one of them
        (
            "4:memory:/a\n0::/a",
            [v1("memory"), v2("/", f"/{G}/unified")],
            {f"{M1}/a/{LIMIT_1}": 5000, f"{M1}/a/{USED_1}": 4000},
            5000,
            1000,
        ),
        # missing or senseless figures
        ("0::/a/b", [v2()], {f"{G}/a/b/memory.max": 5000}, 5000, 5000),
        ("0::/a/b", [v2()], group(5000, "much", "active_file\ninactive_file many"), 5000, 5000),
        ("0::/a/b", [v2()], group(-5, 1), math.inf, ROOM),
        (None, None, {f"{G}/memory.max": 5000, f"{G}/memory.current": 4000}, 5000, 1000),
        (None, None, {f"{M1}/{LIMIT_1}": 5000, f"{M1}/{USED_1}": 4000}, 5000, 1000),
    ],
)
def test_memory_limit_is_the_strictest_of_the_cgroups(
    own: str | None,
    mounts: list[str] | None,
    files: dict[str, object],
    limit: float,
    free: int,
    root: Root,
) -> None:
    made = root(own, mounts, files)
    assert (memory_limit(made), free_bytes(root=made)) == (limit, free)
    assert free_bytes(100, made) == max(0, free - 100)


@pytest.mark.parametrize(
    ("meminfo", "overcommit", "free"),
    [
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\nSwapTotal: 9 kB\nSwapFree: 3 kB", "0", 10240),
        ("MemTotal: 9 kB\nMemAvailable: 7 kB", "0", 7168),  # without swap
        ("MemAvailable: 7 kB\nHugePages_Total: 0", "1", 7168),
        ("MemAvailable: 7 kB\nCommitLimit: 6 kB\nCommitted_AS: 5 kB", "0", 7168),
        ("MemAvailable: 7 kB\nCommitLimit: 6 kB\nCommitted_AS: 5 kB", "2", 1024),
        ("MemAvailable: 7 kB\nCommitLimit: 6 kB\nCommitted_AS: 8 kB", "2", 0),
    ],
)
def test_free_bytes_are_those_of_the_system(
    meminfo: str, overcommit: str, free: int, root: Root
) -> None:
    files = {"proc/meminfo": meminfo, "proc/sys/vm/overcommit_memory": overcommit}
    made = root(None, [], files)
    assert free_bytes(root=made) == free
    promises = overcommit == "2"  # that system counts them as committed
    assert free_bytes(1, made) == free - (0 if promises else 1)


def test_memory_without_proc_is_all_of_the_machine(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert limits.system_bytes(tmp_path) == whole
    assert memory_limit(tmp_path) == cpu_quota(tmp_path) == math.inf


def test_free_bytes_respect_ulimits(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ulimit counts allocated memory already, so it is not subtracted again."""
    made = root(None, [], {"proc/self/status": "VmSize:\t  1000 kB\nVmData:\t 300 kB\nName: x"})
    for kind, free in ((resource.RLIMIT_AS, 24 * 1024), (resource.RLIMIT_DATA, 724 * 1024)):
        soft = {kind: (1024 * 1024, -1)}
        none = (resource.RLIM_INFINITY,) * 2
        monkeypatch.setattr(
            resource, "getrlimit", lambda k, soft=soft, none=none: soft.get(k, none)
        )
        assert free_bytes(root=made) == free_bytes(1000, made) == free
