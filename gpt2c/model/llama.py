"""LlamaConfig: the numbers that define a Llama, under Hugging Face's names, and its blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from gpt2c.kernels.checks import check_kind
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
from gpt2c.model.mlp import SwiGLU
from gpt2c.model.norm import RMSNorm
from gpt2c.model.rope import Rope
from gpt2c.model.rope_scaling import RopeScaling, read_rope
from gpt2c.model.stack import Layer, Stack

__all__ = ["LlamaConfig"]

ARITHMETIC: dict[str, tuple[Any, ...]] = {
    "architectures": (["LlamaForCausalLM"], ["LlamaModel"], None),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}

MOST_HS = 65_536  # frequencies are computed before the memory is checked
RANGES = {
    "rms_norm_eps": (1e-37, 1.0),
    "rope_theta": (1.0, 1e9),
    "initializer_range": (1e-37, 1e4),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """The shape of a Llama; the defaults are Llama 7B, as transformers has them.

    Parameters
    ----------
    vocab_size, max_position_embeddings : V token ids; the longest text has T tokens
    hidden_size, num_hidden_layers, num_attention_heads : C channels, L layers, NH query heads
    num_key_value_heads : KV heads of keys and values, which divide NH; None for NH
    head_dim : HS channels of a head, an even number; None for C / NH
    intermediate_size : F channels inside the MLP
    rms_norm_eps : added to the mean square, from 1e-37 to 1
    rope_theta : base of the rotary frequencies, from 1 to 1e9
    rope_scaling : changes these frequencies, see `RopeScaling`; None leaves them
    tie_word_embeddings : whether the lm_head is the embedding's table
    initializer_range : standard deviation of the initial weights, from 1e-37 to 1e4
    eos_token_id : the end-of-text token in [0, V), which also starts a text; None if there is none
    bos_token_id : a token that starts a text in place of eos_token_id, or None
    num_labels : K makes a model with K scores of a text in place of logits; None for logits
    pad_token_id, id2label, lora : see `GPT2Config`

    Source: Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288.

    Raises
    ------
    ValueError : a field is out of its range, or heads do not fit each other

    Examples
    --------
    >>> gpt2c.LlamaConfig().num_parameters()
    6738415616
    """

    model_type = "llama"
    arithmetic = ARITHMETIC
    classifier = "LlamaForSequenceClassification"
    context_name = "max_position_embeddings"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    rope_scaling: RopeScaling | None = None
    bos_token_id: int | None = None
    num_labels: int | None = None
    pad_token_id: int | None = None
    id2label: tuple[str, ...] | None = None
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        """Refuse sizes and numbers that are out of range."""
        sizes = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "max_position_embeddings"),
        )
        optional = ("num_key_value_heads", "head_dim", "num_labels")
        check_sizes(self, sizes, optional, "num_hidden_layers")
        check_numbers(self, RANGES)
        check_kind("tie_word_embeddings", self.tie_word_embeddings, bool, "True or False")
        NH, KV = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and self.hidden_size % NH:
            raise ValueError(
                "hidden_size must be divisible by num_attention_heads, got"
                f" {self.hidden_size} and {NH}"
            )
        if KV is not None and NH % KV:
            raise ValueError(
                f"num_attention_heads must be divisible by num_key_value_heads, got {NH} and {KV}"
            )
        if self.HS % 2:
            raise ValueError(f"a head must have an even number of channels, got {self.HS}")
        if self.HS > MOST_HS:
            raise ValueError(f"a head must have at most {MOST_HS:,} channels, got {self.HS:,}")
        check_eos(self)
        check_eos(self, "bos_token_id")
        check_eos(self, "pad_token_id")
        check_label_names(self)
        check_lora(self)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(
                f"rope_scaling must be a RopeScaling or None, got {self.rope_scaling!r:.50}"
            )

    @classmethod
    def _read(cls, entries: Mapping[str, Any]) -> dict[str, Any]:
        P = entries.get("max_position_embeddings", cls.max_position_embeddings)
        ids = ("bos_token_id", "eos_token_id")
        tokens = {name: read_token(name, entries, cls.vocab_size) for name in ids}
        return tokens | read_rope(entries, P)

    def _write(self) -> dict[str, Any]:
        # the names of transformers 4, which transformers 5 reads, too
        scaling = None if self.rope_scaling is None else self.rope_scaling.to_dict()
        return {"rope_scaling": scaling, "attention_dropout": 0.0}

    @property
    def HS(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def KV(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def start_token_id(self) -> int | None:
        """The token that starts a text where nothing else does, or None."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def n_positions(self) -> int:
        """GPT-2's name of max_position_embeddings."""
        return self.max_position_embeddings

    @property
    def n_embd(self) -> int:
        """GPT-2's name of hidden_size."""
        return self.hidden_size

    @property
    def n_layer(self) -> int:
        """GPT-2's name of num_hidden_layers."""
        return self.num_hidden_layers

    @property
    def inner(self) -> int:
        """Channels inside the MLP."""
        return self.intermediate_size

    def stack(self) -> Stack:
        """Return the blocks of this model.

        Examples
        --------
        >>> len(gpt2c.LlamaConfig(num_hidden_layers=2).stack().layers)
        2
        """
        return _llama(self)


@functools.lru_cache(maxsize=8)
def _llama(config: LlamaConfig) -> Stack:
    C, std, eps = config.hidden_size, config.initializer_range, config.rms_norm_eps
    NH, KV, HS = config.num_attention_heads, config.KV, config.HS
    rope = Rope(config.max_position_embeddings, HS, config.rope_theta, config.rope_scaling)
    layers = [
        Layer(
            f"h.{i}",
            RMSNorm(f"h.{i}.ln_1", C, eps),
            Attention(f"h.{i}.attn", C, NH, std, KV=KV, HS=HS, bias=False, rope=rope),
            RMSNorm(f"h.{i}.ln_2", C, eps),
            SwiGLU(f"h.{i}.mlp", C, config.intermediate_size, std, bias=False),
        )
        for i in range(config.num_hidden_layers)
    ]
    head = config.head("wte" if config.tie_word_embeddings else "lm_head")
    embedding = Embedding(config.vocab_size, 0, C, std, head.tied)
    stack = Stack(embedding, layers, RMSNorm("ln_f", C, eps), head)
    if config.lora:
        config.lora.adapt(stack)
    return stack
