"""Rows of the benchmark, and what measures them."""
