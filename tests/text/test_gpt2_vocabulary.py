"""GPT-2's own vocabulary: the places where it is looked for, and what an error says of them."""

import errno
import os
import re
import time

import pytest
import tiktoken

from gpt2c.text.gpt2_vocabulary import tiktoken_cache
from gpt2c.text.tokenizer import Tokenizer


def test_unreadable_cache_is_ignored(monkeypatch, tmp_path):
    def forbidden(path, *arguments, **keywords):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "stat", forbidden)
    assert tiktoken_cache() == (tmp_path, False)


def forever(name):
    time.sleep(60)


def failing(error):
    def fail(*arguments, **keywords):
        raise error

    return fail


@pytest.mark.parametrize(
    ("get_encoding", "reason"),
    [
        (failing(ConnectionError("no route")), "ConnectionError"),
        (failing(ValueError("Hash mismatch")), "ValueError"),
        (forever, "TimeoutError"),  # a server that accepts a connection and never answers
    ],
)
def test_error_of_gpt2_offline_lists_alternatives(monkeypatch, get_encoding, reason):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr("gpt2c.text.gpt2_vocabulary._PATIENCE", 0.1)
    monkeypatch.setattr("gpt2c.files.hub.find", failing(OSError("gpt2 is not there")))
    with pytest.raises(OSError) as error:
        Tokenizer.from_name("gpt2")
    places = rf"TIKTOKEN_CACHE_DIR.* tiktoken \({reason}\) nor the hub \(OSError\) delivered"
    assert re.search(f"'bytes' or 'bpe:4096', or name a directory.*{places}", str(error.value))
    assert not re.search(r"\n|\. [A-Z]", str(error.value))


def test_gpt2_asks_no_network_where_none_is_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("it was asked"))
    monkeypatch.setattr("gpt2c.files.hub.find", failing(OSError("gpt2 is not there")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"TIKTOKEN_CACHE_DIR.*\(HF_HUB_OFFLINE is set\)"):
        Tokenizer.from_name("gpt2")


@pytest.mark.slow
def test_gpt2_from_a_directory_of_that_name(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", failing(ConnectionError("no route")))
    gpt2.save_pretrained("gpt2")
    text = "It's 2024:\tnaïve café, 日本語"
    assert Tokenizer.from_name("gpt2").encode(text) == gpt2.encode(text)
    Tokenizer.train([text], 300).save_pretrained("gpt2")
    with pytest.raises(ValueError, match=r"gpt2 has \d+ tokens where GPT-2 has 50257"):
        Tokenizer.from_name("gpt2")
