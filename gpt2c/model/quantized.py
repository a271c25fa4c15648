"""QuantizedModel: a model for inference only, whose weights take 8 or 16 bits each.

Memory bandwidth limits inference, so a quarter of the bytes can make it four times as fast. int8
rounds each row of a matrix to 255 steps between plus and minus its largest weight; fp16 keeps 11
bits of each weight. `gpt2c.kernels.reference` defines what the layers compute with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.backend import Backend, as_backend, same_backend
from gpt2c.kernels.memory import Array, aligned_zeros, require
from gpt2c.kernels.reference.linear import LONGEST, MIDDLE, TINY
from gpt2c.model.config import ModelConfig
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.parameters import Tensor, converted_bytes

__all__ = ["DTYPES", "QuantizedModel", "round_rows", "shapes_of"]

STEPS = 127  # steps from 0 to a row's largest weight, and as many below 0
ROWS = 1024  # rows rounded at a time, so that the temporary arrays stay small
DTYPES = {"int8": np.uint8, "fp16": np.float16}


class QuantizedModel(LanguageModel):
    """A GPT-2 for inference only, whose wte and Linear weights are int8 or fp16.

    Parameters
    ----------
    config : its shape
    method : "int8" or "fp16"
    backend, threads : see `gpt2c.GPT2`

    Attributes
    ----------
    parameters : name -> array. With "int8" a weight "x.weight" is uint8, an integer plus 128, and
        "x.scale" holds a float32 factor for each of its rows; with "fp16" weights are float16.
        Vectors and wpe stay float32

    Raises
    ------
    ValueError : an unknown method or backend; int8 with more than 65536 channels; num_labels
    MemoryError : the weights do not fit

    Copies and pickles work as those of a `gpt2c.GPT2`.
    """

    def __init__(
        self,
        config: ModelConfig,
        method: str,
        backend: str | Backend = "auto",
        threads: int | None = None,
    ) -> None:
        super().__init__(config, as_backend(backend, threads))
        config.require_language_head("a model with int8 or fp16 weights")
        if method not in DTYPES:
            raise ValueError(f"quantize must be one of {', '.join(DTYPES)}, got {method!r}")
        shapes = [one.shape for one in config.stack().parameters().values() if one.small]
        longest = max(columns for _, columns in shapes)
        if method == "int8" and longest > LONGEST:
            raise ValueError(f"int8 weights have at most {LONGEST} channels, got {longest}")
        self.method = method
        self._weights = (method,)
        self.parameters = _lay_out(config, method)

    @classmethod
    def from_model(cls, model: LanguageModel, method: str) -> Self:
        """Return a quantized copy of a `GPT2`, which stays unchanged.

        Raises
        ------
        ValueError : an unknown method, a quantized model, or a weight that is not finite or beyond
            fp16's range
        MemoryError : the weights do not fit
        """
        if isinstance(model, QuantizedModel):
            raise ValueError(f"the model already has {model.method} weights: start from a GPT2")
        quantized = cls(model.config, method, model.backend)
        quantized.round(model.parameters, "the model")
        return quantized

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or pickle."""
        return {
            "config": self.config,
            "method": self.method,
            "backend": (self.backend.name, self.backend.threads),
            "parameters": dict(self.parameters),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up the model from a state, in memory of its own."""
        backend = same_backend(*state["backend"])
        QuantizedModel.__init__(self, state["config"], state["method"], backend)
        for name, parameter in self.parameters.items():
            parameter[...] = state["parameters"][name]

    def round(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Round tensors, whose names and shapes fit, into the parameters; errors name `source`."""
        require(
            "rounding the weights", converted_bytes(tensors), "close programs that use much memory"
        )
        for name in tensors:
            self._round_one(name, np.asarray(tensors[name]), source)

    def _round_one(self, name: str, tensor: Array, source: str) -> None:
        if not np.isfinite(tensor).all():
            bits = 8 * np.dtype(DTYPES[self.method]).itemsize
            raise ValueError(
                f"{source}: {name} holds nan or infinity; only finite weights can be rounded to"
                f" {bits} bits"
            )
        parameter = self.parameters[name]
        if parameter.dtype == np.uint8:
            scale = self.parameters[name.removesuffix("weight") + "scale"]
            round_rows(parameter, scale, tensor)
        else:
            with np.errstate(over="ignore"):
                parameter[...] = tensor
            if not np.isfinite(parameter).all():
                raise ValueError(f"{source}: {name} holds numbers beyond fp16's range, 65504")

    def take(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy quantized tensors, whose names and shapes fit; errors name `source`."""
        for name, parameter in self.parameters.items():
            if tensors[name].dtype != parameter.dtype:
                raise ValueError(
                    f"{source}: {name} must be {parameter.dtype}, got {tensors[name].dtype}"
                )
            parameter[...] = np.asarray(tensors[name])
            if parameter.dtype != np.uint8 and not np.isfinite(parameter).all():
                raise ValueError(f"{source}: {name} holds nan or infinity")

    def loss(self, idx: ArrayLike, targets: ArrayLike, keep: bool = False) -> float:
        """Return the mean loss in nats per token.

        Raises
        ------
        ValueError : see `LanguageModel.mean_loss`; keep=True, as there is no `backward`
        """
        if keep:
            self.backward()
        return self.mean_loss(idx, targets)

    def backward(self, scale: float = 1.0) -> None:
        """Refuse: rounded weights have no gradients.

        Raises
        ------
        ValueError : always
        """
        raise ValueError(
            f"a model with {self.method} weights has no gradients: load it without quantize to"
            " train it"
        )


def round_rows(weight: NDArray[np.uint8], scale: Array, tensor: NDArray[np.floating[Any]]) -> None:
    """Write weight (OC, C) and scale (OC,): scale * (weight - 128) approximates tensor (OC, C).

    A row's largest magnitude becomes 127 steps, and 0 stays 0. If it is at most TINY, all become 0.
    """
    for start in range(0, len(tensor), ROWS):
        rows = slice(start, start + ROWS)
        largest = np.abs(tensor[rows]).max(axis=1)
        scale[rows] = np.where(largest > TINY, largest, 0) / np.float32(STEPS)
        steps = np.where(scale[rows] > 0, scale[rows], np.float32(1))[:, None]
        weight[rows] = np.rint(tensor[rows] / steps) + MIDDLE


def _layout(config: ModelConfig, method: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return name -> (shape, dtype) of the parameters."""
    wanted: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name, one in config.stack().parameters().items():
        wanted[name] = (one.shape, np.dtype(DTYPES[method] if one.small else np.float32))
        if one.small and method == "int8":
            wanted[name.removesuffix("weight") + "scale"] = (one.shape[:1], np.dtype(np.float32))
    return wanted


def _lay_out(config: ModelConfig, method: str) -> dict[str, NDArray[Any]]:
    """Return zeroed parameters in one block, for huge pages; each starts on a cache line."""
    wanted = _layout(config, method)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in wanted.items()}
    lines = {name: -(-size // 64) * 64 for name, size in sizes.items()}
    weights = {"weights": sum(lines.values())}
    mend = "take a smaller one" + (', or quantize="int8"' if method != "int8" else "")
    require(f"a model of {config.num_parameters():,} parameters", weights, mend)
    memory = aligned_zeros(sum(lines.values()) // 4).view(np.uint8)
    parameters, start = {}, 0
    for name, (shape, dtype) in wanted.items():
        parameters[name] = memory[start : start + sizes[name]].view(dtype).reshape(shape)
        start += lines[name]
    return parameters


def shapes_of(config: ModelConfig, method: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a quantized model's parameters."""
    return {name: shape for name, (shape, _) in _layout(config, method).items()}
