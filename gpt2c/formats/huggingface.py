"""Weights on disk: a directory that Hugging Face's transformers can load.

    config.json                    the configuration, Hugging Face's field names
    generation_config.json         the tokens that start and end texts, for transformers' generate
    model.safetensors              the weights, Hugging Face's names and layout; or
    model.safetensors.index.json   the shard of each tensor: read, never written

A directory is not trusted: its files are compared with each other before they are used. Knows
nothing about models: tensors are a dict, a configuration is a dict, and the model checks names and
shapes. The difference between files and memory stands in a small file for each kind of model:
gpt2_layout.py, llama_layout.py. To add a kind, write such a file and enter it in LAYOUTS, and its
config in load.CONFIGS.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files import hub
from gpt2c.files.atomic import atomic_paths, claim_directory, matching
from gpt2c.files.names import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    MODEL_OTHERS,
    WEIGHTS_FILE,
    check_named,
)
from gpt2c.files.tensors import FLOAT_DTYPES, AnyTensor, StoredTensor, map_tensors, write_tensors
from gpt2c.files.untrusted import read_json, shown
from gpt2c.formats.gpt2_layout import GPT2
from gpt2c.formats.layout import Layout
from gpt2c.formats.llama_layout import LLAMA
from gpt2c.model.parameters import Tensor
from gpt2c.model.quantized import DTYPES

__all__ = [
    "ENTRY",
    "load_as_they_are",
    "load_weights",
    "read_config",
    "save_as_they_are",
    "save_weights",
    "stored_method",
    "weights_file",
]

# model_type in config.json -> the layout of its files
LAYOUTS = {"gpt2": GPT2, "llama": LLAMA}

ENTRY = "quantization_config"  # Hugging Face's name of this entry in config.json

HEAD = "lm_head.weight"

# A shard's name has no slash: an index must not name files outside its directory.
SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)


def save_weights(
    directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, AnyTensor]
) -> None:
    """Write the JSON files and model.safetensors; no file gets its name before all are complete.

    Then shards of an earlier save are removed, as transformers does: some readers would load those.

    Parameters
    ----------
    directory : made if it does not exist
    config : the content of config.json; its model_type, or gpt2 if it has none, is the kind
    tensors : name -> float array, names and shapes of `ModelConfig.parameter_shapes`; they are
        stored in their own dtype

    Raises
    ------
    OSError : a file cannot be written (no permission, a full disk, ...); existing files are
        unchanged
    ValueError : the configuration holds nan or infinity, which JSON cannot hold; the directory's
        name is empty
    """
    stored = _layout(config).write(tensors)
    _save(directory, config, stored, "pt")  # transformers refuses a file without this format


def load_weights(path: str | os.PathLike[str], entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Map the weights: name of `ModelConfig.parameter_shapes` -> tensor; no number is read yet.

    Names may have the prefix of their kind, such as "transformer.", or lack it. Stored buffers are
    ignored. Where config.json ties lm_head.weight to wte.weight, they are one tensor, whichever a
    file has. float32, float16, bfloat16 and float64 become float32 when they are read.

    Parameters
    ----------
    path : a directory with model.safetensors or, in its absence, the shards of an index; or a
        .safetensors file with config.json beside it
    entries : of config.json, see `read_config`

    Raises
    ------
    FileNotFoundError : `path` or a file in it does not exist
    ValueError : a file is damaged, a tensor is not of floats, shards and index contradict each
        other, lm_head.weight differs from wte.weight, or the model was saved without its head; the
        message names the file, the tensor and the reason
    """
    path, stored = Path(path), {}
    with naming_config(path):
        layout = _layout(entries)
    for stored_name, tensor in _map_weights(path, layout.buffers).items():
        name = stored_name.removeprefix(layout.prefix)
        if name in stored:
            raise ValueError(
                f"{tensor.path} holds {name} twice, with and without the prefix {layout.prefix}"
            )
        stored[name] = tensor
    tied = entries.get("tie_word_embeddings", layout.tied)
    if not tied and HEAD not in stored and entries.get("architectures") == [layout.headless]:
        raise ValueError(
            f"{weights_file(path)} has no {HEAD}, as it was saved from a {layout.headless}, which"
            " has no head: save it from transformers' AutoModelForCausalLM"
        )
    if tied and HEAD in stored:
        head = stored.pop(HEAD)
        if not _equal(stored.setdefault(layout.table, head), head):
            raise ValueError(
                f"{head.path}: {HEAD} differs from {layout.table}, but this model has one tensor"
                " for both"
            )
    return layout.read(stored)


def _layout(entries: Mapping[str, Any]) -> Layout:
    kind = entries.get("model_type", "gpt2")
    if kind not in tuple(LAYOUTS):  # a list cannot be looked up in a dict
        raise ValueError(
            f"config.json: model_type must be {' or '.join(LAYOUTS)}, got {shown(kind)}"
        )
    return LAYOUTS[kind]


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    return a is b or np.array_equal(a, b, equal_nan=True)


