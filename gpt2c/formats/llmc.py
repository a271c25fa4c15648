"""llm.c's files: the model in fp32 or bf16, and the tokenizer. Pickles are refused here.

    model .bin              a header of 256 int32, then 16 tensors, each of all layers in turn
    gpt2_tokenizer.bin      a header of 256 int32, then each token: a byte of length and its bytes

karpathy/llm.c:train_gpt2.py writes both; train_gpt2.c and llmc/tokenizer.h read them. Token files
are in text/shards.py. Knows a model's shapes, computes nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files import atomic, untrusted
from gpt2c.files.tensors import from_bf16
from gpt2c.kernels.memory import Array
from gpt2c.model.gpt2 import GPT2Config

__all__ = [
    "DTYPES",
    "EXPORT",
    "MODEL_MAGIC",
    "PICKLES",
    "TOKENIZER_MAGIC",
    "is_llmc",
    "read_header",
    "read_model",
    "read_tokenizer",
    "round_bf16",
    "write_model",
    "write_tokenizer",
]

MODEL_MAGIC, TOKENIZER_MAGIC = 20240326, 20240328
DTYPES = {"fp32": 3, "bf16": 5}  # dtype -> version of the file; both versions pad the vocabulary
_HEADER_BYTES = 256 * 4
_PADDING = 128  # the file has a multiple of this many rows of wte
_FIELDS = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")  # header, from entry 2 on
# In the order of the file; * stands for each layer in turn.
_TENSORS = (
    "wte.weight",
    "wpe.weight",
    "h.*.ln_1.weight",
    "h.*.ln_1.bias",
    "h.*.attn.c_attn.weight",
    "h.*.attn.c_attn.bias",
    "h.*.attn.c_proj.weight",
    "h.*.attn.c_proj.bias",
    "h.*.ln_2.weight",
    "h.*.ln_2.bias",
    "h.*.mlp.c_fc.weight",
    "h.*.mlp.c_fc.bias",
    "h.*.mlp.c_proj.weight",
    "h.*.mlp.c_proj.bias",
    "ln_f.weight",
    "ln_f.bias",
)
# Constants of llm.c, in its files or in its formulae.
_GPT2_TOKENS, _EPSILON, _END_OF_TEXT = 50257, 1e-5, b"<|endoftext|>"

_MOST_TOKENS = 2**16  # a token is a uint16

PICKLES = (".pt", ".pth", ".ckpt", ".pkl")
# A program that exports nanoGPT's ckpt.pt, for users who trust the file. nanoGPT has Linear weights
# as (OC, C), Hugging Face as (C, OC); with bias=False nanoGPT has no biases.
EXPORT = """\
import json, pathlib, torch
from safetensors.torch import save_file

saved = torch.load("ckpt.pt", map_location="cpu")
args, tensors = saved["model_args"], {}
for name, tensor in saved["model"].items():
    name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
    if name == "lm_head.weight" or name.endswith(".attn.bias"):
        continue
    if name.endswith(".weight") and not name.startswith(("wte", "wpe")):
        tensors.setdefault(name[:-6] + "bias", torch.zeros(len(tensor)))
        tensor = tensor.T if tensor.ndim == 2 else tensor
    tensors[name] = tensor.contiguous()
