"""AdamW, and the norm that clips gradients.

`gpt2c.kernels.reference` states the rules of all ops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["adamw_update", "global_norm"]

Array = NDArray[np.floating[Any]]


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
    param, m, v, grad : any shape, the same; all but `grad` are updated
    m, v : running means of g and of g^2, zeros before the first step
    learning_rate, beta1, beta2, eps : as in the paper
    weight_decay : multiplied by the learning rate and by the param from before the step
    t : the number of this step, from 1
    grad_scale : applied to `grad` first, for clipping

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.

    Examples
    --------
    >>> param, grad, zero = (np.array([x], np.float32) for x in (1, 5, 0))
    >>> settings = {"learning_rate": 0.5, "weight_decay": 0.0}
    >>> param, m, v = gpt2c.ops.adamw_update(param, zero, zero, grad, **settings)
    >>> param.round(3).tolist()  # the first step has the size of the learning rate
    [0.5]
    """
    g = grad * grad_scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    # m and v start from zero, so after t steps they hold only this share of a full mean
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    param -= learning_rate * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param)


def global_norm(grad: Array) -> float:
    """Return the Euclidean norm of a gradient of any shape, summed in float64 whatever its dtype.

    sqrt(sum(grad^2))

    Examples
    --------
    >>> round(gpt2c.ops.global_norm(np.array([3, -4], np.float32)), 3)
    5.0
    """
    return math.sqrt(np.square(grad, dtype=np.float64).sum())
