"""PyTorch's version of every op and of a training step, for benchmarks only.

This file imports torch, so only what measures torch imports it. It uses PyTorch at its best: fused
attention and AdamW, gradients set to None, native backward functions. PyTorch allocates its
results, as in training: encoder_backward allocates (V, C) zeros too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from gpt2c.kernels.cases import EPS
from gpt2c.model.config import ModelConfig
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig

__all__ = ["torch_model", "torch_name", "torch_op", "torch_step"]

Call = Callable[[], list[Any]]
aten = torch.ops.aten


def torch_op(name: str, arguments: list[Any]) -> Call | None:
    """Return a call that computes op `name` and returns its outputs; None if PyTorch has none.

    It has no linear layer of float32 with 8-bit or 16-bit weights, and no attention with gpt2c's
    cache.

    Parameters
    ----------
    arguments : of the op, outputs first, as `gpt2c.kernels.cases` makes them; accumulated outputs
        are 0
    """
    make = _OPS.get(name)
    return make(*map(_tensor, arguments)) if make else None


def _tensor(argument: Any) -> Any:
    if not isinstance(argument, np.ndarray):
        return argument
    tensor = torch.from_numpy(argument)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _gradient(output: Any, sources: Any, d_output: Any) -> Call:
    return lambda: list(torch.autograd.grad(output, sources, d_output, retain_graph=True))


def _encoder_forward(
    out: Any, idx: Any, wte: Any, wpe: Any, scale: Any, offsets: Any, position: int
) -> Call | None:
    if offsets is not None or wpe is None:
        return None
    return lambda: [F.embedding(idx, wte) + wpe[position : position + idx.shape[1]]]


def _encoder_backward(dwte: Any, dwpe: Any, dout: Any, idx: Any, offsets: Any) -> Call | None:
    if offsets is not None or dwte is None:
        return None

    def call() -> list[Any]:
        token = aten.embedding_dense_backward(dout, idx, len(dwte), -1, False)
        return [token, F.pad(dout.sum(0), (0, 0, 0, len(dwpe) - dout.shape[1]))]

    return call


def _layernorm_backward(*tensors: Any) -> Call:
    _, _, dbias, dout, x, weight, mean, rstd = tensors
    stats = (mean[:, None], rstd[:, None])
    return lambda: list(
        aten.native_layer_norm_backward(
            dout, x, [x.shape[1]], *stats, weight, dbias, [True, True, True]
        )
    )


def _rmsnorm_backward(dx: Any, dweight: Any, dout: Any, x: Any, weight: Any, rstd: Any) -> Call:
    x.requires_grad_()
    weight.requires_grad_()
    return _gradient(F.rms_norm(x, [x.shape[1]], weight, EPS), (x, weight), dout)


def _attention(qkv: Any, C: int, NH: int) -> Any:
    B, T, W = qkv.shape
    q, k, v = (
        part.view(B, T, -1, C // NH).transpose(1, 2)
        for part in qkv.split([C, (W - C) // 2, (W - C) // 2], dim=2)
    )
    grouped = k.shape[1] < NH
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(B, T, C)


def _attention_forward(
    out: Any,
    lse: Any,
    keys: Any,
    values: Any,
    key_scales: Any,
    value_scales: Any,
    qkv: Any,
    offsets: Any,
    position: int,
    dropout: float,
    key: int,
    first: int,
    precision: str,
) -> Call | None:
    if keys is not None or offsets is not None or dropout or precision != "fp32":
        return None
    return lambda: [_attention(qkv, out.shape[2], lse.shape[1]), *[None] * 5]


def _rope(x: Any, cos: Any, sin: Any, offsets: None, heads: int, position: int) -> Any:
    (B, T, C), D = x.shape, cos.shape[1]
    c, s = (torch.cat([t, t], 1)[position : position + T, None] for t in (cos, sin))
    qk, v = x.view(B, T, -1, 2 * D).tensor_split([heads], dim=2)
    half = torch.cat([-qk[..., D:], qk[..., :D]], 3)
    return torch.cat([qk * c + half * s, v], 2).view(B, T, C)


def _matmul_forward(
    out: Any, x: Any, weight: Any, bias: Any, scale: Any, precision: str
) -> Call | None:
    if weight.dtype != x.dtype or precision != "fp32":
        return None
    return lambda: [F.linear(x, weight, bias)]


def _matmul_backward(
    dx: Any,
    dweight: Any,
    dbias: Any,
    dout: Any,
    x: Any,
    weight: Any,
    scale: Any,
    accumulate: bool,
    precision: str,
    add: bool,
) -> Call | None:
    if weight.dtype != x.dtype or precision != "fp32":
        return None
    return lambda: [dout @ weight, dout.t() @ x, dout.sum(0)]


def _attention_backward(
    dqkv: Any,
    dout: Any,
    qkv: Any,
    out: Any,
    lse: Any,
    offsets: Any,
    dropout: float,
    key: int,
    first: int,
    precision: str,
) -> Call | None:
    if offsets is not None or dropout or precision != "fp32":
        return None
    qkv.requires_grad_()
    return _gradient(_attention(qkv, out.shape[2], lse.shape[1]), qkv, dout)


def _swiglu(x: Any) -> Any:
    gate, up = x.chunk(2, dim=1)
    return F.silu(gate) * up


def _crossentropy_backward(
    dlogits: Any, logits: Any, lse: Any, targets: Any, weights: Any, scale: Any
) -> Call:
    logits.requires_grad_()
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none") * scale
    loss = losses.sum() if weights is None else losses @ weights
    return _gradient(loss, logits, torch.ones(()))


def _adamw_update(param: Any, m: Any, v: Any, grad: Any, *scalars: Any) -> Call:
    lr, beta1, beta2, eps, weight_decay, t, _ = scalars
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    steps = [torch.tensor(float(t))]

    def call() -> list[Any]:
        torch._fused_adamw_(
            [param], [grad], [m], [v], [], steps, amsgrad=False, maximize=False, **options
        )
        return [param, m, v]

    return call


_OPS: dict[str, Callable[..., Call | None]] = {
    "encoder_forward": _encoder_forward,
    "encoder_backward": _encoder_backward,
    "layernorm_forward": lambda out, mean, rstd, x, weight, bias, eps: (
        lambda: [t.squeeze(1) if t.shape[1:] == (1,) else t for t in torch.native_layer_norm(
            x, [x.shape[1]], weight, bias, eps)]
    ),
    "layernorm_backward": _layernorm_backward,
    "rmsnorm_forward": lambda out, rstd, x, weight, eps: (
        lambda: [F.rms_norm(x, [x.shape[1]], weight, eps), None]
    ),
    "rmsnorm_backward": _rmsnorm_backward,
    "matmul_forward": _matmul_forward,
    "matmul_backward": _matmul_backward,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "rope_forward": lambda out, *given: lambda: [_rope(*given)],
    "rope_backward": lambda dqkv, dout, *tables: (
        _gradient(_rope(dqkv.requires_grad_(), *tables), dqkv, dout)
    ),
    "gelu_forward": lambda out, x: lambda: [F.gelu(x, approximate="tanh")],
    "gelu_backward": lambda dx, dout, x: (
        lambda: [aten.gelu_backward(dout, x, approximate="tanh")]
    ),
    "swiglu_forward": lambda out, x: lambda: [_swiglu(x)],
    "swiglu_backward": lambda dx, dout, x: _gradient(_swiglu(x.requires_grad_()), x, dout),
    "residual_forward": lambda out, x, branch: lambda: [x + branch],
    "crossentropy_forward": lambda losses, lse, logits, targets: (
        lambda: [F.cross_entropy(logits, targets, ignore_index=-1, reduction="none"), None]
    ),
    "crossentropy_backward": _crossentropy_backward,
    "adamw_update": _adamw_update,
    "global_norm": lambda grad: lambda: [torch.linalg.vector_norm(grad)],
}  # fmt: skip


class _Block(torch.nn.Module):
    """One layer, as gpt2c.model.stack.Layer."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        C, self.NH = config.n_embd, config.n_head
        self.ln_1 = torch.nn.LayerNorm(C, config.layer_norm_epsilon)
        self.c_attn, self.c_proj = torch.nn.Linear(C, 3 * C), torch.nn.Linear(C, C)
        self.ln_2 = torch.nn.LayerNorm(C, config.layer_norm_epsilon)
        self.c_fc, self.mlp_proj = (
            torch.nn.Linear(C, config.inner),
            torch.nn.Linear(config.inner, C),
        )

    def forward(self, x: Any) -> Any:
        x = x + self.c_proj(_attention(self.c_attn(self.ln_1(x)), x.shape[2], self.NH))
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.mlp_proj(hidden)


