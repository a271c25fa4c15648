"""Files that are whole or absent: every result is written under a temporary name, then renamed.

Knows nothing about what is in the files. Used by data, tokenizer, checkpoint and train.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_paths(*paths: Path) -> Iterator[list[Path]]:
    """Give a temporary path beside each path; on success rename them all, on failure remove them.

    No file is renamed before all of them are on disk, so a full disk leaves every one as it was.

    Raises
    ------
    OSError : a file cannot be written (no such directory, no permission, a full disk)
    """
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(paths[0])) from error
        raise
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path for one file; see `atomic_paths`."""
    with atomic_paths(path) as (temporary,):
        yield temporary


def claim_directory(path: Path, overwrite: bool) -> None:
    """Make an output directory; refuse one that holds something unless `overwrite`.

    Raises
    ------
    FileExistsError : `path` is not empty and `overwrite` is false
    NotADirectoryError : `path` is a file
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; an output directory is wanted")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{path} exists and is not empty; name another directory or pass --overwrite"
        )
    path.mkdir(parents=True, exist_ok=True)
