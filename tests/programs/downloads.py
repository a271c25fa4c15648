"""Downloads: single ones, all that a model's readers need, and two at once."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import huggingface_hub

import gpt2c
from gpt2c.files import hub
from programs.common import in_child, main


def answers() -> None:
    """Answer the question of each line in a child, which has imported the client already."""
    _ = huggingface_hub.snapshot_download
    for line in sys.stdin:
        in_child(find, line)


def find(question: str) -> bool:
    """Call hub.find with keywords in JSON; print its path, or its error's name and message."""
    try:
        found = ["", str(hub.find(**json.loads(question)))]
    except (OSError, ValueError) as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps(found), flush=True)
    return True


def read(repo: str) -> None:
    """Read a model in every way, and print something of each."""
    generator = gpt2c.Generator.from_pretrained(repo)
    print(generator.generate("hello", max_new_tokens=4, temperature=0))
    print(gpt2c.GPT2.from_pretrained(repo, quantize="int8").weights)
    print(gpt2c.from_pretrained(repo, quantize="fp16").weights)
    print(gpt2c.Tokenizer.from_pretrained(repo).vocab_size)


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
