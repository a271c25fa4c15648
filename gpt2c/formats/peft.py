"""Adapters on disk: a directory as PEFT has it.

    adapter_config.json          rank, scale, and the name of the base
    adapter_model.safetensors    A and B of each adapted layer, and the scores of a classifier

PEFT adapts the matrices of transformers' files. Of a Llama, memory joins some of them (see
llama_layout.py). Then PEFT's parts get the same A and their own rows of B; and parts of a file with
different A become one adapter of a higher rank, with zeros where a part ignores the others' A.

Knows nothing about models: tensors are a dict.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2c.files.atomic import atomic_paths, claim_directory
from gpt2c.files.names import ADAPTER_FILES, CONFIG_FILE, check_named
from gpt2c.files.tensors import AnyTensor, read_tensors, write_tensors
from gpt2c.files.untrusted import parse_json, read_json, shown
from gpt2c.formats import llama_layout
from gpt2c.kernels.memory import Array
from gpt2c.model.config import ModelConfig
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.lora import TARGETS, A, B, LoRA, is_adapter
from gpt2c.model.parameters import Tensor

__all__ = [
    "Stored",
    "adapters_of",
    "digest",
    "is_adapter_directory",
    "read_adapter",
    "save_adapter",
]

CONFIG, WEIGHTS = ADAPTER_FILES
PREFIX = "base_model.model."
SCORE = "score.weight"
HASH, LABELS = "base_sha256", "id2label"  # in the file's metadata, which PEFT ignores
# fields that must be empty, because each stands for other arithmetic
EMPTY = (
    *("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("trainable_token_indices", "lora_bias", "layer_replication", "target_parameters"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "megatron_config"),
)
CHANGE_BASE = ("pissa", "olora", "corda", "loftq")  # first values that change the base, too
IN_LAYER = re.compile(r"(h|layers)\.(0|[1-9][0-9]{0,4})\.(.+)(\.lora_[AB]\.weight)")
# of a Llama's linear layer in memory, the names of PEFT's parts
PARTS = {
    own.removesuffix(".weight"): tuple(part.removesuffix(".weight") for part in parts)
    for own, parts in llama_layout.LAYER.items()
    if not own.startswith("ln_")
}


class Stored(NamedTuple):
    """The adapters of a directory, as they lie in its files.

    Attributes
    ----------
    path : the directory
    lora : their settings, still without targets' names in memory
    base : the name of the model that they adapt, "" if none is recorded
    sha256 : `digest` of its weights; None if PEFT wrote the files
    labels : the names of the scores, or None
    tensors : name without prefix -> float32 array
    """

    path: Path
    lora: LoRA
    base: str
    sha256: str | None
    labels: tuple[str, ...] | None
    tensors: Mapping[str, Array]

    @property
    def source(self) -> str:
        """The file of the tensors, for errors."""
        return str(self.path / WEIGHTS)

    @property
    def num_labels(self) -> int | None:
        """The number of scores; None if there are none."""
        return len(self.tensors[SCORE]) if SCORE in self.tensors else None


def is_adapter_directory(path: Path) -> bool:
    """Return whether a directory holds adapters and no model of its own."""
    return (path / CONFIG).is_file() and not (path / CONFIG_FILE).exists()


def digest(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Return the SHA-256 of these tensors' float32 numbers; it tells one base from another."""
    found = hashlib.sha256()
    for name in sorted(names):
        found.update(f"{name} {tensors[name].shape}\n".encode())
        found.update(np.ascontiguousarray(np.asarray(tensors[name]), "<f4").data)
    return found.hexdigest()


# ---- read ----------------------------------------------------------------------------------------


def read_adapter(path: str | os.PathLike[str]) -> Stored:
    """Read a directory of adapters.

    Raises
    ------
    OSError : a file is missing or unreadable
    ValueError : a file is damaged, or the adapters are of a kind that gpt2c does not have
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"{path / CONFIG} does not exist; a directory of adapters has {CONFIG} and {WEIGHTS}"
        )
    entries = read_json(path / CONFIG)
    try:
        lora, base = _read_config(entries)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    stored, metadata = read_tensors(path / WEIGHTS)
    tensors = {}
    for name, tensor in stored.items():
        own = name.removeprefix(PREFIX).removeprefix("transformer.").removeprefix("model.")
        if not name.startswith(PREFIX) or own in tensors:
            raise ValueError(f"{path / WEIGHTS}: {shown(name)} is no part of an adapter")
        tensors[own] = tensor
    if SCORE in tensors and tensors[SCORE].ndim != 2:
        raise ValueError(f"{path / WEIGHTS}: {PREFIX}{SCORE} must have rows and columns")
    labels = _read_labels(metadata.get(LABELS), str(path / WEIGHTS))
    return Stored(path, lora, base, metadata.get(HASH), labels, tensors)


def _read_labels(text: str | None, source: str) -> tuple[str, ...] | None:
    """Return the names of the scores in a file's metadata, or None."""
    if text is None:
        return None
    entries = parse_json(text, f"{source}: {LABELS}")
    names = tuple(entries.get(str(number), "") for number in range(len(entries)))
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{source}: {LABELS} must name each score, got {shown(entries)}")
    return names


