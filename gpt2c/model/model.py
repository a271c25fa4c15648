"""A model: parameters, forward, loss, backward, on any backend.

The model owns its memory, three flat buffers with named views (parameters, gradients, activations),
and hands them to its blocks (stack.py), which call the ops. Knows nothing about text, training or
the instruction set.

Two things are done for speed. `loss` computes the gradient of the lm_head together with the loss, a
block of logits at a time, because the logits of a whole batch are never in memory. And zero_grad
only marks the gradients as void: the next backward writes where it would add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.backend import Backend, as_backend, same_backend
from gpt2c.kernels.checks import counted, number, whole
from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, named_views, require
from gpt2c.model.block import (
    NO_DROPOUT,
    Batch,
    Dropout,
    IntArray,
    Parameter,
    Run,
    Slot,
    check_dropout,
)
from gpt2c.model.config import ModelConfig
from gpt2c.model.inputs import (
    Tokens,
    check_batch,
    check_labels,
    check_like,
    check_targets,
    check_tokens,
)
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.lora import TARGETS, LoRA, is_adapter
from gpt2c.model.objective import CrossEntropy, Objective
from gpt2c.model.owner import Owner
from gpt2c.model.parameters import Tensor, check_shapes, converted_bytes, names_that_fit
from gpt2c.model.plan import Activations, has_halves
from gpt2c.model.quantized import (
    check_method,
    check_weights,
    copy_stored,
    layout_of,
    restored,
    room_of,
    round_into,
    shapes_of,
    typed_views,
)
from gpt2c.model.stack import Stack
from gpt2c.model.trace import Trace

__all__ = ["Model", "first_values"]

LARGEST_FLOAT = float(np.finfo(np.float32).max)
SMALLER = {  # the advice where a model of these weights does not fit
    "fp32": 'take a smaller one or, to read it, quantize="int8" (--quantize int8), a quarter of it',
    "fp16": 'take a smaller one, or quantize="int8"',
    "int8": "take a smaller one",
}


class _Gradients:
    """The gradients' memory: flat, as views whose shapes C trusts, and as views for others."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.flat = aligned_zeros(aligned_offsets(shapes)[""])
        self.own = named_views(self.flat, shapes)
        self.public = MappingProxyType(named_views(self.flat, shapes))


class _Placed(NamedTuple):
    """The parameters' memory.

    flat, shown : all of it; and what `flat_parameters` shows of it
    own, public : views by name, whose shapes C trusts; and views for others
    """

    flat: Array
    shown: Array
    own: dict[str, NDArray[Any]]
    public: Mapping[str, NDArray[Any]]


class _Pending(NamedTuple):
    """A loss that backward has not seen; after `losses` and `scores` the head has no gradients yet.

    shapes : of the result of `losses` or `scores`
    targets : of `losses`, (N,)
    rows : the tokens that `scores` has read
    """

    run: Run
    tokens: IntArray
    shapes: Sequence[tuple[int, ...]] = ()
    targets: IntArray | None = None
    rows: NDArray[np.intp] | None = None

    def check_weights(self, weights: ArrayLike | Sequence[ArrayLike] | None) -> Array | None:
        """Return weights as (N,) float32."""
        if weights is None:
            return None
        if self.targets is None:
            raise ValueError("weights are for losses(idx, targets); the last call was another")
        return check_like("weights", weights, self.shapes, "losses")

    def check_d_scores(
        self, d_scores: ArrayLike | Sequence[ArrayLike] | None, scale: float
    ) -> Array | None:
        """Return the gradient of scores as (n, K) float32."""
        if (d_scores is None) != (self.rows is None):
            raise ValueError(
                "backward needs d_scores, the gradient of the scores, after scores(idx)"
                if d_scores is None
                else "d_scores is for scores(idx): the last loss has a gradient of its own"
            )
        if d_scores is None:
            return None
        given = check_like("d_scores", d_scores, self.shapes, "scores").reshape(
            -1, self.shapes[0][-1]
        )
        if not float(np.abs(given).max()) * abs(scale) <= LARGEST_FLOAT:
            raise ValueError("scale times d_scores must be finite as float32")
        return given


