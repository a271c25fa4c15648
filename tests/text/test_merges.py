"""Merges: recovered from tokens, and taken from files only as tiktoken would make them."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2c import Tokenizer
from gpt2c.text.merges import _merge_everywhere, check_merges, recover_merges

BYTES = Tokenizer.from_name("bytes")


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="ab", min_size=1, max_size=80), st.integers(257, 290))
def test_merges_are_recovered_from_any_training(text: str, vocab_size: int) -> None:
    """Runs of one letter overlap themselves, which is the hard case."""
    tokenizer = Tokenizer.train([text], vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        assert Tokenizer.from_pretrained(directory)._ranks == tokenizer._ranks


def test_recovering_merges_is_fast_for_long_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a" * 2**15], 300)
    assert math.log2(tokenizer.token_lengths.max()) == 15
    tokenizer.save_pretrained(tmp_path)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12), st.text("abc"))
def test_merges_are_taken_only_as_tiktoken_would_make_them(
    picks: list[tuple[int, int]], text: str
) -> None:
    """tiktoken knows tokens, not merges: only merges that its own algorithm makes are accepted."""
    known, halves = [b"a", b"b", b"c"], {}
    for i, j in picks:
        first, second = known[i % len(known)], known[j % len(known)]
        if first + second not in halves:
            halves[first + second] = first, second
            known.append(first + second)
    ranks = BYTES._ranks | {token: 257 + i for i, token in enumerate(halves)}
    try:
        same = recover_merges(ranks) == [*halves.values()]
    except ValueError:
        same = False
    try:
        check_merges(ranks, [*halves.values()], "merges.txt", "vocab.json")
    except ValueError as error:
        assert "can never apply" in str(error) and not same
    else:
        assert same
        parts = [byte.encode() for byte in text]  # apply the merges, one after the other
        for first, second in halves.values():
            parts = _merge_everywhere(parts, first, second)
        assert [ranks[part] for part in parts] == Tokenizer(ranks, 256).encode(text)
