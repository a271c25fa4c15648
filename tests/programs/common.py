"""Shared by the programs: a model, forks, and figures of this process."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpt2c

# Large enough that kernels share their work among threads, each of which is one of them.
CONFIG = gpt2c.GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=2, n_head=4)
IDX = np.arange(128).reshape(4, 32)


def main(programs: dict[str, Any]) -> None:
    """Run the function that the command line names, with the other arguments."""
    name, *arguments = sys.argv[1:]
    programs[name](*arguments)


def train(seed: int, steps: int = 3) -> tuple[list[float], bytes]:
    model = gpt2c.GPT2(CONFIG, seed=seed)
    optimizer = gpt2c.AdamW(model)
    losses = []
    for step in range(steps):
        model.zero_grad()
        losses.append(model.loss(IDX, IDX + step))
        model.backward()
        optimizer.step()
    return losses, model.flat_parameters.tobytes()


def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a new thread; return its result or raise its exception."""
    results, errors = [], []

    def work() -> None:
        try:
            results.append(call(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for error in errors:
        raise error
    return results[0]


def in_child(call: Callable[..., Any], *arguments: Any) -> None:
    """Call in a forked child; raise unless it returns True in time."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if call(*arguments) is True else 1)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(2)
    until = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise SystemExit("the child hangs")
        time.sleep(0.002)
    assert status == 0, f"the child ended with status {status:#x}"


def seconds() -> dict[str, float]:
    """Return the CPU seconds of each thread."""
    stats = Path("/proc/self/task").glob("*/schedstat")
    return {path.parent.name: int(path.read_text().split()[0]) / 1e9 for path in stats}


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def memory(field: int) -> int:
    """Return this process's bytes of address space (0) or of memory (1)."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def limit_memory(room: int | None) -> None:
    """Allow the process this number of further bytes, or any number for None."""
    soft = resource.RLIM_INFINITY if room is None else memory(0) + room
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


def refused(call: Callable[..., Any], *arguments: Any) -> MemoryError | OSError:
    """Return the error of a call, MemoryError or OSError."""
    try:
        call(*arguments)
    except (MemoryError, OSError) as error:
        return error
    raise SystemExit("it was not refused")
