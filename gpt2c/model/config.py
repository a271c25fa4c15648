"""ModelConfig: what the configs of all kinds of models share, and the checks of their fields.

A kind of model, GPT-2 (gpt2.py) or Llama (llama.py), has a dataclass of its own: fields under
Hugging Face's names, and the blocks that they describe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from gpt2c.kernels.checks import check_kind
from gpt2c.model.head import Head
from gpt2c.model.lora import LoRA, is_adapter
from gpt2c.model.stack import Stack

__all__ = [
    "ModelConfig",
    "check_eos",
    "check_label_names",
    "check_lora",
    "check_numbers",
    "check_sizes",
    "read_token",
]

LARGEST = 2**31 - 1  # token ids and positions are int32
MOST_LAYERS = 10_000  # all names and shapes are listed before the memory is checked


class ModelConfig:
    """What the configs of all kinds share: config.json, sizes under GPT-2's names, the blocks.

    Attributes
    ----------
    model_type : Hugging Face's name of the kind
    arithmetic : the fields of config.json that choose it, each with the values that gpt2c
        implements: `from_dict` refuses any other, `to_dict` writes the first
    classifier : the architecture of a model with num_labels
    context_name : its field n_positions, for errors
    """

    model_type: ClassVar[str]
    arithmetic: ClassVar[dict[str, tuple[Any, ...]]]
    classifier: ClassVar[str]
    context_name: ClassVar[str] = "n_positions"

    if TYPE_CHECKING:  # fields and properties of each kind of config

        @property
        def vocab_size(self) -> int:
            """V, the number of token ids."""

        @property
        def n_positions(self) -> int:
            """The most tokens of a text."""

        @property
        def n_embd(self) -> int:
            """C, the channels of the stream."""

        @property
        def n_layer(self) -> int:
            """L, the number of layers."""

        @property
        def inner(self) -> int:
            """F, the channels inside an MLP."""

        @property
        def eos_token_id(self) -> int | None:
            """The end-of-text token, or None."""

        @property
        def num_labels(self) -> int | None:
            """K, the scores of a text; None for a language model."""

        @property
        def id2label(self) -> tuple[str, ...] | None:
            """The K names of the labels; None for LABEL_0 and so on."""

        @property
        def pad_token_id(self) -> int | None:
            """The token behind shorter texts of a batch, only kept for other readers."""

        @property
        def lora(self) -> LoRA | None:
            """The adapters of the linear layers, or None."""

        @property
        def initializer_range(self) -> float:
            """The standard deviation of the initial weights."""

    @classmethod
    def from_dict(cls, entries: Mapping[str, object]) -> Self:
        """Return the config that the entries of Hugging Face's config.json describe.

        Unknown keys are ignored, and so is dropout, which `Model.loss` gets. If eos_token_id is a
        list, the first id counts, as transformers pads with it. An id beyond the vocabulary counts
        as None, and so do names of labels that are not K different texts.

        Raises
        ------
        ValueError : another model_type, arithmetic that gpt2c does not have, or an invalid field

        Examples
        --------
        >>> entries = {"model_type": "gpt2", "n_layer": 24, "n_head": 16, "n_embd": 1024}
        >>> gpt2c.GPT2Config.from_dict(entries).n_layer
        24
        """
        kind = entries.get("model_type", cls.model_type)
        try:
            if kind != cls.model_type:
                raise ValueError(f"model_type must be {cls.model_type!r}, got {kind!r:.50}")
            architectures = (*cls.arithmetic["architectures"], [cls.classifier])
            for name, known in (cls.arithmetic | {"architectures": architectures}).items():
                if entries.get(name, known[0]) not in known:
                    wanted = " or ".join(map(repr, known))
                    raise ValueError(f"{name} must be {wanted}, got {entries[name]!r:.50}")
            names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
            fields = {name: value for name, value in entries.items() if name in names}
            labels = dict.fromkeys(("num_labels", "id2label", "pad_token_id"))
            if entries.get("architectures") == [cls.classifier]:
                default: Any = cls.vocab_size  # the field's, as this is the class
                labels = _read_labels(entries, default)
            return cls(**fields | labels | cls._read(entries) | {"lora": None})
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from None

    @classmethod
    def _read(cls, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that config.json has under other names, or in another form."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, object]:
        """Return the entries of a config.json from which transformers builds the same model.

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=2)
        >>> config.to_dict()["model_type"], gpt2c.GPT2Config.from_dict(config.to_dict()) == config
        ('gpt2', True)
        """
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        for name in ("num_labels", "id2label", "pad_token_id", "lora"):
            del fields[name]
        arithmetic = {name: known[0] for name, known in self.arithmetic.items()}
        return (
            {"model_type": self.model_type} | fields | arithmetic | self._write() | self._labels()
        )

    def _write(self) -> dict[str, Any]:
        """Return the entries that are no fields, or have another form."""
        raise NotImplementedError

    def _labels(self) -> dict[str, Any]:
        """Return the entries that a classifier has beside those of a language model."""
        if self.num_labels is None:
            return {}
        # transformers counts id2label, and reads the scores at a text's last token that is no pad
        names = dict(enumerate(self.label_names))
        return {
            "architectures": [self.classifier],
            "pad_token_id": self.pad_token_id,
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
        }

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of each label: id2label, or transformers' names where it is None."""
        return self.id2label or _unnamed(self.num_labels or 0)

    def stack(self) -> Stack:
        """Return the blocks of this model."""
        raise NotImplementedError

    @property
    def start_token_id(self) -> int | None:
        """The token that starts a text where nothing else does, or None."""
        return self.eos_token_id

    def head(self, name: str) -> Head:
        """Return the head: scores, or logits whose weight has this name; see `Head`.

        Examples
        --------
        >>> gpt2c.GPT2Config(num_labels=2).head("wte").weight
        'score.weight'
        """
        std = self.initializer_range
        if self.num_labels is not None:
            return Head(self.num_labels, self.n_embd, "score", std)
        return Head(self.vocab_size, self.n_embd, name, std)

    def require_language_head(self, what: str) -> None:
        """Refuse a model that has scores in place of logits; `what` begins the error.

        Raises
        ------
        ValueError : the config has num_labels

        Examples
        --------
        >>> gpt2c.GPT2Config(num_labels=2).require_language_head("generate")
        Traceback (most recent call last):
        ValueError: generate needs a language head; this model has scores of texts in its place...
        """
        if self.num_labels is not None:
            raise ValueError(
                f"{what} needs a language head; this model has scores of texts in its place"
                f" (num_labels={self.num_labels}): call its scores(idx)"
            )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of all parameters; matrices, which AdamW decays, come first.

        Linear weights are (OC, C), as in llm.c. GPT-2's names are Hugging Face's without
        "transformer."; other models have GPT-2's names, too.

        Examples
        --------
        >>> shapes = gpt2c.GPT2Config().parameter_shapes()
        >>> shapes["wte.weight"], shapes["h.0.mlp.c_fc.weight"]
        ((50257, 768), (3072, 768))
        """
        return {name: one.shape for name, one in self.stack().parameters().items()}

    def frozen(self) -> frozenset[str]:
        """Return the parameters that do not learn at first: beside adapters only scores do.

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, lora=gpt2c.LoRA(r=4))
        >>> len(config.frozen()), len(config.parameter_shapes())
        (16, 24)
        """
        names = self.parameter_shapes() if self.lora else ()
        return frozenset(n for n in names if not is_adapter(n) and n != "score.weight")

    def num_parameters(self) -> int:
        """Return the number of parameters; a table that is the lm_head too counts once.

        Examples
        --------
        >>> f"{gpt2c.GPT2Config().num_parameters():,}"  # GPT-2's smallest
        '124,439,808'
        """
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def cache_floats(self) -> int:
        """Return the floats of the keys and values that a token leaves in a decoder's cache.

        Examples
        --------
        >>> gpt2c.GPT2Config().cache_floats()  # of 12 layers, a key and a value of 768 channels
        18432
        """
        layers = self.stack().layers
        return sum(2 * layer.attention.KV * layer.attention.HS for layer in layers)

    def flops_per_token(self, T: int) -> float:
        """Return the float operations per token, forward and backward, in texts of T tokens.

        A multiply-add counts 2 operations forward and 4 backward (the gradients of input and
        weight; beside adapters, other weights have none). A query attends to T/2 keys on average.
        Softmax, norms, activations and recomputation are not counted. Source: Kaplan et al. 2020,
        arXiv:2001.08361; PaLM, arXiv:2204.02311, which counts all T keys.

        Examples
        --------
        >>> round(gpt2c.GPT2Config().flops_per_token(1024) / 1e6)  # millions
        798
        """
        stack = self.stack()
        frozen = 0.0 if self.lora is None else sum(one.OC * one.C for one in stack.linears())
        if self.lora and self.num_labels is None:
            frozen += stack.head.flops(T)
        return 6.0 * stack.flops(T) - 2.0 * frozen

    def prefill_flops(self, T: int) -> float:
        """Return the float operations that read a text of T tokens: the logits of the last only.

        Examples
        --------
        >>> f"{gpt2c.GPT2Config().prefill_flops(512):.1e}"  # GPT-2's smallest
        '9.2e+10'
        """
        stack = self.stack()
        head = stack.head.flops(T)
        return 2.0 * ((stack.flops(T) - head) * T + head)

    def decode_flops(self, T: int) -> float:
        """Return the float operations of one token more behind T tokens: its queries see them all.

        A block's `flops` count half of the keys that they are told.

        Examples
        --------
        >>> f"{gpt2c.GPT2Config().decode_flops(512):.1e}"  # GPT-2's smallest
        '2.7e+08'
        """
        return 2.0 * self.stack().flops(2 * T)


def _read_labels(entries: Mapping[str, Any], V: int) -> dict[str, Any]:
    """Return num_labels, id2label and pad_token_id of config.json; V: see `read_token`.

    transformers counts labels by their names, and takes 2 if nothing is said.
    """
    pad = read_token("pad_token_id", entries, V)
    read = {"pad_token_id": None if pad == -1 else pad}  # -1: older Llamas without one
    names, number = entries.get("id2label"), entries.get("num_labels")
    if names is None:
        return read | {"num_labels": 2 if number is None else number}
    if not isinstance(names, dict):
        raise ValueError(f"id2label must be an object, got {names!r:.50}")
    if number is not None and number != len(names):
        raise ValueError(f"num_labels must be the {len(names)} of id2label, got {number!r:.50}")
    ordered = tuple(names.get(str(number)) for number in range(len(names)))
    is_named = _are_names(ordered) and ordered != _unnamed(len(names))
    return read | {"num_labels": len(names), "id2label": ordered if is_named else None}


def _unnamed(K: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(K))


def _are_names(names: tuple[Any, ...]) -> bool:
    return all(isinstance(name, str) and name for name in names) and len({*names}) == len(names)


def check_label_names(config: ModelConfig) -> None:
    """Refuse names of labels that are not a tuple of num_labels different texts."""
    names, K = config.id2label, config.num_labels
    if names is None:
        return
    if not (isinstance(names, tuple) and len(names) == K and _are_names(names)):
        raise ValueError(
            f"id2label must be None or a tuple of num_labels={K} different names, got {names!r:.50}"
        )


def _plain(config: object, name: str) -> Any:
    """Return a field; NumPy's number in it becomes Python's, which JSON has, too."""
    value = getattr(config, name)
    if isinstance(value, np.number):
        value = value.item()
        object.__setattr__(config, name, value)
    return value


def check_sizes(
    config: object, sizes: tuple[str, ...], optional: tuple[str, ...], layers: str
) -> None:
    """Refuse sizes that are not whole numbers from 1 on; optional ones may be None."""
    for name in sizes + optional:
        value, most = _plain(config, name), MOST_LAYERS if name == layers else LARGEST
        if value is None and name in optional:
            continue
        if not (type(value) is int and 1 <= value <= most):  # isinstance accepts a bool
            raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r:.50}")


def check_numbers(config: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers that are out of their ranges.

    The ranges are narrower than float32's, so that results computed from the numbers stay finite.
    """
    for name, (least, greatest) in ranges.items():
        value = _plain(config, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and least <= value <= greatest):
            raise ValueError(
                f"{name} must be a number from {least:g} to {greatest:g}, got {value!r:.50}"
            )


def read_token(name: str, entries: Mapping[str, Any], V: int) -> Any:
    """Return a token's id in config.json, the first of a list; V: vocab_size where it has none.

    An id beyond the vocabulary is None: Hugging Face's default, 50256, in a smaller model.
    """
    token, V = entries.get(name), entries.get("vocab_size", V)
    if isinstance(token, list) and token:
        token = token[0]
    return None if type(token) is int and type(V) is int and token >= V else token


def check_eos(config: ModelConfig, name: str = "eos_token_id") -> None:
    """Refuse an end-of-text token, or another that a config names, outside of the vocabulary."""
    token = _plain(config, name)
    if token is not None and not (type(token) is int and 0 <= token < config.vocab_size):
        raise ValueError(f"{name} must be in [0, {config.vocab_size}), got {token!r:.50}")


def check_lora(config: ModelConfig) -> None:
    """Refuse adapters that are no `LoRA`, or fit no layer."""
    if config.lora is not None:
        check_kind("lora", config.lora, LoRA, "a gpt2c.LoRA or None")
        config.stack()  # which looks for the targets
