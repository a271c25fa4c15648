"""Tokenizers: round trips, GPT-2's known ids, agreement with transformers, damaged files."""

import errno
import io
import json
import os
import signal
import subprocess

import numpy as np
import pytest
import tiktoken
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2c.files import atomic
from gpt2c.text.tokenizer import Tokenizer

SAMPLE = (
    "The quick brown fox jumps over the lazy dog; they're quick, aren't they?\n\n"
    "  It's 2024:\tnaïve café, 日本語, 😀👩‍👩‍👧.\r\n\x00\x85\xa0\u2028 end   \n   "
) * 3
BYTES = Tokenizer.from_name("bytes")
BPE = Tokenizer.train([SAMPLE, "low lower lowest newer newest wider"], 400)


@pytest.fixture(params=["bytes", "bpe", "gpt2"])
def tokenizer(request):
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    return {"bytes": BYTES, "bpe": BPE}[request.param]


def test_vocabulary_sizes(tokenizer):
    assert tokenizer.eot == tokenizer.vocab_size - 1
    assert BYTES.vocab_size == 257
    assert 257 < BPE.vocab_size <= 400


def test_decode_undoes_encode(tokenizer):
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE


@given(st.text(max_size=60))
@pytest.mark.slow
def test_decode_undoes_encode_of_any_text(text):
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert BYTES.encode(text) == list(text.encode())


def test_gpt2_known_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, I'm a language model,") == [
        15496,
        11,
        314,
        1101,
        257,
        3303,
        2746,
        11,
    ]
    assert gpt2.encode(SAMPLE) == tiktoken.get_encoding("gpt2").encode_ordinary(SAMPLE)
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"


