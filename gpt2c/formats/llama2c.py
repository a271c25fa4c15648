"""llama2.c's model file, in float32.

    version 0    a header of 7 int32, then the tensors; a negative vocab_size: output is written
    version 1    a header of 256 bytes: "ak42", the version, the 7 int32, a byte: output is wte

A tensor is that of all layers in turn. karpathy/llama2.c:export.py writes the file, and run.c reads
version 0, without its tables of rotary positions. The epsilon of norms and the base of rotary
positions are constants of run.c. Knows a model's shapes, computes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files import atomic, untrusted
from gpt2c.files.tensors import JoinedTensor, StoredTensor
from gpt2c.formats import llmc
from gpt2c.formats.rotary import FromAdjacent, to_adjacent
from gpt2c.kernels.memory import Array
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.parameters import Tensor
from gpt2c.model.rope import Rope

__all__ = ["is_llama2c", "read_model", "write_model"]

_MAGIC = b"24ka"  # 0x616b3432, "ak42", as a little-endian number
_HEADER_BYTES = (28, 256)  # of each version
_FIELDS = (  # of LlamaConfig, in the order of the header
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
)
_FIXED = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}  # constants of run.c
# The tensors of each version in their order, under export.py's names.
_ORDER = (
    (
        *("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"),
        *("norm", "freqs", "output"),
    ),
    (
        *("attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo"),
        *("w1", "w2", "w3", "output"),
    ),
)
_WHOLE = {"tok_embeddings": "wte.weight", "norm": "ln_f.weight", "output": "lm_head.weight"}
# A parameter of each layer -> tensors of the file whose rows follow each other in it.
_OF_LAYERS = {
    "ln_1.weight": ("attention_norm",),
    "attn.c_attn.weight": ("wq", "wk", "wv"),
    "attn.c_proj.weight": ("wo",),
    "ln_2.weight": ("ffn_norm",),
    "mlp.c_fc.weight": ("w1", "w3"),
    "mlp.c_proj.weight": ("w2",),
}
_TURNED = ("wq", "wk")  # their pairs are adjacent in the file
# run.c ends a text at token 1. Of Llama 2's 32,000 tokens that is the beginning of a text.
_LLAMA2_TOKENS, _BEGINNING = 32000, 1


def is_llama2c(path: Path) -> bool:
    """Return whether `read_model` handles a path: a .bin with the magic number or a likely header.

    Version 0 has no magic number: its 7 numbers must describe a Llama. `read_model` then refuses a
    file that has not exactly the length of that model.
    """
    if path.suffix != ".bin" or not path.is_file():
        return False
    header = untrusted.read_header(path, _HEADER_BYTES[1])[0]
    if header[:4] == _MAGIC:
        return True
    if len(header) < _HEADER_BYTES[0] or int.from_bytes(header[:4], "little") == llmc.MODEL_MAGIC:
        return False
    try:
        _config(header, 0)
    except ValueError:
        return False
    return True


def read_model(path: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Read a model .bin of version 0 or 1.

    Returns
    -------
    (config, tensors) : name -> float32 tensor of `LlamaConfig.parameter_shapes`; read-only views of
        the file, or joined from it when they are read. The file does not name the end of text: of
        32,000 tokens it is token 1, else config.eos_token_id is None

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : not such a file, or a damaged one; the message names the field and the wanted value
    """
    path = Path(path)
    header, size = untrusted.read_header(path, _HEADER_BYTES[1])
    version = int.from_bytes(header[4:8], "little") if header[:4] == _MAGIC else 0
    if header[:4] == _MAGIC and version != 1:
        what = "whose weights have 8 bits" if version == 2 else "which is unknown"
        raise ValueError(
            f"{path} is a llama2.c model of version {version}, {what}: export it with --version 0"
        )
    start = _HEADER_BYTES[version]
    if len(header) < start:
        raise ValueError(f"{path} is truncated: it has {size} bytes, its header needs {start}")
    try:
        config = _config(header, version)
    except ValueError as error:
        raise ValueError(f"{path}: its header does not describe a Llama: {error}") from None
    shapes = _shapes(config, version)
    wanted = start + 4 * sum(map(math.prod, shapes.values()))
    if size != wanted:
        raise ValueError(
            f"{path} has {size} bytes; the llama2.c model of its header needs {wanted}"
        )
    flat = untrusted.map_file(path)[start:].view("<f4")
    stored, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape)
        stored[name] = flat[begin:end].reshape(shape)
    return config, dict(_named(path, config, stored))


