"""Files written byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes) -> None:
    """Write a safetensors file by hand: length, header, bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
