"""Blocks: the parts that a model is built of, and the things that a block is handed.

A block is a small class. It has, side by side in one file:

    parameters()            the arrays that it learns: name, shape, first values
    slots(batch)            the arrays that it writes, and how long each must live
    forward(ctx, out, x)    out (N, OC) of x (N, C), as a sequence of ops
    backward(ctx, d_x, d_out, x)    the same lines upwards, written by hand
    stages(ctx, out, x)             the same for the newest token of several texts, see `Stage`
    flops(T)                the multiply-adds of a token among T

No tape records what forward did: the order of the ops stands on the page, twice. A block knows its
own names and sizes. It knows nothing about the model around it, nor about who holds the memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.backend import Backend
from gpt2c.kernels.checks import check_kind, number, whole
from gpt2c.kernels.memory import Array

__all__ = [
    "FLOATS",
    "NO_CACHE",
    "NO_DROPOUT",
    "Batch",
    "Block",
    "Cache",
    "Dropout",
    "IntArray",
    "Life",
    "Parameter",
    "Pass",
    "Slot",
    "Stage",
    "check_dropout",
]

IntArray = NDArray[np.int32]
Shape = tuple[int, ...]
FLOATS = ".floats"  # behind the name of a slot of 16 bits: memory for float32
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Cache(NamedTuple):
    """What an attention remembers of texts: their keys and values.

    Attributes
    ----------
    keys, values : (B, KV, P, HS) float32, float16 or int8
    key_scales, value_scales : (B, KV, P) float32 for int8, else None
    """

    keys: NDArray[Any] | None = None
    values: NDArray[Any] | None = None
    key_scales: Array | None = None
    value_scales: Array | None = None


NO_CACHE = Cache()


class Parameter(NamedTuple):
    """An array that a block learns.

    Attributes
    ----------
    name, shape : the names are GPT-2's in Hugging Face's files, without "transformer."; the blocks
        of other models have GPT-2's names, too
    fill : its first value, where std is 0
    std : the standard deviation of first values drawn from a normal distribution
    shrink : they are divided by this, where several layers add to one stream
    bound : first values drawn evenly from -bound to bound, where std is 0
    decays : whether AdamW's weight decay applies
    small : whether a model that is only read may hold it in 16 or 8 bits
    """

    name: str
    shape: Shape
    fill: float = 0.0
    std: float = 0.0
    shrink: float = 1.0
    bound: float = 0.0
    decays: bool = False
    small: bool = False


class Life(IntEnum):
    """How long an activation lives; a policy of recomputation keeps those up to one of these.

    STREAM : until backward, whatever the policy: the next layer's input
    INNER : until backward; recompute="full" computes it again from the layer's input
    CHEAP : until backward; recompute="light" computes it again from INNER ones, without products
    CHEAPEST : as CHEAP; where INNER ones have 16 bits, it is always computed again
    SCRATCH : within one call of a block
    LOGITS : within the head's work, when no layer works
    GRADIENT : within backward
    """

    STREAM = 0
    INNER = 1
    CHEAP = 2
    CHEAPEST = 3
    SCRATCH = 4
    LOGITS = 5
    GRADIENT = 6


class Slot(NamedTuple):
    """An array that a block writes. Those that need not live are shared by all layers.

    Attributes
    ----------
    over : the slot whose memory it may overwrite when no backward pass follows
    factor : whether it is a factor of products, and so may hold 16 bits, see `Pass.precision`
    taken : whether a gradient takes its memory, or with 16 bits that of float32, see `Pass.take`
    """

    name: str
    shape: Shape
    life: Life
    over: str = ""
    factor: bool = False
    taken: bool = False


class Batch(NamedTuple):
    """The sizes of a batch: B rows of T tokens, N = B * T.

    A ragged batch is one row of T tokens, in which sequences of any lengths follow each other.
    """

    B: int
    T: int

    @property
    def N(self) -> int:
        """The number of tokens."""
        return self.B * self.T


class Stage(NamedTuple):
    """An op of a decoding step, which runs all of a model's in one call: `Stage` in csrc/gpt2c.h.

    A stage may do what several ops of forward do: add to the stream, apply an activation, turn q
    and k by their positions.

    Attributes
    ----------
    op : "encoder", "layernorm", "rmsnorm", "matmul" or "attention"
    out, x : what it writes and reads
    then : of a matmul: "write", "add" to out, "gelu" or "swiglu"
    precision : of a matmul's products
    down, up, low, factor : of a matmul with an adapter
    the others : see the header; None or 0 where the op has none
    """

    op: str
    out: Array
    x: Array | None = None
    then: str = "write"
    precision: str = "fp32"
    inner: Array | None = None
    weight: NDArray[Any] | None = None
    scale: Array | None = None
    bias: Array | None = None
    wpe: Array | None = None
    gain: Array | None = None
    shift: Array | None = None
    eps: float = 0.0
    down: Array | None = None
    up: Array | None = None
    low: Array | None = None
    factor: float = 0.0
    keys: NDArray[Any] | None = None
    values: NDArray[Any] | None = None
    key_scales: Array | None = None
    value_scales: Array | None = None
    cos: Array | None = None
    sin: Array | None = None
    NH: int = 0


class Dropout(NamedTuple):
    """Dropout of a batch: random activations are 0 in training, so a model relies on no single one.

    The masks are a function of these numbers. Nothing stores them, and a loss with the same numbers
    has the same masks. GPT-2 has dropout at three kinds of places: on the embeddings, on the
    weights of attention, and on what a layer's two branches add to the stream.

    Attributes
    ----------
    rate : the probability in [0, 1) that a number becomes 0; the others are divided by 1 - rate
    seed : of the masks, in [0, 2^64); each step takes another one
    first : the number of the batch's first token in its step. Batches of one step whose tokens are
        numbered one after the other have the masks of one batch of them all

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from
    overfitting".

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1)
    >>> loss = model.loss([[1, 2]], [[2, 3]], dropout=gpt2c.Dropout(0.1, seed=1))
    >>> loss == model.loss([[1, 2]], [[2, 3]], dropout=gpt2c.Dropout(0.1, seed=1))
    True
    >>> loss == model.loss([[1, 2]], [[2, 3]], dropout=gpt2c.Dropout(0.1, seed=2))
    False
    """

    rate: float
    seed: int
    first: int = 0

    def at(self, place: str) -> tuple[float, int, int]:
        """Return dropout, key and first as ops take them; each place has masks of its own.

        Examples
        --------
        >>> dropout = gpt2c.Dropout(0.1, seed=1)
        >>> dropout.at("h.0.mlp")[0], dropout.at("h.0.mlp") == dropout.at("h.1.mlp")
        (0.1, False)
        """
        return self.rate, self.seed, zlib.crc32(place.encode()) << 32 | self.first


NO_DROPOUT = Dropout(0.0, 0)


def check_dropout(dropout: Dropout | None, N: int) -> Dropout:
    """Return the dropout of a batch of N tokens with numbers that ops take.

    Raises
    ------
    ValueError : another type, or a number out of its range
    """
    if dropout is None:
        return NO_DROPOUT
    check_kind("dropout", dropout, Dropout, "a gpt2c.Dropout")
    rate = number("dropout's rate", dropout.rate)
    seed, first = whole("dropout's seed", dropout.seed), whole("dropout's first", dropout.first)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout's rate must be in [0, 1), got {rate}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"dropout's seed must be in [0, 2^64), got {seed!r:.50}")
    if not 0 <= first <= 2**32 - N:
        raise ValueError(
            f"dropout's first must be in [0, 2^32 - N] with N={N:,} tokens, got {first!r:.50}"
        )
    return Dropout(rate, seed, first)


class Pass:
    """A batch on its way through the blocks: all that a block is handed; it owns nothing.

    Blocks call it `ctx`, as PyTorch's autograd.Function does.

    Attributes
    ----------
    ops : the backend
    p, g, a : parameters, gradients and activations, name -> array; of a model that is only read,
        parameters may be float16, or uint8 with "....scale" beside them
    batch : its sizes
    offsets : of a ragged batch, which is one row: the first token of each sequence, then T
    accumulate : whether backward adds to the gradients of matrices, or writes them
    caches : of texts that are read in parts, the name of a block -> its cache
    position : of the first token
    dropout : of a batch to learn from
    precision : of the products of matrices, "fp32", "bf16" or "fp16". In bf16 the factors that a
        training step keeps may be uint16 that hold bfloat16: rounded once, when an op writes them
    final : backward calls it with the names of parameters whose gradients it will not touch again;
        or None
    arrive : forward calls it with the names of parameters before it reads these, which may be on
        their way; or None
    """

    __slots__ = (
        *("a", "accumulate", "arrive", "batch", "caches", "dropout", "final", "g", "offsets"),
        *("ops", "p", "position", "precision"),
    )

    def __init__(
        self,
        ops: Backend,
        p: Mapping[str, NDArray[Any]],
        a: Mapping[str, Array],
        batch: Batch,
        offsets: IntArray | None = None,
        caches: Mapping[str, Cache] = NOTHING,
        position: int = 0,
        dropout: Dropout = NO_DROPOUT,
        precision: str = "fp32",
    ) -> None:
        self.ops, self.p, self.a, self.batch, self.offsets = ops, p, a, batch, offsets
        self.caches, self.position, self.dropout = caches, position, dropout
        self.precision = precision
        self.g: Mapping[str, Array] = NOTHING
        self.accumulate = True
        self.final: Callable[[Iterable[str]], None] | None = None
        self.arrive: Callable[[Iterable[str]], None] | None = None

    def rows(self, array: Array) -> Array:
        """View (N, C) as (B, T, C)."""
        return array.reshape(*self.batch, array.shape[-1])

    def drop(self, out: Array, x: Array, place: str) -> Array:
        """Write x (N, C) with dropout to out, which may be x, and return out; without, return x.

        Forward and backward are the same: the factors of x are those of its gradient.
        """
        if not self.dropout.rate:
            return x
        self.ops.dropout_forward(out, x, *self.dropout.at(place))
        return out

    def take(self, name: str) -> Array:
        """Return an activation's memory for a gradient.

        The op that writes it is the last that reads the activation.
        """
        return self.floats(name)

    def floats(self, name: str) -> Array:
        """Return an activation's memory, or float32 memory in place of one of 16 bits.

        All layers share such memory.
        """
        own = self.a[name]
        return self.a[name + FLOATS] if own.dtype == np.uint16 else own


class Block(Protocol):
    """The parts that all blocks share, see the top of this file."""

    def parameters(self) -> Iterable[Parameter]: ...  # noqa: D102
    def slots(self, batch: Batch) -> Iterable[Slot]: ...  # noqa: D102
    def flops(self, T: int) -> float: ...  # noqa: D102
