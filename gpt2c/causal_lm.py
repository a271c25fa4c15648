"""CausalLM: a model as users see it. It loads, saves and generates text, whatever its kind.

model/ computes, formats/ reads and writes files, generate/ continues texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from gpt2c.generate.continuation import Ids, Logprobs, Streamed, continue_prompts
from gpt2c.generate.sampling import GenerationConfig, TokenSettings, shows
from gpt2c.kernels.backend import Backend, BackendName, Precision
from gpt2c.model.config import ModelConfig
from gpt2c.model.inputs import check_prompts
from gpt2c.model.model import Model
from gpt2c.model.parameters import check_shapes
from gpt2c.model.quantized import check_method, shapes_of

# Methods import the readers and writers of files when they need them: a fresh model needs none, and
# they take a quarter of the time that its modules take.
if TYPE_CHECKING:
    from gpt2c.formats.load import Pretrained

__all__ = ["CausalLM", "IdRows", "PromptIds", "Texts"]

IdRows = Sequence[Sequence[int]] | Sequence[NDArray[Any]]
PromptIds = NDArray[Any] | IdRows
Texts = Ids | list[Ids]  # an array if all prompts have the same length


class CausalLM(Model):
    """A model that continues texts of token ids; see `gpt2c.GPT2` for its arguments and attributes.

    Of a config with num_labels it scores texts, and continues none.

    Attributes
    ----------
    config_class : of each kind of model, the class of its config
    """

    config_class: ClassVar[type[ModelConfig]]
    _found: Pretrained | None = None  # where it was loaded from, which adapters' files name

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backend: BackendName | Backend = "auto",
        quantize: Literal["int8", "fp16"] | None = None,
        revision: str | None = None,
        threads: int | None = None,
        recompute: Literal["light", "full"] | None = None,
        precision: Precision = "fp32",
        adapter: str | os.PathLike[str] | None = None,
        check_base: bool = True,
    ) -> Self:
        """Load a directory with config.json and model.safetensors, gpt2c's or Hugging Face's.

        The tensors' names and shapes are compared with the config before any memory is allocated.

        Parameters
        ----------
        path : see `gpt2c.formats.load.find_model`
        backend, threads, recompute, precision : see `GPT2`
        quantize : "int8" or "fp16" rounds the weights to 8 or 16 bits, one tensor at a time, for
            inference or to train adapters; None leaves them fp32
        revision : of a model on the hub: a branch, tag or commit
        adapter : a directory of LoRA adapters for this model, gpt2c's or PEFT's
        check_base : False takes adapters that were trained on a base with other weights, too

        Raises
        ------
        OSError : a file is missing or unreadable, or the hub does not have it
        ValueError : a file is damaged, or its tensors are not those of its config; the model is of
            another kind; quantize is unknown, or differs from the type of stored quantized weights;
            the adapters do not fit the model

        Examples
        --------
        >>> import tempfile
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     model.save_pretrained(directory)
        ...     small = gpt2c.GPT2.from_pretrained(directory, quantize="int8")
        >>> small.weights
        'int8'
        """
        from gpt2c.formats.load import find_model

        found = find_model(path, revision, adapter, check_base)
        return cls.from_found(found, backend, threads, quantize, recompute, precision)

    @classmethod
    def from_found(
        cls,
        found: Pretrained,
        backend: str | Backend = "auto",
        threads: int | None = None,
        quantize: str | None = None,
        recompute: str | None = None,
        precision: str = "fp32",
    ) -> Self:
        """Load a model that `gpt2c.formats.load.find_model` has found; see `from_pretrained`."""
        config, source = found.config, found.source
        if not isinstance(config, cls.config_class):
            kind = type(config).__name__.removesuffix("Config")
            raise ValueError(
                f"{found.path} holds a {kind}, not a {cls.__name__}: open it with"
                " gpt2c.from_pretrained, which takes any kind"
            )
        if quantize is not None:
            check_method(quantize)
        if found.weights not in ("fp32", quantize):
            mend = f": pass quantize={found.weights!r}, or open it with gpt2c.from_pretrained"
            if quantize is not None:
                mend = f", which cannot become {quantize}: start from the model that was quantized"
            raise ValueError(f"{source} holds {found.weights} weights{mend}")
        check_shapes(shapes_of(config, found.weights), found.tensors, source)
        weights = quantize or "fp32"
        model = cls(config, None, backend, recompute, threads, weights, precision)
        load = model.load_parameters if found.weights == "fp32" else model.load_quantized
        load(found.tensors, source)
        model._found = found
        return model

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json, generation_config.json and model.safetensors, as transformers does.

        Weights of 16 or 8 bits are stored as they are, for gpt2c only. Of a model with adapters,
        only these and the scores are written, as PEFT does: adapter_config.json, which names the
        base, and adapter_model.safetensors.

        Raises
        ------
        OSError : the files cannot be written; existing files are unchanged
        ValueError : the directory's name is empty

        Examples
        --------
        >>> import os, tempfile
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     model.save_pretrained(directory)
        ...     sorted(os.listdir(directory))
        ['config.json', 'generation_config.json', 'model.safetensors']
        """
        from gpt2c.formats import huggingface, peft

        if self.config.lora is not None:
            found, names = self._found, self.config.frozen()
            if not names.isdisjoint(self.trained):
                raise ValueError("other parameters than adapters were trained: merge() them first")
            base = self._parameters if self.weights == "fp32" else found and found.tensors
            sha256 = peft.digest(base, names) if base else None
            name = found.name if found else ""
            peft.save_adapter(directory, self.config, self._parameters, name, sha256)
            return
        config = self.config.to_dict()
        if self.weights == "fp32":
            huggingface.save_weights(directory, config, self._parameters)
        else:
            entry = {"quant_method": "gpt2c", "weights": self.weights}
            config |= {huggingface.ENTRY: entry}
            huggingface.save_as_they_are(directory, config, self._parameters)

    # ---- texts -----------------------------------------------------------------------------------

    @overload
    def stream(
        self,
        idx: PromptIds,
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[False] = False,
        **settings: Unpack[TokenSettings],
    ) -> Iterator[Ids]: ...

    @overload
    def stream(
        self,
        idx: PromptIds,
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[True],
        **settings: Unpack[TokenSettings],
    ) -> Iterator[tuple[Ids, Logprobs]]: ...

    @shows(TokenSettings)
    def stream(
        self,
        idx: PromptIds,
        max_new_tokens: int | None = 64,
        *,
        logprobs: bool = False,
        **settings: Unpack[TokenSettings],
    ) -> Iterator[Streamed]:
        """Continue prompts and yield the new tokens (B,) of each step as soon as they are chosen.

        A row that has ended repeats its last token. Rows do not influence each other: each is the
        same as it would be alone.

        Parameters
        ----------
        idx : B prompts of token ids, (B, T) or a list of lists of different lengths, up to
            n_positions tokens; an empty one starts from eos_token_id of the config
        max_new_tokens : the most tokens to add
        logprobs : also return the log-probability of each token
        settings : others of transformers, which gpt2c lacks, at values that leave them off

        Returns
        -------
        an iterator of (B * num_return_sequences,) int64; with logprobs=True, of pairs of these and
        (B * num_return_sequences,) float64 log-probabilities in nats

        Raises
        ------
        ValueError : an argument is out of range (raised at once, not at the first token)
        TypeError : an unknown setting
        MemoryError : the keys and values of all texts do not fit

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> steps = model.stream([[1, 2, 3], [4]], max_new_tokens=3, seed=1)
        >>> [tokens.shape for tokens in steps]  # one token for each of the two prompts
        [(2,), (2,), (2,)]
        """
        config = GenerationConfig(max_new_tokens=max_new_tokens, logprobs=logprobs, **settings)
        return continue_prompts(self, check_prompts(self.config, idx), config)

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
        idx: IdRows,
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
        idx: IdRows,
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[True],
        **settings: Unpack[TokenSettings],
    ) -> tuple[Texts, Logprobs]: ...

    @shows(TokenSettings)
    def generate(
        self,
        idx: PromptIds,
        max_new_tokens: int | None = 64,
        *,
        logprobs: bool = False,
        **settings: Unpack[TokenSettings],
    ) -> Texts | tuple[Texts, Logprobs]:
        """Continue prompts; see `stream`, which yields the same tokens one by one.

        Parameters
        ----------
        idx : B prompts of token ids, (B, T) or a list of lists of different lengths, up to
            n_positions tokens; an empty one starts from eos_token_id of the config
        max_new_tokens : the most tokens to add
        logprobs : also return the log-probability of each token
        settings : others of transformers, which gpt2c lacks, at values that leave them off

        Returns
        -------
        (B * num_return_sequences, T + new) int64 token ids if all prompts have T tokens: rows that
        ended early repeat their last token. Otherwise a list of arrays, each up to its end. With
        logprobs=True, a pair of that and the log-probabilities in nats, (B * num_return_sequences,
        new) float64, 0 after the end

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> model.generate([[1, 2], [3, 4]], max_new_tokens=3, seed=1).shape
        (2, 5)
        >>> [len(text) for text in model.generate([[1, 2, 3], [4]], max_new_tokens=3, seed=1)]
        [6, 4]
        """
        config = GenerationConfig(max_new_tokens=max_new_tokens, logprobs=logprobs, **settings)
        prompts = check_prompts(self.config, idx)
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
