"""Atomic writes: a file is whole or absent. Locks, links and untrusted JSON and text."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from conftest import refused

from gpt2c.files import atomic, untrusted
from gpt2c.files.atomic import atomic_paths, claim_directory


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_full_disk_leaves_every_file_unchanged(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text("old")
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as error, atomic_paths(*paths) as new:
        for path in new:
            path.write_text("new")
    assert error.value.filename == str(paths[failing - 1])
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_text() for path in paths] == ["old"] * 3


def test_all_files_change_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    with atomic_paths(*paths) as new:
        for path in new:
            path.write_text("new")
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["new"] * 2


def test_directory_is_claimed_once(tmp_path: Path) -> None:
    claim_directory(tmp_path / "x" / "y", overwrite=False)
    (tmp_path / "x" / "y" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        claim_directory(tmp_path / "x" / "y", overwrite=False)
    claim_directory(tmp_path / "x" / "y", overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        claim_directory(tmp_path / "x" / "y" / "file", overwrite=True)


def test_error_names_the_wanted_file(tmp_path: Path) -> None:
    """And not the temporary file, which a user never sees; of several files, the failed one."""
    missing = tmp_path / "no" / "such"
    with pytest.raises(FileNotFoundError) as error, atomic_paths(tmp_path / "a", missing) as new:
        for path in new:
            path.write_text("new")
    assert error.value.filename == str(missing)
    with pytest.raises(FileNotFoundError) as error, atomic.atomic_directory(missing):
        pass
    assert error.value.filename == str(missing)
    with pytest.raises(FileNotFoundError) as error, atomic.atomic_directory(tmp_path / "d") as new:
        (new / "sub" / "file").touch()
    assert error.value.filename == str(tmp_path / "d" / "sub" / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OSError) as error, atomic_paths(tmp_path / "full") as (path,):
        path.touch()  # a file cannot replace a directory
    assert error.value.filename == str(tmp_path / "full")
    other = tmp_path / "other"
    with pytest.raises(FileNotFoundError) as error, atomic_paths(tmp_path / "a"):
        other.read_text()  # another program's file keeps its name
    assert error.value.filename == str(other)


# ---- links ---------------------------------------------------------------------------------------


def test_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    here, disk = tmp_path / "here", tmp_path / "disk"
    here.mkdir()
    disk.mkdir()
    (disk / "old").write_text("old")
    targets = {"a": str(disk / "old"), "b": "../disk/fresh", "c": "a"}  # c is a link to a link
    for name, target in targets.items():
        (here / name).symlink_to(target)
    for names in (("a", "b"), ("c", "plain")):
        with atomic_paths(*(here / name for name in names)) as new:
            for path, name in zip(new, names, strict=True):
                path.write_text(f"new {name}")
    assert {name: os.readlink(here / name) for name in targets} == targets
    assert {path.name: path.read_text() for path in disk.iterdir()} == {
        "old": "new c",
        "fresh": "new b",
    }
    assert sorted(os.listdir(here)) == ["a", "b", "c", "plain"]
    with pytest.raises(OSError) as error, atomic.atomic_path(here / "a") as path:
        raise OSError(errno.ENOSPC, "No space left", str(path))
    assert error.value.filename == str(here / "a"), "the name that its user knows"
    assert (disk / "old").read_text() == "new c" and len(os.listdir(disk)) == 2


def test_link_to_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "away" / "file")
    said = f"^{tmp_path}/a is a link to {tmp_path}/away/file, whose directory does not exist: make"
    with pytest.raises(FileNotFoundError, match=said), atomic_paths(tmp_path / "b", tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "away").mkdir()
    with atomic.atomic_path(tmp_path / "a") as path:
        path.write_text("new")
    assert (tmp_path / "away" / "file").read_text() == "new" and (tmp_path / "a").is_symlink()


def test_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with (
            pytest.raises(OSError, match=f"^{tmp_path}/{name} is a pipe or a device; a file is wa"),
            atomic.atomic_path(tmp_path / name),
        ):
            pass
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("other", ["link", "b"])
def test_two_links_to_one_file_are_refused(tmp_path: Path, other: str) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "b").write_text("old")
    said = f"^{tmp_path}/{other} and {tmp_path}/a lead to one file: remove the link$"
    with pytest.raises(OSError, match=said), atomic_paths(tmp_path / "a", tmp_path / other):
        pass
    assert (tmp_path / "b").read_text() == "old" and len(os.listdir(tmp_path)) == 3


def test_link_to_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    """A write through it would change a checkpoint, whose state holds its checksums."""
    step = tmp_path / "checkpoints" / "00000008"
    step.mkdir(parents=True)
    for name in ("state.json", "model.safetensors"):
        (step / name).write_text("whole")
    path = tmp_path / "model.safetensors"
    path.symlink_to("checkpoints/00000008/model.safetensors")
    with atomic.atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and not path.is_symlink()
    assert {file.read_text() for file in step.iterdir()} == {"whole"} and len(
        list(step.iterdir())
    ) == 2


# ---- file systems that refuse a refinement -------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
def test_refused_fsync_does_not_end_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic.atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    with atomic.atomic_directory(tmp_path / "d") as temporary:
        (temporary / "b").write_text("new")
    assert (tmp_path / "a").read_text() == (tmp_path / "d" / "b").read_text() == "new"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_failed_fsync_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as error, atomic.atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert error.value.errno == number and error.value.filename == str(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_renamed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of a container's image cannot, on an overlay."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    monkeypatch.setattr(os, "rename", refuse)
    atomic.remove(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_error_of_a_copy_on_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """And not the source of the copy, which shutil's error names."""
    with pytest.raises(OSError) as error, atomic.atomic_path(tmp_path / "to") as temporary:
        raise OSError(errno.ENOSPC, "No space left", str(tmp_path / "from"), None, str(temporary))
    assert error.value.filename == str(tmp_path / "to") and error.value.filename2 is None


