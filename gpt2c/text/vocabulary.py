"""A vocabulary, and writing it: `vocab.json` with `merges.txt`, or `tokenizer.json`.

The first two are OpenAI's for GPT-2. They cannot say that a text is cut in another way than GPT-2
does it: then the third stands in their place. vocabulary_reader.py reads all of them, and those of
other programs.

Knows nothing about the use of a vocabulary.
"""

from __future__ import annotations

import json
import os.path
from pathlib import Path
from typing import Any, NamedTuple

from gpt2c.files import atomic
from gpt2c.files.names import (
    CHAT_TEMPLATE_FILE,
    CHECKPOINTS,
    MERGES_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TOKENIZER_OTHERS,
    VOCAB_FILE,
)
from gpt2c.text.merges import Merge
from gpt2c.text.splits import BYTE_LEVEL, GPT2, Split

__all__ = [
    "BYTES",
    "END_OF_TEXT",
    "Vocabulary",
    "has_tokenizer",
    "home",
    "processor_of",
    "to_bytes",
    "to_characters",
    "vocab_and_merges",
    "write",
]

END_OF_TEXT = "<|endoftext|>"


class Vocabulary(NamedTuple):
    """A byte-level BPE.

    ranks : bytes of each ordinary token -> its id
    eot : id of the token that ends a text, `<|endoftext|>` in most
    merges : the halves of each ordinary token of more than one byte, in the order of their ids
    special : the other tokens, such as `<|endoftext|>` and `[PAD]`: name -> id
    split : how a text is cut before any merge
    chat_template : in Jinja, how a conversation becomes a text; None if there is none
    add_bos_token : whether a prompt begins with eot
    """

    ranks: dict[bytes, int]
    eot: int
    merges: list[Merge]
    special: dict[str, int]
    split: Split = GPT2
    chat_template: str | None = None
    add_bos_token: bool = False


def _byte_characters() -> list[str]:
    """Return a printable character for each byte, as openai/gpt-2:src/encoder.py does."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


_CHARACTERS = _byte_characters()
BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def to_characters(token: bytes) -> str:
    """Return the printable characters of a token's bytes."""
    return "".join(_CHARACTERS[byte] for byte in token)


def to_bytes(characters: str) -> bytes:
    """Return the bytes of printable characters; KeyError if one stands for no byte."""
    return bytes(BYTES[character] for character in characters)


def has_tokenizer(path: Path) -> bool:
    """Return whether a path is a directory with a tokenizer, complete or not."""
    return any((path / name).exists() for name in (VOCAB_FILE, TOKENIZER_FILE))


def home(directory: Path) -> Path:
    """Return the directory with a model's tokenizer: its own, or for a checkpoint the run's.

    A checkpoint, RUN/checkpoints/00000040, has no tokenizer of its own.
    """
    parent = Path(os.path.abspath(directory)).parent
    is_checkpoint = parent.name == CHECKPOINTS and not has_tokenizer(directory)
    return parent.parent if is_checkpoint and has_tokenizer(parent.parent) else directory


def processor_of(name: str, eot: int) -> dict[str, Any]:
    """Return the post_processor that begins a text, and each of two, with the end-of-text token."""
    pieces = [
        [{"SpecialToken": {"id": name, "type_id": i}}, {"Sequence": {"id": part, "type_id": i}}]
        for i, part in enumerate("AB")
    ]
    return {
        "type": "TemplateProcessing",
        "single": pieces[0],
        "pair": pieces[0] + pieces[1],
        "special_tokens": {name: {"id": name, "ids": [eot], "tokens": [name]}},
    }


def vocab_and_merges(vocabulary: Vocabulary) -> tuple[dict[str, int], list[str]]:
    """Return the content of vocab.json and merges.txt, a printable character for each byte."""
    ids = {to_characters(token): token_id for token, token_id in vocabulary.ranks.items()}
    ids |= vocabulary.special
    merges = [
        f"{to_characters(first)} {to_characters(second)}" for first, second in vocabulary.merges
    ]
    return dict(sorted(ids.items(), key=lambda item: item[1])), merges


def write(directory: Path, vocabulary: Vocabulary) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, all before one is renamed.

    If there is a chat template, chat_template.jinja is written with them.

    transformers derives the rest from these, but for how texts are cut: if it is not GPT-2's way,
    tokenizer.json says it in place of the first two. Files that transformers would read instead are
    removed after that. A kill just before leaves files that disagree, which
    `vocabulary_reader.read` refuses.

    Raises
    ------
    OSError : the directory cannot be made or written
    """
    atomic.claim_directory(directory, overwrite=True)
    end = next(name for name, i in vocabulary.special.items() if i == vocabulary.eot)
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
    }
    as_it_is = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        token_id: {"content": name, **as_it_is, "special": True}
        for name, token_id in vocabulary.special.items()
    }
    if vocabulary.special.keys() != {END_OF_TEXT}:
        config["added_tokens_decoder"] = {str(token_id): entry for token_id, entry in added.items()}
    vocab, merges = vocab_and_merges(vocabulary)
    if vocabulary.split == GPT2:
        contents = {
            VOCAB_FILE: json.dumps(vocab, ensure_ascii=False),
            MERGES_FILE: "".join(f"{line}\n" for line in ("#version: 0.2", *merges)),
        }
    else:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None}
        config["clean_up_tokenization_spaces"] = False
        processor = processor_of(end, vocabulary.eot) if vocabulary.add_bos_token else None
        root = {
            "version": "1.0",
            "added_tokens": [{"id": token_id, **added[token_id]} for token_id in sorted(added)],
            "pre_tokenizer": vocabulary.split.steps,
            "post_processor": processor,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }
        contents = {TOKENIZER_FILE: json.dumps(root, ensure_ascii=False)}
    if vocabulary.add_bos_token:
        config["add_bos_token"] = True
    contents[TOKENIZER_CONFIG_FILE] = json.dumps(config, indent=2) + "\n"
    if vocabulary.chat_template is not None:
        contents[CHAT_TEMPLATE_FILE] = vocabulary.chat_template
    with atomic.atomic_paths(*(directory / name for name in contents)) as temporaries:
        for temporary, content in zip(temporaries, contents.values(), strict=True):
            temporary.write_bytes(content.encode())
    for path in atomic.matching(directory, (*TOKENIZER_FILES, *TOKENIZER_OTHERS)):
        if path.name not in contents:
            path.unlink()
