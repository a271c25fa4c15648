"""GPT-2: parameters, forward, loss, backward, on any backend.

The model owns its memory, three flat buffers with named views (parameters, gradients, activations),
and calls ops in the order of the formula; it computes nothing itself. A layer is in layer.py. Knows
nothing about text, training or the instruction set.

Two things are done for speed. The gradient of the lm_head is computed with the loss, a block of
logits at a time, for a (B,T,V) that is never whole is not there for a later pass. And zero_grad
only notes that the gradients are void: the next backward writes where it would add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.backend import Backend, as_backend, same_backend
from gpt2c.kernels.checks import number, whole
from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, named_views, require
from gpt2c.model.config import GPT2Config
from gpt2c.model.language_model import IntArray, LanguageModel
from gpt2c.model.layer import (
    batched,
    layer_backward,
    layer_forward,
    layernorm,
    layernorm_backward,
    recompute_forward,
)
from gpt2c.model.owner import Owner
from gpt2c.model.parameters import Tensor, check_shapes, converted_bytes
from gpt2c.model.plan import Activations

__all__ = ["Model"]

LARGEST_FLOAT = float(np.finfo(np.float32).max)


class _Gradients:
    """The gradients' memory: flat, as views whose shapes C trusts, and as views for others."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.flat = aligned_zeros(aligned_offsets(shapes)[""])
        self.own = named_views(self.flat, shapes)
        self.public = MappingProxyType(named_views(self.flat, shapes))


