"""The text that comes with every Python: reference topics and the standard library's docstrings.

With it the main job runs without a network and without a user's files. It is about 2 MB of English
about one subject.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import ast
import importlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

__all__ = ["python_documentation"]

_SKIPPED = {*"__pycache__ dist-packages idlelib lib2to3 site-packages test tests".split()}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_documentation() -> list[str]:
    """Return the documentation of the running Python; the same Python has the same documents.

    Each topic of `pydoc_data.topics` is a document. The docstrings of each standard-library module
    are one more, in the order of the source, which is parsed and never imported. Excerpts of longer
    topics, and docstrings that occurred before, are left out, so that no document held out for
    validation is part of another.

    Raises
    ------
    OSError : this Python has no `pydoc_data`
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise FileNotFoundError(
            "this Python has no pydoc_data, its own documentation; "
            "give a text of your own with --text FILE"
        ) from None
    documents = _without_excerpts([cleandoc(topics[name]) for name in sorted(topics)])
    seen: set[str] = set()
    for path in _sources(Path(sysconfig.get_path("stdlib"))):
        fresh = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
        seen.update(fresh)
        documents.append("\n\n".join(fresh))
    return [document for document in dict.fromkeys(documents) if document]


def _without_excerpts(topics: list[str]) -> list[str]:
    """Drop topics if longer ones contain most of their paragraphs, as "compound" contains "if"."""
    seen: set[str] = set()
    kept = []
    for topic in sorted(topics, key=len, reverse=True):
        paragraphs = topic.split("\n\n")
        if sum(paragraph in seen for paragraph in paragraphs) <= len(paragraphs) / 2:
            kept.append(topic)
        seen.update(paragraphs)
    return kept


def _sources(library: Path) -> Iterator[Path]:
    """Yield the library's Python files, sorted, without tests and installed packages."""
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in these sources are not the user's concern
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a file with a deliberate error
            return
    documented = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    # ast.walk goes level by level; a module has no line of its own and comes first.
    for node in sorted(documented, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text