pathlib.Path("model").mkdir(exist_ok=True)
save_file(tensors, "model/model.safetensors", {"format": "pt"})
config = {name: args[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
config |= {"model_type": "gpt2", "n_positions": args["block_size"]}
pathlib.Path("model/config.json").write_text(json.dumps(config))
"""


def is_llmc(path: Path) -> bool:
    """Return whether `read_model` handles a path: llm.c's file, or a pickle, which it refuses."""
    return path.suffix in (".bin", *PICKLES) and path.is_file()


def read_header(path: str | os.PathLike[str]) -> tuple[bytes, int]:
    """Return the first 1024 bytes of a file, or all of a shorter one, and its size.

    Raises
    ------
    OSError : the file is missing or cannot be read, or is a pipe or a device
    ValueError : it is a pickle, or a zip, as PyTorch saves pickles
    """
    path = Path(path)
    header, size = untrusted.read_header(path, _HEADER_BYTES)
    pickled = header[:1] == b"\x80" and header[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if path.suffix in PICKLES or header[:4] == b"PK\3\4" or pickled:
        raise ValueError(
            f"{path} is a pickle, like nanoGPT's ckpt.pt and PyTorch's other files, and gpt2c reads"
            " no pickle, for reading one can run code: load it with PyTorch and write"
            " model.safetensors (keys without _orig_mod., Linear weights transposed) and"
            " config.json, with the lines at the end of `gpt2c convert --help`"
        )
    return header, size


def _numbers(
    path: Path, header: bytes, magic: int, what: str, versions: tuple[int, ...]
) -> list[int]:
    """Return the header's 256 numbers; refuse another magic number or version."""
    if (found := int.from_bytes(header[:4], "little")) != magic:
        raise ValueError(f"{path} is not an llm.c {what}: it starts with {found}, not {magic}")
    if len(header) < _HEADER_BYTES:
        raise ValueError(f"{path} is truncated: it has {len(header)} bytes, its header needs 1024")
    numbers = [int(number) for number in np.frombuffer(header, "<i4")]
    if numbers[1] not in versions:
        wanted = " or ".join(map(str, versions))
        raise ValueError(f"{path} is a {what} of version {numbers[1]}; version {wanted} is wanted")
    return numbers


# ---- the model -----------------------------------------------------------------------------------


def read_model(path: str | os.PathLike[str]) -> tuple[GPT2Config, dict[str, NDArray[Any]]]:
    """Read a model .bin of version 3 (fp32) or 5 (bf16).

    Returns
    -------
    (config, tensors) : name -> float32 array of `GPT2Config.parameter_shapes`, wte without its
        padding rows; those of an fp32 file are read-only views of it. The file does not name the
        end of text: of 50257 tokens it is the last, else config.eos_token_id is None

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : not such a file, or a damaged one; the message names the field and the wanted value
    """
    path = Path(path)
    header, size = read_header(path)
    numbers = _numbers(path, header, MODEL_MAGIC, "model", tuple(DTYPES.values()))
    entries: dict[str, Any] = dict(zip(_FIELDS, numbers[2:], strict=False))
    V, rows = entries["vocab_size"], numbers[7]
    entries["eos_token_id"] = V - 1 if V == _GPT2_TOKENS else None
    try:
        config = GPT2Config(**entries)
    except ValueError as error:
        raise ValueError(f"{path}: its header does not describe a GPT-2: {error}") from None
    if rows < V:
        raise ValueError(f"{path}: padded_vocab_size is {rows}, less than its vocab_size, {V}")
    is_fp32 = numbers[1] == DTYPES["fp32"]
    wanted = _HEADER_BYTES + (4 if is_fp32 else 2) * _count(config, rows)
    if size != wanted:
        raise ValueError(f"{path} has {size} bytes; the model of its header needs {wanted}")
    flat = untrusted.map_file(path)[_HEADER_BYTES:].view("<f4" if is_fp32 else "<u2")
    tensors, start = {}, 0
    shapes = config.parameter_shapes()
    for name in _names(config.n_layer):
        shape = shapes[name] if name != "wte.weight" else (rows, config.n_embd)
        end = start + math.prod(shape)
        tensor = flat[start:end].reshape(shape)[: shapes[name][0]]
        if not is_fp32:
            tensor = from_bf16(tensor)
        tensors[name], start = tensor, end
    return config, tensors


def write_model(
    path: Path, config: GPT2Config, tensors: Mapping[str, Array], dtype: str = "fp32"
) -> None:
    """Write a model .bin. llm.c reads only the dtype that it was built for, on a CPU fp32.

    Parameters
    ----------
    path : the file
    config : of the model
    tensors : name -> float32 array, names and shapes of `GPT2Config.parameter_shapes`
    dtype : "fp32", or "bf16", rounded to nearest, ties to even, as in PyTorch

    Raises
    ------
    ValueError : llm.c cannot compute such a model, or the dtype is unknown
    OSError : the file cannot be written; an existing file is unchanged
    """
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of an llm.c model is {' or '.join(DTYPES)}, not {dtype}")
    if config.inner != 4 * config.n_embd:
        raise ValueError(
            f"{path}: llm.c's models have n_inner = 4 * n_embd = {4 * config.n_embd}, this one has"
            f" {config.inner}"
        )
    if config.layer_norm_epsilon != _EPSILON:
        raise ValueError(
            f"{path}: llm.c's models have layer_norm_epsilon {_EPSILON}, this one has"
            f" {config.layer_norm_epsilon}"
        )
    rows = -(-config.vocab_size // _PADDING) * _PADDING
    header = np.zeros(256, "<i4")
    sizes = [getattr(config, name) for name in _FIELDS]
    header[:8] = MODEL_MAGIC, DTYPES[dtype], *sizes, rows
    with atomic.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        for name in _names(config.n_layer):
            _write(file, tensors[name], dtype)
            if name == "wte.weight":
                padding = np.zeros((rows - config.vocab_size, config.n_embd), np.float32)
                _write(file, padding, dtype)


def _write(file: Any, tensor: Array, dtype: str) -> None:
    plain = np.ascontiguousarray(tensor, "<f4")
    file.write((plain if dtype == "fp32" else round_bf16(plain)).data)


def round_bf16(tensor: Array) -> NDArray[np.uint16]:
    """Round float32 numbers to the nearest bf16, ties to even; return their bits."""
    from gpt2c.kernels.reference.rounding import nearest

    return (nearest(tensor).view(np.uint32) >> 16).astype("<u2")


def _names(layers: int) -> Iterator[str]:
    """Yield the names of the parameters in the order of the file."""
    for name in _TENSORS:
        for layer in range(layers if "*" in name else 1):
            yield name.replace("*", str(layer))


def _count(config: GPT2Config, rows: int) -> int:
    """Count the numbers in a file whose wte has `rows` rows, from the shapes of one layer."""
    one = GPT2Config(**{name: getattr(config, name) for name in _FIELDS} | {"n_layer": 1})
    sizes = {name: math.prod(shape) for name, shape in one.parameter_shapes().items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("h."))
    padding = (rows - config.vocab_size) * config.n_embd
    return sum(sizes.values()) + (config.n_layer - 1) * layer + padding


# ---- the tokenizer -------------------------------------------------------------------------------


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[dict[bytes, int], int]:
    """Read a gpt2_tokenizer.bin of version 1 or 2: `Tokenizer(*read_tokenizer(path))`.

    The file has no merges. GPT-2's ids are in the order of its merges, so the ids determine them;
    `Tokenizer.vocab_and_merges` refuses a vocabulary in another order.

    Returns
    -------
    (ranks, eot) : bytes of each token -> its id; the id of <|endoftext|>, which ranks does not have

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : not such a file, or a damaged one; a token occurs twice, or a byte has no token
    """
    path = Path(path)
    header, size = read_header(path)
    version, count, eot = _numbers(path, header, TOKENIZER_MAGIC, "tokenizer", (1, 2))[1:4]
    if not 0 < count <= _MOST_TOKENS:
        raise ValueError(f"{path}: its header has {count} tokens; 1 to {_MOST_TOKENS} are possible")
    if not count <= (size - _HEADER_BYTES) // 2 or size > _HEADER_BYTES + 256 * count:
        raise ValueError(
            f"{path} has {size} bytes; its {count} tokens of 1 to 255 bytes need"
            f" {_HEADER_BYTES + 2 * count} to {_HEADER_BYTES + 256 * count}"
        )
    if version == 1:  # has no field for eot: llm.c assumes GPT-2's vocabulary
        if count != _GPT2_TOKENS:
            raise ValueError(f"{path}: version 1 has {_GPT2_TOKENS} tokens, this file has {count}")
        eot = _GPT2_TOKENS - 1
    if not 0 <= eot < count:
        raise ValueError(f"{path}: its eot_token is {eot}, not one of {count} tokens")
    ranks: dict[bytes, int] = {}
    content, start = untrusted.read_bytes(path, size), _HEADER_BYTES
    for token_id in range(count):
        end = start + 1 + (content[start] if start < len(content) else 0)
        token = content[start + 1 : end]
        if not token or end > len(content):
            raise ValueError(f"{path}: token {token_id} of {count} is empty or cut off")
        if token_id == eot and token != _END_OF_TEXT:
            raise ValueError(f"{path}: its eot_token, {eot}, is {token!r}, not {_END_OF_TEXT!r}")
        if token_id != eot and ranks.setdefault(token, token_id) != token_id:
            raise ValueError(f"{path}: tokens {ranks[token]} and {token_id} are both {token!r}")
        start = end
    if start != len(content):
        raise ValueError(f"{path} has {len(content) - start} bytes after its last token")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path} lacks {len(missing)} of the 256 single bytes, the first of them {missing[0]}"
        )
    return ranks, eot


def write_tokenizer(path: Path, tokens: Sequence[bytes], eot: int) -> None:
    """Write a gpt2_tokenizer.bin of version 2.

    Parameters
    ----------
    path : the file
    tokens : bytes of each token, in the order of their ids
    eot : the id of <|endoftext|>

    Raises
    ------
    ValueError : a token has more than 255 bytes, the most that the file can hold
    OSError : the file cannot be written; an existing file is unchanged
    """
    header = np.zeros(256, "<i4")
    header[:4] = TOKENIZER_MAGIC, 2, len(tokens), eot
    for token_id, token in enumerate(tokens):
        if len(token) > 255:
            raise ValueError(
                f"{path}: token {token_id} has {len(token)} bytes; llm.c's tokens have at most 255"
            )
    body = b"".join(bytes([len(token)]) + token for token in tokens)
    with atomic.atomic_path(path) as temporary:
        temporary.write_bytes(header.tobytes() + body)
