"""How far gradients in 16 bits are from those in float64, beside PyTorch's autocast: a table.

    python benchmarks/gradients.py                     # GPT-2 124M, 256 tokens: a minute
    python benchmarks/gradients.py --json FILE

All have the same weights, first values of training, and the same random tokens. An error is
|g - exact| / |exact|, of the whole gradient and of the parameter where it is largest. PyTorch
computes the exact gradients in float64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c import GPT2, GPT2Config
from gpt2c.bench.machine import fastest_for
from gpt2c.bench.report import provenance
from gpt2c.kernels.backend import Precision
from gpt2c.kernels.limits import usable_cores

Gradients = dict[str, Any]
SEEDS = 3


def of_gpt2c(model: GPT2, precision: Precision, batch: Any) -> Gradients:
    """Return the gradients of the mean loss of a batch."""
    own = GPT2(model.config, seed=None, backend=fastest_for(precision), precision=precision)
    own.flat_parameters[...] = model.flat_parameters
    own.zero_grad()
    own.loss(*batch)
    own.backward()
    return {name: array.astype(np.float64) for name, array in own.gradients.items()}


def of_torch(model: GPT2, kind: str, batch: Any) -> Gradients:
    """Return the same from PyTorch, in "float64", "float32" or "autocast" to bfloat16."""
    import torch

    from gpt2c.bench.peers import torch_model, torch_name

    other = torch_model(model.config, model.parameters)
    other = other.double() if kind == "float64" else other
    idx, targets = (torch.from_numpy(array).long() for array in batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = other(idx, targets)
    loss.backward()
    found = dict(other.named_parameters(remove_duplicate=False))
    gradients = {name: found[torch_name(name)].grad for name in model.parameters}
    return {name: array.double().numpy() for name, array in gradients.items() if array is not None}


def errors(found: Gradients, exact: Gradients) -> dict[str, Any]:
    """Return the error of the whole, and the largest of a parameter with its name."""
    square = {name: float(((found[name] - exact[name]) ** 2).sum()) for name in exact}
    size = {name: float((exact[name] ** 2).sum()) for name in exact}
    each = {name: (square[name] / size[name]) ** 0.5 for name in exact if size[name]}
    worst = max(each, key=lambda name: each[name])
    whole = (sum(square.values()) / sum(size.values())) ** 0.5
    return {"whole": whole, "largest": each[worst], "of": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    machine = provenance(usable_cores())
    print(machine, "", "| gradients | seed | whole | largest of a parameter |", sep="\n")
    print("|---|---:|---:|---|")
    rows = []
    for seed in range(1, SEEDS + 1):
        model = GPT2(GPT2Config(), seed=seed, backend="auto")
        tokens = np.random.default_rng(seed).integers(0, 50257, (1, given.tokens + 1), np.int32)
        batch = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        exact = of_torch(model, "float64", batch)
        for name, found in (
            ("gpt2c bf16", of_gpt2c(model, "bf16", batch)),
            ("gpt2c fp16", of_gpt2c(model, "fp16", batch)),
            ("PyTorch autocast", of_torch(model, "autocast", batch)),
            ("gpt2c fp32", of_gpt2c(model, "fp32", batch)),
            ("PyTorch float32", of_torch(model, "float32", batch)),
        ):
            row = {"gradients": name, "seed": seed, **errors(found, exact)}
            rows.append(row)
            print(
                f"| {name} | {seed} | {row['whole']:.2e} | {row['largest']:.2e} ({row['of']}) |",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
