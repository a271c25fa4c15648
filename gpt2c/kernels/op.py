"""What an op is: each one declared once, in letters.

    layernorm_forward  out[N C] mean[N] rstd[N] <- x[N C] weight[C] bias[C] eps=1e-5 | N C

Left of the arrow are the outputs, right of it the inputs, then numbers with their defaults; one
without a default is an int. After the bar stands what C is told and arrays know: the names of
sizes, in the order of csrc/gpt2c.h. `f(N threads)` there is scratch of as many floats as C's
function f returns, `type` the type of the weights. A line below, `eps: 0 <= eps`, is a rule; where
it does not hold, ValueError names the argument.

    x[N C]     floats, N rows of C; 3C is three times C; * is any shape, the same wherever it stands
    +dx[N C]   is added to, because gradients add up
    ~m[*]      is updated: read and written
    dx[*]=x    may be the same memory as x
    bias[C]?   may be None; a letter that only such arrays have is then 0
    idx[N]ids, targets[N]targets, weight[OC C]weights    of the types in KINDS

The binding of the C kernels (gpt2c.kernels.binding), the checks and the public functions
(gpt2c.ops) are made from these lines; the meaning of an op stands in the reference, and its
arguments for tests and benchmarks in gpt2c.kernels.cases. Letters: B sequences, T time, N rows, C
channels, OC output channels, V vocabulary, NH heads, HS head size, D pairs of a head's channels, P
positions, R rows of a matrix, n all elements of an array.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from string import ascii_letters, digits
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
rmsnorm_forward     out[N C] rstd[N] <- x[N C] weight[C] eps=1e-5 | N C
    eps: 0 <= eps
rmsnorm_backward    +dx[N C] +dweight[C] <- dout[N C] x[N C] weight[C] rstd[N] | N C

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
swiglu_forward      out[N C] <- x[N 2C] | N C
swiglu_backward     dx[N 2C]=x <- dout[N C] x[N 2C] | N C
residual_forward    out[*]=x <- x[*] branch[*] | n

rope_forward        out[B T C]=qkv <- qkv[B T C] cos[P D] sin[P D] heads position=0 | B T C D
    qkv: C % (2 * D) == 0
    heads: 1 <= heads <= C // (2 * D)
    position: 0 <= position <= P - T
rope_backward       dqkv[B T C]=dout <- dout[B T C] cos[P D] sin[P D] heads position=0 | B T C D
    dout: C % (2 * D) == 0
    heads: 1 <= heads <= C // (2 * D)
    position: 0 <= position <= P - T

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
KINDS = ("floats", "ids", "targets", "weights")  # ids in [0, V), targets in [-1, V), any weights
ARRAY = re.compile(r"([+~]?)(\w+)\[(.*?)\](\w*)(\?)?(?:=(\w+))?")
NUMBER = re.compile(r"(\w+)(?:=(\S+))?")


@dataclass(frozen=True)
class Argument:
    """An array that an op is given.

    Attributes
    ----------
    shape : letters; ("*",) is any shape
    kind : one of KINDS
    mode : of an output "+" is added to, "~" is updated, "" is written
    optional : may be None
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
        return tuple(letter.lstrip(digits) for letter in self.shape)

    @property
    def factors(self) -> tuple[int, ...]:
        """How many times each letter stands in the shape: 3 for 3C, 1 for C."""
        return tuple(int(letter.rstrip(ascii_letters) or 1) for letter in self.shape)


@dataclass(frozen=True)
class Op:
    """A declared op.

    Attributes
    ----------
    outputs, inputs : arrays, in the order of its arguments
    numbers : name -> default (None: there is none), the arguments after the arrays
    returns : the name of the number that is returned, or ""
    told : what C is told after them
    rules : argument -> what must hold of sizes and numbers
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
    """Read declarations; a line that begins with blanks goes on with the one before."""
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
