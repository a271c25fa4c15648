"""Declarations of all ops: each op is declared once, in letters.

    layernorm_forward  out[N C] mean[N] rstd[N] <- x[N C] weight[C] bias[C] eps=1e-5 | N C

Left of the arrow are the outputs, right of it the inputs, then numbers with their defaults; one
without a default is an int. After the bar are C's other arguments, which follow from the arrays:
sizes, `type`, that of the weights or of the cache, `x_type`, that of x, and `f(N threads)`, scratch
memory of as many floats as C's function f returns, in the order of csrc/gpt2c.h.

    x[N C]     floats, N rows of C; 3C is three times C; * is any shape, the same for all arrays
    +dx[N C]   is added to, because gradients add up
    ~m[*]      is updated, that is, read and written
    dx[*]=x    may be the same memory as x
    bias[C]?   may be None; a letter that only such arrays have is then 0
    idx[N]ids, targets[N]targets, weight[OC C]weights, offsets[S]offsets, keys[P HS]cache,
    key_scales[P]scales    of the types in KINDS
    x[N C]factors
               floats, or numbers of 16 bits (bfloat16 in uint16) where the products have them: an
               array that is a factor of products is rounded when it is written, not when it is read
    t: 1 <= t  a rule, on a line of its own, after the argument that its error names; in it,
               "longest" is the length of the longest sequence
    C = W * NH // ...  the size of a letter that no input has

The binding of the C kernels (gpt2c.kernels.binding), the checks and the public functions
(gpt2c.ops) are made from these lines. The reference defines what an op computes;
gpt2c.kernels.cases has its arguments for tests and benchmarks. Letters: B sequences, T time, N
rows, C channels, OC output channels, V vocabulary, NH query heads, KV key and value heads, HS head
size, D pairs of a head's channels, W channels of q, k and v, P positions, R rows of a matrix or an
adapter's rank, S offsets, n all elements of an array.
"""

from __future__ import annotations

import ast
import re
from string import ascii_letters, digits
from typing import Any, NamedTuple

__all__ = ["LONGEST", "MIDDLE", "OPS", "TINY", "Argument", "Op"]

# of 8-bit weights, see `matmul_forward`
MIDDLE = 128  # they are unsigned: 0 is stored as this
LONGEST = 65536  # channels: the sum of this many 8-bit products fits 32 bits
TINY = 1e-36  # a row with no larger number counts as zeros: 127 / largest stays finite in float32

