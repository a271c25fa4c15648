"""Log-probabilities by hand, from logits; models and questions to ask for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c import GPT2, GPT2Config
from gpt2c.model.language_model import LanguageModel

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3)
GOOD = {"ctx": "a cat", "endings": ["sat", " ran away", "barked"], "label": 0}


def random_model(config: GPT2Config = CONFIG, backend: str = "auto", kind: str = "fp32") -> Any:
    """Return a model with clear preferences: large weights, random biases and layernorms too."""
    model = GPT2(config, seed=None, backend=backend)
    rng = np.random.default_rng(7)
    for name, parameter in model.parameters.items():
        scale = 0.3 if parameter.ndim == 2 else 0.2
        parameter[...] = ("ln_" in name and "weight" in name) + scale * rng.standard_normal(
            parameter.shape
        )
    return model if kind == "fp32" else model.quantize(kind)


def distribution(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probabilities (T, V) of each token's successor, in float64."""
    logits = model(np.asarray(tokens)[None])[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def by_hand(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probability of each token but the first, from logits."""
    return distribution(model, tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]


def slide(model: LanguageModel, tokens: np.ndarray, stride: int, max_length: int) -> np.ndarray:
    """Return each token's log-probability, or nan, by a window that slides as in the guide.

    The guide is Hugging Face's, "Perplexity of fixed-length models".
    """
    out = np.full(len(tokens), np.nan)
    before = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        window, wanted = tokens[begin:end], end - before
        labels = np.where(np.arange(len(window)) < len(window) - wanted, -100, window)
        if len(window) > 1:
            logprobs = by_hand(model, window)
            kept = np.flatnonzero(labels[1:] != -100)
            out[begin + 1 + kept] = logprobs[kept]
        before = end
        if end == len(tokens):
            break
    return out


def uniform(config: GPT2Config = CONFIG) -> GPT2:
    """Return a model of zeros: all tokens are equally likely."""
    return GPT2(config, seed=None)


def write_lines(path: Path, *rows: dict[str, Any] | str) -> Path:
    """Write a JSONL file."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes("\n".join(texts).encode())
    return path
