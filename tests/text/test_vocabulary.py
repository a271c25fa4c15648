"""Vocabularies as files: three formats, and what other programs write into them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2c import Tokenizer
from gpt2c.text import vocabulary
from gpt2c.text.splits import BYTE_LEVEL, DIGITS, GPT2, LLAMA3, QWEN2, REGEXES, Split
from gpt2c.text.vocabulary import END_OF_TEXT, Vocabulary, processor_of, write
from gpt2c.text.vocabulary_reader import LARGEST, read

TEXTS = ["low lower lowest newer newest wider, it's a naïve test 日本"] * 3
BPE = Tokenizer.train(TEXTS, 300)  # of 293 tokens, <|endoftext|> the last
BYTES = Tokenizer.from_name("bytes")
FILES = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Return a directory with vocab.json and merges.txt."""
    BPE.save_pretrained(tmp_path)
    return tmp_path


def fast(directory: Path, merges_as: type = list) -> dict[str, Any]:
    """Return the tokenizer.json of transformers 5 for the vocabulary of a directory."""
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8-sig"))
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    special = {"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special | dict.fromkeys(["single_word", "lstrip", "rstrip"], False)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [line if merges_as is str else line.split(" ") for line in lines],
        },
    }


def change(path: Path, how: Change) -> None:
    """Change an object in a file."""
    entries = json.loads(path.read_bytes())
    how(entries)
    path.write_text(json.dumps(entries), encoding="utf-8")


# ---- tokenizer.json ------------------------------------------------------------------------------


@pytest.mark.parametrize("merges_as", [str, list])
@pytest.mark.parametrize("alone", [True, False])
def test_tokenizer_json_is_read(pair: Path, merges_as: type, alone: bool) -> None:
    """Merges may be "a b", as in older files; the file may stand alone or beside the others."""
    (pair / "tokenizer.json").write_text(json.dumps(fast(pair, merges_as)), encoding="utf-8")
    if alone:
        (pair / "vocab.json").unlink()
        (pair / "merges.txt").unlink()
    loaded = Tokenizer.from_pretrained(pair)
    assert loaded._vocabulary() == BPE._vocabulary()
    assert loaded.encode("it's the lowest") == BPE.encode("it's the lowest")


