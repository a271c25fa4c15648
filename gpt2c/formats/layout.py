"""Layout: how the file of a kind of model, in transformers, differs from memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpt2c.files.tensors import AnyTensor, StoredTensor
from gpt2c.model.parameters import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The difference between the tensors of a file and the parameters in memory.

    Attributes
    ----------
    prefix : names in a file may have it or lack it
    buffers : ends of names that are no parameters; they are ignored
    tied : whether lm_head.weight is the embedding's table where config.json does not say it
    table : the name of that table in a file, without prefix
    headless : the architecture of a model that was saved without its head
    read : tensors of a file, names without prefix -> those in memory; it reads no number
    write : parameters in memory -> tensors of a file, as views
    """

    prefix: str
    buffers: tuple[str, ...]
    tied: bool
    table: str
    headless: str
    read: Callable[[Mapping[str, StoredTensor]], dict[str, Tensor]]
    write: Callable[[Mapping[str, AnyTensor]], dict[str, AnyTensor]]
