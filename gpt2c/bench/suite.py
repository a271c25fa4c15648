"""The benchmark: rows (backends, PyTorch) do the same work in turn, verified, then timed.

Each row is a process of its own (gpt2c.bench.worker). This file starts them, lets them take turns
and keeps their results. gpt2c.bench.report shows the results.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from gpt2c.bench.machine import ROUNDED_TRAIN_RTOL, Ceilings, Quiet, fastest, products_of
from gpt2c.kernels.backend import (
    NAMES,
    PRECISIONS,
    backends,
    fast_precisions,
    get_backend,
    why_missing,
)
from gpt2c.kernels.cases import EXAMPLES
from gpt2c.kernels.limits import usable_cores
from gpt2c.kernels.memory import require
from gpt2c.model.config import ModelConfig
from gpt2c.model.plan import bytes_needed
from gpt2c.parallel.world import ALONE, World

__all__ = [
    "FEWER",
    "GPT2_ENGINES",
    "NEEDS",
    "PROCESS_BYTES",
    "QUICK_ROUNDS",
    "QUICK_STEP_ROUNDS",
    "ROUNDS",
    "SILENT",
    "TORCH",
    "Follower",
    "Measurement",
    "Row",
    "Work",
    "WorkerError",
    "bench_ops",
    "bench_train",
    "check_threads",
    "choose_rows",
    "describe",
    "heading_of",
    "lacks",
    "measure",
    "ops_work",
    "start",
]

# glibc's variables with which PyTorch is fastest: it keeps freed memory, in pages of 2 MB.
TUNED = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in [
        ("hugetlb", 1),
        ("mmap_threshold", 8589934592),
        ("trim_threshold", 34359738368),
        ("mmap_max", 0),
    ]
)
# as installed; tuned; tuned and compiled; the last two with autocast to bfloat16
TORCH = ("torch", "torch-tuned", "torch-compile", "torch-bf16", "torch-bf16-compile")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
# CTranslate2 computes in a thread of its own. So libgomp counts three threads on two CPUs and
# hardly spins between parallel regions. "active" makes it spin ten times longer: int8 is 1.5 to 2
# times as fast. GOMP_SPINCOUNT keeps it from spinning at rest.
ENVIRONMENT = {
    "transformers": _OFFLINE,
    "transformers-compile": _OFFLINE,
    "ctranslate2": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"},
}
_TORCH, _TRANSFORMERS = ("torch", "torch"), ("transformers", "transformers")
_ONNX = (("onnxruntime", "onnxruntime"), ("onnx", "onnx"))
# row -> the modules that it needs, each with pip's name for it
NEEDS = {
    **dict.fromkeys(TORCH, (_TORCH,)),
    **dict.fromkeys(("transformers", "transformers-compile"), (_TORCH, _TRANSFORMERS)),
    "llama.cpp": (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")),
    "onnxruntime": _ONNX,
    "ctranslate2": (("ctranslate2", "ctranslate2"),),
    "openvino": (("openvino", "openvino"),),
}
# the benchmark writes the files or graphs of these for GPT-2 alone
GPT2_ENGINES = ("onnxruntime", "ctranslate2", "openvino")
ROUNDS, QUICK_ROUNDS, ROW_SECONDS = 9, 3, 6.0
STEP_ROUNDS, QUICK_STEP_ROUNDS, ROW_STEP_SECONDS = 7, 3, 40.0
PROCESS_BYTES = 150_000_000  # Python, NumPy and the libraries of a worker
FEWER = "take fewer rows or a smaller shape"  # if the rows do not fit into memory together


@dataclasses.dataclass
class Measurement:
    """The result of one row on one piece of work.

    Attributes
    ----------
    group : the work: an op and its shape, or "train 4 x 64"
    row : a backend or another engine
    seconds : of each sample, in the order taken; empty if there are none
    note : why the row has no figure, or ""
    facts : other figures: error, flops, bytes, tokens, first_loss, loss, memory, peak_memory
    """

    group: str
    row: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    note: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / 2 / self.median


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of work for every row.

    Attributes
    ----------
    group : its name in tables
    ready : the command of `Worker` that prepares and verifies it
    arguments : of that command
    timed : the command that takes a sample
    facts : row -> its figures that are known before it is timed: flops, bytes, tokens
    """

    group: str
    ready: str
    arguments: dict[str, Any]
    timed: str
    facts: Callable[[str], dict[str, Any]]


