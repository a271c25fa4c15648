"""safetensors: reading, conversion to float32, and headers that the library accepts."""

from __future__ import annotations

import errno
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.raw import write_raw
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from gpt2c.files import tensors as tensorfile
from gpt2c.files import untrusted
from gpt2c.files.tensors import (
    LARGEST_HEADER,
    StoredTensor,
    map_tensors,
    read_tensors,
    write_tensors,
)

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_floats_become_float32_when_asked_for(dtype: str, path: Path) -> None:
    values = np.array([[1.5, -2.25, 0.0], [6e4, -6e-8, np.inf]]).astype(dtype)
    save_file({"a": values}, path, metadata={"k": "v"})
    tensors, metadata = map_tensors(path)
    tensor = tensors["a"]
    assert metadata == {"k": "v"} and tensor.shape == (2, 3)
    for array, expected in [(tensor, values), (tensor.T, values.T)]:
        floats = np.asarray(array)
        assert floats.dtype == np.float32 and floats.shape == expected.shape
        assert np.array_equal(floats, expected.astype(np.float32))
        assert floats.flags.writeable == (dtype != "f4"), "float32 is the file's own memory"
    again = np.array(tensor)
    again[...] = 7
    assert np.array_equal(np.asarray(tensor), values.astype(np.float32)), "not a copy"
    assert np.array_equal(read_tensors(path)[0]["a"], values.astype(np.float32))


def test_bfloat16_is_widened(path: Path) -> None:
    """Every 16-bit pattern is the upper half of a float32, also for NaN and subnormals."""
    halves = np.arange(2**16, dtype="<u2").reshape(256, 256)
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "BF16", "shape": [256, 256], "data_offsets": [4, 4 + 2**17]},
        "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [4 + 2**17, 4 + 2**17]},
    }
    write_raw(path, header, struct.pack("<f", 7) + halves.tobytes())
    tensors = map_tensors(path)[0]
    expected = halves.astype(np.uint32) << 16
    assert np.array_equal(np.asarray(tensors["b"]).view(np.uint32), expected)
    assert np.array_equal(np.asarray(tensors["b"].T).T.view(np.uint32), expected)
    assert np.asarray(tensors["a"]) == 7 and np.asarray(tensors["empty"]).shape == (0, 3)


def test_tensor_may_start_anywhere(path: Path) -> None:
    """After a header of any length nothing is aligned; also for tensors without numbers."""
    values = np.arange(6, dtype="<f4")
    for spaces in range(8):
        header = {
            "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "one": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
        }
        text = json.dumps(header).encode() + b" " * spaces
        write_raw(path, text, values.tobytes() + struct.pack("<f", 9))
        tensors = read_tensors(path)[0]
        assert np.array_equal(tensors["a"], values.reshape(2, 3))
        assert tensors["empty"].shape == (0, 3) and tensors["one"] == 9


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_mapping_reads_nothing_and_asking_reads_one(dtype: str, path: Path) -> None:
    """16 tensors of 4 MB as float32: one in memory at a time, never with a second copy."""
    n, size = 16, 1 << 20
    header = {
        f"t{i}": {
            "dtype": dtype,
            "shape": [size],
            "data_offsets": [2 * size * i, 2 * size * i + 2 * size],
        }
        for i in range(n)
    }
    write_raw(path, header, b"")
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size + 2 * size * n)  # zeros, which take no space
    tracemalloc.start()
    tensors = map_tensors(path)[0]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    for tensor in tensors.values():
        assert not np.asarray(tensor).any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4 * size < peak < 4 * size + (3 << 20)  # any() and the names take some


def test_numbers_beyond_float32_are_refused(path: Path) -> None:
    save_file({"fine": np.ones(2), "large": np.full((2, 2), 1e300)}, path)
    tensors = map_tensors(path)[0]
    assert np.asarray(tensors["fine"]).tolist() == [1, 1]
    assert refused(np.asarray, tensors["large"]) == (
        f"{path}: large holds numbers beyond the range of float32"
    )


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, np.uint8, np.bool_])
def test_other_dtypes_are_refused_unless_ignored(dtype: Any, path: Path) -> None:
    save_file({"a.mask": np.ones((2, 2), dtype), "b": np.ones(3, np.float32)}, path)
    assert "a.mask has dtype" in refused(map_tensors, path)
    assert map_tensors(path, ignored=(".mask",))[0].keys() == {"b"}


