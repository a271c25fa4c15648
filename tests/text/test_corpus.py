"""Python's documentation as a text: what it includes, and what it leaves out."""

import sys

import pytest

from gpt2c.text import corpus
from gpt2c.text.corpus import python_documentation


@pytest.mark.slow
def test_corpus_holds_the_python_documentation():
    documents = python_documentation()
    size = sum(len(document.encode()) for document in documents)
    assert len(documents) > 300
    assert size > 1_000_000
    assert all(document.strip() for document in documents)
    assert len(set(documents)) == len(documents)
    assert documents == python_documentation()


def test_excerpts_of_topics_are_dropped():
    long = (
        "Statements\n***\n\nThe if statement.\n\nIt has else.\n\nIt has elif.\n\nThe for statement."
    )
    short = 'The "if" statement\n***\n\nIt has else.\n\nIt has elif.'
    assert corpus._without_excerpts([short, long, "Other"]) == [long, "Other"]


def test_sources_leave_tests_and_packages_out(tmp_path):
    for name in ("b.py", "a.py", "test/c.py", "json/tests/d.py", "site-packages/e.py", "json/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    found = [path.relative_to(tmp_path).as_posix() for path in corpus._sources(tmp_path)]
    assert found == ["a.py", "b.py", "json/f.py"]


def test_docstrings_come_in_the_order_of_the_source(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n    """Method.\n\n'
        '       More.\n    """\nif True:\n  async def g():\n    r"""Function."""\nx = "\\d"\n',
        encoding="utf-8",
    )
    assert list(corpus._docstrings(path)) == ["Module.", "Class.", "Method.\n\nMore.", "Function."]


@pytest.mark.parametrize("source", [b"def f(:\n", b"x = '\xff'\n", b"\0"])
def test_sources_that_do_not_parse_are_skipped(tmp_path, source):
    (tmp_path / "a.py").write_bytes(source)
    assert list(corpus._docstrings(tmp_path / "a.py")) == []


def test_error_reports_a_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(OSError, match=r"no pydoc_data.*--text FILE"):
        python_documentation()
