"""Backends: names, choosing, threads, messages; and the shape of the package that they stand in."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import refused

from gpt2c import backend as backend_module
from gpt2c import reference
from gpt2c.backend import (
    AVX2,
    AVX512,
    NAMES,
    REQUIRES,
    THREAD_VARIABLES,
    backends,
    default_threads,
    get_backend,
)
from gpt2c.kernels import Kernels
from gpt2c.limits import usable_cores

PACKAGE = Path(backend_module.__file__).parent
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the choice to the tests, whatever variables they are run with."""
    for variable in ("GPT2C_BACKEND", *THREAD_VARIABLES):
        monkeypatch.delenv(variable, raising=False)


# ---- names and choosing --------------------------------------------------------------------------


def test_every_machine_has_numpy_last() -> None:
    assert backends()[-1] == "numpy"
    assert list(backends()) == [name for name in NAMES if name in backends()], "not fastest first"


def test_a_backend_knows_its_name(backend_name: str) -> None:
    assert get_backend(backend_name).name == backend_name


def test_auto_is_the_fastest() -> None:
    assert get_backend().name == get_backend("auto").name == backends()[0]


def test_numpy_is_the_reference() -> None:
    numpy = get_backend("numpy")
    assert numpy.gelu_forward is reference.gelu_forward and numpy.threads == 1


