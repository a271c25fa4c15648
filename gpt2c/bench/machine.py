"""The machine: its CPU, compiler and commit, and the ceilings that benchmarks compare with.

Knows backends, nothing of models.
"""

from __future__ import annotations

import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2c.kernels.backend import (
    PRECISIONS,
    backends,
    fast_precisions,
    fma_peak,
    get_backend,
    why_missing,
)
from gpt2c.kernels.limits import read, usable_cores
from gpt2c.kernels.memory import aligned_zeros

__all__ = [
    "FLOATS",
    "ROUNDED_TRAIN_RTOL",
    "Ceilings",
    "Quiet",
    "caches",
    "commit",
    "compiler",
    "core_distance",
    "cpu_facts",
    "cpu_name",
    "distance_text",
    "fastest",
    "fastest_for",
    "measure_ceilings",
    "peak_text",
    "peaks",
    "products_of",
    "read_bandwidth",
]

FLOATS = 1 << 26  # 256 MB: more than any last-level cache
TRAVELS, ROUNDS, TRY_SECONDS = 5, 200, 0.25  # a busy machine spoils most tries
FAR = 100.0  # ns; within a last-level cache a line takes 25 to 50, between two of them 100 to 200
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
BURN_SECONDS = 0.005
# of a loss in 16 bits; bfloat16 rounds each factor of a product by up to 0.002 of it
ROUNDED_TRAIN_RTOL = 0.01
# /proc/cpuinfo's numbers of a processor: x86's, then ARM's
CPU_NUMBERS = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
SOURCES = ("gpt2c", "csrc", "build.py")  # a benchmark measures these
COMPILER = re.compile(rb"GCC: [ -~]+|[ -~]*clang version [ -~]+")


def products_of(row: str) -> str:
    """Return the precision of a row's products: "bf16" of "avx2:bf16" and "torch-bf16"."""
    name, _, kind = row.partition(":")
    if name.startswith("torch-bf16"):
        return "bf16"
    return kind if kind in PRECISIONS else "fp32"


@dataclass(frozen=True)
class Ceilings:
    """The most that this machine reaches with `threads` threads.

    Attributes
    ----------
    peak : backend -> FLOP/s of its multiply-adds, registers only; "name:bf16" and
        "name:fp16" of those with instructions for them; "name:int8" are integer operations/s
    bandwidth : number of threads, up to all cores -> bytes/s from and to memory, reading alone or
        adding in place, whichever moves more
    distances : of two cores in ns at each measurement, see `core_distance`
    """

    threads: int
    peak: dict[str, float]
    bandwidth: dict[int, float]
    distances: tuple[float, ...] = ()

    def seconds(self, row: str, flops: float, size: float) -> float:
        """Return the least seconds that `flops` operations on `size` bytes can take.

        NumPy and PyTorch choose their own instructions: their peak is the highest one of their
        precision. Without instructions for it, that of fp32 counts.
        """
        floats = [name for name in self.peak if not name.endswith(":int8")]
        alike = [name for name in floats if products_of(name) == products_of(row)]
        highest = max(self.peak[name] for name in alike or floats)
        peak = self.peak.get(row, self.peak.get(row.partition(":")[0], highest))
        return max(flops / peak, size / self.full_bandwidth)

    def best(self, other: Ceilings) -> Ceilings:
        """Return the higher of each figure of two measurements, and the distances of both.

        Both have the same threads.
        """
        peak = {name: max(peak, other.peak[name]) for name, peak in self.peak.items()}
        bandwidth = {n: max(size, other.bandwidth[n]) for n, size in self.bandwidth.items()}
        return Ceilings(self.threads, peak, bandwidth, self.distances + other.distances)

    @property
    def full_bandwidth(self) -> float:
        """Bytes/s with `threads` threads, or with all cores if these are fewer."""
        return self.bandwidth[max(self.bandwidth)]


def fastest() -> str:
    """Return the name of the fastest backend, whatever GPT2C_BACKEND says.

    Raises
    ------
    ValueError : there are no kernels to measure with
    """
    if backends()[0] == "numpy":
        raise ValueError(f"a benchmark needs the kernels: {why_missing('base')}")
    return backends()[0]


def fastest_for(precision: str) -> str:
    """Return the fastest backend with an instruction for such products, else the fastest of all."""
    return next((name for name in backends() if precision in fast_precisions(name)), fastest())


def measure_ceilings(threads: int) -> Ceilings:
    """Measure the peak of every backend's multiply-adds, and memory with 1, 2, 4 ... threads."""
    fma_peak.cache_clear()  # the machine may have been busy when they were measured last
    peak = {row: own for name in backends() for row, own in peaks(name, threads).items()}
    data, other = aligned_zeros(FLOATS), aligned_zeros(FLOATS)
    data.fill(0.0)
    other.fill(0.0)
    most = min(threads, usable_cores())
    counts = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
    bandwidth = {}
    for count in counts:
        kernels, best = get_backend(fastest(), count), 0.0
        for _ in range(5):
            start = time.perf_counter()
            kernels.memory_read(data)
            middle = time.perf_counter()
            kernels.residual_forward(data, data, other)
            end = time.perf_counter()
            best = max(best, data.nbytes / (middle - start), 3 * data.nbytes / (end - middle))
        bandwidth[count] = best
    return Ceilings(threads, peak, bandwidth, (core_distance(),))


