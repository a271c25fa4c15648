"""GPT-2 in plain NumPy: forward, loss, backward, AdamW and greedy text. The first file to read.

    python -m gpt2c.plain       learns a sentence by heart and writes it

Nothing here is fast, and nothing saves memory. The rest of gpt2c computes the same; tests compare.
Parameters are a dict with Hugging Face's names; the weight (OC, C) of a layer has a row per output.
Letters: B sequences, T tokens of each, C channels, V vocabulary, NH heads of HS = C / NH channels.

Source: Radford et al. 2019 (GPT-2); Vaswani et al. 2017, arXiv:1706.03762.
"""

# mypy: no-warn-return-any
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "adamw", "forward", "generate", "init", "loss_and_gradients", "main"]

Array = NDArray[Any]
Arrays = dict[str, Array]


def init(V: int, T: int, C: int, layers: int, rng: np.random.Generator) -> Arrays:
    """Return fresh parameters: small random weights, biases of 0, gains of 1."""
    linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}  # q, k and v; the heads' output
    linear |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    p = {"wte.weight": rng.normal(0, 0.02, (V, C)), "wpe.weight": rng.normal(0, 0.02, (T, C))}
    norms = ["ln_f."]
    for h in (f"h.{layer}." for layer in range(layers)):
        for name, shape in linear.items():
            p[f"{h}{name}.weight"] = rng.normal(0, 0.02, shape)
            p[f"{h}{name}.bias"] = np.zeros(shape[0])
        norms += [f"{h}ln_1.", f"{h}ln_2."]
    for name in norms:
        p[f"{name}weight"], p[f"{name}bias"] = np.ones(C), np.zeros(C)
    return p


# ---- the parts, each with its backward: dx is the gradient of the loss with respect to x ---------


def linear(p: Arrays, name: str, x: Array) -> Array:
    """Mix channels: (B, T, C) -> (B, T, OC)."""
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def linear_backward(p: Arrays, g: Arrays, name: str, dout: Array, x: Array) -> Array:
    """Write the gradients of the parameters into g; return dx (B, T, C)."""
    g[name + ".weight"] = np.einsum("bto,btc->oc", dout, x)
    g[name + ".bias"] = dout.sum((0, 1))
    return dout @ p[name + ".weight"]


def layernorm(p: Arrays, name: str, x: Array) -> Array:
    """Scale each token's channels to mean 0 and variance 1, then apply a gain and bias to each."""
    norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return norm * p[name + ".weight"] + p[name + ".bias"]  # (B, T, C)


def layernorm_backward(p: Arrays, g: Arrays, name: str, dout: Array, x: Array) -> Array:
    """Write the gradients of gain and bias into g; return dx (B, T, C)."""
    std = np.sqrt(x.var(-1, keepdims=True) + 1e-5)  # (B, T, 1)
    norm = (x - x.mean(-1, keepdims=True)) / std
    g[name + ".weight"], g[name + ".bias"] = (dout * norm).sum((0, 1)), dout.sum((0, 1))
    dnorm = dout * p[name + ".weight"]
    # a shift or a stretch of all channels changes nothing, so it has no gradient
    shift, stretch = dnorm.mean(-1, keepdims=True), (dnorm * norm).mean(-1, keepdims=True)
    return (dnorm - shift - norm * stretch) / std


def heads(qkv: Array, n_head: int) -> Array:
    """Return q, k and v of each head, (3, B, NH, T, HS), of qkv (B, T, 3C)."""
    B, T, C3 = qkv.shape
    return qkv.reshape(B, T, 3, n_head, C3 // 3 // n_head).transpose(2, 0, 3, 1, 4)


def attention_weights(q: Array, k: Array) -> Array:
    """Return each token's weights of the tokens up to itself, (B, NH, T, T); rows sum to 1."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf  # no look into the future
    return softmax(scores)


def attention(qkv: Array, n_head: int) -> Array:
    """Average over the tokens up to each one, by its weights: (B, T, 3C) -> (B, T, C)."""
    q, k, v = heads(qkv, n_head)
    out = attention_weights(q, k) @ v  # (B, NH, T, HS)
    return out.swapaxes(1, 2).reshape(*qkv.shape[:2], -1)


def attention_backward(dout: Array, qkv: Array, n_head: int) -> Array:
    """Return dqkv (B, T, 3C)."""
    q, k, v = heads(qkv, n_head)
    w = attention_weights(q, k)
    dout = dout.reshape(*dout.shape[:2], n_head, -1).swapaxes(1, 2)  # (B, NH, T, HS)
    dw = dout @ v.swapaxes(-1, -2)
    dscores = w * (dw - (w * dw).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    dqkv = np.stack([dscores @ k, dscores.swapaxes(-1, -2) @ q, w.swapaxes(-1, -2) @ dout])
    return dqkv.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)


def gelu(x: Array) -> Array:
    """Return GELU in its tanh form: near x for large x, near 0 for very negative x."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_backward(dout: Array, x: Array) -> Array:
    """Return dx, of the shape of x."""
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return dout * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope)


