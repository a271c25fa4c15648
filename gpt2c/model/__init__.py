"""Formulae: config, parameters, forward and backward, the reader.

Knows nothing of files, text and training.
"""

__all__ = [
    "attention",
    "block",
    "config",
    "embedding",
    "first_values",
    "gpt2",
    "head",
    "inputs",
    "language_model",
    "linear",
    "llama",
    "lora",
    "mlp",
    "model",
    "norm",
    "objective",
    "owner",
    "parameters",
    "plan",
    "quantized",
    "reader",
    "rope",
    "rope_scaling",
    "stack",
    "trace",
    "weights",
]
