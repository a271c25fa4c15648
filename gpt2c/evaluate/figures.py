"""The loss of a text in every common unit.

    nats per token   the loss itself: the mean of -log p(token | tokens before it)
    perplexity       its exponential: the number of equally likely tokens with the same loss
    bits per byte    the size of the text compressed with the model: comparable across tokenizers

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
    """The loss of a text, in nats per token, and the figures derived from it."""

    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float


def written(value: float, decimals: int = 4, most: float = 1e4) -> str:
    """Return a figure as text, from `most` on with an exponent: it may have hundreds of digits.

    Parameters
    ----------
    decimals : digits after the point, with an exponent too
    """
    return f"{value:.{decimals}{'f' if abs(value) < most else 'e'}}"


def figures(nats: float, tokens: int, size: int = 0) -> Figures:
    """Return the figures of a text, from its summed loss.

    Parameters
    ----------
    nats : the sum over the tokens that were scored
    tokens : the number of those tokens
    size : the bytes of text in them

    Returns
    -------
    perplexity is inf if it is too large for a float; bits_per_byte is nan if there are no bytes, as
    in a text of end-of-text tokens

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
