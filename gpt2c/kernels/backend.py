"""Backends: the complete sets of ops that this machine can run, and the choice of one.

A backend is an argument, never a global: the same model runs on any backend, and one process can
compare two. Knows nothing about models.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

from gpt2c.kernels.binding import Kernels
from gpt2c.kernels.checks import check_choice, check_kind, whole
from gpt2c.kernels.limits import usable_cores
from gpt2c.kernels.op import OPS

__all__ = [
    "AVX2",
    "AVX512",
    "MAX_THREADS",
    "NAMES",
    "PRECISIONS",
    "REQUIRES",
    "THREAD_VARIABLES",
    "Backend",
    "BackendName",
    "Precision",
    "as_backend",
    "as_precision",
    "backends",
    "default_threads",
    "fast_precisions",
    "fma_peak",
    "get_backend",
    "same_backend",
    "why_missing",
]

# Fastest first. A set of kernels runs only on a CPU with all of its features, because build.py
# compiles it for them.
AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", *AVX2)
REQUIRES: dict[str, tuple[str, ...]] = {
    # with products of whole tiles of 16-bit and 8-bit numbers, too
    "amx": (*AVX512, "avx512vnni", "avx512bf16", "amx-tile", "amx-bf16", "amx-int8"),
    # with multiply-adds of halves, too
    "avx512fp16": (*AVX512, "avx512vnni", "avx512bf16", "avx512fp16"),
    "avx512bf16": (*AVX512, "avx512vnni", "avx512bf16"),  # with 16-bit dot products, too
    "avx512vnni": (*AVX512, "avx512vnni"),  # as avx512, with 8-bit dot products (VNNI)
    "avx512": AVX512,
    "avx2": AVX2,
    "base": (),
    "numpy": (),
}
# what a caller may name: "auto", and the keys of REQUIRES
BackendName = Literal[
    "auto", "amx", "avx512fp16", "avx512bf16", "avx512vnni", "avx512", "avx2", "base", "numpy"
]
NAMES: tuple[BackendName, ...] = get_args(BackendName)[1:]
# of the products of matrices, and the feature that has an instruction for them; without it each
# takes several
INSTRUCTIONS = {"fp32": "", "bf16": "avx512bf16", "fp16": "avx512fp16"}
PRECISIONS = tuple(INSTRUCTIONS)
Precision = Literal["fp32", "bf16", "fp16", "auto"]
# More must be a mistake. gpt2c.kernels.threads.Pool raises OSError if the system starts fewer.
MAX_THREADS = 1024
THREAD_VARIABLES = ("GPT2C_NUM_THREADS", "OMP_NUM_THREADS")  # the first that is set counts


class NumPy:
    """The reference as a backend: the same ops, on NumPy and its own threads."""

    name = "numpy"
    threads = 1
    has_step = False  # see Kernels

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return an op; the reference is imported when the first is used."""
        if name not in OPS:
            raise AttributeError(f"there is no op {name!r}")
        from gpt2c.kernels import reference

        op: Callable[..., Any] = getattr(reference, name)
        return op

    def __repr__(self) -> str:
        return "NumPy()"


Backend = Kernels | NumPy


@functools.cache
def why_missing(name: str) -> str:
    """Return why this machine cannot run backend `name`, "" if it can."""
    if name == "numpy":
        return ""
    try:
        base = importlib.import_module("gpt2c._kernels_base").lib
        lacking = [f for f in REQUIRES[name] if not base.cpu_supports(f.encode())]
        if lacking:
            return f"this CPU has no {', '.join(lacking)}"
        importlib.import_module(f"gpt2c._kernels_{name}")
    except ImportError as error:
        return f"its kernels are not built or do not load ({error})"
    return ""


def backends() -> tuple[BackendName, ...]:
    """Return the names of the backends that this machine can run, fastest first.

    Examples
    --------
    >>> gpt2c.backends()[-1]  # every machine has it
    'numpy'
    """
    return tuple(name for name in NAMES if not why_missing(name))


def default_threads() -> int:
    """Return GPT2C_NUM_THREADS, else OMP_NUM_THREADS, else `gpt2c.kernels.limits.usable_cores`.

    Raises
    ------
    ValueError : a variable is set, but not to a whole number in [1, MAX_THREADS]
    """
    for variable in THREAD_VARIABLES:
        value = os.environ.get(variable)
        if value:
            first = value.split(",")[0]  # OpenMP's list is for nested parallelism, unused here
            if not first.isdecimal() or not 1 <= int(first) <= MAX_THREADS:
                raise ValueError(
                    f"{variable} must be a whole number of threads from 1 to {MAX_THREADS},"
                    f" got {value!r}"
                )
            return int(first)
    return min(MAX_THREADS, usable_cores())


