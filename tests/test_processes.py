"""Forks, threads, signals and limits: the process lives, nothing hangs, and the bits are the same.

Each test runs a program of its own, which is killed when it hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="forks, limits and /proc are Linux's here"
)

SECONDS = 120  # of a program; it takes a few where the machine is not busy

# Large enough that kernels share their work among threads, each of which is one of them.
COMMON = """
import multiprocessing, os, resource, signal, sys, threading, time
from pathlib import Path
import numpy as np
import gpt2c

config = gpt2c.GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=2, n_head=4)
idx = np.arange(128).reshape(4, 32)

def train(seed, steps=3):
    model = gpt2c.GPT2(config, seed=seed)
    optimizer = gpt2c.AdamW(model)
    losses = []
    for step in range(steps):
        model.zero_grad()
        losses.append(model.loss(idx, idx + step))
        model.backward()
        optimizer.step()
    return losses, model.flat_parameters.tobytes()

def write(model, seed):
    return model.generate(idx[:, :5], 20, seed=seed).tolist()

def in_thread(call, *arguments):
    out = []
    thread = threading.Thread(target=lambda: out.append(call(*arguments)))
    thread.start()
    thread.join()
    return out[0]

def in_child(call, *arguments):
    "Fork; raise unless the child says True in time."
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

def seconds():
    "Give the seconds of CPU that each thread has spent."
    stats = Path("/proc/self/task").glob("*/schedstat")
    return {path.parent.name: int(path.read_text().split()[0]) / 1e9 for path in stats}

def threads():
    return len(os.listdir("/proc/self/task"))

def memory(field):
    "Give the bytes of address space (0) or of memory (1) that this process has."
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()

def limit_memory(room):
    "Let the process have so many bytes more, None any number."
    soft = resource.RLIM_INFINITY if room is None else memory(0) + room
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

def refused(call, *arguments):
    "Give the error of a call, MemoryError or OSError."
    try:
        call(*arguments)
    except (MemoryError, OSError) as error:
        return error
    raise SystemExit("it was not refused")
"""


def run(code: str, threads: int = 2, status: int = 0, first: str = "", **variables: str) -> str:
    """Run a program in a process of its own; give what it prints."""
    variables = {**os.environ, "GPT2C_NUM_THREADS": str(threads), **variables}
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # From Python 3.12 on a fork beside threads is warned of: it is what is tested.
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c"]
    done = subprocess.run(
        [*command, f"{first}\n{COMMON}\n{code}"],
        **{"capture_output": True, "text": True, "env": variables, "timeout": SECONDS},
    )
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout


# ---- forks ---------------------------------------------------------------------------------------


def test_parent_child_and_grandchild_compute_in_turn() -> None:
    run("""
expected = train(1), train(2)
assert threads() > 2, "it is the pool's threads that are tested"

def child():
    ok = train(1) == expected[0]
    in_child(lambda: train(2) == expected[1])
    return ok and train(2) == expected[1]

for _ in range(3):
    in_child(child)
    assert train(2) == expected[1]
in_child(lambda: in_thread(train, 1) == expected[0])
""")


@pytest.mark.parametrize("used", ["before", "after"])
def test_a_pool_of_forks_computes_beside_its_parent(used: str) -> None:
    run(f"""
if {used == "before"}:
    train(0)
with multiprocessing.get_context("fork").Pool(3) as pool:
    results = pool.map_async(train, range(6))
    expected = [train(seed) for seed in range(6)]
    assert results.get(60) == expected
    assert pool.map(train, range(3)) == expected[:3]
""")


@pytest.mark.parametrize("main_computes", [True, False])
@pytest.mark.parametrize("thread_computes", [True, False])
def test_a_thread_may_fork(main_computes: bool, thread_computes: bool) -> None:
    run(f"""
expected = in_thread(train, 1)
if {main_computes}:
    train(1)

def thread():
    if {thread_computes}:
        train(1)
    in_child(lambda: train(1) == expected and in_thread(train, 1) == expected)
    return train(1) == expected

assert in_thread(thread) and train(1) == expected
""")


def test_a_fork_while_another_thread_computes() -> None:
    run("""
expected, over = train(1), False
model = gpt2c.GPT2(config)
loss = model.loss(idx, idx)
model.backward()
gradient = model.flat_gradients.tobytes()

def work():
    while not over:
        model.loss(idx, idx)
        model.backward()

worker = threading.Thread(target=work)
worker.start()

def child():  # where the worker, which was in the middle of it, is not
    model.zero_grad()
    fresh = model.loss(idx, idx)
    model.backward()
    return fresh == loss and model.flat_gradients.tobytes() == gradient and train(1) == expected

