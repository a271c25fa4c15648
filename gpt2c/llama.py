"""Llama: RMSNorm, rotary positions, SwiGLU and grouped queries where a GPT-2 has others."""

from __future__ import annotations

from typing import Literal

from gpt2c.causal_lm import CausalLM
from gpt2c.kernels.backend import Backend, BackendName, Precision
from gpt2c.kernels.checks import check_kind
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.quantized import Weights

__all__ = ["Llama"]


class Llama(CausalLM):
    """A Llama that can be trained, with the arguments, attributes and errors of a `GPT2`.

    Parameters
    ----------
    config : its shape
    seed, backend, recompute, threads, weights, precision : see `GPT2`

    Source: Touvron et al. 2023, arXiv:2302.13971.

    Examples
    --------
    >>> config = gpt2c.LlamaConfig(
    ...     vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    ... )
    >>> model = gpt2c.Llama(config, seed=1)
    >>> optimizer = gpt2c.AdamW(model, learning_rate=0.01)
    >>> ids = [104, 101, 108, 108, 111]
    >>> for step in range(50):
    ...     model.zero_grad()
    ...     loss = model.loss([ids[:-1]], [ids[1:]])
    ...     model.backward()
    ...     norm = optimizer.step()
    >>> loss < 0.1
    True
    >>> model.generate([ids[:2]], max_new_tokens=3, temperature=0)[0].tolist()
    [104, 101, 108, 108, 111]
    """

    config: LlamaConfig
    config_class = LlamaConfig

    def __init__(
        self,
        config: LlamaConfig,
        seed: int | None = 1337,
        backend: BackendName | Backend = "auto",
        recompute: Literal["light", "full"] | None = None,
        threads: int | None = None,
        weights: Weights = "fp32",
        precision: Precision = "fp32",
    ) -> None:
        check_kind("config", config, LlamaConfig, "a LlamaConfig")
        super().__init__(config, seed, backend, recompute, threads, weights, precision)
