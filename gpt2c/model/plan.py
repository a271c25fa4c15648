"""Activations: the memory of a batch, one buffer that is used again for every batch.

Lays out the arrays that blocks name by how long each must live. Knows nothing about the blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, require, view
from gpt2c.model.block import Batch, Life, Slot
from gpt2c.model.config import ModelConfig
from gpt2c.model.quantized import layout_of, room_of

__all__ = ["KEPT", "Activations", "bytes_needed", "parts_needed"]

# The activations that stay until the backward pass, by the name of the policy; the others are
# computed again just before. A layer of GPT-2 keeps 16, 10 and 1 times C numbers a token.
KEPT = {None: Life.CHEAP, "light": Life.INNER, "full": Life.STREAM}
LAYOUTS = 16  # remembered at a time, of batches of different sizes


def slot_offsets(slots: Iterable[Slot], kept: Life | None) -> dict[str, int]:
    """Return where each slot starts, in floats; the entry "" is the size of all.

    Slots of a layer, "h.0.att", that need not live share the memory of one, "h.att".

    Parameters
    ----------
    kept : those that live until backward; None if no backward pass follows
    """
    places: dict[str, str] = {}
    sizes: dict[str, tuple[int]] = {}
    for slot in slots:
        place = slot.name
        if kept is None:
            if slot.life is Life.GRADIENT:
                continue
            place = slot.over or place
        if kept is None or slot.life > kept:
            place = re.sub(r"^h\.\d+\.", "h.", place)
        places[slot.name] = place
        sizes[place] = max(sizes.get(place, (0,)), (math.prod(slot.shape),))
    starts = aligned_offsets(sizes)
    return {name: starts[place] for name, place in places.items()} | {"": starts[""]}


class Activations:
    """The named arrays of a batch.

    Parameters
    ----------
    slots : the arrays that a batch needs
    recompute : a key of KEPT

    Raises
    ------
    ValueError : an unknown recompute
    """

    def __init__(self, slots: Callable[[Batch], Iterable[Slot]], recompute: str | None) -> None:
        if not isinstance(recompute, str | None) or recompute not in KEPT:
            known = ", ".join(repr(policy) for policy in KEPT)
            raise ValueError(f"recompute must be one of {known}, got {recompute!r}")
        self._slots = slots
        self._recompute = recompute
        self._memory = aligned_zeros(0)
        self._layouts: dict[tuple[Batch, bool], dict[str, Array]] = {}

    def lay_out(self, batch: Batch, keep: bool) -> dict[str, Array]:
        """Return the arrays of a batch, with or without a backward pass to come.

        Those returned before are void: they share the memory.
        """
        if (batch, keep) not in self._layouts:
            slots = list(self._slots(batch))
            offsets = slot_offsets(slots, KEPT[self._recompute] if keep else None)
            size = offsets[""]
            if size > self._memory.size or len(self._layouts) == LAYOUTS:
                self._layouts.clear()  # the views go first, and with them the old buffer
            if size > self._memory.size:
                self._memory = aligned_zeros(0)
                mend = "take fewer or shorter rows"
                if keep and self._recompute != "full":
                    mend += ", or a model with recompute='full'"
                what = f"a batch of {batch.B:,} x {batch.T:,} tokens"
                require(what, {"activations": 4 * size}, mend)
                self._memory = aligned_zeros(size)
            self._layouts[batch, keep] = {
                slot.name: view(self._memory, offsets[slot.name], slot.shape)
                for slot in slots
                if slot.name in offsets
            }
        return self._layouts[batch, keep]


def parts_needed(
    config: ModelConfig, B: int, T: int, recompute: str | None = None, weights: str = "fp32"
) -> dict[str, int]:
    """Return the bytes of a model, AdamW and a batch, without scratch memory: name -> bytes."""
    stack, batch, frozen = config.stack(), Batch(B, T), config.frozen()
    described = stack.parameters().values()
    trained = {one.name: one.shape for one in described if one.name not in frozen}
    learned = 4 * aligned_offsets(trained)[""]
    slots = [*stack.slots(batch), *stack.head.slots(batch)]
    return {
        "weights": 4 * aligned_offsets(room_of(layout_of(described, weights)))[""],
        "gradients": learned,
        "moments": 2 * learned,
        "activations": 4 * slot_offsets(slots, KEPT[recompute])[""],
    }


def bytes_needed(config: ModelConfig, B: int, T: int, recompute: str | None = None) -> int:
    """Return the sum of `parts_needed`."""
    return sum(parts_needed(config, B, T, recompute).values())
