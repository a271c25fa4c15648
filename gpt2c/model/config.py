"""GPT2Config: the numbers that define a GPT-2, under Hugging Face's names, and its blocks.

Its base, ModelConfig, is the part that all kinds of models have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from gpt2c.model.attention import Attention
from gpt2c.model.embedding import Embedding
from gpt2c.model.head import Head
from gpt2c.model.mlp import MLP
from gpt2c.model.norm import LayerNorm
from gpt2c.model.stack import Layer, Stack

__all__ = [
    "FIXED",
    "GPT2Config",
    "ModelConfig",
    "check_eos",
    "check_fixed",
    "check_numbers",
    "check_sizes",
    "read_labels",
    "read_token",
    "write_labels",
]

CLASSIFIER = ["GPT2ForSequenceClassification"]
# The fields of config.json that choose the arithmetic, each with the values that gpt2c implements.
# `from_dict` refuses any other value; `to_dict` writes the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "architectures": (  # other classes have other heads
        *(["GPT2LMHeadModel"], ["GPT2Model"], None, CLASSIFIER),
    ),
    "activation_function": (  # names of GELU's tanh form
        *("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
        *("gelu_fast", "gelu_accurate"),
    ),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # the same products in another order
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# Other names that transformers accepts for these fields.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

LARGEST = 2**31 - 1  # token ids and positions are int32
MOST_LAYERS = 10_000  # all names and shapes are listed before the memory is checked
# Narrower than float32's range, so that results computed from these numbers stay finite.
RANGES = {"layer_norm_epsilon": (1e-37, 1.0), "initializer_range": (1e-37, 1e4)}


class ModelConfig:
    """The part of a config that every model has: its sizes, under GPT-2's names, and its blocks."""

    if TYPE_CHECKING:  # fields, properties and methods of each kind of config

        @classmethod
        def from_dict(cls, entries: Mapping[str, Any]) -> Self:
            """Return the config that the entries of config.json describe."""

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
        def pad_token_id(self) -> int | None:
            """The token behind shorter texts of a batch, only kept for other readers."""

        @property
        def initializer_range(self) -> float:
            """The standard deviation of the initial weights."""

        def to_dict(self) -> dict[str, Any]:
            """Return the entries of a config.json from which transformers builds the same model."""

    def stack(self) -> Stack:
        """Return the blocks of this model."""
        raise NotImplementedError

    @property
    def start_token_id(self) -> int | None:
        """The token that starts a text where nothing else does, or None."""
        return self.eos_token_id

    def head(self, name: str) -> Head:
        """Return the head: scores, or logits whose weight has this name; see `Head`."""
        std = self.initializer_range
        if self.num_labels is not None:
            return Head(self.num_labels, self.n_embd, "score", std)
        return Head(self.vocab_size, self.n_embd, name, std)

    def require_language_head(self, what: str) -> None:
        """Refuse a model that has scores in place of logits; `what` begins the error.

        Raises
        ------
        ValueError : the config has num_labels
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
        """
        return {name: one.shape for name, one in self.stack().parameters().items()}

    def num_parameters(self) -> int:
        """Return the number of parameters; a table that is the lm_head too counts once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def cache_floats(self) -> int:
        """Return the floats of the keys and values that a token leaves in a decoder's cache."""
        layers = self.stack().layers
        return sum(2 * layer.attention.KV * layer.attention.HS for layer in layers)

    def flops_per_token(self, T: int) -> float:
        """Return the float operations per token, forward and backward, in texts of T tokens.

        A multiply-add counts 2 operations forward and 4 backward (the gradients of input and
        weight). A query attends to T/2 keys on average. Softmax, norms, activations and
        recomputation are not counted. Source: Kaplan et al. 2020, arXiv:2001.08361; PaLM,
        arXiv:2204.02311, which counts all T keys.
        """
        return 6.0 * self.stack().flops(T)


@dataclasses.dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """The shape of a GPT-2; the defaults are GPT-2 124M.

    Parameters
    ----------
    vocab_size, n_positions : V token ids; the longest text has T tokens
    n_embd, n_layer, n_head : C channels, L layers, NH heads; n_head divides n_embd
    n_inner : channels inside the MLP, 4 * n_embd if None
    layer_norm_epsilon : added to the variance, from 1e-37 to 1
    initializer_range : standard deviation of the initial weights, from 1e-37 to 1e4
    eos_token_id : the end-of-text token in [0, V), which also starts a text; None if there is none
    num_labels : K makes a model with K scores of a text in place of logits, as transformers'
        GPT2ForSequenceClassification; None for logits
    pad_token_id : of a classifier, the token that no text ends with. transformers puts it behind
        the shorter texts of a batch, and needs it for several texts; gpt2c only stores it

    Raises
    ------
    ValueError : a size is not a whole number from 1 to 2**31 - 1 (n_layer: 10,000), n_head does not
        divide n_embd, or another field is out of its range

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=257)
    >>> config.num_parameters()
    118592
    >>> gpt2c.GPT2Config().num_parameters()
    124439808
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int | None = None
    num_labels: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        check_sizes(self, sizes, ("n_inner", "num_labels"), "n_layer")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be divisible by n_head, got {self.n_embd} and {self.n_head}"
            )
        check_numbers(self, RANGES)
        check_eos(self)
        check_eos(self, "pad_token_id")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> GPT2Config:
        """Return the config that the entries of Hugging Face's config.json describe.

        Unknown keys are ignored, and so is dropout, which `Model.loss` gets. If eos_token_id is a
        list, the first id counts, as transformers pads with it. An id beyond the vocabulary counts
        as None. The labels of a classifier count, their names do not.

        Raises
        ------
        ValueError : another model_type, arithmetic that gpt2c does not have, or an invalid field
        """
        if entries.get("model_type", "gpt2") != "gpt2":
            raise ValueError(
                f"config.json: model_type must be 'gpt2', got {entries['model_type']!r:.50}"
            )
        check_fixed(FIXED, entries)
        fields = {field.name for field in dataclasses.fields(cls)}
        known_entries = {name: value for name, value in entries.items() if name in fields}
        for alias, name in ALIASES.items():
            if (
                alias in entries
                and known_entries.setdefault(name, entries[alias]) != entries[alias]
            ):
                raise ValueError(
                    f"config.json: {alias} and {name} must be equal, got {entries[alias]!r:.50}"
                    f" and {entries[name]!r:.50}"
                )
        eos = read_token("eos_token_id", entries, cls.vocab_size)
        known_entries |= {"eos_token_id": eos} | read_labels(entries, CLASSIFIER, cls.vocab_size)
        try:
            return cls(**known_entries)
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of a config.json from which transformers builds the same model."""
        arithmetic = {name: known[0] for name, known in FIXED.items()}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        fields = dataclasses.asdict(self)
        del fields["num_labels"], fields["pad_token_id"]
        return (
            {"model_type": "gpt2"}
            | fields
            | {"bos_token_id": self.eos_token_id}
            | arithmetic
            | dropout
            | write_labels(self, CLASSIFIER)
        )

    @property
    def inner(self) -> int:
        """Channels inside the MLP."""
        return self.n_inner or 4 * self.n_embd

    def stack(self) -> Stack:
        """Return the blocks of this model."""
        return _gpt2(self)


