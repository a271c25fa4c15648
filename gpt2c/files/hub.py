"""Find a model's directory by name: a path on this machine, or a model of the Hugging Face hub.

This module chooses the files, and gpt2c.files.hub_client downloads them.

Knows nothing about what the files contain; their readers treat them as untrusted.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpt2c.files import hub_client
from gpt2c.files.names import (
    ADDED_FILE,
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    MERGES_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
    WEIGHTS_FILE,
    check_named,
)

__all__ = ["find", "hidden", "is_name", "is_offline"]

NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
CONFIG = [CONFIG_FILE, GENERATION_FILE]
WEIGHTS = [WEIGHTS_FILE, INDEX_FILE, f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"]
TOKENIZER = [VOCAB_FILE, MERGES_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, ADDED_FILE]
TOKENIZER += [CHAT_TEMPLATE_FILE]


def is_name(source: str) -> bool:
    """Return whether a model on the hub could have this name."""
    return NAME.fullmatch(source) is not None


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids the network, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hidden(directory: Path) -> str:
    """Return the end of an error about a directory that lacks a file: it hides a hub model."""
    name = str(directory)
    if not is_name(name) or (directory / CONFIG_FILE).exists():  # it is a model, without more
        return ""
    return f"; the directory {name} here hides a model of that name on the hub"


def find(source: str | os.PathLike[str], revision: str | None = None, weights: bool = True) -> Path:
    """Return the path of a model, which is downloaded if necessary.

    Parameters
    ----------
    source : a path, which is returned unchanged; or, if no such path exists, a name on the hub:
        gpt2, openai-community/gpt2-medium. Only a str can be a name
    revision : a branch, tag or commit on the hub
    weights : False downloads only the tokenizer

    Returns
    -------
    a path that exists; if `source` cannot be a name, also one that does not: its reader refuses it

    Raises
    ------
    OSError : the hub has no such model or no safetensors of it; the hub cannot be reached and the
        cache lacks the model; huggingface_hub is not installed
    ValueError : `revision` is given for a path, or `source` is empty or no valid name, or the hub's
        answer is invalid
    """
    check_named("the name of the model", source)
    path = Path(source)
    if os.path.lexists(path) or not isinstance(source, str) or not is_name(source):
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for a name on the hub; {path} is a path")
        return path
    wanted = CONFIG * weights + WEIGHTS * weights + TOKENIZER
    directory = Path(hub_client.download(source, revision, wanted))
    if weights and not ((directory / WEIGHTS_FILE).exists() or (directory / INDEX_FILE).exists()):
        raise FileNotFoundError(
            f"{source} has no {WEIGHTS_FILE} on the hub; weights are read from safetensors, never"
            " from pickles such as pytorch_model.bin"
        )
    return directory
