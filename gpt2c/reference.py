"""The specification: every op of GPT-2, forward and backward, in plain NumPy.

The C kernels have the same ops (csrc/gpt2c.h), and the tests compare them with this file. They are
the backend "numpy", too. It computes in the dtype of the arrays it is given: float32 to train,
float64 for gradient checks. It is written to be read: attention holds its whole T x T matrix, and
nothing is blocked or fused. The ops that only read a model stand in `gpt2c.reference_reading`.

Every op writes into arrays that the caller made, outputs first; sizes come from their shapes.
Gradients of parameters (dweight, dbias, dwte, dwpe) are accumulated (+=), because batches add up.
Activations and their gradients are written (=), except the dx of `layernorm_backward`. Each
backward function quotes the line that it differentiates; dy is the gradient of the loss by y.

Letters: B batch, T time, C channels, V vocabulary, NH heads, HS = C/NH head size, OC output
channels, N = B*T rows.

Knows nothing about models, backends or C, and checks nothing that NumPy does not check.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.reference_reading import cache_attention_forward, linear_forward, matrix_transpose  # noqa: F401

Array = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715  # keeps the tanh form within 5e-4 of x * Phi(x)

# ---- encoder: token + position embedding ---------------------------------------------------------


def encoder_forward(out: Array, idx: IntArray, wte: Array, wpe: Array) -> None:
    """Look up the vector of each token and add the vector of its position.

    out = wte[idx] + wpe[0..T)

    Parameters
    ----------
    out : (B, T, C), written
    idx : (B, T) int32, token ids in [0, V)
    wte, wpe : (V, C) token vectors, (at least T, C) position vectors

    Source: Radford et al. 2019 (GPT-2); names follow karpathy/llm.c.
    """
    out[...] = wte[idx] + wpe[: idx.shape[1]]


def encoder_backward(dwte: Array, dwpe: Array, dout: Array, idx: IntArray) -> None:
    """Add the gradient of each output row to the token vector and the position vector it came from.

    Parameters
    ----------
    dwte, dwpe : (V, C), (at least T, C), accumulated
    dout : (B, T, C)
    idx : (B, T) int32
    """
    # out = wte[idx] + wpe[0..T): a row of wte that several tokens use gets the sum of their
    # gradients, which dwte[idx] += dout would not do (it keeps one of them)
    np.add.at(dwte, idx, dout)
    dwpe[: idx.shape[1]] += dout.sum(axis=0)


# ---- layernorm -----------------------------------------------------------------------------------


def layernorm_forward(
    out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array, eps: float
) -> None:
    """Normalise each row of `x` to zero mean and unit variance, then scale and shift.

    out = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)      (biased variance)

    Parameters
    ----------
    out : (N, C), written
    mean, rstd : (N,), written, kept for the backward pass
    x : (N, C)
    weight, bias : (C,)
    eps : added to the variance (not to its root)

    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    mean[...] = x.mean(axis=1)
    centred = x - mean[:, None]
    rstd[...] = 1 / np.sqrt(np.square(centred).mean(axis=1) + eps)
    out[...] = centred * rstd[:, None] * weight + bias


def layernorm_backward(
    dx: Array,
    dweight: Array,
    dbias: Array,
    dout: Array,
    x: Array,
    weight: Array,
    mean: Array,
    rstd: Array,
) -> None:
    """Add the gradients of layernorm to those of its input and its parameters.

    dx += (dnorm - mean(dnorm) - norm * mean(dnorm * norm)) * rstd
    norm = (x - mean) * rstd,   dnorm = dout * weight

    Parameters
    ----------
    dx : (N, C), accumulated: `x` is the residual stream, and `dx` already holds the gradient that
        came past the branch
    dweight, dbias : (C,), accumulated
    dout, x : (N, C)
    weight : (C,)
    mean, rstd : (N,), from the forward pass
    """
    norm = (x - mean[:, None]) * rstd[:, None]
    # out = norm * weight + bias
    dnorm = dout * weight
    dweight += (dout * norm).sum(axis=0)
    dbias += dout.sum(axis=0)
    # norm = (x - mean(x)) * rstd(x): a row of norm can neither shift nor stretch, whatever x does,
    # so the parts of dnorm that ask for that are taken out
    shift = dnorm.mean(axis=1, keepdims=True)
    stretch = (dnorm * norm).mean(axis=1, keepdims=True)
    dx += (dnorm - shift - norm * stretch) * rstd[:, None]


