"""Two downloads at once: the guard holds for the second one, for which the hub sends a bad hash."""

from __future__ import annotations

import threading
from typing import Any

import huggingface_hub

from gpt2c.files import hub
from programs.common import main


def two(repo: str, other_repo: str, url: str) -> None:
    """Download two models; the first begins first, and ends while the second goes on.

    Print the name of the first one's directory, the error of the second one, and the status of a
    request of this program's own.
    """
    begun, done = threading.Event(), threading.Event()

    def find_other() -> None:
        try:
            hub.find(other_repo)
        except (OSError, ValueError) as error:
            print(type(error).__name__, error)

    other = threading.Thread(target=find_other)

    def wait(request: Any) -> None:
        if repo in request.url.path and not begun.is_set():
            other.start()
            assert begun.wait(30)
        elif other_repo in request.url.path:
            begun.set()
            assert done.wait(30)

    def lie(response: Any) -> None:
        if other_repo in response.request.url.path:
            response.headers["etag"] = "../../../../evil"

    session = huggingface_hub.get_session()
    own = [*session.event_hooks["request"], wait]
    session.event_hooks = {"request": own, "response": [lie]}
    print(hub.find(repo).name)
    done.set()
    other.join()
    response = session.get(f"{url}/{other_repo}/resolve/main/config.json")
    print(response.status_code)


if __name__ == "__main__":
    main(globals())
