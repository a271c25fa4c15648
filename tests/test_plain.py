"""GPT-2 in plain NumPy, and the models of every backend against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpt2c import GPT2, AdamW, GPT2Config, plain
from gpt2c.kernels.cases import normalised_error

CONFIG = GPT2Config(vocab_size=61, n_positions=19, n_embd=34, n_head=2, n_layer=3)
# The error of float32's sums through three layers and back, each some 1e-6 of the largest value.
RTOL = 2e-5


def given(rng: np.random.Generator) -> tuple[Any, Any]:
    idx, targets = rng.integers(0, CONFIG.vocab_size, (2, 4, 17))
    targets[rng.random(targets.shape) < 0.2] = -1
    return idx, targets


def model_and_parameters(backend: str) -> tuple[GPT2, plain.Arrays]:
    model = GPT2(CONFIG, seed=2, backend=backend)
    model.flat_parameters[...] += np.random.default_rng(3).normal(
        0, 0.05, model.flat_parameters.size
    )
    return model, {name: array.astype(np.float64) for name, array in model.parameters.items()}


def test_parameters_are_those_of_the_model() -> None:
    p = plain.init(61, 19, 34, 3, np.random.default_rng(0))
    assert {name: array.shape for name, array in p.items()} == CONFIG.parameter_shapes()


def test_gradients_are_those_of_the_loss(rng: np.random.Generator) -> None:
    p = {name: rng.normal(0, 0.3, a.shape) for name, a in plain.init(7, 5, 6, 2, rng).items()}
    idx, targets = np.array([[1, 2, 2, 6], [0, 3, 1, 5]]), np.array([[2, -1, 6, 0], [3, 3, -1, 4]])
    _, g = plain.loss_and_gradients(p, idx, targets, 2)
    assert g.keys() == p.keys()
    for name, gradient in g.items():
        direction = rng.standard_normal(gradient.shape)
        losses = [
            plain.loss_and_gradients(p | {name: p[name] + step * direction}, idx, targets, 2)[0]
            for step in (1e-6, -1e-6)
        ]
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum(), rel=1e-6, abs=1e-9), name


def test_model_is_plain_gpt2(backend_name: str, rng: np.random.Generator) -> None:
    model, p = model_and_parameters(backend_name)
    idx, targets = given(rng)
    assert normalised_error(model(idx), plain.forward(p, idx, 2)[0]) <= RTOL
    loss, g = plain.loss_and_gradients(p, idx, targets, 2)
    assert model.loss(idx, targets) == pytest.approx(loss, rel=1e-6)
    model.backward()
    for name, gradient in model.gradients.items():
        assert normalised_error(gradient, g[name]) <= RTOL, name


def test_adamw_is_plain_adamw(backend_name: str, rng: np.random.Generator) -> None:
    model, p = model_and_parameters(backend_name)
    optimizer = AdamW(model)
    m, v = ({name: np.zeros_like(array) for name, array in p.items()} for _ in range(2))
    for t in range(1, 4):
        for gradient in model.gradients.values():
            gradient[...] = rng.standard_normal(gradient.shape)
            # a step is about as long whatever the gradient: far from 0, float32 and float64 agree
            gradient[...] += np.sign(gradient)
        g = {name: gradient.astype(np.float64) for name, gradient in model.gradients.items()}
        optimizer.step(1e-2)
        plain.adamw(p, g, m, v, t, learning_rate=1e-2)
    for name, parameter in model.parameters.items():
        assert normalised_error(parameter, p[name]) <= 1e-6, name


def test_greedy_texts_are_the_same(backend_name: str) -> None:
    model, p = model_and_parameters(backend_name)
    written = model.generate([[5, 60, 1]], 12, temperature=0)[0].tolist()
    assert written == plain.generate(p, [5, 60, 1], 12, 2)


def test_plain_model_memorises_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    plain.main()
    *_, last, text = capsys.readouterr().out.splitlines()
    assert text == "A model reads what came before and guesses what comes next."
    assert float(last.split()[3]) < 0.01
