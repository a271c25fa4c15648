"""The binding: the ops of gpt2c.reference on the C kernels of one instruction set.

Each method hands pointers and sizes to the C function of the same name and returns when it has
written its outputs; what the op means stands in `gpt2c.reference`. Arrays must be C-contiguous
float32 (int32 for idx and targets) of the shapes given there: the doors, `gpt2c.ops` and
`gpt2c.model`, see to it once. Knows nothing about models.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from gpt2c.memory import aligned_zeros

Array = NDArray[Any]


def stack_size() -> int:
    """Give the bytes of a stack that OMP_STACKSIZE or GOMP_STACKSIZE asks for, as libgomp reads it.

    0 is the system's default, which it takes where it cannot read them.
    """
    for variable in ("OMP_STACKSIZE", "GOMP_STACKSIZE"):
        value = os.environ.get(variable, "").strip()
        if found := re.fullmatch(r"(\d{1,18})\s*([bkmg]?)", value, re.ASCII | re.IGNORECASE):
            size = int(found[1]) << {"b": 0, "k": 10, "m": 20, "g": 30}[found[2].lower() or "k"]
            if size < 2**63:
                return size
    return 0


class Team(threading.local):
    """OpenMP's threads that wait for the next kernel of this Python thread: `size` with itself."""

    size = 1

    def start(self, lib: Any, size: int) -> None:
        """Start so many, or refuse: OpenMP ends the process when it cannot start a thread.

        Raises
        ------
        OSError : the system does not give so many threads
        """
        self.release()
        with _starting:  # two at once would each find what is there for one
            available = lib.start_threads(size, stack_size())
        if available < size:
            raise OSError(
                f"{size} threads are wanted and the system gives {available}: set GPT2C_NUM_THREADS"
                " to fewer, or raise its limit of processes (ulimit -u) or of memory (ulimit -v)"
            )
        self.size = size

    def release(self) -> None:
        """Let them go, before a fork: they would stay behind, and the child wait for them.

        Those of others too, who may share OpenMP's library with the kernels: PyTorch does.
        """
        if _loaded is not None:
            _loaded.release_threads()
        self.size = 1


def _after_fork() -> None:
    """Let the child start threads, whoever was about to at the fork."""
    global _starting
    _starting = threading.Lock()


_loaded: Any = None  # some kernels: all share OpenMP's library
_starting = threading.Lock()
TEAM = Team()
os.register_at_fork(before=TEAM.release, after_in_child=_after_fork)


