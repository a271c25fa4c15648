"""GPT-2: parameters, forward, loss, backward, on any backend.

The model owns its memory, three flat buffers with named views (parameters, gradients, activations),
and calls ops in the order of the formula; it computes nothing itself. A layer is in layer.py. Knows
nothing about text, training or the instruction set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c import checkpoint, generate
from gpt2c.backend import Backend, get_backend
from gpt2c.config import GPT2Config
from gpt2c.layer import batched, layer_backward, layer_forward, layernorm, layernorm_backward
from gpt2c.memory import Array, aligned_offsets, aligned_zeros, named_views

IntArray = NDArray[np.int32]

LOGITS_FLOATS = (
    1 << 24
)  # 64 MB: the loss never holds more logits than this, (B,T,V) would be 0.8 GB at 4 x 1024


class GPT2:
    """A GPT-2 with its gradients.

    Parameters
    ----------
    config : its shape
    seed : of the fresh weights; None leaves them 0, to be filled by the caller
    backend : a name of `gpt2c.backends()`, "auto", or a backend

    Attributes
    ----------
    parameters, gradients : name -> float32 view into `flat_parameters`, `flat_gradients`; names and
        order of `GPT2Config.parameter_shapes`. Gradients accumulate from backward to backward until
        `zero_grad`.
    decay_size : the first so many floats of the flat buffers belong to tensors of 2 dimensions

    Raises
    ------
    ValueError : an unknown backend

    Source: Radford et al. 2019; openai/gpt-2 for formulae, karpathy/llm.c for the memory.
    """

    def __init__(
        self, config: GPT2Config, seed: int | None = 1337, backend: str | Backend = "auto"
    ) -> None:
        self.config = config
        self.backend = get_backend(backend) if isinstance(backend, str) else backend
        self._eps = config.layer_norm_epsilon
        shapes = config.parameter_shapes()
        offsets = aligned_offsets(shapes)
        self.flat_parameters = aligned_zeros(offsets[""])
        self.flat_gradients = aligned_zeros(offsets[""])
        self.parameters = named_views(self.flat_parameters, shapes)
        self.gradients = named_views(self.flat_gradients, shapes)
        self.decay_size = next(offsets[name] for name, shape in shapes.items() if len(shape) == 1)
        self._memory = aligned_zeros(0)
        self._pending: tuple[IntArray, IntArray, int] | None = None
        if seed is not None:
            self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Fill as GPT-2: normal weights, smaller where 2L of them add up, biases 0."""
        rng = np.random.default_rng(seed)
        for name, parameter in self.parameters.items():
            if parameter.ndim == 2:
                rng.standard_normal(out=parameter, dtype=np.float32)
                parameter *= self.config.initializer_range
                if name.endswith("c_proj.weight"):
                    parameter /= math.sqrt(2 * self.config.n_layer)
            else:
                parameter.fill(1.0 if ".weight" in name else 0.0)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], backend: str | Backend = "auto") -> GPT2:
        """Load a directory with config.json and model.safetensors, gpt2c's or Hugging Face's.

        Raises
        ------
        OSError : a file is missing or unreadable
        ValueError : a file is damaged, or its tensors are not those of its config
        """
        entries, tensors = checkpoint.load_weights(path)
        model = cls(GPT2Config.from_dict(entries), seed=None, backend=backend)
        model.load_parameters(tensors, f"{os.fspath(path)}")
        return model

    def load_parameters(self, tensors: dict[str, Array], source: str) -> None:
        """Copy tensors into the parameters; `source` names them in errors.

        Raises
        ------
        ValueError : a tensor is missing, unknown or of another shape; the parameters are as they
            were
        """
        for name, parameter in self.parameters.items():
            if name not in tensors:
                raise ValueError(f"{source}: tensor {name} is missing")
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{source}: tensor {name} must be {parameter.shape} for its config,"
                    f" got {tensors[name].shape}"
                )
        unknown = sorted(tensors.keys() - self.parameters.keys())
        if unknown:
            raise ValueError(f"{source}: a GPT-2 has no tensor {unknown[0]}")
        for name, parameter in self.parameters.items():
            parameter[...] = tensors[name]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, which transformers loads as they are.

        Raises
        ------
        OSError : they cannot be written; what was there before is intact
        """
        checkpoint.save_weights(directory, self.config.to_dict(), self.parameters)

    # ---- forward ---------------------------------------------------------------------------------

    def __call__(self, idx: ArrayLike) -> Array:
        """Logits (B, T, V) float32 of the next token at every position, in memory of their own.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range
        """
        tokens = self._check_tokens(idx)
        final = self._forward(tokens, keep=False)
        logits = np.empty((*tokens.shape, self.config.vocab_size), np.float32)
        rows = logits.reshape(-1, self.config.vocab_size)
        self.backend.matmul_forward(rows, final, self.parameters["wte.weight"], None)
        return logits

    def loss(self, idx: ArrayLike, targets: ArrayLike, keep: bool = True) -> float:
        """Mean cross-entropy in nats per token; keeps what `backward` needs.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions
        targets : (B, T), the token that follows each: already shifted; -1 is ignored
        keep : False if no backward will follow, which takes one layer's memory instead of all

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range, every target ignored
        """
        tokens = self._check_tokens(idx)
        wanted = self._check_targets(targets, tokens.shape)
        self._forward(tokens, keep)
        count = int(np.count_nonzero(wanted >= 0))
        self._pending = (tokens, wanted, count) if keep else None
        a = self._activations
        for rows in self._blocks(wanted.size):
            logits = self._logits(rows)
            self.backend.crossentropy_forward(
                a["losses"][rows], a["lse"][rows], logits, wanted[rows]
            )
        return float(a["losses"].sum(dtype=np.float64) / count)

    def _blocks(self, N: int) -> list[slice]:
        """Rows whose logits are computed together."""
        size = max(1, LOGITS_FLOATS // self.config.vocab_size)
        return [slice(start, min(start + size, N)) for start in range(0, N, size)]

    def _logits(self, rows: slice) -> Array:
        """lm_head: the logits of some rows of ln_f's output, in shared memory."""
        a = self._activations
        logits = a["logits"][: rows.stop - rows.start]
        self.backend.matmul_forward(logits, a["ln_f"][rows], self.parameters["wte.weight"], None)
        return logits

    def _forward(self, idx: IntArray, keep: bool) -> Array:
        """Run embedding, layers and final layernorm; return ln_f's output (N, C).

        With `keep`, every layer's activations stay for the backward pass; without, all layers use
        those of layer 0.
        """
        self._pending = None
        B, T = idx.shape
        self._allocate(B, T, keep)
        ops, p, a, eps = self.backend, self.parameters, self._activations, self._eps
        x = a["encoded"]
        ops.encoder_forward(batched(x, B), idx, p["wte.weight"], p["wpe.weight"])
        for layer in range(self.config.n_layer):
            x = layer_forward(ops, p, a, f"h.{layer}.", f"h.{layer if keep else 0}.", x, eps)
        layernorm(ops, p, a, "ln_f", "ln_f", x, eps)
        return a["ln_f"]

    # ---- backward --------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Set every gradient to 0."""
        self.flat_gradients.fill(0.0)

    def backward(self, scale: float = 1.0) -> None:
        """Add the gradient of `scale` times the last loss to `gradients`.

        To average over n batches before a step of the optimizer, give each scale=1/n.

        Raises
        ------
        ValueError : no loss was computed since the last backward
        """
        if self._pending is None:
            raise ValueError(
                "backward needs a loss: call loss(idx, targets) before each backward()"
            )
        idx, targets, count = self._pending
        self._pending = None
        ops, p, g, a = self.backend, self.parameters, self.gradients, self._activations
        stream = a["d_stream"]  # the gradient of the residual stream, from the last layer down
        blocks = self._blocks(targets.size)
        for rows in reversed(
            blocks
        ):  # the last block's logits are still there, the others are made again
            logits = (
                self._logits(rows) if rows != blocks[-1] else a["logits"][: rows.stop - rows.start]
            )
            ops.crossentropy_backward(logits, logits, a["lse"][rows], targets[rows], scale / count)
            ops.matmul_backward(
                a["d_ln"][rows], g["wte.weight"], None, logits, a["ln_f"][rows], p["wte.weight"]
            )
        stream.fill(0.0)
        layernorm_backward(ops, p, g, a, "ln_f", "ln_f", a[f"h.{self.config.n_layer - 1}.out"])
        for layer in reversed(range(self.config.n_layer)):
            x = a[f"h.{layer - 1}.out"] if layer else a["encoded"]
            layer_backward(ops, p, g, a, f"h.{layer}.", x)
        ops.encoder_backward(g["wte.weight"], g["wpe.weight"], batched(stream, len(idx)), idx)

    # ---- memory ----------------------------------------------------------------------------------

    def _allocate(self, B: int, T: int, keep: bool) -> None:
        """Lay out the activations of a (B, T) batch; the buffer grows when it must."""
        shapes = self.config.activation_shapes(B, T, keep, LOGITS_FLOATS)
        size = aligned_offsets(shapes)[""]
        if size > self._memory.size:
            self._activations: dict[
                str, Array
            ] = {}  # the old views go first, and with them the old buffer
            self._memory = aligned_zeros(0)
            self._memory = aligned_zeros(size)
        self._activations = named_views(self._memory, shapes)

    def _check_tokens(self, idx: ArrayLike) -> IntArray:
        ids = check_ids(idx, "idx", 0, self.config.vocab_size)
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"idx must be (B, T) token ids with B, T >= 1, got shape {ids.shape}")
        if ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"idx has rows of {ids.shape[1]} tokens, n_positions is {self.config.n_positions}"
            )
        return ids

    def _check_targets(self, targets: ArrayLike, shape: tuple[int, ...]) -> IntArray:
        ids = check_ids(targets, "targets", -1, self.config.vocab_size)
        if ids.shape != shape:
            raise ValueError(f"targets must have the shape of idx, {shape}, got {ids.shape}")
        if not (ids >= 0).any():
            raise ValueError("targets are all -1 (ignored): there is nothing to take the mean of")
        return ids.reshape(-1)

    # ---- generation ------------------------------------------------------------------------------

    def stream(
        self,
        idx: ArrayLike,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | Collection[int] | None = None,
    ) -> Iterator[NDArray[np.int64]]:
        """Continue prompts and yield the new tokens (B,) of each step as soon as they are drawn.

        Parameters
        ----------
        idx : (B, T) token ids; when they outgrow n_positions, the model sees the last n_positions
            of them
        max_new_tokens : the most tokens to add
        temperature : divides the logits; 0 takes the likeliest token
        top_k : draw among the k likeliest tokens only
        top_p : draw among the fewest likeliest tokens whose probabilities reach p only
        seed : the same seed draws the same tokens; None a fresh one
        stop : one token id or several that end a row

        Raises
        ------
        ValueError : an argument is out of range (at once, not at the first token)
        """
        ids = check_ids(idx, "idx", 0, self.config.vocab_size)
        return generate.stream(
            self._next_logits, ids, max_new_tokens, temperature, top_k, top_p, seed, stop
        )

    def generate(
        self,
        idx: ArrayLike,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | Collection[int] | None = None,
    ) -> NDArray[np.int64]:
        """Continue prompts (B, T) and give (B, T + new) token ids; see `stream` for arguments."""
        steps = self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, stop)
        prompt = np.asarray(idx, np.int64)
        return np.concatenate([prompt, *(step[:, None] for step in steps)], axis=1)

    def _next_logits(self, idx: NDArray[np.int64]) -> Array:
        """Logits (B, V) of the token that follows each row."""
        tokens = self._check_tokens(idx[:, -self.config.n_positions :])
        final = batched(self._forward(tokens, keep=False), len(tokens))
        last = np.ascontiguousarray(final[:, -1])
        logits = np.empty((len(tokens), self.config.vocab_size), np.float32)
        self.backend.matmul_forward(logits, last, self.parameters["wte.weight"], None)
        return logits


def check_ids(ids: ArrayLike, name: str, low: int, high: int) -> IntArray:
    """Copy `ids` as C-contiguous int32; refuse what is not whole numbers in [low, high)."""
    try:
        array = np.asarray(ids)
    except ValueError as error:  # nested lists of different lengths
        raise ValueError(f"{name} must be an array of whole numbers, all rows as long") from error
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers, got dtype {array.dtype}")
    if array.size and not (low <= array.min() and array.max() < high):
        wrong = array[(array < low) | (array >= high)].flat[0]
        raise ValueError(f"{name}: token id {wrong} is not in [{low}, {high})")
    return np.array(array, np.int32, order="C")  # backward reads it when the caller may not keep it
