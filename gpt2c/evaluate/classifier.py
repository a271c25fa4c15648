"""Classifier: labels and probabilities of texts, by a model with num_labels and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpt2c.formats.load import find_model
from gpt2c.kernels.backend import Backend, BackendName
from gpt2c.model.config import ModelConfig
from gpt2c.model.model import Model
from gpt2c.parallel.world import ALONE, World
from gpt2c.pretrained import open_found
from gpt2c.text.ragged import parts
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Classifier", "encode", "scores", "softmax"]


class Classifier:
    """Labels texts.

    Parameters
    ----------
    model : with num_labels of at least 2
    tokenizer : its tokenizer

    Attributes
    ----------
    labels : the K names, in the order of the scores

    Raises
    ------
    ValueError : the model has no labels, or lacks tokens of the tokenizer

    Examples
    --------
    >>> config = gpt2c.GPT2Config(
    ...     *(257, 16, 32, 1, 2), num_labels=2, id2label=("ham", "spam"), eos_token_id=256
    ... )
    >>> classifier = gpt2c.Classifier(gpt2c.GPT2(config), gpt2c.Tokenizer.from_name("bytes"))
    >>> classifier.probabilities(["win money", "see you"]).shape
    (2, 2)
    """

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.labels = model.config.label_names
        if len(self.labels) < 2:
            has = "logits of tokens" if not self.labels else "one score, as a reward model has"
            raise ValueError(f"a classifier has at least 2 labels, and this model has {has}")
        tokenizer.unused_ids(model.config.vocab_size)  # refuses another model's

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backend: BackendName | Backend = "auto",
        quantize: Literal["int8", "fp16"] | None = None,
        threads: int | None = None,
    ) -> Classifier:
        """Load a model and its tokenizer; see `gpt2c.from_pretrained` for arguments and errors.

        Examples
        --------
        >>> import tempfile
        >>> config = gpt2c.GPT2Config(257, 16, 32, 1, 2, num_labels=2, id2label=("ham", "spam"))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     gpt2c.GPT2(config).save_pretrained(directory)
        ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory)
        ...     classifier = gpt2c.Classifier.from_pretrained(directory)
        >>> classifier.labels
        ('ham', 'spam')
        """
        found = find_model(path)
        tokenizer = Tokenizer.from_pretrained(found.path)
        return cls(open_found(found, backend, quantize, threads), tokenizer)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Return the likeliest label of each text; see `probabilities` for errors.

        Examples
        --------
        >>> config = gpt2c.GPT2Config(257, 16, 32, 1, 2, num_labels=2, id2label=("ham", "spam"))
        >>> model = gpt2c.GPT2(config, seed=None)  # all weights are 0, so both labels are as likely
        >>> classifier = gpt2c.Classifier(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> classifier.predict(["win money", "see you"])
        ['ham', 'ham']
        """
        return [self.labels[k] for k in self.probabilities(texts).argmax(1)]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability of each label, (n, K).

        A text longer than the context is cut: its beginning counts.

        Raises
        ------
        ValueError : a text has no tokens
        MemoryError : the activations do not fit

        Examples
        --------
        >>> config = gpt2c.GPT2Config(257, 16, 32, 1, 2, num_labels=2, id2label=("ham", "spam"))
        >>> model = gpt2c.GPT2(config, seed=None)  # all weights are 0, so both labels are as likely
        >>> classifier = gpt2c.Classifier(model, gpt2c.Tokenizer.from_name("bytes"))
        >>> classifier.probabilities(["win money"])
        array([[0.5, 0.5]])
        """
        config, rows = self.model.config, []
        for number, text in enumerate(texts, 1):
            row = encode(text, self.tokenizer, config)
            if len(row) < 2:
                raise ValueError(f"text {number} of {len(texts)} is empty, so it has no label")
            rows.append(row[: config.n_positions])
        return softmax(scores(self.model, rows))


def scores(
    model: Model,
    rows: Sequence[Sequence[int]],
    batch_tokens: int = 4096,
    check: Callable[[], None] | None = None,
    world: World = ALONE,
) -> NDArray[np.float32]:
    """Return the scores (n, K) of texts of token ids.

    Parameters
    ----------
    rows : the ids of each text
    batch_tokens : the most tokens that are read at once; it changes memory alone
    check : called before each batch
    world : its ranks take turns with the batches
    """
    found = np.empty((len(rows), model.config.num_labels or 0), np.float32)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # batches of similar lengths
    own: list[int] = []
    for part in world.turns(parts([len(rows[n]) for n in order], batch_tokens), check):
        found[order[part]] = model.scores([rows[n] for n in order[part]], keep=False)
        own += order[part]
    found[world.rows(np.array(own, np.int64))] = world.rows(found[own])
    return found


def encode(text: str, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Return a text's token ids as a classifier reads it: what starts a text, and its tokens.

    No end follows, because transformers reads the scores at the last token that is no pad, and the
    end may be the pad. An empty text is one token.
    """
    start = config.start_token_id
    return [tokenizer.eot if start is None else start, *tokenizer.encode(text)]


def softmax(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return probabilities (n, K) in float64."""
    e = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    p: NDArray[np.float64] = e / e.sum(1, keepdims=True)
    return p
