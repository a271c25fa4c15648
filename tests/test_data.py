"""Token files, hold-out, batches and Python's documentation: nothing lost, nothing seen twice."""

import errno
import os
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2c import corpus, files
from gpt2c.corpus import python_documentation
from gpt2c.data import (
    Batches,
    prepare,
    read_text,
    split_documents,
    split_validation,
    windows,
)
from gpt2c.tokenfile import find_shards, read_shards, read_tokens, write_tokens
from gpt2c.tokenizer import Tokenizer

BYTES = Tokenizer.from_name("bytes")


def make_documents(count=40):
    return [f"Document {n}.\n" + f"line {n} of it\n" * (1 + 7 * n % 11) for n in range(count)]


# --- texts -----------------------------------------------------------------------------------


def test_read_text_keeps_the_text_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\nb\n".encode())
    assert read_text(path) == "é\r\nb\n"


def test_read_text_errors(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"a\.txt does not exist"):
        read_text(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        read_text(path)
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 3 is 0xe9"):
        read_text(path)
    with pytest.raises(OSError, match=r"/dev/zero is a device"):
        read_text("/dev/zero")


def test_a_text_may_come_through_a_pipe():
    read, write = os.pipe()  # as of a shell's <(zcat book.gz)
    os.write(write, b"abc")
    os.close(write)
    assert read_text(f"/dev/fd/{read}") == "abc"
    os.close(read)


def test_split_documents():
    assert split_documents("<|endoftext|>a\n<|endoftext|> \n<|endoftext|>b") == ["a\n", "b"]
    assert split_documents("no marker") == ["no marker"]
    assert split_documents(" \n") == []


# --- hold-out --------------------------------------------------------------------------------


def test_whole_documents_are_held_out():
    documents = make_documents()
    train, val = split_validation(documents, 0.1, seed=1)
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    share = sum(map(len, val)) / sum(map(len, documents))
    assert 0.05 <= share <= 0.1


def test_hold_out_is_given_by_the_seed():
    documents = make_documents()
    assert split_validation(documents, 0.1, seed=1) == split_validation(documents, 0.1, seed=1)
    assert split_validation(documents, 0.1, seed=1) != split_validation(documents, 0.1, seed=2)


def test_copies_of_a_document_stay_together():
    documents = make_documents(30) * 3
    train, val = split_validation(documents, 0.2, seed=3)
    assert not set(train) & set(val)
    assert len(train) + len(val) == len(documents)


def test_the_tail_of_a_single_document_is_held_out_at_a_line_break():
    text = "".join(f"line {n}\n" for n in range(100))
    (head,), (tail,) = split_validation([text], 0.1, seed=1)
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.1 <= len(tail) / len(text) < 0.12


def test_the_tail_without_line_breaks_near_is_cut_anywhere():
    text = "a\n" + "b" * 998
    (head,), (tail,) = split_validation([text], 0.1, seed=1)
    assert (len(head), len(tail)) == (900, 100)


def test_few_large_documents_lose_a_tail_not_a_document():
    documents = ["a\n" * 500, "b\n" * 600, "c\n"]
    train, val = split_validation(documents, 0.1, seed=1)
    assert len(train) == 3
    assert train[1] + val[0] == documents[1]


@given(
    st.lists(st.text(alphabet="ab \n", max_size=30), max_size=8),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_a_split_loses_nothing(documents, fraction, seed):
    try:
        train, val = split_validation(documents, fraction, seed)
    except ValueError:
        return
    assert train
    assert val
    if len(train) + len(val) == len(documents):
        assert sorted(train + val) == sorted(documents)
        assert not set(train) & set(val)
    else:
        assert sum(before != after for before, after in zip(documents, train, strict=True)) >= 1
        assert any(head + val[0] in documents for head in train)


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        ([], 0.1, "no text"),
        (["", " \n"], 0.1, "no text"),
        (["a"], 0.1, "too short"),
        (["text"], 0.0, "between 0 and 1, not 0.0"),
        (["text"], 1.0, "between 0 and 1, not 1.0"),
        (["text"], float("nan"), "between 0 and 1, not nan"),
    ],
)
def test_nothing_to_hold_out(documents, fraction, message):
    with pytest.raises(ValueError, match=message):
        split_validation(documents, fraction, seed=1)


# --- prepare ---------------------------------------------------------------------------------