def _read_config(entries: Mapping[str, Any]) -> tuple[LoRA, str]:
    kind = entries.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {shown(kind)}")
    for name in EMPTY:
        if entries.get(name):
            raise ValueError(f"{name} must be empty: gpt2c lacks it, got {shown(entries[name])}")
    if entries.get("bias", "none") != "none":
        raise ValueError(f"bias must be 'none', got {shown(entries['bias'])}")
    saved = entries.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(one in ("score", "classifier") for one in saved):
        raise ValueError(f"modules_to_save must be 'score' alone, got {shown(saved)}")
    first = entries.get("init_lora_weights", True)
    if isinstance(first, str) and first.lower().startswith(CHANGE_BASE):
        raise ValueError(
            f"init_lora_weights {shown(first)} changes the base, too: convert it first"
        )
    base, rslora = entries.get("base_model_name_or_path"), entries.get("use_rslora", False)
    if not isinstance(base, str | None) or not isinstance(rslora, bool):
        raise ValueError("base_model_name_or_path must be a string, and use_rslora true or false")
    lora = LoRA(entries.get("r"), entries.get("lora_alpha"), use_rslora=rslora)  # type: ignore[arg-type]
    return lora, base or ""


def adapters_of(stored: Stored, config: ModelConfig) -> tuple[LoRA, dict[str, Array]]:
    """Return adapters as a model of this config has them in memory: settings, name -> array.

    Raises
    ------
    ValueError : a tensor belongs to no layer, is missing, or does not fit the others
    """
    llama, lora = isinstance(config, LlamaConfig), stored.lora
    layers: dict[str, dict[str, dict[str, Array]]] = {}  # h.0.attn.c_attn -> q_proj -> A, B
    scores = {SCORE: stored.tensors[SCORE]} if SCORE in stored.tensors else {}
    for name, tensor in stored.tensors.items():
        found = IN_LAYER.fullmatch(name)
        if found is None or (found[1] == "layers") != llama or tensor.ndim != 2:
            if name in scores:
                continue
            raise ValueError(f"{stored.source}: this model has no place for {shown(name)}")
        homes = [own for own, parts in PARTS.items() if found[3] in (parts if llama else (own,))]
        if not homes:
            raise ValueError(f"{stored.source}: this model has no layer for {shown(name)}")
        layer = layers.setdefault(f"h.{found[2]}.{homes[0]}", {})
        layer.setdefault(found[3], {})[found[4]] = tensor
    for name, parts in layers.items():
        for part, pair in parts.items():
            shapes = [pair[end].shape if end in pair else None for end in (A, B)]
            if None in shapes or shapes[0][0] != lora.r or shapes[1][1] != lora.r:  # type: ignore[index]
                raise ValueError(
                    f"{stored.source}: {part} of {name} must have lora_A ({lora.r}, C) and lora_B"
                    f" (OC, {lora.r}), got {shown(shapes[0])} and {shown(shapes[1])}"
                )
    kinds = [name.split(".", 2)[2] for name in layers]
    targets = tuple(one for one in TARGETS if any(kind.endswith(one) for kind in kinds))
    joined = {}
    for name, parts in layers.items():
        kind = name.split(".", 2)[2]
        rows = _rows(config, kind) if isinstance(config, LlamaConfig) else {kind: -1}
        joined[name] = _join(parts, rows, f"{stored.source}: {name}")
    R = max((len(down) for down, _ in joined.values()), default=lora.r)
    try:
        if R > lora.r:
            lora = LoRA(R, lora.scale * R, targets)  # of the same scale
        else:
            lora = dataclasses.replace(lora, targets=targets)
    except ValueError as error:
        raise ValueError(f"{stored.source}: {error}") from None
    tensors: dict[str, Array] = dict(scores)
    for name, (down, up) in joined.items():
        more = R - len(down)
        tensors[name + A] = np.pad(down, ((0, more), (0, 0)))
        tensors[name + B] = np.pad(up, ((0, 0), (0, more)))
    return lora, tensors