class Follower:
    """Follows the progress of a benchmark; this one shows nothing."""

    def work(self, group: str) -> None:
        """Note that a piece of work begins."""

    def now(self, text: str) -> None:
        """Note the present step of the work."""


SILENT = Follower()


class WorkerError(ValueError):
    """A row's process ended."""


class Row:
    """A worker process.

    Parameters
    ----------
    name : a backend, one of TORCH or another engine; "avx2:int8" has int8 weights
    threads : number of threads

    Raises
    ------
    WorkerError : it does not start
    """

    def __init__(self, name: str, threads: int) -> None:
        # else NumPy's products would take threads of their own
        names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
        limits = dict.fromkeys(names, str(threads))
        environment = os.environ | limits
        if name in TORCH[1:]:
            environment["GLIBC_TUNABLES"] = TUNED
        environment |= ENVIRONMENT.get(name.partition(":")[0], {})
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2c.bench.worker", name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
        )
        try:
            self.ask("hello")
        except WorkerError:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer.

        Raises
        ------
        WorkerError : the process ended instead
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().strip().splitlines()
            raise WorkerError(said[-1] if said else f"its process ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def __enter__(self) -> Row:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def choose_rows(given: str | None, compile_torch: bool = False) -> list[str]:
    """Return the rows: those given, with commas between, or all backends here and PyTorch.

    A backend's row may name the precision of its products, "avx2:bf16". Without --backends, the
    rows of 16-bit products are those of a CPU with instructions for them.

    Raises
    ------
    ValueError : a name is unknown, or the machine cannot run it
    """
    if given is None:
        own = list(reversed(backends()))
        rounded = [f"{name}:{one}" for name in own for one in fast_precisions(name)[1:]]
        torch = [name for name in TORCH if rounded or "bf16" not in name]
        return [*own, *rounded, *(n for n in torch if compile_torch or "compile" not in n)]
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in names:
        if name not in TORCH:
            backend, _, precision = name.partition(":")
            if backend not in NAMES or precision not in ("", *PRECISIONS):
                known = ", ".join([*reversed(NAMES), *TORCH])
                raise ValueError(
                    f"there is no backend {name!r} to measure; there are {known}, and each backend"
                    " with :bf16 or :fp16"
                )
            if backend not in backends():
                raise ValueError(f"backend {backend!r}: {why_missing(backend)}")
    if not names:
        raise ValueError("--backends names none")
    return [*names, *(TORCH[2:3] if compile_torch and TORCH[2] not in names else ())]


def lacks(name: str) -> str:
    """Return pip's names of the packages that a row needs and that are not installed, or ""."""
    needed = NEEDS.get(name.partition(":")[0], ())
    return " ".join(pip for module, pip in needed if importlib.util.find_spec(module) is None)


# Starts rows by their names, with a number of threads; the stack ends them.
Begin = Callable[[Sequence[str], int, ExitStack], Iterator[Row | Measurement]]


def start(names: Sequence[str], threads: int, stack: ExitStack) -> Iterator[Row | Measurement]:
    """Start the rows' processes; a row that cannot start is a result with the reason."""
    for name in names:
        if lacking := lacks(name):
            yield Measurement("", name, note=f"not installed: pip install {lacking}")
            continue
        try:
            yield stack.enter_context(Row(name, threads))
        except WorkerError as error:
            yield Measurement("", name, note=f"FAILED: {error}")


def ops_work(quick: bool) -> list[Work]:
    """Return the works of `bench_ops`: every op at each of its shapes, or at the first one."""
    return [
        _op(name, shape)
        for name, op in EXAMPLES.items()
        for shape in op.shapes[: 1 if quick else None]
    ]


def _op(name: str, shape: dict[str, Any]) -> Work:
    flops, size = EXAMPLES[name].cost(**shape)
    arguments, facts = {"name": name, "shape": shape}, {"flops": flops, "bytes": size}
    return Work(f"{name} {describe(shape)}", "op", arguments, "sample", lambda row: facts)


def describe(shape: dict[str, Any]) -> str:
    """Return a shape as text: its letters, the type of weights, whether gradients are added to."""
    words: dict[Any, str] = {False: "gradients written", True: "gradients added to"}
    words |= {"float32": "fp32 weights", "float16": "fp16 weights", "uint8": "int8 weights"}
    return " ".join(
        words[size] if letter in ("kind", "accumulate") else f"{letter}={size}"
        for letter, size in shape.items()
    )


def bench_ops(
    names: Sequence[str],
    ceilings: Ceilings,
    quick: bool,
    show: Callable[[list[Measurement]], None],
    follower: Follower = SILENT,
) -> tuple[list[Measurement], str]:
    """Time every op, forward and backward, on every row.

    Parameters
    ----------
    names : the rows
    ceilings : of the machine
    quick : the first shape of each op and fewer samples
    show : called with the results of each work when they are complete
    follower : told of the progress through the works of `ops_work`

    Returns
    -------
    all results, and how quiet the machine was

    Raises
    ------
    MemoryError : the rows together need more than is free
    """
    works = ops_work(quick)
    largest = max(work.facts("")["bytes"] for work in works)
    # each row keeps its arguments; the row that verifies has two copies more, twice as wide
    needed = dict.fromkeys(names, int(largest)) | {"verification": 4 * int(largest)}
    require("a benchmark of ops", needed, FEWER)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return measure(names, ceilings.threads, [works], rounds, ROW_SECONDS, show, follower)


def bench_train(
    names: Sequence[str],
    ceilings: Ceilings,
    config: ModelConfig,
    shapes: Sequence[tuple[int, int]],
    recompute: str | None,
    quick: bool,
    show: Callable[[list[Measurement]], None],
    follower: Follower = SILENT,
    begin: Begin | None = None,
    world: World = ALONE,
) -> tuple[list[Measurement], str]:
    """Time a whole training step, optimizer and clipping included, on every row.

    Parameters
    ----------
    names, ceilings, quick, show, follower : as for `bench_ops`
    config : of the model
    shapes : (B, T) of the batches
    recompute : see `GPT2`; PyTorch's rows keep everything
    begin : see `measure`
    world : the ranks that share a batch in rows that `begin` adds, one for each backend

    Raises
    ------
    MemoryError : the rows together need more than is free
    """
    for B, T in shapes:
        if T > config.n_positions:
            raise ValueError(
                f"T = {T} is more than the model's {config.context_name}, {config.n_positions}"
            )
        installed = [name for name in names if not lacks(name)]
        _check_memory(installed, config, B, T, recompute, world)
    # new processes for each shape: the peak of memory is theirs
    works = [[_step(config, B, T, recompute)] for B, T in shapes]
    rounds = QUICK_STEP_ROUNDS if quick else STEP_ROUNDS
    return measure(names, ceilings.threads, works, rounds, ROW_STEP_SECONDS, show, follower, begin)


def heading_of(config: ModelConfig) -> str:
    """Return the kind of model for a heading; GPT-2 is not named."""
    kind = type(config).__name__.removesuffix("Config")
    return "" if kind == "GPT2" else f", {kind}"


def _step(config: ModelConfig, B: int, T: int, recompute: str | None) -> Work:
    group = f"train {B} x {T}{heading_of(config)}" + (
        f", recompute {recompute}" if recompute else ""
    )
    arguments = {"config": config.to_dict(), "B": B, "T": T, "recompute": recompute}
    facts = {"tokens": B * T, "flops": config.flops_per_token(T) * B * T}
    return Work(group, "train", arguments, "step", lambda row: facts)


def measure(
    names: Sequence[str],
    threads: int,
    works: Sequence[Sequence[Work]],
    rounds: int,
    limit: float,
    show: Callable[[list[Measurement]], None],
    follower: Follower = SILENT,
    begin: Begin | None = None,
) -> tuple[list[Measurement], str]:
    """Measure rows on one work after the other: they get ready, are verified, and take turns.

    Parameters
    ----------
    names : the rows
    threads : of each row
    works : in groups; a row has one process for each group
    rounds, limit : see `take_turns`
    show, follower : see `bench_ops`
    begin : in place of `start`

    Returns
    -------
    all results, and how quiet the machine was
    """
    done: list[Measurement] = []
    quiet = Quiet(threads)
    for group in works:
        with ExitStack() as stack:
            rows = list((begin or start)(names, threads, stack))
            for work in group:
                follower.work(work.group)
                follower.now("each row gets ready and is verified")
                results = [get_ready(row, work) for row in rows]
                _compare_losses(results)
                take_turns(rows, results, work.timed, rounds, limit, quiet, follower)
                for i, result in enumerate(results):
                    if result.note.startswith("FAILED") and isinstance(rows[i], Row):
                        note = f"its process ended in {work.group}"
                        rows[i] = Measurement("", result.row, note=note)
                show(results)
                done += results
    return done, quiet.verdict()


def get_ready(row: Row | Measurement, work: Work) -> Measurement:
    """Prepare and verify a row's work; the note of the result says why, if it cannot."""
    name = row.row if isinstance(row, Measurement) else row.name
    result = Measurement(work.group, name, facts=dict(work.facts(name)))
    if isinstance(row, Measurement):
        result.note = row.note
        return result
    try:
        answer = row.ask(work.ready, **work.arguments)
    except WorkerError as error:
        result.note = f"FAILED: {error}"
        return result
    result.note = answer.pop("missing", "")
    if not result.note:
        allowed = answer.pop("rtol")
        result.facts |= answer
        if not answer["error"] <= allowed:  # not `>`: NaN is wrong, too
            result.note = f"WRONG: error {answer['error']:.1e}, allowed is {allowed:.1e}"
    return result


def take_turns(
    rows: Sequence[Row | Measurement],
    results: Sequence[Measurement],
    command: str,
    rounds: int,
    limit: float,
    quiet: Quiet,
    follower: Follower = SILENT,
) -> None:
    """Sample each row once a round; a row with two samples and `limit` seconds sits out."""
    for number in range(rounds):
        quiet.listen()
        for row, result in zip(rows, results, strict=True):
            if isinstance(row, Measurement) or result.note:
                continue
            if len(result.seconds) >= 2 and sum(result.seconds) > limit:
                continue
            follower.now(f"round {number + 1} of {rounds}: {row.name}")
            try:
                answer = row.ask(command)
            except WorkerError as error:
                result.note = f"FAILED: {error}"
                continue
            result.seconds.append(answer.pop("seconds"))
            result.facts |= answer
            time.sleep(0.015)  # until the row's idle threads have stopped spinning


def _compare_losses(results: list[Measurement]) -> None:
    """Mark a row as WRONG if its loss on the same weights and tokens is not that of the first row.

    All rows, the first too, have been compared with the reference on a small model.
    """
    found = [r for r in results if "first_loss" in r.facts and not r.note]
    for result in found:
        loss, wanted = result.facts["first_loss"], found[0].facts["first_loss"]
        exact = products_of(result.row) == products_of(found[0].row) == "fp32"
        rtol = 1e-4 if exact else ROUNDED_TRAIN_RTOL
        if not abs(loss - wanted) <= rtol * abs(wanted):  # not `>`: NaN is wrong, too
            result.note = f"WRONG: first loss {loss:.5f}, that of {found[0].row} is {wanted:.5f}"


def _check_memory(
    names: Sequence[str],
    config: ModelConfig,
    B: int,
    T: int,
    recompute: str | None,
    world: World = ALONE,
) -> None:
    """Refuse work that would not fit: all rows hold their model at the same time."""
    logits = 4 * B * T * config.vocab_size
    scores = 4 * B * config.stack().layers[0].attention.NH * T * T
    needed: dict[str, int] = {}
    for name in names:
        policy, precision = None if name in TORCH else recompute, name.partition(":")[2] or "fp32"
        own = bytes_needed(config, B, T, policy, precision) + PROCESS_BYTES
        if name in TORCH:  # it holds logits, their log-softmax and a gradient
            own += 3 * logits
        elif name == "numpy":  # a few T x T matrices, and AdamW's temporary arrays
            own += max(4 * scores, 6 * 4 * config.num_parameters())
        needed[name] = own
        if world.size > 1:  # with all moments: the sums of other ranks take memory, too
            shared = bytes_needed(config, B // world.size, T, policy, precision)
            needed[f"{world.size} x {name}"] = world.here * (shared + PROCESS_BYTES)
    require(f"a benchmark of {B} x {T} tokens", needed, FEWER)


def check_threads(threads: int | None) -> tuple[int, str]:
    """Return the number of threads, and a warning if it is more than this process has cores.

    Raises
    ------
    ValueError : out of range
    """
    count = get_backend(fastest(), threads).threads
    cores = usable_cores()
    plural = "" if cores == 1 else "s"
    warning = f"warning: {count} threads share the {cores} core{plural} that this process may use"
    return count, warning if count > cores else ""
