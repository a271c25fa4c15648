"""Llama's files: memory has GPT-2's names, and joins the matrices that read the same input.

q_proj, k_proj, v_proj     the rows of h.0.attn.c_attn, in this order
gate_proj, up_proj         the rows of h.0.mlp.c_fc, in this order
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from gpt2c.files.tensors import AnyTensor, JoinedTensor, StoredTensor
from gpt2c.files.untrusted import shown
from gpt2c.formats.layout import Layout
from gpt2c.model.parameters import Tensor

__all__ = ["LLAMA"]

NAMES = {
    "wte.weight": "embed_tokens.weight",
    "ln_f.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "score.weight": "score.weight",  # of a classifier
}
HEADS = ("lm_head.weight", "score.weight")  # names without prefix
LAYER = {  # of h.0 in memory -> of layers.0 in a file
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.c_fc.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}
QUERY, OUT = "self_attn.q_proj.weight", "self_attn.o_proj.weight"
PLACES = {part: (name, parts) for name, parts in LAYER.items() for part in parts}
# Older versions of transformers saved the frequencies with the weights.
BUFFERS = (".rotary_emb.inv_freq",)
IN_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(.+)")


def read(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Return a file's tensors as memory has them.

    Raises
    ------
    ValueError : an unknown tensor, or parts of a matrix that are missing or do not fit each other
    """
    ours = {theirs: own for own, theirs in NAMES.items()}
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in stored.items():
        found = IN_LAYER.fullmatch(theirs)
        if theirs in ours:
            tensors[ours[theirs]] = tensor
        elif found and found[2] in PLACES:
            number, (name, parts) = found[1], PLACES[found[2]]
            tensors[f"h.{number}.{name}"] = _join(stored, f"layers.{number}.", parts)
        else:
            raise ValueError(f"{tensor.path}: a Llama has no tensor {shown(theirs)}")
    return tensors


def _join(stored: Mapping[str, StoredTensor], layer: str, parts: tuple[str, ...]) -> Tensor:
    """Return the matrix of these parts.

    The rows of all parts are those that the config wants. So each part has its own rows if the last
    two have the same shape and q has a row for each column of o_proj.
    """
    source = next(stored[layer + part].path for part in parts if layer + part in stored)
    for part in parts:
        if layer + part not in stored:
            raise ValueError(f"{source}: tensor {layer + part} is missing")
    found = [stored[layer + part] for part in parts]
    if len(found) == 1:
        return found[0]
    shapes = [tensor.shape for tensor in found]
    fit = all(len(shape) == 2 and shape[1] == shapes[0][1] for shape in shapes)
    if parts[0] == QUERY and (out := stored.get(layer + OUT)) is not None:
        fit = fit and out.shape[1:] == shapes[0][:1]
    if not fit or shapes[-1] != shapes[-2]:
        raise ValueError(
            f"{source}: {layer}{', '.join(parts)} must fit each other, got"
            f" {', '.join(map(shown, shapes))}"
        )
    return JoinedTensor(tuple(found))


def write(tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Return parameters as a file has them."""
    stored: dict[str, AnyTensor] = {}
    for own, tensor in tensors.items():
        if own in NAMES:
            prefix = "" if own in HEADS else "model."
            stored[prefix + NAMES[own]] = tensor
            continue
        _, number, name = own.split(".", 2)
        parts, rows = LAYER[name], tensor.shape[0]
        firsts = [0]
        if parts[0] == QUERY:
            q = tensors[f"h.{number}.attn.c_proj.weight"].shape[1]
            firsts += [q, (q + rows) // 2]
        elif len(parts) == 2:
            firsts += [rows // 2]
        for part, first, end in zip(parts, firsts, [*firsts[1:], rows], strict=True):
            stored[f"model.layers.{number}.{part}"] = np.asarray(tensor)[first:end]
    return stored


LLAMA = Layout("model.", BUFFERS, False, "embed_tokens.weight", "LlamaModel", read, write)
