"""Log-probabilities by hand, from logits; and the models that they are asked of."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt2c import GPT2, GPT2Config, QuantizedGPT2
from gpt2c.model.language_model import LanguageModel

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3)


def random_model(config: GPT2Config = CONFIG, backend: str = "auto", kind: str = "fp32") -> Any:
    """Return a model that is sure of things: large weights, biases and layernorms random too."""
    model = GPT2(config, seed=None, backend=backend)
    rng = np.random.default_rng(7)
    for name, parameter in model.parameters.items():
        scale = 0.3 if parameter.ndim == 2 else 0.2
        parameter[...] = ("ln_" in name and "weight" in name) + scale * rng.standard_normal(
            parameter.shape
        )
    return model if kind == "fp32" else QuantizedGPT2.from_model(model, kind)


def distribution(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probabilities (T, V) of what follows each token, in float64."""
    logits = model(np.asarray(tokens)[None])[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def by_hand(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probability of each token but the first, from logits."""
    return distribution(model, tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]


def uniform(config: GPT2Config = CONFIG) -> GPT2:
    """Return a model without weights: every token is as likely."""
    return GPT2(config, seed=None)
