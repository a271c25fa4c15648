"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpt2c.files import atomic_paths, claim_directory


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_every_file_as_it_was(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text("old")
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as error, atomic_paths(*paths) as new:
        for path in new:
            path.write_text("new")
    assert error.value.filename == str(paths[0])
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_text() for path in paths] == ["old"] * 3


def test_all_files_change_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    with atomic_paths(*paths) as new:
        for path in new:
            path.write_text("new")
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["new"] * 2


def test_a_directory_is_claimed_once(tmp_path: Path) -> None:
    claim_directory(tmp_path / "x" / "y", overwrite=False)
    (tmp_path / "x" / "y" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        claim_directory(tmp_path / "x" / "y", overwrite=False)
    claim_directory(tmp_path / "x" / "y", overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        claim_directory(tmp_path / "x" / "y" / "file", overwrite=True)