def _rows(config: LlamaConfig, kind: str) -> dict[str, int]:
    """Return the rows of each part of a Llama's linear layer; -1 where there is one part."""
    parts = PARTS[kind]
    if len(parts) == 1:
        return {parts[0]: -1}
    if len(parts) == 2:
        return dict.fromkeys(parts, config.inner)
    q, kv = config.num_attention_heads * config.HS, config.KV * config.HS
    return dict(zip(parts, (q, kv, kv), strict=True))


def _join(
    parts: Mapping[str, Mapping[str, Array]], rows: Mapping[str, int], source: str
) -> tuple[Array, Array]:
    """Return A and B of a layer that has the rows of these parts, one below the other."""
    if len(rows) == 1:
        (pair,) = parts.values()
        return pair[A], pair[B]
    for part, pair in parts.items():
        if len(pair[B]) != rows[part] or pair[A].shape != next(iter(parts.values()))[A].shape:
            raise ValueError(f"{source}: the parts {', '.join(parts)} do not fit each other")
    first = next(iter(parts.values()))[A]
    if parts.keys() == rows.keys() and all(np.array_equal(p[A], first) for p in parts.values()):
        return first, np.concatenate([parts[part][B] for part in rows])
    r, present = len(first), [part for part in rows if part in parts]
    up = np.zeros((sum(rows.values()), r * len(present)), np.float32)
    start = 0
    for part, count in rows.items():
        if part in parts:
            place = r * present.index(part)
            up[start : start + count, place : place + r] = parts[part][B]
        start += count
    return np.concatenate([parts[part][A] for part in present]), up


# ---- write ---------------------------------------------------------------------------------------


def save_adapter(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, AnyTensor],
    base: str,
    sha256: str | None,
) -> None:
    """Write a directory of adapters; no file gets its name before both are complete.

    Parameters
    ----------
    directory : made if it does not exist
    config : of the model, with its adapters
    tensors : its parameters, of which adapters and scores are written
    base : the name of the model that they adapt, "" for none
    sha256 : `digest` of its weights, or None

    Raises
    ------
    OSError : a file cannot be written; existing files are unchanged
    ValueError : the directory's name is empty, or it holds a whole model
    """
    check_named("the name of the directory", directory)
    directory, lora = Path(directory), config.lora
    assert lora is not None
    llama, stored = isinstance(config, LlamaConfig), dict[str, AnyTensor]()
    own = {name: np.asarray(tensors[name]) for name in tensors if is_adapter(name)}
    for name, tensor in own.items():
        _, number, rest = name.split(".", 2)
        end = A if rest.endswith(A) else B
        kind = rest.removesuffix(end)
        if not isinstance(config, LlamaConfig):
            stored[f"{PREFIX}transformer.{name}"] = tensor
            continue
        start = 0
        for part, count in _rows(config, kind).items():
            rows = tensor if end == A or count < 0 else tensor[start : start + count]
            stored[f"{PREFIX}model.layers.{number}.{part}{end}"] = rows
            start += count
    if SCORE in tensors:
        stored[PREFIX + SCORE] = tensors[SCORE]
    kinds = dict.fromkeys(name.split(".", 2)[2].rsplit(".", 2)[0] for name in own)
    entries: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.num_labels else "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "revision": None,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [part for kind in kinds for part in (PARTS[kind] if llama else [kind])],
        "fan_in_fan_out": not llama,  # GPT-2's layers in transformers are Conv1D
        "bias": "none",
        "modules_to_save": ["score"] if config.num_labels else None,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
    }
    metadata = {"format": "pt"} | ({} if sha256 is None else {HASH: sha256})
    if config.id2label is not None:
        metadata[LABELS] = json.dumps(dict(enumerate(config.id2label)))
    if (directory / CONFIG_FILE).exists():
        raise ValueError(f"{directory} holds a model, which readers prefer: name another directory")
    claim_directory(directory, overwrite=True)
    with atomic_paths(directory / WEIGHTS, directory / CONFIG) as files:
        write_tensors(files[0], stored, metadata)
        files[1].write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
