"""Names of models into directories: a path on this machine, or a model of the Hugging Face hub.

huggingface_hub (extra `[hub]`) downloads and keeps what it has; HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE are its own. Here: which files are wanted, and what a failure means, in a sentence.

Knows nothing about what is in the files: they are a stranger's, and read as such.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gpt2c.files.hub_guard import MARK, guard
from gpt2c.files.names import (
    ADDED_FILE,
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


def is_name(source: str) -> bool:
    """Return whether a model on the hub could be called so."""
    return NAME.fullmatch(source) is not None


def is_offline() -> bool:
    """Return whether the user wants no network: HF_HUB_OFFLINE, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hidden(directory: Path) -> str:
    """Return the rest of a sentence about a directory that lacks a file: which name it hides."""
    name = str(directory)
    if not is_name(name):
        return ""
    return f"; the directory {name} here hides a model of that name on the hub"


def find(source: str | os.PathLike[str], revision: str | None = None, weights: bool = True) -> Path:
    """Return the path of a model, downloaded if it must be.

    Parameters
    ----------
    source : a path, which is given back as it is; or, where there is none, a name on the hub: gpt2,
        openai-community/gpt2-medium. Only a str can be a name
    revision : a branch, tag or commit on the hub
    weights : False leaves the weights there, for who wants the tokenizer

    Returns
    -------
    a path that exists; or, of what can be no name, one that does not: its reader says what it wants

    Raises
    ------
    OSError : the hub has no such model or no safetensors of it, or cannot be reached and the cache
        does not have it; huggingface_hub is not installed
    ValueError : a revision of what is not on the hub, or a name (an empty one, say) or an answer
        that cannot be
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
    except (ImportError, AttributeError):  # not there, or of before 1.0
        raise FileNotFoundError(
            f"{_absent(source)}, and to fetch a model of that name from the hub huggingface_hub"
            " 1.24 or newer is needed: pip install 'gpt2c[hub]'"
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
    except Exception as error:  # its HTTP library's are neither OSError nor ValueError
        raise _explain(error, source, revision) from error
    if weights and not ((directory / WEIGHTS_FILE).exists() or (directory / INDEX_FILE).exists()):
        raise FileNotFoundError(
            f"{source} has no {WEIGHTS_FILE} on the hub; weights are read from safetensors, never"
            " from pickles such as pytorch_model.bin"
        )
    return directory


def _absent(source: str) -> str:
    """Return how an error begins where the hub has not answered that there is such a model.

    It may be a path that was meant, with a slip in it.
    """
    return f"the file or directory {source} does not exist here"


def _bar() -> Any:
    """Return the client's progress bar, shown only where a person is watching."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{"disable": None} | settings)

    return Bar


def _explain(error: Exception, source: str, revision: str | None) -> Exception:
    """Turn what the client raised into one sentence."""
    from huggingface_hub import constants, errors

    absent, hub, cause = _absent(source), constants.ENDPOINT, error
    missing = isinstance(error, errors.LocalEntryNotFoundError)
    if missing and constants.HF_HUB_OFFLINE:
        return FileNotFoundError(
            f"{absent}, HF_HUB_OFFLINE is set, and what is wanted of a model of that name is not in"
            f" the cache, {constants.HF_HUB_CACHE}"
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
    reason = re.split(r"\n|\. ", str(cause).strip())[0].rstrip(".") or type(cause).__name__
    if status := getattr(getattr(cause, "response", None), "status_code", None):
        reason = f"it answers {status}"
        if status == 401:
            return PermissionError(
                f"{absent}, and the hub, {hub}, does not know the token (HF_TOKEN) it was sent"
            )
    if missing:
        return ConnectionError(
            f"{absent}, and the hub, {hub}, cannot give a model of that name: {reason}"
        )
    if isinstance(cause, ValueError):
        return ValueError(f"{absent}, nor is there such a model on the hub, {hub}: {reason}")
    if isinstance(cause, OSError) and cause.errno is not None:  # a full disk, no permission
        return cause
    return OSError(
        f"{absent}, and a model of that name cannot be downloaded from the hub, {hub}: {reason}"
    )