def test_end_of_text_in_a_text_is_ordinary(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_encode_batch_agrees_with_encode(tokenizer):
    texts = ["", SAMPLE, "a<|endoftext|>b", "x"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("text", ["\ud83d", "a\ude00b", "\ud83d\ude00", "x" * 9 + "\udfff"])
def test_surrogates_are_the_same_at_every_door(text):
    """A pair is its character; a lone one, as JSON may have it, becomes U+FFFD."""
    wanted = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert BYTES.encode(text) == list(wanted.encode())
    assert BYTES.encode_batch([text, "a"])[0].tolist() == list(wanted.encode())
    pieces = BYTES.encode_pieces([list(text)])
    assert [token for _, ids in pieces for token in ids.tolist()] == list(wanted.encode())
    assert (
        Tokenizer.train([text * 9], 270).fingerprint
        == Tokenizer.train([wanted * 9], 270).fingerprint
    )


def test_tokenizer_refuses_one_text_in_place_of_several():
    assert "encode_batch takes several" in refused(BPE.encode, ["a", "b"])
    assert "got bytes" in refused(BPE.encode, b"a")
    for use in (BPE.encode_batch, lambda text: Tokenizer.train(text, 300)):
        assert "put it into a list" in refused(use, "one text")
        assert "texts must be strings, got int" in refused(use, [1])
        assert refused(use, 5) == "texts must be several strings, got 5"


@pytest.mark.parametrize("wrong", [5, None, 1.5, True, np.array(5), np.int64(5)])
def test_tokenizer_refuses_one_id_in_place_of_several(wrong):
    for decode in (BPE.decode, lambda ids: list(BPE.stream(ids))):
        assert refused(decode, wrong) == f"ids must be several token ids, got {wrong!r}"


@pytest.mark.parametrize("wrong", ["a", 1.5, 1.0, None, True, [1], np.float64(1), np.array([1, 2])])
def test_id_is_a_whole_number(wrong):
    message = f"a token id must be a whole number, got {wrong!r}"
    for decode in (BPE.decode, lambda ids: list(BPE.stream(ids))):
        assert refused(decode, [0, wrong]) == message
    assert refused(BPE.token_bytes, wrong) == message


def test_bad_tokenizers_and_sizes_are_refused():
    assert refused(BPE.covers, "gpt2") == "other must be a Tokenizer, got 'gpt2'"
    assert refused(Tokenizer.from_spec, 5) == "the name of the tokenizer must be a string, got 5"
    for wrong in ("300", 300.5, None):
        message = f"vocab_size must be a whole number, got {wrong!r}"
        assert refused(Tokenizer.train, ["a"], wrong) == message == refused(BPE.unused_ids, wrong)


def test_special_tokens_are_encoded_where_they_are_allowed(tokenizer):
    text = "a<|endoftext|><|endoftext|> b"
    wanted = [*tokenizer.encode("a"), tokenizer.eot, tokenizer.eot, *tokenizer.encode(" b")]
    assert tokenizer.encode(text, allowed_special="all") == wanted
    assert tokenizer.encode(text, allowed_special={"<|endoftext|>"}) == wanted
    assert tokenizer.encode(text, allowed_special="<|endoftext|>") == wanted
    for names in ({"[PAD]"}, "[PAD]", ["<|endoftext|>", "[PAD]"]):
        assert "'[PAD]' is none of the special tokens <|endoftext|>" in refused(
            tokenizer.encode, text, names
        )
    message = "allowed_special must be names of special tokens or 'all', got "
    for wrong in (5, True, None, [5], [[1]], np.array(3)):
        assert refused(tokenizer.encode, text, wrong) == f"{message}{wrong!r}"


NASTY = [
    "word " * 90,
    "\n\n  \t a  b\u3000c\x1c d\x85 " * 20,
    "it's don't we'll 'tis'll've " * 15,
    "x" * 500,
    "ab" * 250,
    "1234567890" * 40,
    "今天天气很好我们去公园" * 30,
    "今天,小明在公园里看书。" * 20,
    "😀é日\u0301" * 60,
    " " * 300 + "end",
    "!?'" * 100 + "don'tll" * 40,
]


def small_windows(patch, size):
    for module in ("tokenizer", "windows"):
        patch.setattr(f"gpt2c.text.{module}.WINDOW", size)


@pytest.mark.parametrize("window", [16, 40])
@pytest.mark.parametrize("text", NASTY)
def test_text_in_windows_has_the_ids_of_the_whole(tokenizer, text, window, monkeypatch):
    whole = tokenizer._encoding.encode_ordinary(text)
    small_windows(monkeypatch, window)
    monkeypatch.setattr(tokenizer, "_window", window)
    assert tokenizer.encode(text) == whole
    pieces = ([text[i : i + size] for i in range(0, len(text), size)] for size in (1, 7, 1000))
    found = {0: [], 1: [], 2: []}
    for number, ids in tokenizer.encode_pieces(pieces):
        found[number] += ids.tolist()
    assert list(found.values()) == [whole] * 3


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab' \n1日。\x1c", max_size=200), st.integers(12, 40))
def test_any_text_in_windows_has_the_ids_of_the_whole(text, window):
    tokenizer = Tokenizer(BPE._ranks, BPE.eot)
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch, window)
        tokenizer._window = window
        assert tokenizer.encode(text) == BPE._encoding.encode_ordinary(text)


def test_text_is_learned_from_in_windows_as_a_whole(monkeypatch):
    """A large one is learned from in another process, which gives the same tokens."""
    texts = [SAMPLE * 20, "low lower lowest newer newest wider " * 50]
    whole = Tokenizer.train(texts, 400)
    small_windows(monkeypatch, 64)
    assert Tokenizer.train(texts, 400).fingerprint == whole.fingerprint
    monkeypatch.setattr("gpt2c.text.bpe_trainer._SMALL", 100)
    assert Tokenizer.train(texts, 400).fingerprint == whole.fingerprint


def test_interrupted_trainer_process_ends(monkeypatch):
    started = []
    popen = subprocess.Popen

    def watched(*arguments, **keywords):
        started.append(popen(*arguments, **keywords))
        return started[0]

    def texts():
        yield "some text " * 1000
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt2c.text.bpe_trainer._SMALL", 100)
    monkeypatch.setattr(subprocess, "Popen", watched)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train(texts(), 300)
    assert started[0].returncode == -signal.SIGKILL


def test_trainer_killed_for_memory_raises_memory_error(monkeypatch):
    class Ended:
        stdin, returncode = io.BytesIO(), -signal.SIGABRT

        def communicate(self):
            return b"", b"memory allocation of 16 bytes failed"

    monkeypatch.setattr("gpt2c.text.bpe_trainer._SMALL", 100)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Ended())
    with pytest.raises(MemoryError, match="learning a tokenizer of this text takes more"):
        Tokenizer.train(["some text " * 100], 300)


