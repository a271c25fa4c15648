"""The binding: the ops of gpt2c.kernels.reference on the C kernels of one instruction set.

Each op has a method, made from its declaration in `gpt2c.kernels.op`. It passes pointers and sizes
to the C function of the same name, which writes the outputs; print(source(OPS["..."])) shows one.
`gpt2c.kernels.reference` defines what each op computes. Arrays must be C-contiguous float32 (int32
for idx and targets, also float16 and uint8 for weights, uint16 for factors of products in bfloat16)
of the declared shapes; `gpt2c.ops` and `gpt2c.model` check this before. Knows nothing about models.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.memory import aligned_zeros
from gpt2c.kernels.op import OPS, Op
from gpt2c.kernels.threads import Pools

__all__ = ["Kernels", "source"]

Array = NDArray[Any]
# the method that makes a pointer of an array, for each kind of gpt2c.kernels.op
VIEWS = {
    **dict.fromkeys(("ids", "targets", "offsets"), "_i"),
    **dict.fromkeys(("floats", "scales"), "_f"),
    **dict.fromkeys(("weights", "cache"), "_any"),
}


class Kernels:
    """One compiled set of kernels with a fixed number of threads.

    Parameters
    ----------
    name : one of `gpt2c.kernels.backend.NAMES` other than "numpy"; the CPU must have its features,
        or the import ends the process
    threads : the number of threads that each kernel uses
    """

    has_step = True  # of decoding, in one call: bind_step and decode_step

    def __init__(self, name: str, threads: int) -> None:
        module = importlib.import_module(f"gpt2c._kernels_{name}")
        self.name = name
        self.threads = threads
        self._lib = module.lib
        self._ffi = module.ffi
        self._from_buffer = module.ffi.from_buffer
        self._null = module.ffi.NULL
        self._floats, self._ints = module.ffi.typeof("float[]"), module.ffi.typeof("int32_t[]")
        self._doubles = module.ffi.typeof("double[]")
        # C's constants of an array's dtype character, and of the precision of products
        self._types = {"f": self._lib.FP32, "e": self._lib.FP16, "B": self._lib.INT8}
        self._types |= {"H": self._lib.BF16, "b": self._lib.SIGNED8}
        self._precisions = {"fp32": self._lib.FP32, "bf16": self._lib.BF16, "fp16": self._lib.FP16}
        self._pools = Pools(module.lib, module.ffi, threads)
        self._local = threading.local()  # for scratch memory: each Python thread needs its own

    if TYPE_CHECKING:  # the ops, which are added below

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    def __repr__(self) -> str:
        return f"Kernels({self.name!r}, threads={self.threads})"

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a kernel on this Python thread's pool; see `Pools.mine` for errors."""
        return getattr(self._lib, name)(*arguments, self._pools.mine())

    def _sums(self, size: int) -> Any:
        return self._from_buffer(self._doubles, np.empty(size))

    def _f(self, array: Array | None) -> Any:
        return self._null if array is None else self._from_buffer(self._floats, array)

    def _i(self, array: Array | None) -> Any:
        return self._null if array is None else self._from_buffer(self._ints, array)

    def _any(self, array: Array | None) -> Any:
        return self._null if array is None else self._from_buffer(array)

    def _scratch(self, size: int) -> Any:
        scratch = getattr(self._local, "scratch", None)
        if scratch is None or scratch.size < size:
            scratch = self._local.scratch = aligned_zeros(size)
        return self._f(scratch)

    def fma_burn(self, iterations: int, precision: str = "fp32") -> float:
        """Run multiply-adds in registers on all threads; return the operations done.

        Parameters
        ----------
        precision : "fp32", "bf16", "fp16" or "int8"
        """
        type_ = getattr(self._lib, precision.upper())
        return float(self._call("fma_burn", self._sums(self.threads), iterations, type_))

    def memory_read(self, data: Array) -> float:
        """Read `data` once, except a last part below 1 KB; return the sum of what was read."""
        sums = self._sums(self._lib.SLICES)
        return float(self._call("memory_read", self._f(data), sums, data.size))

    def line_travel(self, rounds: int) -> float:
        """Return the mean nanoseconds in which a cache line goes from one thread to another.

        0.0 if two threads did not run at the same time. It gives up after 0.01 s.

        Parameters
        ----------
        rounds : to and fro, in [1, 2**30)
        """
        line = aligned_zeros(16).view(np.int32)
        return float(self._call("line_travel", self._i(line), self._sums(1), rounds))

    # ---- a step of decoding, in one call ---------------------------------------------------------

    def bind_step(self, stages: Iterable[NamedTuple]) -> Any:
        """Return `decode_step`'s stages, each made of a `gpt2c.model.block.Stage`."""
        entries: list[dict[str, Any]] = []
        kept: list[Any] = []  # a C struct does not keep alive what it points at
        for stage in stages:
            given = {name: value for name, value in stage._asdict().items() if value is not None}
            entry = {"C": given["out"].shape[-1]}
            if "keys" in given:
                entry |= dict(zip(("KV", "P", "HS"), given["keys"].shape[1:], strict=True))
                entry["cache"] = self._types[given["keys"].dtype.char]
                entry |= {name: self._any(given.pop(name)) for name in ("keys", "values")}
            if "low" in given:
                entry["R"] = given["low"].shape[-1]
            for name in ("op", "then"):
                entry[name] = getattr(self._lib, given.pop(name).upper())
            entry["precision"] = self._precisions[given.pop("precision")]
            linear = {}
            if "weight" in given:
                weight = given.pop("weight")
                linear = dict(zip(("OC", "C"), weight.shape, strict=True))
                linear |= {
                    "weight": self._from_buffer(weight),
                    "type": self._types[weight.dtype.char],
                }
            for name, value in given.items():
                is_array = isinstance(value, np.ndarray)
                fields = linear if name in ("scale", "bias") else entry
                fields[name] = self._f(value) if is_array else value
            kept.append((entry, linear))
            entries.append(entry | {"linear": linear})
        return self._ffi.new("Stage[]", entries), kept

    def decode_step(self, tokens: Array, slots: Array, positions: Array, stages: Any) -> None:
        """Process one more token of each of N texts, all in one call.

        Parameters
        ----------
        tokens, slots, positions : (N,) int32, each text's token; its cache in [0, S), no two the
            same; and the token's position in it, in [0, P); N is at most the rows of the stages'
            arrays
        stages : from `bind_step`
        """
        i, N, (pointer, _) = self._i, len(tokens), stages
        count = len(pointer)
        scratch = self._scratch(self._lib.decode_scratch_size(pointer, count, N, self.threads))
        ids = i(tokens), i(slots), i(positions)
        self._call("decode_step", pointer, count, *ids, scratch, N)


