"""Backends: names, choice, threads, errors; and what an import loads."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import refused
from helpers.command import program, run_process

from gpt2c.kernels import backend as backend_module
from gpt2c.kernels import reference
from gpt2c.kernels.backend import (
    AVX2,
    AVX512,
    NAMES,
    REQUIRES,
    THREAD_VARIABLES,
    backends,
    default_threads,
    get_backend,
    why_missing,
)
from gpt2c.kernels.binding import Kernels
from gpt2c.kernels.limits import usable_cores

PACKAGE = Path(backend_module.__file__).parent
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that choose a backend or threads."""
    for variable in ("GPT2C_BACKEND", *THREAD_VARIABLES):
        monkeypatch.delenv(variable, raising=False)


# ---- names and choosing --------------------------------------------------------------------------


def test_every_machine_has_numpy_last() -> None:
    assert backends()[-1] == "numpy"
    assert list(backends()) == [name for name in NAMES if name in backends()], "not fastest first"


@pytest.mark.parametrize("name", NAMES)
def test_backend_knows_its_name(name: str) -> None:
    """What is skipped here is what no test of this machine tries."""
    if name not in backends():
        pytest.skip(f"backend {name!r} does not run here, only {', '.join(backends())}")
    assert get_backend(name).name == name


def test_auto_is_the_fastest() -> None:
    assert get_backend().name == get_backend("auto").name == backends()[0]


def test_numpy_is_the_reference() -> None:
    numpy = get_backend("numpy")
    assert numpy.gelu_forward is reference.gelu_forward and numpy.threads == 1


def test_variable_sets_the_backend_of_auto(
    backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2C_BACKEND", backend_name)
    assert get_backend().name == backend_name
    assert get_backend("numpy").name == "numpy", "a name that is given outweighs the variable"


@pytest.mark.parametrize("value", ["", "auto"])
def test_empty_variable_is_ignored(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2C_BACKEND", value)
    assert get_backend().name == backends()[0]


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "numpy ", "_base"])
def test_unknown_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(get_backend, name)
    assert repr(name) in message and message.endswith(", ".join(backends()))
    if name:
        monkeypatch.setenv("GPT2C_BACKEND", name)
        assert repr(name) in refused(get_backend)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Return a CPU with the features in `cpu.has`, and no kernels loaded yet."""
    fake = SimpleNamespace(has=set())
    lib = SimpleNamespace(cpu_supports=lambda feature: feature.decode() in fake.has)
    monkeypatch.setitem(sys.modules, "gpt2c._kernels_base", SimpleNamespace(lib=lib))
    for name in set(NAMES) - {"base", "numpy"}:  # importing the real ones could end the process
        monkeypatch.setitem(sys.modules, f"gpt2c._kernels_{name}", ModuleType(name))
    why_missing.cache_clear()
    yield fake
    why_missing.cache_clear()


@pytest.mark.parametrize(
    ("has", "expected", "lacking"),
    [
        (set(), ("base", "numpy"), "avx2, fma, f16c"),
        ({"avx2"}, ("base", "numpy"), "fma, f16c"),
        ({"avx2", "fma"}, ("base", "numpy"), "f16c"),
        ({*AVX2}, ("avx2", "base", "numpy"), "avx512f, avx512bw, avx512dq, avx512vl"),
        ({*AVX2, "avx512f"}, ("avx2", "base", "numpy"), "avx512bw, avx512dq, avx512vl"),
        ({*AVX512}, ("avx512", "avx2", "base", "numpy"), "avx512vnni"),
        ({*AVX2, "avx512vnni"}, ("avx2", "base", "numpy"), "avx512f, avx512bw, avx512dq, avx512vl"),
        ({*REQUIRES["avx512vnni"]}, NAMES[3:], "avx512bf16"),
        ({*REQUIRES["avx512bf16"]}, NAMES[2:], "avx512fp16"),
        ({*REQUIRES["avx512fp16"]}, NAMES[1:], "amx-tile, amx-bf16, amx-int8"),
        ({*REQUIRES["amx"]}, ("amx", *NAMES[2:]), ""),
        ({*REQUIRES["amx"], "avx512fp16"}, NAMES, ""),
    ],
)
def test_cpu_gets_the_kernels_that_it_can_run(
    has: set[str], expected: tuple[str, ...], lacking: str, cpu: SimpleNamespace
) -> None:
    cpu.has = has
    assert backends() == expected
    for name in set(NAMES) - set(expected):
        message = refused(get_backend, name)
        assert repr(name) in message and message.endswith(", ".join(expected))
        assert f"no {', '.join(f for f in REQUIRES[name] if f not in has)};" in message
    if lacking:
        better = NAMES[NAMES.index(expected[0]) - 1]
        assert f"no {lacking};" in refused(get_backend, better)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "numpy"])
def test_kernels_that_are_not_built_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"gpt2c._kernels_{name}", None)  # its import fails
    why_missing.cache_clear()
    try:
        assert name not in backends() and "numpy" in backends()
        message = refused(get_backend, name)
        assert repr(name) in message and message.endswith(", ".join(backends()))
    finally:
        why_missing.cache_clear()


# ---- threads -------------------------------------------------------------------------------------


def test_threads_are_what_the_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads() == usable_cores()
    monkeypatch.setattr(backend_module, "usable_cores", lambda: 5000)
    assert default_threads() == backend_module.MAX_THREADS


@pytest.mark.skipif(usable_cores() < 2, reason="one core: no thread can be bound to another")
@pytest.mark.skipif(backends()[0] == "numpy", reason="no kernels are built")
def test_threads_are_as_many_when_openmp_binds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP binds the first thread to one core at its load or later; the others keep theirs."""
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    done = run_process(program("programs.fresh", "teams"))
    assert done.stdout.split() == [str(usable_cores())] * 3, done.stderr