class Kernels:
    """One compiled set of kernels with a fixed number of threads.

    Parameters
    ----------
    name : "base", "avx2" or "avx512"; the CPU must have its features, or importing it ends the
        process
    threads : how many threads each kernel uses
    """

    def __init__(self, name: str, threads: int) -> None:
        global _loaded
        module = importlib.import_module(f"gpt2c._kernels_{name}")
        self.name = name
        self.threads = threads
        self._lib = _loaded = module.lib
        # Bytes, more than OpenMP takes to start a kernel: about 300 for each thread.
        self._room = 4096 + 512 * threads
        self._ffi = module.ffi
        self._from_buffer = module.ffi.from_buffer
        self._null = module.ffi.NULL
        self._floats, self._ints = module.ffi.typeof("float[]"), module.ffi.typeof("int32_t[]")
        # The GIL is released while C runs, so each Python thread needs scratch of its own.
        self._local = threading.local()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a kernel, once there is what OpenMP needs for it, or the process would end.

        Raises
        ------
        OSError : the system does not give so many threads
        MemoryError : nor the memory to start them, or the kernel
        """
        kernel = getattr(self._lib, name)
        try:
            if TEAM.size != self.threads > 1:
                bytearray(self._room)
                TEAM.start(self._lib, self.threads)
            bytearray(self._room)  # and it is free again, for OpenMP to take
        except MemoryError as error:
            raise MemoryError(f"{self._room:,} bytes are wanted to start {name}") from error
        return kernel(*arguments)

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
        return float(self._call("fma_burn", iterations, self.threads))

    def memory_read(self, data: Array) -> float:
        """Read `data` once, up to a last part below 1 KB; return the sum of what was read."""
        return float(self._call("memory_read", self._f(data), data.size, self.threads))

    def encoder_forward(self, out: Array, idx: Array, wte: Array, wpe: Array) -> None:
        """See `gpt2c.reference.encoder_forward`."""
        B, T, C = out.shape
        arrays = (self._f(out), self._i(idx), self._f(wte), self._f(wpe))
        self._call("encoder_forward", *arrays, B, T, C, self.threads)

    def encoder_backward(self, dwte: Array, dwpe: Array, dout: Array, idx: Array) -> None:
        """See `gpt2c.reference.encoder_backward`."""
        B, T, C = dout.shape
        arrays = (self._f(dwte), self._f(dwpe), self._f(dout), self._i(idx))
        self._call("encoder_backward", *arrays, B, T, C, self.threads)

    def layernorm_forward(
        self, out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array, eps: float
    ) -> None:
        """See `gpt2c.reference.layernorm_forward`."""
        N, C = x.shape
        arrays = (out, mean, rstd, x, weight, bias)
        self._call("layernorm_forward", *map(self._f, arrays), eps, N, C, self.threads)

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
        self._call("layernorm_backward", *map(self._f, arrays), N, C, self.threads)

    def matmul_forward(self, out: Array, x: Array, weight: Array, bias: Array | None) -> None:
        """See `gpt2c.reference.matmul_forward`."""
        OC, C = weight.shape
        scratch = self._scratch(self._lib.matmul_scratch_size(self.threads))
        arrays, sizes = (out, x, weight, bias), (x.shape[0], C, OC, self.threads)
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
        sizes = (x.shape[0], C, OC, self.threads)
        self._call("matmul_backward", *map(self._f, arrays), accumulate, scratch, *sizes)

    def matrix_transpose(self, out: Array, x: Array) -> None:
        """See `gpt2c.reference_reading.matrix_transpose`."""
        self._call("matrix_transpose", self._f(out), self._f(x), *x.shape, self.threads)

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
        self._call("linear_forward", *arrays, kind, scratch, *sizes, self.threads)

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
        self._call("cache_attention_forward", *arrays, position, scratch, T, C, NH, P, self.threads)

    def attention_forward(self, out: Array, lse: Array, qkv: Array) -> None:
        """See `gpt2c.reference.attention_forward`."""
        B, T, C = out.shape
        NH = lse.shape[1]
        scratch = self._scratch(self._lib.attention_scratch_size(T, C // NH, self.threads))
        arrays = (out, lse, qkv)
        self._call("attention_forward", *map(self._f, arrays), scratch, B, T, C, NH, self.threads)

    def attention_backward(
        self, dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array
    ) -> None:
        """See `gpt2c.reference.attention_backward`."""
        B, T, C = out.shape
        NH = lse.shape[1]
        scratch = self._scratch(self._lib.attention_scratch_size(T, C // NH, self.threads))
        arrays = (dqkv, dout, qkv, out, lse)
        self._call("attention_backward", *map(self._f, arrays), scratch, B, T, C, NH, self.threads)

    def gelu_forward(self, out: Array, x: Array) -> None:
        """See `gpt2c.reference.gelu_forward`."""
        self._call("gelu_forward", self._f(out), self._f(x), x.size, self.threads)

    def gelu_backward(self, dx: Array, dout: Array, x: Array) -> None:
        """See `gpt2c.reference.gelu_backward`."""
        self._call("gelu_backward", self._f(dx), self._f(dout), self._f(x), x.size, self.threads)

    def residual_forward(self, out: Array, x: Array, branch: Array) -> None:
        """See `gpt2c.reference.residual_forward`."""
        arrays = (out, x, branch)
        self._call("residual_forward", *map(self._f, arrays), x.size, self.threads)

    def residual_backward(self, dx: Array, dbranch: Array, dout: Array) -> None:
        """See `gpt2c.reference.residual_backward`."""
        arrays = (dx, dbranch, dout)
        self._call("residual_backward", *map(self._f, arrays), dout.size, self.threads)

    def crossentropy_forward(
        self, losses: Array, lse: Array, logits: Array, targets: Array
    ) -> None:
        """See `gpt2c.reference.crossentropy_forward`."""
        N, V = logits.shape
        arrays = (*map(self._f, (losses, lse, logits)), self._i(targets))
        self._call("crossentropy_forward", *arrays, N, V, self.threads)

    def crossentropy_backward(
        self, dlogits: Array, logits: Array, lse: Array, targets: Array, scale: float
    ) -> None:
        """See `gpt2c.reference.crossentropy_backward`."""
        N, V = logits.shape
        arrays = (*map(self._f, (dlogits, logits, lse)), self._i(targets))
        self._call("crossentropy_backward", *arrays, scale, N, V, self.threads)

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
        self._call("adamw_update", *map(self._f, arrays), *scalars, param.size, self.threads)

    def global_norm(self, grad: Array) -> float:
        """See `gpt2c.reference.global_norm`."""
        return float(self._call("global_norm", self._f(grad), grad.size, self.threads))

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
        self._call("decode_step", *arrays, model[0], scratch, N, S, P, self.threads)
