"""The ranks of a job: the processes that mpiexec or srun has started, connected by MPI.

A process that nothing has launched is a world of one: it has the same methods, which return what
they get, and MPI is never imported. All ranks run the same program, and each method that exchanges
something is called by all of them in the same order (it is collective).

Every wait for the others has a limit. It sleeps between two looks, because a rank that spins would
take the core from the one it waits for. A wait for much data only yields its core, because MPI
moves a few kilobytes at each look. Knows nothing about models.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.atomic import reason
from gpt2c.kernels.backend import THREAD_VARIABLES, default_threads
from gpt2c.kernels.checks import counted
from gpt2c.kernels.limits import AFFINITY, CORES, bind, usable_cores
from gpt2c.kernels.memory import available_bytes

__all__ = [
    "ALONE",
    "FAILED",
    "Ranks",
    "World",
    "first_voice",
    "join",
    "launched",
    "mpi_library",
    "require_alone",
]

T = TypeVar("T")
D = TypeVar("D", bound=np.generic)
# Rank and size, as Open MPI, MPICH with its descendants, and Slurm tell them.
VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
TIMEOUT = 600.0  # seconds, until the settings are known
LONGEST_SLEEP = 2e-4  # seconds; with longer ones a large message would stand still in between
SMALL = 1 << 16  # bytes of a message that needs no hurry
LAST_WORDS = 0.3  # seconds: a launcher that ends the job at once would lose the reason
FAILED = 2  # the exit code of a user's error


class Launched(NamedTuple):
    """The place of this process among those that a launcher has started."""

    rank: int
    size: int


def launched() -> Launched | None:
    """Return the rank and the number of ranks from the environment; None without a launcher."""
    for names in VARIABLES:
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdecimal() for value in values):
            return Launched(*map(int, values))
    return None


class Place(NamedTuple):
    """The host of a rank, its free memory, and the cores that the launcher left to the rank."""

    host: str
    cores: list[int]
    free: int


class World:
    """A world of one: this process alone; the base of `Ranks`.

    Attributes
    ----------
    rank, size : the number of this process, and of all
    here : the number of ranks on this host
    memory : bytes; this rank's share of what was free on the host before any rank took some
    timeout : the most seconds that a rank waits for the others
    doing : the present work, for the message of a rank that waits too long
    bytes_sent : to other ranks, until now
    waited : seconds of waiting for other ranks, until now
    report : ranks, hosts, threads and MPI, to follow the description of a run
    is_agreed : whether the error that ends the work comes on all ranks
    """

    rank = 0
    size = 1
    here = 1
    memory = math.inf

    def __init__(self) -> None:
        self.timeout = TIMEOUT
        self.doing = "the start"
        self.bytes_sent = 0
        self.waited = 0.0
        self.report = ""
        self.is_agreed = False

    def take_cores(self, threads: int) -> int:
        """Bind this rank to its share of the host's cores; return its threads.

        Parameters
        ----------
        threads : that the user wants, 0 for as many as the cores
        """
        return threads

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks, added in float64 in the order of ranks."""
        return [*values]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return flag

    def first(self, value: T) -> T:
        """Return the value of rank 0, which JSON can hold; that of other ranks is not used."""
        return value

    def all(self, value: T) -> list[T]:
        """Return the values of all ranks, which JSON can hold."""
        return [value]

    def rows(self, own: NDArray[D]) -> NDArray[D]:
        """Return the rows of all ranks, in the order of ranks; there may be none of a rank."""
        return own

    def share(self, count: int) -> slice:
        """Return this rank's share of `count` things: shares follow each other, nearly equal."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def turns(self, things: Iterable[T], check: Callable[[], None] | None = None) -> Iterator[T]:
        """Yield this rank's things: all take turns. Before each turn of all, `check` is called."""
        for number, thing in enumerate(things):
            if check and number % self.size == 0:
                check()
            if number % self.size == self.rank:
                yield thing

    def by_first(self, work: Callable[[], T]) -> T:
        """Return what rank 0 alone makes, which JSON can hold; the others wait without a limit."""
        return work()

    def agreement(self) -> AbstractContextManager[None]:
        """Raise an error within on all ranks: rank 0 tells it, the others end. Not collective."""
        return nullcontext()

    def guard(self, *agreed: type[Exception]) -> AbstractContextManager[None]:
        """End the job if an error ends one rank; errors of the types `agreed` come on all."""
        return nullcontext()


ALONE = World()


