"""Declarations of all ops: each op is declared once, in letters.

    layernorm_forward  out[N C] mean[N] rstd[N] <- x[N C] weight[C] bias[C] eps=1e-5 | N C

Left of the arrow are the outputs, right of it the inputs, then numbers with their defaults. After
the bar are C's other arguments, which follow from the arrays: sizes, the type of a weight, and
scratch memory, in the order of csrc/gpt2c.h.

    x[N C]     floats, N rows of C; 3C is three times C; * is any shape, the same for all arrays
    +dx[N C]   is added to, because gradients add up
    ~m[*]      is updated, that is, read and written
    dx[*]=x    may be the same memory as x
    bias[C]?   may be None; a letter that only such arrays have is then 0
    idx[N]ids, targets[N]targets, weight[OC C]weights    of the types in KINDS
    t: 1 <= t  a rule, on a line of its own, after the argument that its error names

The binding of the C kernels (gpt2c.kernels.binding), the checks and the public functions
(gpt2c.ops) are made from these lines. The reference defines what an op computes;
gpt2c.kernels.cases has its arguments for tests and benchmarks. Letters: B sequences, T time, N
rows, C channels, OC output channels, V vocabulary, NH heads, HS head size, P positions, R rows of a
matrix, n all elements of an array.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["OPS", "Argument", "Op"]

DECLARATIONS = """
encoder_forward     out[B T C] <- idx[B T]ids wte[V C]weights wpe[P C] scale[V]? position=0
                    | type B T C
    position: 0 <= position
    idx: position + T <= P
encoder_backward    +dwte[V C] +dwpe[P C] <- dout[B T C] idx[B T]ids | B T C
    idx: T <= P

layernorm_forward   out[N C] mean[N] rstd[N] <- x[N C] weight[C] bias[C] eps=1e-5 | N C
    eps: 0 <= eps
layernorm_backward  +dx[N C] +dweight[C] +dbias[C]
                    <- dout[N C] x[N C] weight[C] mean[N] rstd[N] | N C

matmul_forward      out[N OC] <- x[N C] weight[OC C]weights bias[OC]? scale[OC]?
                    | type matmul_scratch_size(N C OC type threads) N C OC
matmul_backward     dx[N C]=x +dweight[OC C] +dbias[OC]?
                    <- dout[N OC] x[N C] weight[OC C] accumulate=True
                    | gemm_scratch_size(threads) N C OC
matrix_transpose    out[C R] <- x[R C] | R C

attention_forward   out[B T C] lse[B NH T]? ~keys[B NH P HS]? ~values[B NH P HS]?
                    <- qkv[B T 3C] position=0
                    | attention_scratch_size(T HS threads) B T C NH P
    n_head: 1 <= NH and C % NH == 0
    keys: P == 0 or NH * HS == C
    position: 0 <= position <= P - T if P else position == 0
attention_backward  dqkv[B T 3C]=qkv <- dout[B T C] qkv[B T 3C] out[B T C] lse[B NH T]
                    | attention_scratch_size(T HS threads) B T C NH
    lse: C % NH == 0

gelu_forward        out[*] <- x[*] | n
gelu_backward       dx[*]=dout <- dout[*] x[*] | n
residual_forward    out[*]=x <- x[*] branch[*] | n

crossentropy_forward
                    losses[N] lse[N] <- logits[N V] targets[N]targets | N V
crossentropy_backward
                    dlogits[N V]=logits <- logits[N V] lse[N] targets[N]targets scale=1.0 | N V

adamw_update        ~param[*] ~m[*] ~v[*] <- grad[*] learning_rate=3e-4 beta1=0.9 beta2=0.95
                    eps=1e-8 weight_decay=0.1 t=1 grad_scale=1.0 | n
    beta1: 0 <= beta1 < 1
    beta2: 0 <= beta2 < 1
    eps: 0 <= eps
    t: 1 <= t < 2**63
global_norm         norm <- grad[*] | sums n
"""
# ids in [0, V), targets in [-1, V), weights of float32, float16 or uint8
KINDS = ("floats", "ids", "targets", "weights")
ARRAY = re.compile(r"([+~]?)(\w+)\[(.*?)\](\w*)(\?)?(?:=(\w+))?")
NUMBER = re.compile(r"(\w+)(?:=(\S+))?")


@dataclass(frozen=True)
class Argument:
    """An array among the arguments of an op.

    Attributes
    ----------
    shape : letters; ("*",) is any shape
    kind : one of KINDS
    mode : of an output, "+" if it is added to, "~" if updated, "" if written
    optional : whether it may be None
    alias : of an output, the input whose memory it may share
    """

    name: str
    shape: tuple[str, ...]
    kind: str
    mode: str = ""
    optional: bool = False
    alias: str = ""

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the shape, without factors."""
        return tuple(letter.lstrip("3") for letter in self.shape)


@dataclass(frozen=True)
class Op:
    """A declared op.

    Attributes
    ----------
    outputs, inputs : arrays, in the order of its arguments
    numbers : name -> default (None if there is none), the arguments after the arrays
    returns : the name of the number that is returned, or ""
    told : C's other arguments, after the numbers
    rules : (argument, condition on sizes and numbers)
    """

    name: str
    outputs: tuple[Argument, ...]
    inputs: tuple[Argument, ...]
    numbers: dict[str, Any]
    returns: str
    told: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]

    @property
    def arrays(self) -> tuple[Argument, ...]:
        """All arrays, in the order of the op's arguments."""
        return self.outputs + self.inputs


def _parse(text: str) -> dict[str, Op]:
    """Parse declarations; an indented line continues the one before it."""
    ops = {}
    for block in re.split(r"\n+(?=\w)", text.strip()):
        rules = re.findall(r"\n    (\w+): (.*)", block)
        name, left, right, told = re.fullmatch(
            r"(\w+) +(.*?) <- (.*?) \| (.*)", " ".join(re.sub(r"\n    \w+: .*", "", block).split())
        ).groups()  # type: ignore[union-attr]
        numbers = {
            number: ast.literal_eval(default) if default else None
            for number, default in NUMBER.findall(ARRAY.sub("", right))
        }
        returns = "" if "[" in left else left
        told = tuple(re.findall(r"\w+\(.*?\)|\w+", told))
        ops[name] = Op(name, _arrays(left), _arrays(right), numbers, returns, told, tuple(rules))
    return ops


def _arrays(text: str) -> tuple[Argument, ...]:
    return tuple(
        Argument(name, tuple(shape.split()), kind or "floats", mode, bool(optional), alias)
        for mode, name, shape, kind, optional, alias in ARRAY.findall(text)
    )


OPS = _parse(DECLARATIONS)