def _config(header: bytes, version: int) -> LlamaConfig:
    """Return the config of a header that is long enough; see `LlamaConfig` for errors."""
    numbers = np.frombuffer(header, "<i4", len(_FIELDS), 8 * version).tolist()
    entries: dict[str, Any] = dict(zip(_FIELDS, numbers, strict=True)) | _FIXED
    V = entries["vocab_size"]
    if version == 0:
        tied, V = V > 0, abs(V)
    elif (tied := header[36]) > 1:
        raise ValueError(f"the byte that says whether output is the embedding's table is {tied}")
    eos = _BEGINNING if V == _LLAMA2_TOKENS else None
    return LlamaConfig(
        **entries | {"vocab_size": V, "tie_word_embeddings": bool(tied), "eos_token_id": eos}
    )


def _shapes(config: LlamaConfig, version: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in the file, in its order."""
    C, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.n_layer
    W = config.KV * config.HS
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("tok_embeddings", "output"), (V, C)),
        **dict.fromkeys(("attention_norm", "ffn_norm"), (L, C)),
        **dict.fromkeys(("wq", "wo"), (L, C, C)),
        **dict.fromkeys(("wk", "wv"), (L, W, C)),
        **dict.fromkeys(("w1", "w3"), (L, F, C)),
        "w2": (L, C, F),
        "norm": (C,),
        "freqs": (config.max_position_embeddings, config.HS),  # cosines, then sines
    }
    tied = config.tie_word_embeddings
    return {name: shapes[name] for name in _ORDER[version] if name != "output" or not tied}


def _named(
    path: Path, config: LlamaConfig, stored: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name -> tensor, from the tensors of the file."""
    for name, own in _WHOLE.items():
        if name in stored:
            yield own, stored[name]
    for layer in range(config.n_layer):
        for own, names in _OF_LAYERS.items():
            found = {name: stored[name][layer] for name in names}
            if len(names) == 1:
                yield f"h.{layer}.{own}", found[names[0]]
            else:
                parts = tuple(
                    FromAdjacent(array, config.HS)
                    if name in _TURNED
                    else StoredTensor(path, name, "F32", array)
                    for name, array in found.items()
                )
                yield f"h.{layer}.{own}", JoinedTensor(parts)


def write_model(path: Path, config: LlamaConfig, tensors: Mapping[str, Array]) -> None:
    """Write a model .bin of version 0, which run.c reads.

    Parameters
    ----------
    path : the file
    config : of the model
    tensors : name -> float32 array, names and shapes of `LlamaConfig.parameter_shapes`

    Raises
    ------
    ValueError : run.c cannot compute such a model
    OSError : the file cannot be written; an existing file is unchanged
    """
    _check(path, config)
    V = config.vocab_size if config.tie_word_embeddings else -config.vocab_size
    KV = config.KV
    entries = dataclasses.asdict(config) | {"vocab_size": V, "num_key_value_heads": KV}
    header = np.array([entries[name] for name in _FIELDS], "<i4")
    with atomic.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        for name in _shapes(config, 0):
            for array in _parts(config, tensors, name):
                file.write(np.ascontiguousarray(array, "<f4").data)


def _check(path: Path, config: LlamaConfig) -> None:
    """Refuse a model with a field that the file does not hold and run.c computes otherwise."""
    fixed = _FIXED | {"head_dim": config.hidden_size / config.num_attention_heads}
    others = {*_FIELDS, "tie_word_embeddings", "initializer_range", "eos_token_id", "bos_token_id"}
    for field in dataclasses.fields(config):
        value = config.HS if field.name == "head_dim" else getattr(config, field.name)
        wanted = fixed.get(field.name, field.default)
        if field.name not in others and value != wanted:
            raise ValueError(
                f"{path}: llama2.c's models have {field.name} {wanted:g}, this one has {value}"
                if isinstance(wanted, float)
                else f"{path}: llama2.c's models have no {field.name}, this one has {value!r:.70}"
            )


def _parts(config: LlamaConfig, tensors: Mapping[str, Array], name: str) -> Iterator[Array]:
    """Yield the numbers of one tensor of the file, an array at a time."""
    if name in _WHOLE:
        yield tensors[_WHOLE[name]]
    elif name == "freqs":
        P = config.max_position_embeddings
        yield from Rope(P, config.HS, config.rope_theta).tables(P)
    else:
        own, names = next(item for item in _OF_LAYERS.items() if name in item[1])
        ends = np.cumsum([_shapes(config, 0)[one][1] for one in names]).tolist()
        place = names.index(name)
        rows = slice([0, *ends][place], ends[place])
        for layer in range(config.n_layer):
            array = tensors[f"h.{layer}.{own}"][rows]
            yield to_adjacent(array, config.HS) if name in _TURNED else array