class Ranks(World):
    """Several ranks, connected by MPI.

    Parameters
    ----------
    MPI : the module mpi4py.MPI

    Attributes
    ----------
    comm, bulk : communicators, on each of which all ranks do the same in the same order; what goes
        over `bulk`, gradients and weights, may begin before or after a message on `comm`
    """

    def __init__(self, MPI: Any) -> None:
        super().__init__()
        self.MPI, self.comm, self.bulk = MPI, MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        host = self.MPI.Get_processor_name()
        own = host, sorted(AFFINITY), available_bytes()
        self._places = [Place(*found) for found in self.all(own)]
        beside = [place for place in self._places if place.host == host]
        self.here = len(beside)
        self.memory = min(place.free for place in beside) // self.here

    def take_cores(self, threads: int) -> int:
        """See `World`; ranks that the launcher has bound to cores of their own stay there."""
        own = self._places[self.rank]
        peers = [rank for rank, other in enumerate(self._places) if other[:2] == own[:2]]
        share = max(1, min(len(own.cores), usable_cores()) // len(peers))
        if not threads:
            given = any(map(os.environ.get, THREAD_VARIABLES))
            threads = default_threads() if given else share
        how = "unbound"
        if len(peers) == 1 and len(own.cores) < CORES:
            how = f"bound by the launcher to {len(own.cores)} of {CORES} cores"
        elif 1 < len(peers) <= len(own.cores) and threads <= share:
            first = share * peers.index(self.rank)
            bind(own.cores[first : first + share])
            how = "bound"
        hosts = len({place.host for place in self._places})
        self.report = (
            f"; {self.size} ranks on {counted(hosts, 'host')}, {counted(threads, 'thread')} each"
            f" ({how}), {mpi_library(self.MPI)}"
        )
        return threads

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `World`."""
        own = np.array(values, np.float64)
        found = np.empty((self.size, own.size), np.float64)
        self.wait(self.comm.Iallgather(own, found), "a sum")
        self.bytes_sent += own.nbytes * (self.size - 1)
        total = found[0].copy()
        for other in found[1:]:
            total += other
        return [float(value) for value in total]

    def any(self, flag: bool) -> bool:
        """See `World`."""
        return self.sum([float(flag)])[0] > 0

    def first(self, value: T) -> T:
        """See `World`."""
        text = _bytes(value if self.rank == 0 else None)
        length = np.array([text.size])
        self.broadcast(length)
        if self.rank:
            text = np.empty(length[0], np.uint8)
        self.broadcast(text)
        found: T = json.loads(text.tobytes())
        return found

    def all(self, value: T) -> list[T]:
        """See `World`."""
        return [json.loads(part.tobytes()) for part in self._gathered(_bytes(value))]

    def rows(self, own: NDArray[D]) -> NDArray[D]:
        """See `World`."""
        found = self._gathered(np.frombuffer(bytearray(own.tobytes()), np.uint8))
        return np.concatenate(found).view(own.dtype).reshape(-1, *own.shape[1:])

    def _gathered(self, own: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Return the bytes of each rank."""
        lengths = np.empty(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([own.size]), lengths), "what each rank tells")
        found = np.empty(lengths.sum(), np.uint8)
        self.wait(self.comm.Iallgatherv(own, [found, lengths.tolist()]), "what each rank tells")
        self.bytes_sent += own.size * (self.size - 1)
        return np.split(found, np.cumsum(lengths)[:-1])

    def by_first(self, work: Callable[[], T]) -> T:
        """See `World`."""
        limit = self.timeout
        if self.rank:
            self.timeout = math.inf
        try:
            with self.agreement():
                found = [work()] if self.rank == 0 else []
            (made,) = self.first(found)
            return made
        finally:
            self.timeout = limit

    def broadcast(self, array: NDArray[Any]) -> None:
        """Copy the array of rank 0 into that of all ranks, a piece at a time."""
        flat, piece = array.reshape(-1).view(np.uint8), 1 << 24
        for start in range(0, flat.size, piece):
            part = flat[start : start + piece]
            self.wait(self.comm.Ibcast(part, root=0), "what rank 0 tells", part.size > SMALL)
            self.bytes_sent += 0 if self.rank else part.size

    def wait(self, request: Any, what: str, bulk: bool = False) -> None:
        """Wait for a request, of much data if `bulk`; after `timeout` seconds end the job."""
        began, pause = time.perf_counter(), 0.0
        while not request.Test():
            if bulk:
                os.sched_yield()  # time.sleep(0) takes longer
            else:
                time.sleep(pause)
            waited = time.perf_counter() - began
            pause = min(LONGEST_SLEEP, waited / 4)
            if waited > self.timeout:
                self.abort(
                    f"waited {waited:.0f} s (--mpi-timeout) for {what} in {self.doing}: another"
                    " rank hangs, or its machine is gone"
                )
        self.waited += time.perf_counter() - began

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """See `World`."""
        error: BaseException | None = None
        try:
            yield
        except (ValueError, OSError, MemoryError) as caught:
            error = caught
        told = self.all(None if error is None else _told(error))
        bad = [rank for rank, text in enumerate(told) if text is not None]
        if not bad:
            return
        self.is_agreed = True
        if self.rank:
            raise SystemExit(FAILED)
        if error is not None:
            raise error
        raise ValueError(f"rank {bad[0]}: {told[bad[0]]}")

    @contextmanager
    def guard(self, *agreed: type[Exception]) -> Iterator[None]:
        """See `World`."""
        self.is_agreed = False
        try:
            yield
        except agreed:
            self.is_agreed = True  # for a guard around this one
            if self.rank:
                raise SystemExit(FAILED) from None
            raise
        except BaseException as error:
            if self.is_agreed:
                raise
            if not isinstance(error, ValueError | OSError | MemoryError | KeyboardInterrupt):
                traceback.print_exc()
            self.abort(_told(error))

    def abort(self, why: str) -> NoReturn:
        """Tell why, and end all ranks of the job."""
        print(f"gpt2c: rank {self.rank}: {why}", file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS)
        self.MPI.COMM_WORLD.Abort(FAILED)
        os._exit(FAILED)  # for a reader: Abort does not return


