"""LanguageModel: what every model can compute without training, whatever the type of its weights.

    __call__     logits, and hidden states
    embed        a vector for each text
    logprobs     the log-probability of each token
    mean_loss    the mean over all tokens

The decoder computes. Knows nothing about training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.backend import Backend, as_precision
from gpt2c.kernels.checks import counted
from gpt2c.kernels.memory import Array, require
from gpt2c.model.block import IntArray
from gpt2c.model.config import ModelConfig
from gpt2c.model.inputs import Tokens, check_prompts, check_targets, check_tokens
from gpt2c.model.reader import Decoder

__all__ = ["LanguageModel"]


class LanguageModel:
    """A language model, whatever the type of its weights.

    Parameters
    ----------
    config : its kind and its sizes
    backend : the ops that compute
    weights : their type
    precision : of the products of matrices
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        weights: str = "fp32",
        precision: str = "fp32",
    ) -> None:
        self.config = config
        self.backend = backend
        self._weights = weights
        self._precision = as_precision(precision, backend)

    @property
    def parameters(self) -> Mapping[str, NDArray[Any]]:
        """Name -> array, see `gpt2c.model.reader.Decoder`; a subclass has them."""
        raise NotImplementedError

    @property
    def weights(self) -> str:
        """The type of the matrices and the token table: "fp32", "fp16" or "int8"."""
        return self._weights

    @property
    def precision(self) -> str:
        """The precision of the products of matrices: "fp32", "bf16" or "fp16"."""
        return self._precision

    def __repr__(self) -> str:
        config, backend = self.config, self.backend
        size = config.num_parameters()
        facts = [
            counted(config.n_layer, "layer"),
            counted(config.n_embd, "channel"),
            f"{size / 1e6:,.0f}M parameters" if size >= 1e7 else counted(size, "parameter"),
            *([] if self.weights == "fp32" else [self.weights]),
            *([] if self.precision == "fp32" else [f"products in {self.precision}"]),
            backend.name,
        ]
        if backend.name != "numpy":  # NumPy has threads of its own
            facts.append(counted(backend.threads, "thread"))
        return f"{type(self).__name__}({', '.join(facts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a model with memory of its own, as copy.copy does."""
        return copy.copy(self)

    def decoder(self, slots: int = 1, capacity: int | None = None, cache: str = "fp32") -> Decoder:
        """Return a decoder for `slots` texts of `capacity` tokens each, n_positions if None.

        Parameters
        ----------
        cache : the type of keys and values: "fp32", "fp16" or "int8"

        Raises
        ------
        ValueError, MemoryError : see `gpt2c.model.reader.Decoder`

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> decoder = model.decoder(slots=1, capacity=8)
        >>> logits = decoder.read(np.array([1, 2], np.int32), slot=0, position=0)
        >>> logits = decoder.read(np.array([3], np.int32), slot=0, position=2)  # 1 and 2 are kept
        >>> bool(np.allclose(logits, model([[1, 2, 3]])[0, 2], atol=1e-5))
        True
        """
        capacity = self.config.n_positions if capacity is None else capacity
        given = self.config, self.parameters, self.backend, slots, capacity
        return Decoder(*given, self.precision, cache)

    @overload
    def __call__(self, idx: ArrayLike, hidden_states: Literal[False] = ...) -> Array: ...

    @overload
    def __call__(self, idx: ArrayLike, hidden_states: Literal[True]) -> tuple[Array, Array]: ...

    @overload
    def __call__(self, idx: ArrayLike, hidden_states: bool) -> Array | tuple[Array, Array]: ...

    def __call__(self, idx: ArrayLike, hidden_states: bool = False) -> Array | tuple[Array, Array]:
        """Return the logits of the next token at every position, or the scores, in new arrays.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions
        hidden_states : True returns the hidden states as well

        Returns
        -------
        logits (B, T, V) float32, of a model with num_labels the scores (B, K); with hidden_states a
        pair, logits and states (L + 1, B, T, C) float32, as transformers' output_hidden_states:
        states[0] is the embeddings, states[i] the output of layer i, counted from 1, and states[L]
        the output of ln_f after the last layer

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range
        MemoryError : the results do not fit
        RuntimeError : another thread computes with this model, whose weights are fp32
        """
        tokens = check_tokens(self.config, idx)
        V, C, L = self.config.vocab_size, self.config.n_embd, self.config.n_layer
        K = self.config.num_labels
        shape = (*tokens.shape, V) if K is None else (len(tokens), K)
        sizes = {"logits": 4 * math.prod(shape)}
        sizes["hidden states"] = 4 * (L + 1) * tokens.size * C if hidden_states else 0
        require(
            f"a result for {counted(tokens.size, 'token')}", sizes, "take fewer or shorter rows"
        )
        logits = np.empty(shape, np.float32)
        states = np.empty((L + 1, *tokens.shape, C), np.float32) if hidden_states else None
        self._read_all(tokens, logits, states)
        return logits if states is None else (logits, states)

    def _read_all(self, tokens: IntArray, logits: Array, states: Array | None) -> None:
        """Write logits and, unless None, states (L + 1, B, T, C)."""
        decoder = self.decoder(1, tokens.shape[1])
        for b, row in enumerate(tokens):
            start, own = 0, None if states is None else states[:, b]
            for hidden in decoder.hidden(row, 0, 0, own):
                decoder.logits(logits[b, start : start + len(hidden)], hidden)
                start += len(hidden)

    def embed(self, idx: ArrayLike | Sequence[Sequence[int]]) -> Array:
        """Return a vector for each text: the mean of ln_f's output over its tokens.

        Vectors are not normalised; the cosine of two vectors measures how similar their texts are.
        A text's vector does not depend on the other texts.

        Parameters
        ----------
        idx : N texts of token ids, (N, T) or a list of lists of different lengths, up to
            n_positions tokens; an empty text becomes [eos_token_id]

        Returns
        -------
        (N, C) float32

        Raises
        ------
        ValueError : see `gpt2c.model.inputs.check_prompts`
        MemoryError : the keys and values of the longest text do not fit

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> vectors = model.embed([[1, 2, 3], [4]])
        >>> vectors.shape
        (2, 32)
        """
        texts = check_prompts(self.config, idx)
        decoder = self.decoder(1, max(map(len, texts)))
        vectors = np.empty((len(texts), self.config.n_embd), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            chunks = decoder.hidden(np.array(text, np.int32), 0, 0)
            sums = [chunk.sum(axis=0, dtype=np.float64) for chunk in chunks]
            vector[...] = np.sum(sums, axis=0) / len(text)
        return vectors

    def logprobs(self, idx: ArrayLike) -> Array:
        """Return the log-probability of each token given those before it, (B, T-1) float32 in nats.

        Parameters
        ----------
        idx : (B, T) token ids, 2 <= T <= n_positions

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range
        MemoryError : the keys and values of a row do not fit

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> np.exp(model.logprobs([[1, 2, 3]])).round(3)  # a fresh model: each near 1 / 257
        array([[0.003, 0.004]], dtype=float32)
        """
        tokens = check_tokens(self.config, idx)
        if tokens.shape[1] < 2:
            raise ValueError(
                "idx must have rows of at least 2 tokens, got 1: the first is not scored"
            )
        decoder = self.decoder(1, tokens.shape[1] - 1)
        return np.stack([-decoder.losses(row[:-1], row[1:]) for row in tokens])

    def mean_loss(self, idx: ArrayLike, targets: ArrayLike) -> float:
        """Return the mean loss in nats per token, without memory for a backward pass.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions
        targets : (B, T), the token that follows each: already shifted; -1 is ignored

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range, every target ignored
        MemoryError : the keys and values of a row do not fit

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> idx, targets = [[1, 2, 3]], [[2, 3, 4]]
        >>> abs(model.mean_loss(idx, targets) - model.loss(idx, targets)) < 1e-5
        True
        """
        tokens = check_tokens(self.config, idx)
        wanted = check_targets(self.config, targets, Tokens(tokens)).reshape(tokens.shape)
        if not (wanted >= 0).any():
            raise ValueError("targets are all -1 (ignored): give at least one token id")
        decoder = self.decoder(1, tokens.shape[1])
        losses = [decoder.losses(*pair) for pair in zip(tokens, wanted, strict=True)]
        return float(np.sum(losses, dtype=np.float64) / np.count_nonzero(wanted >= 0))
