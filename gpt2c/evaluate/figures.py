"""What a loss means: one text's loss in every unit that is in use.

    nats per token   the loss itself: the mean of -log p(token | tokens before it)
    perplexity       its exponential: how many equally likely tokens leave the same doubt
    bits per byte    how far the text could be compressed: comparable across tokenizers

Independent of models and files.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["MEANING", "figures", "written"]

MEANING = (
    "nats/token is the loss: how surprising each token was, 0 if it was certain; perplexity: among"
    " how many equally likely tokens the model had to guess; bits per byte: what the text would"
    " take if it were compressed with the model"
)


class Figures(NamedTuple):
    """The loss of a text, in nats per token, and what follows from it."""

    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float


def written(value: float, decimals: int = 4, most: float = 1e4) -> str:
    """Write a figure; one of a model that has no idea of a text may have hundreds of digits.

    Parameters
    ----------
    decimals : of a figure below `most`; above, that is what its power of ten has
    """
    return f"{value:.{decimals}{'f' if abs(value) < most else 'e'}}"


def figures(nats: float, tokens: int, size: int = 0) -> Figures:
    """Turn the summed loss of a text into figures.

    Parameters
    ----------
    nats : the sum over the tokens that were scored
    tokens : how many they are
    size : bytes of text in them

    Returns
    -------
    perplexity is inf where it is too large for a float; bits_per_byte is nan where there are no
    bytes, as in a text of end-of-text tokens

    Raises
    ------
    ValueError : nothing was scored, or the loss is nan or infinite
    """
    if tokens < 1:
        raise ValueError("no token was scored: a text of at least 2 tokens is needed")
    if not math.isfinite(nats):
        raise ValueError(f"the loss is {nats}: the model's weights have diverged or are damaged")
    loss = nats / tokens + 0.0  # not -0.0
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    bits = nats / math.log(2) + 0.0
    return Figures(loss, perplexity, bits / tokens, bits / size if size else math.nan)