@pytest.mark.parametrize("shared", [False, True])
def test_directory_is_locked(tmp_path: Path, shared: bool) -> None:
    with atomic.locked(tmp_path, "taken", shared=shared):
        with pytest.raises(BlockingIOError, match="taken"), atomic.locked(tmp_path, "taken"):
            pass
        if shared:
            with atomic.locked(tmp_path, "taken", shared=True):
                pass
    with atomic.locked(tmp_path, "taken"):
        pass


def test_link_into_the_hubs_cache_is_replaced(tmp_path: Path) -> None:
    """A blob there has the name of its content, so no write may change it."""
    blob = tmp_path / "blobs" / "0123"
    link = tmp_path / "snapshots" / "main" / "config.json"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_text("of the hub")
    link.symlink_to(os.path.relpath(blob, link.parent))
    with atomic.atomic_path(link) as temporary:
        temporary.write_text("new")
    assert (blob.read_text(), link.read_text(), link.is_symlink()) == ("of the hub", "new", False)


def test_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=f"is a link to {tmp_path}/away, which does"):
        claim_directory(tmp_path / "out", overwrite=True)
    (tmp_path / "away").mkdir()
    claim_directory(tmp_path / "out", overwrite=False)


# ---- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} x', "Extra data"),
        (b"\xff\xff", "is not UTF-8: byte 0 is 0xff"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        (b'{"x": {"b": 2, "b": 1}}', "'b' is there twice"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
    ],
)
def test_bad_json_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    message = refused(untrusted.read_json, path)
    assert str(path) in message and said in message


def test_json_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(untrusted.LARGEST_JSON + 1)  # takes no space
    assert f"at most {untrusted.LARGEST_JSON:,}" in refused(untrusted.read_json, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nothing writes to it
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(OSError, match=f"{name} is a pipe or a device"):
            untrusted.read_bytes(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        untrusted.read_bytes(tmp_path)


@pytest.mark.parametrize("size", [2, 9])
def test_file_that_changes_meanwhile_is_refused(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, look = tmp_path / "x", os.fstat
    path.write_bytes(bytes(5))

    def look_then_change(descriptor: int) -> os.stat_result:
        found.append(look(descriptor))
        if len(found) == 2:  # the first asked whether it is a file, the second how large it is
            os.truncate(path, size)
        return found[-1]

    found: list[os.stat_result] = []
    monkeypatch.setattr(os, "fstat", look_then_change)
    with pytest.raises(OSError, match="changed while it was read"):
        untrusted.read_bytes(path)


def test_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, {"a": 2.5}], "é": null}', encoding="utf-8")
    assert untrusted.read_json(path) == {"a": [1, {"a": 2.5}], "é": None}


# ---- directories that are whole or absent --------------------------------------------------------


def test_directory_comes_whole_in_the_place_of_another(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic.atomic_directory(tmp_path / "a") as temporary:
            (temporary / content).write_text(content)
            assert temporary.parent == tmp_path and atomic.TEMPORARY.fullmatch(temporary.name)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/new"]


def test_directory_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    with atomic.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "old").touch()
    with pytest.raises(OSError, match="a") as error, atomic.atomic_directory(tmp_path / "a") as new:
        (new / "new").touch()
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "old"]


