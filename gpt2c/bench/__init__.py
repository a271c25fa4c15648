"""Benchmarks: the rows, the measuring, and the reports."""
