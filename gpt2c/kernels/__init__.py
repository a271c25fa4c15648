"""Arrays in, arrays out: ops, their reference, the C binding, backends, threads and memory.

Knows no model.
"""

__all__ = [
    "backend",
    "binding",
    "busy",
    "cases",
    "checks",
    "limits",
    "memory",
    "op",
    "reference",
    "threads",
]