for _ in range(10):
    in_child(child)
    time.sleep(0.01)
over = True
worker.join()
""")


def test_an_engine_stays_with_the_parent() -> None:
    run("""
model = gpt2c.GPT2(config)
with gpt2c.Engine(model, slots=2) as engine:
    expected = engine.submit([1, 2, 3], 9, seed=1).result().tolist()
    for _ in range(5):
        request = engine.submit([1, 2, 3], 10**9, seed=1)
        reading = iter(request)
        assert next(reading) == expected[0]

        def child():
            for call in (request.result, lambda: list(reading), lambda: engine.submit([1])):
                try:
                    call()
                except RuntimeError as error:
                    assert "start one in the child" in str(error), error
                else:
                    return False
            request.cancel()
            engine.close()
            with gpt2c.Engine(model) as own:
                return own.submit([1, 2, 3], 9, seed=1).result().tolist() == expected

        in_child(child)
        request.cancel()
        tokens = request.result()[:9].tolist()
        assert tokens and tokens == expected[: len(tokens)]
""")


def test_a_child_that_ends_by_itself_is_not_held_up() -> None:
    """Engines are closed at the end of a program: in a child, too, which has not their thread."""
    run("""
engine = gpt2c.Engine(gpt2c.GPT2(config))
engine.submit([1, 2, 3], 10**9)
time.sleep(0.1)
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
""")


def test_forks_leave_nothing_behind() -> None:
    run("""
x = np.ones(50_000, np.float32)
def turn():
    in_child(lambda: bool(gpt2c.ops.gelu_forward(x)[-1] > 0.8))
    gpt2c.ops.gelu_forward(x)

def held():
    return threads(), len(os.listdir("/proc/self/fd"))

for _ in range(10):
    turn()
before, size = held(), memory(1)
for _ in range(100):
    turn()
assert held() == before and before[0] > 1, (before, held())
assert memory(1) - size < 1 << 20, memory(1) - size  # 10 KB a fork
""")


# ---- threads -------------------------------------------------------------------------------------


def test_a_pool_ends_with_the_thread_that_used_it() -> None:
    run("""
train(1)
before = threads()
for _ in range(3):
    assert in_thread(train, 1) == train(1)
assert threads() == before
""")


def test_threads_leave_the_core_that_openmp_bound_this_one_to() -> None:
    run(
        """
cores = os.sched_getaffinity(0)
if len(cores) == 1:
    sys.exit()
os.sched_setaffinity(0, {min(cores)})  # as OpenMP does with the thread that loads it
train(1)
allowed = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
assert len(allowed) > 1 and allowed.count(cores) == len(allowed) - 1, allowed
assert os.sched_getaffinity(0) == {min(cores)}
""",
        OMP_PROC_BIND="true",
    )


def test_bits_do_not_depend_on_the_threads() -> None:
    """A task is whole sums, and tasks are cut by sizes: for 1, 2, 3 and more threads than cores."""
    run("""
results = set()
for count in (1, 2, 3, 8):
    model = gpt2c.GPT2(config, seed=1, backend=gpt2c.kernels.backend.get_backend("auto", count))
    model.loss(idx, idx)
    model.backward()
    results.add((model.flat_parameters.tobytes(), *(g.tobytes() for g in model.gradients.values())))
assert len(results) == 1
""")


def test_two_models_in_two_threads_do_not_disturb_each_other() -> None:
    run("""
from concurrent.futures import ThreadPoolExecutor
readers = [gpt2c.GPT2(config, seed=1), gpt2c.QuantizedGPT2.from_model(gpt2c.GPT2(config), "int8")]
trained = [train(seed, 10) for seed in (1, 2)]
written = [write(model, 5) for model in readers]
with ThreadPoolExecutor(4) as pool:
    for _ in range(4):
        training = [pool.submit(train, seed, 10) for seed in (1, 2)]
        writing = [pool.submit(write, model, 5) for model in readers]
        assert [future.result() for future in training] == trained
        assert [future.result() for future in writing] == written
        same = [pool.submit(write, readers[0], 5) for _ in range(3)]  # one model in three threads
        assert all(future.result() == written[0] for future in same)
""")


def test_a_model_that_computes_is_refused_to_a_second_thread() -> None:
    """Their batches differ in size: arrays of one with the sizes of the other would crash."""
    run("""
model = gpt2c.GPT2(config)
batches = [idx, idx[:1, :3], idx[:2], idx[:, :17]]
expected = [model.loss(batch, batch) for batch in batches]
logits = [model(batch) for batch in batches]
counts = {"right": 0, "refused": 0}

