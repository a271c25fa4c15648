"""GPT-2's own vocabulary: from tiktoken's cache, a directory gpt2, a download, or the hub."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import tiktoken

from gpt2c.files import hub
from gpt2c.text import vocabulary_reader

__all__ = ["read_gpt2", "tiktoken_cache"]

# tiktoken names a file in its cache by the SHA-1 of its URL: GPT-2's encoder.json and vocab.bpe.
_FILES = (
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
)
_PATIENCE = 30  # seconds for tiktoken's download of 1.5 MB, which has no timeout of its own


def tiktoken_cache() -> tuple[Path | None, bool]:
    """Return the directory where tiktoken keeps files, if any, and whether GPT-2's are there."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder == "":
        return None, False
    cache = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    return cache, all(
        os.path.isfile(path) and os.access(path, os.R_OK)  # False also without permission
        for path in (cache / name for name in _FILES)
    )


def read_gpt2() -> tuple[dict[bytes, int], int]:
    """Return GPT-2's own vocabulary and the id of `<|endoftext|>`.

    Files of this machine come first, in tiktoken's cache or a directory gpt2, then the network.
    """
    why = "HF_HUB_OFFLINE is set"
    if tiktoken_cache()[1] or not (os.path.isdir("gpt2") or hub.is_offline()):
        try:
            encoding = _from_tiktoken()
            eot = encoding.eot_token
            return {encoding.decode_single_token_bytes(token): token for token in range(eot)}, eot
        except (OSError, ValueError) as error:  # no network, no permission, or a wrong file
            why = type(error).__name__
    try:
        ranks, eot, *_ = vocabulary_reader.read(hub.find("gpt2", weights=False))
    except (OSError, ValueError) as error:
        if os.path.isdir("gpt2"):
            raise
        raise OSError(
            "choose the tokenizer 'bytes' or 'bpe:4096', or name a directory with GPT-2's"
            " vocab.json and merges.txt: they are not in tiktoken's cache (TIKTOKEN_CACHE_DIR), and"
            f" neither tiktoken ({why}) nor the hub ({type(error).__name__}) delivered them"
        ) from error
    if (len(ranks), eot) != (50256, 50256):
        raise ValueError(f"gpt2 has {len(ranks) + 1} tokens where GPT-2 has 50257")
    return ranks, eot


def _from_tiktoken() -> tiktoken.Encoding:
    """Return GPT-2's vocabulary, which tiktoken reads or downloads, within `_PATIENCE` seconds."""
    done: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            done.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    result = done[0] if done else TimeoutError(f"no answer within {_PATIENCE} seconds")
    if isinstance(result, Exception):
        raise result
    return result
