"""First values: the random numbers that a seed gives to each parameter of a new model.

A block names the distribution of each of its parameters (`Parameter` in block.py).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from gpt2c.kernels.memory import Array
from gpt2c.model.block import Parameter
from gpt2c.model.config import ModelConfig
from gpt2c.model.lora import is_adapter

__all__ = ["Streams", "draw", "first_values"]


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
