"""The exchange of gradients and weights, in buckets, while kernels compute; the pieces of a rank.

Backward finishes the gradients of the last layer first. A bucket is a slice of the flat gradients
whose parameters are finished one after the other. Each bucket has a piece for each rank. As soon as
all of a bucket is final, every rank sends piece r to rank r (all-to-all), and rank r adds what it
gets in the order of ranks, in float32: the sums are the same to the bit on every MPI, which an
all-reduce of MPI's own does not promise. Then each rank holds the sums of its pieces, and an
all-gather of pieces makes any flat array whole again. Both together send 2 (p - 1) / p of the
gradients' bytes, as a ring's all-reduce does. Weights come back in the order in which forward reads
them, and each layer waits for its own.

The transport "bf16" sends gradients as the nearest bfloat16 numbers, in half the bytes. They are
summed in float32, and what is gathered stays float32.

Knows of a model only the names, order and flat memory of what is trained.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.memory import ALIGNMENT, Array
from gpt2c.kernels.reference.rounding import read, stored
from gpt2c.parallel.world import Ranks

__all__ = ["BUCKET", "IN_FLIGHT", "TRANSPORTS", "Bucket", "Exchange", "buckets"]

BUCKET = 1 << 20  # floats: small ones are on their way sooner
MANY = 16  # ranks; of more, the buckets are so much larger that pieces stay as they are
IN_FLIGHT = 24  # buckets; each takes its size again for what is received
PAUSE, LOOKS = 2e-4, 40  # seconds between looks at MPI while kernels compute, and looks each time
TRANSPORTS = ("fp32", "bf16")
BLOCK = 1 << 14  # floats that are rounded at once, in the cache


class Trained(Protocol):
    """The part of a model that an exchange uses."""

    @property
    def backend(self) -> Any: ...
    @property
    def flat_gradients(self) -> Array: ...
    @property
    def final_order(self) -> Sequence[tuple[str, ...]]: ...
    @property
    def trained_slices(self) -> Mapping[str, slice]: ...


class Bucket(NamedTuple):
    """A slice of the flat gradients, sent in one message to each rank.

    Attributes
    ----------
    start, end : in floats
    names : the parameters in it
    """

    start: int
    end: int
    names: frozenset[str]

    def pieces(self, size: int) -> list[slice]:
        """Return the piece of each of `size` ranks, a slice of flat memory; it may be empty.

        A piece begins on a cache line, so that kernels see it as they see the whole.
        """
        lines = (self.end - self.start) // ALIGNMENT
        ends = [self.start + ALIGNMENT * (lines * rank // size) for rank in range(size)]
        return [slice(a, b) for a, b in zip(ends, [*ends[1:], self.end], strict=True)]


def buckets(order: Iterable[Sequence[str]], slices: Mapping[str, slice], most: int) -> list[Bucket]:
    """Return the buckets in the order in which backward finishes them.

    Parameters
    ----------
    order : the names of parameters that are finished together, group after group
    slices : of the flat gradients, by name; a name that is not there has no gradient
    most : floats of a bucket; a longer array is divided
    """
    order = [*order]
    when = {name: number for number, names in enumerate(order) for name in names}
    done: list[Bucket] = []
    open_: list[Bucket] = []  # matrices and vectors of a layer lie apart, each grows downwards
    for names in order:
        for name in sorted((n for n in names if n in slices), key=lambda n: -slices[n].start):
            start, end = slices[name].start, slices[name].stop
            near = next((one for one in open_ if end == one.start or start == one.end), None)
            if near is not None:
                open_.remove(near)
                if end - start + near.end - near.start <= most:
                    start, end = min(start, near.start), max(end, near.end)
                    open_.append(Bucket(start, end, near.names | {name}))
                    continue
                done.append(near)
            open_.append(Bucket(start, end, frozenset({name})))
    done = sorted([*done, *open_], key=lambda one: max(map(when.__getitem__, one.names)))
    return [part for one in done for part in _divided(one, most)]


def _divided(bucket: Bucket, most: int) -> Iterator[Bucket]:
    """Yield a bucket in parts of at most `most` floats, nearly equal."""
    lines = (bucket.end - bucket.start) // ALIGNMENT
    count = max(1, math.ceil((bucket.end - bucket.start) / most))
    ends = [bucket.start + ALIGNMENT * (lines * part // count) for part in range(count)]
    for start, end in zip(ends, [*ends[1:], bucket.end], strict=True):
        yield Bucket(start, end, bucket.names)


class _Sent(NamedTuple):
    """A bucket on its way: what is received has a row for each rank."""

    request: Any
    bucket: Bucket
    received: NDArray[Any]


class _Mover(threading.Thread):
    """Moves what is on its way while kernels compute.

    MPI moves a few kilobytes each time that somebody calls it, and nothing in between. The thread
    ends with the main thread, too, so that none calls an MPI that has ended.
    """

    def __init__(self, world: Ranks) -> None:
        super().__init__(name="gpt2c-mpi")
        self._comm, self._stop_asked = world.comm, threading.Event()

    def run(self) -> None:
        while threading.main_thread().is_alive() and not self._stop_asked.wait(PAUSE):
            for _ in range(LOOKS):
                self._comm.Iprobe()

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


class Exchange:
    """Sums the gradients of ranks; each rank gets those of its own pieces.

    Parameters
    ----------
    world : the ranks
    model : its gradients are exchanged; what it trains must not change
    transport : of the gradients, one of TRANSPORTS

    Attributes
    ----------
    buckets : in the order in which they are sent
    pieces : for each bucket in the order of memory, the piece of each rank
    own : the pieces of this rank, in the order of memory
    """

    def __init__(self, world: Ranks, model: Trained, transport: str = "fp32") -> None:
        self._world, self._model, self._narrow = world, model, transport == "bf16"
        times = min(IN_FLIGHT, max(1, world.size // MANY))
        self.buckets = buckets(model.final_order, model.trained_slices, times * BUCKET)
        self._most = IN_FLIGHT // times  # on their way
        in_memory = sorted(self.buckets)
        self.pieces = [bucket.pieces(world.size) for bucket in in_memory]
        self.own = [pieces[world.rank] for pieces in self.pieces]
        self._final: set[str] = set()
        self._next = 0  # of the buckets to send
        self._sent: deque[_Sent] = deque()
        self._coming: dict[Bucket, Any] = {}  # the requests of buckets that are gathered
        self._mover: _Mover | None = None
        # On one host all arrives in a moment, and the thread would only take time from kernels.
        threads = world.MPI.Query_thread() == world.MPI.THREAD_MULTIPLE
        self._moves = threads and world.here < world.size

    def send(self, names: Iterable[str]) -> None:
        """Send the buckets that these names complete: their gradients are final.

        All ranks send in the same order, as MPI wants it.
        """
        self._post_final(names)
        self._move()

    def _move(self) -> None:
        """Let what is on its way proceed while kernels compute."""
        requests = [*self._coming.values(), *(one.request for one in self._sent)]
        if not self._moves:
            self._world.MPI.Request.Testall(requests)
        elif requests and self._mover is None:
            self._mover = _Mover(self._world)
            self._mover.start()
        elif not requests:
            self._rest()

    def _rest(self) -> None:
        if self._mover is not None:
            self._mover.stop()
            self._mover = None

    def _post_final(self, names: Iterable[str]) -> None:
        self._final.update(names)
        while self._next < len(self.buckets) and self.buckets[self._next].names <= self._final:
            if len(self._sent) == self._most:
                self._add_first()
            self._post(self.buckets[self._next])
            self._next += 1

    def finish(self) -> None:
        """Send what is not sent yet, and wait until the own pieces hold the sums of all ranks."""
        self.arrive()  # where no forward pass has read all weights
        self._post_final(self._model.trained_slices)
        self.close()
        self._final.clear()
        self._next = 0

    def close(self) -> None:
        """Wait for all that is on its way, before MPI may end."""
        self.arrive()
        self._rest()
        while self._sent:
            self._add_first()

    def norm(self) -> float:
        """Return the Euclidean norm of the summed gradients, the same on all ranks."""
        flat, ops = self._model.flat_gradients, self._model.backend
        squares = sum(ops.global_norm(flat[own]) ** 2 for own in self.own if own.start < own.stop)
        return math.sqrt(self._world.sum([squares])[0])

    def gather(self, flat: Array) -> None:
        """Make a flat array whole from the pieces that ranks own."""
        self.begin(flat)
        self.arrive()

    def begin(self, flat: Array) -> None:
        """Begin to make a flat array whole, first what forward reads first: see `arrive`.

        Until it has arrived it must neither be read nor written.
        """
        self.arrive()
        world = self._world
        for bucket in reversed(self.buckets):
            pieces, part = bucket.pieces(world.size), flat[bucket.start : bucket.end]
            counts, begins = _counts(pieces, bucket.start)
            whole = [part, counts, begins, world.MPI.FLOAT]
            self._coming[bucket] = world.bulk.Iallgatherv(world.MPI.IN_PLACE, whole)
            world.bytes_sent += 4 * counts[world.rank] * (world.size - 1)
        self._move()

    def arrive(self, names: Iterable[str] | None = None) -> None:
        """Wait until the buckets of these names have arrived, None for all. Not collective."""
        if not self._coming:
            return
        wanted = None if names is None else {*names}
        for bucket, request in [*self._coming.items()]:
            if wanted is None or not bucket.names.isdisjoint(wanted):
                self._world.wait(request, "the pieces of other ranks", bulk=True)
                del self._coming[bucket]  # last: an error in the wait must not let it be read
        self._move()

    def _post(self, bucket: Bucket) -> None:
        """Begin to send a bucket and to receive the own piece from all ranks."""
        world, pieces = self._world, bucket.pieces(self._world.size)
        counts, begins = _counts(pieces, bucket.start)
        own = counts[world.rank]
        sent: NDArray[Any] = self._model.flat_gradients[bucket.start : bucket.end]
        kind = world.MPI.FLOAT
        if self._narrow:
            sent, kind = _rounded(sent), world.MPI.UINT16_T
        received = np.empty((world.size, own), sent.dtype)
        rows = [own] * world.size, [own * rank for rank in range(world.size)]
        request = world.bulk.Ialltoallv([sent, counts, begins, kind], [received, *rows, kind])
        world.bytes_sent += sent.itemsize * (sum(counts) - own)
        self._sent.append(_Sent(request, bucket, received))

    def _add_first(self) -> None:
        """Wait for the first bucket on its way, and add its rows in the order of ranks."""
        request, bucket, received = self._sent.popleft()
        self._world.wait(request, "gradients", bulk=True)
        own = bucket.pieces(self._world.size)[self._world.rank]
        total = self._model.flat_gradients[own]
        np.copyto(total, self._read(received[0]))
        for row in received[1:]:
            total += self._read(row)

    def _read(self, row: NDArray[Any]) -> Array:
        return read(row) if self._narrow else row


def _rounded(x: Array) -> NDArray[np.uint16]:
    """Return the nearest bfloat16 numbers."""
    found = np.empty(x.size, np.uint16)
    for start in range(0, x.size, BLOCK):
        found[start : start + BLOCK] = stored(x[start : start + BLOCK])
    return found


def _counts(pieces: Sequence[slice], start: int) -> tuple[list[int], list[int]]:
    """Return the lengths of pieces, and where each begins after `start`."""
    return [one.stop - one.start for one in pieces], [one.start - start for one in pieces]
