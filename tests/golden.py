"""Golden files: compare the bits that this commit computes with those of another commit.

    python tests/golden.py write GOLD            # in the clone of the commit before, built
    python tests/golden.py compare GOLD          # here; ends with 1 and a list where bits differ

Models of odd sizes on every backend of this machine: losses, gradients, logits, hidden states, ten
AdamW steps, texts, log-probabilities, weights of 8 and 16 bits, and a run of 40 steps with a
resume. A commit that moves code changes no bit; one that changes an order of sums says so.
The script uses only public names of gpt2c, so that it runs on both sides of a change.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gpt2c

# name: V, n_positions, C, NH, L; heads of 17, 5, 64, 16 and 1 channels
MODELS = {
    "heads-of-17": (61, 32, 34, 2, 2),
    "heads-of-5": (1009, 130, 15, 3, 3),
    "heads-of-64": (257, 64, 128, 2, 1),
    "heads-of-16": (509, 70, 96, 6, 2),
    "heads-of-1": (97, 9, 3, 3, 1),
}
SIZES = ((1, 1), (3, 7), (2, 33), (5, 64), (1, 130))  # B, T; cut to the model's n_positions
RECOMPUTE = (None, "light", "full")
TEXT = "".join(
    f"{number} times {number % 7} is {number * (number % 7)}.\n" for number in range(900)
)
RUN = (
    *("--n-layer", "2", "--n-embd", "24", "--n-head", "3", "--block-size", "17"),
    *("--batch-size", "3", "--gradient-accumulation-steps", "2", "--eval-interval", "10"),
    *("--eval-iters", "2", "--log-interval", "5", "--save-interval", "10"),
)


def model_of(name: str, backend: str, recompute: str | None = None) -> gpt2c.GPT2:
    """Return a model of MODELS whose biases are not 0 and whose gains are not 1."""
    V, P, C, NH, L = MODELS[name]
    config = gpt2c.GPT2Config(vocab_size=V, n_positions=P, n_embd=C, n_head=NH, n_layer=L)
    model = gpt2c.GPT2(config, seed=5, backend=backend, recompute=recompute)
    rng = np.random.default_rng(6)
    model.flat_parameters[...] += 0.05 * rng.standard_normal(
        model.flat_parameters.size, dtype=np.float32
    )
    return model


def training(name: str, backend: str) -> Iterator[tuple[str, Any]]:
    """Return losses, gradients and ten updates, with accumulation and ignored targets."""
    V, P, *_ = MODELS[name]
    for recompute in RECOMPUTE:
        model, rng = model_of(name, backend, recompute), np.random.default_rng(7)
        optimizer = gpt2c.AdamW(model)
        for step in range(10):
            B, T = SIZES[step % len(SIZES)]
            T = min(T, P)
            model.zero_grad()
            for micro in range(1 + step % 3):
                idx, targets = rng.integers(0, V, (2, B, T))
                if B * T > 1:
                    targets[rng.random((B, T)) < 0.2] = -1
                    targets[0, 0] = 1
                yield f"{recompute} loss {step}.{micro}", model.loss(idx, targets)
                model.backward(scale=1 / (1 + step % 3))
            yield f"{recompute} gradients {step}", flat(model.gradients)
            norm = optimizer.step(1e-2, grad_clip=1.0 if step % 2 else None)
            yield f"{recompute} norm {step}", norm
        yield f"{recompute} parameters", flat(model.parameters)
        yield f"{recompute} loss alone", model.loss(idx, targets, keep=False)


def reading(name: str, backend: str) -> Iterator[tuple[str, Any]]:
    """Return logits, hidden states, texts and log-probabilities, with float and smaller weights."""
    V, P, *_ = MODELS[name]
    model, rng = model_of(name, backend), np.random.default_rng(8)
    models: dict[str, Any] = {"fp32": model}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for weights in ("fp16", "int8"):
            models[weights] = gpt2c.GPT2.from_pretrained(folder, backend=backend, quantize=weights)
    prompts = [rng.integers(0, V, length).tolist() for length in (1, min(5, P), P // 2)]
    for weights, model in models.items():
        for B, T in SIZES:
            idx = rng.integers(0, V, (B, min(T, P)))
            yield f"{weights} logits {B}x{T}", model(idx)
            if min(T, P) > 1:
                yield f"{weights} logprobs {B}x{T}", model.logprobs(idx)
        _, states = model(rng.integers(0, V, (2, min(7, P))), hidden_states=True)
        yield f"{weights} hidden states", states
        yield f"{weights} greedy", texts(model, prompts, temperature=0)
        yield (
            f"{weights} sampled",
            texts(model, prompts, seed=3, top_k=20, top_p=0.9, repetition_penalty=1.1),
        )
        yield f"{weights} several", texts(model, prompts[:1], seed=4, num_return_sequences=3)
        tokens, logprobs = model.generate(prompts[:1], 12, temperature=0, logprobs=True)
        yield f"{weights} generated", np.concatenate([np.ravel(tokens), np.ravel(logprobs)])
        with gpt2c.Engine(model, slots=2) as engine:
            requests = [
                engine.submit(prompt, max_new_tokens=9, seed=seed)
                for seed, prompt in enumerate(prompts)
            ]
            yield (
                f"{weights} engine",
                np.concatenate([np.ravel(request.result()) for request in requests]),
            )


def texts(model: Any, prompts: list[list[int]], **settings: Any) -> Any:
    """Return the texts of all prompts, end to end."""
    return np.concatenate([np.ravel(text) for text in model.generate(prompts, 40, **settings)])


def flat(arrays: Any) -> Any:
    """Return arrays by name, end to end."""
    return np.concatenate([np.ravel(arrays[name]) for name in sorted(arrays)])


def run(name: str, backend: str) -> Iterator[tuple[str, Any]]:
    """Train 40 steps at once, and 20 with a resume to 40; return metrics, weights, moments."""
    with tempfile.TemporaryDirectory() as folder:
        text, data = Path(folder, "text.txt"), Path(folder, "data")
        text.write_text(TEXT, encoding="utf-8")
        verb("prepare", str(text), "--out", str(data), "--tokenizer", name)
        for out, parts in (("whole", ("40",)), ("halves", ("20", "40"))):
            path = Path(folder, out)
            for number, steps in enumerate(parts):
                resume = ("--resume",) if number else ()
                options = ("--max-iters", steps, "--backend", backend)
                verb("train", "--data", str(data), "--out", str(path), *RUN, *options, *resume)
            lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            for column in ("loss", "val_loss", "grad_norm", "learning_rate"):
                entries = [json.loads(line).get(column, np.nan) for line in lines]
                if out == "halves" and column == "val_loss":
                    entries[19] = np.nan  # evaluated because the first half ended there
                yield f"{out} {column}", np.array(entries, np.float64)
            newest = max((path / "checkpoints").iterdir())
            for file in sorted(newest.glob("*.safetensors")):
                size = int.from_bytes(file.read_bytes()[:8], "little")
                yield f"{out} {file.name}", np.frombuffer(file.read_bytes()[8 + size :], np.uint8)


def verb(*arguments: str) -> None:
    """Run a verb of the command line."""
    subprocess.run([sys.executable, "-m", "gpt2c", *arguments], check=True, capture_output=True)


def everything(backend: str) -> Iterator[tuple[str, Any]]:
    """Yield name and array, or number, of all results that are compared."""
    for name in MODELS:
        for part in (training, reading):
            for label, value in part(name, backend):
                yield f"{backend} {name} {label}", value
    for tokenizer in ("bytes", "bpe:300"):
        for label, value in run(tokenizer, backend):
            yield f"{backend} run {tokenizer} {label}", value


def main() -> None:
    """Write golden files, or compare with them."""
    parser = argparse.ArgumentParser(description="the bits of another commit, and of this one")
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--backend", action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    same, others = 0, []
    for backend in options.backend or gpt2c.backends():
        path = options.directory / f"{backend}.npz"
        found = {label: np.ascontiguousarray(value) for label, value in everything(backend)}
        if options.action == "write":
            np.savez(path, allow_pickle=False, **found)
            print(f"{path}: {len(found):,} arrays")
            continue
        with np.load(path) as golden:
            for label in sorted(set(golden.files) | set(found)):
                here, there = found.get(label), golden.get(label)
                if here is None or there is None:
                    others.append(f"{label}: only {'there' if here is None else 'here'}")
                elif (here.dtype, here.shape, here.tobytes()) == (
                    *(there.dtype, there.shape),
                    there.tobytes(),
                ):
                    same += 1
                else:
                    others.append(f"{label}: {difference(here, there)}")
    if options.action == "compare":
        print(*others, sep="\n", end="\n" if others else "")
        print(f"{same:,} arrays have the same bits, {len(others):,} have not")
        sys.exit(bool(others))


def difference(here: Any, there: Any) -> str:
    """Return a description of how two arrays differ."""
    if here.shape != there.shape or here.dtype != there.dtype:
        return f"{here.dtype}{here.shape} here, {there.dtype}{there.shape} there"
    apart = np.abs(here.astype(np.float64) - there.astype(np.float64))
    return f"{np.count_nonzero(apart)} of {apart.size} differ, by at most {np.nanmax(apart):.2e}"


if __name__ == "__main__":
    main()
