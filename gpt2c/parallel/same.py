"""Whether all ranks have the same command, settings, data and version: else they train nonsense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gpt2c.parallel.world import FAILED, World

__all__ = ["check_command", "check_same"]


def check_command(world: World, own: str) -> None:
    """Refuse ranks that were started with another command than rank 0; collective.

    It is the first that ranks do together, and needs nothing of a rank that does other work.

    Raises
    ------
    ValueError : a rank was; on rank 0, the others end
    """
    first, *others = world.all(own)
    bad = next((rank for rank, other in enumerate(others, 1) if other != first), None)
    if bad is None:
        return
    if world.rank:
        raise SystemExit(FAILED)
    words, wanted = others[bad - 1].split(), first.split()
    more = " ".join(word for word in words if word not in wanted)
    less = " ".join(word for word in wanted if word not in words)
    pairs = [("with", more), ("without", less)]
    told = " and ".join(f"{how} {names!r:.200}" for how, names in pairs if names)
    raise ValueError(
        f"rank {bad} was started {told}, unlike rank 0: start all ranks with the same command and"
        " the same flags"
    )


def check_same(world: World, own: Mapping[str, Any], local: Collection[str]) -> None:
    """Refuse ranks that differ from rank 0; collective.

    Parameters
    ----------
    own : "gpt2c", the version; "settings", name -> value; "data", what identifies it; "models",
        role -> checksum of each model that is read
    local : settings that may differ

    Raises
    ------
    ValueError : a rank differs; on rank 0, the others end
    """
    found = world.all({**own})
    with world.agreement():
        for rank, other in enumerate(found):
            _compare(rank, other, found[0], local)


def _compare(
    rank: int, other: Mapping[str, Any], first: Mapping[str, Any], local: Collection[str]
) -> None:
    if other["gpt2c"] != first["gpt2c"]:
        raise ValueError(
            f"rank {rank} runs gpt2c {other['gpt2c']} and rank 0 runs {first['gpt2c']}: install one"
            " version on all machines"
        )
    for name, value in first["settings"].items():
        if name not in local and other["settings"].get(name) != value:
            raise ValueError(
                f"rank {rank} has {name}={other['settings'].get(name)} and rank 0 has"
                f" {name}={value}: start all ranks with the same settings"
            )
    if other["data"] != first["data"]:
        raise ValueError(
            f"rank {rank} has other training or validation tokens than rank 0: each machine needs"
            " the same data"
        )
    for role, checksum in first["models"].items():
        if other["models"].get(role) != checksum:
            raise ValueError(
                f"rank {rank} has another {role} than rank 0: each machine needs the same model"
            )
