"""nanoGPT's token files: token ids as uint16, one after another, without a header.

Source: karpathy/nanoGPT, data/openwebtext/prepare.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gpt2c.files.atomic import atomic_path
from gpt2c.text.shards import MAGIC, StoredTokens, TokenArray, read_start, write_blocks

__all__ = ["open_nanogpt", "write_nanogpt"]


def open_nanogpt(path: str | os.PathLike[str]) -> StoredTokens:
    """Open a token file of nanoGPT; its tokens are read when they are needed.

    The format cannot be recognized, as it has no header: call this only if the user names it.

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : the file is empty, has an odd number of bytes, or starts as an llm.c shard
    """
    path = Path(path)
    header, size = read_start(path)
    if int.from_bytes(header[:4], "little") == MAGIC:
        raise ValueError(f"{path} has llm.c's header: it is not one of nanoGPT's token files")
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes; nanoGPT's token files have 2 for each token")
    return StoredTokens(path, 0, size // 2)


def write_nanogpt(path: Path, shards: Sequence[TokenArray | StoredTokens]) -> None:
    """Write the tokens of all shards into one file, as nanoGPT does: uint16 and no header.

    Raises
    ------
    OSError : the file cannot be written, or a shard cannot be read; an existing file is unchanged
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for tokens in shards:
            write_blocks(file, tokens, 0, len(tokens))
