"""Many requests at once through an Engine, against the same requests one at a time: a table.

    python benchmarks/load.py                     # GPT-2 124M, 64 requests
    python benchmarks/load.py --quantize int8

The weights are random: speed does not depend on their values. Prompts have 8 to 96 tokens. Each
request comes from a thread of its own, and all come at the same moment. Every answer is compared
with the answer to the request alone. Rows take turns; figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpt2c import GPT2, Engine, GPT2Config
from gpt2c.bench.report import provenance

ROUNDS = 3
SHORTEST, LONGEST = 8, 96  # prompts, in tokens

Answers = list[list[int]]


def make_model(options: argparse.Namespace) -> GPT2:
    """Return GPT-2 124M, or one with fewer layers and channels, with random weights."""
    channels = options.n_embd
    config = GPT2Config(n_layer=options.n_layer, n_embd=channels, n_head=max(1, channels // 64))
    model = GPT2(config, seed=1337, backend=options.backend)
    return model if options.quantize is None else model.quantize(options.quantize)


def one_at_a_time(model: GPT2, prompts: Answers, new: int) -> tuple[float, list[float], Answers]:
    """Return the seconds of all, the seconds until each first token, and the answers."""
    start, first, answers = time.perf_counter(), [], []
    for seed, prompt in enumerate(prompts):
        steps = model.stream([prompt], new, seed=seed)
        answers.append([int(next(steps)[0])])
        first.append(time.perf_counter() - start)
        answers[-1] += [int(step[0]) for step in steps]
    return time.perf_counter() - start, first, answers


def together(
    model: GPT2, prompts: Answers, new: int, slots: int
) -> tuple[float, list[float], Answers]:
    """Do the same through an engine, each request from a thread of its own."""
    gate = threading.Barrier(len(prompts) + 1)

    def client(seed: int) -> tuple[float, list[int]]:
        gate.wait()
        tokens = iter(engine.submit(prompts[seed], new, seed=seed))
        answer: list[Any] = [next(tokens)]
        seconds = time.perf_counter() - start
        return seconds, answer + list(tokens)

    with (
        Engine(model, slots=slots, queue=len(prompts)) as engine,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        clients = [pool.submit(client, seed) for seed in range(len(prompts))]
        start = time.perf_counter()
        gate.wait()
        results = [future.result() for future in clients]
        seconds = time.perf_counter() - start
    return seconds, [first for first, _ in results], [answer for _, answer in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64, help="how many (64)")
    parser.add_argument("--new", type=int, default=32, help="tokens that each asks for (32)")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16], help="(8 16)")
    parser.add_argument("--n-layer", type=int, default=12, help="layers (12)")
    parser.add_argument("--n-embd", type=int, default=768, help="channels, heads of 64 (768)")
    parser.add_argument("--quantize", choices=["int8", "fp16"], help="smaller weights")
    parser.add_argument("--backend", default="auto", help="default: the fastest")
    options = parser.parse_args()

    model = make_model(options)
    rng = np.random.default_rng(1337)
    lengths = rng.integers(SHORTEST, LONGEST + 1, options.requests)
    prompts = [rng.integers(0, model.config.vocab_size, T).tolist() for T in lengths]
    print(provenance(model.backend.threads))
    print(
        f"{model.backend.name}, {options.quantize or 'fp32'}; {options.requests} requests,"
        f" prompts of {SHORTEST} to {LONGEST} tokens, {options.new} new ones"
        f" each; median of {ROUNDS} rounds"
    )
    rows: dict[str, list[tuple[float, list[float]]]] = {}
    for _ in range(ROUNDS):
        # In a thread of its own, as an engine is: each has its own kernel threads.
        with ThreadPoolExecutor(1) as pool:
            seconds, first, expected = pool.submit(
                one_at_a_time, model, prompts, options.new
            ).result()
        rows.setdefault("one at a time", []).append((seconds, first))
        for slots in options.slots:
            seconds, first, answers = together(model, prompts, options.new, slots)
            assert answers == expected, "a request got other tokens than alone"
            rows.setdefault(f"{slots} slots", []).append((seconds, first))

    print(f"{'':<14}{'tokens/s':>10}{'first token, s: median':>25}{'95 %':>8}{'ratio':>8}")
    alone = float(np.median([seconds for seconds, _ in rows["one at a time"]]))
    for name, rounds in rows.items():
        seconds = float(np.median([seconds for seconds, _ in rounds]))
        waits = np.median([np.percentile(first, [50, 95]) for _, first in rounds], axis=0)
        rate = options.requests * options.new / seconds
        print(f"{name:<14}{rate:>10,.1f}{waits[0]:>25.2f}{waits[1]:>8.2f}{alone / seconds:>8.2f}")


if __name__ == "__main__":
    main()
