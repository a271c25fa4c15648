"""One safetensors file: tensors mapped or read as float32; equal tensors make equal files.

Knows nothing about models, only the format: an 8-byte little-endian length, a JSON header of that
length, then the tensors' bytes. The library checks lengths, sizes and offsets: tensors follow each
other without gaps and end with the file. This module also refuses headers that the library accepts
and two readers might read differently: with a repeated name, or with an unknown field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, deserialize, safe_open

from gpt2c.files.atomic import REFUSALS, naming
from gpt2c.files.untrusted import map_file, parse_json, read_header, shown

__all__ = [
    "FLOAT_DTYPES",
    "LARGEST_HEADER",
    "AnyTensor",
    "JoinedTensor",
    "PiecedTensor",
    "StoredTensor",
    "from_bf16",
    "map_tensors",
    "read_tensors",
    "write_tensors",
]

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "U8": "|u1"}
FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
FIELDS = {"dtype", "shape", "data_offsets"}  # of a tensor in the header

PIECE = 1 << 22  # bytes of a tensor that are copied at a time
LARGEST_HEADER = 1 << 25  # bytes: 10,000 layers have 12 MB of names and shapes
LONGEST_NAME = 256  # characters
MOST_DIMENSIONS = 32  # that every version of NumPy allows
LARGEST_DIMENSION = 1 << 47  # numbers that fit the address space; a shape with a 0 could have more

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a mapped file: its shape is known, and its numbers are read on demand.

    `np.asarray(tensor)` returns them as float32, as with a dataset of h5py. F32 is a read-only view
    of the file; other dtypes are converted, again in each call.

    Parameters
    ----------
    path, name : of the file and the tensor, for errors
    dtype : safetensors' name for it, such as "F32"
    data : read-only array in the file; BF16, which NumPy lacks, is uint16
    """

    path: Path
    name: str
    dtype: str
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.data.shape

    @property
    def T(self) -> StoredTensor:
        """Its transpose, without reading a number."""
        return StoredTensor(self.path, self.name, self.dtype, self.data.T)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the numbers as float32, or as `dtype`.

        Raises
        ------
        ValueError : a number is beyond the range of float32
        """
        array: NDArray[Any]
        if self.dtype == "BF16":
            array = from_bf16(self.data)
        else:
            try:
                with np.errstate(over="raise"):
                    array = self.data.astype(np.float32, copy=False)
            except FloatingPointError as error:
                raise ValueError(
                    f"{self.path}: {self.name} holds numbers beyond the range of float32"
                ) from error
        return array.astype(dtype or np.float32, copy=bool(copy))


class Matrix(Protocol):
    """A part of a `JoinedTensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __array__(self) -> NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class JoinedTensor:
    """Matrices of a mapped file, one below the other, which are joined when they are read.

    `np.asarray(tensor)` returns the numbers as float32, in memory of their own.

    Parameters
    ----------
    parts : matrices with the same number of columns, each read by np.asarray
    """

    parts: tuple[Matrix, ...]
    dtype = "joined"  # no dtype of a file: each part has its own, and reading makes a copy

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the numbers as float32, or as `dtype`; see `StoredTensor`."""
        joined, first = np.empty(self.shape, dtype or np.float32), 0
        for part in self.parts:
            joined[first : first + part.shape[0]] = part
            first += part.shape[0]
        return joined


AnyTensor = NDArray[Any] | StoredTensor


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 numbers as float32, whose upper halves they are."""
    wide: NDArray[np.float32] = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return wide


class PiecedTensor(NamedTuple):
    """A float32 tensor that is not in memory: `pieces` yields its numbers in order as arrays."""

    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[np.float32]]]


def write_tensors(
    path: Path, tensors: Mapping[str, AnyTensor | PiecedTensor], metadata: dict[str, str]
) -> None:
    """Write tensors in their own dtypes, a `StoredTensor` as float32.

    The library would copy all tensors in memory. Here only a tensor that is not contiguous, such as
    a transpose, is copied, a piece at a time. Equal tensors make equal files: the widest numbers
    come first, which aligns all tensors; those of one width are sorted by name.

    Raises
    ------
    OSError : the file cannot be written
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    dtypes = {name: _dtype(tensor) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    end = 0
    for name in names:
        begin, dtype, shape = end, dtypes[name], tensors[name].shape
        end += dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": f"{dtype.kind.upper()}{8 * dtype.itemsize}",
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with naming(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in _pieces(tensors[name]):
                file.write(piece.data)


def _dtype(tensor: AnyTensor | PiecedTensor) -> np.dtype[Any]:
    if isinstance(tensor, StoredTensor | PiecedTensor):
        return np.dtype(np.float32)
    return tensor.dtype


def _pieces(tensor: AnyTensor | PiecedTensor) -> Iterator[NDArray[Any]]:
    """Yield the numbers of a tensor in order, as contiguous arrays; copy it if it is not one."""
    if isinstance(tensor, PiecedTensor):
        yield from tensor.pieces()
        return
    array = np.asarray(tensor)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.flags.c_contiguous or not array.ndim:
        yield np.ascontiguousarray(array)
        return
    rows = max(1, PIECE // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows])


def map_tensors(
    path: Path, ignored: tuple[str, ...] = (), dtypes: tuple[str, ...] = FLOAT_DTYPES
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Map a safetensors file; return its tensors by name, and its metadata. No number is read.

    Parameters
    ----------
    path : the file
    ignored : tensors whose names end with one of these are left out, whatever their dtypes
    dtypes : those that the other tensors may have

    Raises
    ------
    FileNotFoundError : there is no such file
    ValueError : it is damaged, or a tensor has another dtype; the error names file and tensor
    """
    header, data = _map(path)
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        _check(path, name, entry)
        if name.endswith(ignored):
            continue
        dtype = entry["dtype"]
        if dtype not in dtypes:
            raise ValueError(f"{path}: {name} has dtype {dtype}; wanted one of {', '.join(dtypes)}")
        begin, end = entry["data_offsets"]
        array = data[begin:end].view(DTYPES[dtype]).reshape(entry["shape"])
        tensors[name] = StoredTensor(path, name, dtype, array)
    return tensors, metadata


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read a safetensors file as float32; tensors that are float32 in the file stay mapped."""
    stored, metadata = map_tensors(path)
    return {name: np.asarray(tensor) for name, tensor in stored.items()}, metadata


def _map(path: Path) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Return a file's header, and all bytes after it, mapped; the library checks the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist (weights are read from safetensors, never from pickles)"
        )
    size = int.from_bytes(read_header(path, 8)[0], "little")
    if size > LARGEST_HEADER:
        raise ValueError(
            f"{path} is not a whole safetensors file: its header would have {size:,} bytes; at most"
            f" {LARGEST_HEADER:,} are read"
        )
    mapped = map_file(path)
    try:
        try:
            with safe_open(path, framework="np"):
                pass
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            deserialize(mapped.tobytes())  # type: ignore[no-untyped-call]  # the same checks where files cannot be mapped
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {shown(error)}") from error
    except MemoryError as error:
        raise MemoryError(f"{path} cannot be mapped, {len(mapped):,} bytes: {error}") from error
    text = mapped[8 : 8 + size].tobytes()
    if not text.startswith(b"{"):
        raise ValueError(f"{path} is not a whole safetensors file: its header must start with {{")
    return parse_json(text, f"{path}: its header"), mapped[8 + size :]


def _check(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Refuse what the library accepts: odd names, unknown fields, shapes too large for NumPy."""
    if not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
        raise ValueError(
            f"{path}: a tensor's name must be 1 to {LONGEST_NAME} printable characters,"
            f" got {shown(name)}"
        )
    if entry.keys() != FIELDS:
        unknown = shown(min(entry.keys() - FIELDS))
        raise ValueError(f"{path}: {name} has a field {unknown}, which safetensors does not define")
    shape = entry["shape"]
    if len(shape) > MOST_DIMENSIONS or max(shape, default=0) > LARGEST_DIMENSION:
        raise ValueError(
            f"{path}: {name} has an impossible shape, {shown(shape)}; wanted at most"
            f" {MOST_DIMENSIONS} dimensions of at most {LARGEST_DIMENSION:,}"
        )
