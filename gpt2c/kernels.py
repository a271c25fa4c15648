"""The binding: the ops of gpt2c.reference on the C kernels of one instruction set.

Each method hands pointers and sizes to the C function of the same name and returns when it has
written its outputs; what the op means stands in `gpt2c.reference`. Arrays must be C-contiguous
float32 (int32 for idx and targets) of the shapes given there: the doors, `gpt2c.ops` and
`gpt2c.model`, see to it once. Knows nothing about models.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.limits import unbound
from gpt2c.memory import aligned_zeros

Array = NDArray[Any]


class Pool:
    """Threads that run kernels together, the caller among them: csrc/team.c, on memory from here.

    Parameters
    ----------
    lib, ffi : of the kernels
    threads : how many

    Raises
    ------
    OSError : the system does not give so many threads
    """

    def __init__(self, lib: Any, ffi: Any, threads: int) -> None:
        self._stop = None  # nothing to stop, until they are there
        self.process = os.getpid()
        self._memory = ffi.from_buffer(aligned_zeros(-(-lib.pool_size(threads) // 4)))
        self.pointer = ffi.cast("Pool *", self._memory)
        with unbound():
            started = lib.pool_start(self.pointer, threads)
        if started < threads:
            raise OSError(
                f"{threads} threads are wanted and the system gives {started}: set"
                " GPT2C_NUM_THREADS to fewer, or raise its limit of processes (ulimit -u) or of"
                " memory (ulimit -v)"
            )
        self._stop = lib.pool_stop

    def __del__(self) -> None:
        """End the threads, unless this is a child that never had them."""
        if self._stop is not None and self.process == os.getpid():
            self._stop(self.pointer)


class Kernels:
    """One compiled set of kernels with a fixed number of threads.

    Parameters
    ----------
    name : "base", "avx2" or "avx512"; the CPU must have its features, or importing it ends the
        process
    threads : how many threads each kernel uses
    """

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
        # The GIL is released while C runs, so each Python thread needs a pool and scratch of its
        # own.
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"Kernels({self.name!r}, threads={self.threads})"

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a kernel on this Python thread's pool.

        Raises
        ------
        OSError : the system does not give so many threads
        MemoryError : nor the memory for them
        """
        pool = getattr(self._local, "pool", None)
        if pool is None or pool.process != os.getpid():  # a fork takes no threads along
            pool = self._local.pool = Pool(self._lib, self._ffi, self.threads)
        return getattr(self._lib, name)(*arguments, pool.pointer)

    def _sums(self, size: int) -> Any:
        return self._from_buffer(self._doubles, np.empty(size))

    def _f(self, array: Array | None) -> Any:
        return self._null if array is None else self._from_buffer(self._floats, array)

    def _i(self, array: Array) -> Any:
        return self._from_buffer(self._ints, array)

    def _scratch(self, size: int) -> Any:
        scratch = getattr(self._local, "scratch", None)
        if scratch is None or scratch.size < size:
            scratch = self._local.scratch = aligned_zeros(size)
        return self._f(scratch)

    def fma_burn(self, iterations: int) -> float:
        """Run multiply-adds in registers on all threads; return the operations done."""
        return float(self._call("fma_burn", self._sums(self.threads), iterations))

    def memory_read(self, data: Array) -> float:
        """Read `data` once, up to a last part below 1 KB; return the sum of what was read."""
        sums = self._sums(self._lib.SLICES)
        return float(self._call("memory_read", self._f(data), sums, data.size))

    def encoder_forward(self, out: Array, idx: Array, wte: Array, wpe: Array) -> None:
        """See `gpt2c.reference.encoder_forward`."""
        B, T, C = out.shape
        arrays = (self._f(out), self._i(idx), self._f(wte), self._f(wpe))
        self._call("encoder_forward", *arrays, B, T, C)

    def encoder_backward(self, dwte: Array, dwpe: Array, dout: Array, idx: Array) -> None:
        """See `gpt2c.reference.encoder_backward`."""
        B, T, C = dout.shape
        arrays = (self._f(dwte), self._f(dwpe), self._f(dout), self._i(idx))
        self._call("encoder_backward", *arrays, B, T, C)

    def layernorm_forward(
        self, out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array, eps: float
    ) -> None:
        """See `gpt2c.reference.layernorm_forward`."""
        N, C = x.shape
        arrays = (out, mean, rstd, x, weight, bias)
        self._call("layernorm_forward", *map(self._f, arrays), eps, N, C)

    def layernorm_backward(
        self,
        dx: Array,
        dweight: Array,
        dbias: Array,
        dout: Array,
        x: Array,
        weight: Array,
        mean: Array,
        rstd: Array,
    ) -> None:
        """See `gpt2c.reference.layernorm_backward`."""
        N, C = x.shape
        arrays = (dx, dweight, dbias, dout, x, weight, mean, rstd)
        self._call("layernorm_backward", *map(self._f, arrays), N, C)

    def matmul_forward(self, out: Array, x: Array, weight: Array, bias: Array | None) -> None:
        """See `gpt2c.reference.matmul_forward`."""
        OC, C = weight.shape
        scratch = self._scratch(self._lib.matmul_scratch_size(self.threads))
        arrays, sizes = (out, x, weight, bias), (x.shape[0], C, OC)
        self._call("matmul_forward", *map(self._f, arrays), scratch, *sizes)

    def matmul_backward(
        self,
        dx: Array,
        dweight: Array,
        dbias: Array | None,
        dout: Array,
        x: Array,
        weight: Array,
        accumulate: bool = True,
    ) -> None:
        """See `gpt2c.reference.matmul_backward`."""
        OC, C = weight.shape
        scratch = self._scratch(self._lib.matmul_scratch_size(self.threads))
        arrays = (dx, dweight, dbias, dout, x, weight)
        sizes = (x.shape[0], C, OC)
        self._call("matmul_backward", *map(self._f, arrays), accumulate, scratch, *sizes)

    def matrix_transpose(self, out: Array, x: Array) -> None:
        """See `gpt2c.reference_reading.matrix_transpose`."""
        self._call("matrix_transpose", self._f(out), self._f(x), *x.shape)

    def linear_forward(
        self, out: Array, x: Array, weight: Array, scale: Array | None, bias: Array | None
    ) -> None:
        """See `gpt2c.reference_reading.linear_forward`."""
        OC, C = weight.shape
        kind = self._kind(weight)
        sizes = (x.shape[0], C, OC)
        scratch = self._scratch(self._lib.linear_scratch_size(*sizes, kind, self.threads))
        f, data = self._f, self._from_buffer(weight)
        arrays = (f(out), f(x), data, f(scale), f(bias))
        self._call("linear_forward", *arrays, kind, scratch, *sizes)

    def _kind(self, weight: Array) -> int:
        """Give C's name of a weight's dtype."""
        lib = self._lib
        return int({"float32": lib.FP32, "float16": lib.FP16, "uint8": lib.INT8}[weight.dtype.name])

    def cache_attention_forward(
        self, out: Array, keys: Array, values: Array, qkv: Array, position: int
    ) -> None:
        """See `gpt2c.reference_reading.cache_attention_forward`."""
        T, C = out.shape
        NH, P, HS = keys.shape
        scratch = self._scratch(self._lib.attention_scratch_size(P, HS, self.threads))
        arrays = map(self._f, (out, keys, values, qkv))
        self._call("cache_attention_forward", *arrays, position, scratch, T, C, NH, P)

    def attention_forward(self, out: Array, lse: Array, qkv: Array) -> None:
        """See `gpt2c.reference.attention_forward`."""
        B, T, C = out.shape
        NH = lse.shape[1]
        scratch = self._scratch(self._lib.attention_scratch_size(T, C // NH, self.threads))
        arrays = (out, lse, qkv)
        self._call("attention_forward", *map(self._f, arrays), scratch, B, T, C, NH)

    def attention_backward(
        self, dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array
    ) -> None:
        """See `gpt2c.reference.attention_backward`."""
        B, T, C = out.shape
        NH = lse.shape[1]
        scratch = self._scratch(self._lib.attention_scratch_size(T, C // NH, self.threads))
        arrays = (dqkv, dout, qkv, out, lse)
        self._call("attention_backward", *map(self._f, arrays), scratch, B, T, C, NH)

    def gelu_forward(self, out: Array, x: Array) -> None:
        """See `gpt2c.reference.gelu_forward`."""
        self._call("gelu_forward", self._f(out), self._f(x), x.size)

    def gelu_backward(self, dx: Array, dout: Array, x: Array) -> None:
        """See `gpt2c.reference.gelu_backward`."""
        self._call("gelu_backward", self._f(dx), self._f(dout), self._f(x), x.size)

    def residual_forward(self, out: Array, x: Array, branch: Array) -> None:
        """See `gpt2c.reference.residual_forward`."""
        arrays = (out, x, branch)
        self._call("residual_forward", *map(self._f, arrays), x.size)

    def residual_backward(self, dx: Array, dbranch: Array, dout: Array) -> None:
        """See `gpt2c.reference.residual_backward`."""
        arrays = (dx, dbranch, dout)
        self._call("residual_backward", *map(self._f, arrays), dout.size)

    def crossentropy_forward(
        self, losses: Array, lse: Array, logits: Array, targets: Array
    ) -> None:
        """See `gpt2c.reference.crossentropy_forward`."""
        N, V = logits.shape
        arrays = (*map(self._f, (losses, lse, logits)), self._i(targets))
        self._call("crossentropy_forward", *arrays, N, V)

    def crossentropy_backward(
        self, dlogits: Array, logits: Array, lse: Array, targets: Array, scale: float
    ) -> None:
        """See `gpt2c.reference.crossentropy_backward`."""
        N, V = logits.shape
        arrays = (*map(self._f, (dlogits, logits, lse)), self._i(targets))
        self._call("crossentropy_backward", *arrays, scale, N, V)

    def adamw_update(
        self,
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
        """See `gpt2c.reference.adamw_update`."""
        scalars = (learning_rate, beta1, beta2, eps, weight_decay, t, grad_scale)
        arrays = (param, m, v, grad)
        self._call("adamw_update", *map(self._f, arrays), *scalars, param.size)

    def global_norm(self, grad: Array) -> float:
        """See `gpt2c.reference.global_norm`."""
        sums = self._sums(self._lib.SLICES)
        return float(self._call("global_norm", self._f(grad), sums, grad.size))

    # ---- a step of decoding, in one call ---------------------------------------------------------

    def bind_decoder(self, p: Mapping[str, Array], n_layer: int, n_head: int, eps: float) -> Any:
        """Give `decode_step` a model whose parameters are `p`; they must outlive what is given."""

        def linear(name: str) -> dict[str, Any]:
            weight = p[name + ".weight"]
            scale, bias = self._f(p.get(name + ".scale")), self._f(p.get(name + ".bias"))
            OC, C = weight.shape
            data = self._from_buffer(weight)
            kept.extend((data, scale, bias))
            return {
                **{"weight": data, "scale": scale, "bias": bias},
                **{"C": C, "OC": OC, "type": self._kind(weight)},
            }

        def floats(*names: str) -> dict[str, Any]:
            data = {name.replace(".", "_"): self._f(p[prefix + name]) for name in names}
            kept.extend(data.values())
            return data

        kept: list[Any] = []  # a C struct does not keep what it points at
        layers = []
        for layer in range(n_layer):
            prefix = f"h.{layer}."
            layers.append(
                {
                    **floats("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
                    **{"c_attn": linear(prefix + "attn.c_attn")},
                    **{"attn_proj": linear(prefix + "attn.c_proj")},
                    **{"c_fc": linear(prefix + "mlp.c_fc")},
                    **{"mlp_proj": linear(prefix + "mlp.c_proj")},
                }
            )
        prefix = ""
        wpe, F = floats("wpe.weight")["wpe_weight"], layers[0]["c_fc"]["OC"]
        kept.append(self._ffi.new("Layer[]", layers))
        numbers = {"layers": kept[-1], "L": n_layer, "NH": n_head, "F": F, "eps": eps}
        entries = {"wte": linear("wte"), "wpe": wpe, **floats("ln_f.weight", "ln_f.bias")}
        return self._ffi.new("Decoder *", entries | numbers), kept

    def decode_step(
        self,
        logits: Array,
        keys: Array,
        values: Array,
        tokens: Array,
        slots: Array,
        positions: Array,
        model: Any,
    ) -> None:
        """Read one more token of each of N texts, all in one call.

        Parameters
        ----------
        logits : (N, V), written: of what follows each token
        keys, values : (L, S, NH, P, HS), the texts' caches; a row of each is written
        tokens, slots, positions : (N,) int32, each text's token, its cache in [0, S), no two the
            same, and where the token stands in it, in [0, P)
        model : of `bind_decoder`
        """
        f, i, N = self._f, self._i, len(tokens)
        _, S, _, P, _ = keys.shape
        scratch = self._scratch(self._lib.decode_scratch_size(model[0], N, P, self.threads))
        arrays = (f(logits), f(keys), f(values), i(tokens), i(slots), i(positions))
        self._call("decode_step", *arrays, model[0], scratch, N, S, P)