# ---- matmul --------------------------------------------------------------------------------------


def matmul_forward(out: Array, x: Array, weight: Array, bias: Array | None) -> None:
    """Apply a linear layer to each row.

    out = x weight^T + bias

    Parameters
    ----------
    out : (N, OC), written
    x : (N, C)
    weight : (OC, C), one row for each output channel
    bias : (OC,), or None for none
    """
    out[...] = x @ weight.T
    if bias is not None:
        out += bias


def matmul_backward(
    dx: Array,
    dweight: Array,
    dbias: Array | None,
    dout: Array,
    x: Array,
    weight: Array,
    accumulate: bool = True,
) -> None:
    """Add the gradients of a linear layer's parameters; write that of its input.

    dweight += dout^T x,   dbias += the column sums of dout,   dx = dout weight

    Parameters
    ----------
    dx : (N, C), written; may be x
    dweight : (OC, C), accumulated
    dbias : (OC,), accumulated, or None where the layer has no bias
    dout : (N, OC)
    x, weight : (N, C), (OC, C)
    accumulate : False writes dweight and dbias, which spares setting them to 0 before
    """
    # out = x weight^T + bias
    dweight[...] = dout.T @ x + (dweight if accumulate else 0)
    if dbias is not None:
        dbias[...] = dout.sum(axis=0) + (dbias if accumulate else 0)
    dx[...] = dout @ weight


# ---- attention: causal, multi-head ---------------------------------------------------------------


def _heads(rows: Array, NH: int) -> Array:
    """View (B, T, C) as (B, NH, T, HS); what is written to the view is written to `rows`."""
    return rows.reshape(*rows.shape[:2], NH, -1).transpose(0, 2, 1, 3)


def _causal_scores(q: Array, k: Array) -> Array:
    """Give q k^T / sqrt(HS), (B, NH, T, T), with -inf where the key comes after the query."""
    T, HS = q.shape[2:]
    scores = q @ k.swapaxes(2, 3) / math.sqrt(HS)
    scores[..., np.triu(np.ones((T, T), dtype=np.bool_), k=1)] = -np.inf
    return scores


def attention_forward(out: Array, lse: Array, qkv: Array) -> None:
    """Let each token take a weighted mean of the values of the tokens up to itself, head by head.

    p = softmax(scores),   scores = q k^T / sqrt(HS) for keys not later than the query,   out = p v

    Parameters
    ----------
    out : (B, T, C), written
    lse : (B, NH, T), written: log(sum(exp(scores))) over the keys, which is all that the backward
        pass needs of the T x T scores
    qkv : (B, T, 3C), a row holds the q, then the k, then the v of all NH heads

    Source: Vaswani et al. 2017, arXiv:1706.03762; to keep only lse, Dao et al. 2022,
    arXiv:2205.14135.
    """
    q, k, v = (_heads(part, lse.shape[1]) for part in np.split(qkv, 3, axis=2))
    scores = _causal_scores(q, k)
    largest = scores.max(axis=3, keepdims=True)  # taken out first, so that exp cannot overflow
    p = np.exp(scores - largest)
    total = p.sum(axis=3, keepdims=True)
    lse[...] = (largest + np.log(total))[..., 0]
    _heads(out, lse.shape[1])[...] = (p / total) @ v


def attention_backward(dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array) -> None:
    """Write the gradient of q, k and v; the softmax is made again from `lse`.

    dv = p^T dout,   dscores = p * (dout v^T - sum(dout * out)),   p = exp(scores - lse)
    dq = dscores k / sqrt(HS),   dk = dscores^T q / sqrt(HS)

    Parameters
    ----------
    dqkv : (B, T, 3C), written; may be qkv
    dout : (B, T, C)
    qkv, out, lse : what the forward pass read and wrote
    """
    NH = lse.shape[1]
    q, k, v = (_heads(part, NH) for part in np.split(qkv, 3, axis=2))
    dq, dk, dv = (_heads(part, NH) for part in np.split(dqkv, 3, axis=2))
    dout, out = _heads(dout, NH), _heads(out, NH)
    p = np.exp(_causal_scores(q, k) - lse[..., None])
    # out = p v
    dp = dout @ v.swapaxes(2, 3)
    # p = softmax(scores): dscores = p * (dp - sum(p * dp)), where the sum over keys of p * dp
    # equals the sum over channels of dout * out
    dscores = p * (dp - (dout * out).sum(axis=3, keepdims=True))
    # scores = q k^T / sqrt(HS)
    dscores /= math.sqrt(q.shape[3])
    dq[...], dk[...] = dscores @ k, dscores.swapaxes(2, 3) @ q
    dv[...] = p.swapaxes(2, 3) @ dout