def test_prepare_writes_what_the_documents_say(tmp_path):
    documents = [*make_documents(), "é😀 <|endoftext|> in a text"]
    out = tmp_path / "data"
    prepared = prepare(documents, out, "bytes", val_fraction=0.2, seed=1)
    expected = split_validation(documents, 0.2, seed=1)
    assert sorted(path.name for path in out.iterdir()) == [
        "merges.txt",
        "tokenizer_config.json",
        "train.bin",
        "val.bin",
        "vocab.json",
    ]
    tokenizer = Tokenizer.from_pretrained(out)
    for name, texts in zip(("train", "val"), expected, strict=True):
        tokens = read_tokens(out / f"{name}.bin", tokenizer.vocab_size)
        starts = np.flatnonzero(tokens == tokenizer.eot)
        parts = np.split(tokens, starts)[1:]  # before the first end of text there is nothing
        assert starts[0] == 0
        assert [tokenizer.decode(part[1:]) for part in parts] == texts
        assert getattr(prepared, f"{name}_tokens") == len(tokens)
        assert getattr(prepared, f"{name}_bytes") == sum(len(text.encode()) for text in texts)
        assert tokenizer.token_lengths[tokens].sum() == getattr(prepared, f"{name}_bytes")
    assert (prepared.documents, prepared.vocab_size) == (41, 257)
    assert not prepared.tail_held_out


def test_prepare_says_when_it_held_out_a_tail(tmp_path):
    assert prepare(["a line\n" * 50], tmp_path / "data", BYTES).tail_held_out


def test_prepare_in_shards_loses_no_token(tmp_path):
    whole = prepare(make_documents(), tmp_path / "one", "bytes")
    prepared = prepare(make_documents(), tmp_path / "many", "bytes", shard_tokens=500)
    assert prepared == whole
    names = [path.name for path in find_shards(tmp_path / "many", "train")]
    assert names == [f"train_{n:06d}.bin" for n in range(1, len(names) + 1)] and len(names) > 2
    shards = read_shards(tmp_path / "many", "train", 257)
    assert {len(shard) for shard in shards[:-1]} == {500} and 0 < len(shards[-1]) <= 500
    np.testing.assert_array_equal(
        np.concatenate(shards), read_tokens(tmp_path / "one" / "train.bin")
    )
    for name in ("val.bin", "vocab.json"):
        one, many = ((tmp_path / kind / name).read_bytes() for kind in ("one", "many"))
        assert one == many


def test_prepare_leaves_no_shard_of_another_preparation(tmp_path):
    prepare(make_documents(), tmp_path, "bytes", shard_tokens=500)
    write_tokens(tmp_path / "old_val_000000.bin", [1])
    prepare(make_documents(), tmp_path, "bytes", overwrite=True)
    assert [path.name for path in find_shards(tmp_path, "train")] == ["train.bin"]
    assert [path.name for path in find_shards(tmp_path, "val")] == ["val.bin"]
    with pytest.raises(ValueError, match="shard_tokens must be at least 1, or 0"):
        prepare(make_documents(), tmp_path / "new", "bytes", shard_tokens=-1)
    assert not (tmp_path / "new").exists()


def test_prepare_is_deterministic(tmp_path):
    for name in "ab":
        prepare(make_documents(), tmp_path / name, "bpe:300", seed=7)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_bpe_is_trained_on_training_documents_only(tmp_path):
    documents = make_documents()
    train, _ = split_validation(documents, 0.1, seed=1)
    prepare(documents, tmp_path, "bpe:300", seed=1)
    trained = Tokenizer.from_pretrained(tmp_path)
    assert trained._ranks == Tokenizer.train(train, 300)._ranks
    assert trained._ranks != Tokenizer.train(documents, 300)._ranks


def test_prepare_takes_a_directory_as_tokenizer(tmp_path):
    Tokenizer.train(["some text"], 260).save_pretrained(tmp_path / "tokenizer")
    prepared = prepare(make_documents(), tmp_path / "data", str(tmp_path / "tokenizer"))
    assert prepared.vocab_size == 260


@pytest.mark.parametrize(
    "spec", ["bpe:", "bpe:many", "bpe:-1", "bpe:²", "bpe:70000", "bpe:100", "x"]
)
def test_prepare_refuses_a_bad_tokenizer_before_it_writes(tmp_path, spec):
    with pytest.raises(ValueError, match=r"tokenizer 'bpe:|at least 257|neither a directory"):
        prepare(make_documents(), tmp_path / "data", spec)
    assert not list(tmp_path.iterdir())


def test_prepare_refuses_a_vocabulary_that_uint16_cannot_hold(tmp_path):
    class Large:
        vocab_size = 65537

    with pytest.raises(ValueError, match="65537 tokens; token files hold at most 65536"):
        prepare(make_documents(), tmp_path / "data", Large())
    assert not list(tmp_path.iterdir())


