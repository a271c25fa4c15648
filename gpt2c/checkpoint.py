"""Weights on disk: a directory that Hugging Face's transformers loads as it is.

    config.json           the configuration, Hugging Face's field names
    model.safetensors     the weights, Hugging Face's GPT-2 names and layout

Knows nothing about models: tensors are a dict of arrays, a configuration is a dict, and whether
names and shapes fit is for the model to say. All it knows of GPT-2 is how Hugging Face's file
differs from memory: four matrices are transposed, and names may have a prefix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.files import atomic_paths, read_json
from gpt2c.tensorfile import Tensors, map_tensors, read_tensors, write_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Hugging Face's Conv1D stores these as (C, OC); memory has llm.c's (OC, C).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The causal mask that older versions of transformers saved with the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")


def save_weights(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and model.safetensors, both completely before either takes its name.

    Parameters
    ----------
    directory : made if it does not exist
    config : what config.json holds
    tensors : name -> float array, Hugging Face's GPT-2 names without "transformer.", Linear weights
        as (OC, C); they are stored in their own dtype
    metadata : further strings for the header of model.safetensors

    Raises
    ------
    OSError : a file cannot be written (no permission, a full disk, ...); what was there before is
        as it was
    ValueError : the configuration holds nan or infinity, which JSON has not
    """
    _save(Path(directory), config, tensors, metadata or {})


def load_weights(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], Tensors]:
    """Read config.json and model.safetensors, whoever wrote them, into float32.

    Names lose their "transformer." prefix, stored masks are ignored, Linear weights become (OC, C).
    GPT-2 has one tensor for wte.weight and lm_head.weight: if a file has only the second, it is
    taken for the first. float16, bfloat16 and float64 are converted.

    Returns
    -------
    (config, tensors) : what config.json holds; name -> float32 array, read-only where the file's
        own memory is mapped; not all are contiguous

    Raises
    ------
    FileNotFoundError : `directory` is not a directory or lacks one of the two files
    ValueError : a file is damaged, a tensor is not of floats, or lm_head.weight differs from
        wte.weight; the message names the file, the tensor and the reason
    """
    config = read_config(directory)
    path = Path(directory) / WEIGHTS_FILE
    stored, _ = read_tensors(path, BUFFERS)
    tensors: Tensors = {}
    for stored_name, tensor in stored.items():
        name = stored_name.removeprefix("transformer.")
        if name in tensors:
            raise ValueError(
                f"{path}: {name} is there twice, with and without the prefix transformer."
            )
        tensors[name] = _transpose(name, tensor)
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(tensors.setdefault("wte.weight", head), head):
        raise ValueError(
            f"{path}: lm_head.weight differs from wte.weight; wanted GPT-2's one tensor for both"
        )
    return config, tensors


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read config.json alone; see `load_weights` for errors."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; one with {CONFIG_FILE} and {WEIGHTS_FILE} is wanted"
        )
    return _read_config(directory / CONFIG_FILE)


def save_as_they_are(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
) -> None:
    """Write weights in memory's layout and dtypes, under memory's names; see `save_weights`."""
    directory = Path(directory)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_paths(directory / WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, config_file):
        write_tensors(weights, tensors, {"format": "gpt2c"})
        config_file.write_text(text, encoding="utf-8")


def load_as_they_are(directory: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Map the weights that `save_as_they_are` wrote: name -> read-only array."""
    stored, _ = map_tensors(Path(directory) / WEIGHTS_FILE)
    return {name: tensor for name, (_, tensor) in stored.items()}


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, NDArray[Any]], source: str
) -> None:
    """Refuse tensors that are not those of `shapes`; `source` names them in errors.

    Raises
    ------
    ValueError : a tensor is missing, unknown or of another shape
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{source}: tensor {name} is missing")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{source}: tensor {name} must be {shape} for its config, got {tensors[name].shape}"
            )
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise ValueError(f"{source}: a GPT-2 has no tensor {unknown[0]}")


def _save(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    config_text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    stored = {name: _transpose(name, tensor) for name, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_paths(directory / WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, config_file):
        # Without "format" transformers refuses the file.
        write_tensors(weights, stored, {"format": "pt", **metadata})
        config_file.write_text(config_text, encoding="utf-8")


def _transpose(name: str, tensor: NDArray[Any]) -> NDArray[Any]:
    """View memory's (OC, C) as the file's (C, OC) or the other way; other tensors pass."""
    return tensor.T if name.endswith(TRANSPOSED) else tensor


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a model directory has {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return read_json(path)
