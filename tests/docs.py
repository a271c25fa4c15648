"""Write the API reference from the docstrings: python tests/docs.py FOLDER; see `make docs`.

pdoc writes the pages. The docstrings have numpydoc's sections, whose lists have entries such as
"name : description"; this file turns them into Markdown. Every warning is an error.
"""

from __future__ import annotations

import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc

import gpt2c

LEFT_OUT = {"bench", "cli", "screen"}  # programs, which have no doors in Python
LEFT_OUT |= {*gpt2c.__all__}  # pdoc finds what the package names
NAMES = sorted({module.name for module in pkgutil.iter_modules(gpt2c.__path__)} - LEFT_OUT)
MODULES = ["gpt2c", *(f"gpt2c.{name}" for name in NAMES if not name.startswith("_"))]
HARNESS = {  # module -> what gpt2c.lm_eval imports of it; an empty class will do for its page
    "lm_eval": "utils",
    "lm_eval.api.instance": "Instance",
    "lm_eval.api.model": "TemplateLM",
}


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown: headings, and a bullet for each entry of a list."""
    out: list[str] = []
    lines = re.sub(r"(?m)^::\n\n|:(?=:$)", "", docstring).split("\n")
    in_section = False
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch("-{3,}", line):
            continue
        if line and re.fullmatch("-{3,}", after):
            out += [f"**{line}**", ""]
            in_section = True
        elif in_section and (entry := re.match(r"(\w[\w, *]*) : ", line)):
            out.append(f"* `{entry[1]}`: {line[entry.end() :]}")
        else:
            in_section = in_section and line != ""
            out.append(line)
    return "\n".join(out)


def main(folder: Path) -> None:
    """Write the pages into `folder`."""
    warnings.simplefilter("error")
    # pdoc looks for the source of NamedTuples and TypedDicts in the wrong place.
    warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef")
    warnings.filterwarnings("ignore", "Cannot determine where .* is taken from")
    for module, name in HARNESS.items():
        sys.modules[module] = ModuleType(module)
        setattr(sys.modules[module], name, type(name, (), {}))
    pdoc.docstrings.convert = lambda docstring, *_: markdown(docstring)
    pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