def test_prepare_overwrites_only_when_told(tmp_path):
    prepare(make_documents(), tmp_path, "bytes")
    before = (tmp_path / "train.bin").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(make_documents(50), tmp_path, "bytes")
    assert (tmp_path / "train.bin").read_bytes() == before
    prepare(make_documents(50), tmp_path, "bytes", overwrite=True)
    assert (tmp_path / "train.bin").read_bytes() != before


def test_a_failed_overwrite_leaves_no_training_file_of_another_tokenizer(tmp_path, monkeypatch):
    prepare(make_documents(), tmp_path, "bytes")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        prepare(make_documents(), tmp_path, "bpe:300", overwrite=True)
    assert not (tmp_path / "train.bin").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


# --- batches ---------------------------------------------------------------------------------


def test_batches_are_shifted_by_one(tmp_path):
    write_tokens(tmp_path / "a.bin", np.arange(1000))
    x, y = Batches([read_tokens(tmp_path / "a.bin")], batch_size=3, block_size=8, seed=1).batch(5)
    assert x.shape == y.shape == (3, 8)
    assert x.dtype == y.dtype == np.int32
    assert type(x) is type(y) is np.ndarray
    assert x.flags.c_contiguous and y.flags.c_contiguous
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


@given(N=st.integers(1, 200), B=st.integers(1, 4), T=st.integers(1, 9), seed=st.integers(0, 2**63))
def test_an_epoch_visits_each_token_once(N, B, T, seed):
    tokens = np.arange(N, dtype=np.uint16)
    if N < B * T + 1:
        with pytest.raises(ValueError, match=f"^{N} tokens are too few .* needs {B * T + 1}"):
            Batches([tokens], B, T, seed)
        return
    batches = Batches([tokens], B, T, seed)
    per_epoch = batches.windows_per_epoch
    rows = np.concatenate([batches.batch(step)[0] for step in range(3 * per_epoch // B + 1)])
    for epoch in range(3):
        seen = np.sort(rows[epoch * per_epoch : (epoch + 1) * per_epoch].ravel())
        np.testing.assert_array_equal(seen, np.arange(seen[0], seen[0] + per_epoch * T))
        assert seen[0] < T
    assert N - per_epoch * T <= 2 * T  # hardly anything is left out


def test_epochs_differ_in_order_and_offset():
    batches = Batches([np.arange(1000, dtype=np.uint16)], batch_size=1, block_size=16, seed=3)
    starts = np.array(
        [batches.batch(step)[0][0, 0] for step in range(20 * batches.windows_per_epoch)]
    ).reshape(20, -1)
    assert len(set(map(tuple, starts.tolist()))) == 20
    assert len(set((starts % 16)[:, 0].tolist())) > 5


def test_a_batch_depends_on_seed_and_step_only():
    tokens = np.arange(500, dtype=np.uint16)
    forward = Batches([tokens], 4, 10, seed=1)
    expected = [forward.batch(step)[0] for step in range(60)]
    backward = Batches([tokens], 4, 10, seed=1)
    for step in reversed(range(60)):
        np.testing.assert_array_equal(backward.batch(step)[0], expected[step])
    other = Batches([tokens], 4, 10, seed=2)
    assert any((other.batch(step)[0] != expected[step]).any() for step in range(3))


@pytest.mark.parametrize(
    ("N", "B", "T", "seed", "checksum"),
    [
        (1000, 3, 8, 1, 3518575241),
        (25, 3, 8, 5, 650623262),
        (41, 5, 8, 2**63, 3181805142),
        (5000, 4, 64, 1337, 608227338),
    ],
)
def test_one_shard_gives_what_it_gave_before_there_were_shards(N, B, T, seed, checksum):
    tokens = (np.arange(N) * 7919 % 65521).astype(np.uint16)
    batches = Batches([tokens], B, T, seed)
    content = b"".join(batches.batch(step)[0].tobytes() for step in range(40))
    assert zlib.crc32(content) == checksum


@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=5),
    B=st.integers(1, 4),
    T=st.integers(1, 9),
    seed=st.integers(0, 2**63),
)
def test_an_epoch_is_one_permutation_of_the_windows_of_all_shards(lengths, B, T, seed):
    # Shard n holds 1000 n, 1000 n + 1, ..., so a token tells where it stood.
    shards = [np.arange(1000 * n, 1000 * n + N, dtype=np.uint16) for n, N in enumerate(lengths)]
    if sum((N - 1) // T for N in lengths) < B:
        with pytest.raises(ValueError, match=f"{sum(lengths)} tokens.*too few"):
            Batches(shards, B, T, seed)
        return
    batches = Batches(shards, B, T, seed)
    per_epoch = batches.windows_per_epoch
    pairs = [batches.batch(step) for step in range(2 * per_epoch // B + 1)]
    x, y = (np.concatenate([pair[i] for pair in pairs])[: 2 * per_epoch] for i in (0, 1))
    np.testing.assert_array_equal(x // 1000 * np.ones_like(x), np.repeat(x[:, :1] // 1000, T, 1))
    np.testing.assert_array_equal(y, x + 1)  # within one shard, targets too
    for epoch in (x[:per_epoch], x[per_epoch:]):
        for n, N in enumerate(lengths):
            seen = np.sort(epoch[epoch[:, 0] // 1000 == n].ravel())
            if len(seen):
                np.testing.assert_array_equal(seen, np.arange(seen[0], seen[0] + len(seen)))
            assert N - len(seen) <= 2 * T  # hardly anything of a shard is left out
    again = Batches(shards, B, T, seed)
    for step in (len(pairs) - 1, 0):
        np.testing.assert_array_equal(again.batch(step)[0], pairs[step][0])


def test_an_epoch_mixes_shards():
    shards = [np.arange(1000 * n, 1000 * n + 400, dtype=np.uint16) for n in range(3)]
    x, _ = Batches(shards, batch_size=12, block_size=8, seed=1).batch(0)
    assert set((x[:, 0] // 1000).tolist()) == {0, 1, 2}


def test_the_order_is_the_same_on_every_machine_and_version():
    x, _ = Batches([np.arange(100, dtype=np.uint16)], batch_size=6, block_size=8, seed=1337).batch(
        0
    )
    assert x[:, 0].tolist() == [83, 43, 11, 51, 59, 67]


@given(N=st.integers(0, 100), B=st.integers(1, 4), T=st.integers(1, 9))
def test_windows_cover_each_target_once(N, B, T):
    tokens = np.arange(100, 100 + N, dtype=np.uint16)
    if N < 2:
        with pytest.raises(ValueError, match=f"{N} tokens are too few"):
            windows([tokens], B, T)
        return
    batches = list(windows([tokens], B, T))
    assert all(
        array.shape == (B, T) and array.dtype == np.int32 for pair in batches for array in pair
    )
    x, y = (np.concatenate([pair[i].ravel() for pair in batches]) for i in (0, 1))
    np.testing.assert_array_equal(y[: N - 1], tokens[1:])
    np.testing.assert_array_equal(x[: N - 1], tokens[:-1])
    assert (y[N - 1 :] == -1).all()
    assert (x[N - 1 :] == 0).all()
    assert len(y) - (N - 1) < B * T


def test_windows_lie_within_one_shard():
    shards = [np.array(ids, np.uint16) for ids in ([1, 2, 3, 4, 5, 6], [9], [11, 12])]
    (x, y), (x2, y2) = windows(shards, 2, 3)
    assert x.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert y.tolist() == [[2, 3, 4], [5, 6, -1]]
    assert x2.tolist() == [[11, 0, 0], [0, 0, 0]]
    assert y2.tolist() == [[12, -1, -1], [-1, -1, -1]]
    with pytest.raises(ValueError, match="2 tokens are too few"):
        windows(shards[1:2] * 2, 2, 3)


# --- Python's documentation ------------------------------------------------------------------


@pytest.mark.slow
def test_python_documentation():
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


def test_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(OSError, match=r"no pydoc_data.*--text FILE"):
        python_documentation()


@pytest.mark.parametrize(("count", "T", "overlap"), [(2, 4, 0), (9, 4, 2), (10, 4, 3), (50, 8, 4)])
def test_overlapping_windows_score_every_token_once(count: int, T: int, overlap: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    scored = []
    for x, y in windows([tokens], 3, T, overlap):
        rows, columns = np.nonzero(y >= 0)
        assert np.array_equal(x[rows, columns] + 1, y[rows, columns])  # the token before its target
        assert all(
            column >= overlap or x[row, 0] == 0 for row, column in zip(rows, columns, strict=True)
        )
        scored += y[rows, columns].tolist()
    assert scored == list(range(1, count))


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_an_overlap_leaves_room_for_targets(overlap: int) -> None:
    with pytest.raises(ValueError, match=r"overlap must be in \[0, block_size = 4\)"):
        windows([np.arange(9, dtype=np.uint16)], 1, 4, overlap)
