"""Bytes on disk: whole or absent, untrusted input, safetensors, the hub.

Knows no text and no model.
"""

__all__ = [
    "atomic",
    "hub",
    "hub_client",
    "names",
    "tensors",
    "untrusted",
]