def test_the_variable_is_what_auto_means(
    backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2C_BACKEND", backend_name)
    assert get_backend().name == backend_name
    assert get_backend("numpy").name == "numpy", "a name that is given outweighs the variable"


@pytest.mark.parametrize("value", ["", "auto"])
def test_the_variable_may_say_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2C_BACKEND", value)
    assert get_backend().name == backends()[0]


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "numpy ", "_base"])
def test_an_unknown_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(get_backend, name)
    assert repr(name) in message and message.endswith(", ".join(backends()))
    if name:
        monkeypatch.setenv("GPT2C_BACKEND", name)
        assert repr(name) in refused(get_backend)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Pretend to be a CPU with the features in `cpu.has`, on which no kernels are loaded yet."""
    fake = SimpleNamespace(has=set())
    lib = SimpleNamespace(cpu_supports=lambda feature: feature.decode() in fake.has)
    monkeypatch.setitem(sys.modules, "gpt2c._kernels_base", SimpleNamespace(lib=lib))
    for name in set(NAMES) - {"base", "numpy"}:  # importing the real ones could end the process
        monkeypatch.setitem(sys.modules, f"gpt2c._kernels_{name}", ModuleType(name))
    backends.cache_clear()
    yield fake
    backends.cache_clear()


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
        ({*REQUIRES["avx512vnni"]}, NAMES, ""),
    ],
)
def test_a_cpu_gets_what_it_can_run(
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
    backends.cache_clear()
    try:
        assert name not in backends() and "numpy" in backends()
        message = refused(get_backend, name)
        assert repr(name) in message and message.endswith(", ".join(backends()))
    finally:
        backends.cache_clear()


# ---- threads -------------------------------------------------------------------------------------


def test_threads_are_what_the_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads() == usable_cores()
    monkeypatch.setattr(backend_module, "usable_cores", lambda: 5000)
    assert default_threads() == backend_module.MAX_THREADS


@pytest.mark.skipif(usable_cores() < 2, reason="one core: no thread can be bound to another")
@pytest.mark.skipif(backends()[0] == "numpy", reason="no kernels are built")
def test_threads_that_openmp_binds_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """It binds the first thread to one core, when it loads or later: the others have theirs."""
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    code = """
from gpt2c.backend import get_backend
print(*(get_backend(name).threads for name in ("auto", "base", "auto")))
"""
    assert python(code).split() == [str(usable_cores())] * 3


def test_the_own_variable_outweighs_openmps(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_kernels_are_compiled_for_what_the_cpu_is_asked() -> None:
    spec = importlib.util.spec_from_file_location("gpt2c_build", ROOT / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for machine, extensions in build.ISAS.items():
        assert set(extensions) <= set(NAMES) - {"numpy"}, machine
        for name, flags in extensions.items():
            assert {flag.removeprefix("-m") for flag in flags} == set(REQUIRES[name]), machine
    assert set(build.ISAS["x86_64"]) == set(NAMES) - {"numpy"}


# ---- the package ---------------------------------------------------------------------------------

LIBRARY = {"backend", "config", "model", "ops", "optimizer", "tokenizer"}
READING = {"generator", "quantized", "sampling"}
RUN = {"backend", "baselines", "config", "data", "files", "model", "settings", "tokenfile"}
RUN |= {"tokenizer"}

# module: modules of gpt2c that it may import. A module knows nothing about those not listed.
ARROWS: dict[str, set[str]] = {
    "reference_reading": set(),
    "reference": {"reference_reading"},
    "limits": set(),
    "memory": {"limits"},
    "checks": set(),
    "op": set(),
    "plain": set(),
    "kernels": {"limits", "memory", "op"},
    "backend": {"checks", "kernels", "limits", "op", "reference"},
    "ops": {"backend", "checks", "op", "reference", "reference_reading"},
    "cases": {"op", "reference"},
    "machine": {"backend", "limits", "memory"},
    "peers": {"config"},
    "peers_generate": {"checkpoint", "config", "gguf_export", "tokenizer"},
    "worker": {"backend", "cases", "config", "language_model", "machine", "model", "optimizer"}
    | {"op", "peers", "peers_generate", "quantized", "reference"},
    # and it starts workers
    "bench": {"activations", "backend", "cases", "config", "limits", "machine", "memory"},
    "bench_generate": {"backend", "bench", "config", "machine", "memory"},
    "report": {"bench", "files", "machine", "plot"},
    "files": set(),
    "config": {"files"},
    "hub": set(),
    "tensorfile": {"files"},
    "checkpoint": {"files", "hub", "tensorfile"},
    "sampling": {"checks"},
    "generate": {"sampling"},
    "decoder": {"backend", "checks", "config", "kernels", "memory", "reference_reading"},
    "language_model": {"backend", "checks", "config", "decoder", "generate", "memory", "sampling"},
    "quantized": {"backend", "checkpoint", "config", "hub", "language_model", "memory"}
    | {"reference_reading", "tensorfile"},
    "engine": {"checks", "decoder", "generate", "language_model", "sampling", "tokenizer"},
    "generator": {"backend", "checkpoint", "hub", "language_model", "llmc", "memory", "model"}
    | {"checks", "generate", "quantized", "sampling", "tokenizer"},
    "llmc": {"config", "files", "memory", "tensorfile"},
    "gguf_export": {"config", "files", "memory", "tokenizer"},
    "convert": {"checkpoint", "files", "gguf_export", "llmc", "model", "quantized", "tokenfile"}
    | {"tokenizer", "tokenizer_files"},
    "activations": {"config", "memory"},
    "layer": {"backend", "memory"},
    "model": {"activations", "backend", "checkpoint", "config", "hub", "language_model", "layer"}
    | {"llmc", "memory", "quantized", "tensorfile"},
    "optimizer": {"memory"},
    "tokenizer_files": {"files", "hub"},
    "bpe_trainer": set(),
    "tokenizer": {"checks", "bpe_trainer", "hub", "limits", "tokenizer_files"},
    "textfiles": {"files", "metrics", "terminal", "tokenizer_files"},
    "tokenfile": {"checks", "files"},
    "data": {"checks", "files", "tokenfile", "tokenizer"},
    "corpus": set(),
    "command": set(),
    "figures": set(),
    "baselines": set(),
    "picture": {"files"},
    "plot": {"picture", "terminal"},
    "progress": set(),
    "load": {"limits"},
    "metrics": {"files"},
    "tensorboard": {"files"},
    "trainer_state": {"checkpoint", "files", "tensorfile"},
    "run": {"checkpoint", "config", "files", "metrics", "model", "optimizer", "settings"}
    | {"plot", "tensorboard", "tokenizer", "tokenizer_files", "trainer_state"},
    "settings": {"config", "files", "optimizer"},
    "needs": {"activations", "config", "memory", "settings"},
    "train": (RUN - {"baselines"})
    | {"checks", "figures", "load", "metrics", "needs", "optimizer", "plot", "progress"}
    | {"quantized", "run", "tensorboard", "trainer_state"},
    "demo": RUN
    | {"command", "corpus", "figures", "generator", "progress", "terminal", "textfiles", "train"},
    "terminal": set(),
    "cli_bench": {"bench", "bench_generate", "config", "machine", "picture", "report"},
    "cli_convert": {"convert", "llmc"},
    "cli_generate": {"checks", "files", "generator", "sampling", "terminal"},
    "cli_tokens": {"checks", "terminal", "tokenizer", "tokenizer_files"},
    "cli_prepare": {"data", "demo", "progress", "textfiles"},
    "cli_plot": {"figures", "files", "metrics", "plot", "run", "terminal", "tokenizer"},
    "scoring": {"checks", "decoder", "figures", "files", "language_model", "memory", "tokenizer"},
    "lm_eval": {"checks", "language_model", "scoring", "tokenizer"} | READING - {"quantized"},
    "cli_eval": {"figures", "generator", "hub", "model", "progress", "quantized"}
    | {"scoring", "tokenfile", "tokenizer", "train"},
    "cli_info": {"backend", "limits", "machine", "memory", "tokenizer"},
    "cli": (RUN - {"backend"})
    | {"cli_bench", "cli_convert", "cli_eval", "cli_generate", "cli_info", "cli_plot"}
    | {"cli_prepare", "cli_tokens", "command", "demo", "figures", "terminal", "train"},
    "__main__": {"cli"},  # and nothing else imports cli
    "__init__": {"limits"} | LIBRARY | READING | {"engine"},
}
DEPENDENCIES = {"numpy", "cffi", "tiktoken", "rustbpe", "safetensors", "tqdm"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Give the modules of gpt2c, and the other top-level modules, that a file imports anywhere."""
    own, other = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package != "gpt2c":
                other.add(package)
            else:
                own.add(rest[0] if rest else "__init__")
    return own, other


