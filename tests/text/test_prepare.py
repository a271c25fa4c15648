"""Hold-out and prepared data: no token is lost, and no failure leaves half of the files."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from helpers.command import program, run_process
from hypothesis import given
from hypothesis import strategies as st

from gpt2c.files import atomic
from gpt2c.text import shards
from gpt2c.text.prepare import prepare, split_validation
from gpt2c.text.shards import find_shards, read_shards, read_tokens, write_tokens
from gpt2c.text.tokenizer import Tokenizer

BYTES = Tokenizer.from_name("bytes")


def split(documents, fraction, seed):
    """Return the training texts and the validation texts."""
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


def test_tail_of_a_single_document_is_held_out_at_a_line_break():
    text = "".join(f"line {n}\n" for n in range(100))
    (head,), (tail,) = split([text], 0.1, seed=1)
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.1 <= len(tail) / len(text) < 0.12


def test_tail_without_line_breaks_near_is_cut_anywhere():
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
def test_split_loses_no_character(documents, fraction, seed):
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
def test_split_refuses_bad_fractions_and_short_texts(documents, fraction, message):
    with pytest.raises(ValueError, match=message):
        split(documents, fraction, seed=1)


def many(count):
    """Tiny documents, a tenth of which are copies of others."""
    return [f"document {number % (count - count // 10)}\n" for number in range(count)]


def in_pieces(documents):
    """The same documents, cut elsewhere each time, as reads of a file cut them."""
    return [[text[: number % 7], text[number % 7 :]] for number, text in enumerate(documents)]


def test_hold_out_of_many_documents_keeps_copies_together(monkeypatch):
    monkeypatch.setattr("gpt2c.text.prepare._MANY", 100)
    documents = many(5000)
    train, val = split(in_pieces(documents), 0.1, seed=1)
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    assert 0.09 <= sum(map(len, val)) / sum(map(len, documents)) <= 0.1
    assert val != split(documents, 0.1, seed=2)[1]


def test_hold_out_of_many_documents_takes_the_tail_of_one_that_outweighs_all(monkeypatch):
    monkeypatch.setattr("gpt2c.text.prepare._MANY", 100)
    documents = many(1000)
    documents[500] = "line\n" * 200_000
    train, val = split(documents, 0.1, seed=1)
    assert len(train) == 1000
    assert len(val) == 1
    assert train[500] + val[0] == documents[500]
    assert 0.09 <= len(val[0]) / sum(map(len, documents)) <= 0.11


def test_copies_of_the_divided_document_lose_their_tails_and_others_nothing(monkeypatch):
    monkeypatch.setattr("gpt2c.text.prepare._BEGINNING", 100)
    for most, common in ((1000, ""), (100, "common beginning " * 10)):  # more than is looked at
        monkeypatch.setattr("gpt2c.text.prepare._MANY", most)
        documents = [f"{common}and its own end {number}\n" for number in range(300)]
        giant = "line\n" * (20 * len("".join(documents)) // 5)
        documents[100] = documents[200] = giant
        train, val = split(documents, 0.1, seed=1)
        assert len(val) == 1 and train[100] + val[0] == giant
        assert train[200] == train[100]
        for number in (0, 99, 101, 299):
            assert train[number] == documents[number]


def test_hold_out_of_more_documents_takes_no_more_memory(monkeypatch):
    monkeypatch.setattr("gpt2c.text.prepare._MANY", 100)

    def peak(count):
        tracemalloc.start()
        split_validation((f"document {number}\n" for number in range(count)), 0.1, seed=1)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(5_000)  # the first call imports, and fills caches
    assert peak(20_000) < peak(5_000) + 10_000  # a byte for each more would be 15,000


# --- prepare ---------------------------------------------------------------------------------


def test_prepare_writes_the_tokens_of_the_documents(tmp_path):
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


def test_prepare_reports_a_held_out_tail(tmp_path):
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


def test_bpe_is_trained_on_training_documents_only(tmp_path):
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


def test_failed_overwrite_leaves_the_old_files(tmp_path, monkeypatch):
    prepare(make_documents(), tmp_path, "bytes")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    for out in (tmp_path, tmp_path.parent / "new"):
        with pytest.raises(OSError, match="No space"):
            prepare(make_documents(), out, "bpe:300", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not (tmp_path.parent / "new").exists()


def test_error_of_permission_names_the_wanted_file(tmp_path, monkeypatch):
    def forbidden(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shards, "open", forbidden, raising=False)
    with pytest.raises(PermissionError) as caught:
        prepare(make_documents(), tmp_path / "data", "bytes")
    assert atomic.reason(caught.value) in (
        f"{tmp_path / 'data' / name}: Permission denied" for name in ("train.bin", "val.bin")
    )


def test_full_disk_names_the_file_that_was_wanted(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 200_000)  # more than is kept in memory
    arguments = ["prepare", "text.txt", "--out", "data", "--tokenizer", "bytes"]
    done = run_process(program("programs.disks", "command", "8192", *arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "gpt2c: data/train.bin: File too large"
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("parent", [".", "/dev/shm"])
def test_links_stay_when_data_is_prepared_again(tmp_path, parent):
    """Also to another file system, where the files are moved before the old ones go."""
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


def test_kill_leaves_no_mixture_of_two_preparations(tmp_path, monkeypatch):
    """At any moment, a directory with val.bin is whole."""
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
    """Documents that come in pieces and can be read repeatedly."""

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


def test_large_text_is_learned_from_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2c.text.prepare.LEARNED", 5000)
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


def test_manifest_lists_the_written_files(tmp_path):
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


def test_files_of_two_preparations_are_refused(tmp_path):
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
    assert "more_train.bin is not a file of the preparation" in refused(read_shards, one, "train")
    assert read_shards(one, "val")
    (one / "more_train.bin").unlink()
    (one / "train_000001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_000001\.bin is missing: manifest"):
        read_shards(one, "train")
    (one / "manifest.json").unlink()  # like llm.c's directories, and older ones
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
def test_bad_manifest_is_refused(tmp_path, content, message):
    prepare(make_documents(), tmp_path, "bytes")
    (tmp_path / "manifest.json").write_bytes(content)
    assert message in refused(read_shards, tmp_path, "train")


def test_leftovers_of_a_killed_preparation_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / ".train.bin.12345.tmp").write_bytes(b"half")
    prepare(["a b c " * 50, "d e f " * 50], out, "bytes", val_fraction=0.5)
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_prepare_as_ctrl_c_does(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "gpt2c", "prepare", "-", "--out", str(tmp_path / "data")]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--tokenizer", "bytes"], **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write("some text " * 100_000)  # more than a pipe holds: it is being read
        time.sleep(0.5)  # until it waits: a signal just before a wait is handled after it
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == "gpt2c: interrupted\n"
    assert not (tmp_path / "data").exists()
