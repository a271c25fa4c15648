"""Download a model from the hub, with an HTTP client of our own: in a process of our own.

huggingface_hub (extra `[hub]`) downloads and caches files; it obeys HF_HOME, HF_ENDPOINT, HF_TOKEN
and HF_HUB_OFFLINE. As of 2.4 it requests listings without a timeout, and uses names from the server
as file names: the ETag for a blob, the commit for a listing, even if they are paths to elsewhere.
It has one client for a process, which other code of a program may use. So a download has a process
of its own, with a client that checks both.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["download", "serve"]

START = (  # of a terminal's Ctrl-C the other process decides
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys;"
    " sys.path[:] = sys.argv[2:]; from gpt2c.files.hub_client import serve; serve()"
)
PACKAGES = str(Path(__file__).resolve().parents[2])  # where this package is


# ---- this process --------------------------------------------------------------------------------


def download(source: str, revision: str | None, patterns: list[str]) -> str:
    """Return the directory with a hub's model, whose files are downloaded or in the cache.

    Parameters
    ----------
    source : the model's name
    revision : a branch, tag or commit; None is main
    patterns : of the names of the files that are wanted

    Raises
    ------
    OSError, ValueError : see `gpt2c.files.hub.find`
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError(
            f"{_absent(source)}, and only Python downloads a model of that name, which this program"
            " has inside of it: pass a directory"
        )
    question = json.dumps([os.getpid(), source, revision, patterns])
    # a relative path may lead elsewhere by now, or to files that nobody meant to import
    paths = [*filter(os.path.isabs, sys.path), PACKAGES]
    command = [sys.executable, "-I", "-c", START, question, *paths]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            answer = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    if not answer:
        raise OSError(
            f"{_absent(source)}, and the download of a model of that name ended without an answer"
        )
    directory, error, arguments = json.loads(answer)
    if error:
        raise getattr(builtins, error)(*arguments)
    return str(directory)


# ---- the process of a download -------------------------------------------------------------------


def serve() -> None:
    """Answer the question on the command line in JSON: with a directory, or an error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    parent, *question = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        answer: list[Any] = [_download(*question), None, []]
    except Exception as error:
        answer = [None, *_as_builtin(error)]
    print(json.dumps(answer), file=answers, flush=True)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _as_builtin(error: Exception) -> tuple[str, list[Any]]:
    """Return the name and arguments of a MemoryError, ValueError or OSError that says the same."""
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        if error.errno is not None:
            file = error.filename and str(error.filename)
            return type(error).__name__, [error.errno, error.strerror, file]
        return type(error).__name__, [str(error)]
    for kind in (MemoryError, ValueError):
        if isinstance(error, kind):
            return kind.__name__, [str(error)]
    return "OSError", [str(error)]


def _download(source: str, revision: str | None, patterns: list[str]) -> str:
    try:
        from huggingface_hub import get_session, set_client_factory, snapshot_download
    except ImportError:  # not installed, or older than 1.0
        raise FileNotFoundError(
            f"{_absent(source)}; if it is the name of a model on the hub, its download needs"
            " huggingface_hub 1.24 or newer: pip install 'gpt2c[hub]'"
        ) from None
    try:
        usual = get_session()
        checks = {"request": [*usual.event_hooks["request"], _check_request]}
        checks["response"] = [*usual.event_hooks["response"], _check_response]
        set_client_factory(
            lambda: type(usual)(event_hooks=checks, follow_redirects=True, timeout=None)
        )
        return str(
            snapshot_download(
                source,
                revision=revision,
                user_agent="gpt2c",
                allow_patterns=patterns,
                tqdm_class=_bar(),
            )
        )
    except MemoryError:
        raise
    except Exception as error:  # errors of its HTTP library are neither OSError nor ValueError
        raise _explain(error, source, revision) from error


def _check_request(request: Any) -> None:
    from huggingface_hub import constants

    if ".." in request.url.path.split("/"):
        raise ValueError(f"it names a path outside of itself, {request.url.path}")
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        step: limits.get(step) or constants.HF_HUB_DOWNLOAD_TIMEOUT
        for step in ("connect", "read", "write", "pool")
    }


def _check_response(response: Any) -> None:
    if "x-repo-commit" in response.headers:
        for header in ("x-repo-commit", "x-linked-etag", "etag"):
            value = response.headers.get(header, "").removeprefix("W/")
            if "/" in value or "\\" in value or ".." in value:
                raise ValueError(f"it answers with a path where an identifier belongs, {value}")


def _bar() -> Any:
    """Return the class of the client's progress bar, shown on a terminal only."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{"disable": None} | settings)

    return Bar


def _absent(source: str) -> str:
    """Return the start of an error about a model that the hub did not confirm.

    The user may have meant a path and mistyped it.
    """
    return f"the file or directory {source} does not exist here"


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
    if type(cause).__module__ == "builtins" and getattr(cause, "errno", None) is not None:
        return cause  # a full disk, no permission
    return OSError(
        f"{absent}, and a model of that name cannot be downloaded from the hub, {hub}: {reason}"
    )