@functools.cache
def _load(name: str, threads: int) -> Backend:
    return NumPy() if name == "numpy" else Kernels(name, threads)


def get_backend(name: str = "auto", threads: int | None = None) -> Backend:
    """Return the backend of this name.

    Parameters
    ----------
    name : one of `backends()`, or "auto": GPT2C_BACKEND if that variable is set, else the fastest
    threads : threads of each kernel, `default_threads()` if None; "numpy" uses NumPy's own threads

    Raises
    ------
    ValueError : the name is unknown, this machine cannot run the backend, "auto" would be "numpy",
        or `threads` is not a whole number in [1, MAX_THREADS]
    """
    threads = default_threads() if threads is None else whole("threads", threads)
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be in [1, {MAX_THREADS}], got {threads}")
    if name == "auto":
        name = os.environ.get("GPT2C_BACKEND") or "auto"
    if name == "auto":
        name = backends()[0]
        if name == "numpy":  # hundreds of times slower: never chosen unasked
            raise ValueError(f"no kernels here: {why_missing('base')}; ask for 'numpy' by name")
    if name not in backends():
        why = why_missing(name) if name in NAMES else "unknown name"
        raise ValueError(f"backend {name!r}: {why}; this machine has {', '.join(backends())}")
    return _load(name, 1 if name == "numpy" else threads)


def as_backend(backend: str | Backend, threads: int | None = None) -> Backend:
    """Return `backend` itself, or the backend of that name with `threads` threads.

    Raises
    ------
    ValueError : see `get_backend`; `backend` is neither, or is given with `threads` and has its own
    """
    if isinstance(backend, str):
        return get_backend(backend, threads)
    check_kind("backend", backend, Backend, "a name of gpt2c.backends(), 'auto' or a backend")
    if threads is not None:
        raise ValueError(f"threads={threads} needs a backend's name, got {backend!r}")
    return backend


def same_backend(name: str, threads: int | None) -> Backend:
    """Return the backend that a copied or pickled model was on.

    If this machine cannot run it, because the model comes from another one, return "auto" and warn.
    The number of threads stays.
    """
    try:
        return get_backend(name, threads)
    except ValueError as error:
        backend = get_backend("auto", threads)
        warnings.warn(f"{error}; on {backend.name} the results differ slightly", stacklevel=4)
        return backend


# A copied or pickled backend is looked up by its name, so objects that hold one can be copied.
def _how_to_pickle(backend: Any) -> Any:
    return same_backend, (backend.name, backend.threads)


copyreg.pickle(Kernels, _how_to_pickle)
copyreg.pickle(NumPy, _how_to_pickle)


@functools.cache
def fma_peak(name: str, threads: int, precision: str = "fp32") -> float:
    """Measure an instruction set's peak rate of multiply-adds, in operations/s; this takes 0.1 s.

    Return the best of five short runs, because a busy machine slows some of them; 0.0 for "numpy",
    which has no kernels.

    Parameters
    ----------
    precision : of the numbers that are multiplied: "fp32", "bf16", "fp16" or "int8"
    """
    if name == "numpy":
        return 0.0
    kernels = get_backend(name, threads)
    iterations, best = 200_000, 0.0
    for _ in range(6):  # the first wakes the threads
        start = time.perf_counter()
        operations = kernels.fma_burn(iterations, precision)
        seconds = time.perf_counter() - start
        best = max(best, operations / seconds)
        iterations = max(iterations, int(iterations * 0.02 / seconds))
    return best


def fast_precisions(name: str) -> tuple[str, ...]:
    """Return "fp32", then the other precisions for which a backend has an instruction.

    Examples
    --------
    >>> gpt2c.kernels.backend.fast_precisions("avx512bf16")
    ('fp32', 'bf16')
    """
    return tuple(p for p, need in INSTRUCTIONS.items() if not need or need in REQUIRES[name])


def as_precision(precision: str, backend: Backend) -> str:
    """Return the precision of products; "auto" is that which this CPU computes fastest.

    16 bits are faster only with instructions for them, and not on every CPU that has these: "auto"
    measures each, once, which takes 0.1 s for each.

    Raises
    ------
    ValueError : an unknown precision
    """
    check_choice("precision", precision, get_args(Precision))
    if precision == "auto":
        known = fast_precisions(backend.name)
        peaks = {one: fma_peak(backend.name, backend.threads, one) for one in known}
        return max(known, key=lambda one: peaks[one]) if len(known) > 1 else "fp32"
    return precision