class Model(LanguageModel):
    """What `gpt2c.GPT2` computes, without files and texts: see there for arguments and errors.

    Weights of 16 or 8 bits are only read. Without adapters nothing is trained then, and no loss
    waits for backward.

    It owns its memory and has one owner at a time, the thread that computes (`gpt2c.model.owner`).
    """

    trained: tuple[str, ...]
    trained_size: int
    decay_size: int
    _stack: Stack
    _memory: Activations
    _placed: _Placed
    _arrive: Callable[[Iterable[str]], None] | None = None
    _frozen: frozenset[str]
    _pending: _Pending | None
    _made_grads: _Gradients | None
    _void: bool
    _spare_memory: Array
    _d_head: Array | None

    def __init__(
        self,
        config: ModelConfig,
        seed: int | None = 1337,
        backend: str | Backend = "auto",
        recompute: str | None = None,
        threads: int | None = None,
        weights: str = "fp32",
        precision: str = "fp32",
    ) -> None:
        if seed is not None and whole("seed", seed) < 0:
            raise ValueError(f"seed must be at least 0, or None to leave the weights 0, got {seed}")
        check_weights(weights, config)
        super().__init__(config, as_backend(backend, threads), weights, precision)
        self._recompute = recompute
        described = config.stack().parameters()
        size = 4 * aligned_offsets(room_of(layout_of(described.values(), weights)))[""]
        what = f"a model of {config.num_parameters():,} parameters"
        require(what, {"weights": size}, SMALLER[weights])
        learns = weights == "fp32" or config.lora is not None
        self._lay_out(config, config.frozen() if learns else frozenset(described))
        self._owner = Owner()
        if seed is not None:
            self._initialise(seed)

    def _lay_out(
        self,
        config: ModelConfig,
        frozen: frozenset[str],
        values: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Move to flat memory with these values: what decays, the rest of what is trained, frozen.

        All of it is there before the model has any of it, whatever interrupts this.
        """
        stack = config.stack()
        described = stack.parameters()
        groups: tuple[list[str], ...] = ([], [], [])
        for name, one in described.items():
            groups[2 if name in frozen else 0 if one.decays else 1].append(name)
        ordered = [described[name] for group in groups for name in group]
        layout = layout_of(ordered, self.weights)
        offsets = [*aligned_offsets(room_of(layout)).values()]
        flat = aligned_zeros(offsets[-1])
        own = typed_views(flat, layout)  # for C, which trusts their shapes; users get others
        if values is not None:
            for name, place in own.items():
                same = place.dtype == values[name].dtype
                place[...] = values[name] if same else restored(values, name)
        trained = (*groups[0], *groups[1])
        halves = self.precision == "bf16" and has_halves(config, self.weights)
        if self.weights == "fp32":
            shown = flat
        else:  # bytes of several types, but what is trained is of floats and comes first
            shown = flat[: offsets[len(trained)]] if trained else flat.view(np.uint8)
        self.__dict__.update(  # at once
            config=config,
            _placed=_Placed(flat, shown, own, MappingProxyType(typed_views(flat, layout))),
            trained=trained,
            trained_size=offsets[len(trained)],
            decay_size=offsets[len(groups[0])],
            _stack=stack,
            _memory=Activations(self._slots, self._recompute, halves),
            _frozen=frozen,
            _pending=None,  # of a loss that backward has not seen
            _made_grads=None,
            _void=True,  # the gradients count as 0, whatever their memory holds
            _spare_memory=aligned_zeros(0),
            _d_head=None,  # of the last loss: in spare memory, or in that of void gradients
        )

    def expect(self, arrive: Callable[[Iterable[str]], None]) -> None:
        """Call `arrive` before parameters are read: it waits for those that other ranks send.

        It gets their names: in a forward pass those of each layer in its turn, else all. Arrays
        that were taken before they were on their way do not wait.
        """
        self._arrive = arrive

    @property
    def _whole(self) -> _Placed:
        """The parameters' memory, all of which has arrived: every reader but forward comes here."""
        if self._arrive is not None:
            self._arrive(self._placed.own)
        return self._placed

    @property
    def parameters(self) -> Mapping[str, NDArray[Any]]:
        """Name -> view into `flat_parameters`."""
        return self._whole.public

    @property
    def flat_parameters(self) -> Array:
        """All parameters: those that decay, the rest of what is trained, the frozen ones."""
        return self._whole.shown

    @property
    def _flat(self) -> Array:
        return self._whole.flat

    @property
    def _parameters(self) -> dict[str, NDArray[Any]]:
        return self._whole.own

    def freeze(self, *patterns: str) -> None:
        """Train these parameters no longer: they get no gradients, and no moments in AdamW.

        Backward computes nothing below the lowest layer that is still trained. The parameters move:
        `parameters` has new arrays and gradients are gone. Make optimizers, decoders and Engines
        again: those made before keep the old arrays. Copies and pickles keep what is frozen; files
        do not.

        Parameters
        ----------
        patterns : of names as the shell has them: "wte.*", "h.[0-5].*", "*.bias"

        Raises
        ------
        ValueError : a pattern that fits no name, nothing is left to train, or weights that are not
            fp32
        RuntimeError : another thread computes with this model
        MemoryError : the parameters do not fit a second time

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257)
        >>> model = gpt2c.GPT2(config)
        >>> model.freeze("w[tp]e.*", "h.0.*")
        >>> loss = model.loss([[1, 2, 3]], [[2, 3, 4]])
        >>> model.backward()
        >>> len(model.parameters), len(model.gradients)
        (28, 14)
        """
        if not patterns:
            raise ValueError('name what to freeze, for instance freeze("wte.*", "h.0.*")')
        self._set_frozen(self._frozen | names_that_fit(self._parameters, patterns))

    def unfreeze(self, *patterns: str) -> None:
        """Train these parameters again, without patterns all; see `freeze`.

        Raises
        ------
        ValueError, RuntimeError, MemoryError : see `freeze`
        """
        self._set_frozen(self._frozen - names_that_fit(self._parameters, patterns or ("*",)))

    def add_lora(
        self,
        r: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = TARGETS,
        use_rslora: bool = False,
        seed: int = 1337,
    ) -> None:
        """Give linear layers low-rank adapters, and train these in place of all other parameters.

        The adapters change nothing before the first step. The scores of a model with num_labels are
        trained, too. The parameters move, as with `freeze`; those of 16 or 8 bits stay as they are.
        Copies and pickles keep the adapters; `save_pretrained` writes them alone.

        Parameters
        ----------
        r, alpha, targets, use_rslora : see `gpt2c.LoRA`
        seed : of the first values

        Raises
        ------
        ValueError : a setting is out of range, a target fits no layer, or the model has adapters
        RuntimeError : another thread computes with this model
        MemoryError : the parameters do not fit a second time

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257)
        >>> model = gpt2c.GPT2(config)
        >>> before = model.loss([[1, 2, 3]], [[2, 3, 4]])
        >>> model.add_lora(r=4, alpha=8, targets=["c_attn"])
        >>> model.loss([[1, 2, 3]], [[2, 3, 4]]) == before
        True
        >>> model.trained[:2]
        ('h.0.attn.c_attn.lora_A.weight', 'h.0.attn.c_attn.lora_B.weight')
        >>> optimizer = gpt2c.AdamW(model, learning_rate=1e-3)
        >>> model.backward()
        >>> norm = optimizer.step()
        >>> merged = model.merge()  # without adapters, for other programs
        """
        if self.config.lora is not None:
            raise ValueError("the model has adapters: call merge() before it gets others")
        if whole("seed", seed) < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        lora = LoRA(r, alpha, tuple(targets), use_rslora)
        config: ModelConfig = dataclasses.replace(self.config, lora=lora)  # type: ignore[type-var]
        with self._owner.alone():
            require(
                "moving the parameters", {"weights": 4 * self._flat.size}, "take a smaller model"
            )
            new = config.parameter_shapes().keys() - self._parameters.keys()
            values = {**self._parameters, **first_values(config, seed, new)}
            self._lay_out(config, config.frozen(), values)

    def merge(self) -> Self:
        """Return a model without adapters that computes the same: its weights are W + s B A.

        Weights of 16 or 8 bits become float32. This model stays as it is.

        Raises
        ------
        ValueError : the model has no adapters
        MemoryError : the weights do not fit
        """
        if self.config.lora is None:
            raise ValueError("the model has no adapters to merge")
        config: ModelConfig = dataclasses.replace(self.config, lora=None)  # type: ignore[type-var]
        model, own = type(self).__new__(type(self)), self._parameters
        Model.__init__(
            *(model, config, None, self.backend, self.recompute), precision=self.precision
        )
        for name, parameter in model._parameters.items():
            parameter[...] = restored(own, name)
        for linear in self._stack.linears():
            if linear.adapter is not None:
                change = own[linear.adapter.up] @ own[linear.adapter.down]
                change *= np.float32(linear.adapter.scale)
                model._parameters[linear.weight] += change
        return model

    def _set_frozen(self, frozen: frozenset[str]) -> None:
        self._check_can_train()
        if len(frozen) == len(self._parameters):
            raise ValueError("every parameter would be frozen: leave some to train")
        if frozen == self._frozen:
            return
        if self.weights != "fp32":
            described = self._stack.parameters()
            small = [name for name, one in described.items() if one.small and name not in frozen]
            if small:
                raise ValueError(f"{small[0]} has {self.weights} weights, which cannot be trained")
        with self._owner.alone():
            require(
                "moving the parameters", {"weights": 4 * self._flat.size}, "take a smaller model"
            )
            self._lay_out(self.config, frozen, self._parameters)

    def _initialise(self, seed: int) -> None:
        """Write the first values that the blocks name."""
        streams = Streams(seed)
        for name, one in self._stack.parameters().items():
            parameter = self._parameters[name]
            is_small = one.small and self.weights != "fp32"
            if is_small:
                size = {"a tensor in float32": 4 * parameter.size}
                require("rounding the first values", size, "close programs that use much memory")
            value = np.empty(one.shape, np.float32) if is_small else parameter
            draw(one, streams.of(name), value)
            if is_small:
                round_into(self._parameters, self.weights, name, value, "the first values")

    @property
    def recompute(self) -> str | None:
        """What backward computes again; read-only, because the memory is laid out for it."""
        return self._recompute

    def load_parameters(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy tensors into the parameters, one at a time; `source` names them in errors.

        Weights of 16 or 8 bits are rounded on the way.

        Raises
        ------
        ValueError : a tensor is missing, unknown or of another shape, and the parameters are as
            they were; or a number cannot be rounded
        MemoryError : a tensor of another dtype does not fit beside them
        """
        check_shapes(self.config.parameter_shapes(), tensors, source)
        size = converted_bytes(tensors)
        if self.weights == "fp32":
            require("loading the weights", size, 'take quantize="int8"')
            for name, parameter in self._parameters.items():
                self._fill(parameter, np.asarray(tensors[name]))
            return
        require("rounding the weights", size, "close programs that use much memory")
        for name in tensors:
            round_into(self._parameters, self.weights, name, np.asarray(tensors[name]), source)

    def load_adapters(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy tensors into the adapters and, if there are any, the scores.

        Raises
        ------
        ValueError : see `load_parameters`
        """
        frozen = self.config.frozen()
        shapes = {n: s for n, s in self.config.parameter_shapes().items() if n not in frozen}
        check_shapes(shapes, tensors, source)
        for name in shapes:
            self._parameters[name][...] = np.asarray(tensors[name])

    def load_quantized(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy tensors that are of this model's types already; `source` names them in errors.

        Raises
        ------
        ValueError : a tensor is missing, unknown or of another shape or type, or not finite
        """
        check_shapes(shapes_of(self.config, self.weights), tensors, source)
        for name, parameter in self._parameters.items():
            copy_stored(parameter, tensors[name], f"{source}: {name}")

    def quantize(self, weights: str) -> Self:
        """Return a model with weights of 16 or 8 bits, for inference; this one stays as it is.

        It takes a half or a quarter of the memory and is faster where memory limits the speed.

        Parameters
        ----------
        weights : "fp16" keeps 11 bits of each weight; "int8" rounds each row of a matrix to 255
            steps between plus and minus its largest weight

        Raises
        ------
        ValueError : another type, weights that are not fp32 now, or a weight that is not finite or
            beyond fp16's range
        MemoryError : the weights do not fit

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257)
        >>> model = gpt2c.GPT2(config, seed=1).quantize("int8")
        >>> model.weights, model.parameters["wte.weight"].dtype
        ('int8', dtype('uint8'))
        """
        check_method(weights)
        if self.weights != "fp32":
            raise ValueError(
                f"the model already has {self.weights} weights: start from one with fp32 weights"
            )
        model = type(self).__new__(type(self))
        Model.__init__(
            *(model, self.config, None, self.backend), weights=weights, precision=self.precision
        )
        model.load_parameters(self._parameters, "the model")
        return model

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
            "weights": self.weights,
            "precision": self.precision,
            "frozen": self._frozen,
            "parameters": self._flat,
            "gradients": None if self._void else self._grads.flat,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up the model from a state, in memory of its own."""
        backend = same_backend(*state["backend"])
        settings = {name: state[name] for name in ("recompute", "weights", "precision")}
        Model.__init__(self, state["config"], None, backend, **settings)
        if state["frozen"] != self._frozen:
            self._lay_out(self.config, state["frozen"])
        self._flat[...] = state["parameters"]
        if state["gradients"] is not None:
            self._grads.flat[...] = state["gradients"]
            self._void = False

    # ---- forward ---------------------------------------------------------------------------------

    def _read_all(self, tokens: IntArray, logits: Array, states: Array | None) -> None:
        """See `LanguageModel._read_all`; all rows pass the layers together.

        Not the logits of smaller weights, which are for inference: rows that follow each other take
        the memory of one, and several threads can read at once.
        """
        if self.weights != "fp32" and self.config.num_labels is None:
            super()._read_all(tokens, logits, states)
            return
        with self._owner.alone():
            batch = Tokens(tokens)
            run = self._start(batch, keep=False)
            out = self._stack.forward(run, tokens, states)
            if self.config.num_labels is not None:
                out = out[batch.last]
            self._stack.head.forward(run, logits.reshape(len(out), -1), out)

    def trace(self, idx: ArrayLike) -> Trace:
        """Return the channels that a forward pass writes, by name: for a look inside the model.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range
        RuntimeError : another thread computes with this model
        MemoryError : the activations do not fit

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257)
        >>> trace = gpt2c.GPT2(config, seed=1).trace([[1, 2, 3]])
        >>> trace["h.1.mlp.act"].shape, trace.attention(0).shape, trace.lens("h.0.out").shape
        ((1, 3, 128), (1, 2, 3, 3), (1, 3, 257))
        """
        tokens = check_tokens(self.config, idx)
        batch = Batch(*tokens.shape)
        with self._owner.alone():
            a = Activations(self._stack.slots, None).lay_out(batch, keep=True)
            run = Run(self.backend, self._parameters, a, batch, precision=self.precision)
            self._stack.forward(run, tokens)
        return Trace(self._stack, run)

    def loss(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        targets: ArrayLike | Sequence[Sequence[int]] | Objective,
        keep: bool = True,
        count: float | None = None,
        dropout: Dropout | None = None,
    ) -> float:
        """Return the mean cross-entropy in nats per target; keep what `backward` needs.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions; or a list of B sequences of different
            lengths, each of which is computed as if it were alone
        targets : as idx, the token that follows each: already shifted; -1 is ignored. Of a model
            with num_labels (B,), the label of each sequence. Or another objective of the logits,
            see `gpt2c.model.objective`: it has a loss for each of the N tokens, and the mean is
            that of the live ones
        keep : False if no backward will follow, which takes one layer's memory instead of all, as
            with weights that are not fp32
        count : divide the sum of the losses by this number instead of the number of targets that
            are not ignored. The batches of one step that give the number of all their targets add
            up to the mean of all, however they are divided
        dropout : for training, with another seed in each step; None is without

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range, every target ignored and
            no count, a count that is not positive, dropout out of its range
        RuntimeError : another thread computes with this model
        MemoryError, OSError : the activations do not fit, or the threads cannot start
        """
        tokens = check_batch(self.config, idx)
        objective = self._objective(targets, tokens)
        if count is None:
            count = int(np.count_nonzero(objective.live))
            if not count:
                raise ValueError("targets are all -1 (ignored): they have no mean")
        elif not 1 / LARGEST_FLOAT <= number("count", count) <= LARGEST_FLOAT:
            raise ValueError(f"count must be positive and finite as a float32, got {count}")
        head, keep = self._stack.head, keep and bool(self.trained)
        dropout = check_dropout(dropout, tokens.ids.size)
        with self._owner.alone():
            run = self._start(tokens, keep, dropout)
            x = self._stack.forward(run, tokens.ids)
            if keep:
                self._d_head = self._head_memory()
                run.accumulate = False
                losses = head.learn(run, self._d_head, x, objective, 1 / count)
            else:
                losses = head.losses(run, x, objective)
            self._owner.note_loss()
            self._pending = _Pending(run, tokens.ids) if keep else None
            return float(losses.sum(dtype=np.float64) / count)

    def losses(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        targets: ArrayLike | Sequence[Sequence[int]],
        dropout: Dropout | None = None,
        keep: bool = True,
    ) -> Array | list[Array]:
        """Return the loss of each token, -log p in nats, and keep what `backward` needs.

        For objectives whose weights depend on the log-probabilities: `backward(weights=...)` then
        computes the logits a second time, so that those of a whole batch are never in memory.

        Parameters
        ----------
        idx, targets, dropout, keep : see `loss`

        Returns
        -------
        (B, T) float32, or a list of B arrays of the sequences' lengths; 0 where it is ignored

        Raises
        ------
        ValueError, RuntimeError, MemoryError, OSError : see `loss`, but every target may be ignored
        """
        self.config.require_language_head("losses of tokens")
        tokens = check_batch(self.config, idx)
        wanted = check_targets(self.config, targets, tokens)
        keep, dropout = keep and bool(self.trained), check_dropout(dropout, tokens.ids.size)
        with self._owner.alone():
            run = self._start(tokens, keep, dropout)
            x = self._stack.forward(run, tokens.ids)
            losses = self._stack.head.losses(run, x, CrossEntropy(wanted)).copy()
            self._owner.note_loss()
            self._pending = _Pending(run, tokens.ids, tokens.shapes, wanted) if keep else None
        if tokens.offsets is None:
            return losses.reshape(tokens.ids.shape)
        return np.split(losses, tokens.offsets[1:-1])

    def hidden(self, idx: ArrayLike | Sequence[Sequence[int]]) -> Array:
        """Return the last norm's output (N, C) for each of N tokens, sequence after sequence.

        It is all of a forward pass but the head: `logits` turns rows of it into logits, a block at
        a time, because those of a whole batch may not fit.

        Parameters
        ----------
        idx : see `loss`

        Raises
        ------
        ValueError, RuntimeError, MemoryError, OSError : see `loss`

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257)
        >>> model = gpt2c.GPT2(config)
        >>> hidden = model.hidden([[1, 2, 3], [1, 4]])
        >>> hidden.shape, model.logits(hidden[2:]).shape
        ((5, 32), (3, 257))
        """
        tokens = check_batch(self.config, idx)
        size = {"states": 4 * tokens.ids.size * self.config.n_embd}
        require("the last states", size, "take fewer or shorter rows")
        with self._owner.alone():
            run = self._start(tokens, keep=False)
            return self._stack.forward(run, tokens.ids).copy()

    def logits(self, hidden: Array) -> Array:
        """Return the logits (n, V) of rows (n, C) of `hidden`, of a model with num_labels scores.

        Raises
        ------
        ValueError : another shape or dtype
        MemoryError : the logits do not fit
        """
        C, head = self.config.n_embd, self._stack.head
        is_array = isinstance(hidden, np.ndarray) and hidden.dtype == np.float32
        if not is_array or hidden.shape != (len(hidden), C) or not len(hidden):
            raise ValueError(f"hidden must be float32 (n, {C}), got {hidden!r:.50}")
        require("the logits", {"logits": 4 * len(hidden) * head.V}, "take fewer rows")
        out = np.empty((len(hidden), head.V), np.float32)
        batch = Batch(1, len(hidden))
        run = Run(self.backend, self._parameters, {}, batch, precision=self.precision)
        head.forward(run, out, np.ascontiguousarray(hidden))
        return out

    @overload
    def scores(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        *,
        keep: bool = True,
        dropout: Dropout | None = None,
    ) -> Array: ...

    @overload
    def scores(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        per_token: bool,
        keep: bool = True,
        dropout: Dropout | None = None,
    ) -> Array | list[Array]: ...

    def scores(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        per_token: bool = False,
        keep: bool = True,
        dropout: Dropout | None = None,
    ) -> Array | list[Array]:
        """Return the scores of each sequence, and keep what `backward` needs.

        For a model with num_labels, K: a classifier, a reward model (K = 1), or a value of each
        token (K = 1, per_token). The caller computes a loss of the scores, and
        `backward(d_scores=...)` takes its gradient.

        Parameters
        ----------
        idx : see `loss`
        per_token : True returns the scores at every token, not only at the last
        keep : False if no backward will follow, see `loss`
        dropout : see `loss`

        Returns
        -------
        (B, K) float32, those of the last token of each sequence; with per_token (B, T, K), or a
        list of B arrays (T, K) if the sequences have different lengths

        Raises
        ------
        ValueError : see `loss`; the model has no scores
        RuntimeError, MemoryError, OSError : see `loss`

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257, num_labels=1)
        >>> model = gpt2c.GPT2(config)
        >>> chosen, rejected = model.scores([[1, 2, 3], [1, 4]])  # a reward for each text
        >>> slope = -1 / (1 + np.exp(chosen - rejected))  # of -log sigmoid(chosen - rejected)
        >>> model.backward(d_scores=[slope, -slope])
        """
        K = self._stack.head.V
        if self.config.num_labels is None:
            raise ValueError(
                "this model has logits of tokens, not scores of texts: scores need a config with"
                " num_labels"
            )
        tokens = check_batch(self.config, idx)
        last = tokens.last
        rows = np.arange(tokens.ids.size) if per_token else last
        each = tokens.shapes if per_token else [last.shape]
        shapes = [(*shape, K) for shape in each]
        what, mend = f"scores of {counted(len(rows), 'token')}", "take fewer or shorter rows"
        require(what, {"scores": 4 * len(rows) * K}, mend)
        keep, dropout = keep and bool(self.trained), check_dropout(dropout, tokens.ids.size)
        with self._owner.alone():
            run = self._start(tokens, keep, dropout)
            x = self._stack.forward(run, tokens.ids)
            scores = np.empty((len(rows), K), x.dtype)
            self._stack.head.forward(run, scores, x[rows])
            self._owner.note_loss()
            self._pending = _Pending(run, tokens.ids, shapes, rows=rows) if keep else None
        if len(shapes) == 1:
            return scores.reshape(shapes[0])
        return np.split(scores, last[:-1] + 1)

    def _objective(
        self, targets: ArrayLike | Sequence[Sequence[int]] | Objective, tokens: Tokens
    ) -> Objective:
        """Return the objective that targets, or labels, stand for."""
        # to ask for a Protocol takes 40 microseconds, so arrays and lists come first
        if isinstance(targets, np.ndarray | list | tuple) or not isinstance(targets, Objective):
            if self.config.num_labels is None:
                return CrossEntropy(check_targets(self.config, targets, tokens))
            return CrossEntropy(check_labels(self.config.num_labels, targets, tokens))
        live = targets.live
        if getattr(live, "dtype", None) != np.bool_ or live.shape != (tokens.ids.size,):
            raise ValueError(
                f"an objective's live must be bool ({tokens.ids.size},), one for each token of idx,"
                f" got {live!r:.50}"
            )
        return targets

    def _slots(self, batch: Batch) -> Iterable[Slot]:
        yield from self._stack.slots(batch)
        yield from self._stack.head.slots(batch)

    def _start(self, tokens: Tokens, keep: bool, dropout: Dropout = NO_DROPOUT) -> Run:
        """Lay out the activations of a batch; with `keep`, those of backward stay."""
        self._pending = None  # its views go first, so that memory which must grow is let go
        batch = Batch(*tokens.ids.shape)
        a = self._memory.lay_out(batch, keep)
        run = Run(
            *(self.backend, self._placed.own, a, batch, tokens.offsets),
            dropout=dropout,
            precision=self.precision,
        )
        run.arrive = self._arrive
        return run

    def _head_memory(self) -> Array | None:
        """Return memory for the head's gradient: its own where that is void; None if frozen."""
        own = self._grads.own.get(self._stack.head.weight)
        return own if self._void or own is None else self._spare(own)

    def _spare(self, own: Array) -> Array:
        """Return memory for the head's gradient beside its own, which must not be touched."""
        if self._spare_memory.size != own.size:
            self._spare_memory = aligned_zeros(own.size)
        return self._spare_memory.reshape(own.shape)

    # ---- backward --------------------------------------------------------------------------------

    def _check_can_train(self) -> None:
        if self.weights != "fp32" and self.config.lora is None:
            raise ValueError(
                f"a model with {self.weights} weights has no gradients: give it adapters with"
                " add_lora, or load it without quantize to train it"
            )

    @property
    def _grads(self) -> _Gradients:
        if self._made_grads is None:
            self._check_can_train()
            what = f"training a model of {self.config.num_parameters():,} parameters"
            sizes = {"gradients": 4 * self.trained_size}
            require(what, sizes, "take a smaller one, or freeze some of it")
            shapes = {name: self._placed.own[name].shape for name in self.trained}
            self._made_grads = _Gradients(shapes)
        return self._made_grads

    @property
    def gradients(self) -> Mapping[str, Array]:
        """Name -> float32 view into `flat_gradients`."""
        self._settle()
        return self._grads.public

    @property
    def flat_gradients(self) -> Array:
        """All gradients, laid out as `flat_parameters` up to `trained_size`."""
        self._settle()
        return self._grads.flat[:]

    @property
    def trained_slices(self) -> dict[str, slice]:
        """Name -> its place in `flat_gradients`, up to where the next begins."""
        starts = aligned_offsets({name: self._placed.own[name].shape for name in self.trained})
        names, places = [*starts], [*starts.values()]
        return {name: slice(*ends) for name, *ends in zip(names, places, places[1:], strict=False)}

    @property
    def final_order(self) -> Sequence[tuple[str, ...]]:
        """The parameters whose gradients `backward` finishes together, in its order."""
        return self._stack.final_order

    def zero_grad(self) -> None:
        """Mark all gradients as zero.

        `gradients` shows zeros; the next backward overwrites the memory instead of adding to it.
        Views taken earlier may hold old numbers until then.
        """
        self._void = True

    def _settle(self) -> None:
        """Write zeros to the memory of void gradients."""
        if self._void:
            own = self._grads.own.get(self._stack.head.weight)
            if self._pending is not None and own is not None and self._d_head is own:
                self._d_head = self._spare(own)
                np.copyto(self._d_head, own)
            self._grads.flat.fill(0.0)
            self._void = False

    def backward(
        self,
        scale: float = 1.0,
        weights: ArrayLike | Sequence[ArrayLike] | None = None,
        d_scores: ArrayLike | Sequence[ArrayLike] | None = None,
        final: Callable[[Iterable[str]], None] | None = None,
    ) -> None:
        """Add the gradient of `scale` times the last loss to `gradients`.

        To average over n batches before a step of the optimizer, give each scale=1/n.

        Parameters
        ----------
        scale : a factor of the gradient
        weights : after `losses`: numbers of its result's shape; the gradient is that of
            scale * sum(weights * losses). None: all 1
        d_scores : after `scores`: numbers of its result's shape, the gradient of the caller's loss;
            the gradient is that of scale * sum(d_scores * scores)
        final : is called on the way with the names of parameters whose gradients this call will not
            touch again, the last layer's first, so that others can have them while it goes on

        Raises
        ------
        ValueError : no loss was computed since the last backward, the scale, a weight or a d_score
            is not finite, weights without `losses`, d_scores without `scores`, or the model's own
            weights are not fp32
        RuntimeError : another thread computes with this model, or has computed the last loss
        MemoryError, OSError : a kernel cannot start
        """
        self._check_can_train()
        if not abs(number("scale", scale)) <= LARGEST_FLOAT:
            raise ValueError(f"scale must be finite as a float32, got {scale}")
        with self._owner.alone():
            if self._pending is None:
                raise ValueError(
                    "backward needs a loss: call loss(idx, targets) before each backward(), and"
                    " after freeze()"
                )
            self._owner.check_loss()
            pending = self._pending
            head = self._stack.head
            factors = pending.check_weights(weights)
            d_logits = pending.check_d_scores(d_scores, scale)
            run, self._pending = pending.run, None
            run.p = self._parameters  # whole, if a step has updated them since the loss
            run.g, run.accumulate, run.final = self._grads.own, not self._void, final
            self._void = False
            d_out = run.a["ln_f"]  # the head turns its input into its gradient
            d_weight = run.g.get(head.weight)
            if pending.targets is not None:
                head.learn(run, d_weight, d_out, CrossEntropy(pending.targets, factors), scale)
            elif d_logits is not None and pending.rows is not None:
                head.backward(run, d_weight, d_out, np.float32(scale) * d_logits, pending.rows)
            else:
                self._add_head(run, scale)
            if not run.accumulate:  # ops add to those of norms
                self._grads.flat[self.decay_size :].fill(0.0)
            self._stack.backward(run, d_out, pending.tokens, self._memory.kept)

    def _add_head(self, run: Run, scale: float) -> None:
        """Bring in the gradients that `loss` has computed, of the head and its input."""
        d_head, d_out = self._d_head, run.a["ln_f"]
        if scale != 1.0:
            np.multiply(d_out, np.float32(scale), out=d_out)
        if d_head is None:
            return
        own = run.g[self._stack.head.weight]
        if scale != 1.0:
            np.multiply(d_head, np.float32(scale), out=d_head)
        if run.accumulate:
            self.backend.residual_forward(own, own, d_head)
        elif d_head is not own:
            np.copyto(own, d_head)


def first_values(config: ModelConfig, seed: int, names: Collection[str]) -> dict[str, Array]:
    """Return the values that a new model of this seed has in some parameters: name -> array."""
    described, values = config.stack().parameters(), dict[str, Array]()
    streams, left = Streams(seed), set(names)
    for name, one in described.items():
        if left and (is_adapter(name) or any(not is_adapter(other) for other in left)):
            value = np.empty(one.shape, np.float32)
            draw(one, streams.of(name), value)  # also those not wanted, which come before others
            if name in left:
                values[name] = value
                left.remove(name)
    return values


class Streams:
    """The random numbers of a seed: adapters have their own, whatever model they are for."""

    def __init__(self, seed: int) -> None:
        self._model, self._adapters = np.random.default_rng(seed), np.random.default_rng([seed, 1])

    def of(self, name: str) -> np.random.Generator:
        """Return those of a parameter."""
        return self._adapters if is_adapter(name) else self._model


def draw(one: Parameter, rng: np.random.Generator, value: Array) -> None:
    """Write the first values of a parameter."""
    if one.std:
        rng.standard_normal(out=value, dtype=np.float32)
        value *= one.std
        value /= one.shrink
    elif one.bound:
        rng.random(out=value, dtype=np.float32)
        value *= 2 * one.bound
        value -= one.bound
    else:
        value.fill(one.fill)
