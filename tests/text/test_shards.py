"""Token files: they round trip, and damaged, foreign or ambiguous files are refused."""

import errno
import io
import os

import numpy as np
import pytest
from conftest import refused
from helpers.command import program, run_process

from gpt2c.files import atomic
from gpt2c.formats.nanogpt import open_nanogpt, write_nanogpt
from gpt2c.text.shards import (
    find_shards,
    read_shards,
    read_tokens,
    remove_shards,
    write_shards,
    write_tokens,
)


def test_token_file_is_an_llm_c_shard(tmp_path):
    path = tmp_path / "a.bin"
    write_tokens(path, [0, 1, 65535])
    content = path.read_bytes()
    header = np.frombuffer(content[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 3]
    assert not header[3:].any()
    assert content[1024:] == b"\x00\x00\x01\x00\xff\xff"


def test_read_tokens_returns_the_written_tokens(tmp_path):
    path = tmp_path / "a.bin"
    write_tokens(path, np.arange(1000))
    tokens = read_tokens(path, vocab_size=1000)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.arange(1000))


def test_token_outside_the_vocabulary_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    write_tokens(path, [1, 300, 2])
    with pytest.raises(ValueError, match="holds token 300, outside a vocabulary of 300"):
        read_tokens(path, vocab_size=300)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "not float64"),
        (np.zeros(0, dtype=np.int64), "would hold 0 tokens"),
        ([-1, 2], "between 0 and 65535, not -1 and 2"),
        ([65536], "between 0 and 65535"),
        ([0.5], "array of integers, not float64"),
        ([[1, 2]], r"array of integers, not int64 \(1, 2\)"),
    ],
)
def test_bad_tokens_are_not_written(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write_tokens(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def damaged(content, **fields):
    header = np.frombuffer(content[:1024], dtype="<i4").copy()
    for name, value in fields.items():
        header[{"magic": 0, "version": 1, "count": 2}[name]] = value
    return header.tobytes() + content[1024:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "not an llm.c token file"),
        (lambda content: content[:3], "not an llm.c token file"),
        (lambda content: content[1024:], "nanoGPT's .bin without a header is not accepted"),
        (lambda content: content[:1000], "truncated: 1000 bytes"),
        (lambda content: content[:-2], "has 1042 bytes; its 10 tokens need 1044"),
        (lambda content: content + b"\0", "has 1045 bytes; its 10 tokens need 1044"),
        (lambda content: damaged(content, magic=20240801), "starts with 20240801"),
        (lambda content: damaged(content, version=7), "version 7; version 1 is wanted"),
        (lambda content: damaged(content, count=0), "holds 0 tokens"),
        (lambda content: damaged(content, count=-5), "holds -5 tokens"),
        (lambda content: damaged(content, count=2**31 - 1), "its 2147483647 tokens need"),
    ],
)
def test_damaged_token_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "a.bin"
    write_tokens(path, np.arange(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_tokens(path)


def test_missing_token_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.bin does not exist; make it with"):
        read_tokens(tmp_path / "a.bin")


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_tokens(tmp_path / "old.bin", [1])
    before = (tmp_path / "old.bin").read_bytes()
    monkeypatch.setattr(atomic.os, "fsync", full)
    for name in ("old.bin", "new.bin"):
        with pytest.raises(OSError, match="No space"):
            write_tokens(tmp_path / name, [2, 3])
    assert [path.name for path in tmp_path.iterdir()] == ["old.bin"]
    assert (tmp_path / "old.bin").read_bytes() == before


# --- shards ----------------------------------------------------------------------------------


def test_shards_come_in_the_order_of_their_names(tmp_path):
    for number in (10, 2, 1):
        write_tokens(tmp_path / f"fineweb_train_{number:06d}.bin", [number])
    write_tokens(tmp_path / "fineweb_val_000000.bin", [7, 8])
    for name in (".train_hidden.bin", "train.txt", "other.bin"):
        (tmp_path / name).write_bytes(b"no token file")
    assert [shard[:].tolist() for shard in read_shards(tmp_path, "train")] == [[1], [2], [10]]
    assert [shard[:].tolist() for shard in read_shards(tmp_path, "val")] == [[7, 8]]
    (tmp_path / "train_3.bin").symlink_to("/mnt/disk-that-is-not-there/train_3.bin")
    with pytest.raises(FileNotFoundError, match=r"train_3\.bin does not exist"):
        read_shards(tmp_path, "train")  # rather than fewer tokens


def test_split_is_a_word_of_the_file_name(tmp_path):
    for name in ("pretrained.bin", "retrieval_train_1.bin", "my-evaluation.bin", "Train.bin"):
        write_tokens(tmp_path / name, [1])
    (tmp_path / "gpt2_train.bin").write_bytes(b"a model, perhaps")
    assert [path.name for path in find_shards(tmp_path, "train")] == [
        "gpt2_train.bin",
        "retrieval_train_1.bin",
    ]
    assert find_shards(tmp_path, "val") == []
    remove_shards(tmp_path, ())  # token files only
    left = ["Train.bin", "gpt2_train.bin", "my-evaluation.bin", "pretrained.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_name_with_both_splits_is_refused(tmp_path):
    write_tokens(tmp_path / "val_train_000001.bin", [1])
    for split in ("train", "val"):
        assert "says both train and val" in refused(find_shards, tmp_path, split)


def test_missing_split_and_a_bad_shard_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"val\.bin does not exist.*gpt2c prepare"):
        read_shards(tmp_path, "val")
    write_shards(tmp_path, "train", np.arange(10), 4)
    assert "train_000003.bin holds token 9" in refused(read_shards, tmp_path, "train", 9)


def test_shards_hold_the_given_tokens(tmp_path):
    assert [path.name for path in write_shards(tmp_path, "val", [5, 6])] == ["val.bin"]
    paths = write_shards(tmp_path, "train", np.arange(10), 4)
    assert [path.name for path in paths] == [f"train_00000{n}.bin" for n in (1, 2, 3)]
    assert [read_tokens(path).tolist() for path in paths] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert write_shards(tmp_path, "train", [1, 2], 2) == [tmp_path / "train.bin"]
    assert "would hold 0 tokens" in refused(write_shards, tmp_path, "val", np.zeros(0, int), 4)


# --- nanoGPT ---------------------------------------------------------------------------------


def test_nanogpts_files_have_no_header(tmp_path):
    tokens = np.array([50256, 0, 65535], np.uint16)
    write_nanogpt(tmp_path / "train.bin", [tokens[:2], tokens[2:]])
    assert (tmp_path / "train.bin").read_bytes() == tokens.astype("<u2").tobytes()
    found = open_nanogpt(tmp_path / "train.bin")
    assert len(found) == 3 and found[:].tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"\1\2\3", "has 3 bytes"),
        ((20240520).to_bytes(4, "little") + b"\0" * 1020, "has llm.c's header"),
    ],
)
def test_bad_nanogpt_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    assert message in refused(open_nanogpt, tmp_path / "a.bin")


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.bin")
    for read in (read_tokens, open_nanogpt):
        with pytest.raises(OSError, match="is a pipe or a device"):
            read(tmp_path / "train.bin")


