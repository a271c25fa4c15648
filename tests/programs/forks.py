"""Forks: parent and child compute the same bits, and neither waits for the other."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import gpt2c
from programs.common import CONFIG, IDX, in_child, in_thread, main, memory, threads, train


def in_turn() -> None:
    expected = train(1), train(2)
    assert threads() > 2, "it is the pool's threads that are tested"

    def child() -> bool:
        ok = train(1) == expected[0]
        in_child(lambda: train(2) == expected[1])
        return ok and train(2) == expected[1]

    for _ in range(3):
        in_child(child)
        assert train(2) == expected[1]
    in_child(lambda: in_thread(train, 1) == expected[0])


def pool(used: str) -> None:
    if used == "before":
        train(0)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map_async(train, range(6))
        expected = [train(seed) for seed in range(6)]
        assert results.get(60) == expected
        assert pool.map(train, range(3)) == expected[:3]


def from_a_thread(*computing: str) -> None:
    expected = in_thread(train, 1)
    if "main" in computing:
        train(1)

    def thread() -> bool:
        if "thread" in computing:
            train(1)
        in_child(lambda: train(1) == expected and in_thread(train, 1) == expected)
        return bool(train(1) == expected)

    assert in_thread(thread) and train(1) == expected


def while_another_computes() -> None:
    expected, over = train(1), threading.Event()
    model = gpt2c.GPT2(CONFIG)
    loss = model.loss(IDX, IDX)
    model.backward()
    gradient = model.flat_gradients.tobytes()

    def work() -> None:
        while not over.is_set():
            model.loss(IDX, IDX)
            model.backward()

    worker = threading.Thread(target=work)
    worker.start()

    def child() -> bool:  # where the busy worker thread does not exist
        model.zero_grad()
        fresh = model.loss(IDX, IDX)
        model.backward()
        same = fresh == loss and model.flat_gradients.tobytes() == gradient
        return same and train(1) == expected

    for _ in range(10):
        in_child(child)
        time.sleep(0.01)
    over.set()
    worker.join()


def engine() -> None:
    model = gpt2c.GPT2(CONFIG)
    with gpt2c.Engine(model, slots=2) as engine:
        expected = engine.submit([1, 2, 3], 9, seed=1).result().tolist()
        for _ in range(5):
            request = engine.submit([1, 2, 3], 10**9, seed=1)
            reading = iter(request)
            assert next(reading) == expected[0]
            calls: list[Callable[[], Any]] = [
                request.result,
                partial(list, reading),
                lambda: engine.submit([1]),
            ]

            def child(request: Any = request, calls: Any = calls) -> bool:
                for call in calls:
                    try:
                        call()
                    except RuntimeError as error:
                        assert "start another one in the child" in str(error), error
                    else:
                        return False
                request.cancel()
                engine.close()
                with gpt2c.Engine(model) as own:
                    return bool(own.submit([1, 2, 3], 9, seed=1).result().tolist() == expected)

            in_child(child)
            request.cancel()
            tokens = request.result()[:9].tolist()
            assert tokens and tokens == expected[: len(tokens)]


def child_ends_by_itself() -> None:
    engine = gpt2c.Engine(gpt2c.GPT2(CONFIG))
    engine.submit([1, 2, 3], 10**9)
    time.sleep(0.1)
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0


def nothing_left() -> None:
    x = np.ones(50_000, np.float32)

    def turn() -> None:
        in_child(lambda: bool(gpt2c.ops.gelu_forward(x)[-1] > 0.8))
        gpt2c.ops.gelu_forward(x)

    def held() -> tuple[int, int]:
        return threads(), len(os.listdir("/proc/self/fd"))

    for _ in range(10):
        turn()
    before, size = held(), memory(1)
    for _ in range(100):
        turn()
    assert held() == before and before[0] > 1, (before, held())
    assert memory(1) - size < 1 << 20, memory(1) - size  # 10 KB a fork


if __name__ == "__main__":
    main(globals())
