"""One layer of GPT-2, forward and backward: attention and MLP, each behind a layernorm, each added.

    y = x + attention(ln_1(x)),   out = y + mlp(ln_2(y))

Written on ops and named arrays: p parameters, g gradients, a activations, `h` the layer's prefix in
all three. Knows nothing about the rest of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpt2c.kernels.backend import Backend
from gpt2c.kernels.memory import Array

__all__ = [
    "batched",
    "layer_backward",
    "layer_forward",
    "layernorm",
    "layernorm_backward",
    "recompute_forward",
]

Arrays = Mapping[str, Array]


def batched(rows: Array, B: int) -> Array:
    """View (B*T, C) as (B, T, C)."""
    return rows.reshape(B, -1, rows.shape[-1])


def layernorm(ops: Backend, p: Arrays, a: Arrays, name: str, x: Array, eps: float) -> None:
    """Write a[name], a[name.mean], a[name.rstd]: the layernorm called `name` of x (N, C)."""
    weight, bias = p[name + ".weight"], p[name + ".bias"]
    ops.layernorm_forward(a[name], a[name + ".mean"], a[name + ".rstd"], x, weight, bias, eps)


def layernorm_backward(ops: Backend, p: Arrays, g: Arrays, a: Arrays, name: str, x: Array) -> None:
    """Add to the stream's gradient what comes back through a layernorm, whose own is a[name]."""
    weight, bias, stats = name + ".weight", name + ".bias", (a[name + ".mean"], a[name + ".rstd"])
    ops.layernorm_backward(a["d_stream"], g[weight], g[bias], a[name], x, p[weight], *stats)


def linear(ops: Backend, p: Arrays, out: Array, name: str, x: Array) -> None:
    """Write out (N, OC): the linear layer called `name` of x (N, C)."""
    ops.matmul_forward(out, x, p[name + ".weight"], p[name + ".bias"], None)


def hidden_forward(ops: Backend, p: Arrays, a: Arrays, h: str, x: Array, eps: float) -> None:
    """Run the layer on x (N, C) up to the MLP's hidden channels, all that backward needs."""
    B = len(a[h + "lse"])
    layernorm(ops, p, a, h + "ln_1", x, eps)
    linear(ops, p, a[h + "qkv"], h + "attn.c_attn", a[h + "ln_1"])
    att, qkv = batched(a[h + "att"], B), batched(a[h + "qkv"], B)
    ops.attention_forward(att, a[h + "lse"], None, None, qkv, 0)
    linear(ops, p, a["branch"], h + "attn.c_proj", a[h + "att"])
    ops.residual_forward(a[h + "middle"], x, a["branch"])
    layernorm(ops, p, a, h + "ln_2", a[h + "middle"], eps)
    linear(ops, p, a[h + "fc"], h + "mlp.c_fc", a[h + "ln_2"])
    ops.gelu_forward(a[h + "gelu"], a[h + "fc"])


def layer_forward(ops: Backend, p: Arrays, a: Arrays, h: str, x: Array, eps: float) -> Array:
    """Run the layer on x (N, C) and give its output, a[h + "out"]."""
    hidden_forward(ops, p, a, h, x, eps)
    linear(ops, p, a["branch"], h + "mlp.c_proj", a[h + "gelu"])
    ops.residual_forward(a[h + "out"], a[h + "middle"], a["branch"])
    return a[h + "out"]


def recompute_forward(
    ops: Backend, p: Arrays, a: Arrays, h: str, x: Array, eps: float, recompute: str | None
) -> None:
    """Compute again what the policy did not keep: by the same ops, so the same bits."""
    if recompute == "light":
        layernorm(ops, p, a, h + "ln_1", x, eps)
        layernorm(ops, p, a, h + "ln_2", a[h + "middle"], eps)
        ops.gelu_forward(a[h + "gelu"], a[h + "fc"])
    elif recompute == "full":
        hidden_forward(ops, p, a, h, x, eps)


def layer_backward(
    ops: Backend, p: Arrays, g: Arrays, a: Arrays, h: str, x: Array, accumulate: bool
) -> None:
    """Go back over the lines of `layer_forward` on x; a["d_stream"] goes from out's to x's.

    The gradient of an activation takes its memory where nothing needs the activation any more, so
    the layer's activations are gone afterwards. Without `accumulate` the weights' gradients are
    written. A skip connection's gradient goes both ways as it is: the stream's is the branch's.
    """
    B, stream = len(a[h + "lse"]), a["d_stream"]

    def linear_backward(d_source: Array, name: str, d_out: Array, source: Array) -> None:
        dw, db, weight = g[h + name + ".weight"], g[h + name + ".bias"], p[h + name + ".weight"]
        ops.matmul_backward(d_source, dw, db, d_out, source, weight, accumulate)

    ln_1, qkv, att = a[h + "ln_1"], a[h + "qkv"], a[h + "att"]
    ln_2, gelu = a[h + "ln_2"], a[h + "gelu"]
    linear_backward(gelu, "mlp.c_proj", stream, gelu)
    ops.gelu_backward(gelu, gelu, a[h + "fc"])
    linear_backward(ln_2, "mlp.c_fc", gelu, ln_2)
    layernorm_backward(ops, p, g, a, h + "ln_2", a[h + "middle"])
    d_att = ln_2  # att itself is needed beside its gradient
    linear_backward(d_att, "attn.c_proj", stream, att)
    d_att, qkv_3d = batched(d_att, B), batched(qkv, B)
    ops.attention_backward(qkv_3d, d_att, qkv_3d, batched(att, B), a[h + "lse"])
    linear_backward(ln_1, "attn.c_attn", qkv, ln_1)
    layernorm_backward(ops, p, g, a, h + "ln_1", x)