class Model(LanguageModel):
    """What `gpt2c.GPT2` computes, without files and texts: see there for arguments and errors.

    It owns its memory and has one owner at a time, the thread that computes (`gpt2c.model.owner`).
    """

    def __init__(
        self,
        config: GPT2Config,
        seed: int | None = 1337,
        backend: str | Backend = "auto",
        recompute: str | None = None,
        threads: int | None = None,
    ) -> None:
        if seed is not None and whole("seed", seed) < 0:
            raise ValueError(f"seed must be at least 0, or None to leave the weights 0, got {seed}")
        super().__init__(config, as_backend(backend, threads))
        self.recompute = recompute
        self._eps = config.layer_norm_epsilon
        shapes = config.parameter_shapes()
        offsets = aligned_offsets(shapes)
        require(
            f"a model of {config.num_parameters():,} parameters",
            {"weights": 4 * offsets[""]},
            'take a smaller one or, to read it, quantize="int8" (--quantize int8), a quarter of it',
        )
        self.flat_parameters = aligned_zeros(offsets[""])
        # C trusts the shapes of those it gets; who changes numbers does so in views of his own.
        self._parameters = named_views(self.flat_parameters, shapes)
        self.parameters = MappingProxyType(named_views(self.flat_parameters, shapes))
        self.decay_size = next(offsets[name] for name, shape in shapes.items() if len(shape) == 1)
        self._made_grads: _Gradients | None = None
        self._void = True  # the gradients count as 0, whatever their memory holds
        self._memory = Activations(config, recompute)
        self._activations: dict[str, Array] = {}
        self._spare_memory = aligned_zeros(0)
        self._d_head = self._spare_memory  # of the last loss, for wte: spare, or void gradients
        self._pending: IntArray | None = None  # the tokens of a loss that backward has not seen
        self._owner = Owner()
        if seed is not None:
            self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Fill as GPT-2: normal weights, smaller where 2L of them add up, biases 0."""
        rng = np.random.default_rng(seed)
        for name, parameter in self._parameters.items():
            if parameter.ndim == 2:
                rng.standard_normal(out=parameter, dtype=np.float32)
                parameter *= self.config.initializer_range
                if name.endswith("c_proj.weight"):
                    parameter /= math.sqrt(2 * self.config.n_layer)
            else:
                parameter.fill(1.0 if ".weight" in name else 0.0)

    def load_parameters(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy tensors into the parameters, one at a time; `source` names them in errors.

        Raises
        ------
        ValueError : a tensor is missing, unknown or of another shape; the parameters are as they
            were
        MemoryError : a tensor of another dtype does not fit beside them
        """
        check_shapes(self.config.parameter_shapes(), tensors, source)
        require("loading the weights", converted_bytes(tensors), 'take quantize="int8"')
        for name, parameter in self._parameters.items():
            self._fill(parameter, np.asarray(tensors[name]))

    def _fill(self, parameter: Array, tensor: NDArray[Any]) -> None:
        if tensor.ndim == 2 and tensor.dtype == np.float32 and tensor.flags.f_contiguous:
            self.backend.matrix_transpose(parameter, tensor.T)
        else:
            parameter[...] = tensor

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of."""
        return {
            "config": self.config,
            "backend": (self.backend.name, self.backend.threads),
            "recompute": self.recompute,
            "parameters": self.flat_parameters,
            "gradients": None if self._void else self._grads.flat,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a model with memory of its own."""
        backend = same_backend(*state["backend"])
        Model.__init__(self, state["config"], None, backend, state["recompute"])
        self.flat_parameters[...] = state["parameters"]
        if state["gradients"] is not None:
            self._grads.flat[...] = state["gradients"]
            self._void = False

    # ---- forward ---------------------------------------------------------------------------------

    def _read_all(self, tokens: IntArray, logits: Array, states: Array | None) -> None:
        """See `LanguageModel._read_all`; all rows pass the layers together."""
        rows = logits.reshape(-1, self.config.vocab_size)
        with self._owner.alone():
            a = self._forward(tokens, keep=False, states=states)
            self.backend.matmul_forward(rows, a["ln_f"], self._parameters["wte.weight"], None, None)

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
        RuntimeError : another thread computes with this model
        MemoryError, OSError : the activations do not fit, or the threads cannot start
        """
        tokens = self._check_tokens(idx)
        wanted = self._check_targets(targets, tokens.shape).reshape(-1)
        with self._owner.alone():
            a = self._forward(tokens, keep)
            if keep:
                self._d_head = self._grads.own["wte.weight"] if self._void else self._spare()
            ops, wte = self.backend, self._parameters["wte.weight"]
            count = int(np.count_nonzero(wanted >= 0))
            blocks = -(-wanted.size // len(a["logits"]))
            size = -(-wanted.size // blocks)
            for start in range(0, wanted.size, size):
                rows = slice(start, min(start + size, wanted.size))
                x, logits = a["ln_f"][rows], a["logits"][: rows.stop - rows.start]
                losses, lse = a["losses"][rows], a["lse"][rows]
                ops.matmul_forward(logits, x, wte, None, None)
                ops.crossentropy_forward(losses, lse, logits, wanted[rows])
                if keep:
                    ops.crossentropy_backward(logits, logits, lse, wanted[rows], 1 / count)
                    ops.matmul_backward(x, self._d_head, None, logits, x, wte, accumulate=start > 0)
            self._owner.note_loss()
            self._pending = tokens if keep else None
            return float(a["losses"].sum(dtype=np.float64) / count)

    def _spare(self) -> Array:
        """Return memory of wte's shape beside the gradients, where they must not be touched."""
        wte = self._grads.own["wte.weight"]
        if self._spare_memory.size != wte.size:
            self._spare_memory = aligned_zeros(wte.size)
        return self._spare_memory.reshape(wte.shape)

    def _forward(self, idx: IntArray, keep: bool, states: Array | None = None) -> dict[str, Array]:
        """Run embedding, layers and final layernorm; return the activations.

        With `keep`, what the backward pass needs of every layer stays. `states` (L + 1, B, T, C),
        where it is given, gets the residual stream before each layer and ln_f's output.
        """
        self._pending = None
        B, T = idx.shape
        self._activations = {}  # the old views go first, so that memory which must grow is let go
        self._activations = self._memory.lay_out(B, T, keep)
        ops, p, a, eps = self.backend, self._parameters, self._activations, self._eps
        x = a["encoded"]
        ops.encoder_forward(batched(x, B), idx, p["wte.weight"], p["wpe.weight"], None, 0)
        for layer in range(self.config.n_layer):
            if states is not None:
                states[layer] = batched(x, B)
            x = layer_forward(ops, p, a, f"h.{layer}.", x, eps)
        layernorm(ops, p, a, "ln_f", x, eps)
        if states is not None:
            states[-1] = batched(a["ln_f"], B)
        return a

    # ---- backward --------------------------------------------------------------------------------

    @property
    def _grads(self) -> _Gradients:
        if self._made_grads is None:
            config = self.config
            what = f"training a model of {config.num_parameters():,} parameters"
            sizes = {"gradients": self.flat_parameters.nbytes}
            require(what, sizes, "take a smaller one")
            self._made_grads = _Gradients(config.parameter_shapes())
        return self._made_grads

    @property
    def gradients(self) -> Mapping[str, Array]:
        """Name -> float32 view into `flat_gradients`."""
        self._settle()
        return self._grads.public

    @property
    def flat_gradients(self) -> Array:
        """All gradients, laid out as `flat_parameters`."""
        self._settle()
        return self._grads.flat[:]

    def zero_grad(self) -> None:
        """Set every gradient to 0: at once for who asks for `gradients`, without work for backward.

        What views taken earlier hold is void until then.
        """
        self._void = True

    def _settle(self) -> None:
        """Let the memory of void gradients hold zeros."""
        if self._void:
            if self._pending is not None and self._d_head is self._grads.own["wte.weight"]:
                spare = self._spare()
                np.copyto(spare, self._d_head)
                self._d_head = spare
            self._grads.flat.fill(0.0)
            self._void = False

    def backward(self, scale: float = 1.0) -> None:
        """Add the gradient of `scale` times the last loss to `gradients`.

        To average over n batches before a step of the optimizer, give each scale=1/n.

        Raises
        ------
        ValueError : no loss was computed since the last backward, or the scale is no finite number
        RuntimeError : another thread computes with this model, or has computed the last loss
        MemoryError, OSError : a kernel cannot start
        """
        if not abs(number("scale", scale)) <= LARGEST_FLOAT:
            raise ValueError(f"scale must be finite as a float32, got {scale}")
        with self._owner.alone():
            if self._pending is None:
                raise ValueError(
                    "backward needs a loss: call loss(idx, targets) before each backward()"
                )
            self._owner.check_loss()
            idx, accumulate = self._pending, not self._void
            self._pending, self._void = None, False
            ops, p, g, a = self.backend, self._parameters, self._grads.own, self._activations
            self._backward_head(scale, accumulate)
            if not accumulate:  # those that no op writes
                self._grads.flat[self.decay_size :].fill(0.0)
                g["wpe.weight"].fill(0.0)
            a["d_stream"].fill(0.0)
            layernorm_backward(ops, p, g, a, "ln_f", a[f"h.{self.config.n_layer - 1}.out"])
            for layer in reversed(range(self.config.n_layer)):
                h, x = f"h.{layer}.", a[f"h.{layer - 1}.out"] if layer else a["encoded"]
                recompute_forward(ops, p, a, h, x, self._eps, self.recompute)
                layer_backward(ops, p, g, a, h, x, accumulate)
            d_encoded = batched(a["d_stream"], len(idx))
            ops.encoder_backward(g["wte.weight"], g["wpe.weight"], d_encoded, idx)

    def _backward_head(self, scale: float, accumulate: bool) -> None:
        """Bring in what `loss` has computed: the gradients of wte and, in its place, of ln_f."""
        wte, d_head, d_final = (
            self._grads.own["wte.weight"],
            self._d_head,
            self._activations["ln_f"],
        )
        if scale != 1.0:
            np.multiply(d_head, np.float32(scale), out=d_head)
            np.multiply(d_final, np.float32(scale), out=d_final)
        if accumulate:
            self.backend.residual_forward(wte, wte, d_head)
        elif d_head is not wte:
            np.copyto(wte, d_head)