def source(op: Op) -> str:
    """Return the Python source of an op's method, which passes pointers and sizes to C."""

    def size(letter: str) -> str:
        """Return the expression for the size that a letter means."""
        if letter == "HS":
            return "C // NH"
        found = ""
        for array in op.arrays:
            if array.shape == ("*",):
                return f"{array.name}.size"
            if letter in array.shape:
                place = f"{array.name}.shape[{array.shape.index(letter)}]"
                if not array.optional:
                    return place
                found += f"{place} if {array.name} is not None else "
        return found + "0"

    def told(text: str) -> str:
        """Return the expression that C gets for a word of a declaration."""
        if text == "sums":
            return "self._sums(self._lib.SLICES)"
        if text.endswith(")"):
            function, words = text[:-1].split("(")
            return f"self._scratch(self._lib.{function}({', '.join(map(told, words.split()))}))"
        if text.endswith("_type"):
            return f"self._types[{text.removesuffix('_type')}.dtype.char]"
        known = {"threads": "self.threads", "type": "kind"}
        return (known | {"precision": "self._precisions[precision]"}).get(text, text)

    arguments = [array.name for array in op.arrays]
    # callers may leave out what says how to compute, not what
    defaults = [
        f"{n}={value!r}" if isinstance(value, bool | str) else n for n, value in op.numbers.items()
    ]
    letters = dict.fromkeys(re.findall(r"\b[A-Zn]+\b", " ".join(op.told)))
    typed = next((array for array in op.arrays if array.kind in ("weights", "cache")), None)
    pointers = [
        f"self.{'_from_buffer' if array.factor else VIEWS[array.kind]}({array.name})"
        for array in op.arrays
    ]
    lines = [f"def {op.name}(self, {', '.join([*arguments, *defaults])}):"]
    lines += [f"{letter} = {size(letter)}" for letter in letters if letter != "HS"]
    lines += [f"HS = {size('HS')}"] if "HS" in letters else []  # of C and NH, which come before
    if typed is not None and "type" in op.told:
        absent = f"'f' if {typed.name} is None else " if typed.optional else ""
        lines.append(f"kind = self._types[{absent}{typed.name}.dtype.char]")
    handed = ", ".join([repr(op.name), *pointers, *map(told, [*op.numbers, *op.told])])
    lines.append(f"{'return ' if op.returns else ''}self._call({handed})")
    return "\n    ".join(lines)


class _Method:
    """An op's method, made from its source when it is used first."""

    def __init__(self, op: Op) -> None:
        self._op = op

    def __get__(self, kernels: Kernels | None, owner: type[Kernels]) -> Any:
        made: dict[str, Any] = {}
        exec(source(self._op), made)  # a declaration of this package's own
        method = made[self._op.name]
        method.__doc__ = f"See `gpt2c.kernels.reference.{self._op.name}`."
        setattr(owner, self._op.name, method)
        return method if kernels is None else method.__get__(kernels, owner)


for _op in OPS.values():
    setattr(Kernels, _op.name, _Method(_op))
