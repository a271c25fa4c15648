"""One safetensors file: its tensors mapped or as float32, and written so that equal is equal.

Knows nothing about models, only the format: an 8-byte little-endian length, a JSON header of that
length, then the tensors' bytes. Used by checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt2c.files import parse_json

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "U8": "|u1"}

Tensors = dict[str, NDArray[np.float32]]


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: dict[str, str]
) -> None:
    """Write tensors in their own dtypes.

    Raises
    ------
    OSError : the file cannot be written
    """
    # safetensors puts a file of its own in place, readable by its owner only whatever the umask is.
    path.touch()
    mode = path.stat().st_mode
    # It also writes memory as it lies, so an array that is not contiguous would come out scrambled.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Make equal weights equal files: safetensors writes the metadata in an order of chance."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # it always is: safetensors writes no spaces but the padding
            file.seek(8)
            file.write(text.ljust(size))


def read_metadata(path: Path) -> dict[str, str]:
    """Read the strings that the header holds beside the tensors."""
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def map_tensors(
    path: Path, ignored: tuple[str, ...] = ()
) -> tuple[dict[str, tuple[str, NDArray[Any]]], dict[str, str]]:
    """Map a safetensors file: name -> (dtype in the file, read-only array), and its metadata.

    Names that end with one of `ignored` are left out.

    The library checks the file, its sizes and offsets; it would copy every tensor, and NumPy lacks
    its BF16, which comes as uint16.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist (weights are read from safetensors, never from pickles)"
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    except MemoryError as error:
        size = path.stat().st_size
        raise MemoryError(f"{path} cannot be mapped, {size:,} bytes: {error}") from error
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = parse_json(mapped[8:start].tobytes(), f"{path}: its header")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if name.endswith(ignored):
            continue
        dtype = entry["dtype"]
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype}; wanted one of {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        data = mapped[start + begin : start + end].view(DTYPES[dtype])
        try:
            tensors[name] = dtype, data.reshape(entry["shape"])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {name} has a shape that cannot be: {error}") from None
    return tensors, metadata


def read_tensors(path: Path, ignored: tuple[str, ...] = ()) -> tuple[Tensors, dict[str, str]]:
    """Read a safetensors file as float32; what is float32 there stays mapped."""
    stored, metadata = map_tensors(path, ignored)
    tensors: Tensors = {}
    for name, (dtype, tensor) in stored.items():
        if dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {dtype}; wanted one of {', '.join(FLOAT_DTYPES)}"
            )
        if dtype == "BF16":  # the upper half of a float32
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        try:
            with np.errstate(over="raise"):
                tensors[name] = tensor.astype(np.float32, copy=False)
        except FloatingPointError as error:
            raise ValueError(f"{path}: {name} holds numbers beyond the range of float32") from error
    return tensors, metadata