def test_every_module_is_in_the_table() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ARROWS.keys()


@pytest.mark.parametrize("module", ARROWS)
def test_imports_go_one_way(module: str) -> None:
    own, other = imports(PACKAGE / f"{module}.py")
    assert own <= ARROWS[module]
    allowed = {"numpy"} if module.startswith("reference") else DEPENDENCIES
    allowed = allowed | ({"matplotlib"} if module in ("picture", "plot") else set())
    allowed = allowed | ({"tensorboardX"} if module == "tensorboard" else set())
    torch = {"torch"} if module in ("peers", "peers_generate", "worker") else set()
    peers = {"transformers", "onnx", "onnxruntime", "ctranslate2", "llama_cpp"}
    torch |= peers if module == "peers_generate" else set()
    allowed = allowed | torch  # a benchmark's rows
    allowed = allowed | ({"lm_eval"} if module == "lm_eval" else set())
    allowed = allowed | ({"gguf"} if module == "gguf_export" else set())
    allowed = allowed | ({"huggingface_hub"} if module == "hub" else set())
    assert other - sys.stdlib_module_names <= allowed


def test_what_the_machine_allows_is_asked_in_one_place() -> None:
    """Who asks elsewhere finds other cores after OpenMP has bound a thread, and no quotas."""
    asks = r"cpu_count|sched_getaffinity|SC_(PHYS|NPROC)|sys/fs/cgroup|RLIMIT_(AS|DATA)"
    asking = {path.stem for path in PACKAGE.glob("*.py") if re.search(asks, path.read_text())}
    assert asking == {"limits", "cli_info"}  # which shows each of them


def test_the_table_has_no_circle() -> None:
    left = dict(ARROWS)
    while left:
        ready = [module for module, needs in left.items() if not needs & left.keys()]
        assert ready, f"these import each other: {', '.join(left)}"
        for module in ready:
            del left[module]


def python(code: str) -> str:
    """Run code in a fresh Python where a warning is an error; give what it prints."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_importing_is_light_and_quiet() -> None:
    loaded = set(re.findall(r"\w+", python("import gpt2c, sys; print(*sys.modules)")))
    assert "gpt2c" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "tensorflow", "jax"}


def test_a_step_in_a_fresh_process_is_quiet(backend_name: str) -> None:
    code = f"""
import gpt2c, numpy as np
config = gpt2c.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=3)
model = gpt2c.GPT2(config, backend={backend_name!r})
optimizer = gpt2c.AdamW(model)
idx = np.arange(8).reshape(1, 8)
model.loss(idx, idx)
model.backward()
optimizer.step(grad_clip=1.0)
print(model.generate(idx, 2, temperature=0).shape)
"""
    assert python(code) == "(1, 10)\n"
