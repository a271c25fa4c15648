"""Tokenizer: text <-> token ids, by byte-pair encoding.

tiktoken encodes, rustbpe trains; this file joins them. There are three kinds of vocabulary and one
class: GPT-2's own, plain bytes (no merges), and one trained on the spot. How they are kept, so that
one directory serves gpt2c and transformers alike, is in tokenizer_files.py.

Knows nothing about models, token files or documents.
"""

from __future__ import annotations

import codecs
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from numpy.typing import NDArray

from gpt2c import hub, tokenizer_files

END_OF_TEXT = tokenizer_files.END_OF_TEXT
# How GPT-2 cuts text before any merge (openai/gpt-2:src/encoder.py): contractions, words, numbers,
# the rest, spaces.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NAMES = ("gpt2", "bytes")
# tiktoken and rustbpe match the pattern with a stack of about a million entries and panic beyond;
# stay well below.
_MAX_SPACES = 400_000
# tiktoken names a file in its cache by the SHA-1 of its address: GPT-2's encoder.json, vocab.bpe.
_GPT2_FILES = (
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
)
_PATIENCE = 30  # seconds for tiktoken's download of 1.5 MB, which itself would wait for ever


def _check_spaces(text: str) -> None:
    if len(text) >= _MAX_SPACES and re.search(rf"(?<!\s)\s{{{_MAX_SPACES}}}", text):
        raise ValueError(
            f"the text has a run of {_MAX_SPACES} or more whitespace characters, "
            "more than the tokenizer can split; shorten it"
        )


