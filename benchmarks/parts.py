"""Where a training step's time goes, part by part: the floor, gpt2c and PyTorch. Prints Markdown.

    python benchmarks/parts.py 1 1024          B, T; PyTorch's column needs torch
    python benchmarks/parts.py 1 1024 bf16     the same with products of bfloat16, PyTorch's too

The floor of a part is its cost in gpt2c.kernels.cases against the ceilings measured at the start.
gpt2c's calls are timed one by one inside whole steps, PyTorch's by its profiler; both are summed by
part. PyTorch is fastest with GLIBC_TUNABLES set to gpt2c.bench.suite.TUNED.
"""

from __future__ import annotations

import collections
import importlib.util
import sys
import time
from typing import Any

import numpy as np

from gpt2c import GPT2, AdamW, GPT2Config
from gpt2c.bench.machine import measure_ceilings
from gpt2c.bench.report import provenance
from gpt2c.kernels.backend import default_threads, get_backend
from gpt2c.kernels.cases import EXAMPLES

STEPS = 4
# PyTorch's operators by part; the lm head's matrix products have V among their sizes
PYTORCH = {
    "_scaled_dot_product_flash_attention_for_cpu": "attention_forward",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention_backward",
    "gelu": "gelu_forward",
    "gelu_backward": "gelu_backward",
    "native_layer_norm": "layernorm_forward",
    "native_layer_norm_backward": "layernorm_backward",
    "_log_softmax": "crossentropy_forward",
    "nll_loss_forward": "crossentropy_forward",
    "_log_softmax_backward_data": "crossentropy_backward",
    "nll_loss_backward": "crossentropy_backward",
    "_fused_adamw_": "adamw_update",
    "linalg_vector_norm": "global_norm",
    "mul_": "global_norm",
    "embedding": "encoder_forward",
    "embedding_dense_backward": "encoder_backward",
}


class Timed:
    """A backend that sums the seconds of its calls by part, and the least they can take."""

    def __init__(self, backend: Any, ceilings: Any) -> None:
        self._backend, self._ceilings = backend, ceilings
        self.threads = backend.threads
        self.name = backend.name
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.floor: dict[str, float] = collections.defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._backend, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            part = name
            shape = _shape(name, arguments)
            if name.startswith("matmul"):
                part = f"lm_head {name}" if shape["OC"] == V else f"layers' {name}"
            self.seconds[part] += time.perf_counter() - start
            cost = EXAMPLES[name].cost(**shape)
            self.floor[part] += self._ceilings.seconds(self.name, *cost)
            return result

        return call


def _shape(name: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    first = arguments[0]
    if name.startswith("matmul"):
        x, weight = arguments[1:3] if name == "matmul_forward" else arguments[4:6]
        shape = {"N": len(x), "C": weight.shape[1], "OC": len(weight)}
        return shape | ({"accumulate": True} if name == "matmul_backward" else {})
    if name.startswith("attention"):
        B, NH, T = arguments[4 if name == "attention_backward" else 1].shape
        return {"B": B, "T": T, "NH": NH, "HS": C // NH}
    if name.startswith("encoder"):
        B, T, _ = (first if name == "encoder_forward" else arguments[2]).shape
        return {"B": B, "T": T, "C": C, "V": V}
    if name.startswith("layernorm"):
        return {"N": first.size // C, "C": C}
    if name.startswith("crossentropy"):
        logits = arguments[2 if name == "crossentropy_forward" else 0]
        return {"N": len(logits), "V": V}
    return {"n": first.size}


def pytorch(
    config: GPT2Config, idx: Any, targets: Any, threads: int, bf16: bool
) -> dict[str, float]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from gpt2c.bench.peers import torch_step

    torch.set_num_threads(threads)
    parameters = GPT2(config, backend="numpy").parameters
    step = torch_step(config, parameters, idx, targets, 1e-3, 1.0, compiled=False, bf16=bf16)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(STEPS):
            step()
    seconds: dict[str, float] = collections.defaultdict(float)
    events = [e for e in profiler.key_averages(group_by_input_shape=True) if "::" in e.key]
    for event in events:
        name, sizes = event.key.removeprefix("aten::"), event.input_shapes
        wide = any(V in size for size in sizes if isinstance(size, list))
        if name == "addmm":
            part = "layers' matmul_forward"
        elif name == "mm" and wide:
            forward = V == sizes[1][-1]
            part = f"lm_head matmul_{'forward' if forward else 'backward'}"
        elif name == "mm":
            part = "layers' matmul_backward"
        elif name == "fill_" and wide:
            part = "crossentropy_backward"
        else:
            part = PYTORCH.get(name, "the rest")
        seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def main() -> None:
    B, T = int(sys.argv[1]), int(sys.argv[2])
    precision = sys.argv[3] if len(sys.argv) > 3 else "fp32"
    threads = default_threads()
    ceilings = measure_ceilings(threads)
    config = GPT2Config()
    tokens = np.random.default_rng(1337).integers(0, V, (B, T + 1), np.int32)
    idx, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    backend: Any = Timed(get_backend("auto", threads), ceilings)
    model = GPT2(config, backend=backend, precision=precision)
    optimizer = AdamW(model, learning_rate=1e-3)
    total = 0.0
    for step in range(STEPS + 2):
        if step == 2:
            backend.seconds.clear()
            backend.floor.clear()
        start = time.perf_counter()
        model.zero_grad()
        model.loss(idx, targets)
        model.backward()
        optimizer.step(grad_clip=1.0)
        total += time.perf_counter() - start if step >= 2 else 0.0
    backend.seconds["the rest"] = total - sum(backend.seconds.values())
    del model, optimizer
    theirs = {}
    if importlib.util.find_spec("torch"):
        theirs = pytorch(config, idx, targets, threads, precision == "bf16")
    peak, bandwidth = 1 / ceilings.seconds("", 1, 0), ceilings.bandwidth[threads]
    print(provenance(threads))
    print(f"\n{B} x {T}: peak {peak / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.0f} GB/s\n")
    names, rows = ["floor", "gpt2c"], [backend.floor, backend.seconds]
    if theirs:
        names, rows = [*names, "PyTorch"], [*rows, theirs]
    print("| part | " + " | ".join(f"{name}, ms" for name in names) + " |")
    print("|---|" + "---:|" * len(rows))
    parts = sorted(backend.seconds, key=lambda part: -backend.seconds[part])
    parts.sort(key=lambda part: part == "the rest")
    columns = [[row.get(part, 0.0) / STEPS * 1e3 for part in parts] for row in rows]
    for part, *values in zip(parts, *columns, strict=True):
        print(f"| {part.replace('_', ' ')} | " + " | ".join(f"{v:,.1f}" for v in values) + " |")
    print("| **sum** | " + " | ".join(f"**{sum(column):,.0f}**" for column in columns) + " |")


V, C = GPT2Config().vocab_size, GPT2Config().n_embd

if __name__ == "__main__":
    main()
