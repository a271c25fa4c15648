"""Reading vocabularies: `vocab.json` with `merges.txt`, or `tokenizer.json`.

The first two are OpenAI's for GPT-2, the third is that of Hugging Face's tokenizers. A file is read
only if tiktoken gives each text the same ids as transformers does with that file; an entry that
would change them (a normalizer, a prefix space, ...) is refused by name. Three differences are
intended. The name of a special token (`<|endoftext|>`, `[PAD]`) in a text is ordinary text. An
added token keeps the id of the file, where transformers 5 renumbers it if ids are unused. And a
vocabulary that was learned from few bytes lacks the others, as SmolLM2's does: a text with one is
refused, where transformers drops the byte.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2c.files import hub, untrusted
from gpt2c.files.names import (
    ADDED_FILE,
    CHAT_TEMPLATE_FILE,
    MERGES_FILE,
    ROLES_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
)
from gpt2c.text.merges import Merge, check_merges
from gpt2c.text.splits import DIGITS, GPT2, REGEXES, Split
from gpt2c.text.vocabulary import (
    BYTES,
    END_OF_TEXT,
    Vocabulary,
    processor_of,
    to_bytes,
    to_characters,
)

__all__ = ["LARGEST", "read"]

# Tokens that end a text if a vocabulary has no <|endoftext|> and no file names an eos_token.
_OTHER_ENDS = ("</s>", "<eos>", "[EOS]")
# A token of vocab.json that no merge makes is special if its name has this form.
_SPECIAL = re.compile(r"<\S+>|\[\w+\]")
MOST_SPECIAL = 10_000  # tiktoken searches for them with one regular expression
# Unused ids below a special token's: the rows of a model are padded to a multiple of 128, for
# example, and the [PAD] of a fine-tuned model may take any padded row.
MOST_UNUSED = 1024
LARGEST = 1 << 25  # bytes of a file: GPT-2's have 1.4 million

# Values that the parts of tokenizer.json may have. An entry with ANY does not change the ids, or is
# checked elsewhere.
ANY = None
ROOT = {
    "version": (None, "1.0"),
    "truncation": ANY,  # transformers sets this and padding in each call
    "padding": ANY,
    "added_tokens": ANY,
    "normalizer": (None,),
    "pre_tokenizer": ANY,
    "post_processor": ANY,
    "decoder": ANY,
    "model": ANY,
}
PRE_TOKENIZER = {
    "type": ("ByteLevel",),
    "add_prefix_space": (False,),
    "trim_offsets": ANY,
    "use_regex": (None, True),
}
# The steps of a Sequence: one of the first two, then ByteLevel.
STEP_DIGITS = {"type": ("Digits",), "individual_digits": (True,)}
STEP_SPLIT = {
    "type": ("Split",),
    "pattern": ANY,
    "behavior": ("Isolated",),
    "invert": (None, False),
}
MODEL = {
    "type": (None, "BPE"),
    "dropout": (None, 0),
    "unk_token": ANY,  # with all 256 bytes no text is unknown
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": ANY,
    "byte_fallback": (None, False),
    "ignore_merges": (None, False, True),  # if a piece is a token: all merges lead to it anyway
    "vocab": ANY,
    "merges": ANY,
}


def read(directory: Path) -> Vocabulary:
    """Read the vocabulary of a directory.

    If tokenizer.json stands beside vocab.json and merges.txt, they must agree: transformers reads
    the first, other programs read the others, and neither detects a difference.

    Raises
    ------
    OSError : a file is missing or cannot be read
    ValueError : a file is damaged, would change the ids, or does not agree with another
    """
    vocab_path, merges_path = directory / VOCAB_FILE, directory / MERGES_FILE
    json_path = directory / TOKENIZER_FILE
    config = _read_config(directory)
    template = _read_template(directory, config)
    if not os.path.lexists(json_path):  # a dangling link is not an absent file
        added = _added_beside(directory, config)
        pair = _read_pair(vocab_path, merges_path, added, config)
        begins = _begins(directory, config, pair)
        return pair._replace(chat_template=template, add_bos_token=begins)
    root = untrusted.parse_json(_read(json_path), str(json_path))
    added = _added_beside(directory, config, root)
    vocabulary = _parse_tokenizer_json(json_path, root, added, config)
    if os.path.lexists(vocab_path) and os.path.lexists(merges_path):
        pair = _read_pair(vocab_path, merges_path, added, config)
        split, begins_too = vocabulary.split, vocabulary.add_bos_token
        # A pair of files can name neither.
        if vocabulary != pair._replace(split=split, add_bos_token=begins_too):
            raise ValueError(
                f"{json_path} is another tokenizer than {VOCAB_FILE} and {MERGES_FILE} beside it;"
                " remove those that are not the model's"
            )
    begins = _begins(directory, config, vocabulary)
    begins |= vocabulary.add_bos_token  # by its post_processor
    return vocabulary._replace(chat_template=template, add_bos_token=begins)


def _read(path: Path) -> str:
    try:
        content = untrusted.read_bytes(path, LARGEST)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; a tokenizer is a {VOCAB_FILE} and a {MERGES_FILE}, or a"
            f" {TOKENIZER_FILE}{hub.hidden(path.parent)}"
        ) from None
    return untrusted.decode(content, str(path))


def _read_pair(
    vocab_path: Path, merges_path: Path, added: dict[str, int], config: Mapping[str, Any]
) -> Vocabulary:
    ids = untrusted.parse_json(_read(vocab_path), str(vocab_path))
    lines = _read(merges_path).removesuffix("\n").split("\n")
    start = int(lines[0].startswith("#version"))
    merges = [
        _parse_merge(line.split(" "), f"{merges_path}, line {number}")
        for number, line in enumerate(lines[start:], start=start + 1)
    ]
    ranks, eot, special = _parse_vocabulary(ids, merges, added, config, vocab_path)
    check_merges(ranks, merges, str(merges_path), str(vocab_path))
    return Vocabulary(ranks, eot, merges, special)


def _parse_tokenizer_json(
    path: Path, root: dict[str, Any], added: dict[str, int], config: Mapping[str, Any]
) -> Vocabulary:
    _part(path, "", root, ROOT)
    split = _parse_split(path, root.get("pre_tokenizer"))
    model = _part(path, "model", root.get("model"), MODEL)
    processor, decoder = root.get("post_processor"), root.get("decoder")
    if not _is(decoder, {"type": "ByteLevel"}):
        raise ValueError(f"{path}: decoder must be ByteLevel")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{path} needs model.vocab, an object, and model.merges, an array")
    pairs = [
        _parse_merge(
            merge.split(" ") if isinstance(merge, str) else merge, f"{path}: model.merges[{number}]"
        )
        for number, merge in enumerate(merges)
    ]
    ranks, eot, special = _parse_vocabulary(vocab, pairs, added, config, path)
    check_merges(ranks, pairs, f"{path}: model.merges", "model.vocab")
    return Vocabulary(ranks, eot, pairs, special, split, None, _adds_eot(path, processor, eot))


def _adds_eot(path: Path, processor: Any, eot: int) -> bool:
    """Return whether a post_processor begins each text with the end-of-text token."""
    adds_nothing = {"type": "TemplateProcessing", "special_tokens": {}}
    if _is(processor, {"type": "ByteLevel"}) or _is(processor, adds_nothing):
        return False
    names = processor.get("special_tokens") if isinstance(processor, dict) else None
    if isinstance(names, dict) and len(names) == 1:
        (name,) = names
        wanted = processor_of(name, eot)
        kept = ("type", "single", "special_tokens")  # a pair of texts is not asked for
        if {key: processor.get(key) for key in kept} == {key: wanted[key] for key in kept}:
            return True
    raise ValueError(
        f"{path}: post_processor may add tokens; only one that adds none, or begins a text with the"
        " end-of-text token, is read"
    )


def _parse_split(path: Path, part: Any) -> Split:
    """Return how a pre_tokenizer cuts texts: ByteLevel, or a Sequence of a step and ByteLevel."""
    name = "pre_tokenizer"
    if not isinstance(part, dict) or part.get("type") != "Sequence":
        _part(path, name, part, PRE_TOKENIZER)
        return GPT2
    steps = part.get("pretokenizers")
    kinds = [_kind(step) for step in steps] if isinstance(steps, list) else []
    if kinds not in (["ByteLevel"], ["Digits", "ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(
            f"{path}: the steps of {name} must be ByteLevel, perhaps behind Digits or Split, got"
            f" {json.dumps(kinds)[:60]}"
        )
    *first, last = part["pretokenizers"]
    if kinds[0] == "Split":
        _part(path, name, first[0], STEP_SPLIT)
        _part(path, name, last, PRE_TOKENIZER | {"use_regex": (False,)})
        for regex, split in REGEXES.items():
            if first[0].get("pattern") == {"Regex": regex}:
                return split
        raise ValueError(
            f"{path}: {name} must split by the pattern of GPT-2, Llama 3 or Qwen2, got"
            f" {json.dumps(first[0].get('pattern'))[:60]}"
        )
    if kinds[0] == "Digits":
        _part(path, name, first[0], STEP_DIGITS)
    _part(path, name, last, PRE_TOKENIZER)
    return DIGITS if first else GPT2


def _kind(step: Any) -> Any:
    return step.get("type") if isinstance(step, dict) else step


def _part(
    path: Path, name: str, part: Any, allowed: Mapping[str, tuple[Any, ...] | None]
) -> dict[str, Any]:
    """Return a part of tokenizer.json if all its entries are allowed."""
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {name} must be an object, got {json.dumps(part)[:40]}")
    for key in [*allowed, *part]:
        values = allowed.get(key, ())
        if values is not ANY and part.get(key) not in values:
            wanted = " or ".join(json.dumps(value) for value in values) or "no such entry"
            raise ValueError(
                f"{path}: {f'{name}.{key}'.lstrip('.')} must be {wanted}, got"
                f" {json.dumps(part.get(key))[:40]}"
            )
    return part


def _is(part: Any, wanted: Mapping[str, Any]) -> bool:
    """Return whether a part is absent or has the wanted entries."""
    return part is None or (
        isinstance(part, dict) and all(part.get(key) == value for key, value in wanted.items())
    )


def _read_config(directory: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, if there is one; refuse entries that would change the ids.

    A `bos_token` or `eos_token` that it lacks is that of special_tokens_map.json.
    """
    config: dict[str, Any] = {}
    if os.path.lexists(path := directory / TOKENIZER_CONFIG_FILE):
        config = untrusted.parse_json(_read(path), str(path))
        for key in ("add_prefix_space", "add_eos_token"):
            if config.get(key):
                raise ValueError(f"{path}: {key} must be false, got {json.dumps(config[key])[:40]}")
    if os.path.lexists(path := directory / ROLES_FILE):
        roles = untrusted.parse_json(_read(path), str(path))
        for role in ("bos_token", "eos_token"):
            config.setdefault(role, roles.get(role))
    return config