def work(number):
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
        except ValueError as error:  # of another's loss, since which there was one more
            assert "backward needs a loss" in str(error)

workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert counts["right"] and counts["refused"], counts
assert model.loss(idx, idx) == expected[0]
""")


# ---- signals -------------------------------------------------------------------------------------


def test_a_storm_of_signals_changes_no_bit() -> None:
    count = run("""
expected = train(1, 10)
count = 0
def handle(number, frame):
    global count
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
""")
    assert int(count) > 10


def test_ctrl_c_leaves_a_model_that_goes_on() -> None:
    """It comes when the kernel is done; backward wants a loss again, no gradient is half there."""
    run("""
import random
random.seed(1)
model = gpt2c.GPT2(config)
def pass_once():
    model.zero_grad()
    loss = model.loss(idx, idx)
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
""")


def test_a_process_ends_when_it_is_told_to() -> None:
    run(
        """
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
while True:
    train(1)
""",
        status=-15,
    )


# ---- limits --------------------------------------------------------------------------------------


def test_threads_that_cannot_start_are_an_error() -> None:
    """Root has no such limit, so it becomes nobody."""
    out = run(
        """
model = gpt2c.GPT2(config)
few = gpt2c.GPT2(config, backend=gpt2c.kernels.backend.get_backend("auto", 1))
expected = few.loss(idx, idx)
try:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
except PermissionError:
    print("skip")
    sys.exit()
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
for _ in range(3):
    error = refused(model.loss, idx, idx)
    assert isinstance(error, OSError) and "GPT2C_NUM_THREADS" in str(error), error
    assert "8 threads are wanted and the system gives 1:" in str(error), error
assert few.loss(idx, idx) == expected  # one needs none
resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
assert abs(model.loss(idx, idx) - expected) < 1e-5
""",
        threads=8,
    )
    if "skip" in out:
        pytest.skip("this process may not become another user")


def test_stacks_that_do_not_fit_are_an_error() -> None:
    run(
        """
model = gpt2c.GPT2(config)
limit_memory(20 << 20)  # a thread's stack takes 1 MB of it
error = refused(model.loss, idx, idx)
assert isinstance(error, OSError) and "64 threads are wanted" in str(error), error
limit_memory(None)
model.loss(idx[:1, :1], idx[:1, :1])  # of one thread, but now the others are there
limit_memory(50 << 20)
assert model.loss(idx, idx) > 0
""",
        threads=64,
    )


def test_threads_that_start_at_once_do_not_take_each_others_memory() -> None:
    """Each pool fits alone; the second must find what the first has left, not what was there."""
    run(
        """
config = gpt2c.GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=1, n_head=4)
models = [gpt2c.GPT2(config) for _ in range(3)]
for model in models:
    model(idx)
threading.stack_size(1 << 20)
limit_memory(44 << 20)  # a pool and its scratch take 11 MB, and 16 MB are kept free
barrier, started, refusals = threading.Barrier(3), [], []

def work(model):
    barrier.wait()
    try:
        model(idx)
        started.append(1)
    except (MemoryError, OSError) as error:
        refusals.append(error)
    barrier.wait()  # the pools stay until each has tried

for _ in range(40):
    workers = [threading.Thread(target=work, args=(model,)) for model in models]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
assert started and refusals, (len(started), refusals)
""",
        threads=8,
        MALLOC_ARENA_MAX="1",  # else each Python thread's own takes 64 MB or more
    )


# Each stage is given less than it takes; then what is smaller must work, under the same limit.
STAGES = {
    "a model": ("", "gpt2c.GPT2(large)", "gpt2c.GPT2(config)"),
    "a loss": (
        "",
        "model.loss(np.repeat(idx, 500, 0), np.repeat(idx, 500, 0))",
        "model.loss(idx, idx); model.backward()",
    ),
    "logits": ("", "model(np.repeat(idx, 500, 0))", "model(idx)"),
    "a second backward": (
        "big = gpt2c.GPT2(wide); big.loss(idx, idx); big.backward()",
        "big.loss(idx, idx)",
        "big.zero_grad(); big.loss(idx, idx); big.backward()",
    ),
    "generate": ("", "model.generate([[1]] * 3000, 31)", "model.generate([[1]], 31)"),
    "an engine": ("", "gpt2c.Engine(model, slots=3000)", "gpt2c.GPT2(config)"),
    "from_pretrained": (  # to be mapped first, then copied
        "gpt2c.GPT2(large).save_pretrained(path); model.save_pretrained(path + '-small')",
        "gpt2c.GPT2.from_pretrained(path)",
        "gpt2c.GPT2.from_pretrained(path + '-small')",
    ),
    "an optimizer": ("big = gpt2c.GPT2(large)", "gpt2c.AdamW(big)", "gpt2c.AdamW(model)"),
    "int8": (
        "big = gpt2c.GPT2(large)",
        "gpt2c.QuantizedGPT2.from_model(big, 'int8')",
        "gpt2c.QuantizedGPT2.from_model(model, 'int8')",
    ),
    "scratch": (
        "big = gpt2c.GPT2(config, threads=16); big([[1]])",
        "in_thread_raising(big, idx)",
        "model.loss(idx, idx)",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_memory_that_is_not_there_is_an_error(stage: str) -> None:
    before, fails, works = STAGES[stage]
    run(f"""