# ---- elementwise ---------------------------------------------------------------------------------


def gelu_forward(out: Array, x: Array) -> None:
    """Pass large values, stop very negative ones, bend smoothly between: the tanh form of GELU.

    out = x/2 * (1 + tanh(u)),   u = sqrt(2/pi) * (x + 0.044715 x^3)

    Parameters
    ----------
    out, x : one shape, any; `out` is written

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    out[...] = 0.5 * x * (1 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x)))


def gelu_backward(dx: Array, dout: Array, x: Array) -> None:
    """Write the gradient of GELU's input.

    dx = dout * ((1 + tanh(u)) / 2 + x/2 * (1 - tanh(u)^2) * du/dx)
    du/dx = sqrt(2/pi) * (1 + 3 * 0.044715 x^2)

    Parameters
    ----------
    dx, dout, x : one shape, any; `dx` is written and may be `dout`
    """
    # out = x/2 * (1 + tanh(u))
    tanh = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))
    du = GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    dx[...] = dout * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * du)


def residual_forward(out: Array, x: Array, branch: Array) -> None:
    """Add a branch to the residual stream.

    out = x + branch

    Parameters
    ----------
    out, x, branch : one shape, any; `out` is written and may be `x`

    Source: He et al. 2015, arXiv:1512.03385.
    """
    out[...] = x + branch


# ---- softmax + cross-entropy ---------------------------------------------------------------------


def crossentropy_forward(losses: Array, lse: Array, logits: Array, targets: IntArray) -> None:
    """Measure how surprised the softmax of each row of logits is by that row's target.

    losses = lse - logits[target] = -log(softmax(logits)[target]),   lse = log(sum(exp(logits)))

    Parameters
    ----------
    losses : (N,), written, in nats; 0 where the target is ignored
    lse : (N,), written, kept for the backward pass
    logits : (N, V)
    targets : (N,) int32, in [0, V), or -1 to ignore the row
    """
    largest = logits.max(axis=1)  # taken out first, so that exp cannot overflow
    lse[...] = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    # as an index, -1 reads the last column; the next line drops what that gives
    losses[...] = lse - logits[np.arange(len(targets)), targets]
    losses[targets == -1] = 0


def crossentropy_backward(
    dlogits: Array, logits: Array, lse: Array, targets: IntArray, scale: float
) -> None:
    """Write the gradient of the logits, for a loss that is `scale` times the sum of the losses.

    dlogits = (softmax(logits) - onehot(target)) * scale, and 0 in rows whose target is ignored

    Parameters
    ----------
    dlogits : (N, V), written; may be `logits`
    logits, lse, targets : what the forward pass read and wrote
    scale : 1 / (number of rows that count) makes the loss their mean
    """
    # losses = lse - logits[target], and d(lse) / d(logits) is the softmax
    gradient = np.exp(logits - lse[:, None])
    gradient[np.arange(len(targets)), targets] -= 1
    gradient[targets == -1] = 0
    gradient *= scale
    dlogits[...] = gradient


# ---- optimizer -----------------------------------------------------------------------------------


def adamw_update(
    param: Array,
    m: Array,
    v: Array,
    grad: Array,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    t: int,
    grad_scale: float,
) -> None:
    """Take one step of Adam with decoupled weight decay.

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,   g = grad * grad_scale
    m_hat = m / (1 - beta1^t),   v_hat = v / (1 - beta2^t)
    param -= learning_rate * (m_hat / (sqrt(v_hat) + eps) + weight_decay * param)

    Parameters
    ----------
    param, m, v, grad : one shape, any; all but `grad` are updated
    m, v : running means of g and of g^2, zeros before the first step
    learning_rate, beta1, beta2, eps : as in the paper
    weight_decay : multiplied by the learning rate and by the param from before the step
    t : the number of this step, from 1
    grad_scale : applied to `grad` first, for clipping

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    g = grad * grad_scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    # m and v start from zero, so that after t steps they hold only this share of a full mean
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    param -= learning_rate * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param)


def global_norm(grad: Array) -> float:
    """Return the Euclidean norm of a gradient of any shape, summed in float64 whatever its dtype.

    sqrt(sum(grad^2))
    """
    return math.sqrt(np.square(grad, dtype=np.float64).sum())
