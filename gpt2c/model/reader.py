"""Decoder: a model reads texts, token after token, and caches their keys and values.

A text costs one pass over the weights for each chunk of new tokens; earlier tokens are not computed
again. Two ways lead through the layers. The blocks' own forward takes many tokens of one text. The
kernels' `decode_step` takes one token of each of several texts in one call that runs the stages of
all blocks; the bits of a row do not depend on the other rows. The backend "numpy" reads one text
after the other.

Knows nothing about sampling or text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.backend import Backend
from gpt2c.kernels.checks import check_choice, check_int32, check_layout, counted, whole
from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, require, view
from gpt2c.model.block import Batch, Cache, Pass
from gpt2c.model.config import ModelConfig
from gpt2c.model.plan import Activations
from gpt2c.model.quantized import TypedLayout, room_of, typed_views

__all__ = ["CACHES", "CHUNK", "CacheType", "Decoder", "check_cache"]

# Tokens in one pass: enough that arithmetic takes longer than loading the weights, and few enough
# that the activations stay in the cache.
CHUNK = 512
LOGITS_ROWS = 64  # rows of logits in memory while a text is scored: 13 MB at V = 50257
# the types of a cache; int8 has a float32 scale for each row of HS numbers
CacheType = Literal["fp32", "fp16", "int8"]
CACHES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


def check_cache(cache: Any) -> None:
    """Refuse a type that a cache cannot have."""
    check_choice("cache", cache, CACHES)


class Decoder:
    """A model's weights, and caches of keys and values for several texts.

    Parameters
    ----------
    config : the model's config
    parameters : name -> array as `GPT2.parameters`; Linear weights and wte may be float16, or uint8
        with a float32 array "x.scale" beside "x.weight"
    backend : the ops that compute
    slots : the number of texts, a slot for each
    capacity : the most tokens of a text, at most n_positions
    precision : of the products of matrices
    cache : the type of keys and values, "fp32", "fp16" or "int8". All that a token sees of a text
        comes from the cache, its own key and value too, so a text read at once or in parts gets the
        same logits, but for the order of sums, and the rounding of 16-bit products

    Attributes
    ----------
    keys, values : (L, slots, KV, capacity, HS) float32, float16 or int8
    key_scales, value_scales : (L, slots, KV, capacity) float32 for int8, else None

    Raises
    ------
    ValueError : slots or capacity is no whole number or out of range, or parameters do not fit
        the config, or the model has scores in place of logits, or an unknown cache
    MemoryError : the caches do not fit
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, NDArray[Any]],
        backend: Backend,
        slots: int,
        capacity: int,
        precision: str = "fp32",
        cache: str = "fp32",
    ) -> None:
        check_cache(cache)
        config.require_language_head("reading text (generate, logprobs, mean_loss, embed)")
        slots, capacity = whole("slots", slots), whole("capacity", capacity)
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if not 1 <= capacity <= config.n_positions:
            raise ValueError(
                f"capacity must be in [1, {config.n_positions}] ({config.context_name}), got"
                f" {capacity}"
            )
        # Own views: C trusts their shapes, and a caller can change the shapes of arrays it holds.
        parameters = {name: array.view() for name, array in parameters.items()}
        check_parameters(config, parameters)
        self.config = config
        self.slots, self.capacity = slots, capacity
        self._parameters = parameters
        self._backend = backend
        self._precision = precision
        self._stack = config.stack()
        attention = self._stack.layers[0].attention
        shape = (config.n_layer, slots, attention.KV, capacity, attention.HS)
        layout = _layout(cache, shape)
        sizes = {
            "keys and values": sum(math.prod(size) * of.itemsize for size, of in layout.values()),
            "logits": 4 * slots * config.vocab_size,
        }
        texts = f"{counted(slots, 'text')} of {counted(capacity, 'token')}"
        require(f"reading {texts}", sizes, "take fewer texts or tokens")
        memory = aligned_zeros(aligned_offsets(room_of(layout))[""])
        self.keys, self.values, self.key_scales, self.value_scales = Cache(
            **typed_views(memory, layout)
        )
        self._cache = Cache(**typed_views(memory, layout))
        self._logits = aligned_zeros(slots * config.vocab_size).reshape(slots, -1)
        floats = all(a.dtype != np.uint8 for a in parameters.values())
        halves = precision == "bf16" and config.lora is None and floats  # see plan.has_halves
        self._activations = Activations(self._stack.slots, None, halves)
        self._stages: Any = None  # bound at the first step

    def __repr__(self) -> str:
        return f"Decoder(slots={self.slots}, capacity={self.capacity}, {self._backend.name})"

    def step(
        self, tokens: NDArray[np.int32], slots: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> Array:
        """Read one more token of each of N texts; return the logits (N, V) of the next tokens.

        The next call overwrites the logits.

        Parameters
        ----------
        tokens, slots, positions : (N,) int32: each token, the slot of its text, all different, and
            its position in the text; N is at most the decoder's slots

        Raises
        ------
        ValueError : arrays of another shape or dtype, a number out of range, or a slot given twice
        MemoryError : at the first step, which makes the activations
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
        if self._backend.has_step:
            if self._stages is None:
                self._stages = self._bind()
            self._backend.decode_step(tokens, slots, positions, self._stages)
        else:
            for row, token, slot, position in zip(logits, tokens, slots, positions, strict=True):
                row[...] = self.read(np.array([token], np.int32), int(slot), int(position))
        return logits

    def _bind(self) -> Any:
        """Return the stages of a step, in memory of their own, as kernels take them."""
        batch = Batch(self.slots, 1)
        a = Activations(self._stack.slots, None).lay_out(batch, keep=False)
        ctx = Pass(
            *(self._backend, self._parameters, a, batch),
            caches=self._caches(slice(None)),
            precision=self._precision,
        )
        return self._backend.bind_step(self._stack.stages(ctx, self._logits))

    def read(self, tokens: NDArray[np.int32], slot: int, position: int) -> Array:
        """Read T more tokens of one text; return the logits (V,) of the next token.

        Parameters
        ----------
        tokens : (T,) int32, at least one
        slot : the slot of the text
        position : the position of the first of these tokens; position + T is at most the capacity

        Raises
        ------
        ValueError : see `hidden`; no tokens
        """
        if _length("tokens", tokens) == 0:
            raise ValueError("tokens must hold at least one token, got none")
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
        """Read tokens as `read` does; yield ln_f's output (at most CHUNK, C), chunk after chunk.

        The next chunk overwrites the one before.

        Parameters
        ----------
        tokens, slot, position : see `read`
        states : (L + 1, T, C) float32, written unless None: the residual stream before each layer,
            and ln_f's output

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
                f"{counted(len(tokens), 'token')} from position {position} on in slot {slot} do not"
                f" fit into {counted(self.slots, 'slot')} of {counted(self.capacity, 'token')}"
            )
        for start in range(0, len(tokens), CHUNK):
            part = slice(start, start + CHUNK)
            ids = tokens[part][None]
            ctx = self._start(ids.size, slot, position + start)
            yield self._stack.forward(ctx, ids, None if states is None else states[:, None, part])

    def logits(self, out: Array, rows: Array) -> None:
        """Write the logits (N, V) of rows (N, C), which `hidden` yields, to `out`.

        Raises
        ------
        ValueError : arrays of another shape, dtype or layout, or a read-only out
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
        batch = Batch(1, len(rows))
        ctx = Pass(self._backend, self._parameters, {}, batch, precision=self._precision)
        self._stack.head.forward(ctx, out, rows)

    def losses(
        self,
        tokens: NDArray[np.int32],
        targets: NDArray[np.int32],
        position: int = 0,
        likeliest: NDArray[np.bool_] | None = None,
    ) -> Array:
        """Read tokens of the text in slot 0; return the loss of the target that follows each.

        Parameters
        ----------
        tokens, targets : (T,) int32; -1 is a target to ignore
        position : see `read`
        likeliest : (T,), written unless None: whether each target was the most probable token

        Returns
        -------
        (T,) float32, -log p of each target in nats, 0 for an ignored target

        Raises
        ------
        ValueError : see `hidden`; targets are not int32 (T,) in [-1, V)
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

    def copy(self, source: int, target: int, length: int, of: Decoder | None = None) -> None:
        """Copy the keys and values of the first `length` tokens from slot `source` to `target`.

        Parameters
        ----------
        of : another decoder of the model that has the slot `source`, with the same type of cache
        """
        for ours, theirs in zip(self._cache, (of or self)._cache, strict=True):
            if ours is not None and theirs is not None:
                ours[:, target, :, :length] = theirs[:, source, :, :length]

    def _start(self, T: int, slot: int, position: int) -> Pass:
        """Lay out a pass of T tokens of one text through the blocks."""
        batch, caches = Batch(1, T), self._caches(slice(slot, slot + 1))
        a = self._activations.lay_out(batch, keep=False)
        return Pass(
            *(self._backend, self._parameters, a, batch),
            caches=caches,
            position=position,
            precision=self._precision,
        )

    def _caches(self, slots: slice) -> dict[str, Cache]:
        """Return the keys and values of some slots, by the name of their attention."""
        return {
            layer.attention.name: Cache(
                *(part if part is None else part[number, slots] for part in self._cache)
            )
            for number, layer in enumerate(self._stack.layers)
        }


def _layout(cache: str, shape: tuple[int, ...]) -> TypedLayout:
    """Return the arrays of a `Cache` of this type; shape is that of keys and values."""
    numbers, scales = (shape, np.dtype(CACHES[cache])), (shape[:-1], np.dtype(np.float32))
    layout = {"keys": numbers, "values": numbers}
    return layout | {"key_scales": scales, "value_scales": scales} if cache == "int8" else layout


def _length(name: str, ids: Any) -> int:
    """Return T of an array (T,).

    Raises
    ------
    ValueError : another type or shape
    """
    if not isinstance(ids, np.ndarray) or ids.ndim != 1:
        raise ValueError(f"{name} must be an int32 array (T,), got {ids!r:.50}")
    return len(ids)


def check_parameters(config: ModelConfig, parameters: Mapping[str, NDArray[Any]]) -> None:
    """Refuse parameters that do not fit the config: the kernels would read beyond their memory.

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