def weights_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that transformers would load: `path`, its model.safetensors or its index."""
    path = Path(path)
    if path.is_file():
        return path
    whole, index = path / WEIGHTS_FILE, path / INDEX_FILE
    return index if index.is_file() and not whole.exists() else whole


def _map_weights(path: Path, buffers: tuple[str, ...]) -> dict[str, StoredTensor]:
    file = weights_file(path)
    if file.name == INDEX_FILE:
        return _map_shards(file, buffers)
    return map_tensors(file, buffers)[0]


def _map_shards(index: Path, buffers: tuple[str, ...]) -> dict[str, StoredTensor]:
    """Map all shards of an index, which must hold exactly the tensors that it lists.

    A tensor that the index does not list is refused: transformers would load it, but a reader that
    follows the index would not. It could also be a second version of a listed tensor.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must say which file each tensor is in")
    for name, file in weight_map.items():
        if not (isinstance(file, str) and SHARD.fullmatch(file)):
            raise ValueError(
                f"{index}: {shown(name)} must be in a .safetensors file of the same directory, got"
                f" {shown(file)}"
            )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = _inside(index.parent / file)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, but {index} lists it")
        for name, tensor in map_tensors(path, buffers)[0].items():
            if weight_map.get(name) != file:
                said = f"says is in {weight_map[name]}" if name in weight_map else "does not list"
                raise ValueError(f"{path} holds {name}, which {index.name} {said}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors and not name.endswith(buffers):
            raise ValueError(f"{index}: {shown(name)} is not in {file}")
    return tensors


def _inside(path: Path) -> Path:
    """Return the path; refuse a symlink out of its directory, except to the hub cache's blobs.

    In that cache a model is snapshots/REVISION, a directory of links to ../../blobs.
    """
    directory = os.path.realpath(path.parent)
    target, home = os.path.realpath(path), os.path.dirname(directory)
    blobs = os.path.join(os.path.dirname(home), "blobs")
    allowed = [directory, blobs] if os.path.basename(home) == "snapshots" else [directory]
    if os.path.dirname(target) not in allowed:
        raise ValueError(f"{path} is a link that leads out of its directory: copy the file there")
    return path


def read_config(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[int]]:
    """Read config.json and generation_config.json; see `load_weights` for path and errors.

    Returns
    -------
    (entries, ends) : those of config.json, which takes an eos_token_id that it lacks from
        generation_config.json; and the token ids that end a text by generation_config.json, [] if
        it names none
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a directory, nor a .safetensors file")
    directory = _home(path)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; name one with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if not (directory / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{directory / CONFIG_FILE} does not exist; a model directory has {CONFIG_FILE} and"
            f" {WEIGHTS_FILE}{hub.hidden(directory)}"
        )
    entries, generation = read_json(directory / CONFIG_FILE), directory / GENERATION_FILE
    eos = read_json(generation).get("eos_token_id") if os.path.lexists(generation) else None
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int for token in ends):
        raise ValueError(
            f"{generation}: eos_token_id must be a token id or several, got {shown(eos)}"
        )
    if eos is not None and entries.get("eos_token_id") is None:
        entries["eos_token_id"] = eos
    return entries, ends


def _home(path: Path) -> Path:
    """Return the directory of a model: `path`, or the one that this file is in."""
    return path.parent if path.is_file() else path


@contextmanager
def naming_config(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the directory in errors of its config.json's entries."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(f"{CONFIG_FILE}: "):
            raise
        raise ValueError(f"{_home(Path(path)) / str(error)}") from None


def save_as_they_are(
    directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, AnyTensor]
) -> None:
    """Write weights with the names, layout and dtypes of memory; see `save_weights`."""
    _save(directory, config, tensors, "gpt2c")


def load_as_they_are(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Map the weights that `save_as_they_are` wrote: name -> read-only array."""
    stored, _ = map_tensors(weights_file(path), dtypes=(*FLOAT_DTYPES, "U8"))
    return {name: tensor.data for name, tensor in stored.items()}


def _save(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, AnyTensor],
    format: str,
) -> None:
    check_named("the name of the directory", directory)
    directory, texts = Path(directory), _texts(config)
    claim_directory(directory, overwrite=True)
    with atomic_paths(*(directory / name for name in (WEIGHTS_FILE, *texts))) as files:
        write_tensors(files[0], tensors, {"format": format})
        for file, text in zip(files[1:], texts.values(), strict=True):
            file.write_text(text, encoding="utf-8")
    for path in matching(directory, MODEL_OTHERS):  # the index and shards of an earlier save
        path.unlink()


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return file name -> text of the JSON files; missing ids are left out, as in transformers."""
    ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id")}
    generation = {"_from_model_config": True} | {n: i for n, i in ids.items() if i is not None}
    entries = {CONFIG_FILE: config, GENERATION_FILE: generation}
    return {n: json.dumps(entry, indent=2, allow_nan=False) + "\n" for n, entry in entries.items()}


def stored_method(entries: Mapping[str, Any]) -> str | None:
    """Return the quantization method in config.json's entries; None for weights not quantized.

    Raises
    ------
    ValueError : another program quantized the weights
    """
    entry = entries.get(ENTRY)
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.get("quant_method") != "gpt2c":
        raise ValueError(f"config.json: {ENTRY} must be gpt2c's own, got {shown(entry)}")
    method = entry.get("weights")
    if method not in tuple(DTYPES):  # a list cannot be looked up in a dict
        raise ValueError(f"config.json: {ENTRY} must have weights {' or '.join(DTYPES)}")
    return str(method)
