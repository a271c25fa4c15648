"""GPT-2: parameters, forward, loss, backward, on any backend.

The model owns its memory, three flat buffers with named views (parameters, gradients, activations),
and hands them to its blocks (stack.py), which call the ops. Knows nothing about text, training or
the instruction set.

Two things are done for speed. The gradient of the lm_head is computed with the loss, a block of
logits at a time, for a (B,T,V) that is never whole is not there for a later pass. And zero_grad
only notes that the gradients are void: the next backward writes where it would add.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.backend import Backend, as_backend, same_backend
from gpt2c.kernels.checks import number, whole
from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, named_views, require
from gpt2c.model.block import Batch, IntArray, Run, Slot
from gpt2c.model.config import GPT2Config
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.owner import Owner
from gpt2c.model.parameters import Tensor, check_shapes, converted_bytes
from gpt2c.model.plan import KEPT, Activations

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
        self._stack = config.stack()
        self._recompute = recompute
        described = self._stack.parameters()
        shapes = {name: one.shape for name, one in described.items()}
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
        self.decay_size = next(offsets[name] for name, one in described.items() if not one.decays)
        self._made_grads: _Gradients | None = None
        self._void = True  # the gradients count as 0, whatever their memory holds
        self._memory = Activations(self._slots, recompute)
        self._spare_memory = aligned_zeros(0)
        self._d_head = self._spare_memory  # of the last loss, for wte: spare, or void gradients
        self._pending: tuple[Run, IntArray] | None = None  # of a loss that backward has not seen
        self._owner = Owner()
        if seed is not None:
            self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Write the first values that the blocks name."""
        rng = np.random.default_rng(seed)
        for name, one in self._stack.parameters().items():
            parameter = self._parameters[name]
            if one.std:
                rng.standard_normal(out=parameter, dtype=np.float32)
                parameter *= one.std
                parameter /= one.shrink
            else:
                parameter.fill(one.fill)

    @property
    def recompute(self) -> str | None:
        """What backward computes again; read-only, for the activations are laid out for it."""
        return self._recompute

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
        """Return the state of a copy or pickle."""
        return {
            "config": self.config,
            "backend": (self.backend.name, self.backend.threads),
            "recompute": self.recompute,
            "parameters": self.flat_parameters,
            "gradients": None if self._void else self._grads.flat,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up the model from a state, in memory of its own."""
        backend = same_backend(*state["backend"])
        Model.__init__(self, state["config"], None, backend, state["recompute"])
        self.flat_parameters[...] = state["parameters"]
        if state["gradients"] is not None:
            self._grads.flat[...] = state["gradients"]
            self._void = False

    # ---- forward ---------------------------------------------------------------------------------

    def _read_all(self, tokens: IntArray, logits: Array, states: Array | None) -> None:
        """See `LanguageModel._read_all`; all rows pass the layers together."""
        with self._owner.alone():
            run = self._start(tokens, keep=False)
            out = self._stack.forward(run, tokens, states)
            self._stack.head.forward(run, logits.reshape(len(out), -1), out)

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
        ops, head = self.backend, self._stack.head
        with self._owner.alone():
            run = self._start(tokens, keep)
            x, losses, lse = self._stack.forward(run, tokens), run.a["losses"], run.a["lse"]
            count = int(np.count_nonzero(wanted >= 0))
            if keep:
                self._d_head = self._grads.own["wte.weight"] if self._void else self._spare()
            for rows, logits in head.blocks(run, x):
                ops.crossentropy_forward(losses[rows], lse[rows], logits, wanted[rows])
                if keep:
                    ops.crossentropy_backward(
                        logits, logits, lse[rows], wanted[rows], None, 1 / count
                    )
                    run.accumulate = rows.start > 0
                    head.backward(run, self._d_head, x[rows], logits, x[rows])
            self._owner.note_loss()
            self._pending = (run, tokens) if keep else None
            return float(losses.sum(dtype=np.float64) / count)

    def _slots(self, batch: Batch) -> Iterable[Slot]:
        yield from self._stack.slots(batch)
        yield from self._stack.head.slots(batch)

    def _start(self, tokens: IntArray, keep: bool) -> Run:
        """Lay out the activations of a batch; with `keep`, those of backward stay."""
        self._pending = None  # its views go first, so that memory which must grow is let go
        batch = Batch(*tokens.shape)
        return Run(self.backend, self._parameters, self._memory.lay_out(batch, keep), batch)

    def _spare(self) -> Array:
        """Return memory of wte's shape beside the gradients, where they must not be touched."""
        wte = self._grads.own["wte.weight"]
        if self._spare_memory.size != wte.size:
            self._spare_memory = aligned_zeros(wte.size)
        return self._spare_memory.reshape(wte.shape)

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
            (run, idx), self._pending = self._pending, None
            run.g, run.accumulate = self._grads.own, not self._void
            self._void = False
            d_out = self._backward_head(run, scale)
            if not run.accumulate:  # ops add to those of norms
                self._grads.flat[self.decay_size :].fill(0.0)
            self._stack.backward(run, d_out, idx, KEPT[self._recompute])

    def _backward_head(self, run: Run, scale: float) -> Array:
        """Bring in what `loss` has computed: add wte's gradient; return that of the head's input.

        It stands in the memory of the input itself.
        """
        wte, d_head, d_out = run.g["wte.weight"], self._d_head, run.a["ln_f"]
        if scale != 1.0:
            np.multiply(d_head, np.float32(scale), out=d_head)
            np.multiply(d_out, np.float32(scale), out=d_out)
        if run.accumulate:
            self.backend.residual_forward(wte, wte, d_head)
        elif d_head is not wte:
            np.copyto(wte, d_head)
        return d_out
