"""GPT2Config: the numbers that define a GPT-2, under Hugging Face's names, and its blocks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from gpt2c.model.attention import Attention
from gpt2c.model.config import (
    ModelConfig,
    check_eos,
    check_label_names,
    check_lora,
    check_numbers,
    check_sizes,
    read_token,
)
from gpt2c.model.embedding import Embedding
from gpt2c.model.lora import LoRA
from gpt2c.model.mlp import MLP
from gpt2c.model.norm import LayerNorm
from gpt2c.model.stack import Layer, Stack

__all__ = ["GPT2Config"]

ARITHMETIC: dict[str, tuple[Any, ...]] = {
    "architectures": (["GPT2LMHeadModel"], ["GPT2Model"], None),  # other classes have other heads
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

RANGES = {"layer_norm_epsilon": (1e-37, 1.0), "initializer_range": (1e-37, 1e4)}


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
    id2label : of a classifier, the names of its K labels; None for LABEL_0 and so on
    lora : the adapters of its linear layers, which no config.json has; None for none

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

    model_type = "gpt2"
    arithmetic = ARITHMETIC
    classifier = "GPT2ForSequenceClassification"

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
    id2label: tuple[str, ...] | None = None
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        """Refuse sizes and numbers that are out of range."""
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        check_sizes(self, sizes, ("n_inner", "num_labels"), "n_layer")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be divisible by n_head, got {self.n_embd} and {self.n_head}"
            )
        check_numbers(self, RANGES)
        check_eos(self)
        check_eos(self, "pad_token_id")
        check_label_names(self)
        check_lora(self)

    @classmethod
    def _read(cls, entries: Mapping[str, Any]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for alias, name in ALIASES.items():
            if alias in entries:
                fields[name] = entries[alias]
                if entries.get(name, fields[name]) != fields[name]:
                    raise ValueError(
                        f"{alias} and {name} must be equal, got {entries[alias]!r:.50}"
                        f" and {entries[name]!r:.50}"
                    )
        return fields | {"eos_token_id": read_token("eos_token_id", entries, cls.vocab_size)}

    def _write(self) -> dict[str, Any]:
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return {"bos_token_id": self.eos_token_id} | dropout

    @property
    def inner(self) -> int:
        """Channels inside the MLP."""
        return self.n_inner or 4 * self.n_embd

    def stack(self) -> Stack:
        """Return the blocks of this model.

        Examples
        --------
        >>> len(gpt2c.GPT2Config(n_layer=2).stack().layers)
        2
        """
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
    stack = Stack(embedding, layers, LayerNorm("ln_f", C, eps), head)
    if config.lora:
        config.lora.adapt(stack)
    return stack
