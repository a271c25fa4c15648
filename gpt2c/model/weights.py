"""A model's weights: their place in memory, their first values, and every change but learning.

They lie in one flat buffer with named views: what decays comes first, then the rest of what is
trained, then what is frozen. freeze, unfreeze and add_lora lay them out again. Weights of other
types, files' tensors, copies and pickles come in here, too.

Knows nothing about losses and gradients, except whether a model can be trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.backend import Backend, as_backend, same_backend
from gpt2c.kernels.checks import whole
from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, require
from gpt2c.model.config import ModelConfig
from gpt2c.model.first_values import Streams, draw, first_values
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.lora import TARGETS, LoRA
from gpt2c.model.owner import Owner
from gpt2c.model.parameters import Tensor, check_shapes, converted_bytes, names_that_fit
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

__all__ = ["ModelWeights"]

SMALLER = {  # the advice where a model of these weights does not fit
    "fp32": 'take a smaller one or, to read it, quantize="int8" (--quantize int8), a quarter of it',
    "fp16": 'take a smaller one, or quantize="int8"',
    "int8": "take a smaller one",
}


class _Placed(NamedTuple):
    """The parameters' memory.

    Attributes
    ----------
    flat, shown : all of it; and what `flat_parameters` shows of it
    own, public : views by name, whose shapes C trusts; and views for others
    """

    flat: Array
    shown: Array
    own: dict[str, NDArray[Any]]
    public: Mapping[str, NDArray[Any]]


class ModelWeights(LanguageModel):
    """A model that owns its weights. `Model` is one that learns, too: see there.

    It has one owner at a time, the thread that computes or moves the weights (`gpt2c.model.owner`).
    """

    trained: tuple[str, ...]
    trained_size: int
    decay_size: int
    _stack: Stack
    _placed: _Placed
    _arrive: Callable[[Iterable[str]], None] | None = None
    _frozen: frozenset[str]

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
        self.__dict__.update(self._laid_out(config, frozen, values))  # at once

    def _laid_out(
        self,
        config: ModelConfig,
        frozen: frozenset[str],
        values: Mapping[str, NDArray[Any]] | None,
    ) -> dict[str, Any]:
        """Return the attributes that `_lay_out` sets, name -> value; a subclass adds its own."""
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
        if self.weights == "fp32":
            shown = flat
        else:  # bytes of several types, but what is trained is of floats and comes first
            shown = flat[: offsets[len(trained)]] if trained else flat.view(np.uint8)
        return {
            "config": config,
            "_placed": _Placed(flat, shown, own, MappingProxyType(typed_views(flat, layout))),
            "trained": trained,
            "trained_size": offsets[len(trained)],
            "decay_size": offsets[len(groups[0])],
            "_stack": stack,
            "_frozen": frozen,
        }

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

    @flat_parameters.setter
    def flat_parameters(self, array: Array) -> None:  # for `model.flat_parameters *= 2`
        if array is not self._placed.shown:
            raise ValueError("a model keeps its memory: write flat_parameters[...] = numbers")

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

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> model.freeze("h.*")
        >>> model.trained
        ('wte.weight', 'wpe.weight', 'ln_f.weight', 'ln_f.bias')
        >>> model.unfreeze()
        >>> len(model.trained) == len(model.parameters)
        True
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
        lora = LoRA(r, alpha, targets, use_rslora)  # type: ignore[arg-type]
        config: ModelConfig = dataclasses.replace(self.config, lora=lora)  # type: ignore[type-var]
        new = config.parameter_shapes().keys() - self._parameters.keys()
        self._move(config, config.frozen(), first_values(config, seed, new))

    def merge(self) -> Self:
        """Return a model without adapters that computes the same: its weights are W + s B A.

        Weights of 16 or 8 bits become float32. This model stays as it is.

        Raises
        ------
        ValueError : the model has no adapters
        RuntimeError : another thread computes with this model
        MemoryError : the weights do not fit

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> model.add_lora(r=4)
        >>> merged = model.merge()
        >>> len(merged.parameters) < len(model.parameters)
        True
        >>> bool(np.allclose(merged([[1, 2, 3]]), model([[1, 2, 3]]), atol=1e-5))
        True
        """
        if self.config.lora is None:
            raise ValueError("the model has no adapters to merge")
        with self._owner.alone():
            config: ModelConfig = dataclasses.replace(self.config, lora=None)  # type: ignore[type-var]
            model, own = self._blank(config, "fp32"), self._parameters
            for name, parameter in model._parameters.items():
                parameter[...] = restored(own, name)
            for linear in self._stack.linears():
                if linear.adapter is not None:
                    change = own[linear.adapter.up] @ own[linear.adapter.down]
                    change *= np.float32(linear.adapter.scale)
                    model._parameters[linear.weight] += change
        return model

    def _check_can_train(self) -> None:
        if self.weights != "fp32" and self.config.lora is None:
            raise ValueError(
                f"a model with {self.weights} weights has no gradients: give it adapters with"
                " add_lora, or load it without quantize to train it"
            )

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
        self._move(self.config, frozen, {})

    def _move(
        self, config: ModelConfig, frozen: frozenset[str], new: Mapping[str, NDArray[Any]]
    ) -> None:
        """Lay the parameters out again, with `new` ones; those of before stay until then."""
        with self._owner.alone():
            size = {"weights": 4 * self._flat.size}
            require("moving the parameters", size, "take a smaller model")
            self._lay_out(config, frozen, {**self._parameters, **new})

    def _blank(self, config: ModelConfig, weights: str) -> Self:
        """Return a model of this class and with its settings, whose weights are 0."""
        model = type(self).__new__(type(self))  # QuantizedGPT2's __init__ takes other arguments
        ModelWeights.__init__(
            *(model, config, None, self.backend, self.recompute),
            weights=weights,
            precision=self.precision,
        )
        return model

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

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257)
        >>> model, other = gpt2c.GPT2(config, seed=1), gpt2c.GPT2(config, seed=2)
        >>> other.load_parameters(model.parameters, "the first model")
        >>> bool((other([[1, 2, 3]]) == model([[1, 2, 3]])).all())
        True
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
        RuntimeError : another thread computes with this model
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
        with self._owner.alone():
            model = self._blank(self.config, weights)
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
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up the model from a state, in memory of its own."""
        backend = same_backend(*state["backend"])
        settings = {name: state[name] for name in ("recompute", "weights", "precision")}
        ModelWeights.__init__(self, state["config"], None, backend, **settings)
        if state["frozen"] != self._frozen:
            self._lay_out(self.config, state["frozen"])
        self._flat[...] = state["parameters"]
