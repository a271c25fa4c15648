"""The command line, run in the `world` of a test file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2c.cli.main import main


@pytest.fixture
def gpt2c(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Return gpt2c in `world`, as a function: arguments -> (exit code, standard output, error)."""
    monkeypatch.chdir(world)
    for variable in ("GPT2C_BACKEND", "GPT2C_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)

    def run(arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(arguments.split())
        except SystemExit as stop:  # argparse raises it
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run
