"""A row of a benchmark: a process that verifies one backend, or PyTorch, and times it on command.

    python -m gpt2c.bench.worker ROW THREADS         JSON commands in, JSON answers out, a line each

Each row is a process, because then its threads do not wait for another row's, its memory is counted
alone, and PyTorch's allocator can be set. gpt2c.bench.suite sends the commands.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.bench.machine import ROUNDED_TRAIN_RTOL, fastest, products_of
from gpt2c.bench.suite import GPT2_ENGINES
from gpt2c.formats.load import AnyConfig, config_of
from gpt2c.kernels import reference
from gpt2c.kernels.backend import as_precision, get_backend, why_missing
from gpt2c.kernels.cases import BF16_ATTENTION, EXAMPLES, normalised_error
from gpt2c.kernels.op import OPS
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.quantized import DTYPES
from gpt2c.parallel.world import ALONE, World
from gpt2c.train.plot import row_words
from gpt2c.train.sharded import optimizer_of

__all__ = ["ENGINES", "SMALL", "TINY", "Worker"]

SAMPLE_SECONDS = 0.02  # a sample is at least one call, and calls until this time is over
TINY = GPT2Config(vocab_size=211, n_positions=32, n_embd=48, n_layer=2, n_head=3)
TINY_LLAMA = LlamaConfig(
    vocab_size=211,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
LEARNING_RATE, GRAD_CLIP = 1e-3, 1.0
# PyTorch sums tens of millions of squares in float32.
TORCH_RTOL = {"global_norm": 1e-2}
# Of the losses of three training steps: float32 sums have another order, and AdamW divides by small
# numbers. The parity tests have the same bound.
TRAIN_RTOL = 1e-4
# Of logits: float32 sums have another order. With int8, an activation between two of the 127 steps
# may be rounded the other way; so may a factor of bfloat16, by up to 0.004 of it, and of fp16, by
# an eighth of that.
READ_RTOL = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 0.01, "int8": 0.05}
# The other engines. SMALL, which verifies them, is as wide as their files need it. They are
# compared with float32: their int8 has one scale for a whole row or matrix of activations, and
# llama.cpp keeps keys and values in 16 bits.
ENGINES = (
    *("transformers", "transformers-compile", "onnxruntime", "ctranslate2", "llama.cpp"),
    "openvino",
)
SMALL = GPT2Config(vocab_size=320, n_positions=32, n_embd=128, n_layer=2, n_head=2)
SMALL_LLAMA = LlamaConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
ENGINES_RTOL = {"llama.cpp:fp32": 1e-2, "llama.cpp:fp16": 1e-2, "llama.cpp:int8": 0.1}
ENGINES_RTOL |= {"onnxruntime:int8": 0.3, "ctranslate2:int8": 0.3}
ENGINES_RTOL |= {"openvino:bf16": 0.05, "openvino:int8": 0.1}
SOME = 8  # decoding steps before the texts begin again: few, so that their length stays near T


class Worker:
    """One row.

    Parameters
    ----------
    row : a backend or one of ENGINES, with the kind of its weights, such as "avx2:int8", or the
        precision of its products in training and ops, "avx2:bf16" or "avx512fp16:fp16"; a third
        word is the type of its keys and values, "avx2:int8:fp16"; or "torch...": PyTorch, compiled
        if the name contains "compile", with autocast to bfloat16 if it contains "bf16"
    threads : number of threads
    world : the ranks that share the batch of a training step
    """

    def __init__(self, row: str, threads: int, world: World = ALONE) -> None:
        self._row, self._precision, cache = row_words(row)
        self._cache = cache or "fp32"
        self._world = world
        self._call: Callable[[], Any] = lambda: None
        self._threads = threads
        if row.startswith("torch"):
            import torch

            torch.set_num_threads(threads)
        elif self._row not in ENGINES:
            self._backend = get_backend(self._row, threads)
        self._products = products_of(row)

    def hello(self) -> dict[str, Any]:
        """Answer, to show that the row runs."""
        return {}

    def op(self, name: str, shape: dict[str, Any]) -> dict[str, Any]:
        """Prepare an op and compare its results with the reference's, in float64."""
        example, outputs = EXAMPLES[name], len(OPS[name].outputs)
        rtol = example.rtol
        if self._products != "fp32":
            if "precision" not in OPS[name].numbers:
                return {"missing": "it has no products of matrices"}
            shape = shape | {"precision": self._products}
            rounded = name.startswith("attention") and self._products == "bf16"
            rtol = BF16_ATTENTION if rounded else rtol
        wide = example.make(np.random.default_rng(zlib.crc32(f"{name} {shape}".encode())), **shape)
        if name != "adamw_update":
            for output in wide[:outputs]:
                # An accumulated output starts at 0, because PyTorch returns only the new part. A
                # written output holds NaN, so that an element left out shows.
                if output is not None and not np.isnan(output).any():
                    output[...] = 0
        narrow = [_narrow(argument) for argument in wide]
        if self._row.startswith("torch"):
            from gpt2c.bench.peers import torch_op

            call = torch_op(name, narrow)
            if call is None:
                return {"missing": "PyTorch has no such op"}
            results = [None if r is None else r.detach().numpy().copy() for r in call()]
            rtol = TORCH_RTOL.get(name, max(rtol, 1e-5))
        else:
            run = getattr(self._backend, name)
            call = lambda: run(*narrow)  # noqa: E731
            result = call()
            results = narrow[:outputs] or [result]
            results = [None if r is None else np.array(r) for r in results]
        expected = getattr(reference, name)(*wide)
        wanted = wide[:outputs] or [expected]
        errors = [
            normalised_error(a, b)
            for a, b in zip(results, wanted, strict=True)
            if a is not None and b is not None
        ]
        self._call = call
        return {"error": float(np.max(errors)), "rtol": rtol}  # NaN if one is NaN

    def sample(self) -> dict[str, Any]:
        """Return the seconds of a call, after one that warms up, and the memory in bytes."""
        if self._row in ENGINES:
            return {"seconds": self._call.seconds(), "memory": _resident()}  # type: ignore[attr-defined]
        self._call()
        calls, start = 0, time.perf_counter()
        while True:
            self._call()
            calls += 1
            seconds = time.perf_counter() - start
            if seconds >= SAMPLE_SECONDS:
                return {"seconds": seconds / calls, "memory": _resident()}

    def train(
        self, config: dict[str, Any], B: int, T: int, recompute: str | None
    ) -> dict[str, Any]:
        """Prepare a model; compare three steps of a small one with the numpy backend's.

        The first step is part of this: it fills memory and may compile.
        """
        given = config_of(config)
        tiny = TINY if isinstance(given, GPT2Config) else TINY_LLAMA
        small = _batch(tiny, 2 * self._world.size, 16)
        checked, step = self._step(tiny, small, recompute), _own_step("numpy", tiny, small, None)
        losses = [(checked(), step()) for _ in range(3)]
        error = float(np.max([abs(a - b) / abs(b) for a, b in losses]))
        self._call = self._step(given, _batch(given, B, T), recompute)
        rtol = TRAIN_RTOL if self._products == "fp32" else ROUNDED_TRAIN_RTOL
        return {"error": error, "rtol": rtol, "first_loss": self._call()}

    def step(self) -> dict[str, Any]:
        """Return the seconds of a training step, its loss, and the peak of memory in bytes."""
        start = time.perf_counter()
        loss = self._call()
        seconds = time.perf_counter() - start
        unit = 1024 if sys.platform == "linux" else 1  # macOS counts bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"seconds": seconds, "loss": loss, "peak_memory": memory}

    def _step(
        self, config: AnyConfig, batch: tuple[Any, Any], recompute: str | None
    ) -> Callable[[], float]:
        if not self._row.startswith("torch"):
            precision = self._precision or "fp32"
            return _own_step(self._backend, config, batch, recompute, precision, self._world)
        from gpt2c.bench.peers import torch_step

        parameters = Model(config, backend="numpy").parameters
        compiled = "compile" in self._row
        return torch_step(
            config, parameters, *batch, LEARNING_RATE, GRAD_CLIP, compiled, self._products == "bf16"
        )

    def generate(self, what: str, config: dict[str, Any], B: int, T: int) -> dict[str, Any]:
        """Prepare a model for inference; compare a small one's logits with the numpy backend's.

        Parameters
        ----------
        what : "prefill" of T tokens, or "decode": one token more of each of B texts of T tokens
        """
        given = config_of(config)
        if self._products == "bf16" and (why := why_missing("avx512bf16")):
            return {"missing": why}
        if isinstance(given, GPT2Config):
            tiny: AnyConfig = SMALL if self._row in ENGINES else TINY
        elif self._row in GPT2_ENGINES:
            return {"missing": "measured with GPT-2 only"}
        else:
            tiny = SMALL_LLAMA if self._row in ENGINES else TINY_LLAMA
        small = (
            what,
            tiny,
            B,
            tiny.n_positions - SOME,
        )  # enough rows for the timed kernels
        if self._row in ENGINES:
            rtol = ENGINES_RTOL.get(f"{self._row}:{self._precision}", READ_RTOL["fp32"])
            wanted = _own_reader("numpy", ("fp32", "fp32", "fp32"), *small)()
        else:
            kinds = self._kinds()
            weights, cache, products = kinds
            of_weights = READ_RTOL["int8" if weights == "int8" else "fp32"]  # fp16 is exact
            rtol = max(of_weights, READ_RTOL[cache], READ_RTOL[products])
            wanted = _own_reader("numpy", kinds, *small)()
        error = normalised_error(self._reader(*small)(), wanted)
        self._call = self._reader(what, given, B, T)
        return {"error": error, "rtol": rtol}

    def _kinds(self) -> tuple[str, str, str]:
        """Return the types of weights, of keys and values, and of the factors of products.

        Beside smaller weights, products are the fastest that there are.
        """
        small = self._precision in DTYPES
        products = as_precision("auto" if small else "fp32", self._backend)
        return self._precision if small else "fp32", self._cache, products

    def _reader(self, what: str, config: AnyConfig, B: int, T: int) -> Callable[[], Any]:
        if self._row not in ENGINES:
            return _own_reader(self._backend, self._kinds(), what, config, B, T)
        from gpt2c.bench.engines import PEERS

        parameters, texts = Model(config, backend=fastest()).parameters, _texts(config, B, T)
        made = PEERS[self._row]
        return made(config, parameters, self._precision, what, texts, SOME, self._threads)


