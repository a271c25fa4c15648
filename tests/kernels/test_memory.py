"""Memory: alignment, and what happens if the system gives less than is wanted."""

from __future__ import annotations

from weakref import WeakValueDictionary

import numpy as np
import pytest

from gpt2c.kernels import memory
from gpt2c.kernels.memory import ALIGNMENT, HUGE_PAGE, aligned_zeros, available_bytes

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


def test_zeros_work_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MADV_HUGEPAGE", 12345)  # the system answers: invalid argument
    assert not aligned_zeros(EDGE).any()
    monkeypatch.setattr(memory, "MADV_HUGEPAGE", None)
    assert not aligned_zeros(EDGE).any()


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes are wanted"):
        aligned_zeros(1 << 58)


def test_memory_counts_as_used_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts touched pages; untouched allocated pages are not free either."""
    monkeypatch.setattr(memory, "_given", WeakValueDictionary())  # without those of earlier tests
    monkeypatch.setattr(memory, "free_bytes", lambda promised: 50 * HUGE_PAGE - promised)
    before = available_bytes()
    size = 10 * HUGE_PAGE
    array = aligned_zeros(size // 4)
    assert available_bytes() == before - size
    array[: array.size // 2].fill(1)
    assert abs(available_bytes() - (before - size // 2)) <= HUGE_PAGE
    array.fill(1)
    assert before - available_bytes() <= HUGE_PAGE
    del array
    assert available_bytes() == before
    kept = [aligned_zeros(size // 4) for _ in range(before // size)]
    with pytest.raises(MemoryError, match=f"^{size:,} bytes are wanted, [\\d,]+ are free$"):
        aligned_zeros(size // 4)
    del kept


def test_untouched_memory_is_0_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array = aligned_zeros(EDGE)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory._untouched() == 0
    assert not array.any()


def test_require_refuses_the_sum_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 900_000_000)
    parts = {"weights": 300_000_000, "gradients": 600_000_000, "nothing": 0}
    memory.require("training", parts, "lower it")
    parts["moments"] = 1
    with pytest.raises(MemoryError) as error:
        memory.require("training", parts, "lower it")
    assert str(error.value) == (
        "training needs 900 MB: weights 300 MB, gradients 600 MB, moments 0.0 MB; 900 MB are"
        " free: lower it"
    )
