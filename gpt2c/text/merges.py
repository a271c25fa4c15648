"""Merges of a byte-pair encoding: the pairs of tokens that become one token, in their order.

tiktoken knows only the tokens and their ids: it joins the pair first that makes the lowest id. So
merges are recovered from the tokens, and the merges of a file are checked against them.
"""

from __future__ import annotations

from itertools import pairwise

__all__ = ["Merge", "check_merges", "recover_merges"]

Merge = tuple[bytes, bytes]


def recover_merges(ranks: dict[bytes, int]) -> list[Merge]:
    """Return all merges of a vocabulary that came without, in the order in which they apply.

    Raises
    ------
    ValueError : no sequence of earlier merges leads to a token
    """
    return [
        _halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    ]


def _halves(token: bytes, ranks: dict[bytes, int]) -> Merge:
    """Return the merge that makes `token`: the two parts that all earlier merges make of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        first, second = min(pairwise(parts), key=lambda pair: ranks.get(pair[0] + pair[1], limit))
        if ranks.get(first + second, limit) >= limit:
            raise ValueError(f"token {limit} ({token!r}) cannot be made from the tokens before it")
        parts = _merge_everywhere(parts, first, second)
    return parts[0], parts[1]


def _merge_everywhere(parts: list[bytes], first: bytes, second: bytes) -> list[bytes]:
    """Join each `first` that is followed by `second`, from left to right."""
    merged = []
    i = 0
    while i < len(parts):
        width = 2 if parts[i : i + 2] == [first, second] else 1
        merged.append(b"".join(parts[i : i + width]))
        i += width
    return merged


def check_merges(ranks: dict[bytes, int], merges: list[Merge], name: str, vocab: str) -> None:
    """Check that the merges make the same ids as tiktoken, which knows only the tokens."""
    made = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) != 1]
    if made != [first + second for first, second in merges]:
        raise ValueError(
            f"{name} does not make the tokens of {vocab} in the order of their ids; take both from"
            " one tokenizer"
        )
    made_at = {token: -1 if len(token) == 1 else token_id for token, token_id in ranks.items()}
    halves = dict(zip(made, merges, strict=True))
    for number, (token, (first, second)) in enumerate(halves.items(), start=1):
        limit = ranks[token]
        if made_at.get(first, limit) >= limit or made_at.get(second, limit) >= limit:
            raise ValueError(f"{name}: merge {number} uses a token that no earlier merge has made")
        if not _comes_to(first, second, limit, made_at, halves):
            raise ValueError(
                f"{name}: merge {number} can never apply: earlier merges join its bytes differently"
            )


def _comes_to(
    first: bytes, second: bytes, limit: int, made_at: dict[bytes, int], halves: dict[bytes, Merge]
) -> bool:
    """Return whether all merges before `limit` turn the bytes of a token into these two parts.

    Undo the merges of both parts, the last one first: at no time may the two tokens at the border
    be an earlier merge. Source: github/rust-gems, bpe, is_valid_token_pair.
    """
    while made_at.get(first + second, limit) >= limit:
        left, right = made_at[first], made_at[second]
        if left > right:
            limit, first = left, halves[first][1]
        elif right >= 0:
            limit, second = right + 1, halves[second][0]  # of two equal merges, the left first
        else:
            return True
    return False
