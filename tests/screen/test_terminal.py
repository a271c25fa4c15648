"""Text output and input: failing, limited or missing streams; what a terminal shows."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import COMMAND, TINY, Terminal, crafted, program, run_process

from gpt2c.cli.main import main
from gpt2c.cli.tokens import whole_characters
from gpt2c.screen.terminal import Door, columns, open_door, padded, spelled, visible, well_formed
from gpt2c.text.tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]
BYTES = Tokenizer.from_name("bytes")
TEXT = "the cat sat on the mat. " * 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a text, its tokens and a run; and models that write controls."""
    path = tmp_path_factory.mktemp("world")
    (path / "text.txt").write_text(TEXT)
    assert main(f"prepare {path}/text.txt --out {path}/data --tokenizer bytes".split()) == 0
    assert main(f"train --data {path}/data --out {path}/run {TINY}".split()) == 0
    crafted(path / "bell", 7, 27)  # its third token rings the bell, then come escapes
    crafted(path / "lines", ord("c"), ord("\n"))
    return path


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


@pytest.fixture
def full() -> Iterator[Any]:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w", encoding="utf-8") as file:
        yield file


# ---- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("ascii", "strict", b"caf? ??\n"),
        ("latin-1", "strict", b"caf\xe9 ??\n"),
        ("ascii", "backslashreplace", rb"caf\xe9 \u4f60\udce9" + b"\n"),
        ("utf-8", "strict", "café 你?\n".encode()),
        ("utf-8", "surrogateescape", "café 你".encode() + b"\xe9\n"),
        ("utf-16-le", "strict", "café 你?\n".encode("utf-16-le")),
        ("gbk", "strict", "café 你?\n".encode("gbk")),
    ],
)
def test_characters_outside_an_encoding_are_replaced(
    encoding: str, errors: str, expected: bytes
) -> None:
    file = io.BytesIO()
    door = Door(io.TextIOWrapper(file, encoding=encoding, errors=errors))
    print("café 你\udce9", file=door)
    assert file.getvalue() == expected and door.lost is None


def test_byte_order_mark_is_written_once() -> None:
    file = io.BytesIO()
    door = Door(io.TextIOWrapper(file, encoding="utf-16"))
    print("one", file=door)
    print("two", file=door)
    assert file.getvalue().decode("utf-16") == "one\ntwo\n"


def test_missing_stream_swallows_writes() -> None:
    door = Door(None)
    print("text", file=door, flush=True)
    assert door.lost is None and not door.isatty() and door.encoding == "utf-8"
    with pytest.raises(OSError):
        door.fileno()


def test_full_disk_is_remembered(full: Any) -> None:
    door = Door(full)
    print("text", file=door)
    print("more", file=door, flush=True)
    assert door.lost is not None and door.lost.errno == errno.ENOSPC and not door.reader_left


def test_closed_pipe_is_remembered() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as file:
        door = Door(file)
        print("text", file=door)
    assert door.reader_left


def test_closed_stream_swallows_writes() -> None:
    stream = io.TextIOWrapper(io.BytesIO())
    door = Door(stream)
    stream.close()
    print("text", file=door)
    assert door.lost is not None


