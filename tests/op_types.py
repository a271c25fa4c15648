"""The types of the public ops, which gpt2c/ops.py declares for mypy and editors.

    python tests/op_types.py    # write the declarations again

The functions themselves are made from the table when the module is imported, and no type checker
runs it.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from gpt2c import ops

FIRST = re.compile(r"^if TYPE_CHECKING:.*\n", re.MULTILINE)


def declaration(name: str) -> str:
    """Return the declaration of a public op: its name, arguments and types."""
    signature = str(inspect.signature(ops.PUBLIC[name]))
    signature = re.sub(r"(: |-> )'(.*?)'", r"\1\2", signature)  # the types are strings
    return f"def {name}{signature}: ..."


def main() -> None:
    """Write the declarations into gpt2c/ops.py."""
    path = Path(ops.__file__)
    before, first, after = re.split(f"({FIRST.pattern})", path.read_text(), flags=re.MULTILINE)
    rest = re.split(r"^(?=\S)", after, maxsplit=1, flags=re.MULTILINE)[1]
    declared = "".join(f"\n    {declaration(name)}\n" for name in ops.PUBLIC)
    path.write_text(f"{before}{first}{declared}\n\n{rest}")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(path)], check=True)


if __name__ == "__main__":
    main()
