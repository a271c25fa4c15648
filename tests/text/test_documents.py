"""Users' texts: pieces of any size give the same documents; other files are refused by name."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from gpt2c.text import documents as textfiles
from gpt2c.text.documents import TextFiles


def read(*paths: Any, field: str | None = None) -> list[str]:
    """Return the documents of files, which must be the same at each reading."""
    with TextFiles(paths, field) as texts:
        first = ["".join(pieces) for pieces in texts]
        assert ["".join(pieces) for pieces in texts] == first
    return first


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "_PIECE", 5)


@given(
    st.lists(st.sampled_from(["<|endoftext|>", "<|end", "<", " ", "a", "\n", "|>"]), max_size=12),
    st.integers(1, 14),
)
def test_end_of_text_mark_may_span_two_pieces(parts: list[str], size: int) -> None:
    text = "".join(parts)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = ["".join(document) for document in textfiles._documents(textfiles._at_marks(pieces))]
    assert found == [part for part in text.split("<|endoftext|>") if part.strip()]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("今天 é😀\r\nb\r\n".encode("utf-8-sig"), ["今天 é😀\nb\n"]),
        (b"a\rb\r\r\nc\r", ["a\rb\r\nc\r"]),
        (b"one<|endoftext|>  \n <|endoftext|>\n\n two", ["one", "\n\n two"]),
        (b" \n" * 20, []),
        (b"<|endoftext|>a\n<|endoftext|> \n<|endoftext|>b", ["a\n", "b"]),
    ],
)
def test_plain_text_files_are_read(
    tmp_path: Path, small_pieces: None, content: bytes, documents: Any
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read(tmp_path / "a.txt") == documents
    assert read(tmp_path / "a.txt", tmp_path / "a.txt") == documents * 2


def test_long_blanks_are_not_kept_in_memory(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfiles, "_MOST_BLANK", 12)
    (tmp_path / "a.txt").write_text(" " * 9 + "<|endoftext|>" + " " * 21 + "a", encoding="utf-8")
    with TextFiles([tmp_path / "a.txt"]) as texts:
        pieces = [list(document) for document in texts]
    assert list(map("".join, pieces)) == [" " * 21 + "a"]
    (tmp_path / "b.txt").write_text("\n" * 100, encoding="utf-8")
    assert read(tmp_path / "b.txt") == ["\n" * 100]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt is empty"),
        ("".encode("utf-8-sig"), "a.txt is empty"),
        (b"123456789 \xe9 and more", "a.txt is not UTF-8: byte 10 is 0xe9"),
        ("今天今天今".encode()[:-1], "a.txt is not UTF-8: byte 12 is 0xe4"),
        ("今天".encode("utf-8-sig") + b"\xff", "a.txt is not UTF-8: byte 9 is 0xff"),
        ("今天".encode("gbk"), "a.txt is not UTF-8: byte 0 is 0xbd"),
        ("今天".encode("utf-16"), "a.txt is UTF-16, not UTF-8; save it as UTF-8"),
    ],
)
def test_bad_plain_text_is_refused(
    tmp_path: Path, small_pieces: None, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert message in refused(read, tmp_path / "a.txt")


def test_jsonl_files_are_read(tmp_path: Path) -> None:
    entries = [{"text": "今天\r\nb", "id": 1}, {"id": 2, "text": " "}, {"text": "a<|endoftext|>c"}]
    lines = [json.dumps(entries[0]), "", *map(json.dumps, entries[1:])]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert read(tmp_path / "a.jsonl") == ["今天\nb", "a", "c"]
    (tmp_path / "b.data").write_text('{"answer": "yes", "score": NaN}\n', encoding="utf-8")
    (tmp_path / "c.txt").write_text("plain", encoding="utf-8")
    assert read(tmp_path / "b.data", tmp_path / "c.txt", field="answer") == ["yes", "plain"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "completion": "b"}',
            " has no field 'text'; its fields are 'prompt', 'com",
        ),
        ("{}", " has no field 'text'; its fields are none: choose one with --text-field"),
        ('{"text": 7}', ": 'text' must be a string, got int"),
        ("[1]", " must be a JSON object, got list"),
        ('{"text": "a"', " is not valid JSON: "),
        ("[" * 100_000, " is not valid JSON: "),
    ],
)
def test_bad_jsonl_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n', encoding="utf-8")
    assert f"a.jsonl, line 3{message}" in refused(read, tmp_path / "a.jsonl")


def test_suffixes_may_be_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text('{"text": "one"}')
    (tmp_path / "b.Md").write_text("two")
    (tmp_path / "C.JSONL").write_text('{"text": "three"}\n')
    (tmp_path / "D.TXTS").write_text("no")
    assert read(tmp_path) == ['{"text": "one"}', "three", "two"]
    assert read(tmp_path / "A.TXT", field="text") == ['{"text": "one"}']


def test_directories_are_read(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": "b",
        "a.md": "a",
        "sub/c.rst": "c",
        "sub/empty.txt": "",
        "sub/d.jsonl": '{"text": "d"}',
        ".hidden.txt": "no",
        ".git/e.txt": "no",
        "picture.png": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert read(tmp_path) == ["a", "b", "c", "d"]
    with TextFiles([tmp_path]) as texts:
        assert [Path(name).name for name in texts.names] == [
            *("a.md", "b.txt", "c.rst", "d.jsonl", "empty.txt")
        ]
    (tmp_path / "none").mkdir()
    message = refused(read, tmp_path / "none")
    assert "none has no text files (*.txt, *.text, *.md, " in message


def test_other_files_of_a_directory_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "circle").symlink_to(".")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "itself\n.md").symlink_to("itself\n.md")
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "merges.txt"):
        (tmp_path / "run" / name).write_text("#version: 0.2\n")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.txt"))
    assert read(tmp_path) == ["a", "a"]
    lines = sorted(capsys.readouterr().err.splitlines())
    for line, (name, reason) in zip(
        lines,
        [
            ("circle", "it is a link to a directory"),
            ("dangling.txt", "it cannot be read (No such file or directory)"),
            ("itself\\n.md", "it cannot be read (Too many levels of symbolic links)"),
            ("pipe.txt", "it is a pipe, a socket or a device"),
            ("run/merges.txt", "gpt2c writes such a file itself"),
            ("run/metrics.jsonl", "gpt2c writes such a file itself"),
            ("s.txt", "it is a pipe, a socket or a device"),
        ],
        strict=True,
    ):
        assert line == f"gpt2c: {tmp_path}/{name} is left out: {reason}"
    assert read(tmp_path / "circle", tmp_path / "run" / "merges.txt") == [
        *("a", "a", "#version: 0.2\n")
    ]
    for name, error in (("dangling.txt", "does not exist"), ("itself\n.md", "Too many levels")):
        with pytest.raises(OSError, match=error):
            read(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub"):
        (tmp_path / name).chmod(0)
    assert read(tmp_path) == ["a"]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"gpt2c: {tmp_path}/b.txt is left out: there is no permission to read it",
        f"gpt2c: {tmp_path}/sub is left out: it cannot be read (Permission denied)",
    ]
    for name in ("b.txt", "sub"):
        with pytest.raises(PermissionError):
            read(tmp_path / name)


def test_unreadable_folder_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if root runs the tests."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read(tmp_path) == ["a"]
    said = capsys.readouterr().err
    assert said == (f"gpt2c: {tmp_path}/sub is left out: it cannot be read (Permission denied)\n")
    with pytest.raises(PermissionError):
        read(tmp_path / "sub")


def test_standard_input_ends_at_the_first_end_of_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an end of file, a terminal gives more if it is asked again."""

    left = [b"first line\n", b"", b"after Ctrl-D\n", b""]

    class Typed(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            content = left.pop(0)
            buffer[: len(content)] = content
            return len(content)

    stdin = SimpleNamespace(buffer=io.BufferedReader(Typed()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read("-") == ["first line\n"]


def test_standard_input_and_pipes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO("今天<|endoftext|>b".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read("-") == ["今天", "b"]
    stdin.buffer = io.BytesIO(b'{"a": "b"}\n')
    assert read("-", field="a") == ["b"]
    stdin.buffer = io.BytesIO(b"")
    assert refused(read, "-") == "standard input is empty"
    reading, writing = os.pipe()  # as for a shell's <(zcat book.gz)
    os.write(writing, b"abc")
    os.close(writing)
    assert read(f"/dev/fd/{reading}") == ["abc"]
    os.close(reading)


def test_missing_or_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"text file .*a\.txt does not exist"):
        read(tmp_path / "a.txt")
    with pytest.raises(OSError, match="/dev/zero is a device"):
        read("/dev/zero")
    path = tmp_path / "a.txt"
    path.write_text("abc")
    with TextFiles([path]) as texts:
        list(map("".join, texts))
        path.write_text("abcd")
        with pytest.raises(OSError, match=r"a\.txt changed while it was read"):
            list(map("".join, texts))


def test_reading_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "_PIECE", 10)
    (tmp_path / "a.txt").write_text("0123456789" * 4)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n' * 5)  # of 14 bytes
    stdin = SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(b"x" * 25)))  # type: ignore[type-var]
    monkeypatch.setattr(sys, "stdin", stdin)
    told: list[tuple[int, int]] = []
    with TextFiles(["-", tmp_path], watch=lambda *counts: told.append(counts)) as texts:
        assert told == [(10, 0), (20, 0), (25, 0)]
        for _ in range(2):
            told.clear()
            list(map("".join, texts))
            done = [done for done, _ in told]
            assert {total for _, total in told} == {25 + 40 + 70}
            assert done == sorted(done) and {25, 65, 79, 93, 135} <= {*done}
            assert len(done) < 20
