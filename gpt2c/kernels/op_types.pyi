# The types of the functions of gpt2c.ops, for mypy and editors. Generated from the declarations of
# gpt2c.kernels.op by tests/op_types.py: do not edit.

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

def encoder_forward(
    idx: Array,
    wte: Array,
    wpe: Array | None = None,
    scale: Array | None = None,
    position: int = 0,
    offsets: Array | None = None,
    backend: str = "auto",
) -> Array: ...
def encoder_backward(
    dout: Array,
    idx: Array,
    vocab_size: int,
    n_positions: int,
    offsets: Array | None = None,
    backend: str = "auto",
) -> tuple[Array, Array]: ...
def layernorm_forward(
    x: Array, weight: Array, bias: Array, eps: float = 1e-05, backend: str = "auto"
) -> tuple[Array, Array, Array]: ...
def layernorm_backward(
    dout: Array, x: Array, weight: Array, mean: Array, rstd: Array, backend: str = "auto"
) -> tuple[Array, Array, Array]: ...
def rmsnorm_forward(
    x: Array, weight: Array, eps: float = 1e-05, backend: str = "auto"
) -> tuple[Array, Array]: ...
def rmsnorm_backward(
    dout: Array, x: Array, weight: Array, rstd: Array, backend: str = "auto"
) -> tuple[Array, Array]: ...
def matmul_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    scale: Array | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> Array: ...
def matmul_backward(
    dout: Array,
    x: Array,
    weight: Array,
    scale: Array | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> tuple[Array, Array, Array]: ...
def lora_forward(
    y: Array, x: Array, down: Array, up: Array, scale: float = 1.0, backend: str = "auto"
) -> tuple[Array, Array]: ...
def lora_backward(
    dout: Array,
    x: Array,
    u: Array,
    down: Array,
    up: Array,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Array, Array, Array]: ...
def matrix_transpose(x: Array, backend: str = "auto") -> Array: ...
def attention_forward(
    qkv: Array,
    n_head: int,
    keys: Array | None = None,
    values: Array | None = None,
    position: int = 0,
    offsets: Array | None = None,
    n_kv_head: int | None = None,
    dropout: float = 0.0,
    key: int = 0,
    first: int = 0,
    precision: str = "fp32",
    key_scales: Array | None = None,
    value_scales: Array | None = None,
    backend: str = "auto",
) -> tuple[Array, ...]: ...
def attention_backward(
    dout: Array,
    qkv: Array,
    out: Array,
    lse: Array,
    offsets: Array | None = None,
    dropout: float = 0.0,
    key: int = 0,
    first: int = 0,
    precision: str = "fp32",
    backend: str = "auto",
) -> Array: ...
def gelu_forward(x: Array, backend: str = "auto") -> Array: ...
def gelu_backward(dout: Array, x: Array, backend: str = "auto") -> Array: ...
def swiglu_forward(x: Array, backend: str = "auto") -> Array: ...
def swiglu_backward(dout: Array, x: Array, backend: str = "auto") -> Array: ...
def residual_forward(x: Array, branch: Array, backend: str = "auto") -> Array: ...
def dropout_forward(
    x: Array, dropout: float = 0.1, key: int = 0, first: int = 0, backend: str = "auto"
) -> Array: ...
def rope_forward(
    qkv: Array,
    cos: Array,
    sin: Array,
    heads: int,
    position: int = 0,
    offsets: Array | None = None,
    backend: str = "auto",
) -> Array: ...
def rope_backward(
    dout: Array,
    cos: Array,
    sin: Array,
    heads: int,
    position: int = 0,
    offsets: Array | None = None,
    backend: str = "auto",
) -> Array: ...
def crossentropy_forward(
    logits: Array, targets: Array, backend: str = "auto"
) -> tuple[Array, Array]: ...
def crossentropy_backward(
    logits: Array,
    lse: Array,
    targets: Array,
    scale: float = 1.0,
    weights: Array | None = None,
    backend: str = "auto",
) -> Array: ...
def adamw_update(
    param: Array,
    m: Array,
    v: Array,
    grad: Array,
    learning_rate: float = 0.0003,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-08,
    weight_decay: float = 0.1,
    t: int = 1,
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Array, Array, Array]: ...
def global_norm(grad: Array, backend: str = "auto") -> float: ...
