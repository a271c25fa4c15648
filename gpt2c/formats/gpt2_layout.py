"""GPT-2's files: memory has their names, but four matrices are transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2c.files.tensors import AnyTensor, StoredTensor
from gpt2c.formats.layout import Layout
from gpt2c.model.parameters import Tensor

__all__ = ["GPT2", "TRANSPOSED"]

# Hugging Face's Conv1D stores these as (C, OC); memory has llm.c's (OC, C).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SCORE = "score.weight"  # a classifier's head
# The causal mask that older versions of transformers saved with the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")


def read(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Return a file's tensors as memory has them."""
    return {name: _transpose(name, tensor) for name, tensor in stored.items()}


def write(tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Return parameters as a file has them."""
    base = "transformer." if SCORE in tensors else ""  # transformers 4 wants it beside a head
    return {
        name if name == SCORE else base + name: _transpose(name, tensor)
        for name, tensor in tensors.items()
    }


def _transpose(name: str, tensor: Any) -> Any:
    """Return a Linear weight's transposed view, (OC, C) <-> (C, OC), and other tensors as given."""
    return tensor.T if name.endswith(TRANSPOSED) else tensor


GPT2 = Layout("transformer.", BUFFERS, True, "wte.weight", "GPT2Model", read, write)
