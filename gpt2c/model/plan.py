"""Activations: the memory of a batch, one buffer that is used again for every batch.

Lays out the arrays that blocks name by how long each must live. Knows nothing about the blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable

import numpy as np

from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, require, view
from gpt2c.model.block import FLOATS, Batch, Life, Slot
from gpt2c.model.config import ModelConfig
from gpt2c.model.quantized import layout_of, room_of

__all__ = ["KEPT", "Activations", "bytes_needed", "has_halves", "parts_needed"]

# The activations that stay until the backward pass, by the name of the policy; the others are
# computed again just before. A layer of GPT-2 keeps 16, 10 and 1 times C numbers a token, which are
# 64, 40 and 4 times C bytes, or 28, 24 and 4 with factors of 16 bits.
KEPT = {None: Life.CHEAPEST, "light": Life.INNER, "full": Life.STREAM}
LAYOUTS = 16  # remembered at a time, of batches of different sizes


def lasting(recompute: str | None, halves: bool) -> Life:
    """Return the last of the lives that reach until backward.

    Parameters
    ----------
    recompute : a key of KEPT
    halves : whether factors have 16 bits
    """
    return min(KEPT[recompute], Life.CHEAP) if halves else KEPT[recompute]


def slot_offsets(slots: Iterable[Slot], kept: Life | None, halves: bool) -> dict[str, int]:
    """Return where each slot starts, in floats; the entry "" is the size of all.

    Slots of a layer, "h.0.att", that need not live share the memory of one, "h.att". All of these
    share it with the logits.

    Parameters
    ----------
    kept : those that live until backward; None if no backward pass follows
    halves : whether factors have 16 bits
    """
    places: dict[str, str] = {}
    own: dict[str, tuple[int]] = {}
    layers: dict[str, tuple[int]] = {}
    logits: dict[str, tuple[int]] = {}

    def put(name: str, place: str, size: int, lives: bool, life: Life) -> None:
        if not lives:
            place = re.sub(r"^h\.\d+\.", "h.", place)
        passes = not lives and place.startswith("h.")
        sizes = layers if passes else logits if life is Life.LOGITS else own
        places[name] = place
        sizes[place] = max(sizes.get(place, (0,)), (size,))

    for slot in slots:
        if kept is None and slot.life is Life.GRADIENT:
            continue
        place = slot.over if kept is None and slot.over else slot.name
        lives, size = kept is not None and slot.life <= kept, math.prod(slot.shape)
        half = halves and slot.factor
        put(slot.name, place, -(-size // 2) if half else size, lives, slot.life)
        if half and slot.taken:
            put(slot.name + FLOATS, slot.name + FLOATS, size, False, slot.life)
    starts = aligned_offsets(own)
    end = size = starts[""]
    for sizes in (layers, logits):
        others = aligned_offsets(sizes)
        size = max(size, end + others.pop(""))
        starts |= {place: end + start for place, start in others.items()}
    return {name: starts[place] for name, place in places.items()} | {"": size}


class Activations:
    """The named arrays of a batch.

    Parameters
    ----------
    slots : the arrays that a batch needs
    recompute : a key of KEPT
    halves : whether factors are uint16 that hold bfloat16, not float32

    Raises
    ------
    ValueError : an unknown recompute
    """

    def __init__(
        self,
        slots: Callable[[Batch], Iterable[Slot]],
        recompute: str | None,
        halves: bool = False,
    ) -> None:
        if not isinstance(recompute, str | None) or recompute not in KEPT:
            known = ", ".join(repr(policy) for policy in KEPT)
            raise ValueError(f"recompute must be one of {known}, got {recompute!r}")
        self.kept = lasting(recompute, halves)
        self._slots = slots
        self._recompute = recompute
        self._halves = halves
        self._memory = aligned_zeros(0)
        self._layouts: dict[tuple[Batch, bool], dict[str, Array]] = {}

    def lay_out(self, batch: Batch, keep: bool) -> dict[str, Array]:
        """Return the arrays of a batch, with or without a backward pass to come.

        Those returned before are void: they share the memory.
        """
        if (batch, keep) not in self._layouts:
            slots = list(self._slots(batch))
            offsets = slot_offsets(slots, self.kept if keep else None, self._halves)
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
            arrays: dict[str, Array] = {}
            for slot in slots:
                if slot.name not in offsets:
                    continue
                memory = self._memory[offsets[slot.name] :]
                if self._halves and slot.factor:
                    arrays[slot.name] = view(memory.view(np.uint16), 0, slot.shape)
                else:
                    arrays[slot.name] = view(memory, 0, slot.shape)
                if slot.name + FLOATS in offsets:
                    start = offsets[slot.name + FLOATS]
                    arrays[slot.name + FLOATS] = view(self._memory, start, slot.shape)
            self._layouts[batch, keep] = arrays
        return self._layouts[batch, keep]


def has_halves(config: ModelConfig, weights: str) -> bool:
    """Return whether factors have 16 bits in a model of precision "bf16".

    Adapters read their input in float32, and a model that is only read keeps no activations.
    """
    return weights == "fp32" and config.lora is None


def parts_needed(
    config: ModelConfig,
    B: int,
    T: int,
    recompute: str | None = None,
    precision: str = "fp32",
    weights: str = "fp32",
    frozen: Collection[str] = (),
) -> dict[str, int]:
    """Return the bytes of a model, AdamW and a batch, without scratch memory: name -> bytes.

    What is `frozen`, beside what the config freezes, has no gradient and no moments.
    """
    stack, batch, frozen = config.stack(), Batch(B, T), {*config.frozen(), *frozen}
    halves = precision == "bf16" and has_halves(config, weights)
    described = stack.parameters().values()
    trained = {one.name: one.shape for one in described if one.name not in frozen}
    learned = 4 * aligned_offsets(trained)[""]
    slots = [*stack.slots(batch), *stack.head.slots(batch)]
    return {
        "weights": 4 * aligned_offsets(room_of(layout_of(described, weights)))[""],
        "gradients": learned,
        "moments": 2 * learned,
        "activations": 4 * slot_offsets(slots, lasting(recompute, halves), halves)[""],
    }


def bytes_needed(
    config: ModelConfig, B: int, T: int, recompute: str | None = None, precision: str = "fp32"
) -> int:
    """Return the sum of `parts_needed`."""
    return sum(parts_needed(config, B, T, recompute, precision).values())
