"""GPT2: the model that this package is named after; and QuantizedGPT2, an old name."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Literal, Self

from gpt2c.causal_lm import CausalLM
from gpt2c.kernels.backend import Backend, BackendName, Precision
from gpt2c.kernels.checks import check_kind
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.quantized import Weights

if TYPE_CHECKING:
    from gpt2c.formats.load import Pretrained

__all__ = ["GPT2", "QuantizedGPT2"]


class GPT2(CausalLM):
    """A GPT-2 that can be trained and continues texts; a call of it returns the logits.

    Parameters
    ----------
    config : its shape
    seed : of the initial weights; None leaves them 0, for the caller to fill
    backend : a name of `gpt2c.backends()`, "auto", or a backend
    threads : the number of threads, with a backend's name; None is GPT2C_NUM_THREADS, else
        OMP_NUM_THREADS, else all usable cores, see `gpt2c info`
    recompute : the arrays that backward computes again instead of keeping them: None for none,
        "light" for the outputs of layernorm and GELU, "full" for all but the residual stream
        between layers (Chen et al. 2016, arXiv:1604.06174). The results are bit for bit the same
    weights : "fp32", or "fp16" or "int8" for a model that is only read: see `quantize`
    precision : of the products of matrices. "bf16" rounds their factors to 16 bits (bfloat16) and
        adds in float32; weights, their moments, the residual stream, norms, softmax and loss stay
        float32, and so does attention in a step of decoding. What backward needs and only products
        read is kept in 16 bits, and GELU's output is computed again: 1.3 GB in place of 2.5 for 4 x
        1024 tokens of GPT-2 124M. "fp16" rounds to half precision, scaled row by row, adds up to 64
        products in half precision and multiplies in float32 in attention and for up to 16 rows; all
        is kept in float32. Both are slow on a backend without instructions for them: fp16's are
        those of avx512fp16. "auto" takes what this CPU computes fastest

    Attributes
    ----------
    parameters, gradients : name -> float32 view into `flat_parameters`, `flat_gradients`; names of
        `GPT2Config.parameter_shapes`, in its order until some are frozen, which then come last and
        have no gradients. Each backward adds to the gradients until `zero_grad`; their memory is
        allocated at the first use. With fp16 weights the wte and Linear weights are float16. With
        int8 such a weight, "x.weight", is uint8, an integer plus 128, and "x.scale" holds a float32
        factor for each of its rows; `flat_parameters` is uint8, the bytes of all
    weights : their type; only fp32 weights are trained
    trained : the names of the parameters that are trained, all that are not frozen
    trained_size : the number of floats of these, at the start of both flat buffers
    decay_size : the number of floats of those among them that AdamW decays, which come first

    Raises
    ------
    ValueError : an unknown backend, recompute, type of weights or precision, a seed or threads out
        of range, int8 with more than 65536 channels
    MemoryError : the parameters do not fit, or later the gradients

    `copy.copy` and `copy.deepcopy` return an independent model with the same parameters and
    gradients; `pickle` takes one to another process. A copy has no loss that waits for backward. If
    its backend is not available, an unpickled model computes on "auto", with a warning.

    One thread computes at a time: in a second one loss, backward and logits raise RuntimeError.
    AdamW has no such guard: do not step in one thread while another computes.

    Source: Radford et al. 2019; openai/gpt-2 for formulae, karpathy/llm.c for the memory.

    Examples
    --------
    Learn one text by heart; the targets are the tokens that follow:

    >>> tokenizer = gpt2c.Tokenizer.from_name("bytes")
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1)
    >>> optimizer = gpt2c.AdamW(model, learning_rate=0.01)
    >>> ids = tokenizer.encode("hello world")
    >>> for step in range(50):
    ...     model.zero_grad()
    ...     loss = model.loss([ids[:-1]], [ids[1:]])
    ...     model.backward()
    ...     norm = optimizer.step()
    >>> loss < 0.1
    True
    >>> tokenizer.decode(model.generate([ids[:4]], max_new_tokens=7, temperature=0)[0])
    'hello world'
    >>> model([ids]).shape  # the logits
    (1, 11, 257)
    """

    config: GPT2Config
    config_class = GPT2Config

    def __init__(
        self,
        config: GPT2Config,
        seed: int | None = 1337,
        backend: BackendName | Backend = "auto",
        recompute: Literal["light", "full"] | None = None,
        threads: int | None = None,
        weights: Weights = "fp32",
        precision: Precision = "fp32",
    ) -> None:
        check_kind("config", config, GPT2Config, "a GPT2Config")
        super().__init__(config, seed, backend, recompute, threads, weights, precision)


class QuantizedGPT2(GPT2):
    """The old name of a `GPT2` with int8 or fp16 weights; each use of it warns.

    Write `gpt2c.from_pretrained(path, quantize="int8")` for a model in a file,
    `model.quantize("int8")` for one in memory, and `model.weights` for its `method`.

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1).quantize("int8")  # no longer QuantizedGPT2.from_model
    >>> model.weights
    'int8'
    """

    def __init__(
        self,
        config: GPT2Config,
        method: Literal["int8", "fp16"],
        backend: BackendName | Backend = "auto",
        threads: int | None = None,
    ) -> None:
        _warn()
        super().__init__(config, None, backend, threads=threads, weights=method)

    @property
    def method(self) -> str:
        """The old name of `weights`."""
        return self.weights

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        method: Literal["int8", "fp16"],
        backend: BackendName | Backend = "auto",
        revision: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """See `GPT2.from_pretrained`, whose quantize was this method."""
        _warn()
        return cls._renamed(GPT2.from_pretrained(path, backend, method, revision, threads))

    @classmethod
    def from_found(  # type: ignore[override]
        cls,
        found: Pretrained,
        method: str,
        backend: str | Backend = "auto",
        threads: int | None = None,
    ) -> Self:
        """See `GPT2.from_found`."""
        _warn()
        return cls._renamed(GPT2.from_found(found, backend, threads, method))

    @classmethod
    def from_model(cls, model: GPT2, method: str) -> Self:
        """See `GPT2.quantize`."""
        _warn()
        check_kind("model", model, GPT2, "a GPT2")
        return cls._renamed(model.quantize(method))

    @classmethod
    def _renamed(cls, model: GPT2) -> Self:
        """Return the model, which nobody else has, as one of this class."""
        renamed = cls.__new__(cls)
        renamed.__dict__ = model.__dict__
        return renamed


def _warn() -> None:
    warnings.warn(
        'QuantizedGPT2 is an old name: write GPT2.from_pretrained(path, quantize="int8"), or'
        ' model.quantize("int8")',
        DeprecationWarning,
        stacklevel=3,
    )
