"""Signals: a storm of them changes no bit, and SIGTERM ends a process."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import gpt2c
from programs.common import CONFIG, IDX, in_thread, main, train


def storm() -> None:
    expected = train(1, 10)
    count = 0

    def handle(number: int, frame: Any) -> None:
        nonlocal count
        count += 1

    for number in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGCHLD):
        signal.signal(number, handle)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1e-3, 1e-3)
    for _ in range(4):
        child = os.posix_spawn("/bin/true", ["true"], {})
        assert train(1, 10) == expected
        assert in_thread(train, 1, 10) == expected
        os.waitpid(child, 0)
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL):
        signal.setitimer(timer, 0)
    print(count)


def ctrl_c() -> None:
    random.seed(1)
    model = gpt2c.GPT2(CONFIG)

    def pass_once() -> tuple[float, bytes]:
        model.zero_grad()
        loss = model.loss(IDX, IDX)
        model.backward()
        return loss, model.flat_gradients.tobytes()

    started = time.perf_counter()
    expected = pass_once()
    for _ in range(5):
        pass_once()
    lasts = (time.perf_counter() - started) / 6
    interrupted = 0
    for _ in range(60):
        timer = threading.Timer(random.random() * lasts, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            pass_once()
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted += 1
        assert pass_once() == expected
    assert interrupted == 60, interrupted


def told_to_end() -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while True:
        train(1)


if __name__ == "__main__":
    main(globals())
