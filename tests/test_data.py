"""Token files, hold-out, batches and Python's documentation: nothing lost, nothing seen twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from gpt2c import corpus, files
from gpt2c.corpus import python_documentation
from gpt2c.data import (
    Batches,
    prepare,
    split_validation,
    windows,
)
from gpt2c.tokenfile import find_shards, read_shards, read_tokens, write_tokens
from gpt2c.tokenizer import Tokenizer

BYTES = Tokenizer.from_name("bytes")


def split(documents, fraction, seed):
    """Give the texts to train on, and those to validate on."""
    texts = {"train": [], "val": []}
    for name, pieces in split_validation(documents, fraction, seed).parts(documents):
        texts[name].append("".join(pieces))
    return texts["train"], texts["val"]


def make_documents(count=40):
    return [f"Document {n}.\n" + f"line {n} of it\n" * (1 + 7 * n % 11) for n in range(count)]


# --- hold-out --------------------------------------------------------------------------------


def test_whole_documents_are_held_out():
    documents = make_documents()
    train, val = split(documents, 0.1, seed=1)
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    share = sum(map(len, val)) / sum(map(len, documents))
    assert 0.05 <= share <= 0.1


def test_hold_out_is_given_by_the_seed():
    documents = make_documents()
    assert split(documents, 0.1, seed=1) == split(documents, 0.1, seed=1)
    assert split(documents, 0.1, seed=1) != split(documents, 0.1, seed=2)


def test_copies_of_a_document_stay_together():
    documents = make_documents(30) * 3
    train, val = split(documents, 0.2, seed=3)
    assert not set(train) & set(val)
    assert len(train) + len(val) == len(documents)


def test_the_tail_of_a_single_document_is_held_out_at_a_line_break():
    text = "".join(f"line {n}\n" for n in range(100))
    (head,), (tail,) = split([text], 0.1, seed=1)
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.1 <= len(tail) / len(text) < 0.12


def test_the_tail_without_line_breaks_near_is_cut_anywhere():
    text = "a\n" + "b" * 998
    (head,), (tail,) = split([text], 0.1, seed=1)
    assert (len(head), len(tail)) == (900, 100)


def test_few_large_documents_lose_a_tail_not_a_document():
    documents = ["a\n" * 500, "b\n" * 600, "c\n"]
    train, val = split(documents, 0.1, seed=1)
    assert len(train) == 3
    assert train[1] + val[0] == documents[1]


@given(
    st.lists(st.text(alphabet="ab \n", max_size=30), max_size=8),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_a_split_loses_nothing(documents, fraction, seed):
    try:
        train, val = split(documents, fraction, seed)
    except ValueError:
        return
    assert train
    assert val
    if len(train) + len(val) == len(documents):
        assert sorted(train + val) == sorted(documents)
        assert not set(train) & set(val)
    else:
        assert sum(before != after for before, after in zip(documents, train, strict=True)) >= 1
        assert any(head + val[0] in documents for head in train)


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        ([], 0.1, "no text"),
        (["", " \n"], 0.1, "no text"),
        (["a"], 0.1, "too short"),
        (["text"], 0.0, "between 0 and 1, not 0.0"),
        (["text"], 1.0, "between 0 and 1, not 1.0"),
        (["text"], float("nan"), "between 0 and 1, not nan"),
    ],
)
def test_nothing_to_hold_out(documents, fraction, message):
    with pytest.raises(ValueError, match=message):
        split(documents, fraction, seed=1)


# --- prepare ---------------------------------------------------------------------------------


def test_prepare_writes_what_the_documents_say(tmp_path):
    documents = [*make_documents(), "é😀 <|endoftext|> in a text"]
    out = tmp_path / "data"
    prepared = prepare(documents, out, "bytes", val_fraction=0.2, seed=1)
    expected = split(documents, 0.2, seed=1)
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "merges.txt",
        "tokenizer_config.json",
        "train.bin",
        "val.bin",
        "vocab.json",
    ]
    tokenizer = Tokenizer.from_pretrained(out)
    for name, texts in zip(("train", "val"), expected, strict=True):
        tokens = read_tokens(out / f"{name}.bin", tokenizer.vocab_size)
        starts = np.flatnonzero(tokens == tokenizer.eot)
        parts = np.split(tokens, starts)[1:]  # before the first end of text there is nothing
        assert starts[0] == 0
        assert [tokenizer.decode(part[1:]) for part in parts] == texts
        assert getattr(prepared, f"{name}_tokens") == len(tokens)
        assert getattr(prepared, f"{name}_bytes") == sum(len(text.encode()) for text in texts)
        assert tokenizer.token_lengths[tokens].sum() == getattr(prepared, f"{name}_bytes")
    assert (prepared.documents, prepared.vocab_size) == (41, 257)
    assert not prepared.tail_held_out


def test_prepare_says_when_it_held_out_a_tail(tmp_path):
    assert prepare(["a line\n" * 50], tmp_path / "data", BYTES).tail_held_out


def test_prepare_in_shards_loses_no_token(tmp_path):
    whole = prepare(make_documents(), tmp_path / "one", "bytes")
    prepared = prepare(make_documents(), tmp_path / "many", "bytes", shard_tokens=500)
    assert prepared == whole
    names = [path.name for path in find_shards(tmp_path / "many", "train")]
    assert names == [f"train_{n:06d}.bin" for n in range(1, len(names) + 1)] and len(names) > 2
    shards = read_shards(tmp_path / "many", "train", 257)
    assert {len(shard) for shard in shards[:-1]} == {500} and 0 < len(shards[-1]) <= 500
    np.testing.assert_array_equal(
        np.concatenate(shards), read_tokens(tmp_path / "one" / "train.bin")
    )
    for name in ("val.bin", "vocab.json"):
        one, many = ((tmp_path / kind / name).read_bytes() for kind in ("one", "many"))
        assert one == many


def test_prepare_leaves_no_shard_of_another_preparation(tmp_path):
    prepare(make_documents(), tmp_path, "bytes", shard_tokens=500)
    write_tokens(tmp_path / "old_val_000000.bin", [1])
    prepare(make_documents(), tmp_path, "bytes", overwrite=True)
    assert [path.name for path in find_shards(tmp_path, "train")] == ["train.bin"]
    assert [path.name for path in find_shards(tmp_path, "val")] == ["val.bin"]
    with pytest.raises(ValueError, match="shard_tokens must be at least 1, or 0"):
        prepare(make_documents(), tmp_path / "new", "bytes", shard_tokens=-1)
    assert not (tmp_path / "new").exists()


def test_prepare_is_deterministic(tmp_path):
    for name in "ab":
        prepare(make_documents(), tmp_path / name, "bpe:300", seed=7)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_bpe_is_trained_on_training_documents_only(tmp_path):
    documents = make_documents()
    train, _ = split(documents, 0.1, seed=1)
    prepare(documents, tmp_path, "bpe:300", seed=1)
    trained = Tokenizer.from_pretrained(tmp_path)
    assert trained._ranks == Tokenizer.train(train, 300)._ranks
    assert trained._ranks != Tokenizer.train(documents, 300)._ranks


def test_prepare_takes_a_directory_as_tokenizer(tmp_path):
    Tokenizer.train(["some text"], 260).save_pretrained(tmp_path / "tokenizer")
    prepared = prepare(make_documents(), tmp_path / "data", str(tmp_path / "tokenizer"))
    assert prepared.vocab_size == 260


@pytest.mark.parametrize(
    "spec", ["bpe:", "bpe:many", "bpe:-1", "bpe:²", "bpe:70000", "bpe:100", "x"]
)
def test_prepare_refuses_a_bad_tokenizer_before_it_writes(tmp_path, spec):
    with pytest.raises(ValueError, match=r"tokenizer 'bpe:|at least 257|neither a directory"):
        prepare(make_documents(), tmp_path / "data", spec)
    assert not list(tmp_path.iterdir())


def test_prepare_refuses_a_vocabulary_that_uint16_cannot_hold(tmp_path):
    class Large:
        vocab_size = 65537

    with pytest.raises(ValueError, match="65537 tokens; token files hold at most 65536"):
        prepare(make_documents(), tmp_path / "data", Large())
    assert not list(tmp_path.iterdir())


def test_prepare_overwrites_only_when_told(tmp_path):
    prepare(make_documents(), tmp_path, "bytes")
    before = (tmp_path / "train.bin").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(make_documents(50), tmp_path, "bytes")
    assert (tmp_path / "train.bin").read_bytes() == before
    prepare(make_documents(50), tmp_path, "bytes", overwrite=True)
    assert (tmp_path / "train.bin").read_bytes() != before


def test_a_failed_overwrite_leaves_what_was_there(tmp_path, monkeypatch):
    prepare(make_documents(), tmp_path, "bytes")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    for out in (tmp_path, tmp_path.parent / "new"):
        with pytest.raises(OSError, match="No space"):
            prepare(make_documents(), out, "bpe:300", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not (tmp_path.parent / "new").exists()


@pytest.mark.parametrize("parent", [".", "/dev/shm"])
def test_links_stay_when_data_is_prepared_again(tmp_path, parent):
    """Of another file system, too: there the files are moved before the old ones go."""
    if not Path(parent).is_dir():
        pytest.skip(f"no {parent} here")
    with tempfile.TemporaryDirectory(dir=tmp_path / parent) as name:
        disk, out = Path(name), tmp_path / "out"
        out.mkdir()
        links = ["train_000001.bin", "train_000002.bin", "val.bin", "manifest.json", "vocab.json"]
        for name in links:
            (out / name).symlink_to(disk / name)
        for documents in (make_documents(), make_documents(30)):
            prepare(documents, out, "bytes", overwrite=True, shard_tokens=1000)
            prepare(documents, tmp_path / "plain", "bytes", overwrite=True, shard_tokens=1000)
            assert all((out / name).is_symlink() for name in links)
            assert sorted(os.listdir(disk)) == sorted(links)
            wanted = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
            assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
        prepare(make_documents(), out, "bytes", overwrite=True)
        assert read_shards(out, "train") and not (out / "train_000001.bin").is_symlink()
        before = (out / "train.bin").read_bytes()
        (out / "val.bin").unlink()
        (out / "val.bin").symlink_to("train.bin")
        with pytest.raises(OSError, match="lead to one file: remove the link"):
            prepare(make_documents(30), out, "bytes", overwrite=True)
        assert (out / "train.bin").read_bytes() == before
        assert not [name for name in [*os.listdir(out), *os.listdir(disk)] if name[0] == "."]


def test_a_kill_leaves_no_mixture_of_two_preparations(tmp_path, monkeypatch):
    """Whatever moment it comes at, what has val.bin is whole."""
    prepare(make_documents(), tmp_path, "bytes", shard_tokens=500)
    replace, done = os.replace, []

    def killed(source, destination):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(destination)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_documents(50), tmp_path, "bpe:300", overwrite=True, shard_tokens=500)
    assert find_shards(tmp_path, "val") == [] and len(find_shards(tmp_path, "train")) == 1


# --- pieces ----------------------------------------------------------------------------------


class Pieces:
    """Documents that come in pieces, and can be read as often as wanted."""

    def __init__(self, documents, size):
        self.documents, self.size = documents, size

    def __iter__(self):
        for text in self.documents:
            yield (text[i : i + self.size] for i in range(0, len(text), self.size))


@pytest.mark.parametrize("documents", [make_documents(), ["a line of it\n" * 300 + "end"]])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_documents_in_pieces_give_the_same_files(tmp_path, documents, tokenizer):
    prepared = prepare(documents, tmp_path / "whole", tokenizer)
    for size in (1, 7, 1000):
        assert prepare(Pieces(documents, size), tmp_path / str(size), tokenizer) == prepared
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / str(size) / path.name).read_bytes()


def test_documents_that_can_be_read_once_are_kept(tmp_path):
    prepare(make_documents(), tmp_path / "list", "bytes")
    prepare(iter(make_documents()), tmp_path / "once", "bytes")
    for name in ("train.bin", "val.bin"):
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("list", "once"))
        assert one == other
    assert "put it into a list" in refused(prepare, "one text", tmp_path / "x", "bytes")


def test_documents_that_change_meanwhile_are_refused(tmp_path):
    class Changing:
        times = 0

        def __iter__(self):
            self.times += 1
            yield from make_documents(40 if self.times == 1 else 39)

    with pytest.raises(OSError, match="changed while it was read"):
        prepare(Changing(), tmp_path / "data", "bytes")
    assert not (tmp_path / "data").exists()


def test_a_large_text_is_learned_from_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2c.data.LEARNED", 5000)
    learned = []
    train = Tokenizer.train_on_pieces
    monkeypatch.setattr(
        Tokenizer,
        "train_on_pieces",
        lambda texts, size: train(
            [learned.append("".join(t)) or [learned[-1]] for t in texts], size
        ),
    )
    documents = [f"document {n:04d}\n" * 4 for n in range(500)]
    prepare(documents, tmp_path, "bpe:300")
    text = "".join(learned)
    assert 4000 < len(text) <= 5000
    numbers = np.array([int(part[:4]) for part in text.split("document ")[1:]])
    assert all(((numbers >= n) & (numbers < n + 100)).sum() > 40 for n in range(0, 500, 100))


def test_lone_surrogates_are_written_as_they_are_encoded(tmp_path):
    documents = [f"a\ud83d b {n} \ud83d\ude00\n" for n in range(30)]
    prepare(documents, tmp_path, "bytes")
    tokens = read_tokens(tmp_path / "train.bin")
    text = BYTES.decode(tokens[tokens != BYTES.eot])
    assert text.count("a\ufffd b ") == text.count("\U0001f600\n") == (tokens == BYTES.eot).sum()


# --- the manifest ----------------------------------------------------------------------------


def test_the_manifest_lists_what_was_written(tmp_path):
    prepared = prepare(make_documents(), tmp_path, "bytes", shard_tokens=500)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["version"] == 1
    assert manifest["tokenizer"] == Tokenizer.from_pretrained(tmp_path).fingerprint
    assert manifest["vocab_size"] == 257
    for split in ("train", "val"):
        entries = manifest[split]["files"]
        assert [e["name"] for e in entries] == [p.name for p in find_shards(tmp_path, split)]
        assert sum(e["tokens"] for e in entries) == getattr(prepared, f"{split}_tokens")
        assert manifest[split]["bytes"] == getattr(prepared, f"{split}_bytes")
        content = [(tmp_path / e["name"]).read_bytes()[1024:] for e in entries]
        assert [e["crc32"] for e in entries] == [zlib.crc32(part) for part in content]
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 40


def test_what_does_not_belong_together_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    prepare(make_documents(), one, "bytes", shard_tokens=500)
    prepare([text.upper() for text in make_documents()], other, "bytes", shard_tokens=500)
    assert len(read_shards(one, "train", 257, BYTES.fingerprint)) > 2
    third = (one / "train_000002.bin").read_bytes()
    (one / "train_000002.bin").write_bytes((other / "train_000002.bin").read_bytes())
    message = refused(read_shards, one, "train")  # of the same name and size
    assert "train_000002.bin is not the file that manifest.json" in message
    assert "train_000001.bin: it is of another preparation" in message
    (one / "train_000002.bin").write_bytes(third)
    write_tokens(one / "more_train.bin", [1, 2])
    assert "more_train.bin is no file of the preparation" in refused(read_shards, one, "train")
    assert read_shards(one, "val")
    (one / "more_train.bin").unlink()
    (one / "train_000001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_000001\.bin is missing: manifest"):
        read_shards(one, "train")
    (one / "manifest.json").unlink()  # as llm.c's directories, and older ones
    assert read_shards(one, "train")


def test_token_files_of_another_tokenizer_are_refused(tmp_path):
    prepare(make_documents(), tmp_path, "bpe:300")
    own = Tokenizer.from_pretrained(tmp_path)
    other = Tokenizer.train([text.upper() for text in make_documents()], 300)
    assert own.vocab_size == other.vocab_size and own.fingerprint != other.fingerprint
    assert read_shards(tmp_path, "val", 300, own.fingerprint)
    message = refused(read_shards, tmp_path, "val", 300, other.fingerprint)
    assert "are of another tokenizer than the one given, as manifest.json says" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest.json is not valid JSON"),
        (b"{}", "manifest.json: version must be 1, got None"),
        (b'{"version": 2}', "manifest.json: version must be 1, got 2"),
        (b'{"version": 1}', "manifest.json is damaged"),
        (b'{"version": 1, "tokenizer": "", "train": 1, "val": 1}', "manifest.json is damaged"),
        (
            b'{"version": 1, "tokenizer": "", "train": {"files": [7]}, "val": {"files": []}}',
            "manifest.json is damaged",
        ),
    ],
)
def test_a_manifest_that_is_none(tmp_path, content, message):
    prepare(make_documents(), tmp_path, "bytes")
    (tmp_path / "manifest.json").write_bytes(content)
    assert message in refused(read_shards, tmp_path, "train")


# --- batches ---------------------------------------------------------------------------------


def test_batches_are_shifted_by_one(tmp_path):
    write_tokens(tmp_path / "a.bin", np.arange(1000))
    x, y = Batches([read_tokens(tmp_path / "a.bin")], batch_size=3, block_size=8, seed=1).batch(5)
    assert x.shape == y.shape == (3, 8)
    assert x.dtype == y.dtype == np.int32
    assert type(x) is type(y) is np.ndarray
    assert x.flags.c_contiguous and y.flags.c_contiguous
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def few(count: int, middle: str = "") -> str:
    """Return how a message begins about so many tokens."""
    return f"1 token{middle} is" if count == 1 else f"{count} tokens{middle} are"


@given(N=st.integers(1, 400), B=st.integers(1, 4), T=st.integers(1, 9), seed=st.integers(0, 2**63))
def test_each_token_is_a_target_in_every_epoch(N, B, T, seed):
    tokens = np.arange(N, dtype=np.uint16)
    if N < B * T + 1:
        with pytest.raises(ValueError, match=f"^{few(N)} too few .* needs {B * T + 1}"):
            Batches([tokens], B, T, seed)
        return
    batches = Batches([tokens], B, T, seed)
    per_epoch = batches.windows_per_epoch
    targets = np.concatenate([batches.batch(step)[1] for step in range(3 * per_epoch // B + 1)])
    for epoch in range(3):
        seen = targets[epoch * per_epoch : (epoch + 1) * per_epoch]
        np.testing.assert_array_equal(np.unique(seen), np.arange(1, N))
        assert len(np.unique(seen[:, 0])) == per_epoch  # no window comes twice
    assert batches.targets_per_epoch == N - 1
    assert per_epoch * T - (N - 1) <= max(T - 1, (N - 1) // 10)  # hardly anything comes twice


@pytest.mark.parametrize(("N", "T"), [(767, 256), (1023, 256), (60_000, 256), (1025, 16), (18, 16)])
def test_the_end_of_a_text_is_trained_on(N, T):
    tokens = np.arange(N, dtype=np.uint16)
    batches = Batches([tokens], 1, T, seed=1)
    steps = range(batches.windows_per_epoch)
    seen = np.unique(np.concatenate([batches.batch(step)[1] for step in steps]))
    np.testing.assert_array_equal(seen, np.arange(1, N))


def test_each_shard_that_holds_a_window_is_used():
    lengths = [2000, 511, 257, 256, 1]
    shards = [np.full(N, number, np.uint16) for number, N in enumerate(lengths)]
    batches = Batches(shards, 2, 256, seed=1)
    seen = [batches.batch(step)[0] for step in range(batches.windows_per_epoch // 2)]
    assert set(np.concatenate(seen).ravel().tolist()) == {0, 1, 2}
    assert batches.left_out == 2
    assert batches.targets_per_epoch == 1999 + 510 + 256


def test_epochs_differ_in_order_and_offset():
    batches = Batches([np.arange(1000, dtype=np.uint16)], batch_size=1, block_size=16, seed=3)
    starts = np.array(
        [batches.batch(step)[0][0, 0] for step in range(20 * batches.windows_per_epoch)]
    ).reshape(20, -1)
    assert len(set(map(tuple, starts.tolist()))) == 20
    assert len({tuple(sorted(epoch)) for epoch in starts.tolist()}) > 5


def test_a_batch_depends_on_seed_and_step_only():
    tokens = np.arange(500, dtype=np.uint16)
    forward = Batches([tokens], 4, 10, seed=1)
    expected = [forward.batch(step)[0] for step in range(60)]
    backward = Batches([tokens], 4, 10, seed=1)
    for step in reversed(range(60)):
        np.testing.assert_array_equal(backward.batch(step)[0], expected[step])
    other = Batches([tokens], 4, 10, seed=2)
    assert any((other.batch(step)[0] != expected[step]).any() for step in range(3))


@pytest.mark.parametrize(
    ("N", "B", "T", "seed", "checksum"),
    [
        (1000, 3, 8, 1, 3518575241),
        (25, 3, 8, 5, 650623262),
        (41, 5, 8, 2**63, 3181805142),
        (5000, 4, 64, 1337, 608227338),
    ],
)
def test_the_order_of_older_runs_is_kept(N, B, T, seed, checksum):
    tokens = (np.arange(N) * 7919 % 65521).astype(np.uint16)
    batches = Batches([tokens], B, T, seed, order=1)
    content = b"".join(batches.batch(step)[0].tobytes() for step in range(40))
    assert zlib.crc32(content) == checksum


@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=5),
    B=st.integers(1, 4),
    T=st.integers(1, 9),
    seed=st.integers(0, 2**63),
)
def test_an_epoch_is_one_permutation_of_the_windows_of_all_shards(lengths, B, T, seed):
    # Shard n holds 1000 n, 1000 n + 1, ..., so a token tells where it stood.
    shards = [np.arange(1000 * n, 1000 * n + N, dtype=np.uint16) for n, N in enumerate(lengths)]
    if sum((N - 1) // T for N in lengths) < B:
        middle = f" in {len(lengths)} shards" if len(lengths) > 1 else ""
        with pytest.raises(ValueError, match=f"^{few(sum(lengths), middle)} too few"):
            Batches(shards, B, T, seed)
        return
    for order in (1, 2):
        batches = Batches(shards, B, T, seed, order)
        per_epoch = batches.windows_per_epoch
        pairs = [batches.batch(step) for step in range(2 * per_epoch // B + 1)]
        x, y = (np.concatenate([pair[i] for pair in pairs])[: 2 * per_epoch] for i in (0, 1))
        np.testing.assert_array_equal(x // 1000, np.repeat(x[:, :1] // 1000, T, 1))
        np.testing.assert_array_equal(y, x + 1)  # within one shard, targets too
        for epoch in (y[:per_epoch], y[per_epoch:]):
            for n, N in enumerate(lengths):
                seen = np.unique(epoch[epoch[:, 0] // 1000 == n])
                if order == 1:
                    if len(seen):
                        np.testing.assert_array_equal(seen, seen[0] + np.arange(len(seen)))
                    assert N - len(seen) <= 2 * T
                else:
                    whole = 1000 * n + np.arange(1, N) if N > T else []
                    np.testing.assert_array_equal(seen, whole)
        again = Batches(shards, B, T, seed, order)
        for step in (len(pairs) - 1, 0):
            np.testing.assert_array_equal(again.batch(step)[0], pairs[step][0])


def test_an_epoch_mixes_shards():
    shards = [np.arange(1000 * n, 1000 * n + 400, dtype=np.uint16) for n in range(3)]
    x, _ = Batches(shards, batch_size=12, block_size=8, seed=1).batch(0)
    assert set((x[:, 0] // 1000).tolist()) == {0, 1, 2}


def test_the_order_is_the_same_on_every_machine_and_version():
    tokens = np.arange(100, dtype=np.uint16)
    for order, starts in ((1, [83, 43, 11, 51, 59, 67]), (2, [75, 35, 3, 43, 83, 51])):
        x, _ = Batches([tokens], batch_size=6, block_size=8, seed=1337, order=order).batch(0)
        assert x[:, 0].tolist() == starts


@given(N=st.integers(0, 100), B=st.integers(1, 4), T=st.integers(1, 9))
def test_windows_cover_each_target_once(N, B, T):
    tokens = np.arange(100, 100 + N, dtype=np.uint16)
    if N < 2:
        with pytest.raises(ValueError, match=f"^{few(N)} too few"):
            windows([tokens], B, T)
        return
    batches = list(windows([tokens], B, T))
    assert all(
        array.shape == (B, T) and array.dtype == np.int32 for pair in batches for array in pair
    )
    x, y = (np.concatenate([pair[i].ravel() for pair in batches]) for i in (0, 1))
    np.testing.assert_array_equal(y[: N - 1], tokens[1:])
    np.testing.assert_array_equal(x[: N - 1], tokens[:-1])
    assert (y[N - 1 :] == -1).all()
    assert (x[N - 1 :] == 0).all()
    assert len(y) - (N - 1) < B * T


def test_windows_lie_within_one_shard():
    shards = [np.array(ids, np.uint16) for ids in ([1, 2, 3, 4, 5, 6], [9], [11, 12])]
    (x, y), (x2, y2) = windows(shards, 2, 3)
    assert x.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert y.tolist() == [[2, 3, 4], [5, 6, -1]]
    assert x2.tolist() == [[11, 0, 0], [0, 0, 0]]
    assert y2.tolist() == [[12, -1, -1], [-1, -1, -1]]
    with pytest.raises(ValueError, match="2 tokens are too few"):
        windows(shards[1:2] * 2, 2, 3)


# --- Python's documentation ------------------------------------------------------------------


@pytest.mark.slow
def test_python_documentation():
    documents = python_documentation()
    size = sum(len(document.encode()) for document in documents)
    assert len(documents) > 300
    assert size > 1_000_000
    assert all(document.strip() for document in documents)
    assert len(set(documents)) == len(documents)
    assert documents == python_documentation()


def test_excerpts_of_topics_are_dropped():
    long = (
        "Statements\n***\n\nThe if statement.\n\nIt has else.\n\nIt has elif.\n\nThe for statement."
    )
    short = 'The "if" statement\n***\n\nIt has else.\n\nIt has elif.'
    assert corpus._without_excerpts([short, long, "Other"]) == [long, "Other"]


def test_sources_leave_tests_and_packages_out(tmp_path):
    for name in ("b.py", "a.py", "test/c.py", "json/tests/d.py", "site-packages/e.py", "json/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    found = [path.relative_to(tmp_path).as_posix() for path in corpus._sources(tmp_path)]
    assert found == ["a.py", "b.py", "json/f.py"]


def test_docstrings_come_in_the_order_of_the_source(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n    """Method.\n\n'
        '       More.\n    """\nif True:\n  async def g():\n    r"""Function."""\nx = "\\d"\n',
        encoding="utf-8",
    )
    assert list(corpus._docstrings(path)) == ["Module.", "Class.", "Method.\n\nMore.", "Function."]


