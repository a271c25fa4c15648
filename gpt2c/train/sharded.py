"""AdamW on several ranks: each updates its own pieces of the weights and holds their moments.

This is ZeRO's first stage (Rajbhandari et al. 2020, arXiv:1910.02054): a rank's moments take 8P / p
bytes in place of 8P, and the bytes sent are those of an all-reduce. Without it each rank gets the
whole sum of the gradients and updates all weights, to the same bits.

A checkpoint is that of one process. Rank 0 writes and reads it, and asks the others for one bucket
at a time, so its memory holds no moments of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files.tensors import PiecedTensor
from gpt2c.kernels.memory import Array
from gpt2c.parallel.gradients import Exchange
from gpt2c.parallel.world import Ranks, World
from gpt2c.train.optimizer import AdamW

__all__ = ["ShardedAdamW", "optimizer_of"]

GIVE, TAKE, END = range(3)  # what rank 0 asks of the others
MOMENTS = ("m", "v")


class ShardedAdamW(AdamW):
    """The optimizer of a rank; a step is collective, after `Exchange.finish`.

    Parameters
    ----------
    world, exchange : of the model's gradients
    model, settings : see `AdamW`
    shard : whether each rank holds the moments of its pieces alone (ZeRO-1)

    Raises
    ------
    ValueError, MemoryError : see `AdamW`
    """

    def __init__(
        self, world: Ranks, exchange: Exchange, model: Any, shard: bool, **settings: Any
    ) -> None:
        self._world, self._exchange, self._shard = world, exchange, shard
        super().__init__(model, **settings)
        if shard:
            model.expect(exchange.arrive)

    def _owned(self) -> list[slice]:
        return self._exchange.own if self._shard else super()._owned()

    def _norm(self) -> float:
        return self._exchange.norm()

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        if not self._shard:
            self._exchange.gather(self.model.flat_gradients)
        super()._update(learning_rate, grad_scale)
        if self._shard:  # the next forward pass waits for each layer's weights, all else for all
            self._exchange.begin(self.model.flat_parameters)

    def not_finite(self) -> str:
        """See `AdamW`; all ranks return the same."""
        return next(filter(None, self._world.all(super().not_finite())), "")

    def state(self) -> dict[str, Any]:
        """See `AdamW`. On rank 0, while the others serve, arrays that are gathered when written."""
        if not self._shard:
            return super().state()
        shape = (self.model.trained_size,)
        return {name: PiecedTensor(shape, partial(self._gathered, name)) for name in MOMENTS}

    def serve(self) -> None:
        """On other ranks: give and take what rank 0 asks for, until it calls `release`."""
        command = np.empty(3, np.int64)
        while True:
            self._world.broadcast(command)
            asked, moment, bucket = command.tolist()
            if asked == END:
                return
            array: Array = getattr(self, MOMENTS[moment])
            if not self._shard:
                self._world.broadcast(array)
                continue
            part = array[self._held[bucket]]
            comm = self._world.comm
            request = comm.Isend(part, 0) if asked == GIVE else comm.Irecv(part, 0)
            self._world.wait(request, "rank 0 at a checkpoint")
            self._world.bytes_sent += part.nbytes * (asked == GIVE)

    def release(self) -> None:
        """On rank 0: let the others continue."""
        self._ask(END)

    def _ask(self, asked: int, name: str = "m", bucket: int = 0) -> None:
        self._world.broadcast(np.array([asked, MOMENTS.index(name), bucket], np.int64))

    def _gathered(self, name: str) -> Iterator[Array]:
        """Yield a moment in the order of memory: each bucket is here before its first piece."""
        own: Array = getattr(self, name)
        for bucket, pieces in enumerate(self._exchange.pieces):
            self._ask(GIVE, name, bucket)
            found = [own[self._held[bucket]]]
            for rank, piece in enumerate(pieces[1:], 1):
                part = np.empty(piece.stop - piece.start, np.float32)
                self._world.wait(self._world.comm.Irecv(part, rank), "moments of other ranks")
                found.append(part)
            yield from found

    def _load(self, name: str, array: NDArray[Any]) -> None:
        if not self._shard:
            super()._load(name, array)
            self._ask(TAKE, name)
            self._world.broadcast(getattr(self, name))
            return
        for bucket, pieces in enumerate(self._exchange.pieces):
            self._ask(TAKE, name, bucket)
            for rank, piece in enumerate(pieces[1:], 1):
                part = np.ascontiguousarray(array[piece], np.float32)
                self._world.wait(self._world.comm.Isend(part, rank), "moments of other ranks")
                self._world.bytes_sent += part.nbytes
            getattr(self, name)[self._held[bucket]] = array[pieces[0]]


def optimizer_of(
    world: World, model: Any, zero: int, transport: str, **settings: Any
) -> tuple[AdamW, Exchange | None]:
    """Return a rank's optimizer, and the exchange of its gradients: None in a world of one.

    Parameters
    ----------
    zero : 1 to shard the moments, else 0
    transport : of the gradients, see `Exchange`
    settings : see `AdamW`
    """
    if not isinstance(world, Ranks):
        return AdamW(model, **settings), None
    exchange = Exchange(world, model, transport)
    return ShardedAdamW(world, exchange, model, zero == 1, **settings), exchange
