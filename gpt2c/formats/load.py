"""Finding a model on disk, in any format that gpt2c reads: its config, its tensors, their type.

This is the only place that asks which format a path has. It builds no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2c.files import hub
from gpt2c.formats import huggingface, llama2c, llmc
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.parameters import Tensor

__all__ = ["AnyConfig", "Pretrained", "config_of", "find_model"]

AnyConfig = GPT2Config | LlamaConfig
CONFIGS: dict[str, type[AnyConfig]] = {"gpt2": GPT2Config, "llama": LlamaConfig}


@dataclass(frozen=True)
class Pretrained:
    """A model on disk. Its tensors are mapped; only llm.c's bf16 is read already.

    Attributes
    ----------
    path : on this machine, also for a name on the hub
    source : the file of the weights, for errors
    config : its shape
    weights : "fp16" or "int8" if gpt2c quantized them, else "fp32": they become float32
    tensors : name -> tensor, in memory's layout
    ends : the token ids that end a text; [] if the model names none
    """

    path: Path
    source: str
    config: AnyConfig
    weights: str
    tensors: Mapping[str, Tensor]
    ends: list[int]


def find_model(path_or_name: str | os.PathLike[str], revision: str | None = None) -> Pretrained:
    """Find a model, read its config and map its tensors.

    Parameters
    ----------
    path_or_name : a directory with config.json and model.safetensors, which may be in shards with
        an index; a .safetensors file beside its config.json; a model .bin of llm.c or of
        llama2.c; or a name on the hub, such as gpt2, see `gpt2c.files.hub.find`
    revision : of a model on the hub: a branch, tag or commit

    Raises
    ------
    OSError : a file is missing or unreadable, or the hub does not have it
    ValueError : a file is damaged, or gpt2c cannot compute the model
    """
    path = hub.find(path_or_name, revision)
    config: AnyConfig
    tensors: Mapping[str, Tensor]
    if llama2c.is_llama2c(path):
        config, tensors = llama2c.read_model(path)
        return Pretrained(path, str(path), config, "fp32", tensors, [])
    if llmc.is_llmc(path):
        config, tensors = llmc.read_model(path)
        return Pretrained(path, str(path), config, "fp32", tensors, [])
    entries, source = huggingface.read_config(path), str(huggingface.weights_file(path))
    stored, config = huggingface.stored_method(entries), config_of(entries)
    load = huggingface.load_as_they_are if stored else huggingface.load_weights
    tensors = load(path)
    return Pretrained(path, source, config, stored or "fp32", tensors, huggingface.read_ends(path))


def config_of(entries: Mapping[str, Any]) -> AnyConfig:
    """Return the config of the kind of model that config.json's entries name, GPT-2 if none.

    Raises
    ------
    ValueError : an unknown model_type, or a config that gpt2c cannot compute
    """
    kind = entries.get("model_type", "gpt2")
    if kind not in tuple(CONFIGS):  # a list cannot be looked up in a dict
        raise ValueError(
            f"config.json: model_type must be {' or '.join(CONFIGS)}, got {kind!r:.50}"
        )
    return CONFIGS[kind].from_dict(entries)