class _GPT2(torch.nn.Module):
    """GPT-2."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = torch.nn.Embedding(config.n_positions, config.n_embd)
        self.h = torch.nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f = torch.nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.head = self.wte.weight

    def forward(self, idx: Any, targets: Any) -> Any:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        return _loss(self.ln_f(x), self.head, targets)


class _LlamaBlock(torch.nn.Module):
    """One layer of a Llama, with q, k, v and gate, up as one matrix each."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, F_, HS, self.NH = config.n_embd, config.inner, config.HS, config.num_attention_heads
        KV = config.KV
        self.turned = self.NH + KV
        self.ln_1 = torch.nn.RMSNorm(C, config.rms_norm_eps)
        self.c_attn = torch.nn.Linear(C, (self.NH + 2 * KV) * HS, bias=False)
        self.c_proj = torch.nn.Linear(self.NH * HS, C, bias=False)
        self.ln_2 = torch.nn.RMSNorm(C, config.rms_norm_eps)
        self.c_fc = torch.nn.Linear(C, 2 * F_, bias=False)
        self.mlp_proj = torch.nn.Linear(F_, C, bias=False)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        qkv = _rope(self.c_attn(self.ln_1(x)), cos, sin, None, self.turned, 0)
        x = x + self.c_proj(_attention(qkv, self.c_proj.in_features, self.NH))
        gate, up = self.c_fc(self.ln_2(x)).chunk(2, dim=-1)
        return x + self.mlp_proj(F.silu(gate) * up)


