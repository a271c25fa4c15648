"""Splits: how tokenizers cut a text into pieces before any merge; no token crosses a cut.

tiktoken needs one regular expression. tokenizer.json describes the same cuts by steps. The names
are llama.cpp's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["BYTE_LEVEL", "DIGITS", "GPT2", "LLAMA3", "QWEN2", "REGEXES", "Split"]


class Split(NamedTuple):
    """A way to cut texts.

    Attributes
    ----------
    name : llama.cpp's name, tokenizer.ggml.pre in its files
    pattern : what tiktoken cuts out, from left to right
    steps : the pre_tokenizer of tokenizer.json
    keeps_line_ends : whether line ends belong to the punctuation before them; in the other splits
        no piece has whitespace behind another character
    """

    name: str
    pattern: str
    steps: dict[str, Any]
    keeps_line_ends: bool = False


BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def _steps(first: dict[str, Any], use_regex: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, BYTE_LEVEL | {"use_regex": use_regex}]}


def _by_regex(name: str, digits: str) -> Split:
    """Return a split that is one regular expression; `digits` is the part that cuts numbers."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = f"{words}|{digits}|{rest}"
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return Split(name, pattern, _steps(step, False), keeps_line_ends=True)


# openai/gpt-2:src/encoder.py: contractions, words, numbers, the rest, spaces.
GPT2 = Split(
    "gpt-2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    BYTE_LEVEL,
)
# SmolLM2 and StarCoder: each digit is a piece, and GPT-2's pattern cuts the texts between digits.
# Spaces before a digit stay together, as at the end of a text. The library tokenizers counts 13
# digits of Unicode 17, U+11DE0 to U+16FF6, that the tables of tiktoken's \p{N} lack; all other
# characters are cut alike.
DIGITS = Split(
    "smollm",
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    _steps({"type": "Digits", "individual_digits": True}, True),
)
# Llama 3 and tiktoken's cl100k_base; Qwen2.
LLAMA3 = _by_regex("llama-bpe", r"\p{N}{1,3}")
QWEN2 = _by_regex("qwen2", r"\p{N}")
# The regular expressions that the step Split of tokenizer.json may have.
REGEXES = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    LLAMA3.pattern: LLAMA3,
    QWEN2.pattern: QWEN2,
}
