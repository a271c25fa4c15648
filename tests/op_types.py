"""The types of the public ops, which gpt2c/kernels/op_types.pyi declares for mypy and editors.

    python tests/op_types.py    # write the file again

The functions themselves are made from the table when gpt2c.ops is imported, and no type checker
runs it.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from gpt2c import ops

STUB = Path(ops.__file__).with_name("kernels") / "op_types.pyi"
HEAD = """\
# The types of the functions of gpt2c.ops, for mypy and editors. Generated from the declarations of
# gpt2c.kernels.op by tests/op_types.py: do not edit.

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

"""


def declaration(name: str) -> str:
    """Return the declaration of a public op: its name, arguments and types."""
    signature = str(inspect.signature(ops.PUBLIC[name]))
    signature = re.sub(r"(: |-> )'(.*?)'", r"\1\2", signature)  # the types are strings
    return f"def {name}{signature}: ..."


def main() -> None:
    """Write the declarations."""
    STUB.write_text(HEAD + "".join(f"{declaration(name)}\n" for name in ops.PUBLIC))
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(STUB)], check=True)


if __name__ == "__main__":
    main()