class _Llama(torch.nn.Module):
    """Llama."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.h = torch.nn.ModuleList(_LlamaBlock(config) for _ in range(config.n_layer))
        self.ln_f = torch.nn.RMSNorm(config.n_embd, config.rms_norm_eps)
        self.head = self.wte.weight
        if not config.tie_word_embeddings:
            self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.head = self.lm_head.weight
        pairs = torch.arange(0, config.HS, 2) / config.HS
        angles = torch.arange(config.n_positions)[:, None] * config.rope_theta**-pairs
        self.tables = angles.cos(), angles.sin()

    def forward(self, idx: Any, targets: Any) -> Any:
        x = self.wte(idx)
        for block in self.h:
            x = block(x, *self.tables)
        return _loss(self.ln_f(x), self.head, targets)


def _loss(x: Any, head: Any, targets: Any) -> Any:
    logits = F.linear(x, head)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def torch_name(name: str) -> str:
    """Return the name that a parameter has in PyTorch's model."""
    return re.sub(r"\.(attn|mlp)\.", ".", name.replace("mlp.c_proj", "mlp_proj"))


def torch_model(config: ModelConfig, parameters: Mapping[str, NDArray[Any]]) -> torch.nn.Module:
    """Return PyTorch's model of a config, with gpt2c's parameters."""
    model: torch.nn.Module
    if isinstance(config, LlamaConfig):
        model = _Llama(config)
    else:
        assert isinstance(config, GPT2Config)
        model = _GPT2(config)
    state = model.state_dict()
    for name, parameter in parameters.items():
        state[torch_name(name)].copy_(torch.from_numpy(parameter))
    return model


def torch_step(
    config: ModelConfig,
    parameters: Mapping[str, NDArray[Any]],
    idx: NDArray[Any],
    targets: NDArray[Any],
    learning_rate: float,
    grad_clip: float,
    compiled: bool,
    bf16: bool,
) -> Callable[[], float]:
    """Return a call that does a training step, with gpt2c.AdamW's defaults, and its loss."""
    model = torch_model(config, parameters)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    loss_of = torch.compile(model) if compiled else model
    x, y = torch.from_numpy(idx).long(), torch.from_numpy(targets).long()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        return float(loss.item())

    return step
