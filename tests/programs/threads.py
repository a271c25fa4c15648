"""Threads: a pool ends with its thread, and two callers do not disturb each other."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import gpt2c
from gpt2c.kernels.backend import get_backend
from programs.common import CONFIG, IDX, in_thread, main, threads, train


def pool_ends() -> None:
    train(1)
    before = threads()
    for _ in range(3):
        assert in_thread(train, 1) == train(1)
    assert threads() == before


def bound_core() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        sys.exit()
    os.sched_setaffinity(0, {min(cores)})  # as OpenMP does with the thread that loads it
    train(1)
    allowed = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    assert len(allowed) > 1 and allowed.count(cores) == len(allowed) - 1, allowed
    assert os.sched_getaffinity(0) == {min(cores)}


def counts() -> None:
    results = set()
    for count in (1, 2, 3, 8):
        model = gpt2c.GPT2(CONFIG, seed=1, backend=get_backend("auto", count))
        model.loss(IDX, IDX)
        model.backward()
        gradients = (gradient.tobytes() for gradient in model.gradients.values())
        results.add((model.flat_parameters.tobytes(), *gradients))
    assert len(results) == 1


def models_at_once() -> None:
    def write(model: Any, seed: int) -> Any:
        return model.generate(IDX[:, :5], 20, seed=seed).tolist()

    readers: list[Any] = [gpt2c.GPT2(CONFIG, seed=1)]
    readers.append(gpt2c.GPT2(CONFIG).quantize("int8"))
    trained = [train(seed, 10) for seed in (1, 2)]
    written = [write(model, 5) for model in readers]
    logits = readers[1](IDX)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            training = [pool.submit(train, seed, 10) for seed in (1, 2)]
            writing = [pool.submit(write, model, 5) for model in readers]
            assert [future.result() for future in training] == trained
            assert [future.result() for future in writing] == written
            same = [pool.submit(write, readers[0], 5) for _ in range(3)]  # one model, three threads
            assert all(future.result() == written[0] for future in same)
            read = [pool.submit(readers[1], IDX) for _ in range(3)]  # small weights: each alone
            assert all(np.array_equal(future.result(), logits) for future in read)


def one_model_at_once() -> None:
    model = gpt2c.GPT2(CONFIG)
    batches = [IDX, IDX[:1, :3], IDX[:2], IDX[:, :17]]
    expected = [model.loss(batch, batch) for batch in batches]
    logits = [model(batch) for batch in batches]
    counts = {"right": 0, "refused": 0}

    def work(number: int) -> None:
        for _ in range(150):
            try:
                if number == 3:
                    assert np.array_equal(model(batches[number]), logits[number])
                else:
                    assert model.loss(batches[number], batches[number]) == expected[number]
                    model.backward()
                counts["right"] += 1
            except RuntimeError as error:
                assert "another thread" in str(error)
                counts["refused"] += 1
            except ValueError as error:  # another thread computed a loss in between
                assert "backward needs a loss" in str(error)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result()  # or what its thread raised
    assert counts["right"] and counts["refused"], counts
    assert model.loss(IDX, IDX) == expected[0]


if __name__ == "__main__":
    main(globals())
