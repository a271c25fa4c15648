"""A model -> text: sampling, the decoding loop, and an engine for many requests.

Knows nothing about training.
"""

__all__ = [
    "continuation",
    "engine",
    "forks",
    "sampling",
]
