"""Files that are whole or absent: every result is written under a temporary name, then renamed.

Knows nothing about what is in the files. Used by data, tokenizer, checkpoint and train.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success rename it to `path`, on failure remove it.

    Raises
    ------
    OSError : the file cannot be written (no such directory, no permission, a full disk); `path` is
        as it was
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the content must be on disk before the name points to it
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


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