DECLARATIONS = """
encoder_forward     out[B T C]
                    <- idx[B T]ids wte[V C]weights wpe[P C]? scale[V]? offsets[S]offsets? position=0
                    | type B T C S
    position: 0 <= position < 2**31
    idx: P == 0 or position + longest <= P
encoder_backward    +dwte[V C]? +dwpe[P C]? <- dout[B T C] idx[B T]ids offsets[S]offsets? | B T C S
    idx: longest <= P

layernorm_forward   out[N C]factors mean[N] rstd[N] <- x[N C] weight[C] bias[C] eps=1e-5
                    | out_type N C
    eps: 0 <= eps
layernorm_backward  +dx[N C] +dweight[C]? +dbias[C]?
                    <- dout[N C] x[N C] weight[C] mean[N] rstd[N] | N C
rmsnorm_forward     out[N C]factors rstd[N] <- x[N C] weight[C] eps=1e-5 | out_type N C
    eps: 0 <= eps
rmsnorm_backward    +dx[N C] +dweight[C]? <- dout[N C] x[N C] weight[C] rstd[N] | N C

matmul_forward      out[N OC]factors
                    <- x[N C]factors weight[OC C]weights bias[OC]? scale[OC]? precision='fp32'
                    | out_type x_type type
                    matmul_scratch_size(N C OC precision out_type type threads) N C OC
    precision: precision in ('fp32', 'bf16', 'fp16')
matmul_backward     dx[N C]?=x +dweight[OC C]? +dbias[OC]?
                    <- dout[N OC] x[N C]factors weight[OC C]weights scale[OC]? accumulate=True
                    precision='fp32' add=False
                    | x_type type matmul_backward_scratch_size(C OC precision type threads) N C OC
    precision: precision in ('fp32', 'bf16', 'fp16')
lora_forward        out[N OC]=y u[N R] <- y[N OC] x[N C] down[R C] up[OC R] scale=1.0
                    | gemm_scratch_size(threads) N C OC R
lora_backward       dx[N C]?=x +ddown[R C]? +dup[OC R]?
                    <- dout[N OC] x[N C] u[N R] down[R C] up[OC R] scale=1.0 accumulate=True
                    | lora_scratch_size(N R threads) N C OC R
matrix_transpose    out[C R] <- x[R C] | R C

attention_forward   out[B T C]factors lse[B NH T] ~keys[B KV P HS]cache? ~values[B KV P HS]cache?
                    ~key_scales[B KV P]scales? ~value_scales[B KV P]scales?
                    <- qkv[B T W]factors offsets[S]offsets? position=0 dropout=0.0 key=0 first=0
                    precision='fp32'
                    | qkv_type type attention_scratch_size(T P HS threads) B T C NH W P S
    C = W * NH // max(1, NH + 2 * KV)
    n_head: NH >= 1
    n_head: 1 <= KV <= NH and NH % KV == 0
    n_head: W % (NH + 2 * KV) == 0
    keys: P == 0 or W == (NH + 2 * KV) * HS
    offsets: P == 0 or S == 0
    position: P > 0 or position == 0
    position: 0 <= position <= max(0, P - T)
    dropout: 0 <= dropout < 1
    dropout: P == 0 or dropout == 0
    key: 0 <= key < 2**64
    first: 0 <= first < 2**64 and first % 2**32 + B * T <= 2**32
    precision: precision in ('fp32', 'bf16', 'fp16')
attention_backward  dqkv[B T W]=qkv
                    <- dout[B T C] qkv[B T W]factors out[B T C]factors lse[B NH T]
                    offsets[S]offsets? dropout=0.0 key=0 first=0 precision='fp32'
                    | qkv_type attention_scratch_size(T 0 HS threads) B T C NH W S
    lse: C % NH == 0
    qkv: W > C and (W - C) % (2 * C // NH) == 0 and NH % ((W - C) // (2 * C // NH)) == 0
    dropout: 0 <= dropout < 1
    key: 0 <= key < 2**64
    first: 0 <= first < 2**64 and first % 2**32 + B * T <= 2**32
    precision: precision in ('fp32', 'bf16', 'fp16')

gelu_forward        out[*]factors=x <- x[*]factors | x_type n
gelu_backward       dx[*]=dout <- dout[*] x[*]factors | x_type n
swiglu_forward      out[N C]factors <- x[N 2C]factors | x_type N C
swiglu_backward     dx[N 2C]=x <- dout[N C] x[N 2C]factors | x_type N C
residual_forward    out[*]=x <- x[*] branch[*] | n
dropout_forward     out[N C]=x <- x[N C] dropout=0.1 key=0 first=0 | N C
    dropout: 0 <= dropout < 1
    key: 0 <= key < 2**64
    first: 0 <= first < 2**64 and first % 2**32 + N <= 2**32

rope_forward        out[B T W]factors=qkv
                    <- qkv[B T W] cos[P D] sin[P D] offsets[S]offsets? heads position=0
                    | out_type B T W D S
    qkv: W % (2 * D) == 0
    heads: 1 <= heads <= W // (2 * D)
    position: 0 <= position <= P - longest
rope_backward       dqkv[B T W]=dout
                    <- dout[B T W] cos[P D] sin[P D] offsets[S]offsets? heads position=0
                    | B T W D S
    dout: W % (2 * D) == 0
    heads: 1 <= heads <= W // (2 * D)
    position: 0 <= position <= P - longest

crossentropy_forward
                    losses[N] lse[N] <- logits[N V] targets[N]targets | N V
crossentropy_backward
                    dlogits[N V]=logits
                    <- logits[N V] lse[N] targets[N]targets weights[N]? scale=1.0 | N V

adamw_update        ~param[*] ~m[*] ~v[*] <- grad[*] learning_rate=3e-4 beta1=0.9 beta2=0.95
                    eps=1e-8 weight_decay=0.1 t=1 grad_scale=1.0 | n
    beta1: 0 <= beta1 < 1
    beta2: 0 <= beta2 < 1
    eps: 0 <= eps
    t: 1 <= t < 2**63
global_norm         norm <- grad[*] | sums n
"""
# ids in [0, V), targets in [-1, V), weights of float32, float16 or uint8, offsets of the sequences
# in a ragged batch, a cache of float32, float16 or int8, and its scales, which are always float32
KINDS = ("floats", "ids", "targets", "weights", "offsets", "cache", "scales")
ARRAY = re.compile(r"([+~]?)(\w+)\[(.*?)\](\w*)(\?)?(?:=(\w+))?")
NUMBER = re.compile(r"(\w+)(?:=(\S+))?")


