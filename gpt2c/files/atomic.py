"""Files that are whole or absent: every result is written under a temporary name, then renamed.

Knows nothing about what is in the files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from gpt2c.files.names import STATE_FILE

__all__ = [
    "REFUSALS",
    "TEMPORARY",
    "atomic_directory",
    "atomic_path",
    "atomic_paths",
    "check_directory",
    "check_link",
    "claim_directory",
    "claimed",
    "locked",
    "matching",
    "naming",
    "places",
    "reason",
    "refinement",
    "remove",
    "remove_leftovers",
    "sync",
    "temporary_path",
    "through",
]

TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # what `temporary_path` makes
# What file systems answer (FUSE, NFS, CIFS, 9p, overlays) that do not have what was asked for. A
# disk that fails or is full says something else.
REFUSALS = frozenset(
    getattr(errno, name)
    for name in (
        *("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM", "EACCES", "ENODEV", "ENOTTY"),
        *("EBADF", "EISDIR", "EXDEV", "ENOLCK"),
    )
)


@contextmanager
def refinement() -> Iterator[None]:
    """Do what makes work safer or faster, but is no part of it: a refusal does not end the work.

    An error that says more than a refusal passes: a disk that is full, one that fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


@contextmanager
def atomic_paths(*paths: Path) -> Iterator[list[Path]]:
    """Return a temporary path beside each path; on success rename them all, on failure remove them.

    No file is renamed before all of them are on disk, so a full disk leaves every one as it was.
    A user's link stays: the file that it leads to is replaced, see `through`.

    Raises
    ------
    OSError : a file cannot be written (no such directory, no permission, a full disk); see `places`
    """
    homes = places(*paths)
    temporaries = [temporary_path(home) for home in homes]
    meant = dict(zip(temporaries, paths, strict=True))
    with naming(paths[0], meant):
        try:
            yield temporaries
            for temporary in temporaries:
                with naming(temporary):
                    sync(temporary)
            for temporary, home in zip(temporaries, homes, strict=True):
                os.replace(temporary, home)
            for directory in dict.fromkeys(home.parent for home in homes):
                sync(directory)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Return a temporary path for one file; see `atomic_paths`."""
    with atomic_paths(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory beside `path`, which takes its name on success, whole and on disk.

    On failure it is removed. What has the name already is removed first.

    Raises
    ------
    OSError : a file cannot be written (no such directory, no permission, a full disk)
    """
    temporary = temporary_path(path)
    with naming(path, {temporary: path}):
        _delete(temporary)  # of a dead process that had this one's id
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.iterdir()):
                sync(file)
            sync(temporary)
            if os.path.lexists(path):
                remove(path)
            os.rename(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a directory, which loses its name before anything in it is gone; or a file."""
    temporary = path.with_name(f".{path.name}.removed.{os.getpid()}.tmp")
    _delete(temporary)
    with refinement():  # a container's file system may rename no directory of its image
        os.rename(path, temporary)
    _delete(path)
    _delete(temporary)


def remove_leftovers(directory: Path) -> None:
    """Remove what processes that were killed left half-written; no living one may write there."""
    for path in list(directory.iterdir()):
        if TEMPORARY.fullmatch(path.name):
            _delete(path)


def matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """Return what in a directory has a name of these patterns, a link that leads nowhere too."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in paths if any(fnmatchcase(path.name, p) for p in patterns)]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return the name beside a path that what is written for it has until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk, where that can be had."""
    with refinement():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: Path, meant: Mapping[Path, Path] | None = None) -> Iterator[None]:
    """Have an error of the disk say where it was: a full one does not.

    Parameters
    ----------
    path : named where the error names none
    meant : temporary path -> the one that its user knows, which is named in its place, or in which
        a file is
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # Of a copy the second name is the file that could not be written.
        names = [str(name) for name in (error.filename2, error.filename) if name is not None]
        name = names[-1] if names else str(path)
        for temporary, known in (meant or {}).items():
            for own in names:
                if own == str(temporary) or own.startswith(f"{temporary}{os.sep}"):
                    name = str(known) + own[len(str(temporary)) :]
        if name == error.filename:
            raise
        raise OSError(error.errno, error.strerror, name) from error


def reason(error: OSError) -> str:
    """Return what an error of the disk says: the file, and what is wrong with it."""
    if error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def claim_directory(path: Path, overwrite: bool) -> None:
    """Make an output directory; refuse one that holds something unless `overwrite`.

    What a process that was killed left half-written does not count.

    Raises
    ------
    FileExistsError : `path` is not empty and `overwrite` is false
    FileNotFoundError : `path` is a link that leads nowhere
    NotADirectoryError : `path` is a file
    """
    check_directory(path, overwrite)
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def claimed(path: Path, overwrite: bool) -> Iterator[None]:
    """Claim a directory for work; where the work fails and leaves it empty, what was made goes.

    See `claim_directory` for errors.
    """
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        claim_directory(path, overwrite)
        yield
    except BaseException:
        for directory in made:
            with suppress(OSError):
                directory.rmdir()
        raise


def check_link(path: Path) -> None:
    """Refuse a link to a directory that is not there: it may be of a disk that is not mounted.

    Raises
    ------
    FileNotFoundError : `path` is one
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: make or mount that"
            " directory, or remove the link"
        )


def through(path: Path) -> Path:
    """Return where a file of this name goes: where a link leads, so that the link stays.

    A link to a file of a checkpoint, or into the hub's cache, is its own place: what is written
    must reach neither.

    Raises
    ------
    OSError : a link to a directory that does not exist; a pipe or a device has the name
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"{path} is a pipe or a device; a file is wanted")
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, whose directory does not exist: make or"
            " mount it, or remove the link"
        )
    cached = target.parent.name == "blobs" and path.parent.parent.name == "snapshots"
    return path if cached or (target.parent / STATE_FILE).exists() else target


def places(*paths: Path) -> list[Path]:
    """Return where files that are written together go, see `through`.

    Raises
    ------
    OSError : see `through`; two of them would be one file
    """
    homes, found = [], dict[str, Path]()
    for path in paths:
        home = through(path)
        homes.append(home)
        other = found.setdefault(os.path.join(os.path.realpath(home.parent), home.name), path)
        if other is not path:
            raise OSError(f"{path} and {other} lead to one file: remove the link")
    return homes


def check_directory(path: Path, overwrite: bool) -> None:
    """Do the refusing of `claim_directory` alone, before long work."""
    check_link(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; an output directory is wanted")
    if overwrite or not path.exists():
        return
    if not all(TEMPORARY.fullmatch(entry.name) for entry in path.iterdir()):
        raise FileExistsError(
            f"{path} exists and is not empty; name another directory or pass --overwrite"
        )


@contextmanager
def locked(directory: Path, refusal: str, shared: bool = False) -> Iterator[None]:
    """Have a directory to oneself; the lock ends with the process, however it ends.

    The directory itself is locked, so that there is no file to be left over. A file system that has
    no such lock gives none.

    Parameters
    ----------
    directory : exists
    refusal : what the error says
    shared : have it beside others who share it

    Raises
    ------
    BlockingIOError : another process has it
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(refusal) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