def softmax(x: Array) -> Array:
    """Turn scores into probabilities: positive, and the last axis sums to 1."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- the model -----------------------------------------------------------------------------------


def forward(p: Arrays, idx: Array, n_head: int) -> tuple[Array, list[Array]]:
    """Return logits (B, T, V) of the token after each of idx (B, T), and what backward needs."""
    x = p["wte.weight"][idx] + p["wpe.weight"][: idx.shape[1]]  # (B, T, C)
    kept = []
    for layer in range(sum(name.endswith("ln_1.bias") for name in p)):
        h = f"h.{layer}."
        qkv = linear(p, h + "attn.c_attn", layernorm(p, h + "ln_1", x))  # (B, T, 3C)
        middle = x + linear(p, h + "attn.c_proj", attention(qkv, n_head))
        inner = linear(p, h + "mlp.c_fc", layernorm(p, h + "ln_2", middle))  # (B, T, 4C)
        kept += [x, qkv, middle, inner]
        x = middle + linear(p, h + "mlp.c_proj", gelu(inner))
    kept.append(x)
    return layernorm(p, "ln_f", x) @ p["wte.weight"].T, kept


def loss_and_gradients(p: Arrays, idx: Array, targets: Array, n_head: int) -> tuple[float, Arrays]:
    """Return the mean loss in nats per token, and its gradient for each parameter.

    targets (B, T) is the token that follows each of idx (B, T); -1 does not count.
    """
    logits, kept = forward(p, idx, n_head)
    dlogits, counted = softmax(logits), targets >= 0
    rows = (*np.nonzero(counted), targets[counted])  # the probability of each right token
    loss = -np.log(dlogits[rows]).mean()
    dlogits[rows] -= 1  # softmax - onehot
    dlogits *= counted[..., None] / counted.sum()

    g: Arrays = {}
    x = kept.pop()
    head = np.einsum("btv,btc->vc", dlogits, layernorm(p, "ln_f", x))  # wte is the last layer, too
    dx = layernorm_backward(p, g, "ln_f", dlogits @ p["wte.weight"], x)
    for layer in reversed(range(len(kept) // 4)):
        h = f"h.{layer}."
        x, qkv, middle, inner = kept[4 * layer : 4 * layer + 4]
        # x = middle + c_proj(gelu(c_fc(ln_2(middle)))): the gradient goes both ways
        d = linear_backward(p, g, h + "mlp.c_proj", dx, gelu(inner))
        d = gelu_backward(d, inner)
        d = linear_backward(p, g, h + "mlp.c_fc", d, layernorm(p, h + "ln_2", middle))
        dx = dx + layernorm_backward(p, g, h + "ln_2", d, middle)
        # middle = x + c_proj(attention(c_attn(ln_1(x))))
        d = linear_backward(p, g, h + "attn.c_proj", dx, attention(qkv, n_head))
        d = attention_backward(d, qkv, n_head)
        d = linear_backward(p, g, h + "attn.c_attn", d, layernorm(p, h + "ln_1", x))
        dx = dx + layernorm_backward(p, g, h + "ln_1", d, x)
    g["wte.weight"], g["wpe.weight"] = head, np.zeros_like(p["wpe.weight"])
    np.add.at(g["wte.weight"], idx, dx)
    g["wpe.weight"][: idx.shape[1]] = dx.sum(0)
    return float(loss), g


def adamw(p: Arrays, g: Arrays, m: Arrays, v: Arrays, t: int, learning_rate: float = 1e-3) -> None:
    """Update p in place, step t = 1, 2, ...; m and v are running means that begin at 0.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    for name in p:
        m[name] = 0.9 * m[name] + 0.1 * g[name]
        v[name] = 0.95 * v[name] + 0.05 * g[name] ** 2
        step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
        decay = 0.1 * p[name] if p[name].ndim == 2 else 0  # matrices only
        p[name] -= learning_rate * (step + decay)


def generate(p: Arrays, idx: list[int], count: int, n_head: int) -> list[int]:
    """Return idx and the `count` likeliest tokens after it, one at a time."""
    for _ in range(count):
        context = np.array([idx[-len(p["wpe.weight"]) :]])
        idx = [*idx, int(forward(p, context, n_head)[0][0, -1].argmax())]
    return idx


def main() -> None:
    """Learn a sentence by heart, byte by byte, and write it."""
    text = np.frombuffer(b"A model reads what came before and guesses what comes next. ", np.uint8)
    p = init(V=128, T=64, C=32, layers=2, rng=np.random.default_rng(0))
    m, v = ({name: np.zeros_like(array) for name, array in p.items()} for _ in range(2))
    for t in range(1, 201):
        loss, g = loss_and_gradients(p, text[None, :-1], text[None, 1:].astype(int), n_head=4)
        adamw(p, g, m, v, t, learning_rate=1e-2)
        if t % 40 == 0:
            print(f"step {t}: loss {loss:.3f} nats per token")
    print(bytes(generate(p, list(text[:8]), 51, n_head=4)).decode())


if __name__ == "__main__":
    main()