def peaks(name: str, threads: int) -> dict[str, float]:
    """Return the peaks of a backend as `Ceilings.peak` has them; none of "numpy"."""
    if name == "numpy":
        return {}
    rows = {name: "fp32"} | {f"{name}:{one}": one for one in (*fast_precisions(name)[1:], "int8")}
    return {row: fma_peak(name, threads, one) for row, one in rows.items()}


def peak_text(row: str, peak: float) -> str:
    """Return a peak with its unit, GFLOP/s; int8 are whole numbers, so theirs is GOP/s."""
    return f"{peak / 1e9:,.0f} {'GOP/s' if row.endswith(':int8') else 'GFLOP/s'}"


def read_bandwidth(threads: int) -> float:
    """Measure the speed of reading memory, in bytes/s; this takes 256 MB of it and 0.2 s.

    Raises
    ------
    ValueError : there are no kernels to measure with
    """
    kernels, data, best = get_backend(fastest(), threads), aligned_zeros(FLOATS), 0.0
    data.fill(0.0)  # a page that was never written lies nowhere
    for _ in range(5):
        start = time.perf_counter()
        kernels.memory_read(data)
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def core_distance() -> float:
    """Measure the nanoseconds in which a cache line goes from one core to another.

    The system chooses the two cores. Return the shortest of five means; 0.0 if two threads do not
    run at the same time within TRY_SECONDS, as on a busy machine, or if this process may use one
    core only.

    Raises
    ------
    ValueError : there are no kernels to measure with
    """
    if usable_cores() < 2:
        return 0.0
    kernels = get_backend(fastest(), 2)
    found: list[float] = []
    until = time.perf_counter() + TRY_SECONDS
    while len(found) < TRAVELS and time.perf_counter() < until:
        found += [way for way in [kernels.line_travel(ROUNDS)] if way]
    return min(found, default=0.0)


def distance_text(nanoseconds: float) -> str:
    """Return a result of `core_distance` in words."""
    if usable_cores() < 2:
        return "one core, so there is no way from core to core"
    if not nanoseconds:
        return "unknown: the machine is too busy to tell how far one core is from another"
    far = ": the cores share no cache at the moment" if nanoseconds > FAR else ""
    return f"a cache line takes {nanoseconds:.0f} ns from core to core{far}"


def caches() -> list[str]:
    """Return the caches of core 0 in words, the nearest first; [] where the system does not tell.

    Those of instructions are left out.
    """
    found = []
    for index in sorted(CACHES.glob("index*")):
        level, kind, size, cores = (
            read(index / part) for part in ("level", "type", "size", "shared_cpu_list")
        )
        if kind == "Instruction" or not size:
            continue
        own = "" if cores in ("", "0") else f" of cores {cores}"
        found.append(f"L{level} {size}{own}")
    return found


class Quiet:
    """Measures how evenly the machine works: it times the same multiply-adds again and again.

    Parameters
    ----------
    threads : of the benchmark
    """

    def __init__(self, threads: int) -> None:
        self._kernels = get_backend(fastest(), threads)
        self._iterations = 100_000
        self._seconds: list[float] = []
        self.listen()
        self._iterations = int(self._iterations * BURN_SECONDS / self._seconds.pop())

    def listen(self) -> None:
        """Time the multiply-adds once more."""
        start = time.perf_counter()
        self._kernels.fma_burn(max(1, self._iterations))
        self._seconds.append(time.perf_counter() - start)

    def verdict(self) -> str:
        """Return a sentence with the spread of the middle half of the timings."""
        low, high = np.percentile(self._seconds, [25, 75])
        spread = high / low - 1
        text = f"the same {BURN_SECONDS * 1e3:.0f} ms of multiply-adds varied by {spread:.0%}"
        return f"NOISY MACHINE: {text}" if spread > 0.1 else f"quiet machine: {text}"


def cpu_name() -> str:
    """Return the processor's name, with family, model and stepping if it has no number."""
    facts = cpu_facts()
    name = facts.get("model name") or platform.processor() or "unknown"
    numbers = [f"{key.split()[-1]} {facts[key]}" for key in CPU_NUMBERS if key in facts]
    says_little = not any(character.isdigit() for character in name)
    return f"{name} ({', '.join(numbers)})" if says_little and numbers else name


def cpu_facts() -> dict[str, str]:
    """Return name and numbers of the first core, from /proc/cpuinfo; {} where it has none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    return {key: facts[key] for key in ("model name", *CPU_NUMBERS) if facts.get(key)}


def compiler(library: Path) -> str:
    """Return the compiler that a built library names in itself."""
    found = COMPILER.search(library.read_bytes())
    return found[0].decode() if found else "unknown compiler"


def commit() -> str:
    """Return the commit of the clone that holds this gpt2c; "" without a clone.

    "+" at its end means that SOURCES differ from the commit. Other files do not count, so that one
    result can be written after the other.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        head = _git(root, "rev-parse", "--verify", "HEAD").stdout.strip()
        changed = _git(root, "diff", "--quiet", "HEAD", "--", *SOURCES).returncode
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}+" if head and changed else head


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)
