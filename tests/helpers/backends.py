"""Which backends a test asks, where it is not all of them."""

from __future__ import annotations

import pytest

# For what Python decides: all compiled backends are objects of one class, so one stands for all.
TWO_BACKENDS = pytest.mark.parametrize("backend_name", ["numpy", "auto"])