@pytest.mark.parametrize("source", [b"def f(:\n", b"x = '\xff'\n", b"\0"])
def test_sources_that_do_not_parse_are_skipped(tmp_path, source):
    (tmp_path / "a.py").write_bytes(source)
    assert list(corpus._docstrings(tmp_path / "a.py")) == []


def test_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(OSError, match=r"no pydoc_data.*--text FILE"):
        python_documentation()


@pytest.mark.parametrize(("count", "T", "overlap"), [(2, 4, 0), (9, 4, 2), (10, 4, 3), (50, 8, 4)])
def test_overlapping_windows_score_every_token_once(count: int, T: int, overlap: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    scored = []
    for x, y in windows([tokens], 3, T, overlap):
        rows, columns = np.nonzero(y >= 0)
        assert np.array_equal(x[rows, columns] + 1, y[rows, columns])  # the token before its target
        assert all(
            column >= overlap or x[row, 0] == 0 for row, column in zip(rows, columns, strict=True)
        )
        scored += y[rows, columns].tolist()
    assert scored == list(range(1, count))


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_an_overlap_leaves_room_for_targets(overlap: int) -> None:
    with pytest.raises(ValueError, match=r"overlap must be in \[0, block_size = 4\)"):
        windows([np.arange(9, dtype=np.uint16)], 1, 4, overlap)


def test_what_a_killed_preparation_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / ".train.bin.12345.tmp").write_bytes(b"half")
    prepare(["a b c " * 50, "d e f " * 50], out, "bytes", val_fraction=0.5)
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_prepare_as_ctrl_c_does(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "gpt2c", "prepare", "-", "--out", str(tmp_path / "data")]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--tokenizer", "bytes"], **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write("some text " * 100_000)  # more than a pipe holds: it is being read
        time.sleep(0.5)  # until it waits for more: one just before a wait is seen after it
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == "gpt2c: interrupted\n"
    assert not (tmp_path / "data").exists()
