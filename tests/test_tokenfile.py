"""Token files: what is written is read, and a damaged, foreign or ambiguous file is refused."""

import errno
import os

import numpy as np
import pytest

from gpt2c import files
from gpt2c.tokenfile import (
    read_tokens,
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


def test_read_tokens_gives_what_was_written_and_cannot_change_it(tmp_path):
    path = tmp_path / "a.bin"
    write_tokens(path, np.arange(1000))
    tokens = read_tokens(path, vocab_size=1000)
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.arange(1000))
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_token_outside_the_vocabulary(tmp_path):
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
def test_tokens_that_cannot_be_written(tmp_path, tokens, message):
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
def test_damaged_token_file(tmp_path, damage, message):
    path = tmp_path / "a.bin"
    write_tokens(path, np.arange(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_tokens(path)


def test_missing_token_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.bin does not exist; make it with"):
        read_tokens(tmp_path / "a.bin")


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_tokens(tmp_path / "old.bin", [1])
    before = (tmp_path / "old.bin").read_bytes()
    monkeypatch.setattr(files.os, "fsync", full)
    for name in ("old.bin", "new.bin"):
        with pytest.raises(OSError, match="No space"):
            write_tokens(tmp_path / name, [2, 3])
    assert [path.name for path in tmp_path.iterdir()] == ["old.bin"]
    assert (tmp_path / "old.bin").read_bytes() == before
