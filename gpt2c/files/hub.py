"""Find a model's directory by name: a path on this machine, or a model of the Hugging Face hub.

huggingface_hub (extra `[hub]`) downloads and caches files; it obeys HF_HOME, HF_ENDPOINT, HF_TOKEN
and HF_HUB_OFFLINE. This module chooses the files and explains a failure in one sentence.

Knows nothing about what the files contain; their readers treat them as untrusted.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gpt2c.files.hub_guard import MARK, guard
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
    try:
        import huggingface_hub

        client = huggingface_hub.get_session()
    except (ImportError, AttributeError):  # not installed, or older than 1.0
        raise FileNotFoundError(
            f"{_absent(source)}; if it is the name of a model on the hub, its download needs"
            " huggingface_hub 1.24 or newer: pip install 'gpt2c[hub]'"
        ) from None
    wanted = CONFIG * weights + WEIGHTS * weights + TOKENIZER
    try:
        guard(client)
        directory = Path(
            huggingface_hub.snapshot_download(
                source,
                revision=revision,
                user_agent=MARK,
                allow_patterns=wanted,
                tqdm_class=_bar(),
            )
        )
    except MemoryError:
        raise
    except Exception as error:  # errors of its HTTP library are neither OSError nor ValueError
        raise _explain(error, source, revision) from error
    if weights and not ((directory / WEIGHTS_FILE).exists() or (directory / INDEX_FILE).exists()):
        raise FileNotFoundError(
            f"{source} has no {WEIGHTS_FILE} on the hub; weights are read from safetensors, never"
            " from pickles such as pytorch_model.bin"
        )
    return directory


def _absent(source: str) -> str:
    """Return the start of an error about a model that the hub did not confirm.

    The user may have meant a path and mistyped it.
    """
    return f"the file or directory {source} does not exist here"


def _bar() -> Any:
    """Return the class of the client's progress bar, shown on a terminal only."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{"disable": None} | settings)

    return Bar


def _explain(error: Exception, source: str, revision: str | None) -> Exception:
    """Return an error of one sentence for an error that the client raised."""
    from huggingface_hub import constants, errors

    absent, hub, cause = _absent(source), constants.ENDPOINT, error
    missing = isinstance(error, errors.LocalEntryNotFoundError)
    if missing and constants.HF_HUB_OFFLINE:
        return FileNotFoundError(
            f"{absent}, HF_HUB_OFFLINE is set, and the cache, {constants.HF_HUB_CACHE}, lacks files"
            " of a model of that name"
        )
    if missing and isinstance(error.__cause__, Exception):
        cause = error.__cause__
    if isinstance(cause, errors.GatedRepoError):
        return PermissionError(
            f"{source} is gated: ask for access at {hub}/{source}, then set HF_TOKEN"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{absent}, nor is {source} a model on the hub, {hub}, that may be read: a private one"
            " needs HF_TOKEN"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{source} has no revision {revision or 'main'} on the hub, {hub}")
    said = re.sub(r"\[Errno -?\d+\] ", "", str(cause).strip())
    reason = re.split(r"\n|\. ", said)[0].rstrip(".") or type(cause).__name__
    if status := getattr(getattr(cause, "response", None), "status_code", None):
        reason = f"it answers {status}"
        if status == 401:
            return PermissionError(
                f"{absent}, and the hub, {hub}, does not know the token (HF_TOKEN) it was sent"
            )
    if missing:
        return ConnectionError(
            f"{absent}, and the hub, {hub}, did not deliver a model of that name: {reason}"
        )
    if isinstance(cause, ValueError):
        return ValueError(f"{absent}, nor is there such a model on the hub, {hub}: {reason}")
    if isinstance(cause, OSError) and cause.errno is not None:  # a full disk, no permission
        return cause
    return OSError(
        f"{absent}, and a model of that name cannot be downloaded from the hub, {hub}: {reason}"
    )