def older(root: dict[str, Any]) -> None:
    """Remove the fields that the tokenizer.json of gpt2 on the hub lacks."""
    for name in ("type", "byte_fallback", "ignore_merges"):
        del root["model"][name]
    del root["pre_tokenizer"]["use_regex"]
    root["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}


@pytest.mark.parametrize(
    "how",
    [
        older,
        lambda root: root.update(post_processor=None, decoder=None),
        lambda root: root.update(truncation={"max_length": 5}, padding={"pad_id": 0}),
        lambda root: root["model"].update(unk_token=END_OF_TEXT, dropout=0.0),
        lambda root: root["model"].update(ignore_merges=True),
        lambda root: root["model"]["vocab"].pop(END_OF_TEXT),  # added_tokens have it
        lambda root: root.pop("added_tokens"),
    ],
)
def test_harmless_fields_of_tokenizer_json_are_taken(pair: Path, how: Change) -> None:
    root = fast(pair)
    how(root)
    (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    assert read(pair) == BPE._vocabulary()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda r: r.update(version="2.0"), 'version must be null or "1.0"'),
        (lambda r: r.update(normalizer={"type": "NFC"}), "normalizer must be null"),
        (lambda r: r.update(surprise=1), "surprise must be no such entry"),
        (lambda r: r.update(pre_tokenizer=None), "pre_tokenizer must be an object, got null"),
        (lambda r: r["pre_tokenizer"].update(type="Metaspace"), 'type must be "ByteLevel"'),
        (
            lambda r: r["pre_tokenizer"].update(add_prefix_space=True),
            "add_prefix_space must be false",
        ),
        (lambda r: r["pre_tokenizer"].update(use_regex=False), "use_regex must be null or true"),
        (lambda r: r["pre_tokenizer"].update(pretokenizers=[]), "pretokenizers must be no such"),
        (
            lambda r: r["post_processor"].update(special_tokens={"<s>": {}}),
            "post_processor may add tokens",
        ),
        (
            lambda r: r["post_processor"].update(processor_of("<s>", 3)),
            "only one that adds none, or begins a text with the end-of-text token, is read",
        ),
        (lambda r: r.update(post_processor={"type": "RobertaProcessing"}), "may add tokens"),
        (lambda r: r.update(post_processor=[]), "may add tokens"),
        (lambda r: r.update(decoder={"type": "WordPiece"}), "decoder must be ByteLevel"),
        (lambda r: r.update(model=[]), r"model must be an object, got \[\]"),
        (lambda r: r["model"].update(type="Unigram"), 'model.type must be null or "BPE"'),
        (lambda r: r["model"].update(dropout=0.1), "model.dropout must be null or 0"),
        (lambda r: r["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda r: r["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (lambda r: r["model"].update(byte_fallback=True), "model.byte_fallback must be"),
        (lambda r: r["model"].update(vocab=[]), "needs model.vocab, an object"),
        (lambda r: r["model"].update(merges={}), "model.merges, an array"),
        (lambda r: r.update(added_tokens={"a": 1}), "added_tokens must be an array"),
        (
            lambda r: r["added_tokens"].append({"id": 293 + 1025, "content": "[PAD]"}),
            "has 294 tokens and the id 1318; at most 1,024 ids .* may be unused, got 1,025",
        ),
        (
            lambda r: r["added_tokens"].append({"id": 7, "content": "[PAD]"}),
            "must number its 294 tokens, added ones among them, from 0 to 293, each once",
        ),
        (lambda r: r["added_tokens"].append({"id": 10**9 - 1, "content": "[PAD]"}), "at most 1,02"),
        (
            lambda r: r["added_tokens"].extend(
                [{"id": 299, "content": "[PAD]"}, {"id": 299, "content": "[SEP]"}]
            ),
            "must number its 295 tokens",
        ),
        (
            lambda r: r["added_tokens"].append({"id": 64, "content": "a"}),
            'has (the added )?token "a" as',
        ),
        (lambda r: r["added_tokens"].append("[PAD]"), 'adds token "" as null|as null; a name and'),
        (lambda r: r["added_tokens"][0].update(id=3), "has token .* as 292, and .* adds it as 3"),
        (lambda r: r["added_tokens"].append({"id": 293, "content": ""}), "a name and a whole"),
        (lambda r: r["added_tokens"].append({"id": 293, "content": "<\ud800>"}), "a name and a"),
        (lambda r: r["model"]["merges"].append(["a", 1]), r"merges\[\d+\]: two tokens"),
        (lambda r: r["model"]["merges"].append("a"), "two tokens separated by a space"),
        (lambda r: r["model"]["merges"].append(7), "two tokens separated by a space"),
        (lambda r: r["model"]["merges"].append(None), "two tokens separated by a space"),
        (lambda r: r["model"]["merges"].pop(), "does not make the tokens of model.vocab"),
        (lambda r: r["model"]["vocab"].update(a=10**30), "must number its"),
        (lambda r: r["model"]["vocab"].update(a=300), "only special tokens may have higher ids"),
        (
            lambda r: r["model"]["vocab"].update({"\ud800": len(r["model"]["vocab"])}),
            "stands for no byte",
        ),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_fields_that_change_ids_are_refused(
    pair: Path, how: Change, message: str, alone: bool
) -> None:
    """Also beside good files, because transformers would read this one."""
    root = fast(pair)
    how(root)
    (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    if alone:
        (pair / "vocab.json").unlink()
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_pretrained(pair)
    assert str(error.value).startswith(f"{pair}/tokenizer.json")
    assert len(str(error.value)) < 400


# ---- other ways to cut texts ---------------------------------------------------------------------


def regex(by: str, **changes: Any) -> dict[str, Any]:
    """Return a pre_tokenizer that cuts by a regular expression."""
    step = {"type": "Split", "pattern": {"Regex": by}, "behavior": "Isolated", **changes}
    return {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL | {"use_regex": False}]}


def behind(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*steps]}


SINGLE = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("part", "split"),
    [
        (behind(BYTE_LEVEL), GPT2),
        (behind(SINGLE, BYTE_LEVEL), DIGITS),
        (regex(next(iter(REGEXES)), invert=False), GPT2),
        (regex(LLAMA3.pattern), LLAMA3),
        (regex(QWEN2.pattern), QWEN2),
    ],
)
def test_sequences_that_cut_texts_are_read(pair: Path, part: dict[str, Any], split: Split) -> None:
    """Beside vocab.json and merges.txt, too, which cannot say it."""
    root = fast(pair)
    root["pre_tokenizer"] = part
    (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    assert read(pair) == BPE._vocabulary()._replace(split=split)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (behind(), "steps of pre_tokenizer must be ByteLevel, perhaps behind Digits or Split, got"),
        (behind(BYTE_LEVEL, SINGLE), 'got ["ByteLevel", "Digits"]'),
        (behind(SINGLE, SINGLE, BYTE_LEVEL), 'got ["Digits", "Digits", "ByteLevel"]'),
        (behind({"type": "Punctuation"}, BYTE_LEVEL), 'got ["Punctuation", "ByteLevel"]'),
        (behind(7, [BYTE_LEVEL]), "got [7, [{"),
        ({"type": "Sequence", "pretokenizers": 7}, "got []"),
        (behind({"type": "Digits"}, BYTE_LEVEL), "individual_digits must be true"),
        (behind(SINGLE, BYTE_LEVEL | {"use_regex": False}), "use_regex must be null or true"),
        (behind(SINGLE, BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space must be"),
        (behind(SINGLE | {"more": 1}, BYTE_LEVEL), "more must be no such entry"),
        (regex("x"), 'split by the pattern of GPT-2, Llama 3 or Qwen2, got {"Regex": "x"}'),
        (regex("x", pattern={"String": " "}), 'or Qwen2, got {"String": " "}'),
        (regex(LLAMA3.pattern, behavior="Removed"), 'behavior must be "Isolated"'),
        (regex(LLAMA3.pattern, invert=True), "invert must be null or false"),
        (
            behind(regex(LLAMA3.pattern)["pretokenizers"][0], BYTE_LEVEL),
            "pre_tokenizer.use_regex must be false",
        ),
        ({"type": "Metaspace", "replacement": "_"}, 'pre_tokenizer.type must be "ByteLevel"'),
    ],
)
def test_other_cuts_are_refused_by_name(pair: Path, part: Any, said: str) -> None:
    root = fast(pair)
    root["pre_tokenizer"] = part
    (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    message = refused(read, pair)
    assert message.startswith(f"{pair}/tokenizer.json: ") and said in message
    assert len(message) < 300


@pytest.mark.parametrize("split", [DIGITS, LLAMA3, QWEN2], ids=lambda split: split.name)
def test_cuts_are_written_and_belong_to_the_tokenizer(pair: Path, split: Split) -> None:
    own = Tokenizer(BPE._ranks, BPE.eot, special={END_OF_TEXT: BPE.eot, "[PAD]": 300}, split=split)
    own.save_pretrained(pair)
    assert {path.name for path in pair.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    again = Tokenizer.from_pretrained(pair)
    assert again._vocabulary() == own._vocabulary() and again.split == split
    assert again.fingerprint == own.fingerprint
    plain = Tokenizer(own._ranks, own.eot, special=own.special_tokens)
    assert plain.fingerprint != own.fingerprint and not plain.covers(own)
    assert own.covers(again) and not own.covers(BPE)
    plain.save_pretrained(pair)
    assert {path.name for path in pair.iterdir()} == {*FILES[:2], "tokenizer_config.json"}


def test_pieces_are_those_of_the_split() -> None:
    """With whole words as tokens, a token is a piece."""
    words = {" 1", "12", "123", "23", "  ", "!\n", "\n\n", ".a", " a", "'S"}
    ranks = BYTES._ranks | {word.encode(): 257 + i for i, word in enumerate(sorted(words))}
    for split, text, pieces in (
        (GPT2, "a 123", ["a", " 1", "23"]),
        (DIGITS, "a  12", ["a", "  ", "1", "2"]),
        (DIGITS, "a 12", ["a", " ", "1", "2"]),
        (LLAMA3, " 1234", [" ", "123", "4"]),
        (QWEN2, " 12", [" ", "1", "2"]),
        (LLAMA3, "a!\n", ["a", "!\n"]),
        (GPT2, "a!\n", ["a", "!", "\n"]),
        (LLAMA3, "A'S.a", ["A", "'S", ".a"]),
        (GPT2, "A'S.a", ["A", "'", "S", ".", "a"]),
    ):
        own = Tokenizer(ranks, 256, split=split)
        found = [own.decode([token]) for token in own.encode(text)]
        assert found == pieces, (split.name, text)


def test_vocabulary_may_lack_bytes(pair: Path) -> None:
    root = fast(pair)
    names = sorted(root["model"]["vocab"], key=root["model"]["vocab"].__getitem__)
    names.remove("\u0100")  # the character of byte 0
    vocab = root["model"]["vocab"] = {name: token_id for token_id, name in enumerate(names)}
    root["added_tokens"][0]["id"] = vocab[END_OF_TEXT]
    for name in FILES[:2]:
        (pair / name).unlink()
    (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    own = Tokenizer.from_pretrained(pair)
    assert own.vocab_size == BPE.vocab_size - 1
    assert own.decode(own.encode("the lowest 日本\n")) == "the lowest 日本\n"
    said = "no token for byte 0x00 of '\\x00' in the text: remove this character"
    for text in ("\0", "low\0er", "x" * 99_999 + "\0"):
        assert refused(own.encode, text).endswith(said)
    assert refused(own.encode_batch, ["a", "b\0"]).endswith(said)
    root["model"]["merges"].append(["\u0100", "a"])
    vocab["\u0100a"] = own.vocab_size
    (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    assert "uses a token that no earlier merge has made" in refused(read, pair)
    root["model"] |= {"vocab": {END_OF_TEXT: 0}, "merges": []}
    root["added_tokens"][0]["id"] = 0
    (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    assert refused(read, pair).endswith("has none of the 256 single bytes among its tokens")


def test_files_that_disagree_are_refused(pair: Path) -> None:
    other = pair / "other"
    Tokenizer.train(TEXTS, 280).save_pretrained(pair)
    Tokenizer.train([text.upper() for text in TEXTS], 280).save_pretrained(other)
    (pair / "tokenizer.json").write_text(json.dumps(fast(other)), encoding="utf-8")
    assert "is another tokenizer than vocab.json and merges.txt" in refused(read, pair)


def test_saving_removes_files_that_would_disagree(pair: Path) -> None:
    (pair / "tokenizer.json").write_text(json.dumps(fast(pair)), encoding="utf-8")
    (pair / "added_tokens.json").write_text("{}", encoding="utf-8")
    BYTES.save_pretrained(pair)
    assert read(pair) == BYTES._vocabulary()
    assert {path.name for path in pair.iterdir()} == {*FILES} - {
        "tokenizer.json",
        "added_tokens.json",
    }


def test_failed_save_removes_no_file(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair / "tokenizer.json").write_text(json.dumps(fast(pair)), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in pair.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(vocabulary.atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        BYTES.save_pretrained(pair)
    assert {path.name: path.read_bytes() for path in pair.iterdir()} == before


# ---- files beside a vocabulary -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_max_length": 1024, "add_prefix_space": False, "add_bos_token": False}, None),
        ({"added_tokens_decoder": {"EOT": {"content": END_OF_TEXT}}}, None),
        ({"add_prefix_space": True}, "add_prefix_space must be false, got true"),
        (
            {"add_bos_token": True, "bos_token": "<s>", "eos_token": END_OF_TEXT},
            'add_bos_token must be false where bos_token is not the end of text, got "<s>"',
        ),
        *(
            ({"add_bos_token": True, "bos_token": bos}, f"not the end of text, got {got}")
            for bos, got in (({"content": "[PAD]"}, '"\\[PAD\\]"'), (["a"], ".*a"), (5, "5"))
        ),
        ({"add_bos_token": "false"}, 'add_bos_token must be true or false, got "false"'),
        ({"added_tokens_decoder": {"9": {"content": END_OF_TEXT}}}, "adds it as 9"),
        (
            {"added_tokens_decoder": {"x": {"content": "[PAD]"}}},
            'as "x"; a name and a whole number',
        ),
        ({"added_tokens_decoder": ["[PAD]"]}, "added_tokens_decoder must be an object"),
    ],
)
def test_tokenizer_config_is_read(pair: Path, config: dict[str, Any], message: str | None) -> None:
    text = json.dumps(config).replace("EOT", str(BPE.eot))
    (pair / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if message is None:
        assert read(pair) == BPE._vocabulary()
    else:
        with pytest.raises(ValueError, match=message):
            read(pair)


PAD = {"content": "[PAD]", "special": True, "lstrip": False}


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder", "all"])
def test_added_tokens_are_special_ids(pair: Path, where: str) -> None:
    """As in fine-tuned GPT-2s; transformers writes them into one to three files."""
    root = fast(pair)
    if where != "added_tokens_decoder":
        text = json.dumps({END_OF_TEXT: BPE.eot, "[PAD]": 293})
        (pair / "added_tokens.json").write_text(text, encoding="utf-8")
    if where != "added_tokens.json":
        entries = {"293": PAD, str(BPE.eot): END_OF_TEXT}
        change(
            pair / "tokenizer_config.json",
            lambda config: config.update(added_tokens_decoder=entries, pad_token="[PAD]"),
        )
    if where == "all":
        root["added_tokens"].append(PAD | {"id": 293})
        (pair / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    loaded = Tokenizer.from_pretrained(pair)
    assert loaded.special_tokens == {END_OF_TEXT: BPE.eot, "[PAD]": 293}
    assert (loaded.vocab_size, loaded.eot) == (294, BPE.eot)
    ids = loaded.encode("low[PAD] lower")
    assert ids == BPE.encode("low[PAD] lower") and 293 not in ids
    assert loaded.encode("low[PAD]", allowed_special="all") == [*BPE.encode("low"), 293]
    assert loaded.decode([*BPE.encode("low"), 293]) == "low[PAD]"
    assert loaded.token_lengths[293] == 0
    assert loaded.fingerprint != BPE.fingerprint
    again = pair / "again"
    loaded.save_pretrained(again)
    assert Tokenizer.from_pretrained(again).fingerprint == loaded.fingerprint
    config = json.loads((again / "tokenizer_config.json").read_bytes())
    assert config["added_tokens_decoder"]["293"]["content"] == "[PAD]"


@pytest.mark.parametrize("beside", ["vocab.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("token_id", [294, 319, 293 + 1024])
def test_special_token_may_use_a_padding_id(pair: Path, beside: str, token_id: int) -> None:
    if beside == "vocab.json":
        change(pair / beside, lambda vocab: vocab.update({"[PAD]": token_id}))
    elif beside == "added_tokens.json":
        (pair / beside).write_text(json.dumps({"[PAD]": token_id}), encoding="utf-8")
    else:
        decoder = {str(token_id): {"content": "[PAD]", "special": True}}
        change(pair / beside, lambda c: c.update(added_tokens_decoder=decoder))
    loaded = Tokenizer.from_pretrained(pair)
    assert loaded.special_tokens == {END_OF_TEXT: 292, "[PAD]": token_id}
    assert loaded.vocab_size == token_id + 1 and loaded.covers(BPE)
    assert repr(loaded) == "Tokenizer(294 tokens, <|endoftext|> is 292)"
    assert loaded.encode("lowest[PAD]", "all") == [*BPE.encode("lowest"), token_id]
    assert loaded.decode([*BPE.encode("lowest"), token_id]) == "lowest[PAD]"
    assert loaded.unused_ids(token_id + 3) == [*range(293, token_id), token_id + 1, token_id + 2]
    assert BPE.unused_ids(293) == [] and BPE.unused_ids(295) == [293, 294]
    assert refused(loaded.decode, [293]) == "token id 293 is unused in the vocabulary"
    assert loaded.token_lengths[293:].tolist() == [0] * (token_id - 292)
    again = pair / "again"
    loaded.save_pretrained(again)
    other = Tokenizer(BPE._ranks, 292, special={END_OF_TEXT: 292, "[PAD]": token_id + 1})
    assert other.fingerprint != loaded.fingerprint == Tokenizer.from_pretrained(again).fingerprint


def in_front(pair: Path, names: list[str]) -> None:
    """Give special tokens the first ids, and remove <|endoftext|>."""

    def moved(vocab: dict[str, int]) -> None:
        del vocab[END_OF_TEXT]
        ids = {token: i + len(names) for token, i in vocab.items()}
        vocab.clear()
        vocab.update({name: i for i, name in enumerate(names)} | ids)

    change(pair / "vocab.json", moved)


def test_special_tokens_may_come_first(pair: Path) -> None:
    """As ByteLevelBPETokenizer of tokenizers saves them: only these two files name them."""
    in_front(pair, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    (pair / "tokenizer_config.json").unlink()
    loaded = Tokenizer.from_pretrained(pair)
    assert loaded.special_tokens == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    assert (loaded.eot, loaded.vocab_size) == (2, BPE.vocab_size + 4)
    text = "the lowest <mask> naïve 日本"
    assert loaded.encode(text) == [token + 5 for token in BPE.encode(text)]
    assert loaded.decode([0, *loaded.encode(text), 4]) == f"<s>{text}<mask>"
    loaded.save_pretrained(pair)
    assert Tokenizer.from_pretrained(pair).fingerprint == loaded.fingerprint
    assert json.loads((pair / "tokenizer_config.json").read_bytes())["eos_token"] == "</s>"


def test_file_may_name_the_end_of_a_text(pair: Path) -> None:
    in_front(pair, ["<start>", "<stop>"])
    message = refused(read, pair)
    assert "has no <|endoftext|>, nor does tokenizer_config.json name an eos_token of it" in message
    change(pair / "tokenizer_config.json", lambda c: c.update(eos_token={"content": "<stop>"}))
    assert read(pair).eot == 1
    change(pair / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    (pair / "special_tokens_map.json").write_text('{"eos_token": "<start>"}', encoding="utf-8")
    assert read(pair).eot == 0


def test_added_tokens_that_disagree_are_refused(pair: Path) -> None:
    (pair / "added_tokens.json").write_text('{"[PAD]": 294, "[SEP]": 293}', encoding="utf-8")
    change(
        pair / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"293": "[PAD]"})
    )
    assert 'adds token "[PAD]" as 294, which is 293 elsewhere' in refused(read, pair)


def test_too_many_special_tokens_are_refused(pair: Path) -> None:
    ids = {f"<extra_{i}>": 293 + i for i in range(10_001)}
    (pair / "added_tokens.json").write_text(json.dumps(ids), encoding="utf-8")
    assert "has 10,002 special tokens; at most 10,000" in refused(read, pair)


# ---- hostile files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\0}\0", "is UTF-16, not UTF-8"),
        (b'{"a": 1, "a": 2}', "is there twice|two tokens"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON|does not make"),
        (b"[" * 100_000, "not valid JSON|two tokens"),
        (b"\0" * 100, "not valid JSON|two tokens"),
        (b'{"a": NaN}', "NaN is not a number|does not make"),
        (b"7", "must hold a JSON object|two tokens"),
    ],
)
def test_bad_content_is_refused(pair: Path, name: str, content: bytes, message: str) -> None:
    (pair / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*({message})"):
        Tokenizer.from_pretrained(pair)


@pytest.mark.parametrize("name", FILES)
def test_huge_file_is_not_read(pair: Path, name: str) -> None:
    with open(pair / name, "wb") as file:
        file.truncate(LARGEST + 1)  # no bytes on disk, and none in memory
    assert refused(Tokenizer.from_pretrained, pair).startswith(
        f"{pair / name} has 33,554,433 bytes"
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "directory", "nowhere", "circle", "device"])
def test_pipe_device_directory_or_bad_link_is_refused(pair: Path, name: str, kind: str) -> None:
    """The reader does not wait, and does not take it for a missing file."""
    path = pair / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"nowhere": "absent", "circle": name, "device": "/dev/zero"}[kind])
    with pytest.raises(OSError, match=name):
        Tokenizer.from_pretrained(pair)


def test_files_with_a_byte_order_mark_or_crlf_are_read(pair: Path) -> None:
    for name in ("vocab.json", "tokenizer_config.json", "merges.txt"):
        content = (pair / name).read_bytes()
        (pair / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert read(pair) == BPE._vocabulary()
    text = "\ufeff" + json.dumps(fast(pair, str))
    (pair / "tokenizer.json").write_text(text, encoding="utf-8")
    assert read(pair) == BPE._vocabulary()
    path = pair / "merges.txt"
    path.write_bytes(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    path.write_bytes(path.read_bytes().removeprefix(b"#version: 0.2\r\n"))
    assert read(pair) == BPE._vocabulary(), "openai/gpt-2's first line may be missing"


@pytest.mark.slow
def test_token_of_a_megabyte_is_read_and_saved(tmp_path: Path) -> None:
    """Reading and saving take time in proportion to its size."""
    ranks = BYTES._ranks | {b"a" * 2 ** (i + 1): 257 + i for i in range(20)}
    halves = [(b"a" * 2**i, b"a" * 2**i) for i in range(20)]
    write(tmp_path, Vocabulary(ranks, 256, halves, {END_OF_TEXT: 256}))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.encode("a" * (2**20 + 2)) == [276, 257]
    loaded.save_pretrained(tmp_path)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FILES[:3]), st.data())
@pytest.mark.slow
def test_mutated_files_raise_value_error_or_os_error_only(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """After any change of bytes: a vocabulary that works, or a sentence."""
    directory = tmp_path_factory.mktemp("mutated")
    BPE.save_pretrained(directory)
    if name == "tokenizer.json":
        content = bytearray(json.dumps(fast(directory)).encode())
        (directory / "vocab.json").unlink()
    else:
        content = bytearray((directory / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        to = data.draw(st.integers(at, min(len(content), at + 9)))
        content[at:to] = data.draw(st.binary(max_size=9) | st.just(bytes(content[at:to] * 2)))
    (directory / name).write_bytes(content)
    try:
        tokenizer = Tokenizer.from_pretrained(directory)
    except (ValueError, OSError) as error:
        assert str(error).startswith(str(directory)) and "\n" not in str(error)
    else:
        try:
            assert tokenizer.decode(tokenizer.encode("it's the lowest")) == "it's the lowest"
        except ValueError as error:
            assert "the tokenizer has no token for byte 0x" in str(error)
        tokenizer.save_pretrained(directory)


# ---- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [GPT2, LLAMA3])
def test_a_chat_template_is_a_file_of_the_tokenizer(split: Split, tmp_path: Path) -> None:
    tokenizer = Tokenizer(BPE._ranks, BPE.eot, split=split, chat_template="{{ é }}\n")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text("utf-8") == "{{ é }}\n"
    found = Tokenizer.from_pretrained(tmp_path)
    assert found.chat_template == "{{ é }}\n" and found.covers(tokenizer)
    found.chat_template = None
    found.save_pretrained(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert Tokenizer.from_pretrained(tmp_path).chat_template is None


@pytest.mark.parametrize("split", [GPT2, LLAMA3])
def test_texts_may_begin_with_the_end_of_text(split: Split, tmp_path: Path) -> None:
    tokenizer = Tokenizer(BPE._ranks, BPE.eot, split=split, add_bos_token=True)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is True
    found = Tokenizer.from_pretrained(tmp_path)
    assert found.add_bos_token and found.encode("a") == BPE.encode("a")
    assert found.fingerprint == tokenizer.fingerprint
    if split != GPT2:  # transformers moves it from one file to the other
        del config["add_bos_token"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert Tokenizer.from_pretrained(tmp_path).add_bos_token
    config = {"add_bos_token": True, "bos_token": {"content": END_OF_TEXT}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(tmp_path).add_bos_token
    roles = tmp_path / "special_tokens_map.json"
    roles.write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    with pytest.raises(ValueError, match="bos_token is not the end of text"):
        Tokenizer.from_pretrained(tmp_path)
    found.add_bos_token = False
    found.save_pretrained(tmp_path)
    assert not Tokenizer.from_pretrained(tmp_path).add_bos_token


@pytest.mark.parametrize(
    ("entry", "template"),
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": ["default"], "template": "r"}, "default", {"name": "default"}], None),
        *(([], None), ({"default": "d"}, None), ("", None), ("\ud800", None), (5, None)),
    ],
)
def test_an_older_config_has_the_chat_template(pair: Path, entry: Any, template: Any) -> None:
    config = json.loads((pair / "tokenizer_config.json").read_text())
    (pair / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": entry}))
    assert Tokenizer.from_pretrained(pair).chat_template == template
    (pair / "chat_template.jinja").write_text("{{ b }}")  # transformers takes the file
    assert Tokenizer.from_pretrained(pair).chat_template == "{{ b }}"
    (pair / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja is not UTF-8" in refused(Tokenizer.from_pretrained, pair)
