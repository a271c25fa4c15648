"""LanguageModel: what any GPT-2 can do that can be read, whatever its weights are stored in.

    generate, stream    continue prompts
    logprobs            how likely a text is, token by token
    embed               a vector for each text

Checks what users give; the work is the decoder's and generate's. Knows nothing about training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.backend import Backend
from gpt2c.kernels.checks import counted
from gpt2c.kernels.memory import Array, require
from gpt2c.model.block import IntArray
from gpt2c.model.config import GPT2Config
from gpt2c.model.reader import Decoder

__all__ = ["LanguageModel", "check_ids"]


class LanguageModel:
    """A GPT-2 with weights of any kind.

    Parameters
    ----------
    config : its shape
    backend : that computes

    Attributes
    ----------
    parameters : name -> array, see `gpt2c.model.reader.Decoder`; a subclass has them
    """

    parameters: Mapping[str, NDArray[Any]]
    _weights: tuple[str, ...] = ()  # of what kind they are, where they are not float32

    def __init__(self, config: GPT2Config, backend: Backend) -> None:
        self.config = config
        self.backend = backend

    def __repr__(self) -> str:
        config, backend = self.config, self.backend
        size = config.num_parameters()
        facts = [
            counted(config.n_layer, "layer"),
            counted(config.n_embd, "channel"),
            f"{size / 1e6:,.0f}M parameters" if size >= 1e7 else counted(size, "parameter"),
            *self._weights,
            backend.name,
        ]
        if backend.name != "numpy":  # whose threads are NumPy's
            facts.append(counted(backend.threads, "thread"))
        return f"{type(self).__name__}({', '.join(facts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a model of its own: what a plain copy is, too."""
        return copy.copy(self)

    def decoder(self, slots: int = 1, capacity: int | None = None) -> Decoder:
        """Return memory to read texts with: so many of them, so many tokens each (n_positions).

        Raises
        ------
        MemoryError : it does not fit
        """
        capacity = self.config.n_positions if capacity is None else capacity
        return Decoder(self.config, self.parameters, self.backend, slots, capacity)

    def check_prompts(self, idx: ArrayLike | Sequence[Sequence[int]]) -> list[list[int]]:
        """Return prompts as lists of token ids; an empty one becomes eos_token_id.

        Raises
        ------
        ValueError : no prompts, not whole numbers, an id out of range, longer than n_positions
        """
        if isinstance(idx, list | tuple) and all(_is_row(row) for row in idx):
            given = [row if len(row) else np.empty(0, int) for row in idx]
            rows = [check_ids(row, "idx", 0, self.config.vocab_size) for row in given]
        else:
            array = check_ids(idx, "idx", 0, self.config.vocab_size)
            if array.ndim != 2:
                raise ValueError(
                    f"idx must be (B, T) token ids, got shape {array.shape}{_one_row(array)}"
                )
            rows = list(array)
        if not rows:
            raise ValueError("idx must hold at least one prompt, got none")
        for row in rows:
            if row.ndim != 1:
                raise ValueError(f"idx must be (B, T) token ids, got a row of shape {row.shape}")
            if len(row) > self.config.n_positions:
                raise ValueError(
                    f"the prompt is {len(row):,} tokens; this model's context is"
                    f" {self.config.n_positions:,} (n_positions): give a shorter prompt, or its"
                    f" last {counted(self.config.n_positions, 'token')} at most"
                )
        start = self.config.eos_token_id
        if start is None and any(len(row) == 0 for row in rows):
            raise ValueError(
                "idx: a prompt is empty, and the config has no eos_token_id to start from"
            )
        return [row.tolist() or [start] for row in rows]

    def _check_tokens(self, idx: ArrayLike) -> IntArray:
        ids = check_ids(idx, "idx", 0, self.config.vocab_size)
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(
                f"idx must be (B, T) token ids with B, T >= 1, got shape {ids.shape}{_one_row(ids)}"
            )
        if ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"idx has rows of {ids.shape[1]} tokens, n_positions is {self.config.n_positions}"
            )
        return ids

    @overload
    def __call__(self, idx: ArrayLike, hidden_states: Literal[False] = ...) -> Array: ...

    @overload
    def __call__(self, idx: ArrayLike, hidden_states: Literal[True]) -> tuple[Array, Array]: ...

    @overload
    def __call__(self, idx: ArrayLike, hidden_states: bool) -> Array | tuple[Array, Array]: ...

    def __call__(self, idx: ArrayLike, hidden_states: bool = False) -> Array | tuple[Array, Array]:
        """Return the logits of the next token at every position, in memory of their own.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions
        hidden_states : return what lies between the layers, too

        Returns
        -------
        logits (B, T, V) float32; with hidden_states a pair of them and states (L + 1, B, T, C)
        float32, as transformers' output_hidden_states has them: states[0] is the embeddings,
        states[i] what layer i has written, and states[L], the last, ln_f of that

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range
        MemoryError : the results do not fit
        """
        tokens = self._check_tokens(idx)
        V, C, L = self.config.vocab_size, self.config.n_embd, self.config.n_layer
        sizes = {"logits": 4 * tokens.size * V}
        sizes["hidden states"] = 4 * (L + 1) * tokens.size * C if hidden_states else 0
        require(
            f"a result for {counted(tokens.size, 'token')}", sizes, "take fewer or shorter rows"
        )
        logits = np.empty((*tokens.shape, V), np.float32)
        states = np.empty((L + 1, *tokens.shape, C), np.float32) if hidden_states else None
        self._read_all(tokens, logits, states)
        return logits if states is None else (logits, states)

    def _read_all(self, tokens: IntArray, logits: Array, states: Array | None) -> None:
        """Write logits (B, T, V) and, where they are given, states (L + 1, B, T, C)."""
        decoder = self.decoder(1, tokens.shape[1])
        for b, row in enumerate(tokens):
            start, own = 0, None if states is None else states[:, b]
            for hidden in decoder.hidden(row, 0, 0, own):
                decoder.logits(logits[b, start : start + len(hidden)], hidden)
                start += len(hidden)

    def embed(self, idx: ArrayLike | Sequence[Sequence[int]]) -> Array:
        """Return a vector for each text: the mean of its tokens' last hidden states, ln_f's output.

        It is not normalised; the cosine of two of them says how alike their texts are. A text's
        vector does not depend on the others.

        Parameters
        ----------
        idx : N texts of token ids, (N, T) or a list of lists of different lengths, up to
            n_positions tokens; one without tokens counts as eos_token_id of the config

        Returns
        -------
        (N, C) float32

        Raises
        ------
        ValueError : no texts, not whole numbers, an id out of range, longer than n_positions
        MemoryError : the keys and values of the longest do not fit
        """
        texts = self.check_prompts(idx)
        decoder = self.decoder(1, max(map(len, texts)))
        vectors = np.empty((len(texts), self.config.n_embd), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            chunks = decoder.hidden(np.array(text, np.int32), 0, 0)
            sums = [chunk.sum(axis=0, dtype=np.float64) for chunk in chunks]
            vector[...] = np.sum(sums, axis=0) / len(text)
        return vectors

    def logprobs(self, idx: ArrayLike) -> Array:
        """Return the log-probability of each token after those before it, (B, T-1) float32, nats.

        Parameters
        ----------
        idx : (B, T) token ids, 2 <= T <= n_positions

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range
        """
        tokens = self._check_tokens(idx)
        if tokens.shape[1] < 2:
            raise ValueError("idx: rows of at least 2 tokens are wanted, the first is not scored")
        decoder = self.decoder(1, tokens.shape[1] - 1)
        return np.stack([-decoder.losses(row[:-1], row[1:]) for row in tokens])

    def mean_loss(self, idx: ArrayLike, targets: ArrayLike) -> float:
        """Mean nats per token of targets (B, T), already shifted; -1 is ignored. Keeps nothing.

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range, every target ignored
        """
        tokens = self._check_tokens(idx)
        wanted = self._check_targets(targets, tokens.shape)
        decoder = self.decoder(1, tokens.shape[1])
        losses = [decoder.losses(*pair) for pair in zip(tokens, wanted, strict=True)]
        return float(np.sum(losses, dtype=np.float64) / np.count_nonzero(wanted >= 0))

    def _check_targets(self, targets: ArrayLike, shape: tuple[int, ...]) -> IntArray:
        ids = check_ids(targets, "targets", -1, self.config.vocab_size)
        if ids.shape != shape:
            raise ValueError(f"targets must have the shape of idx, {shape}, got {ids.shape}")
        if not (ids >= 0).any():
            raise ValueError("targets are all -1 (ignored): there is nothing to take the mean of")
        return ids


def _one_row(ids: NDArray[Any]) -> str:
    """Say how one text is passed where several are wanted."""
    return ": for one text pass ids[None], or [ids]" if ids.ndim == 1 and ids.size else ""


def _is_row(row: Any) -> bool:
    return isinstance(row, list | tuple) or (isinstance(row, np.ndarray) and row.ndim > 0)


def check_ids(ids: ArrayLike, name: str, low: int, high: int) -> IntArray:
    """Copy `ids` as C-contiguous int32; refuse what is not whole numbers in [low, high)."""
    try:
        array = np.asarray(ids)
    except ValueError as error:  # nested lists of different lengths
        raise ValueError(f"{name} must be an array of whole numbers, all rows as long") from error
    if array.size and array.dtype.kind not in "iu":  # an empty list is float64
        is_number = array.dtype.kind in "fcb"  # of the others the dtype would say nothing
        came = f"dtype {array.dtype}" if is_number else f"{ids!r:.50}"
        raise ValueError(f"{name} must be whole numbers, got {came}")
    copy = np.empty(array.shape, np.int32)  # what is too large is so before all of it was read
    if array.size and not (low <= array.min() and array.max() < high):
        wrong = array[(array < low) | (array >= high)].flat[0]
        raise ValueError(f"{name}: token id {wrong} is not in [{low}, {high})")
    copy[...] = array  # backward reads it when the caller may not keep it
    return copy
