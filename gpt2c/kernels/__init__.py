"""Arrays in, arrays out: ops, their reference, the C binding, backends, threads and memory.

Knows no model.
"""
