"""Write the API reference from the docstrings: python tests/docs.py FOLDER; see `make docs`.

pdoc writes the pages. The docstrings have numpydoc's sections, whose lists have entries such as
"name : description"; this file turns them into Markdown. Every warning is an error.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pdoc

WINGS = "files kernels text model formats generate train finetune".split()
DOORS = "gpt2 llama causal_lm pretrained scoring chat".split()
MODULES = ["gpt2c", *(f"gpt2c.{name}" for name in (*DOORS, *WINGS))]


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
    pdoc.docstrings.convert = lambda docstring, *_: markdown(docstring)
    pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