def test_tokenizers_agree_by_content():
    assert BYTES.fingerprint == Tokenizer.from_name("bytes").fingerprint
    a, b = (Tokenizer.train([text * 9], 262) for text in ("abcdef abc ", "uvwxyz uvw "))
    assert a.vocab_size == b.vocab_size
    assert a.fingerprint != b.fingerprint and len(a.fingerprint) == 32


def test_empty_name_is_refused():
    for use in (Tokenizer.from_spec, Tokenizer.from_pretrained):
        assert "the name of the tokenizer is empty" in refused(use, "")


def test_token_lengths_count_bytes(tokenizer):
    lengths = tokenizer.token_lengths
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths.dtype == np.int64
    assert lengths[tokenizer.encode(SAMPLE)].sum() == len(SAMPLE.encode())
    assert lengths[tokenizer.eot] == 0
    assert (np.delete(lengths, tokenizer.eot) > 0).all()


def test_stream_waits_for_whole_characters():
    pieces = list(BYTES.stream(BYTES.encode("a😀é")))
    assert pieces == ["a", "😀", "é"]


@given(st.lists(st.integers(0, 256), max_size=40))
def test_stream_joined_is_decode(ids):
    assert "".join(BYTES.stream(ids)) == BYTES.decode(ids)


def test_stream_ends_an_unfinished_character():
    assert list(BYTES.stream("é".encode()[:1])) == ["\ufffd"]


@pytest.mark.parametrize("token_id", [-1, 257, 2**40])
def test_ids_outside_the_vocabulary_are_refused(token_id):
    with pytest.raises(ValueError, match=r"outside the vocabulary \(0 to 256\)"):
        BYTES.decode([65, token_id])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        list(BYTES.stream([65, token_id]))


def test_training_is_deterministic():
    texts = [SAMPLE, SAMPLE[::-1]]
    assert Tokenizer.train(texts, 350)._ranks == Tokenizer.train(texts, 350)._ranks


def test_training_learns_the_commonest_pair_first():
    assert Tokenizer.train(["aabaab xxaab"], 258).encode("aab")[0] == 256


def test_training_on_little_text_gives_a_smaller_vocabulary():
    assert Tokenizer.train(["ab"], 1000).vocab_size == 258
    assert Tokenizer.train([], 1000).vocab_size == 257


@pytest.mark.parametrize("vocab_size", [256, 0, -1])
def test_training_needs_room_for_the_bytes(vocab_size):
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train(["text"], vocab_size)


def test_run_of_spaces_too_long_to_split_is_refused():
    text = "a" + " " * 400_000
    for use in (BYTES.encode, lambda text: BYTES.encode_batch([text])):
        with pytest.raises(ValueError, match="400000 or more whitespace"):
            use(text)
    with pytest.raises(ValueError, match="400000 or more whitespace"):
        Tokenizer.train([text], 300)
    assert BYTES.decode(BYTES.encode(text[:-1])) == text[:-1]


def test_names_and_specs_are_parsed(tmp_path, monkeypatch):
    BPE.save_pretrained(tmp_path)
    assert Tokenizer.from_spec("bytes").vocab_size == 257
    assert Tokenizer.from_spec(str(tmp_path)).vocab_size == BPE.vocab_size
    with pytest.raises(ValueError, match="known names are gpt2, bytes"):
        Tokenizer.from_name("gpt3")
    with pytest.raises(ValueError, match="neither a directory nor one of gpt2, bytes"):
        Tokenizer.from_spec(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="nor a name on the hub such as user/name"):
        Tokenizer.from_spec("abacus")
    with pytest.raises(OSError, match="the file or directory some/name does not exist here"):
        Tokenizer.from_spec("some/name")
    with pytest.raises(ValueError, match="gpt2c prepare --tokenizer bpe:512"):
        Tokenizer.from_spec("bpe:512")