def test_tensors_are_written_in_their_dtypes(path: Path, tmp_path: Path) -> None:
    arrays = {"a": np.ones((2, 3), np.float16), "b": np.arange(6.0)[::2], "c": np.zeros(4, "u1")}
    write_tensors(path, arrays, {"z": "1", "a": "2"})
    with safe_open(path, framework="np") as file:
        for name, array in arrays.items():
            stored = file.get_tensor(name)
            assert stored.dtype == array.dtype and np.array_equal(stored, array)
    copy = tmp_path / "y.safetensors"
    write_tensors(copy, arrays, {"a": "2", "z": "1"})
    assert copy.read_bytes() == path.read_bytes(), "equal contents are equal files"
    with pytest.raises(OSError, match=r"no/x|No such file"):
        write_tensors(tmp_path / "no" / "x", arrays, {})


# ---- refused by safetensors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{nonsense",
        b"[]",
        b'{"x": ' + b"[" * 100_000,
        b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        json.dumps({"x": ENTRY}).encode() + b"\0\0",
        json.dumps({"x": ENTRY}).encode() + b"{}",
        b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        {},
        {"x": 1},
        {"x": ENTRY | {"shape": [2]}},
        {"x": ENTRY | {"shape": [2**62, 4]}},
        {"x": ENTRY | {"shape": [-1]}},
        {"x": ENTRY | {"shape": [1.0]}},
        {"x": ENTRY | {"shape": [True]}},
        {"x": ENTRY | {"data_offsets": [4, 8]}},
        {"x": ENTRY | {"data_offsets": [4, 0]}},
        {"x": ENTRY | {"data_offsets": [-4, 0]}},
        {"x": ENTRY | {"data_offsets": [0, 2**63]}},
        {"x": ENTRY | {"data_offsets": [0, 4, 4]}},
        {"x": ENTRY | {"dtype": "F33"}},
        {"x": ENTRY | {"dtype": "\n\x1b[31m" * 999}},  # the library repeats it
        {"x\n" * 999: ENTRY | {"data_offsets": [4, 8]}},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": ENTRY, "y": ENTRY},
        {"x": ENTRY, "y": ENTRY | {"data_offsets": [2, 6]}},
        {"__metadata__": {"a": 1}, "x": ENTRY},
        {"__metadata__": [], "x": ENTRY},
    ],
    ids=lambda header: str(header)[:60],
)
def test_damaged_header_is_refused(header: Any, path: Path) -> None:
    write_raw(path, header, bytes(4))
    for read in (map_tensors, read_tensors):
        message = refused(read, path)
        assert f"{path} is not a whole safetensors file" in message
        assert message.isprintable() and len(message) < len(str(path)) + 200


@pytest.mark.parametrize("extra", [-1, 1, 4])
def test_data_must_end_with_the_last_tensor(extra: int, path: Path) -> None:
    write_raw(path, {"x": ENTRY}, bytes(4 + extra))
    assert "not a whole safetensors file" in refused(map_tensors, path)


def test_tensors_follow_each_other_without_gaps(path: Path) -> None:
    write_raw(path, {"x": ENTRY, "y": ENTRY | {"data_offsets": [8, 12]}}, bytes(12))
    assert "not a whole safetensors file" in refused(map_tensors, path)


