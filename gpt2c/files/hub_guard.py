"""Guards of a download: a timeout for a silent hub, and a refusal of paths in its answers.

huggingface_hub (as of 2.4) requests listings without a timeout. It uses names from the server as
file names: the ETag for a blob, the commit for a listing, even if they are paths to elsewhere. It
has one client for the whole process, so a download cannot have its own. These checks therefore stay
on that client and look only at requests with this package's mark.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MARK", "guard"]

MARK = "gpt2c"  # in the User-Agent of each request that is guarded


def guard(client: Any) -> None:
    """Add the checks to huggingface_hub's client, unless it has them.

    Two threads may do so at once: a check that is added twice does no harm.
    """
    for hooks, check in (
        (client.event_hooks["request"], _check_request),
        (client.event_hooks["response"], _check_response),
    ):
        if check not in hooks:
            hooks.append(check)


def _is_ours(request: Any) -> bool:
    return MARK in request.headers.get("user-agent", "")


def _check_request(request: Any) -> None:
    from huggingface_hub import constants

    if not _is_ours(request):
        return
    if ".." in request.url.path.split("/"):
        raise ValueError(f"it names a path outside of itself, {request.url.path}")
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        step: limits.get(step) or constants.HF_HUB_DOWNLOAD_TIMEOUT
        for step in ("connect", "read", "write", "pool")
    }


def _check_response(response: Any) -> None:
    if _is_ours(response.request) and "x-repo-commit" in response.headers:
        for header in ("x-repo-commit", "x-linked-etag", "etag"):
            value = response.headers.get(header, "").removeprefix("W/")
            if "/" in value or "\\" in value or ".." in value:
                raise ValueError(f"it answers with a path where an identifier belongs, {value}")
