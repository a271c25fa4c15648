"""Benchmarks: the rows, the measuring, and the reports."""

__all__ = [
    "decoding",
    "engines",
    "machine",
    "peers",
    "ranks",
    "report",
    "suite",
    "worker",
]
