"""Learn the tokens of a BPE from texts, with rustbpe.

Neither Ctrl-C nor a MemoryError interrupts rustbpe, so a larger text is learned in a process of its
own, which can be killed. Python runs only this file there, not the package, to start fast. Knows
nothing about the use of the tokens.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain

import rustbpe

__all__ = ["learn"]

_SMALL = 100_000  # characters that are learned in this process, in at most half a second
_BUFFER = 16  # texts that rustbpe keeps before it counts their words


def learn(texts: Iterable[str], count: int, pattern: str) -> list[bytes]:
    """Return at most `count` learned tokens, at least the 256 single bytes, in the order of ids.

    Parameters
    ----------
    texts : texts to learn from, a few ten thousand characters each
    pattern : the regular expression that cuts text before any merge

    Raises
    ------
    MemoryError : the texts have more different words than memory can hold
    """
    texts = iter(texts)
    small, size = [], 0
    for text in texts:
        small.append(text)
        size += len(text)
        if size > _SMALL:
            return _learn_apart(chain(small, texts), count, pattern)
    return _learn(small, count, pattern)


def _learn(texts: Iterable[str], count: int, pattern: str) -> list[bytes]:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), count, buffer_size=_BUFFER, pattern=pattern)
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    return [token for _, token in ranks]


def _learn_apart(texts: Iterable[str], count: int, pattern: str) -> list[bytes]:
    command = [sys.executable, "-P", __file__, str(count), pattern]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches only this process, which kills the other
    )
    assert process.stdin
    try:
        with suppress(BrokenPipeError):  # the process has ended; the reason is seen below
            for text in texts:
                content = text.encode()
                process.stdin.write(len(content).to_bytes(4, "little") + content)
            process.stdin.flush()
        out, complaint = process.communicate()
    except BaseException:
        process.kill()
        process.communicate()
        raise
    if process.returncode < 0 or b"MemoryError" in complaint:  # Rust aborts when memory runs out
        raise MemoryError(
            "learning a tokenizer of this text takes more memory than is free; choose bytes or gpt2"
        )
    if process.returncode:
        raise RuntimeError(f"learning the tokenizer failed: {complaint.decode(errors='replace')}")
    return [bytes.fromhex(line) for line in out.decode().split()]


def _main() -> None:
    """Read texts, each after its length, from standard input; print tokens in hexadecimal."""

    def texts() -> Iterator[str]:
        while length := int.from_bytes(sys.stdin.buffer.read(4), "little"):
            yield sys.stdin.buffer.read(length).decode()

    for token in _learn(texts(), int(sys.argv[1]), sys.argv[2]):
        print(token.hex())


if __name__ == "__main__":
    _main()
