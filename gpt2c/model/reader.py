"""Decoder: a model that is read, token after token, with the keys and values of what it has read.

Reading a text costs one pass over the weights for each chunk of it, not for the whole text again
for each token. Two ways lead through the layers: the blocks' own forward, which reads many tokens
of one text; and the kernels' `decode_step`, one call for one token of each of several texts, in
which a row's bits do not depend on the others.

Knows nothing about sampling or text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.backend import Backend
from gpt2c.kernels.binding import Kernels
from gpt2c.kernels.checks import check_int32, check_layout, counted, whole
from gpt2c.kernels.memory import Array, aligned_zeros, require, view
from gpt2c.model.block import Batch, Run
from gpt2c.model.config import GPT2Config
from gpt2c.model.plan import Activations

__all__ = ["CHUNK", "Decoder"]

# Rows read at a time: enough for the arithmetic to outweigh the weights, few enough to stay cached.
CHUNK = 512
LOGITS_ROWS = 64  # of a text that is scored: 13 MB at V = 50257


class Decoder:
    """A model's weights with caches for some texts.

    Parameters
    ----------
    config : the model's
    parameters : name -> array as `GPT2.parameters`; Linear weights and wte may be float16, or uint8
        with a float32 array "....scale" beside them
    backend : that computes
    slots : how many texts there are room for
    capacity : how many tokens of each, n_positions at most

    Attributes
    ----------
    keys, values : (L, slots, NH, capacity, HS) float32

    Raises
    ------
    ValueError : slots or capacity no whole number or out of range, parameters that are not the
        config's
    MemoryError : the caches do not fit
    """

    def __init__(
        self,
        config: GPT2Config,
        parameters: Mapping[str, NDArray[Any]],
        backend: Backend,
        slots: int,
        capacity: int,
    ) -> None:
        slots, capacity = whole("slots", slots), whole("capacity", capacity)
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if not 1 <= capacity <= config.n_positions:
            raise ValueError(
                f"capacity must be in [1, {config.n_positions}], n_positions, got {capacity}"
            )
        # Views of its own: C trusts their shapes, whatever becomes of those that others hold.
        parameters = {name: array.view() for name, array in parameters.items()}
        check_parameters(config, parameters)
        self.config = config
        self.slots, self.capacity = slots, capacity
        self._parameters = parameters
        self._backend = backend
        HS = config.n_embd // config.n_head
        shape = (config.n_layer, slots, config.n_head, capacity, HS)
        sizes = {
            "keys and values": 2 * 4 * math.prod(shape),
            "logits": 4 * slots * config.vocab_size,
        }
        texts = f"{counted(slots, 'text')} of {counted(capacity, 'token')}"
        require(f"reading {texts}", sizes, "take fewer texts or tokens")
        memory = aligned_zeros(2 * math.prod(shape))
        self.keys, self.values = memory.reshape(2, *shape)
        self._keys, self._values = memory.reshape(2, *shape)
        self._logits = aligned_zeros(slots * config.vocab_size).reshape(slots, -1)
        self._stack = config.stack()
        self._activations = Activations(self._stack.slots, None)
        self._bound = None
        if isinstance(backend, Kernels):
            eps = config.layer_norm_epsilon
            self._bound = backend.bind_decoder(parameters, config.n_layer, config.n_head, eps)

    def __repr__(self) -> str:
        return f"Decoder(slots={self.slots}, capacity={self.capacity}, {self._backend.name})"

    def step(
        self, tokens: NDArray[np.int32], slots: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> Array:
        """Read one more token of each of N texts; give the logits (N, V) of what follows.

        They are void after the next call.

        Parameters
        ----------
        tokens, slots, positions : (N,) int32, N <= slots, all slots different

        Raises
        ------
        ValueError : arrays of another shape or dtype, or a number in them out of range
        """
        if _length("tokens", tokens) > self.slots:
            raise ValueError(
                f"a step takes at most {counted(self.slots, 'token')}, got {len(tokens)}"
            )
        limits = (self.config.vocab_size, self.slots, self.capacity)
        named = zip(("tokens", "slots", "positions"), (tokens, slots, positions), strict=True)
        for (name, ids), limit in zip(named, limits, strict=True):
            check_int32(name, ids, (len(tokens),), 0, limit)
        if len(set(slots.tolist())) < len(slots):
            raise ValueError(f"slots must all be different, got {slots.tolist()}")
        logits = self._logits[: len(tokens)]
        if self._bound is None:
            for row, token, slot, position in zip(logits, tokens, slots, positions, strict=True):
                row[...] = self.read(np.array([token], np.int32), int(slot), int(position))
        else:
            self._backend.decode_step(
                logits, self._keys, self._values, tokens, slots, positions, self._bound
            )
        return logits

    def read(self, tokens: NDArray[np.int32], slot: int, position: int) -> Array:
        """Read T more tokens of one text; give the logits (V,) of what follows the last.

        Parameters
        ----------
        tokens : (T,) int32, at least one
        slot : the text's
        position : where the first of them stands; position + T is at most the capacity

        Raises
        ------
        ValueError : the tokens do not fit, or are not int32 (T,) in the vocabulary
        """
        if _length("tokens", tokens) == 0:
            raise ValueError("at least one token is wanted, got none")
        for rows in self.hidden(tokens, slot, position):
            last = rows[-1:]
        logits = np.empty((1, self.config.vocab_size), np.float32)
        self.logits(logits, last)
        row: Array = logits[0]
        return row

    def hidden(
        self,
        tokens: NDArray[np.int32],
        slot: int,
        position: int,
        states: Array | None = None,
    ) -> Iterator[Array]:
        """Read tokens as `read` does; give ln_f's output (at most CHUNK, C), chunk after chunk.

        A chunk is void when the next one is asked for.

        Parameters
        ----------
        tokens, slot, position : see `read`
        states : (L + 1, T, C) float32, written where it is given: the residual stream before each
            layer, and ln_f's output

        Raises
        ------
        ValueError : the tokens do not fit, or are not int32 (T,) in the vocabulary; slot or
            position is no whole number
        """
        check_int32("tokens", tokens, (_length("tokens", tokens),), 0, self.config.vocab_size)
        slot, position = whole("slot", slot), whole("position", position)
        end = position + len(tokens)
        if not (0 <= slot < self.slots and 0 <= position <= end <= self.capacity):
            raise ValueError(
                f"{counted(len(tokens), 'token')} at {position} in slot {slot} do not fit"
                f" {counted(self.slots, 'text')} of {counted(self.capacity, 'token')}"
            )
        for start in range(0, len(tokens), CHUNK):
            part = slice(start, start + CHUNK)
            ids = tokens[part][None]
            run = self._start(ids.size, slot, position + start)
            yield self._stack.forward(run, ids, None if states is None else states[:, None, part])

    def logits(self, out: Array, rows: Array) -> None:
        """Write the lm_head's output (N, V) of rows (N, C) of `hidden`.

        Raises
        ------
        ValueError : arrays of another shape, dtype or layout, or out cannot be written
        """
        V, C = self.config.vocab_size, self.config.n_embd
        for name, array, columns in (("out", out, V), ("rows", rows, C)):
            if array.dtype != np.float32 or array.shape != (len(rows), columns):
                raise ValueError(
                    f"{name} must be float32 {(len(rows), columns)}, got {array.dtype}"
                    f" {array.shape}"
                )
        if not (out.flags.carray and rows.flags.c_contiguous and rows.flags.aligned):
            raise ValueError("out and rows must be C-contiguous and aligned, and out writeable")
        run = Run(self._backend, self._parameters, {}, Batch(1, len(rows)))
        self._stack.head.forward(run, out, rows)

    def losses(
        self,
        tokens: NDArray[np.int32],
        targets: NDArray[np.int32],
        position: int = 0,
        likeliest: NDArray[np.bool_] | None = None,
    ) -> Array:
        """Read a text's tokens (T,) from `position` on in slot 0, and look up what follows each.

        Parameters
        ----------
        tokens, targets : (T,) int32; -1 is a target to ignore
        likeliest : (T,), written where it is given: whether each target was the likeliest token

        Returns
        -------
        (T,) float32, -log p of each target in nats, 0 where it is ignored

        Raises
        ------
        ValueError : as `hidden`, or targets that are not as many, or not in [-1, V)
        """
        count = _length("tokens", tokens)
        check_int32("targets", targets, (count,), -1, self.config.vocab_size)
        losses, lse = np.empty((2, len(tokens)), np.float32)
        memory = aligned_zeros(min(count, LOGITS_ROWS) * self.config.vocab_size)
        start = 0
        for rows in self.hidden(tokens, 0, position):
            for part in np.array_split(rows, -(-len(rows) // LOGITS_ROWS)):
                end = start + len(part)
                logits = view(memory, 0, (len(part), self.config.vocab_size))
                wanted = targets[start:end]
                self.logits(logits, part)
                self._backend.crossentropy_forward(
                    losses[start:end], lse[start:end], logits, wanted
                )
                if likeliest is not None:
                    likeliest[start:end] = logits.argmax(axis=1) == wanted
                start = end
        return losses

    def copy(self, source: int, target: int, length: int) -> None:
        """Let one text begin with the first `length` tokens of another."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def _start(self, T: int, slot: int, position: int) -> Run:
        """Lay out a pass of T tokens of one text through the blocks."""
        batch, part = Batch(1, T), slice(slot, slot + 1)
        caches = {
            layer.attention.name: (self._keys[number, part], self._values[number, part])
            for number, layer in enumerate(self._stack.layers)
        }
        a = self._activations.lay_out(batch, keep=False)
        return Run(self._backend, self._parameters, a, batch, caches=caches, position=position)


