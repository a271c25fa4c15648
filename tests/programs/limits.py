"""Limits of threads and memory: an error comes in time, and smaller work still succeeds."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c import GPT2, AdamW, Engine
from gpt2c.kernels.backend import get_backend
from programs.common import CONFIG, IDX, in_thread, limit_memory, main, refused

LARGE = dataclasses.replace(CONFIG, vocab_size=400_000)  # 100 MB
WIDE = dataclasses.replace(CONFIG, vocab_size=100_000)


def thread_limit() -> None:
    model = GPT2(CONFIG)
    few = GPT2(CONFIG, backend=get_backend("auto", 1))
    expected = few.loss(IDX, IDX)
    try:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
    except PermissionError:
        print("skip")
        sys.exit()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
    for _ in range(3):
        error = refused(model.loss, IDX, IDX)
        assert isinstance(error, OSError) and "GPT2C_NUM_THREADS" in str(error), error
        assert "8 threads are wanted and the system can start only 1:" in str(error), error
    assert few.loss(IDX, IDX) == expected  # one thread needs no other
    resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
    assert abs(model.loss(IDX, IDX) - expected) < 1e-5


def stacks() -> None:
    model = GPT2(CONFIG)
    limit_memory(20 << 20)  # a thread's stack takes 1 MB of it
    error = refused(model.loss, IDX, IDX)
    assert isinstance(error, OSError) and "64 threads are wanted" in str(error), error
    limit_memory(None)
    model.loss(IDX[:1, :1], IDX[:1, :1])  # it uses one thread, but now the others have started
    limit_memory(50 << 20)
    assert model.loss(IDX, IDX) > 0


def pools_at_once() -> None:
    config = dataclasses.replace(CONFIG, n_layer=1)
    models = [GPT2(config) for _ in range(3)]
    for model in models:
        model(IDX)
    threading.stack_size(1 << 20)
    limit_memory(106 << 20)  # a pool and its scratch take 36 MB, and 16 MB are kept free
    barrier = threading.Barrier(3)
    started: list[int] = []
    refusals: list[Exception] = []

    def work(model: GPT2, late: float) -> None:
        barrier.wait()
        time.sleep(late)
        try:
            model(IDX)
            started.append(1)
        except (MemoryError, OSError) as error:
            refusals.append(error)
        barrier.wait()  # the pools stay until each has tried

    # First one after the other: three pools at once leave no scratch to any, and the system keeps
    # the stacks of threads that have ended.
    for pause in [0.01] * 4 + [0.0] * 36:
        late = [number * pause for number in range(3)]
        workers = [
            threading.Thread(target=work, args=each) for each in zip(models, late, strict=True)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert started and refusals, (len(started), refusals)


def nothing(model: GPT2) -> None:
    return None


def saved(model: GPT2) -> Path:
    path = Path(tempfile.mkdtemp())
    GPT2(LARGE).save_pretrained(path / "large")
    model.save_pretrained(path / "small")
    return path


def trained(model: GPT2) -> GPT2:
    big = GPT2(WIDE)
    step(big)
    return big


def step(model: GPT2, zero: bool = False) -> None:
    if zero:
        model.zero_grad()
    model.loss(IDX, IDX)
    model.backward()


def warm(model: GPT2) -> GPT2:
    model([[1]])
    return model


def in_a_small_thread(model: GPT2) -> Any:
    threading.stack_size(1 << 20)
    return in_thread(model, IDX)


# Three calls: the first makes something, the second needs more memory than is left, the third works
# under the same limit. All get a small model; the last two get the first one's result, too.
Stage = tuple[Callable[[GPT2], Any], Callable[[GPT2, Any], Any], Callable[[GPT2, Any], Any]]
STAGES: dict[str, Stage] = {
    "a model": (nothing, lambda model, _: GPT2(LARGE), lambda model, _: GPT2(CONFIG)),
    "a loss": (
        nothing,
        lambda model, _: model.loss(np.repeat(IDX, 100, 0), np.repeat(IDX, 100, 0)),
        lambda model, _: step(model),
    ),
    "logits": (
        nothing,
        lambda model, _: model(np.repeat(IDX, 200, 0)),
        lambda model, _: model(IDX),
    ),
    "a second backward": (
        trained,
        lambda model, big: big.loss(IDX, IDX),
        lambda model, big: step(big, zero=True),
    ),
    "generate": (
        nothing,
        lambda model, _: model.generate([[1]] * 800, 31),
        lambda model, _: model.generate([[1]], 31),
    ),
    "an engine": (nothing, lambda model, _: Engine(model, slots=3000), lambda m, _: GPT2(CONFIG)),
    "from_pretrained": (  # to be mapped first, then copied
        saved,
        lambda model, path: GPT2.from_pretrained(path / "large"),
        lambda model, path: GPT2.from_pretrained(path / "small"),
    ),
    "an optimizer": (
        lambda model: GPT2(LARGE),
        lambda model, big: AdamW(big),
        lambda model, big: AdamW(model),
    ),
    "int8": (
        lambda model: GPT2(LARGE),
        lambda model, big: big.quantize("int8"),
        lambda model, big: model.quantize("int8"),
    ),
    "scratch": (
        lambda model: warm(GPT2(CONFIG, threads=16)),
        lambda model, big: in_a_small_thread(big),
        lambda model, big: model.loss(IDX, IDX),
    ),
}


def stage(name: str) -> None:
    before, fails, works = STAGES[name]
    model = GPT2(CONFIG)
    expected = model.loss(IDX, IDX)
    there = before(model)
    limit_memory(20 << 20)
    for _ in range(2):
        error = refused(fails, model, there)
        assert re.search(r"[0-9] (bytes|MB|[KMG]iB)|threads", str(error)), repr(error)
    works(model, there)
    limit_memory(None)
    assert model.loss(IDX, IDX) == expected
    if name == "an engine":  # with fewer slots; an engine must be closed
        Engine(model, slots=3).close()
    else:
        fails(model, there)


def little_memory(room: str) -> None:
    model = GPT2(CONFIG)
    optimizer = AdamW(model)

    def training() -> None:
        model.loss(IDX, IDX)
        model.backward()
        optimizer.step()

    def writing() -> None:
        model.generate(IDX[:1, :3], 5, temperature=0)

    calls: list[Callable[[], None]] = [training, writing]
    if room != "50000":  # with that limit its threads and scratch do not exist yet
        training()
        writing()
    limit_memory(int(room))
    for call in calls * 5:
        with suppress(MemoryError, OSError):
            call()
    limit_memory(None)
    training()
    writing()


if __name__ == "__main__":
    main(globals())