def test_gpt2c_variable_precedes_that_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.setenv("GPT2C_NUM_THREADS", "2")
    assert default_threads() == 2
    monkeypatch.setenv("GPT2C_NUM_THREADS", "")
    assert default_threads() == 3


@pytest.mark.parametrize("variable", THREAD_VARIABLES)
@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many", "1e3", " "])
def test_bad_thread_variables_are_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    message = refused(get_backend)
    assert message.startswith(variable) and repr(value) in message


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(threads: int, backend_name: str) -> None:
    assert refused(get_backend, backend_name, threads).startswith("threads")


def test_kernels_get_their_threads(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend_name == "numpy":
        pytest.skip("numpy has threads of its own")
    monkeypatch.setenv("GPT2C_NUM_THREADS", "3")
    default, one = get_backend(backend_name), get_backend(backend_name, threads=1)
    assert isinstance(default, Kernels) and isinstance(one, Kernels)
    assert (default.threads, one.threads) == (3, 1)
    assert get_backend(backend_name, threads=1) is one, "scratch memory is kept between calls"


@pytest.mark.parametrize("wrong", [2.0, True, "2"])
def test_threads_that_are_no_whole_number_are_refused(wrong: object) -> None:
    assert refused(get_backend, "auto", wrong).startswith("threads must be a whole number")


# ---- build.py and backend.py agree ---------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / "build.py").exists(), reason="no build.py: not a source tree")
def test_compiler_flags_match_the_cpu_features_asked_for() -> None:
    spec = importlib.util.spec_from_file_location("gpt2c_build", ROOT / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for machine, extensions in build.ISAS.items():
        assert set(extensions) <= set(NAMES) - {"numpy"}, machine
        for name, flags in extensions.items():
            assert {flag.removeprefix("-m") for flag in flags} == set(REQUIRES[name]), machine
    assert set(build.ISAS["x86_64"]) == set(NAMES) - {"numpy"}


def test_importing_is_light_and_quiet() -> None:
    code = "import gpt2c, sys; print(*sys.modules)"
    done = run_process([sys.executable, "-W", "error", "-c", code])
    assert not done.stderr
    loaded = set(re.findall(r"\w+", done.stdout))
    assert "gpt2c" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "tensorflow", "jax"}


def test_step_in_a_fresh_process_is_quiet(backend_name: str) -> None:
    done = run_process(program("programs.fresh", "step", backend_name))
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 10)\n", "")
