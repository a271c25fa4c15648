"""Models on float64 numbers, and their gradients against central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpt2c.model.model import Model


def odd_model(config: Any, backend: Any = "numpy", **settings: Any) -> Model:
    """Return a model whose parameters are all random, also biases and norms' weights."""
    model, rng = Model(config, 1, backend, **settings), np.random.default_rng(1)
    for parameter in model.parameters.values():
        parameter += np.float32(0.1) * rng.standard_normal(parameter.shape, np.float32)
    return model


def exact(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Return a copy in float64: the same code, on wider numbers."""
    for module in ("model", "plan", "weights"):
        monkeypatch.setattr(f"gpt2c.model.{module}.aligned_zeros", np.zeros)
    wide = Model(model.config, None, "numpy")
    for name, parameter in wide.parameters.items():
        parameter[...] = model.parameters[name]
    assert wide.flat_parameters.dtype == wide.flat_gradients.dtype == np.float64
    return wide


def check_differences(model: Model, loss: Callable[[], float], rel: float = 1e-6) -> None:
    """Compare a float64 model's gradients with central differences of a loss.

    Each parameter moves along its own gradient. With a step of 1e-4 the differences' error is about
    1e-8 from curvature and 1e-12 from rounding.
    """
    for name, gradient in model.gradients.items():
        own, norm = model.parameters[name].copy(), float(np.linalg.norm(gradient))
        assert norm > 0, name
        losses = []
        for step in (1e-4, -1e-4):
            model.parameters[name][...] = own + step * gradient / norm
            losses.append(loss())
        model.parameters[name][...] = own
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(norm, rel=rel), name