class Argument(NamedTuple):
    """An array among the arguments of an op.

    Attributes
    ----------
    shape : letters; ("*",) is any shape
    kind : one of KINDS
    mode : of an output, "+" if it is added to, "~" if updated, "" if written
    optional : whether it may be None
    alias : of an output, the input whose memory it may share
    factor : whether floats may be numbers of 16 bits
    """

    name: str
    shape: tuple[str, ...]
    kind: str
    mode: str = ""
    optional: bool = False
    alias: str = ""
    factor: bool = False

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the shape, without factors."""
        return tuple(letter.lstrip(digits) for letter in self.shape)

    @property
    def factors(self) -> tuple[int, ...]:
        """How many times each letter stands in the shape: 3 for 3C, 1 for C."""
        return tuple(int(letter.rstrip(ascii_letters) or 1) for letter in self.shape)


class Op(NamedTuple):
    """A declared op.

    Attributes
    ----------
    outputs, inputs : arrays, in the order of its arguments
    numbers : name -> default (None if there is none), the arguments after the arrays
    returns : the name of the number that is returned, or ""
    told : C's other arguments, after the numbers
    rules : (argument, condition on sizes and numbers)
    sizes : letter that no input has -> expression of other letters
    """

    name: str
    outputs: tuple[Argument, ...]
    inputs: tuple[Argument, ...]
    numbers: dict[str, Any]
    returns: str
    told: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    sizes: dict[str, str]

    @property
    def arrays(self) -> tuple[Argument, ...]:
        """All arrays, in the order of the op's arguments."""
        return self.outputs + self.inputs


def _parse(text: str) -> dict[str, Op]:
    """Parse declarations; an indented line continues the one before it."""
    ops = {}
    for block in re.split(r"\n+(?=\w)", text.strip()):
        rules = re.findall(r"\n    (\w+): (.*)", block)
        sizes = dict(re.findall(r"\n    (\w+) = (.*)", block))
        name, left, right, told = re.fullmatch(
            r"(\w+) +(.*?) <- (.*?) \| (.*)",
            " ".join(re.sub(r"\n    \w+( =|:) .*", "", block).split()),
        ).groups()  # type: ignore[union-attr]
        numbers = {
            number: ast.literal_eval(default) if default else None
            for number, default in NUMBER.findall(ARRAY.sub("", right))
        }
        returns = "" if "[" in left else left
        told = tuple(re.findall(r"\w+\(.*?\)|\w+", told))
        arrays = _arrays(left), _arrays(right)
        ops[name] = Op(name, *arrays, numbers, returns, told, tuple(rules), sizes)
    return ops


def _arrays(text: str) -> tuple[Argument, ...]:
    found = []
    for mode, name, shape, kind, optional, alias in ARRAY.findall(text):
        own, factor = "floats" if kind in ("", "factors") else kind, kind == "factors"
        found.append(Argument(name, tuple(shape.split()), own, mode, bool(optional), alias, factor))
    return tuple(found)


OPS = _parse(DECLARATIONS)
