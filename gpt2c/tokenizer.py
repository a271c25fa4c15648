"""Tokenizer: text <-> token ids, by byte-pair encoding in GPT-2's own file format.

tiktoken encodes, rustbpe trains; this file joins them and reads and writes `vocab.json` and
`merges.txt`, so that one directory serves gpt2c and transformers alike. There are three kinds of
vocabulary and one class: GPT-2's own, plain bytes (no merges), and one trained on the spot.

Knows nothing about models, token files or documents.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from numpy.typing import NDArray

from gpt2c import files

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before any merge (openai/gpt-2:src/encoder.py): contractions, words, numbers,
# the rest, spaces.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NAMES = ("gpt2", "bytes")
# tiktoken and rustbpe match the pattern with a stack of about a million entries and panic beyond;
# stay well below.
_MAX_SPACES = 400_000


def _byte_characters() -> list[str]:
    """One printable character for each byte, as in openai/gpt-2:src/encoder.py:bytes_to_unicode."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def _to_characters(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _to_bytes(characters: str) -> bytes:
    return bytes(_BYTES[character] for character in characters)


def _merge_everywhere(parts: list[bytes], first: bytes, second: bytes) -> list[bytes]:
    """Join each `first` that is followed by `second`, from left to right."""
    merged = []
    i = 0
    while i < len(parts):
        width = 2 if parts[i : i + 2] == [first, second] else 1
        merged.append(b"".join(parts[i : i + width]))
        i += width
    return merged


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Recover the merge that made `token`: what its bytes come to under all earlier merges.

    Raises
    ------
    ValueError : no sequence of earlier merges leads to `token`
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        first, second = min(pairwise(parts), key=lambda pair: ranks.get(pair[0] + pair[1], limit))
        if ranks.get(first + second, limit) >= limit:
            raise ValueError(f"token {limit} ({token!r}) cannot be made from the tokens before it")
        parts = _merge_everywhere(parts, first, second)
    return parts[0], parts[1]


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All merges, in the order in which they apply."""
    return [
        _halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    ]


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
    """

    def __init__(self, ranks: dict[bytes, int], eot: int) -> None:
        self.eot = eot
        self.vocab_size = len(ranks) + 1
        self._ranks = ranks
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
        name : "gpt2" (50257 tokens; tiktoken downloads them once) or "bytes" (256 bytes and
            `<|endoftext|>`)

        Raises
        ------
        ValueError : unknown name
        OSError : GPT-2's vocabulary is neither in tiktoken's cache nor to be downloaded
        """
        if name == "bytes":
            return cls({bytes([byte]): byte for byte in range(256)}, eot=256)
        if name == "gpt2":
            try:
                encoding = tiktoken.get_encoding("gpt2")
            except (
                OSError,
                ValueError,
            ) as error:  # no network, no permission; or a download that is not the file
                raise OSError(
                    "GPT-2's vocabulary is not cached and could not be downloaded "
                    f"({type(error).__name__}); point TIKTOKEN_CACHE_DIR to a directory that holds "
                    "it, or choose the tokenizer 'bytes' or 'bpe:4096', which need no download"
                ) from error
            eot = encoding.eot_token
            return cls(
                {encoding.decode_single_token_bytes(token_id): token_id for token_id in range(eot)},
                eot,
            )
        raise ValueError(f"unknown tokenizer {name!r}; known names are {', '.join(NAMES)}")

    @classmethod
    def from_spec(cls, spec: str) -> Tokenizer:
        """Make the tokenizer that a user names: "gpt2", "bytes" or a directory.

        Raises
        ------
        ValueError : neither a known name nor a directory; "bpe:N", which must be trained on a text
        OSError : the vocabulary cannot be read or downloaded
        """
        if spec in NAMES:
            return cls.from_name(spec)
        if spec.startswith("bpe:"):
            raise ValueError(
                f"tokenizer {spec!r} must be trained on a text first: "
                f"`gpt2c prepare --tokenizer {spec}`"
            )
        if Path(spec).is_dir():
            return cls.from_pretrained(spec)
        raise ValueError(
            f"tokenizer {spec!r} is neither a directory nor one of {', '.join(NAMES)}, bpe:N"
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
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read `vocab.json` and `merges.txt`, written by `save_pretrained`, transformers or OpenAI.

        Raises
        ------
        OSError : a file is missing or cannot be read
        ValueError : a file is corrupt, or the two do not belong together
        """
        vocab_path, merges_path = Path(directory) / "vocab.json", Path(directory) / "merges.txt"
        ranks, eot = _read_vocabulary(vocab_path)
        merges = _read_merges(merges_path)
        made = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) != 1]
        if made != [first + second for first, second in merges]:
            raise ValueError(
                f"{merges_path} does not make the tokens of {vocab_path} in the order of "
                "their ids; take both files from one tokenizer"
            )
        known = {bytes([byte]) for byte in range(256)}
        for line, (first, second) in enumerate(merges, start=1):
            if first not in known or second not in known:
                raise ValueError(
                    f"{merges_path}: merge {line} uses a token that no earlier merge has made"
                )
            known.add(first + second)
        return cls(ranks, eot)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `vocab.json`, `merges.txt` and `tokenizer_config.json`, which transformers loads.

        Raises
        ------
        OSError : the directory cannot be made or written
        """
        directory = Path(directory)
        vocabulary, merges = self.vocab_and_merges()
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        }
        contents = {
            "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, content in contents.items():
            with files.atomic_path(directory / name) as temporary:
                temporary.write_bytes(content.encode())

    def vocab_and_merges(self) -> tuple[dict[str, int], list[str]]:
        """Give what `vocab.json` and `merges.txt` say, a printable character for each byte.

        Raises
        ------
        ValueError : a token cannot be made from those before it
        """
        tokens = [*map(_to_characters, self._tokens)]
        tokens[self.eot] = END_OF_TEXT
        pairs = _merges(self._ranks)
        merges = [f"{_to_characters(first)} {_to_characters(second)}" for first, second in pairs]
        return {token: token_id for token_id, token in enumerate(tokens)}, merges

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


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; a tokenizer is a vocab.json and a merges.txt"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None


def _read_vocabulary(path: Path) -> tuple[dict[bytes, int], int]:
    """Read and check `vocab.json`: (bytes of each token -> id, id of `<|endoftext|>`)."""
    vocabulary = files.parse_json(_read(path), str(path))
    if any(type(token_id) is not int for token_id in vocabulary.values()):
        raise ValueError(f"{path} must be one JSON object of tokens and their ids")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(
            f"{path} must number its {len(vocabulary)} tokens from 0 to {len(vocabulary) - 1}, "
            "each once"
        )
    if END_OF_TEXT not in vocabulary:
        raise ValueError(f"{path} has no {END_OF_TEXT}")
    eot = vocabulary.pop(END_OF_TEXT)
    try:
        ranks = {_to_bytes(token): token_id for token, token_id in vocabulary.items()}
    except KeyError as error:
        raise ValueError(f"{path} has a character that stands for no byte: {error}") from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path} lacks {len(missing)} of the 256 single bytes, the first of them {missing[0]}"
        )
    return ranks, eot


def _read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    """Read `merges.txt`: after a version line, two halves on each line."""
    lines = _read(path).removesuffix("\n").split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        if number == 1 and line.startswith("#version"):
            continue
        try:
            first, second = map(_to_bytes, line.split(" "))
        except (KeyError, ValueError):
            raise ValueError(
                f"{path}, line {number}: two tokens separated by a space are wanted"
            ) from None
        merges.append((first, second))
    return merges
