"""A stand-in for the hub on the loopback interface: the requests of huggingface_hub, and faults.

GET  /api/models/{repo}/revision/{revision}        the commit, and the names of its files
GET  /api/models/{repo}/tree/{commit}              names, sizes and hashes
HEAD, GET /{repo}/resolve/{revision}/{file}        X-Repo-Commit, ETag, size; the file, or a part
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StandIn:
    """Repositories, faults, and the requests so far.

    files : repository -> name -> content, the same for every revision
    private : repository -> the token that opens it
    gated : repositories whose access must be requested
    cut : name -> bytes of a file after which the connection breaks, once for each number
    short : names of files that lack their last byte
    status : the status of every answer, if not 0
    silent : whether to accept connections and not answer while a test lasts
    commit, etag : the identifiers in answers, which may be malicious; etag None is the right one
    requests : method, path and headers of each request, header names in small letters
    """

    files: dict[str, dict[str, bytes]]
    private: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, list[int]] = field(default_factory=dict)
    short: set[str] = field(default_factory=set)
    status: int = 0
    silent: bool = False
    commit: str = COMMIT
    etag: str | None = None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def asked(self, method: str, part: str = "") -> list[str]:
        """Return the paths of this method's requests that contain `part`."""
        return [path for verb, path, _ in self.requests if verb == method and part in path]


@contextmanager
def serve(hub: StandIn) -> Iterator[StandIn]:
    """Serve on a port that the system chooses."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Write no log."""

        def do_GET(self) -> None:
            _answer(hub, self)

        def do_HEAD(self) -> None:
            _answer(hub, self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(hub: StandIn, request: BaseHTTPRequestHandler) -> None:
    path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
    headers = {name.lower(): value for name, value in request.headers.items()}
    hub.requests.append((request.command, path, headers))
    if hub.silent:
        time.sleep(30)
    if hub.status:
        return _send(request, hub.status, b"{}")
    if found := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/(revision|tree)/(.+)", path):
        repo, kind, revision = found.groups()
        name = None
    elif found := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.*)", path, re.DOTALL):
        repo, revision, name = found.groups()
        kind = "file"
    else:
        return _send(request, 404, b"{}")
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token == "wrong":
        message = "Invalid credentials in Authorization header"
        return _send(request, 401, b"{}", {"X-Error-Message": message})
    if repo not in hub.files or (repo in hub.private and token != hub.private[repo]):
        return _send(request, 401 if not token else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
    if repo in hub.gated:
        return _send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"})
    if revision not in ("main", "v1", hub.commit):
        return _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    files = hub.files[repo]
    if kind == "revision":
        siblings = [{"rfilename": each} for each in files]
        return _send_json(request, {"id": repo, "sha": hub.commit, "siblings": siblings})
    if kind == "tree":
        return _send_json(request, [_entry(each, content) for each, content in files.items()])
    if name not in files:
        return _send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
    content, headers = files[name], {"X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
    headers["ETag"] = f'"{hub.etag or hashlib.sha1(content).hexdigest()}"'
    if len(content) > 1000:  # as the hub answers for files in large storage
        headers["X-Linked-Size"] = str(len(content))
        headers["X-Linked-ETag"] = f'"{hub.etag or hashlib.sha256(content).hexdigest()}"'
    if name in hub.short:
        content = content[:-1]
    first = 0
    if part := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
        first = int(part[1])
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
    size = None
    if request.command == "GET" and hub.cut.get(name):
        size = hub.cut[name].pop(0)
    _send(request, 206 if first else 200, content[first:], headers, size)


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if len(content) > 1000:
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return entry


def _send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    headers: dict[str, str] | None = None,
    size: int | None = None,
) -> None:
    """Send an answer; with `size` send that many bytes of its content and hang up."""
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content[:size])
    if size is not None:
        request.close_connection = True
