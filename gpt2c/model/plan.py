"""Activations: the memory of a batch, one buffer that is used again for every batch.

Lays out the arrays that blocks name by how long each must live. Knows nothing about the blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, require, view
from gpt2c.model.block import Batch, Life, Slot
from gpt2c.model.config import GPT2Config
from gpt2c.model.stack import Stack

__all__ = ["KEPT", "Activations", "bytes_needed", "parts_needed"]

# The activations that stay until the backward pass, by the name of the policy; the others are
# computed again just before. A layer of GPT-2 keeps 16, 10 and 1 times C numbers a token.
KEPT = {None: Life.CHEAP, "light": Life.INNER, "full": Life.STREAM}


def places(slots: Iterable[Slot], kept: Life | None) -> dict[str, str]:
    """Return for each slot the name of its memory, which may be that of other slots, too.

    Slots of a layer, "h.0.att", that need not live share one memory for all layers, "h.att".

    Parameters
    ----------
    kept : those that live until backward; None if no backward pass follows
    """
    found: dict[str, str] = {}
    for slot in slots:
        name = slot.name
        if kept is None or slot.life > kept:
            name = re.sub(r"^h\.\d+\.", "h.", slot.over if kept is None and slot.over else name)
        found[slot.name] = name
    return found


def offsets_of(slots: Iterable[Slot], kept: Life | None) -> dict[str, int]:
    """Return where the memory of each place starts, see `places`.

    The entry "" is the size of all.
    """
    slots = list(slots)
    of = places(slots, kept)
    sizes: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        before = sizes.get(of[slot.name], (0,))
        sizes[of[slot.name]] = max(before, (math.prod(slot.shape),))
    return aligned_offsets(sizes)


class Activations:
    """The named arrays of a batch.

    Parameters
    ----------
    stack : the model's blocks
    recompute : a key of KEPT

    Raises
    ------
    ValueError : an unknown recompute
    """

    def __init__(self, stack: Stack, recompute: str | None) -> None:
        if recompute not in KEPT:
            known = ", ".join(repr(policy) for policy in KEPT)
            raise ValueError(f"recompute must be one of {known}, got {recompute!r}")
        self._stack = stack
        self._recompute = recompute
        self._memory = aligned_zeros(0)
        self._layouts: dict[tuple[Batch, bool], dict[str, Array]] = {}

    def lay_out(self, batch: Batch, keep: bool) -> dict[str, Array]:
        """Return the arrays of a batch, with or without a backward pass to come.

        Those returned before are void: they share the memory.
        """
        if (batch, keep) not in self._layouts:
            slots = list(self._stack.slots(batch))
            kept = KEPT[self._recompute] if keep else None
            offsets, of = offsets_of(slots, kept), places(slots, kept)
            size = offsets[""]
            if size > self._memory.size:
                self._layouts.clear()  # the views go first, and with them the old buffer
                self._memory = aligned_zeros(0)
                mend = "take fewer or shorter rows"
                if keep and self._recompute != "full":
                    mend += ", or a model with recompute='full'"
                what = f"a batch of {batch.B:,} x {batch.T:,} tokens"
                require(what, {"activations": 4 * size}, mend)
                self._memory = aligned_zeros(size)
            self._layouts[batch, keep] = {
                slot.name: view(self._memory, offsets[of[slot.name]], slot.shape) for slot in slots
            }
        return self._layouts[batch, keep]


def parts_needed(
    config: GPT2Config, B: int, T: int, recompute: str | None = None
) -> dict[str, int]:
    """Return the bytes of what a model, AdamW and a batch need: name -> bytes."""
    parameters = 4 * aligned_offsets(config.parameter_shapes())[""]
    slots = config.stack().slots(Batch(B, T))
    return {
        "weights": parameters,
        "gradients": parameters,
        "moments": 2 * parameters,
        "activations": 4 * offsets_of(slots, KEPT[recompute])[""],
    }


def bytes_needed(config: GPT2Config, B: int, T: int, recompute: str | None = None) -> int:
    """Return the sum of `parts_needed`."""
    return sum(parts_needed(config, B, T, recompute).values())