def _bytes(value: Any) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(json.dumps(value).encode()), np.uint8)


def _told(error: BaseException) -> str:
    """Return the reason of an error, for a line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return reason(error) or type(error).__name__


@functools.cache
def join() -> World:
    """Return the world of this process, the same at each call; the first call starts MPI.

    Raises
    ------
    ValueError : a launcher has started several processes, and MPI does not connect them
    """
    place = launched()
    return ALONE if place is None or place.size == 1 else _wait_until_all_ranks_start(place)


def _start_limit(words: Sequence[str]) -> float:
    """Return the seconds until all ranks must have started: the command's --mpi-timeout, if any."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--mpi-timeout", "--mpi_timeout", type=float, default=TIMEOUT)
    try:
        limit: float = flags.parse_known_args(words)[0].mpi_timeout
    except argparse.ArgumentError:  # refused later, by all ranks
        limit = TIMEOUT
    return limit if 1 <= limit < threading.TIMEOUT_MAX else TIMEOUT


def _wait_until_all_ranks_start(place: Launched) -> World:
    """Start MPI: see `join`. The name is what a rank that waits in vain tells."""
    # MPI waits without a limit until all ranks have come, and no Python runs meanwhile.
    faulthandler.dump_traceback_later(_start_limit(sys.argv), exit=True, file=2)
    try:
        import mpi4py

        mpi4py.rc.thread_level = "multiple"  # gradients.py has a thread that calls MPI
        from mpi4py import MPI

        if MPI.COMM_WORLD.size == place.size:
            return Ranks(MPI)
        why = (
            f"MPI sees {MPI.COMM_WORLD.size}: mpi4py has loaded {mpi_library(MPI)}, which must be"
            " the MPI of the launcher"
        )
    except (ImportError, RuntimeError) as error:  # absent; or its MPI is
        why = f"mpi4py cannot be loaded ({error}): pip install mpi4py, and an MPI"
    finally:
        faulthandler.cancel_dump_traceback_later()
    if place.rank:
        raise SystemExit(FAILED)
    raise ValueError(f"{place.size} processes were started, and {why}")


def require_alone(what: str) -> None:
    """Refuse several ranks for work that one process does.

    Raises
    ------
    ValueError : there are several
    """
    place = launched()
    if place is not None and place.size > 1:
        if place.rank:
            raise SystemExit(FAILED)
        raise ValueError(f"{what} does not run on several ranks yet: start it without mpiexec")


@contextmanager
def first_voice(errors: bool = False) -> Iterator[None]:
    """Print nothing on other ranks than the first; with `errors`, not to standard error either."""
    place = launched()
    if place is None or not place.rank:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere if errors else sys.stderr),
    ):
        yield


def mpi_library(MPI: Any) -> str:
    """Return the name and version of the MPI that the module mpi4py.MPI has loaded."""
    line = MPI.Get_library_version().splitlines()[0].split(",")[0]
    return " ".join(line.replace("Version:", "").split())
