"""Fixtures of training runs: whole ones, cut ones, and an action in a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_nothing
from helpers.runs import train, train_short

from gpt2c.screen.progress import Progress
from gpt2c.train import loop


@pytest.fixture
def whole(data: Path, tmp_path: Path, no_picture: None) -> Path:
    """Return an uninterrupted run of 20 steps, which the test may change."""
    train(data, tmp_path / "whole", save_interval=5)
    return tmp_path / "whole"


@pytest.fixture(scope="session")
def whole_short(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run of 8 steps, which no test changes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        train_short(data, out)
    return out


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that trains until a power cut in the middle of a step, before its log."""

    def begin(data: Path, out: Path, step: int, **changes: Any) -> Path:
        def stop(self: Progress, now: int, figures: str) -> None:
            if now == step:
                raise RuntimeError("power cut")

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "step", stop)
            patch.setattr(loop, "_rescue", lambda *run: None)  # a power cut saves nothing
            with pytest.raises(RuntimeError, match="power cut"):
                train(data, out, **changes)
        return out

    return begin


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Return a function that arranges an action between a step's update and its evaluation."""
    original = Progress.step

    def arrange(wanted: int, action: Callable[[], Any]) -> None:
        def step(self: Progress, now: int, figures: str) -> bool:
            if now == wanted:
                action()
            return original(self, now, figures)

        monkeypatch.setattr(Progress, "step", step)

    return arrange
