"""gpt2c tokens: the tokens of a text, their ids and bytes."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from helpers.command import Terminal

from gpt2c import Tokenizer
from gpt2c.cli.main import main

Capture = pytest.CaptureFixture[str]
BYTES = Tokenizer.from_name("bytes")


def test_tokens_shows_the_tokens_of_a_text(capsys: Capture, tmp_path: Path) -> None:
    assert main(["tokens", "你 a\n", "b", "--tokenizer", "bytes"]) == 0
    head, _, divided, rest, _, note, _, *rows = capsys.readouterr().out.split("\n")
    assert head == "bytes, a vocabulary of 257: 8 tokens, 6 characters, 8 bytes"
    assert (divided, rest) == ("你| |a|", "| |b")
    assert note == "Some characters take several tokens here; the text above joins them."
    assert rows == [
        " id  piece   bytes",
        "228  '<E4>'  E4",
        "189  '<BD>'  BD",
        "160  '<A0>'  A0",
        " 32  ' '     20",
        " 97  'a'     61",
        r" 10  '\n'    0A",
        " 32  ' '     20",
        " 98  'b'     62",
        "",
    ]
    Tokenizer.train(["你好 " * 50], 270).save_pretrained(tmp_path)
    assert main(["tokens", "你好", "--tokenizer", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.split("\n")
    assert rows[2] == "你好" and rows[4] == " id  piece   bytes"
    assert rows[5].endswith("  '你好'  E4 BD A0 E5 A5 BD"), "wide characters are aligned"
    assert "several tokens" not in "".join(rows), "each is a character or more"


def test_tokens_works_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tokens", "abab"]) == 0
    assert capsys.readouterr().out.startswith("bytes, a vocabulary of 257: 4 tokens")
    Tokenizer.train(["ab" * 500], 258).save_pretrained("runs/demo/run")
    assert main(["tokens", "abab"]) == 0
    assert capsys.readouterr().out.startswith("runs/demo/run, a vocabulary of 258: 2 tokens")


def test_tokens_takes_any_bytes(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for arguments, text in (
        (["-->", "-ab"], "--> -ab"),
        (["--", "--tokenizer"], "--tokenizer"),
        (["caf\udce9"], "caf\ufffd"),
        ([""], ""),
    ):
        assert main(["tokens", "--tokenizer", "bytes", *arguments]) == 0
        out = capsys.readouterr().out
        ids = [
            int(line.split()[0]) for line in out.partition("id  piece")[2].split("\n")[1:] if line
        ]
        assert ids == BYTES.encode(text) and f"{len(ids)} token" in out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc"), encoding="utf-8"))
    assert main(["tokens", "-", "--tokenizer=bytes"]) == 0
    assert "3 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["tokens", "a", "--tokenzier", "bytes"])
    assert "did you mean --tokenizer?" in capsys.readouterr().err


def test_tokens_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    call = ["tokens", "你a\x1b[2J", "--tokenizer", "bytes"]
    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(call) == 0
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[30;46m你\x1b[0m\x1b[30;43ma\x1b[0m\x1b[30;46m\ufffd\x1b[0m" in shown
    assert "\x1b[2J" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(call) == 0
    assert "\x1b" not in sys.stdout.getvalue()  # type: ignore[attr-defined]