@functools.lru_cache(maxsize=8)
def _gpt2(config: GPT2Config) -> Stack:
    C, NH, eps = config.n_embd, config.n_head, config.layer_norm_epsilon
    std, shrink = config.initializer_range, math.sqrt(2 * config.n_layer)
    layers = [
        Layer(
            f"h.{i}",
            LayerNorm(f"h.{i}.ln_1", C, eps),
            Attention(f"h.{i}.attn", C, NH, std, shrink),
            LayerNorm(f"h.{i}.ln_2", C, eps),
            MLP(f"h.{i}.mlp", C, config.inner, std, shrink),
        )
        for i in range(config.n_layer)
    ]
    head = config.head("wte")
    embedding = Embedding(config.vocab_size, config.n_positions, C, std, head.tied)
    return Stack(embedding, layers, LayerNorm("ln_f", C, eps), head)


def read_labels(entries: Mapping[str, Any], classifier: list[str], V: int) -> dict[str, Any]:
    """Return num_labels and pad_token_id of a classifier's config; both None for other models.

    transformers counts labels by their names, and takes 2 if nothing is said.

    Parameters
    ----------
    entries : of config.json
    classifier : the architectures of a classifier of this kind
    V : see `read_token`

    Raises
    ------
    ValueError : id2label is no object, or num_labels contradicts it
    """
    if entries.get("architectures") != classifier:
        return {"num_labels": None, "pad_token_id": None}
    pad = read_token("pad_token_id", entries, V)
    read = {"pad_token_id": None if pad == -1 else pad}  # -1: older Llamas without one
    names, number = entries.get("id2label"), entries.get("num_labels")
    if names is None:
        return read | {"num_labels": 2 if number is None else number}
    if not isinstance(names, dict):
        raise ValueError(f"config.json: id2label must be an object, got {names!r:.50}")
    if number is not None and number != len(names):
        raise ValueError(
            f"config.json: num_labels must be the {len(names)} of id2label, got {number!r:.50}"
        )
    return read | {"num_labels": len(names)}


def write_labels(config: ModelConfig, classifier: list[str]) -> dict[str, Any]:
    """Return the entries of config.json that a classifier has beside those of a language model."""
    if config.num_labels is None:
        return {}
    # transformers counts id2label, and reads the scores at a text's last token that is no pad
    names = {number: f"LABEL_{number}" for number in range(config.num_labels)}
    return {
        "architectures": classifier,
        "pad_token_id": config.pad_token_id,
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }


def check_sizes(
    config: object, sizes: tuple[str, ...], optional: tuple[str, ...], layers: str
) -> None:
    """Refuse sizes that are not whole numbers from 1 on; optional ones may be None."""
    for name in sizes + optional:
        value, most = getattr(config, name), MOST_LAYERS if name == layers else LARGEST
        if value is None and name in optional:
            continue
        if not (type(value) is int and 1 <= value <= most):  # isinstance accepts a bool
            raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r:.50}")


def check_numbers(config: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers that are out of their ranges."""
    for name, (least, greatest) in ranges.items():
        value = getattr(config, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and least <= value <= greatest):
            raise ValueError(
                f"{name} must be a number from {least:g} to {greatest:g}, got {value!r:.50}"
            )


def check_fixed(fixed: Mapping[str, tuple[Any, ...]], entries: Mapping[str, Any]) -> None:
    """Refuse entries of a config.json that choose other arithmetic than `fixed` names."""
    for name, known in fixed.items():
        if entries.get(name, known[0]) not in known:
            wanted = " or ".join(map(repr, known))
            raise ValueError(f"config.json: {name} must be {wanted}, got {entries[name]!r:.50}")


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
    token = getattr(config, name)
    if token is not None and not (type(token) is int and 0 <= token < config.vocab_size):
        raise ValueError(f"{name} must be in [0, {config.vocab_size}), got {token!r:.50}")
