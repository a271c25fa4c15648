"""Arrays in, arrays out: what an op is, the reference, the C binding, backends, threads, memory.

Knows no model.
"""