# ---- stored tokens -------------------------------------------------------------------------------


def test_stored_tokens_equal_the_file(tmp_path):
    write_tokens(tmp_path / "train.bin", np.arange(1000))
    (tokens,) = read_shards(tmp_path, "train", vocab_size=1000)
    whole = np.arange(1000)
    assert len(tokens) == 1000 and np.asarray(tokens).dtype == np.uint16
    for part in (slice(3, 20), slice(None), slice(-5, None), slice(990, 5000), slice(7, 7)):
        assert np.array_equal(tokens[part], whole[part])
    assert np.array_equal(np.concatenate([tokens, tokens[1:]]), np.r_[whole, whole[1:]])
    with pytest.raises(ValueError, match="not by steps of 2"):
        tokens[::2]


def test_file_truncated_while_it_is_read_is_named(tmp_path):
    """Reading a mapped file would end the process."""
    path = tmp_path / "train.bin"
    write_tokens(path, np.arange(1000))
    (tokens,) = read_shards(tmp_path, "train")
    os.truncate(path, 1024 + 2 * 100)
    assert np.array_equal(tokens[:100], np.arange(100))
    with pytest.raises(OSError, match=f"^{path} was cut short while it was read: tokens 90 to 110"):
        tokens[90:110]


def test_tokens_that_were_read_outlive_their_file(tmp_path):
    """In its own process, because reading a mapped file would end it."""
    path = tmp_path / "val.bin"
    write_tokens(path, np.arange(1 << 16))
    done = run_process(program("programs.fresh", "read_and_truncate", str(path)))
    assert (done.returncode, done.stdout) == (0, "2147450880\n")


def test_replaced_file_is_still_read(tmp_path):
    write_tokens(tmp_path / "train.bin", np.arange(1000))
    (tokens,) = read_shards(tmp_path, "train")
    write_tokens(tmp_path / "train.bin", [1, 2])
    assert np.array_equal(tokens[:], np.arange(1000))


def test_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda *arguments: Full())
    for write in (write_tokens, lambda path, tokens: write_nanogpt(path, [np.asarray(tokens)])):
        with pytest.raises(OSError, match="No space left") as error:
            write(tmp_path / "a.bin", [1, 2])
        assert error.value.filename == str(tmp_path / "a.bin")