import dataclasses, re, tempfile
large = dataclasses.replace(config, vocab_size=400_000)  # 100 MB
wide = dataclasses.replace(config, vocab_size=100_000)
path = tempfile.mkdtemp()
model = gpt2c.GPT2(config)
expected = model.loss(idx, idx)

def in_thread_raising(call, *arguments):
    errors = []
    def work():
        try:
            call(*arguments)
        except BaseException as error:
            errors.append(error)
    threading.stack_size(1 << 20)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for error in errors:
        raise error

{before}
limit_memory(20 << 20)
def fails():
    {fails}
for _ in range(2):
    error = refused(fails)
    assert re.search(r"[0-9] (bytes|MB|[KMG]iB)|threads", str(error)), repr(error)
{works}
limit_memory(None)
assert model.loss(idx, idx) == expected
{fails if stage != "an engine" else "gpt2c.Engine(model, slots=3).close()"}
""")


@pytest.mark.parametrize("room", [0, 2000, 50_000, 500_000, 3_000_000, 9_000_000])
def test_however_little_memory_is_left_the_process_lives(room: int) -> None:
    """Down to nothing."""
    run(f"""
model = gpt2c.GPT2(config)
optimizer = gpt2c.AdamW(model)
def training():
    model.loss(idx, idx)
    model.backward()
    optimizer.step()
def writing():
    model.generate(idx[:1, :3], 5, temperature=0)
if {room} != 50_000:  # there, its threads and scratch are not there yet either
    training()
    writing()
limit_memory({room})
for call in [training, writing] * 5:
    try:
        call()
    except (MemoryError, OSError):
        pass
limit_memory(None)
training()
writing()
""")


# ---- beside other libraries ----------------------------------------------------------------------

LIBRARIES = ["gpt2c", "torch", "sklearn.cluster", "numpy"]
ORDERS = [LIBRARIES, LIBRARIES[1:] + LIBRARIES[:1], LIBRARIES[::-1]]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_beside_torch_and_scikit_learn(order: list[str]) -> None:
    """They bring OpenMP, whose threads the kernels neither use nor disturb."""
    for name in ("torch", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed here")
    run(
        """
from concurrent.futures import ThreadPoolExecutor
from sklearn.cluster import KMeans
import torch

torch.set_num_threads(3)
points = np.random.default_rng(1).standard_normal((4000, 8))
matrix = torch.ones(300, 300)

def by_sklearn():
    return KMeans(8, n_init=1, max_iter=20, random_state=1).fit(points).labels_.tobytes()
def by_torch():
    return (matrix @ matrix).sum().item(), torch.sort(matrix.cumsum(0).view(-1)).values[-1].item()
def by_numpy():
    return float((points.T @ points).sum())
def ours():
    before = threads()
    result = train(1, 5)
    assert threads() <= before + 1, "more than the two threads of a kernel"
    return result

others = [by_sklearn, by_torch, by_numpy]
expected = ours()
theirs = [call() for call in others]
for _ in range(3):  # in turn
    assert ours() == expected and [call() for call in others] == theirs
before = seconds()
ours()
spent = sorted((s - before.get(thread, 0) for thread, s in seconds().items()), reverse=True)
assert sum(spent[2:]) < 0.1 * sum(spent), "the pools of the others do not sleep"
with ThreadPoolExecutor(5) as pool:  # at once
    for _ in range(3):
        futures = [pool.submit(train, 1, 5) for _ in range(2)] + [pool.submit(c) for c in others]
        assert [future.result() for future in futures] == [expected] * 2 + theirs
by_torch()
in_child(lambda: train(1, 5) == expected)  # PyTorch itself would hang there, with or without us
in_thread(lambda: (by_torch(), in_child(lambda: train(1, 5) == expected)))
assert ours() == expected
""",
        first="\n".join(f"import {name}" for name in order),
        OMP_NUM_THREADS="3",
    )
