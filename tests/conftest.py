"""Shared fixtures: backends, random numbers, guarded memory, data files."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2c.kernels.backend import backends, get_backend
from gpt2c.text.prepare import prepare

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DOCUMENTS = [f"Document {n}. " + "the cat sat on the mat. " * (3 + n % 4) for n in range(30)]

if (DATA / "tiktoken-cache").is_dir():  # else tiktoken downloads its vocabularies
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken-cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the real hub; test_hub.py has its own

# Tests send these to programs, which ignore what this process ignores:
# under nohup, or after & in a script.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: 0)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(params=backends())  # test_backend.py skips once for each that cannot run here
def backend_name(request: pytest.FixtureRequest) -> str:
    """Return the name of every backend of this machine in turn."""
    return request.param


@pytest.fixture
def backend(backend_name: str) -> Any:
    """Return every backend in turn."""
    return get_backend(backend_name)


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator of the same random numbers in every run."""
    return np.random.default_rng(1337)


@pytest.fixture
def data_file() -> Callable[[str], Path]:
    """Return the path of a file of the shared data, or skip the test where it is absent."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is not there")
        return DATA / name

    return find


def refused(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """Return the message of a call's ValueError, which must be one line and one sentence."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **keywords)
    message = str(error.value)
    assert not re.search(r"\n|\. [A-Z]", message), message
    return message


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return prepared data that no test changes."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    prepare(DOCUMENTS, path, "bytes")
    return path


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than a tiny run: the picture, and the peak's measurement."""
    patch.setattr("gpt2c.train.loop.plot_loss", lambda *_: False)
    patch.setattr("gpt2c.train.hooks.fma_peak", lambda *_: 0.0)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train without the picture and without the peak's measurement; see `draw_nothing`."""
    draw_nothing(monkeypatch)


class Guarded:
    """Copies of arrays in memory that shows a kernel's stray reads and writes.

    Each copy stands between guards and starts one element past a multiple of 64 bytes, the
    alignment that vector code prefers. A guard is a quiet NaN that no kernel computes, in float32
    and float16. `check` finds a guard that was overwritten; the result shows a guard that was read
    and used.
    """

    PATTERN = np.uint32(0x7FC0FFEE)
    GUARD = 64  # bytes: the longest vector

    def __init__(self) -> None:
        self._buffers: list[tuple[np.ndarray, int, int]] = []

    def copy(self, array: np.ndarray) -> np.ndarray:
        """Return a guarded copy of an array whose numbers have 4, 2 or 1 bytes."""
        buffer = self._guards(array.nbytes + 4 * self.GUARD)
        start = self.GUARD + -buffer.ctypes.data % self.GUARD + array.itemsize
        self._buffers.append((buffer, start, start + array.nbytes))
        copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def _guards(self, size: int) -> np.ndarray:
        return np.full(-(-size // 4), self.PATTERN).view(np.uint8)

    def check(self, after: str = "the test") -> None:
        """Fail if a guard of a copy made since the last check was overwritten."""
        for buffer, start, stop in self._buffers:
            guards = self._guards(buffer.nbytes)
            assert (buffer[:start] == guards[:start]).all(), f"{after} wrote before an array"
            assert (buffer[stop:] == guards[stop:]).all(), f"{after} wrote behind an array"
        self._buffers.clear()


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    """Return guarded memory; check its guards after the test."""
    memory = Guarded()
    yield memory
    memory.check()