def test_nonblocking_stream_is_written_whole_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full stream loses text, unless the text is needed; then the write waits."""
    monkeypatch.setattr("gpt2c.screen.terminal.PATIENCE", 0.01)
    text = "x" * 99 + "\n"
    for needed in (False, True):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with open(writer, "w", encoding="ascii") as file:
            door = Door(file)
            door.needed = needed
            got: list[bytes] = []

            def read(reader: int = reader, got: list[bytes] = got) -> None:
                while piece := os.read(reader, 1 << 16):
                    got.append(piece)

            thread = threading.Thread(target=read)
            if needed:
                thread.start()
            for _ in range(20_000):
                door.write(text)
        if not needed:
            thread.start()
        thread.join()
        os.close(reader)
        whole = len(b"".join(got)) == 100 * 20_000
        assert whole == needed == (door.lost is None)
        assert needed or isinstance(door.lost, BlockingIOError)


def test_streams_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr("sys.stdout", None)
    before = sys.stdin, sys.stdout, sys.stderr
    with pytest.raises(EOFError), open_door() as door:
        assert sys.stdout is door and sys.stderr is not before[2]
        print("text")
        input()
    assert (sys.stdin, sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_input_is_read_as_utf_8_without_errors(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO(b"\xef\xbb\xbfcaf\xc3\xa9\r\ncaf\xe9\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file, encoding=encoding))
    with open_door():
        assert sys.stdin.read() == "café\ncaf\ufffd\n"


def test_input_keeps_another_encoding_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xc4\xe3"), encoding="gbk"))
    with open_door():
        assert sys.stdin.read() == "你"


def test_nonblocking_input_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    monkeypatch.setattr("sys.stdin", open(reader, encoding="utf-8"))
    later = threading.Timer(0.1, lambda: (os.write(writer, b"text\n"), os.close(writer)))
    later.start()
    with sys.stdin, open_door():
        assert input() == "text"
    later.join()


def test_commands_show_no_warnings(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def warn(verbose: bool) -> list[tuple[str, str]]:
        warnings.warn("a library\nis old", UserWarning, stacklevel=1)
        return [("CPU", "any")]

    monkeypatch.setattr("gpt2c.cli.info._machine_rows", warn)
    monkeypatch.setattr("sys.warnoptions", [])  # this process itself may run with -W error
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("CPU         any\n") and err == ""
    monkeypatch.setattr("sys.warnoptions", ["error"])
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "gpt2c: a library\\nis old\n"


@pytest.mark.parametrize("name", ["r\udcfc", "模"])
def test_plot_takes_any_name_of_a_run(name: str, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree("run", tmp_path / name)
    assert main(["plot", str(tmp_path / name)]) == 0
    assert (tmp_path / name / "plot.png").is_file()
    assert main(["plot", str(tmp_path / f"{name}no")]) == 2
    assert "\\udc" not in capsys.readouterr().err


# ---- characters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("café", "café"),
        ("caf\udce9", "caf\ufffd"),  # a byte of latin-1
        ("caf\udcc3\udca9", "café"),  # UTF-8 in the locale C
        ("\ud83d\ude00 \ud83d", "😀 \ufffd"),
    ],
)
def test_arguments_become_valid_unicode(text: str, expected: str) -> None:
    assert well_formed(text) == expected


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\tb\n\0\x07\x08\r\x1b[2J\x7f\x9b5mé你"
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert visible(text) == text, "a file gets what the model wrote"
    monkeypatch.setattr("sys.stdout", Terminal())
    assert visible(text) == "a\tb\n" + 5 * "\ufffd" + "[2J\ufffd\ufffd5mé你"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b" the", "' the'"),
        ("你".encode(), "'你'"),
        (b"\xe4\xbd", "'<E4 BD>'"),
        (b"\xbd\xa0a", "'<BD A0>a'"),
        (b"\xa0\xe4\xbd\xa0\xe5", "'<A0>你<E5>'"),
        (b"\n\t\r\\\x1b\x00", r"'\n\t\r\\\x1b\x00'"),
        (b"", "''"),
    ],
)
def test_token_is_spelled(data: bytes, expected: str) -> None:
    assert spelled(data) == expected


def test_columns_of_a_terminal() -> None:
    assert [columns(text) for text in ("ab", "你好", "e\u0301", "😀", "\uff0c")] == [2, 4, 1, 2, 2]
    assert padded("你", 4) == "你  " and padded("long", 2) == "long"


def test_characters_that_span_tokens_stand_together() -> None:
    data = [b"a", b"\xe4", b"\xbd\xa0", b"\xe5\xa5", b"\xbd!", b"b", b"\xe5"]
    assert list(whole_characters(data)) == ["a", "你", "好!", "b", "\ufffd"]


# ---- the verbs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("generate run --max-new-tokens 3", 2),
        ("generate run --num-samples 2 --max-new-tokens 3", 2),
        ("generate run --show-probabilities --max-new-tokens 3", 2),
        ("eval run --data data", 2),
        ("tokens text --tokenizer bytes", 2),
        ("info", 2),
        ("prepare text.txt --out OUT --tokenizer bytes", 0),
        (f"train --data data --out OUT {TINY}", 0),
        ("convert run OUT/model.bin", 0),
        ("plot run --out OUT.png", 0),
        ("generate missing", 2),
    ],
)
def test_every_verb_reports_a_full_disk(
    arguments: str, code: int, full: Any, tmp_path: Path, monkeypatch: Any, capsys: Capture
) -> None:
    """The exit code is 0 if the work is whole; if a text is the result, only if it was written."""
    if arguments.startswith("plot"):
        pytest.importorskip("matplotlib")
    (tmp_path / "out").mkdir()
    call = arguments.replace("OUT", str(tmp_path / "out")).split()
    monkeypatch.setattr("sys.stdout", full)
    assert main(call) == code
    said = capsys.readouterr().err
    if code == 2 and "missing" not in arguments:
        assert "gpt2c: standard output: No space left on device: some of the text is lost" in said
    monkeypatch.setattr("sys.stderr", full)
    assert (
        main([*call, *["--overwrite"] * ("OUT" in arguments and "plot" not in arguments)]) == code
    )


@pytest.mark.parametrize("stream", [None, io.TextIOWrapper(io.BytesIO(), encoding="ascii")])
def test_every_verb_works_with_limited_streams(
    stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    out = tmp_path / "dü模"
    for arguments in (
        f"prepare text.txt --out {out}/data --tokenizer bytes",
        f"train --data {out}/data --out {out}/run {TINY}",
        f"eval {out}/run --data {out}/data",
        f"generate {out}/run --prompt café --max-new-tokens 3 --temperature 9",
        f"generate {out}/run --prompt café --max-new-tokens 3 --num-samples 2",
        f"convert {out}/run {out}/model.bin",
        "tokens 你好 --tokenizer bytes",
        "info --verbose",
    ):
        assert main(arguments.split()) == 0
    assert main(["generate", f"{out}/nothing"]) == 2


def test_models_controls_reach_a_file_and_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    call = ["generate", "bell", "--temperature", "0", "--prompt", "ab", "--max-new-tokens", "3"]
    for more in ([], ["--num-samples", "1"], ["--num-samples", "2"]):
        assert main([*call, *more]) == 0
        assert "ab\x07\x1b\x1b\n" in capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", Terminal())
            assert main([*call, *more]) == 0
            assert "ab\ufffd\ufffd\ufffd\n" in sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_bidirectional_controls_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "a\u202eb\u2066c\u2028d 你好 é\t\n"
    assert visible(text) == text  # not a terminal
    monkeypatch.setattr("sys.stdout", Terminal())
    assert visible(text) == "a\ufffdb\ufffdc\ufffdd 你好 é\t\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize(
    "call", ["generate run --prompt -", "generate run --interactive", "tokens -"]
)
def test_standard_input_of_another_encoding_is_refused(
    call: str, encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = io.BufferedReader(io.BytesIO("café\n".encode(encoding)))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file, encoding="utf-8"))
    assert main(call.split()) == 2
    out, err = capsys.readouterr()
    wanted = f"standard input is {encoding.upper()}, not UTF-8; save it as UTF-8"
    assert out == "" and wanted in err


def test_standard_input_is_utf_16_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = io.BufferedReader(io.BytesIO("café\n".encode("utf-16")))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file, encoding="utf-16"))
    assert main("generate run --max-new-tokens 0 --prompt -".split()) == 0
    assert capsys.readouterr().out == "café\n"


def test_negative_numbers_and_dashed_paths_are_taken(capsys: Capture, tmp_path: Path) -> None:
    assert main(["generate", "run", "--temperature", "-1e-3"]) == 2
    assert "at least 0, got -0.001" in capsys.readouterr().err
    assert main(["train", "--data", "-nothing", "--out", str(tmp_path)]) == 2
    assert "-nothing is not a directory" in capsys.readouterr().err
    for call in (["train", "--data", "--out", "x"], ["train", "--data", "--", "--out", "x"]):
        with pytest.raises(SystemExit):
            main(call)
        assert "argument --data: expected one argument" in capsys.readouterr().err


def test_gpt2c_alone_shows_its_help(capsys: Capture) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert "usage: gpt2c" in out and err == ""
    for verb in ("demo", "prepare", "train", "generate", "tokens", "plot", "convert", "info"):
        assert re.search(rf"^    {verb} +[A-Za-z]", out, re.MULTILINE)


def test_flags_take_underscores_and_show_hyphens(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "--skip-nonfinite" in out and not re.search(r"--\w+_\w", out)
    assert main("generate run --max_new_tokens 0 --prompt a_b".split()) == 0
    assert capsys.readouterr().out == "a_b\n"


# ---- real processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "redirections", "code"),
    [
        ("generate run --max-new-tokens 3", ">&- 2>&-", 0),
        ("generate missing", "2>/dev/full", 2),
        ("generate run --interactive", "<&-", 0),
        ("generate run --max-new-tokens 3", ">/dev/full 2>/dev/full", 2),
    ],
)
def test_redirections_of_a_shell_work(arguments: str, redirections: str, code: int) -> None:
    if "full" in redirections and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = ["sh", "-c", f'"$@" {redirections}', "sh", *COMMAND, *arguments.split()]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == code and b"Traceback" not in done.stderr


def test_closed_streams_give_no_number_to_a_file() -> None:
    closed = ["sh", "-c", '"$@" 2>&- <&-', "sh"]
    done = run_process([*closed, *program("programs.fresh", "number_of_a_file")])
    assert int(done.stdout) > 2


def in_a_terminal(
    arguments: str, talk: Callable[[int, Callable[[bytes], bytes]], None]
) -> tuple[int, bytes]:
    """Run gpt2c in a terminal of its own while `talk` has the other side; return its output."""
    pytest.importorskip("termios")
    side, child_side = os.openpty()
    # The first process that opens a terminal in a new session gets Ctrl-C from it.
    shell = ["sh", "-c", 'trap "" HUP; exec "$@" <"$0"', os.ttyname(child_side)]
    command = [*shell, *COMMAND, *arguments.split()]
    child = subprocess.Popen(
        command,
        stdin=child_side,
        stdout=child_side,
        stderr=child_side,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(child_side)
    shown = b""

    def until(wanted: bytes) -> bytes:
        nonlocal shown
        start, end = len(shown), time.monotonic() + 60
        while wanted not in shown[start:] and (left := end - time.monotonic()) > 0:
            try:
                if select.select([side], [], [], left)[0]:
                    shown += os.read(side, 4096)
            except OSError:  # Linux's error when the child has closed its side
                break
        return shown[start:]

    try:
        talk(side, until)
        code = child.wait(timeout=60)
    finally:
        child.kill()
        child.wait()
    return code, shown


def press_ctrl_c(side: int) -> None:
    """Press Ctrl-C at a prompt; Python misses one that comes before it waits for a key."""
    time.sleep(0.5)
    os.write(side, b"\x03")


def test_prompt_line_can_be_edited() -> None:
    pytest.importorskip("readline")

    def talk(side: int, until: Callable[[bytes], bytes]) -> None:
        assert b"nothing is remembered" in until(b"> ")
        os.write(side, b"ab" + b"\x1b[D" + b"\x1b[D" + b"x\r")  # to the left, twice
        assert b"tokens" not in until(b"\n> ")
        os.write(side, b"\x1b[A\r")  # up: the line before
        assert b"xab" in until(b"\n> ")
        os.write(side, b"\x04")
        until(b"tokens/s")
        os.close(side)

    code, shown = in_a_terminal("generate run --interactive --max-new-tokens 1", talk)
    assert code == 0 and b"xab" in shown


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_ends() -> None:
    hint = b"(Ctrl-D or Ctrl-C again ends the program)"

    def talk(side: int, until: Callable[[bytes], bytes]) -> None:
        until(b"> ")
        os.write(side, b"dropped")
        press_ctrl_c(side)
        assert hint in until(b"\n> ")
        os.write(side, b"ab\r")
        assert b"dropped" not in until(b"\n> ")  # so this Ctrl-C is not the second in a row
        press_ctrl_c(side)
        assert hint in until(b"\n> ")
        press_ctrl_c(side)
        until(b"interrupted")
        os.close(side)

    code, shown = in_a_terminal("generate run --interactive --max-new-tokens 1", talk)
    assert code == 130 and shown.count(hint) == 2 and b"Traceback" not in shown


def test_ctrl_c_ends_a_running_text() -> None:
    def talk(side: int, until: Callable[[bytes], bytes]) -> None:
        until(b"> ")
        os.write(side, b"ab\r")
        until("\ufffd".encode())  # the bell
        os.write(side, b"\x03")
        assert b"Ctrl-D or" not in until(b"\n> ")
        os.write(side, b"\x04")
        until(b"tokens/s")
        os.close(side)

    code, _ = in_a_terminal("generate bell --interactive --max-new-tokens 200000", talk)
    assert code == 0


def test_kill_ends_interactive_generate(tmp_path: Path, world: Path) -> None:
    """Unlike Ctrl-C, which ends only a text."""
    for line, wanted in (b"", b"nothing is remembered"), (b"ab\n", b"ab"):
        side, child_side = os.openpty()
        child = subprocess.Popen(
            [*COMMAND, *"generate run --interactive --max-new-tokens 2000000".split()],
            stdin=child_side,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        os.close(child_side)
        os.write(side, line)
        assert child.stdout is not None
        shown = b""
        while wanted not in shown[shown.find(b"program.") * bool(line) :]:
            shown += os.read(child.stdout.fileno(), 4096)
        child.terminate()
        try:
            assert child.wait(timeout=60) == 130
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
            os.close(side)


@pytest.mark.parametrize(
    "arguments",
    [f"train --data data --out OUT {TINY} --max-iters 400", "generate run --max-new-tokens 20000"],
)
def test_verb_ends_cleanly_when_its_terminal_closes(arguments: str, tmp_path: Path) -> None:
    def talk(side: int, until: Callable[[bytes], bytes]) -> None:
        until(b"loss" if "train" in arguments else b"t")
        os.close(side)

    code, _ = in_a_terminal(arguments.replace("OUT", str(tmp_path / "run")), talk)
    assert code == 0
    if "train" in arguments:
        assert (tmp_path / "run" / "model.safetensors").is_file()
