"""Memory: where arrays start, and what happens where the system gives less than is wanted."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2c import memory
from gpt2c.memory import ALIGNMENT, HUGE_PAGE, aligned_zeros

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