def _length(name: str, ids: Any) -> int:
    """Return T of an array (T,).

    Raises
    ------
    ValueError : it is something else
    """
    if not isinstance(ids, np.ndarray) or ids.ndim != 1:
        raise ValueError(f"{name} must be an int32 array (T,), got {ids!r:.50}")
    return len(ids)


def check_parameters(config: GPT2Config, parameters: Mapping[str, NDArray[Any]]) -> None:
    """Refuse parameters that the kernels could not read as `config` says: whoever made them.

    Raises
    ------
    ValueError : an array is missing, or of another shape, dtype or layout
    """
    for name, one in config.stack().parameters().items():
        shape = one.shape
        wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {name: (shape, ("float32",))}
        if one.small:
            wanted[name] = (shape, ("float32", "float16", "uint8"))
            scale = name.removesuffix("weight") + "scale"
            if name in parameters and parameters[name].dtype == np.uint8:
                wanted[scale] = (shape[:1], ("float32",))
        for key, (size, dtypes) in wanted.items():
            array = parameters.get(key)
            if array is None:
                raise ValueError(f"parameter {key} is missing")
            if array.shape != size or array.dtype not in [np.dtype(name) for name in dtypes]:
                raise ValueError(
                    f"parameter {key} must be {' or '.join(dtypes)} {size},"
                    f" got {array.dtype} {array.shape}"
                )
            check_layout(f"parameter {key}", array)
