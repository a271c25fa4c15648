"""The rows of several ranks: all take a training step together, each with its rows of the batch.

The first rank runs the benchmark as one process does, and each backend has two rows. One is a
process of its own, as always: one rank alone. In the other row all ranks work: the first one tells
the others the commands of `Worker`, which each of them carries out on its part of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from gpt2c.bench.suite import Measurement, Row, start
from gpt2c.bench.worker import Worker
from gpt2c.parallel.world import Ranks

__all__ = ["Team", "add_speed_ups"]

CLOSE, END = "close", "end"


class Team:
    """The ranks of a benchmark, and their workers.

    Parameters
    ----------
    world : the ranks
    threads : of each
    """

    def __init__(self, world: Ranks, threads: int) -> None:
        self.world, self._threads = world, threads
        self._workers: dict[str, Worker] = {}

    def serve(self) -> None:
        """On other ranks: do what the first one asks for, until it calls `end`."""
        asked: list[Any] = []
        while (asked := self.world.first(asked)) != [END]:
            self._do(*asked)

    def end(self) -> None:
        """On the first rank: let the others end."""
        self.world.first([END])

    def ask(self, row: str, do: str, **arguments: Any) -> dict[str, Any]:
        """On the first rank: let all ranks carry out a command of `Worker`, or "close"."""
        asked: list[Any] = [row, do, arguments]
        with self.world.guard():  # without this one the others would wait
            return self._do(*self.world.first(asked))

    def begin(
        self, names: Sequence[str], threads: int, stack: ExitStack
    ) -> Iterator[Row | Measurement]:
        """Start the rows; see `gpt2c.bench.suite.start`."""
        for name, alone in zip(names, start(names, threads, stack), strict=True):
            yield alone
            yield stack.enter_context(TeamRow(name, self))

    def _do(self, row: str, do: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if do == CLOSE:
            del self._workers[row]
            return {}
        if row not in self._workers:
            self._workers[row] = TeamWorker(row, self._threads, self.world)
        answer: dict[str, Any] = getattr(self._workers[row], do)(**arguments)
        return answer


class TeamRow(Row):
    """A backend on all ranks."""

    def __init__(self, name: str, team: Team) -> None:
        self._backend, self._team = name, team
        self.name = f"{team.world.size} x {name}"
        self.ask("hello")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """See `Row`; an error of a rank ends the job."""
        return self._team.ask(self._backend, do, **arguments)

    def close(self) -> None:
        """Free the memory of all ranks."""
        self.ask(CLOSE)


class TeamWorker(Worker):
    """The part of a row that one rank does."""

    def train(
        self, config: dict[str, Any], B: int, T: int, recompute: str | None
    ) -> dict[str, Any]:
        """See `Worker`."""
        return super().train(config, B, T, recompute) | {"ranks": self._world.size}

    def step(self) -> dict[str, Any]:
        """See `Worker`; with the most memory of a rank, its mean bytes sent and share of waiting.

        The ranks begin together.
        """
        world = self._world
        world.sum([0.0])
        sent, waited = world.bytes_sent, world.waited
        found = super().step()
        own = [world.bytes_sent - sent, (world.waited - waited) / found["seconds"]]
        total, share = world.sum(own)
        found |= {"mpi_bytes": round(total / world.size), "mpi_share": share / world.size}
        return found | {"peak_memory": max(world.all(found["peak_memory"]))}


def add_speed_ups(results: Sequence[Measurement]) -> None:
    """Add to the facts of rows of several ranks: how much faster they are than one rank alone.

    The efficiency is the speed-up divided by the number of ranks.
    """
    alone = {r.row: r for r in results if "ranks" not in r.facts}
    for r in results:
        one = alone.get(r.row.rpartition(" ")[2])
        if "ranks" in r.facts and one and one.seconds and r.seconds:
            speed_up = one.median / r.median
            r.facts |= {"speed_up": speed_up, "efficiency": speed_up / r.facts["ranks"]}
