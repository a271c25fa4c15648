"""`gpt2c info`: versions, the machine, the ranks of mpiexec; --verbose: all of a bug report.

A fact that a system does not tell is "unknown", never an error. No secret is printed. The versions
of packages are read without importing them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import locale
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from gpt2c.bench.machine import (
    FLOATS,
    caches,
    compiler,
    core_distance,
    cpu_name,
    distance_text,
    peak_text,
    peaks,
    read_bandwidth,
)
from gpt2c.kernels.backend import (
    NAMES,
    REQUIRES,
    THREAD_VARIABLES,
    default_threads,
    get_backend,
    why_missing,
)
from gpt2c.kernels.busy import BusyCores
from gpt2c.kernels.limits import (
    AFFINITY,
    CORES,
    bound,
    cpu_quota,
    free_bytes,
    memory_limit,
    read,
    total_bytes,
    usable_cores,
)
from gpt2c.kernels.memory import megabytes
from gpt2c.parallel.world import ALONE, Ranks, World, join, mpi_library
from gpt2c.text.gpt2_vocabulary import tiktoken_cache

__all__ = ["PACKAGES", "add_flags", "run_info"]

InfoRow = tuple[str, str]  # a name, and its text

SHORT = ("numpy", "cffi", "tiktoken", "safetensors")
PACKAGES = (
    *("numpy", "cffi", "tiktoken", "rustbpe", "safetensors", "tqdm"),
    *("matplotlib", "huggingface_hub", "gguf", "tensorboardX", "torch", "transformers", "lm_eval"),
    *("scikit-learn", "mpi4py"),
)
# Variables that change the behaviour of gpt2c or of its libraries.
VARIABLES = re.compile(
    r"(GPT2C|OMP|GOMP|KMP|OPENBLAS|MKL|HF|HUGGING_FACE|TRANSFORMERS|TQDM|MALLOC)_\w*|PYTHON\w*"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|TIKTOKEN_CACHE_DIR|DATA_GYM_CACHE_DIR|TMPDIR|XDG_CACHE_HOME|TERM"
    r"|COLUMNS|(?i:https?|all|no)_(?i:proxy)"
)
# The value of a variable with such a word in its name is not shown.
SECRETS = {"TOKEN", "KEY", "SECRET", "PASSWORD"}

LOADS_MPI = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
from gpt2c.parallel.world import mpi_library
print(mpi_library(MPI))
"""
LONGEST_LOAD = 60.0  # seconds
SHORTEST_LOOK = 0.2  # seconds of the peaks, in which the work of others can be counted


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c info`."""
    verb.add_argument("--verbose", action="store_true", help="all that a bug report needs")


def run_info(options: argparse.Namespace) -> int:
    """`gpt2c info`: on several ranks the first one shows its machine, and a row for each rank."""
    try:
        world, problem = join(), ""
    except ValueError as error:  # a fact as others
        world, problem = ALONE, f"none: {error}"
    except SystemExit:  # of another rank; a launcher would end the first one for its exit code
        return 0
    with world.guard():
        rows = _machine_rows(options.verbose) if world.rank == 0 else []
        rows += [("MPI", problem)] if problem else rank_rows(world)
    if world.rank == 0:
        width = max(12, 2 + max(len(name) for name, _ in rows))
        for name, text in rows:
            print(f"{name:<{width}}{text}".rstrip())
    return 0


def _machine_rows(verbose: bool) -> list[InfoRow]:
    """Return the rows about this process and its machine."""
    threads = _threads()
    if verbose:
        return [
            *install_rows(),
            *((package, version(package)) for package in PACKAGES),
            ("NumPy's BLAS", _blas()),
            *system_rows(),
            *cpu_rows(),
            *memory_rows(threads),
            *thread_rows(threads),
            *backend_rows(threads),
            *environment_rows(),
        ]
    return [
        ("gpt2c", version("gpt2c")),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((package, version(package)) for package in SHORT),
        ("CPU", cpu_name()),
        ("caches", ", ".join(caches()) or "unknown"),
        ("cores", _cores()),
        ("distance", _distance()),
        ("memory", _memory()),
        ("bandwidth", _bandwidth(threads)),
        ("threads", _why(threads)),
        *backend_rows(threads),
    ]


def rank_rows(world: World) -> list[InfoRow]:
    """Return a row about MPI, and one for each of several ranks; collective."""
    if not isinstance(world, Ranks):
        return [("MPI", _mpi())]
    try:
        threads = str(world.take_cores(0))
    except ValueError:  # which the backend tells, too
        threads = "none"
    try:
        backend = get_backend().name
    except ValueError as error:
        backend = f"none: {error}"
    host = world.MPI.Get_processor_name()
    found = world.all([host, _ranges(sorted(bound())), threads, backend])
    table = [["host", "cores", "threads", "backend"], *found]
    widths = [2 + max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["".join(map(str.ljust, line, widths)) for line in table]
    rows = [("MPI", f"{mpi_library(world.MPI)}, mpi4py {version('mpi4py')}"), ("ranks", lines[0])]
    for rank, (line, (*_, own)) in enumerate(zip(lines[1:], found, strict=True)):
        mark = "" if own == found[0][-1] else "<- not that of rank 0"
        rows.append((f"rank {rank}", line + mark))
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """Return increasing numbers as text: "0-3,8"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _mpi() -> str:
    """Return whether several ranks could run here: the versions of mpi4py and of its MPI."""
    if (found := version("mpi4py")) == "not installed":
        return "mpi4py is not installed; several ranks need it: pip install mpi4py, and an MPI"
    # in a process of its own: a broken MPI may end it, and a whole one changes how signals act
    command = [sys.executable, "-c", LOADS_MPI]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_LOAD)
    except (OSError, subprocess.SubprocessError) as error:
        return f"mpi4py {found}; whether there is an MPI is unknown: {error}"
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ends with code {done.returncode}"]
        return f"mpi4py {found}, and no MPI that it can load ({said[-1]})"
    return f"mpi4py {found} with {done.stdout.strip()}, for several ranks (mpiexec)"


def version(package: str) -> str:
    """Return a package's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _threads() -> int | str:
    try:
        return default_threads()
    except ValueError as error:  # a variable is wrong; the other facts are still shown
        return f"none: {error}"


def backend_rows(threads: int | str) -> list[InfoRow]:
    """Return a row for each backend: its peaks, or why it does not run here.

    If other programs kept the cores busy meanwhile, a row after them says so.
    """
    chosen, problem = "", ""
    try:
        chosen = get_backend().name
    except ValueError as error:
        problem = str(error)
    busy = BusyCores(threads, SHORTEST_LOOK) if isinstance(threads, int) else None
    rows = []
    for name in NAMES:
        state = why_missing(name)
        if not state and name != "numpy" and isinstance(threads, int):
            team = f"{threads} thread{'s' if threads > 1 else ''}"
            found = [
                f"{row.partition(':')[2] or 'fp32'} {peak_text(row, peak)}"
                for row, peak in peaks(name, threads).items()
            ]
            state = f"peak on {team}: {', '.join(found)}"
        mark = "  <- chosen" if name == chosen else ""
        rows.append(("backend", f"{name:<12}{state}{mark}"))
    if busy and (others := busy.others()):
        used = f"{others:.1f} of the {busy.cores} cores that this process may use"
        rows.append(("busy", f"other programs used {used}, so the peaks are too low"))
    return rows + ([("backend", f"none chosen: {problem}")] if problem else [])


def install_rows() -> list[InfoRow]:
    """Return rows about gpt2c, its installation and files, and the Python that runs it."""
    package = Path(__file__).parents[1]
    rows = [("gpt2c", f"{version('gpt2c')} in {package}"), ("installed", _installed())]
    for library in sorted(package.glob("_kernels_*")):
        content, built = library.read_bytes(), compiler(library)
        digest = hashlib.sha256(content).hexdigest()[:12]
        rows.append(("file", f"{library.name}  {len(content):,} bytes  sha256 {digest}  {built}"))
    for library in sorted(package.parent.glob("gpt2c.libs/*")):
        rows.append(("file", f"{library.name}  {library.stat().st_size:,} bytes"))
    lock = "GIL" if getattr(sys, "_is_gil_enabled", lambda: True)() else "no GIL"
    python = f"{' '.join(sys.version.split())}, {sys.maxsize.bit_length() + 1} bits, {lock}"
    rows += [("Python", python), ("executable", sys.executable)]
    return rows


def _installed() -> str:
    """Return the installer, the platforms and the origin, from the package's metadata."""
    try:
        files = importlib.metadata.distribution("gpt2c")
    except importlib.metadata.PackageNotFoundError:
        return "no: imported from a folder"
    facts = [f"by {(files.read_text('INSTALLER') or 'an unknown tool').strip()}"]
    facts += [f"tag {tag}" for tag in re.findall(r"Tag: (\S+)", files.read_text("WHEEL") or "")]
    with suppress(ValueError, AttributeError):
        origin = json.loads(files.read_text("direct_url.json") or "{}")
        facts += ["editable"] if origin.get("dir_info", {}).get("editable") else []
        facts += [f"from {without_password(origin['url'])}"] if "url" in origin else []
    return ", ".join(facts)


def _blas() -> str:
    with suppress(Exception):  # NumPy does not promise this layout
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    return "unknown"


def system_rows() -> list[InfoRow]:
    """Return rows about the operating system, the C library and standard output."""
    name = f"{platform.system()} {platform.mac_ver()[0]}".strip()
    with suppress(OSError):
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    libc = "unknown"
    with suppress(OSError, ValueError, AttributeError):  # other systems do not know the name
        libc = os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    terminal = "no terminal"
    if sys.stdout.isatty():
        size = shutil.get_terminal_size()
        terminal = f"a terminal of {size.columns} x {size.lines}"
    encoding = f"{sys.stdout.encoding}, locale {locale.getlocale()[0]}"
    return [
        ("system", name),
        ("kernel", f"{platform.system()} {platform.release()} {platform.version()}"),
        ("libc", libc),
        ("output", f"{terminal}, {encoding}"),
    ]


def cpu_rows() -> list[InfoRow]:
    """Return rows about the processor: features that backends need, caches, cores, load."""
    rows = [("CPU", f"{cpu_name()}, {platform.machine()}")]
    features = dict.fromkeys(f for name in reversed(NAMES) for f in REQUIRES[name])
    try:
        has = importlib.import_module("gpt2c._kernels_base").lib.cpu_supports
        known = {feature: bool(has(feature.encode())) for feature in features}
        for name, wanted in (("CPU has", True), ("CPU lacks", False)):
            found = " ".join(feature for feature in features if known[feature] is wanted)
            rows.append((name, found or "none of these"))
    except ImportError:
        rows.append(("CPU has", "unknown: no kernels to ask"))
    rows.append(("caches", ", ".join(caches()) or "unknown"))
    load = "unknown"
    with suppress(OSError, AttributeError):
        load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    rows += [
        ("cores", _cores()),
        ("distance", _distance()),
        ("load", f"{load} (1, 5, 15 minutes)"),
    ]
    return rows


def _cores() -> str:
    """Return the number of cores, and the share of them that this process may use."""
    quota = cpu_quota()
    limit = "no CPU quota" if quota == math.inf else f"a CPU quota of {quota:.3g}"
    return f"{CORES}, of which {len(AFFINITY)} for this process, {limit}"


def _distance() -> str:
    """Return how far one core is from another."""
    if why_missing("base"):
        return "unknown: no kernels to ask"
    try:
        return distance_text(core_distance())
    except OSError as error:  # no second thread
        return f"unknown: {error}"


def _bandwidth(threads: int | str) -> str:
    """Return how fast this process reads memory."""
    if isinstance(threads, str):
        return "unknown"
    if why_missing("base"):
        return "unknown: no kernels to ask"
    if free_bytes() < 2 * 4 * FLOATS:
        return f"not measured: that takes {megabytes(4 * FLOATS)} of memory"
    try:
        return f"{read_bandwidth(threads) / 1e9:,.0f} GB/s when memory is read"
    except (OSError, MemoryError) as error:
        return f"unknown: {error}"


def _memory() -> str:
    """Return the size of the memory, and the part of it that this process can still get."""
    total = "unknown"
    with suppress(OSError, ValueError):
        total = megabytes(total_bytes())
    limit = memory_limit()
    bound = "no cgroup limit" if limit == math.inf else f"a cgroup limit of {megabytes(limit)}"
    return f"{total}, of which {megabytes(free_bytes())} free for this process, {bound}"


def _why(threads: int | str) -> str:
    """Return the number of threads that kernels use, and the reason."""
    if isinstance(threads, str):
        return threads
    variables = (f"from {name}" for name in THREAD_VARIABLES if os.environ.get(name))
    why = (
        "as the CPU quota allows"
        if usable_cores() < len(AFFINITY)
        else "the cores that this process may run on"
    )
    return f"{threads}, {next(variables, why)}"


def memory_rows(threads: int | str) -> list[InfoRow]:
    """Return rows about the memory, its speed and its limits."""
    spaces = {}
    for name, limit in (("address space", "RLIMIT_AS"), ("data", "RLIMIT_DATA")):
        spaces[name] = "unknown"
        with suppress(ImportError):
            resource = importlib.import_module("resource")
            soft = resource.getrlimit(getattr(resource, limit))[0]
            spaces[name] = "no limit" if soft == resource.RLIM_INFINITY else megabytes(soft)
    pages = re.search(r"\[(\w+)\]", read(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    return [
        ("memory", _memory()),
        ("bandwidth", _bandwidth(threads)),
        *((f"limit of {name}", text) for name, text in spaces.items()),
        ("huge pages", pages[1] if pages else "unknown"),
    ]


def thread_rows(threads: int | str) -> list[InfoRow]:
    """Return rows about threads: their number, the reason, and whether they start."""
    if isinstance(threads, str):
        return [("threads", threads)]
    rows = [("threads", _why(threads))]
    if why_missing("base"):
        return [*rows, ("they start", "unknown: no kernels to ask")]
    try:
        get_backend("base", threads).fma_burn(1)
    except OSError as error:
        return [*rows, ("they start", f"no: {error}")]
    return [*rows, ("they start", "yes")]


def environment_rows() -> list[InfoRow]:
    """Return rows about the set VARIABLES, without secrets, and about tiktoken's cache."""
    rows = [("HF_TOKEN", "set" if os.environ.get("HF_TOKEN") else "unset")]
    for name, value in sorted(os.environ.items()):
        if not VARIABLES.fullmatch(name) or name == "HF_TOKEN":
            continue
        secret = SECRETS & set(name.upper().split("_"))
        if name.lower().endswith("_proxy"):  # may be an address without its scheme
            value = value.rpartition("@")[2]
        rows.append((name, "set" if secret else repr(without_password(value))))
    cache, whole = tiktoken_cache()
    state = "no cache: TIKTOKEN_CACHE_DIR is empty"
    if cache is not None:
        state = f"{cache} {'has' if whole else 'lacks'} GPT-2's vocabulary"
    return [*rows, ("tiktoken's cache", state)]


def without_password(text: str) -> str:
    """Return a text without the user names and passwords in its addresses."""
    return re.sub(r"//[^/\s]*@", "//***@", text)
