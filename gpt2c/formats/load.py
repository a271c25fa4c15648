"""Finding a model on disk, in any format that gpt2c reads: its config, its tensors, their type.

`model_kind` is the only place that asks which format the model at a path has. Builds no model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2c.files import hub
from gpt2c.files.names import CONFIG_FILE, meant
from gpt2c.formats import huggingface, llama2c, llmc, peft
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.parameters import Tensor, check_shapes
from gpt2c.model.quantized import shapes_of
from gpt2c.text.vocabulary import has_tokenizer

__all__ = ["AnyConfig", "Kind", "Pretrained", "config_of", "find_model", "model_kind"]

AnyConfig = GPT2Config | LlamaConfig
CONFIGS: dict[str, type[AnyConfig]] = {"gpt2": GPT2Config, "llama": LlamaConfig}

Kind = Literal["adapters", "huggingface", "llama2.c", "llm.c"]


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
    name : of the base, as an adapter's files record it: on the hub, or an absolute path
    """

    path: Path
    source: str
    config: AnyConfig
    weights: str
    tensors: Mapping[str, Tensor]
    ends: list[int]
    name: str = ""


def model_kind(path: Path) -> Kind | None:
    """Return the format of the model at a path, or None.

    The names in a directory tell; of a file, its name and its first bytes. "llm.c" is also each
    other .bin and a pickle, which its reader refuses.
    """
    if peft.is_adapter_directory(path):
        return "adapters"
    if (path / CONFIG_FILE).exists() or (path.suffix == ".safetensors" and path.is_file()):
        return "huggingface"
    if llama2c.is_llama2c(path):
        return "llama2.c"
    return "llm.c" if llmc.is_llmc(path) else None


def find_model(
    path_or_name: str | os.PathLike[str],
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    check_base: bool = True,
) -> Pretrained:
    """Find a model, read its config and map its tensors.

    Parameters
    ----------
    path_or_name : a directory with config.json and model.safetensors, which may be in shards with
        an index; a .safetensors file beside its config.json; a model .bin of llm.c or of
        llama2.c; a directory of adapters, which names its base; or a name on the hub, such as gpt2,
        see `gpt2c.files.hub.find`
    revision : of a model on the hub: a branch, tag or commit
    adapter : a directory of adapters for this model, PEFT's or `gpt2c.formats.peft`'s
    check_base : False takes adapters that were trained on a base with other weights, too

    Raises
    ------
    OSError : a file is missing or unreadable, or the hub does not have it
    ValueError : a file is damaged, gpt2c cannot compute the model, or the adapters do not fit it
    """
    if not isinstance(path_or_name, str | os.PathLike):
        raise ValueError(
            "a model is named by its directory or its name on the hub, got a"
            f" {type(path_or_name).__name__}: save it with save_pretrained, and pass the directory"
        )
    path = hub.find(path_or_name, revision)
    kind = model_kind(path)
    if kind == "adapters":
        if adapter is not None:
            raise ValueError(f"{path} holds adapters, so it takes no others: merge these first")
        return _of_adapters(peft.read_adapter(path), check_base)
    here = path_or_name if os.path.lexists(path_or_name) else None
    found = _find(path, kind, str(path_or_name) if here is None else os.path.abspath(here))
    if adapter is None:
        return found
    return _adapted(found, peft.read_adapter(adapter), check_base)


def _find(path: Path, kind: Kind | None, name: str) -> Pretrained:
    """Return a model without adapters."""
    config: AnyConfig
    tensors: Mapping[str, Tensor]
    if inner := meant(path, CONFIG_FILE):
        raise FileNotFoundError(f"{path} holds no model{inner}")
    if kind == "llama2.c" or kind == "llm.c":
        read = llama2c.read_model if kind == "llama2.c" else llmc.read_model
        config, tensors = read(path)
        return Pretrained(path, str(path), config, "fp32", tensors, [], name)
    entries, ends = huggingface.read_config(path)
    with huggingface.naming_config(path):
        stored, config = huggingface.stored_method(entries), config_of(entries)
    if stored:
        tensors = huggingface.load_as_they_are(path)
    else:
        tensors = huggingface.load_weights(path, entries)
    source = str(huggingface.weights_file(path))
    return Pretrained(path, source, config, stored or "fp32", tensors, ends, name)


def _of_adapters(stored: peft.Stored, check_base: bool) -> Pretrained:
    """Return the adapters of a directory with the base that it names."""
    if not stored.base:
        raise ValueError(f"{stored.path} names no base: open the base, with this as its adapter")
    path = hub.find(stored.base)
    if not path.exists():
        raise FileNotFoundError(
            f"{stored.path} adapts {stored.base}, which does not exist here: open the base from its"
            " own path, with this as its adapter"
        )
    kind = model_kind(path)
    if kind == "adapters":
        raise ValueError(f"{stored.path} adapts {stored.base}, which holds adapters: merge those")
    return _adapted(_find(path, kind, stored.base), stored, check_base)


def _adapted(found: Pretrained, stored: peft.Stored, check_base: bool) -> Pretrained:
    """Return a model with these adapters, and with their tokenizer if they have one.

    It may have learned a chat template that the base's lacks.

    Raises
    ------
    ValueError : they do not fit it, or are of a base with other weights
    """
    lora, own = peft.adapters_of(stored, found.config)
    scores: dict[str, Any] = {}
    if stored.num_labels is not None:
        same = found.config.num_labels == stored.num_labels
        names = stored.labels or (found.config.id2label if same else None)
        scores = {"num_labels": stored.num_labels, "id2label": names}
    try:
        config: AnyConfig = dataclasses.replace(found.config, lora=lora, **scores)
    except ValueError as error:
        raise ValueError(f"{stored.source}: {error}") from None
    shapes = shapes_of(config, found.weights)
    kept = {name: tensor for name, tensor in found.tensors.items() if name in shapes}
    tensors: dict[str, Tensor] = kept | own
    check_shapes(shapes, tensors, stored.source)
    if check_base and stored.sha256 is not None and found.weights == "fp32":
        if peft.digest(tensors, config.frozen()) != stored.sha256:
            raise ValueError(
                f"{stored.source} was trained on a base with other weights than {found.path} has"
            )
    path = stored.path if has_tokenizer(stored.path) else found.path
    return dataclasses.replace(found, path=path, config=config, tensors=tensors)


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
