"""Files that are whole or absent: every result is written under a temporary name, then renamed.

Knows nothing about what the files contain.
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
    "check_apart",
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
# Errors by which a file system (FUSE, NFS, CIFS, 9p, overlays) refuses an operation that it does
# not support. A disk that fails or is full raises other errors.
REFUSALS = frozenset(
    getattr(errno, name)
    for name in (
        *("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM", "EACCES", "ENODEV", "ENOTTY"),
        *("EBADF", "EISDIR", "EXDEV", "ENOLCK"),
    )
)


@contextmanager
def refinement() -> Iterator[None]:
    """Ignore an error of REFUSALS in an optional step, which makes the work only safer or faster.

    Other errors pass, such as those of a disk that is full or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


@contextmanager
def atomic_paths(*paths: Path) -> Iterator[list[Path]]:
    """Return a temporary path beside each path; on success rename them all, on failure remove them.

    No file is renamed before all of them are on disk, so a full disk leaves the old ones unchanged.
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
    """Return a temporary directory beside `path`; on success rename it, on failure remove it.

    All files are on disk before the rename. An existing `path` is removed just before it.

    Raises
    ------
    OSError : a file cannot be written (no such directory, no permission, a full disk)
    """
    temporary = temporary_path(path)
    with naming(path, {temporary: path}):
        _delete(temporary)  # left by a dead process with the same id
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
    """Remove a file or directory; rename it first, so that `path` is never a half-removed one."""
    temporary = path.with_name(f".{path.name}.removed.{os.getpid()}.tmp")
    _delete(temporary)
    with refinement():  # a container may be unable to rename a directory of its image
        os.rename(path, temporary)
    _delete(path)
    _delete(temporary)


def remove_leftovers(directory: Path) -> None:
    """Remove the half-written files of killed processes; no running one may write there."""
    for path in list(directory.iterdir()):
        if TEMPORARY.fullmatch(path.name):
            _delete(path)


def matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the paths in a directory whose names match the patterns, dangling links included."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in paths if any(fnmatchcase(path.name, p) for p in patterns)]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return the path beside `path` that its new content has until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk, if the file system can."""
    with refinement():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: Path, meant: Mapping[Path, Path] | None = None) -> Iterator[None]:
    """Make an OSError name the user's path: the error of a full disk names none.

    Parameters
    ----------
    path : named if the error names no path
    meant : temporary path -> the user's path, which is named instead of the temporary path, also
        for a file in it
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # If a copy failed, the second name is the file that could not be written.
        names = [str(name) for name in (error.filename2, error.filename) if name is not None]
        name = names[-1] if names else str(path)
        for temporary, known in (meant or {}).items():
            for own in names:
                if own == str(temporary) or own.startswith(f"{temporary}{os.sep}"):
                    name = str(known) + own[len(str(temporary)) :]
        if name == error.filename:
            raise
        raise OSError(error.errno, error.strerror, name) from error


def reason(error: BaseException) -> str:
    """Return the text of an error; of an OSError the file, and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def claim_directory(path: Path, overwrite: bool) -> None:
    """Make an output directory; refuse one that is not empty unless `overwrite`.

    Half-written files of killed processes do not count.

    Raises
    ------
    FileExistsError : `path` is not empty and `overwrite` is false
    FileNotFoundError : `path` is a dangling link
    NotADirectoryError : `path` is a file
    """
    check_directory(path, overwrite)
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def claimed(path: Path, overwrite: bool) -> Iterator[None]:
    """Claim a directory for work; if the work fails, remove directories made here, if empty.

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
    """Refuse a dangling link: its directory may be on a disk that is not mounted.

    Raises
    ------
    FileNotFoundError : `path` is a dangling link
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: make or mount that"
            " directory, or remove the link"
        )


def through(path: Path) -> Path:
    """Return the path to write for `path`: the target of a link, so that the link stays.

    A link to a file of a checkpoint, or into the hub's cache, is itself replaced, because a write
    must reach neither.

    Raises
    ------
    OSError : `path` is a link into a directory that does not exist, a pipe or a device
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
    """Return the paths to write for files that are written together, see `through`.

    Raises
    ------
    OSError : see `through`; two paths lead to one file
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
    """Raise the errors of `claim_directory` before long work; make nothing."""
    check_link(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; an output directory is wanted")
    if overwrite or not path.exists():
        return
    if not all(TEMPORARY.fullmatch(entry.name) for entry in path.iterdir()):
        raise FileExistsError(
            f"{path} exists and is not empty; name another directory or pass --overwrite"
        )


def check_apart(out: Path, *inputs: object) -> None:
    """Refuse an output that is or holds an input: what a path has before may be removed.

    Parameters
    ----------
    inputs : paths; what is no path, or a path of nothing, is passed over

    Raises
    ------
    ValueError : `out` is or holds one of them
    """
    home = os.path.realpath(out)
    for each in inputs:
        if isinstance(each, str | os.PathLike) and os.path.exists(each):
            place = os.path.realpath(each)
            if Path(place).is_relative_to(home):
                own = "is read itself" if place == home else f"holds {each!s}, which is read"
                raise ValueError(
                    f"{out} {own}, and its content would be replaced: name another directory to"
                    " write to"
                )


@contextmanager
def locked(directory: Path, refusal: str, shared: bool = False) -> Iterator[None]:
    """Lock a directory; the lock ends with the process, however it ends.

    The directory itself is locked, so no lock file can be left over. On a file system without such
    locks, nothing is locked.

    Parameters
    ----------
    directory : must exist
    refusal : the text of the error
    shared : share the lock with other processes that share it

    Raises
    ------
    BlockingIOError : another process has the lock
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
