"""One layer of GPT-2, forward and backward: attention and MLP, each behind a layernorm, each added.

    y = x + attention(ln_1(x)),   out = y + mlp(ln_2(y))

Written on ops and named arrays: p parameters, g gradients, a activations; `h` is the layer's prefix
in p and g, `s` its prefix in a. Knows nothing about the rest of the model. Used by model.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpt2c.backend import Backend
from gpt2c.memory import Array

Arrays = Mapping[str, Array]


def batched(rows: Array, B: int) -> Array:
    """View (B*T, C) as (B, T, C)."""
    return rows.reshape(B, -1, rows.shape[-1])


def layernorm(ops: Backend, p: Arrays, a: Arrays, name: str, s: str, x: Array, eps: float) -> None:
    """Write a[s], a[s.mean], a[s.rstd]: the layernorm called `name` of x (N, C)."""
    weight, bias = p[name + ".weight"], p[name + ".bias"]
    ops.layernorm_forward(a[s], a[s + ".mean"], a[s + ".rstd"], x, weight, bias, eps)


def layernorm_backward(
    ops: Backend, p: Arrays, g: Arrays, a: Arrays, name: str, s: str, x: Array
) -> None:
    """Add to the stream's gradient what comes back through a layernorm, whose own is d_ln."""
    weight, bias = name + ".weight", name + ".bias"
    mean, rstd = a[s + ".mean"], a[s + ".rstd"]
    ops.layernorm_backward(a["d_stream"], g[weight], g[bias], a["d_ln"], x, p[weight], mean, rstd)


def layer_forward(
    ops: Backend, p: Arrays, a: Arrays, h: str, s: str, x: Array, eps: float
) -> Array:
    """Run the layer on x (N, C) and give its output, a[s + "out"]."""
    B = len(a[s + "lse"])

    def linear(out: str, name: str, source: str) -> None:
        ops.matmul_forward(a[out], a[source], p[h + name + ".weight"], p[h + name + ".bias"])

    layernorm(ops, p, a, h + "ln_1", s + "ln_1", x, eps)
    linear(s + "qkv", "attn.c_attn", s + "ln_1")
    ops.attention_forward(batched(a[s + "att"], B), a[s + "lse"], batched(a[s + "qkv"], B))
    linear("branch", "attn.c_proj", s + "att")
    ops.residual_forward(a[s + "middle"], x, a["branch"])
    layernorm(ops, p, a, h + "ln_2", s + "ln_2", a[s + "middle"], eps)
    linear(s + "fc", "mlp.c_fc", s + "ln_2")
    ops.gelu_forward(a[s + "gelu"], a[s + "fc"])
    linear("branch", "mlp.c_proj", s + "gelu")
    ops.residual_forward(a[s + "out"], a[s + "middle"], a["branch"])
    return a[s + "out"]


def layer_backward(ops: Backend, p: Arrays, g: Arrays, a: Arrays, h: str, x: Array) -> None:
    """Go back over the lines of `layer_forward` on x; a["d_stream"] goes from out's to x's."""
    B, stream = len(a[h + "lse"]), a["d_stream"]

    def linear(d_source: str, name: str, d_out: str, source: str) -> None:
        weight, bias = h + name + ".weight", h + name + ".bias"
        ops.matmul_backward(a[d_source], g[weight], g[bias], a[d_out], a[h + source], p[weight])

    ops.residual_backward(stream, a["d_branch"], stream)
    linear("d_fc", "mlp.c_proj", "d_branch", "gelu")
    ops.gelu_backward(a["d_fc"], a["d_fc"], a[h + "fc"])
    linear("d_ln", "mlp.c_fc", "d_fc", "ln_2")
    layernorm_backward(ops, p, g, a, h + "ln_2", h + "ln_2", a[h + "middle"])
    ops.residual_backward(stream, a["d_branch"], stream)
    linear("d_att", "attn.c_proj", "d_branch", "att")
    d_qkv, d_att = batched(a["d_qkv"], B), batched(a["d_att"], B)
    qkv, att = batched(a[h + "qkv"], B), batched(a[h + "att"], B)
    ops.attention_backward(d_qkv, d_att, qkv, att, a[h + "lse"])
    linear("d_ln", "attn.c_attn", "d_qkv", "ln_1")
    layernorm_backward(ops, p, g, a, h + "ln_1", h + "ln_1", x)