def test_leftovers_are_removed_and_claim_nothing(tmp_path: Path) -> None:
    (tmp_path / ".a.77.tmp").mkdir()
    (tmp_path / ".a.77.tmp" / "part").touch()
    (tmp_path / ".b.json.78.tmp").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".c.79.tmp").symlink_to(tmp_path / "elsewhere")
    atomic.claim_directory(tmp_path / "here", overwrite=False)
    atomic.remove_leftovers(tmp_path / "here")
    atomic.remove_leftovers(tmp_path)
    kept = sorted(path.name for path in tmp_path.rglob("*"))
    assert kept == ["elsewhere", "here", "mine"]
    with pytest.raises(FileExistsError):
        atomic.claim_directory(tmp_path, overwrite=False)


def test_untrusted_value_is_shown_in_one_line() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert untrusted.shown("x") == "'x'" and untrusted.shown([1, {"a": None}]) == "[1, {'a': None}]"
    for value in ("\n\x1b" * 999, 10**4000, ["x" * 99] * 99, {"\n": deep}, deep, list(range(999))):
        text = untrusted.shown(value)
        assert len(text) <= untrusted.LONGEST_VALUE and text.isprintable()
    assert untrusted.shown(ValueError("bad `\x1b[31m`")) == r"bad `\x1b[31m`"
    assert len(untrusted.shown(ValueError("x" * 999))) == untrusted.LONGEST_VALUE


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("é\nb\n".encode(), "é\nb\n"),
        ("é\r\nb\r\n\r\n".encode(), "é\nb\n\n"),
        (b"a\rb\r\r\n", "a\rb\r\n"),  # a CR alone is not a line end of Windows
        ("今天\r\n".encode("utf-8-sig"), "今天\n"),
        ("a\ufeffb".encode(), "a\ufeffb"),  # a mark at the start only
    ],
)
def test_text_with_a_byte_order_mark_or_crlf_is_read(tmp_path, content, text):
    (tmp_path / "a.txt").write_bytes(content)
    assert untrusted.read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        ("".encode("utf-8-sig"), "is empty"),  # the mark alone
        (b"abc\xe9def", "is not UTF-8: byte 3 is 0xe9; convert it to UTF-8"),
        ("今天".encode("gbk"), "is not UTF-8: byte 0 is 0xbd; convert it to UTF-8"),
        ("ab".encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        (b"\xfe\xff\0a", "is UTF-16, not UTF-8; save it as UTF-8"),
        ("ab".encode("utf-32"), "is UTF-32, not UTF-8; save it as UTF-8"),
    ],
)
def test_bad_text_is_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    assert f"a.txt {message}" in refused(untrusted.read_text, tmp_path / "a.txt")


def test_missing_text_file_or_device_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.txt does not exist"):
        untrusted.read_text(tmp_path / "a.txt")
    with pytest.raises(OSError, match=r"/dev/zero is a device"):
        untrusted.read_text("/dev/zero")


def test_text_is_read_from_a_pipe():
    read, write = os.pipe()  # as for a shell's <(zcat book.gz)
    os.write(write, b"abc")
    os.close(write)
    assert untrusted.read_text(f"/dev/fd/{read}") == "abc"
    os.close(read)


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{\r\n"a": 1}\r\n')
    assert untrusted.read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_bytes('{"a": 1}'.encode("utf-16"))
    assert "a.json is UTF-16, not UTF-8" in refused(untrusted.read_json, tmp_path / "a.json")


def test_an_output_that_is_or_holds_an_input_is_refused(tmp_path: Path) -> None:
    held = tmp_path / "out" / "deep" / "data.jsonl"
    held.parent.mkdir(parents=True)
    held.touch()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "link"):
        for given in (held, str(held), tmp_path / "link" / "deep"):
            said = refused(atomic.check_apart, out, None, [1], "", given)
            assert said.startswith(f"{out} holds {given}, which is read, and its content would be")
        said = f"{out} is read itself, and its content would be replaced: name another directory"
        assert said in refused(atomic.check_apart, out, tmp_path / "out")
    (tmp_path / "out-2").touch()
    atomic.check_apart(tmp_path / "out", tmp_path, tmp_path / "out-2", tmp_path / "out" / "none")