def _resident() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def _own_reader(
    backend: Any, kinds: tuple[str, str, str], what: str, config: AnyConfig, B: int, T: int
) -> Callable[[], Any]:
    """Return a call that reads a prompt, or one token more of each text, and returns logits.

    The texts grow for SOME calls, then begin again.
    """
    weights, cache, products = kinds
    model = Model(config, backend=backend, precision=products)
    if weights in DTYPES:
        model = model.quantize(weights)
    texts = _texts(config, B, T)
    decoder = model.decoder(B, T + SOME, cache)
    if what == "prefill":
        return lambda: decoder.read(texts[0], 0, 0)
    for slot, text in enumerate(texts):
        decoder.read(text, slot, 0)
    slots, calls = np.arange(B, dtype=np.int32), count()

    def step() -> Any:
        position = T + next(calls) % SOME
        return decoder.step(texts[:, position % T].copy(), slots, np.full(B, position, np.int32))

    return step


def _texts(config: AnyConfig, B: int, T: int) -> Any:
    return np.random.default_rng(7).integers(0, config.vocab_size, (B, T), np.int32)


def _narrow(argument: Any) -> Any:
    is_wide = isinstance(argument, np.ndarray) and argument.dtype == np.float64
    return argument.astype(np.float32) if is_wide else argument


def _batch(config: AnyConfig, B: int, T: int) -> tuple[Any, Any]:
    """Return random tokens: speed does not depend on their values."""
    tokens = np.random.default_rng(1337).integers(0, config.vocab_size, (B, T + 1), np.int32)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def _own_step(
    backend: Any,
    config: AnyConfig,
    batch: tuple[Any, Any],
    recompute: str | None,
    precision: str = "fp32",
    world: World = ALONE,
) -> Callable[[], float]:
    model = Model(config, backend=backend, recompute=recompute, precision=precision)
    optimizer, exchange = optimizer_of(world, model, 1, "fp32", learning_rate=LEARNING_RATE)
    rows, share = len(batch[0]) // world.size, 1 / world.size
    idx, targets = (part[world.rank * rows :][:rows] for part in batch)

    def step() -> float:
        model.zero_grad()
        loss = model.loss(idx, targets) * share
        model.backward(share, final=exchange.send if exchange else None)
        if exchange:
            exchange.finish()
        optimizer.step(grad_clip=GRAD_CLIP)
        if exchange:  # here, where the clock runs: ranks talk between the steps of a benchmark
            exchange.arrive()
        return world.sum([loss])[0]

    return step


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other prints are no answers: they go to standard error
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