class Tokenizer:
    """A byte-level BPE vocabulary and what can be done with it.

    Usually made by `from_name`, `train`, `from_pretrained` or `from_spec`.

    Parameters
    ----------
    ranks : bytes of each token -> its id; the 256 single bytes, then merged tokens in the order of
        their merges
    eot : id of `<|endoftext|>`, the one id from 0 to len(ranks) that `ranks` leaves free
    merges : the halves of each merged token, in the order of their ids; None recovers them
        when the tokenizer is saved
    """

    def __init__(
        self, ranks: dict[bytes, int], eot: int, merges: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        self.eot = eot
        self.vocab_size = len(ranks) + 1
        self._ranks = ranks
        self._merges = merges
        self._tokens = [END_OF_TEXT.encode()] * self.vocab_size
        for token, token_id in ranks.items():
            self._tokens[token_id] = token
        self._encoding = tiktoken.Encoding(
            "gpt2c", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: eot}
        )

    @classmethod
    def from_name(cls, name: str) -> Tokenizer:
        """Make the tokenizer called `name`.

        Parameters
        ----------
        name : "gpt2" (50257 tokens) or "bytes" (256 bytes and `<|endoftext|>`). GPT-2's are looked
            for in tiktoken's cache (TIKTOKEN_CACHE_DIR), which keeps what tiktoken downloads, then
            in a directory called gpt2, then on the hub and in its cache

        Raises
        ------
        ValueError : unknown name
        OSError : GPT-2's vocabulary is in none of these places
        """
        if name == "bytes":
            return cls({bytes([byte]): byte for byte in range(256)}, eot=256)
        if name == "gpt2":
            return cls(*_gpt2())
        raise ValueError(f"unknown tokenizer {name!r}; known names are {', '.join(NAMES)}")

    @classmethod
    def from_spec(cls, spec: str) -> Tokenizer:
        """Make the tokenizer that a user names: "gpt2", "bytes", a directory, or one on the hub.

        Raises
        ------
        ValueError : none of these; "bpe:N", which must be trained on a text
        OSError : the vocabulary cannot be read or downloaded
        """
        if spec in NAMES:
            return cls.from_name(spec)
        if spec.startswith("bpe:"):
            raise ValueError(
                f"tokenizer {spec!r} must be trained on a text first: "
                f"`gpt2c prepare --tokenizer {spec}`"
            )
        if Path(spec).is_dir() or ("/" in spec and hub.is_name(spec)):
            return cls.from_pretrained(spec)
        raise ValueError(
            f"tokenizer {spec!r} is neither a directory nor one of {', '.join(NAMES)}, bpe:N, nor a"
            " name on the hub such as user/name"
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts`; the same texts in the same order give the same tokenizer.

        Parameters
        ----------
        texts : what to learn from
        vocab_size : tokens wanted: 256 bytes, `<|endoftext|>` (the last id), the rest merges. A
            text too small to give that many merges makes a smaller tokenizer.

        Raises
        ------
        ValueError : `vocab_size` is below 257; a whitespace run too long to split
        """
        if vocab_size < 257:
            raise ValueError(
                f"vocab_size is {vocab_size}; at least 257 are needed (256 bytes and {END_OF_TEXT})"
            )

        def checked() -> Iterator[str]:
            for text in texts:
                _check_spaces(text)
                yield text

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(checked(), vocab_size - 1, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        return cls(ranks, eot=len(ranks))

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | os.PathLike[str], revision: str | None = None
    ) -> Tokenizer:
        """Read the tokenizer of a directory, or of a model on the hub.

        Parameters
        ----------
        path_or_name : a directory with vocab.json and merges.txt, or tokenizer.json, written by
            `save_pretrained`, transformers or OpenAI; a model's file beside them; a checkpoint of a
            run, which has them; or a name, see `gpt2c.hub.find`
        revision : of a model on the hub

        Raises
        ------
        OSError : a file is missing or cannot be read or downloaded
        ValueError : a file is corrupt, asks for what tiktoken does not do, or two do not belong
            together
        """
        path = hub.find(path_or_name, revision, weights=False)
        directory = path.parent if path.is_file() else path
        return cls(*tokenizer_files.read(tokenizer_files.home(directory)))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `vocab.json`, `merges.txt` and `tokenizer_config.json`, which transformers loads.

        Raises
        ------
        OSError : the directory cannot be made or written; what was there before is intact
        """
        tokenizer_files.write(Path(directory), self._vocabulary())

    def _vocabulary(self) -> tokenizer_files.Vocabulary:
        if self._merges is None:
            self._merges = tokenizer_files.recover_merges(self._ranks)
        return tokenizer_files.Vocabulary(self._ranks, self.eot, self._merges)

    def vocab_and_merges(self) -> tuple[dict[str, int], list[str]]:
        """Give what `vocab.json` and `merges.txt` say, a printable character for each byte.

        Raises
        ------
        ValueError : a token cannot be made from those before it
        """
        return tokenizer_files.vocab_and_merges(self._vocabulary())

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids; "<|endoftext|>" in it is ordinary text, never the token."""
        _check_spaces(text)
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Iterable[str]) -> list[NDArray[np.uint32]]:
        """Encode many texts in parallel; each gives an array of the ids that `encode` gives."""

        def encode_one(text: str) -> NDArray[np.uint32]:
            _check_spaces(text)
            return self._encoding.encode_to_numpy(text, disallowed_special=())

        with ThreadPoolExecutor(
            os.cpu_count()
        ) as pool:  # tiktoken works outside the interpreter's lock
            return list(pool.map(encode_one, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        Raises
        ------
        ValueError : an id outside the vocabulary
        """
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` piece by piece, each as soon as its characters are complete.

        A character may span several tokens. All pieces joined are what `decode` gives.

        Raises
        ------
        ValueError : an id outside the vocabulary
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            if piece := decoder.decode(self.token_bytes(token_id)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    @property
    def token_lengths(self) -> NDArray[np.int64]:
        """Bytes of text in each token, (V,) int64; 0 for `<|endoftext|>`. For bits per byte."""
        lengths = np.array([len(token) for token in self._tokens], dtype=np.int64)
        lengths[self.eot] = 0
        return lengths

    def token_bytes(self, token_id: int) -> bytes:
        """Give the bytes that a token stands for.

        Raises
        ------
        ValueError : an id outside the vocabulary
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1})"
            )
        return self._tokens[token_id]


def tiktoken_cache() -> tuple[Path | None, bool]:
    """Give the directory where tiktoken keeps files, if any, and whether GPT-2's are there."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder == "":
        return None, False
    cache = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    return cache, all((cache / name).is_file() for name in _GPT2_FILES)


def _gpt2() -> tuple[dict[bytes, int], int]:
    """Give GPT-2's own vocabulary and the id of `<|endoftext|>`.

    What is on this machine comes first, tiktoken's cache and then a directory; then the network.
    """
    reason = "HF_HUB_OFFLINE is set"
    if tiktoken_cache()[1] or not (Path("gpt2").is_dir() or hub.is_offline()):
        try:
            encoding = _from_tiktoken()
            eot = encoding.eot_token
            return {encoding.decode_single_token_bytes(token): token for token in range(eot)}, eot
        except (OSError, ValueError) as error:  # no network, no permission; or not the file
            reason = type(error).__name__
    try:
        ranks, eot, _ = tokenizer_files.read(hub.find("gpt2", weights=False))
    except (OSError, ValueError) as error:
        if Path("gpt2").is_dir():
            raise
        raise OSError(
            "GPT-2's vocabulary is not in tiktoken's cache (TIKTOKEN_CACHE_DIR says where), which"
            f" could not download it ({reason}), and not to be had from the hub ({error}); name a"
            " directory with its vocab.json and merges.txt, or choose the tokenizer 'bytes' or"
            " 'bpe:4096', which need no download"
        ) from error
    if (len(ranks), eot) != (50256, 50256):
        raise ValueError(f"gpt2 has {len(ranks) + 1} tokens where GPT-2 has 50257")
    return ranks, eot


def _from_tiktoken() -> tiktoken.Encoding:
    """Let tiktoken read or download GPT-2's vocabulary, but no longer than `_PATIENCE`."""
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
