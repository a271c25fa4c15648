"""Tokenizer: text <-> token ids, by byte-pair encoding.

tiktoken encodes and rustbpe trains; this module joins them. One class has three kinds of
vocabulary: GPT-2's own, plain bytes (no merges), and one trained on a text. vocabulary.py stores
them in files that both gpt2c and transformers read.

Neither Ctrl-C nor a MemoryError interrupts tiktoken, so it encodes a text in windows of a few
milliseconds' work (windows.py); the ids are those of the whole text.

Knows nothing about models, token files or documents.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
from numpy.typing import NDArray

from gpt2c.files import hub
from gpt2c.files.names import check_named
from gpt2c.kernels.checks import check_kind, several, whole
from gpt2c.kernels.limits import usable_cores
from gpt2c.text import bpe_trainer, vocabulary
from gpt2c.text.merges import recover_merges
from gpt2c.text.splits import GPT2, Split
from gpt2c.text.windows import SPACES, TRIES, WINDOW, Reader, is_inside, whole_window

# Methods import the readers of files when they need them: a tokenizer of bytes, or one that is
# trained, needs none.

__all__ = ["END_OF_TEXT", "NAMES", "SMALLEST", "Tokenizer"]

END_OF_TEXT = vocabulary.END_OF_TEXT
NAMES = ("gpt2", "bytes")
SMALLEST = 257  # tokens of a vocabulary: 256 bytes and END_OF_TEXT
_ROOM = 1 << 27  # bytes that must be free: tiktoken ends the process when memory runs out


class Tokenizer:
    """A byte-level BPE tokenizer: text <-> token ids.

    Usually made by `from_name`, `train`, `from_pretrained` or `from_spec`.

    Parameters
    ----------
    ranks : bytes of each ordinary token -> its id; the 256 single bytes, then merged tokens in the
        order of their merges. If a byte is missing, texts with it are refused
    eot : id of the token that stands between texts, `<|endoftext|>`
    merges : the halves of each merged token, in the order of their ids; None recovers them
        when the tokenizer is saved
    special : name -> id of the special tokens, with that of `eot`; None if that is the only one.
        Each token has its own id, from 0; only ids below a special token's may be unused
    split : how a text is cut into pieces before any merge; as GPT-2 does it by default
    chat_template : in Jinja, how a conversation becomes a text; None if there is none. gpt2c's own
        is `gpt2c.text.chat.CHAT_TEMPLATE`
    add_bos_token : whether a prompt begins with `eot`, as the examples of fine-tuning do;
        `Generator` puts it there, `encode` does not

    Attributes
    ----------
    vocab_size : the highest id plus 1: the number of tokens, unless ids are unused
    eot : see above. Models are trained on texts as `[tokenizer.eot, *tokenizer.encode(text)]`
    split, chat_template, add_bos_token : see above
    special_tokens : see `special`. `decode` writes their names; `encode` treats a name in a text as
        ordinary text unless it is allowed

    Examples
    --------
    >>> tokenizer = gpt2c.Tokenizer.train(["hello world, hello again"], vocab_size=260)
    >>> ids = tokenizer.encode("hello again")
    >>> [tokenizer.decode([token]) for token in ids]
    ['hel', 'lo', ' ', 'a', 'g', 'a', 'i', 'n']
    >>> tokenizer.decode(ids)
    'hello again'
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        eot: int,
        merges: list[tuple[bytes, bytes]] | None = None,
        special: dict[str, int] | None = None,
        split: Split = GPT2,
        chat_template: str | None = None,
        add_bos_token: bool = False,
    ) -> None:
        self.eot = eot
        self.split = split
        self.chat_template = chat_template
        self.add_bos_token = add_bos_token
        self.special_tokens = {END_OF_TEXT: eot} if special is None else special
        self.vocab_size = max(*ranks.values(), *self.special_tokens.values()) + 1
        self._ranks = ranks
        self._merges = merges
        self._tokens = [b""] * self.vocab_size
        for token, token_id in ranks.items():
            self._tokens[token_id] = token
        for name, token_id in self.special_tokens.items():
            self._tokens[token_id] = name.encode()
        self._lengths = np.array([len(token) for token in self._tokens], dtype=np.int64)
        self._lengths[[*self.special_tokens.values()]] = 0
        self._window = max(WINDOW, 4 * int(self._lengths.max()))  # at least a few tokens
        # tiktoken ends with a panic at a byte that it does not know.
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        self._missing = {self.vocab_size + i: byte for i, byte in enumerate(missing)}
        self._encoding = tiktoken.Encoding(
            "gpt2c",
            pat_str=split.pattern,
            mergeable_ranks=ranks | {bytes([byte]): i for i, byte in self._missing.items()},
            special_tokens=self.special_tokens,
        )

    def __repr__(self) -> str:
        count = len(self._ranks) + len(self.special_tokens)
        return f"Tokenizer({count:,} tokens, {END_OF_TEXT} is {self.eot})"

    @classmethod
    def from_name(cls, name: str) -> Tokenizer:
        """Return the tokenizer called `name`.

        Parameters
        ----------
        name : "gpt2" (50257 tokens) or "bytes" (256 bytes and `<|endoftext|>`). GPT-2's tokens come
            from the first of these places that has them: tiktoken's cache (TIKTOKEN_CACHE_DIR), a
            directory called gpt2, tiktoken's download, and the hub with its cache

        Raises
        ------
        ValueError : unknown name
        OSError : GPT-2's vocabulary is in none of these places

        Examples
        --------
        >>> gpt2c.Tokenizer.from_name("bytes").vocab_size
        257
        """
        if name == "bytes":
            return cls({bytes([byte]): byte for byte in range(256)}, eot=256)
        if name == "gpt2":
            from gpt2c.text.gpt2_vocabulary import read_gpt2

            return cls(*read_gpt2())
        raise ValueError(f"unknown tokenizer {name!r}; known names are {', '.join(NAMES)}")

    @classmethod
    def from_spec(cls, spec: str) -> Tokenizer:
        """Return the tokenizer that a user names: "gpt2", "bytes", a directory, or one on the hub.

        Raises
        ------
        ValueError : `spec` is none of these, or is "bpe:N", which must be trained on a text
        OSError : the vocabulary cannot be read or downloaded

        Examples
        --------
        >>> gpt2c.Tokenizer.from_spec("bytes").vocab_size
        257
        """
        check_kind("the name of the tokenizer", spec, str, "a string")
        if spec in NAMES:
            return cls.from_name(spec)
        check_named("the name of the tokenizer", spec)
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
        texts : texts to learn from
        vocab_size : number of tokens: 256 bytes, `<|endoftext|>` (the last id), the rest merges. A
            text too small for that many merges makes a smaller tokenizer.

        Raises
        ------
        ValueError : `vocab_size` is below 257; a whitespace run too long to split
        MemoryError : the texts have more different words than memory can hold

        Examples
        --------
        >>> tokenizer = gpt2c.Tokenizer.train(["low lower lowest"], vocab_size=260)
        >>> [tokenizer.decode([token]) for token in tokenizer.encode("slow")]
        ['s', 'low']
        """
        return cls.train_on_pieces(([text] for text in _several(texts)), vocab_size)

    @classmethod
    def train_on_pieces(cls, texts: Iterable[Iterable[str]], vocab_size: int) -> Tokenizer:
        """Learn merges from texts that come in pieces; see `train`.

        A run of more than `WINDOW` characters without whitespace is cut into parts of that size.

        Examples
        --------
        >>> tokenizer = gpt2c.Tokenizer.train_on_pieces([["low low", "er lowest"]], vocab_size=260)
        >>> [tokenizer.decode([token]) for token in tokenizer.encode("slow")]
        ['s', 'low']
        """
        bytearray(_ROOM)
        if whole("vocab_size", vocab_size) < SMALLEST:
            raise ValueError(
                f"vocab_size is {vocab_size}; at least {SMALLEST} are needed"
                f" (256 bytes and {END_OF_TEXT})"
            )

        def windows() -> Iterator[str]:
            for pieces in texts:
                reader = Reader(pieces)
                reader.fill(WINDOW)
                while reader.text:
                    size, _ = whole_window(reader.text, WINDOW, reader.ended, GPT2)
                    yield reader.take(size)
                    reader.fill(WINDOW)

        tokens = bpe_trainer.learn(windows(), vocab_size - 1, GPT2.pattern)
        return cls({token: rank for rank, token in enumerate(tokens)}, eot=len(tokens))

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | os.PathLike[str], revision: str | None = None
    ) -> Tokenizer:
        """Read the tokenizer of a directory, or of a model on the hub.

        Parameters
        ----------
        path_or_name : a directory with vocab.json and merges.txt, or tokenizer.json, written by
            `save_pretrained`, transformers or OpenAI; a model's file beside them; a checkpoint of a
            run that has them; or a name on the hub, see `gpt2c.files.hub.find`
        revision : of a model on the hub

        Raises
        ------
        OSError : a file is missing or cannot be read or downloaded
        ValueError : a file is damaged or asks for something that tiktoken does not do, or two files
            do not belong together

        Examples
        --------
        >>> import tempfile
        >>> tokenizer = gpt2c.Tokenizer.train(["hello world"], vocab_size=260)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tokenizer.save_pretrained(directory)
        ...     same = gpt2c.Tokenizer.from_pretrained(directory)
        >>> same.encode("hello") == tokenizer.encode("hello")
        True
        """
        from gpt2c.text import vocabulary_reader

        check_named("the name of the tokenizer", path_or_name)
        path = hub.find(path_or_name, revision, weights=False)
        directory = path.parent if path.is_file() else path
        return cls(*vocabulary_reader.read(vocabulary.home(directory)))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `vocab.json`, `merges.txt` and `tokenizer_config.json`, which transformers loads.

        If `split` is not GPT-2's, `tokenizer.json` stands in place of the first two. A chat
        template is written as `chat_template.jinja`.

        Raises
        ------
        OSError : the directory cannot be made or written; existing files are intact
        ValueError : the directory's name is empty

        Examples
        --------
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory)
        ...     sorted(os.listdir(directory))
        ['merges.txt', 'tokenizer_config.json', 'vocab.json']
        """
        check_named("the name of the directory", directory)
        vocabulary.write(Path(directory), self._vocabulary())

    def _vocabulary(self) -> vocabulary.Vocabulary:
        if self._merges is None:
            self._merges = recover_merges(self._ranks)
        return vocabulary.Vocabulary(
            *(self._ranks, self.eot, self._merges, self.special_tokens, self.split),
            *(self.chat_template, self.add_bos_token),
        )

    def covers(self, other: Tokenizer) -> bool:
        """Return whether this tokenizer has each token of `other` under the same id.

        This one may have more special tokens: a model that was fine-tuned with an added [PAD], for
        example, reads the tokens of its base model.

        Examples
        --------
        >>> base = gpt2c.Tokenizer.from_name("bytes")
        >>> base.covers(base), base.covers(gpt2c.Tokenizer.train(["hello hello"], vocab_size=260))
        (True, False)
        """
        check_kind("other", other, Tokenizer, "a Tokenizer")
        same = (self._ranks, self.eot, self.split) == (other._ranks, other.eot, other.split)
        return same and other.special_tokens.items() <= self.special_tokens.items()

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, the same for tokenizers that agree and for no others.

        Two agree if each text has the same ids, each id the same text, and `eot` is the same.
        """
        special = sorted(self.special_tokens.values())
        split = "" if self.split == GPT2 else self.split.pattern
        digest = hashlib.blake2b(f"{self.eot} {special}{split}".encode(), digest_size=16)
        for token in self._tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def vocab_and_merges(self) -> tuple[dict[str, int], list[str]]:
        """Return the content of `vocab.json` and `merges.txt`, a printable character for each byte.

        Raises
        ------
        ValueError : a token cannot be made from those before it

        Examples
        --------
        >>> vocab, merges = gpt2c.Tokenizer.train(["aa"], vocab_size=258).vocab_and_merges()
        >>> vocab["aa"], merges
        (256, ['a a'])
        """
        return vocabulary.vocab_and_merges(self._vocabulary())

    def encode(
        self, text: str, allowed_special: Collection[str] | Literal["all"] = ()
    ) -> list[int]:
        """Return a text's token ids; "<|endoftext|>" in it is ordinary text, not the token `eot`.

        Parameters
        ----------
        text : a lone surrogate in it, which has no UTF-8, is encoded as U+FFFD
        allowed_special : names of special tokens, or "all": each of these names in the text becomes
            its token; see `special_tokens`

        Raises
        ------
        ValueError : `text` is not a string, a name is not that of a special token, a run of
            whitespace is too long, or the vocabulary lacks a byte of the text

        Examples
        --------
        >>> tokenizer = gpt2c.Tokenizer.from_name("bytes")
        >>> tokenizer.encode("Hi")
        [72, 105]
        >>> tokenizer.encode("Hi<|endoftext|>", allowed_special="all")
        [72, 105, 256]
        """
        if not isinstance(text, str):
            raise ValueError(
                f"text must be a string, got {type(text).__name__}; encode_batch takes several"
            )
        allowed = self._allowed(allowed_special)
        if not allowed:
            return [
                token for window in self._windows([text]) for token in self._ids(window).tolist()
            ]
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = []
        for part, name in zip(parts[::2], [*parts[1::2], None], strict=True):
            ids += self.encode(part)
            ids += [] if name is None else [self.special_tokens[name]]
        return ids

    def _allowed(self, names: Collection[str] | Literal["all"]) -> Collection[str]:
        if isinstance(names, str) and names == "all":
            return self.special_tokens
        given = several(names) if isinstance(names, Collection) else [names]
        if not all(isinstance(name, str) for name in given):
            raise ValueError(
                f"allowed_special must be names of special tokens or 'all', got {names!r:.50}"
            )
        if unknown := [name for name in given if name not in self.special_tokens]:
            raise ValueError(
                f"{unknown[0]!r} is none of the special tokens {', '.join(self.special_tokens)}"
            )
        return given

    def encode_batch(self, texts: Iterable[str]) -> list[NDArray[np.uint32]]:
        """Encode texts in parallel; return for each the ids of `encode` as an (N,) uint32 array.

        Raises
        ------
        ValueError : see `encode`

        Examples
        --------
        >>> tokenizer = gpt2c.Tokenizer.from_name("bytes")
        >>> [ids.tolist() for ids in tokenizer.encode_batch(["Hi", "you"])]
        [[72, 105], [121, 111, 117]]
        """
        parts: list[list[NDArray[np.uint32]]] = []
        for number, ids in self.encode_pieces([text] for text in _several(texts)):
            if number == len(parts):
                parts.append([])
            parts[number].append(ids)
        return [np.concatenate(ids) for ids in parts]

    def encode_pieces(
        self, texts: Iterable[Iterable[str]]
    ) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Encode texts that come in pieces, in parallel and in bounded memory.

        Parameters
        ----------
        texts : each is read to its end before the next

        Returns
        -------
        iterator of (number of the text, from 0; its next ids, (N,) uint32). The joined ids of a
        text are those that `encode` returns for its joined pieces. Every text comes at least once

        Raises
        ------
        ValueError : see `encode`
        MemoryError : there is too little memory

        Examples
        --------
        >>> tokenizer = gpt2c.Tokenizer.from_name("bytes")
        >>> pieces = tokenizer.encode_pieces([["H", "i"], ["you"]])  # the first text comes in two
        >>> [(number, ids.tolist()) for number, ids in pieces]
        [(0, [72, 105]), (1, [121, 111, 117])]
        """
        bytearray(_ROOM)
        workers = usable_cores()
        waiting: deque[Future[list[tuple[int, NDArray[np.uint32]]]]] = deque()
        pool = ThreadPoolExecutor(workers)  # tiktoken releases the GIL
        try:
            for job in self._jobs(texts):
                waiting.append(pool.submit(self._work, job))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _jobs(
        self, texts: Iterable[Iterable[str]]
    ) -> Iterator[list[tuple[int, str | NDArray[np.uint32]]]]:
        """Group windows of texts into jobs for threads, of about `WINDOW` characters each."""
        job: list[tuple[int, str | NDArray[np.uint32]]] = []
        size = 0
        for number, pieces in enumerate(texts):
            for window in self._windows(pieces):
                job.append((number, window))
                size += len(window)
                if size >= WINDOW:
                    yield job
                    job, size = [], 0
        if job:
            yield job

    def _work(
        self, job: list[tuple[int, str | NDArray[np.uint32]]]
    ) -> list[tuple[int, NDArray[np.uint32]]]:
        return [(number, self._ids(window)) for number, window in job]

    def _ids(self, window: str | NDArray[np.uint32]) -> NDArray[np.uint32]:
        if not isinstance(window, str):
            return window
        ids = self._encoding.encode_to_numpy(window, disallowed_special=())
        if self._missing and (unknown := ids[ids >= self.vocab_size]).size:
            byte = self._missing[int(unknown[0])]
            character = next(character for character in window if byte in character.encode())
            raise ValueError(
                f"the tokenizer has no token for byte 0x{byte:02x} of {character!r} in the text:"
                " remove this character"
            )
        return ids

    def _windows(self, pieces: Iterable[str]) -> Iterator[str | NDArray[np.uint32]]:
        """Yield windows of a text that no token crosses, at least one, or the ids of a long run."""
        reader = Reader(pieces)
        reader.fill(self._window)
        while True:
            size, exact = whole_window(reader.text, self._window, reader.ended, self.split)
            if exact:
                yield reader.take(size)
            else:
                yield from self._run(reader)
            reader.fill(self._window)
            if not reader.text:
                return

    def _run(self, reader: Reader) -> Iterator[NDArray[np.uint32]]:
        """Encode a run that has no whitespace to cut at, up to the next whitespace.

        A cut between two tokens of an encoding is right if the encoding of the text after the cut,
        with more text behind it, begins with the same second token: a sequence of tokens is a
        text's encoding if each two neighbours are the encoding of their bytes. Ids are yielded only
        after this check. Source: github/rust-gems, bpe.
        """
        size, exact, wanted = self._window, False, self._window
        ids = self._ids(reader.text[:size])
        joined = False  # whether ids were yielded before `ids`
        while not exact:
            for count, place in self._borders(reader.text[:size], ids):
                reader.fill(place + self._window)
                rest = reader.text[place:]
                next_size, next_exact = whole_window(rest, self._window, reader.ended, self.split)
                next_ids = self._ids(rest[:next_size])
                if next_ids[0] == ids[count]:
                    yield ids[:count]
                    reader.take(place)
                    size, exact, wanted, ids = next_size, next_exact, self._window, next_ids
                    joined = True
                    break
            else:
                wanted += self._window
                reader.fill(wanted)
                size, exact = whole_window(reader.text, wanted, reader.ended, self.split)
                first, ids = ids[0], self._ids(reader.text[:size])
                if joined and ids[0] != first:  # only with a vocabulary made for it
                    raise ValueError(
                        f"the text has more than {WINDOW:,} characters without whitespace that the "
                        "tokenizer cannot split; put spaces or line breaks into them"
                    )
        yield ids
        reader.take(size)

    def _borders(self, window: str, ids: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
        """Yield places to cut a window, from three quarters backwards: (tokens, characters) before.

        Places beside whitespace, or where an apostrophe may begin a contraction, are skipped: there
        the pattern looks at more than one character on each side. In some splits it does so in more
        places, see `is_inside`.
        """
        content = window.encode()
        ends = np.cumsum(self._lengths[ids])
        last = int(np.searchsorted(ends, len(content) * 3 // 4))
        places = (
            (count, len(content[: ends[count - 1]].decode()))
            for count in range(last, 0, -1)
            if content[ends[count - 1]] & 0xC0 != 0x80  # the first byte of a character
        )
        yield from islice(
            (
                (count, place)
                for count, place in islice(places, 64 * TRIES)
                if "'" not in window[max(place - 3, 0) : place + 1]
                and not set(window[place - 1 : place + 1]) & set(SPACES)
                and (not self.split.keeps_line_ends or is_inside(window, place))
            ),
            TRIES,
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises
        ------
        ValueError : an id is not a whole number, or has no token in the vocabulary

        Examples
        --------
        >>> gpt2c.Tokenizer.from_name("bytes").decode([72, 105])
        'Hi'
        """
        return b"".join(map(self.token_bytes, _ids(ids))).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` piece by piece, each as soon as its characters are complete.

        A character may span several tokens. The joined pieces are what `decode` returns.

        Raises
        ------
        ValueError : an id is not a whole number, or has no token in the vocabulary

        Examples
        --------
        >>> tokenizer = gpt2c.Tokenizer.from_name("bytes")
        >>> [*tokenizer.stream(tokenizer.encode("né!"))]  # é is two bytes, so two tokens
        ['n', 'é', '!']
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in _ids(ids):
            if piece := decoder.decode(self.token_bytes(token_id)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def unused_ids(self, vocab_size: int) -> list[int]:
        """Return the ids below a model's `vocab_size` that no token has, such as padded rows.

        Raises
        ------
        ValueError : the model has fewer tokens

        Examples
        --------
        >>> gpt2c.Tokenizer.from_name("bytes").unused_ids(vocab_size=260)
        [257, 258, 259]
        """
        if whole("vocab_size", vocab_size) < self.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens and the model {vocab_size}: they do"
                " not belong together"
            )
        left_out = [token_id for token_id, token in enumerate(self._tokens) if not token]
        return [*left_out, *range(self.vocab_size, vocab_size)]

    @property
    def token_lengths(self) -> NDArray[np.int64]:
        """Bytes of text in each token, (V,) int64; 0 for special tokens; for bits per byte."""
        return self._lengths.copy()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for.

        Raises
        ------
        ValueError : an id is not a whole number, or has no token in the vocabulary

        Examples
        --------
        >>> gpt2c.Tokenizer.from_name("bytes").token_bytes(72)
        b'H'
        """
        token_id = whole("a token id", token_id)
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1})"
            )
        if not (token := self._tokens[token_id]):
            raise ValueError(f"token id {token_id} is unused in the vocabulary")
        return token


def _ids(ids: Iterable[int]) -> Iterator[int]:
    """Return an iterator of token ids; refuse a value that cannot be iterated."""
    try:
        return iter(ids)
    except TypeError:  # also for an array without dimensions
        raise ValueError(f"ids must be several token ids, got {ids!r:.50}") from None


def _several(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts; refuse a single string, whose characters would count as texts."""
    if isinstance(texts, str):
        raise ValueError("texts must be several strings, got one; put it into a list")
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts must be several strings, got {texts!r:.50}")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings, got {type(text).__name__}")
        yield text