@pytest.mark.parametrize("size", [LARGEST_HEADER + 1, 2**60, 2**64 - 1])
def test_long_header_is_not_read(size: int, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    with open(path, "rb+") as file:
        file.truncate(LARGEST_HEADER + 100)
    assert f"its header would have {size:,} bytes" in refused(map_tensors, path)


@pytest.mark.parametrize("size", range(9))
def test_file_without_a_header_is_refused(size: int, path: Path) -> None:
    path.write_bytes((struct.pack("<Q", 2) + b"{")[:size])
    assert "not a whole safetensors file" in refused(map_tensors, path)


@pytest.mark.parametrize("kind", ["absent", "directory", "dangling"])
def test_missing_file_is_named(kind: str, path: Path) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        map_tensors(path)


# ---- refused by gpt2c alone ----------------------------------------------------------------------

RAW = json.dumps(ENTRY).encode()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"x":' + RAW + b',"x":' + RAW + b"}", "'x' is there twice"),
        (b'{"x":' + RAW + b',"\\u0078":' + RAW + b"}", "'x' is there twice"),
        (b'{"__metadata__":{"a":"1","a":"2"},"x":' + RAW + b"}", "'a' is there twice"),
        (b' {"x":' + RAW + b"}", "must start with {"),
        ({"x": ENTRY | {"scale": 2}}, "x has a field 'scale'"),
        ({"x": ENTRY | {"dtype": "F8_E4M3", "shape": [4]}}, "x has dtype F8_E4M3"),
        ({"x": ENTRY | {"dtype": "F4", "shape": [8]}}, "x has dtype F4"),
        ({"x": ENTRY | {"dtype": "C64", "shape": [0], "data_offsets": [0, 0]}, "y": ENTRY}, "C64"),
        ({"x": ENTRY | {"shape": [1] * 33}}, "x has an impossible shape"),
        ({"x": ENTRY | {"shape": [1] * 10_000}}, "x has an impossible shape"),
        (
            {"x": ENTRY, "y": ENTRY | {"shape": [0, 2**61], "data_offsets": [4, 4]}},
            "y has an impossible shape, [0, 2305843009213693952]",
        ),
        ({"": ENTRY}, "a tensor's name must be 1 to 256 printable characters"),
        ({"x" * 257: ENTRY}, "a tensor's name must be"),
        ({"x" * 1_000_000: ENTRY}, "a tensor's name must be"),
        ({"x\n\x1b[31m": ENTRY}, r"printable characters, got 'x\n\x1b[31m'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_headers_that_safetensors_accepts_are_refused(header: Any, said: str, path: Path) -> None:
    write_raw(path, header, bytes(4))
    with safe_open(path, framework="np") as file:  # otherwise gpt2c need not check it
        assert file.keys()
    message = refused(map_tensors, path)
    assert str(path) in message and said in message and len(message) < len(str(path)) + 400


def test_ignored_tensors_are_checked_too(path: Path) -> None:
    write_raw(path, {"x\n.mask": ENTRY}, bytes(4))
    assert "a tensor's name" in refused(map_tensors, path, (".mask",))


def test_safetensors_still_checks_the_rest(path: Path) -> None:
    """Memory safety rests on these two rules, so they are tested on the library itself."""
    for entry in ({"shape": [2]}, {"data_offsets": [0, 8], "shape": [2]}):
        write_raw(path, {"x": ENTRY | entry}, bytes(4))
        with pytest.raises(SafetensorError), safe_open(path, framework="np"):
            pass


def test_stored_tensor_shows_its_file_and_name(path: Path) -> None:
    save_file({"a": np.zeros((2, 3))}, path)
    tensor = map_tensors(path)[0]["a"].T
    assert isinstance(tensor, StoredTensor) and tensor.shape == (3, 2)
    assert (tensor.path, tensor.name, tensor.dtype) == (path, "a", "F64")


# ---- memory, and file systems --------------------------------------------------------------------


def test_transpose_is_written_a_piece_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorfile, "PIECE", 1 << 12)
    wide = np.arange(1 << 18, dtype=np.float32).reshape(256, 1024)
    tensors = {"plain": wide, "turned": wide.T, "empty": wide[:0].T, "one": np.float32([7])[0:1]}
    tracemalloc.start()
    write_tensors(path, tensors, {"format": "pt"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < wide.nbytes / 4
    stored = load_file(path)
    assert all(np.array_equal(stored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "u1", "u2", "i8", ">f4"])
def test_written_file_equals_that_of_safetensors(dtype: str, path: Path) -> None:
    values = np.arange(12).astype(dtype).reshape(3, 4)
    write_tensors(path, {"b": values, "a": values.T, "c": values[:0]}, {"k": "v"})
    stored = load_file(path)
    assert stored["a"].dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(stored["a"], values.T) and np.array_equal(stored["b"], values)
    assert stored["c"].shape == (0, 4)


def test_error_of_a_full_disk_names_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.symlink_to("/dev/full")
    if not path.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        write_tensors(path, {"a": np.zeros(1 << 16, np.float32)}, {})
    assert error.value.filename == str(path)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.EACCES, errno.ENOTSUP])
def test_file_is_read_where_it_cannot_be_mapped(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(path, {"a": values}, {})

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(number, "refused")

    monkeypatch.setattr(untrusted.mmap, "mmap", refuse)
    monkeypatch.setattr(tensorfile, "safe_open", refuse)
    read = read_tensors(path)[0]["a"]
    assert np.array_equal(read, values) and not read.flags.writeable
    path.write_bytes(path.read_bytes()[:-1])
    assert "is not a whole safetensors file" in refused(read_tensors, path)


def test_input_output_error_is_raised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(path, {"a": np.zeros(3, np.float32)}, {})

    def fail(*arguments: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(untrusted.mmap, "mmap", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_tensors(path)