def test_saved_and_loaded_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new" / "directory")
    loaded = Tokenizer.from_pretrained(tmp_path / "new" / "directory")
    assert loaded._ranks == tokenizer._ranks
    assert (loaded.vocab_size, loaded.eot) == (tokenizer.vocab_size, tokenizer.eot)
    assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_gpt2_files_equal_those_of_openai(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert merges[:4] == ["#version: 0.2", "Ġ t", "Ġ a", "h e"]
    assert len(merges) == 50002
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert (vocabulary["!"], vocabulary["Ġthe"], vocabulary["<|endoftext|>"]) == (0, 262, 50256)


def test_transformers_gives_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert theirs.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.eot


def test_end_of_text_may_have_any_id(tmp_path):
    """Hugging Face's tokenizers often give it id 0 in a new vocabulary."""
    BPE.save_pretrained(tmp_path)
    path = tmp_path / "vocab.json"
    vocabulary = json.loads(path.read_bytes())
    moved = {token: token_id + 1 for token, token_id in vocabulary.items()}
    moved["<|endoftext|>"] = 0
    path.write_text(json.dumps(moved), encoding="utf-8")
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.eot == 0
    assert loaded.encode(SAMPLE) == [token_id + 1 for token_id in BPE.encode(SAMPLE)]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_file_is_named(tmp_path, name):
    BPE.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_file_outside_utf_8_is_refused(tmp_path, name):
    BPE.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"{\xff}")
    with pytest.raises(ValueError, match=f"{name} is not UTF-8: byte 1 is 0xff"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("<|endoftext|>"), r"has no <\|endoftext\|>"),
        (lambda v: v.update(a=v["b"]), "must number its"),
        (lambda v: v.update(a=-1), "must number its"),
        (lambda v: v.update(a="1"), "tokens and their ids"),
        (lambda v: v.update(a=True), "tokens and their ids"),
        (lambda v: v.update({"a b": len(v)}), "stands for no byte"),
        (lambda v: v.update({"zzzz": v.pop("a")}), "in the order of their ids"),
        (lambda v: v.update({"zzzz": len(v)}), "in the order of their ids"),
        (lambda v: v.update({"": len(v)}), "in the order of their ids"),
    ],
)
def test_damaged_vocabulary_is_refused(tmp_path, change, message):
    BPE.save_pretrained(tmp_path)
    path = tmp_path / "vocab.json"
    vocabulary = json.loads(path.read_bytes())
    change(vocabulary)
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", '{"a": 1', "[1, 2]", "[" * 100_000])
def test_vocabulary_must_be_a_json_object(tmp_path, content):
    BPE.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(content, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"vocab\.json (is not valid JSON|must (hold a|be one) JSON object)"
    ):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "in the order of their ids"),
        (lambda lines: [*lines[:-2], lines[-1], lines[-2]], "in the order of their ids"),
        (lambda lines: [*lines, "a"], "two tokens separated by a space"),
        (lambda lines: [*lines, "a b c"], "two tokens separated by a space"),
        (lambda lines: [*lines, "日 本"], "two tokens separated by a space"),
        (lambda lines: [*lines, ""], "two tokens separated by a space"),
    ],
)
def test_damaged_merges_are_refused(tmp_path, change, message):
    BPE.save_pretrained(tmp_path)
    path = tmp_path / "merges.txt"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    path.write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_merge_of_a_later_token_is_refused(tmp_path):
    tokenizer = Tokenizer.train(["abab abab abab"], 259)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "merges.txt"
    assert path.read_text(encoding="utf-8").split("\n")[1:3] == ["a b", "ab ab"]
    path.write_text("#version: 0.2\na b\naba b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="merge 2 uses a token that no earlier merge has made"):
        Tokenizer.from_pretrained(tmp_path)


def test_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    BYTES.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(source, destination):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        BPE.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tokenizer_covers_a_smaller_one() -> None:
    base = Tokenizer.from_name("bytes")
    special = {**base.special_tokens, "[PAD]": 257}
    more = Tokenizer(base._ranks, base.eot, special=special)
    assert more.covers(base) and more.covers(more) and not base.covers(more)
    assert more.fingerprint != base.fingerprint
    other = {"<|endoftext|>": 257, "[PAD]": 256}
    assert not Tokenizer(base._ranks, 257, special=other).covers(base)
