"""from_pretrained: a model of any kind, from a directory, a file or the hub."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from gpt2c.gpt2 import GPT2
from gpt2c.kernels.backend import Backend, BackendName, Precision
from gpt2c.llama import Llama
from gpt2c.model.config import ModelConfig

if TYPE_CHECKING:
    from gpt2c.formats.load import Pretrained

__all__ = ["MODELS", "from_pretrained", "open_found"]

# the class of a config -> that of its model
MODELS: dict[type[ModelConfig], type[GPT2] | type[Llama]] = {
    kind.config_class: kind for kind in (GPT2, Llama)
}


def from_pretrained(
    path: str | os.PathLike[str],
    backend: BackendName | Backend = "auto",
    quantize: Literal["int8", "fp16"] | None = None,
    revision: str | None = None,
    threads: int | None = None,
    recompute: Literal["light", "full"] | None = None,
    precision: Precision = "fp32",
    adapter: str | os.PathLike[str] | None = None,
    check_base: bool = True,
) -> GPT2 | Llama:
    """Load a model of any kind; one that was saved quantized stays quantized.

    See `GPT2.from_pretrained` for the arguments and errors.

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory)
    ...     model = gpt2c.from_pretrained(directory)
    >>> model.config == config
    True
    """
    from gpt2c.formats.load import find_model

    found = find_model(path, revision, adapter, check_base)
    return open_found(found, backend, quantize, threads, recompute, precision)


def open_found(
    found: Pretrained,
    backend: str | Backend = "auto",
    quantize: str | None = None,
    threads: int | None = None,
    recompute: str | None = None,
    precision: str = "fp32",
) -> GPT2 | Llama:
    """Load a model that `find_model` has found; see `from_pretrained`."""
    if quantize is None and found.weights != "fp32":
        quantize = found.weights
    door = MODELS[type(found.config)]
    return door.from_found(found, backend, threads, quantize, recompute, precision)