def _begins(directory: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> bool:
    """Return whether the config begins texts with the end-of-text token; refuse another one."""
    path, adds = directory / TOKENIZER_CONFIG_FILE, config.get("add_bos_token")
    if adds is not None and not isinstance(adds, bool):
        raise ValueError(
            f"{path}: add_bos_token must be true or false, got {json.dumps(adds)[:40]}"
        )
    if not adds:
        return False
    name = _content(config.get("bos_token") or END_OF_TEXT)  # GPT-2's own, if none is named
    if not isinstance(name, str) or vocabulary.special.get(name) != vocabulary.eot:
        raise ValueError(
            f"{path}: add_bos_token must be false where bos_token is not the end of text, got"
            f" {json.dumps(name)[:40]}"
        )
    return True


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template of chat_template.jinja, else that of tokenizer_config.json's entries."""
    if os.path.lexists(path := directory / CHAT_TEMPLATE_FILE):
        return _read(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        named = (one for one in template if isinstance(one, dict) and one.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) and _is_text(template) else None


def _added_beside(
    directory: Path, config: Mapping[str, Any], root: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return the tokens that are added to a vocabulary, name -> id; the files must agree.

    The files are tokenizer_config.json, added_tokens.json and tokenizer.json, which is `root`.
    """
    found: list[tuple[Path, Any, Any]] = []
    path = directory / TOKENIZER_CONFIG_FILE
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object")
    for key, token in decoder.items():
        token_id = int(key) if re.fullmatch(r"[0-9]{1,9}", key) else key
        found.append((path, _content(token), token_id))
    if os.path.lexists(path := directory / ADDED_FILE):
        ids = untrusted.parse_json(_read(path), str(path))
        found += [(path, token, token_id) for token, token_id in ids.items()]
    if root is not None:
        path = directory / TOKENIZER_FILE
        tokens = root.get("added_tokens") or []
        if not isinstance(tokens, list):
            raise ValueError(f"{path}: added_tokens must be an array")
        for token in tokens:
            token_id = token.get("id") if isinstance(token, dict) else None
            found.append((path, _content(token), token_id))
    added: dict[str, int] = {}
    for path, token, token_id in found:
        what = f"{path} adds token {json.dumps(token)[:40]} as {json.dumps(token_id)[:40]}"
        if not isinstance(token, str) or not _is_text(token) or type(token_id) is not int:
            raise ValueError(f"{what}; a name and a whole number are wanted")
        if added.setdefault(token, token_id) != token_id:
            raise ValueError(f"{what}, which is {added[token]} elsewhere")
    return added


def _content(token: Any) -> Any:
    """Return the name of a token, which may be an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _is_text(name: str) -> bool:
    """Return whether a name is not empty and has no lone surrogates, which have no UTF-8."""
    return name != "" and not re.search("[\ud800-\udfff]", name)


def _parse_vocabulary(
    vocabulary: dict[str, Any],
    merges: list[Merge],
    added: dict[str, int],
    config: Mapping[str, Any],
    path: Path,
) -> tuple[dict[bytes, int], int, dict[str, int]]:
    """Check tokens and ids; return the ordinary tokens, the id of the end, the special tokens."""
    for name, token_id in added.items():
        if vocabulary.setdefault(name, token_id) != token_id:
            raise ValueError(
                f"{path} has token {json.dumps(name)[:40]} as {json.dumps(vocabulary[name])[:40]},"
                f" and a file beside it or an entry in it adds it as {token_id}"
            )
    if any(type(token_id) is not int for token_id in vocabulary.values()):
        raise ValueError(f"{path} must be one JSON object of tokens and their ids")
    ordinary = {to_characters(first + second) for first, second in merges}.union(BYTES)
    special = {}
    for name, token_id in vocabulary.items():
        if name in ordinary:
            if name in added:
                raise ValueError(
                    f"{path} has the added token {json.dumps(name)[:40]} as an ordinary one, too"
                )
        elif name in added or (_SPECIAL.fullmatch(name) and _is_text(name)):
            special[name] = token_id
    ids, size = sorted(vocabulary.values()), len(vocabulary)
    whole = 1 + max((i for token, i in vocabulary.items() if token not in special), default=-1)
    if whole > size or ids[:whole] != list(range(whole)) or len(set(ids)) < size:
        raise ValueError(
            f"{path} must number its {size} tokens, added ones among them, from 0 to {size - 1},"
            " each once; only special tokens may have higher ids"
        )
    if (unused := max(ids, default=-1) + 1 - size) > MOST_UNUSED:
        raise ValueError(
            f"{path} has {size} tokens and the id {ids[-1]!s:.40}; at most {MOST_UNUSED:,} ids"
            f" below a special token's may be unused, got {format(unused, ','):.40}"
        )
    if len(special) > MOST_SPECIAL:
        raise ValueError(f"{path} has {len(special):,} special tokens; at most {MOST_SPECIAL:,}")
    named = _content(config.get("eos_token"))
    ends = [name for name in (END_OF_TEXT, named, *_OTHER_ENDS) if isinstance(name, str)]
    end = next((name for name in ends if name in special), None)
    if end is None:
        raise ValueError(
            f"{path} has no {END_OF_TEXT}, nor does {TOKENIZER_CONFIG_FILE} name an eos_token of it"
        )
    try:
        ranks = {
            to_bytes(token): token_id
            for token, token_id in vocabulary.items()
            if token not in special
        }
    except KeyError as error:
        raise ValueError(f"{path} has a character that stands for no byte: {error}") from None
    if not any(len(token) == 1 for token in ranks):
        raise ValueError(f"{path} has none of the 256 single bytes among its tokens")
    return ranks, special[end], special


def _parse_merge(halves: Any, place: str) -> Merge:
    try:
        if not all(isinstance(half, str) for half in halves):
            raise TypeError
        first, second = map(to_bytes, halves)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{place}: two tokens separated by a space are wanted") from None
    return first, second
