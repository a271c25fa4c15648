"""Compute with one backend's kernels alone, without gpt2c, which asks the CPU first."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    directory, backend = sys.argv[1:]
    sys.path.insert(0, directory)
    kernels = importlib.import_module(f"_kernels_{backend}")
    print(kernels.lib.fma_burn(1, 1) > 0)
