"""Memory: where arrays start, and what happens where the system gives less than is wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2c import memory
from gpt2c.memory import ALIGNMENT, HUGE_PAGE, aligned_zeros, free_bytes

EDGE = HUGE_PAGE // 4


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, EDGE - 1, EDGE, EDGE + 1, 3 * EDGE + 5])
def test_zeros_start_on_a_line_or_a_page(size: int) -> None:
    arrays = [aligned_zeros(size) for _ in range(3)]
    for i, array in enumerate(arrays):
        assert array.shape == (size,) and array.dtype == np.float32 and not array.any()
        border = HUGE_PAGE if size >= EDGE else 4 * ALIGNMENT
        assert array.ctypes.data % border == 0
        array.fill(i + 1)
    assert all((array == i + 1).all() for i, array in enumerate(arrays))


def test_memory_outlives_its_maker_and_not_its_array() -> None:
    part = aligned_zeros(EDGE)[-3:]
    part[...] = 7
    assert part.tolist() == [7, 7, 7]


def test_a_system_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MADV_HUGEPAGE", 12345)  # the system answers: invalid argument
    assert not aligned_zeros(EDGE).any()
    monkeypatch.setattr(memory, "MADV_HUGEPAGE", None)
    assert not aligned_zeros(EDGE).any()


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes are wanted"):
        aligned_zeros(1 << 58)


V1 = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"
V2 = "memory.max", "memory.current", "memory.stat"
UNLIMITED = 9223372036854771712  # what version 1 says
FILES_1 = "cache 9\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200"
FILES_2 = "anon 9\ninactive_file 300\nactive_file 200"


@pytest.mark.parametrize(
    ("meminfo", "names", "group", "free"),
    [
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\nSwapTotal: 9 kB\nSwapFree: 3 kB\n", V2, None, 10240),
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\n", V2, None, 7168),  # without swap
        ("MemAvailable: 7 kB\nHugePages_Total: 0\n", V2, ("max", 5000, FILES_2), 7168),
        ("MemAvailable: 7 kB\n", V2, (5000, 4000, FILES_2), 1500),
        ("MemAvailable: 7 kB\n", V2, (4000, 5000, FILES_2), 0),  # over its limit, for a moment
        ("MemAvailable: 7 kB\n", V1, (5000, 4000, FILES_1), 1500),
        ("MemAvailable: 7 kB\n", V1, (UNLIMITED, 4000, FILES_1), 7168),
    ],
)
def test_free_is_what_system_and_group_have(
    meminfo: str,
    names: tuple[str, ...],
    group: tuple[object, ...] | None,
    free: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "meminfo").write_text(meminfo)
    (tmp_path / "memory").mkdir()
    for name, content in zip(names, group or (), strict=False):
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert free_bytes() == free
    if not free:
        with pytest.raises(MemoryError, match="0 are free"):
            aligned_zeros(EDGE)
