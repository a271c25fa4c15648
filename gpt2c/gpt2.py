"""GPT2 as users see it: a model that loads, saves and generates text.

model/ computes, formats/ reads and writes files, generate/ continues texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from gpt2c.generate.continuation import Ids, Logprobs, Step, continue_prompts
from gpt2c.generate.sampling import GenerationConfig, TokenSettings
from gpt2c.kernels.backend import Backend
from gpt2c.kernels.checks import check_kind
from gpt2c.model.config import GPT2Config
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.model import Model
from gpt2c.model.parameters import check_shapes
from gpt2c.model.quantized import QuantizedModel, shapes_of

# Methods import the readers and writers of files when they need them: a fresh model needs none, and
# they take a quarter of the time that its modules take.
if TYPE_CHECKING:
    from gpt2c.formats.load import Pretrained

__all__ = [
    "GPT2",
    "Prompts",
    "QuantizedGPT2",
    "Rows",
    "Texts",
    "WritingModel",
    "from_pretrained",
    "open_found",
]

Rows = Sequence[Sequence[int]] | Sequence[NDArray[Any]]
Prompts = NDArray[Any] | Rows
Texts = Ids | list[Ids]  # an array if all prompts have the same length


def from_pretrained(
    path: str | os.PathLike[str],
    backend: str | Backend = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    threads: int | None = None,
) -> GPT2 | QuantizedGPT2:
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

    return open_found(find_model(path, revision), backend, quantize, threads)


def open_found(
    found: Pretrained,
    backend: str | Backend = "auto",
    quantize: str | None = None,
    threads: int | None = None,
) -> GPT2 | QuantizedGPT2:
    """Load a model that `find_model` has found; see `from_pretrained`."""
    if quantize is None and found.weights != "fp32":
        quantize = found.weights
    if quantize is None:
        return GPT2.from_found(found, backend, threads)
    return QuantizedGPT2.from_found(found, quantize, backend, threads)


class WritingModel(LanguageModel):
    """A model that continues texts of token ids."""

    @overload
    def stream(
        self,
        idx: Prompts,
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[False] = False,
        **settings: Unpack[TokenSettings],
    ) -> Iterator[Ids]: ...

    @overload
    def stream(
        self,
        idx: Prompts,
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[True],
        **settings: Unpack[TokenSettings],
    ) -> Iterator[tuple[Ids, Logprobs]]: ...

    def stream(
        self,
        idx: Prompts,
        max_new_tokens: int | None = 64,
        *,
        logprobs: bool = False,
        **settings: Unpack[TokenSettings],
    ) -> Iterator[Step]:
        """Continue prompts and yield the new tokens (B,) of each step as soon as they are chosen.

        A row that has ended repeats its last token. Rows do not influence each other: each is the
        same as it would be alone.

        Parameters
        ----------
        idx : B prompts of token ids, (B, T) or a list of lists of different lengths, up to
            n_positions tokens; an empty one starts from eos_token_id of the config
        max_new_tokens : the most tokens to add
        logprobs : also return the log-probability of each token
        settings : the other fields of `gpt2c.GenerationConfig`: temperature, top_k, top_p, min_p,
            seed, stop and so on

        Returns
        -------
        an iterator of (B * num_return_sequences,) int64; with logprobs=True, of pairs of these and
        (B * num_return_sequences,) float64 log-probabilities in nats

        Raises
        ------
        ValueError : an argument is out of range (raised at once, not at the first token)
        TypeError : an unknown setting
        MemoryError : the keys and values of all texts do not fit
        """
        config = GenerationConfig(max_new_tokens=max_new_tokens, logprobs=logprobs, **settings)
        return continue_prompts(self, self.check_prompts(idx), config)

    @overload
    def generate(
        self,
        idx: NDArray[Any],
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[False] = False,
        **settings: Unpack[TokenSettings],
    ) -> Ids: ...

    @overload
    def generate(
        self,
        idx: Rows,
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[False] = False,
        **settings: Unpack[TokenSettings],
    ) -> Texts: ...

    @overload
    def generate(
        self,
        idx: NDArray[Any],
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[True],
        **settings: Unpack[TokenSettings],
    ) -> tuple[Ids, Logprobs]: ...

    @overload
    def generate(
        self,
        idx: Rows,
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[True],
        **settings: Unpack[TokenSettings],
    ) -> tuple[Texts, Logprobs]: ...

    def generate(
        self,
        idx: Prompts,
        max_new_tokens: int | None = 64,
        *,
        logprobs: bool = False,
        **settings: Unpack[TokenSettings],
    ) -> Texts | tuple[Texts, Logprobs]:
        """Continue prompts, with the arguments of `stream`.

        Returns
        -------
        (B * num_return_sequences, T + new) int64 token ids if all prompts have T tokens: rows that
        ended early repeat their last token. Otherwise a list of arrays, each up to its end. With
        logprobs=True, a pair of that and the log-probabilities in nats, (B * num_return_sequences,
        new) float64, 0 after the end
        """
        config = GenerationConfig(max_new_tokens=max_new_tokens, logprobs=logprobs, **settings)
        prompts = self.check_prompts(idx)
        steps = list(continue_prompts(self, prompts, config))
        given = idx if isinstance(idx, np.ndarray) else list(idx)
        rows = [
            np.asarray(row, np.int64) for row in given for _ in range(config.num_return_sequences)
        ]
        tokens = [step[0] if isinstance(step, tuple) else step for step in steps]
        new = np.stack(tokens, axis=1) if steps else np.empty((len(rows), 0), np.int64)
        ends = list(config.ends(self.config.vocab_size))
        if len({len(row) for row in rows}) == 1:
            out: Texts = np.concatenate([np.stack(rows), new], axis=1)
        else:
            texts = []
            for row, added in zip(rows, new, strict=True):
                if config.on_full == "stop":  # the last token is not read, so it needs no place
                    added = added[: self.config.n_positions + 1 - max(1, len(row))]
                last = np.flatnonzero(np.isin(added, ends))
                texts.append(np.concatenate([row, added[: last[0] + 1 if len(last) else None]]))
            out = texts
        if not config.logprobs:
            return out
        pairs = [step[1] for step in steps]
        return out, np.stack(pairs, axis=1) if pairs else np.empty((len(rows), 0))


class GPT2(WritingModel, Model):
    """A GPT-2 that can be trained; `LanguageModel` has its logits, logprobs and embed.

    Parameters
    ----------
    config : its shape
    seed : of the initial weights; None leaves them 0, for the caller to fill
    backend : a name of `gpt2c.backends()`, "auto", or a backend
    threads : the number of threads, with a backend's name; None is GPT2C_NUM_THREADS, else
        OMP_NUM_THREADS, else as many as the machine allows, see `gpt2c info`
    recompute : the arrays that backward computes again instead of keeping them: None for none,
        "light" for the outputs of layernorm and GELU, "full" for all but the residual stream
        between layers (Chen et al. 2016, arXiv:1604.06174). The results are bit for bit the same

    Attributes
    ----------
    parameters, gradients : name -> float32 view into `flat_parameters`, `flat_gradients`; names of
        `GPT2Config.parameter_shapes`, in its order until some are frozen, which then come last and
        have no gradients. Each backward adds to the gradients until `zero_grad`; their memory is
        allocated at the first use.
    trained : the names of the parameters that are trained, all that are not frozen
    trained_size : the number of floats of these, at the start of both flat buffers
    decay_size : the number of floats of those among them that AdamW decays, which come first

    Raises
    ------
    ValueError : an unknown backend or recompute, a seed or threads out of range
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

    def __init__(
        self,
        config: GPT2Config,
        seed: int | None = 1337,
        backend: str | Backend = "auto",
        recompute: str | None = None,
        threads: int | None = None,
    ) -> None:
        check_kind("config", config, GPT2Config, "a GPT2Config")
        super().__init__(config, seed, backend, recompute, threads)

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backend: str | Backend = ...,
        quantize: None = ...,
        revision: str | None = ...,
        threads: int | None = ...,
    ) -> GPT2: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backend: str | Backend = ...,
        *,
        quantize: str,
        revision: str | None = ...,
        threads: int | None = ...,
    ) -> QuantizedGPT2: ...

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backend: str | Backend = "auto",
        quantize: str | None = None,
        revision: str | None = None,
        threads: int | None = None,
    ) -> GPT2 | QuantizedGPT2:
        """Load a directory with config.json and model.safetensors, gpt2c's or Hugging Face's.

        The tensors' names and shapes are compared with the config before any memory is allocated.

        Parameters
        ----------
        path : see `gpt2c.formats.load.find_model`
        backend, threads : see `GPT2`
        quantize : "int8" or "fp16" returns a `QuantizedGPT2`, with weights of 8 or 16 bits
        revision : of a model on the hub: a branch, tag or commit

        Raises
        ------
        OSError : a file is missing or unreadable, or the hub does not have it
        ValueError : a file is damaged, or its tensors are not those of its config; quantize is
            unknown, or differs from the method of stored quantized weights
        """
        from gpt2c.formats.load import find_model

        found = find_model(path, revision)
        if quantize is not None:
            return QuantizedGPT2.from_found(found, quantize, backend, threads)
        return cls.from_found(found, backend, threads)

    @classmethod
    def from_found(
        cls, found: Pretrained, backend: str | Backend = "auto", threads: int | None = None
    ) -> GPT2:
        """Load a model that `gpt2c.formats.load.find_model` has found; see `from_pretrained`."""
        if found.weights != "fp32":
            raise ValueError(
                f"{found.source} holds {found.weights} weights: pass quantize={found.weights!r}"
            )
        if not isinstance(found.config, GPT2Config):
            raise ValueError(f"{found.source} is no GPT-2, got {found.config!r:.50}")
        check_shapes(found.config.parameter_shapes(), found.tensors, found.source)
        model = cls(found.config, seed=None, backend=backend, threads=threads)
        model.load_parameters(found.tensors, found.source)
        return model

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json, generation_config.json and model.safetensors, as transformers does.

        Raises
        ------
        OSError : the files cannot be written; existing files are unchanged
        ValueError : the directory's name is empty
        """
        from gpt2c.formats import huggingface

        huggingface.save_weights(directory, self.config.to_dict(), self._parameters)


class QuantizedGPT2(WritingModel, QuantizedModel):
    """A GPT-2 with int8 or fp16 weights, which cannot be trained. See `QuantizedModel`.

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory)
    ...     model = gpt2c.QuantizedGPT2.from_pretrained(directory, "int8")
    >>> model.parameters["wte.weight"].dtype
    dtype('uint8')
    >>> model.generate([[104, 101]], max_new_tokens=3).shape
    (1, 5)
    """

    config: GPT2Config

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        method: str,
        backend: str | Backend = "auto",
        revision: str | None = None,
        threads: int | None = None,
    ) -> QuantizedGPT2:
        """Load a model that `save_pretrained` wrote, or a GPT-2, rounding one tensor at a time.

        See `GPT2.from_pretrained` for path.

        Raises
        ------
        OSError : a file is missing or unreadable
        ValueError : a file is damaged, or holds weights of another method
        """
        from gpt2c.formats.load import find_model

        return cls.from_found(find_model(path, revision), method, backend, threads)

    @classmethod
    def from_found(
        cls,
        found: Pretrained,
        method: str,
        backend: str | Backend = "auto",
        threads: int | None = None,
    ) -> QuantizedGPT2:
        """Load a model that `gpt2c.formats.load.find_model` has found; see `from_pretrained`."""
        if found.weights not in ("fp32", method):
            raise ValueError(
                f"{found.source} holds {found.weights} weights, which cannot become {method}:"
                " start from the model that was quantized"
            )
        config = found.config
        check_shapes(
            shapes_of(config, method) if found.weights == method else config.parameter_shapes(),
            found.tensors,
            found.source,
        )
        model = cls(config, method, backend, threads)
        (model.take if found.weights == method else model.round)(found.tensors, found.source)
        return model

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors with the quantized weights, for gpt2c only.

        Raises
        ------
        OSError : the files cannot be written; existing files are unchanged
        ValueError : the directory's name is empty
        """
        from gpt2c.formats import huggingface

        entry = {"quant_method": "gpt2c", "weights": self.method}
        config = self.config.to_dict() | {huggingface.ENTRY: entry}
        huggingface.save_as_they_are(directory, config, self.parameters)
