"""`gpt2c info`: it shows every row on any machine, and no secret."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command import program, run_process

from gpt2c.bench import machine
from gpt2c.cli import info as cli_info
from gpt2c.cli.main import main
from gpt2c.kernels import backend
from gpt2c.kernels.backend import (
    NAMES,
    REQUIRES,
    THREAD_VARIABLES,
    backends,
    default_threads,
    fast_precisions,
    why_missing,
)
from gpt2c.kernels.busy import BusyCores
from gpt2c.text import gpt2_vocabulary

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GPT2C_BACKEND", *THREAD_VARIABLES):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/bench/test_machine.py measures, and one test below loads MPI."""
    monkeypatch.setattr(cli_info, "_mpi", lambda: "some MPI")
    monkeypatch.setattr(cli_info, "core_distance", lambda: 171.0)
    monkeypatch.setattr(cli_info, "read_bandwidth", lambda threads: 35e9)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)


@pytest.fixture
def info(capsys: Capture):
    """Return the output of `gpt2c info ...` as rows: a name, and the rest."""

    def run(*flags: str) -> list[tuple[str, str]]:
        assert main(["info", *flags]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        # Two columns: the names, and at least two blanks later the facts, aligned.
        start = re.match(r"gpt2c +", lines[0]).end()  # type: ignore[union-attr]
        assert all(len(line) <= start or line[start - 2 : start] == "  " for line in lines)
        assert all(line[start : start + 1] != " " for line in lines)
        return [(line[:start].strip(), line[start:]) for line in lines]

    return run


def test_info_shows_backends_and_threads(info, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = info()
    shown = [text.split() for name, text in rows if name == "backend"]
    assert [words[0] for words in shown] == list(NAMES)
    assert [words[0] for words in shown if words[-1] == "chosen"] == [backends()[0]]
    why = "the cores that this process may run on"
    assert ("threads", f"{default_threads()}, {why}") in rows
    monkeypatch.setenv("GPT2C_BACKEND", "numpy")
    monkeypatch.setenv("GPT2C_NUM_THREADS", "1")
    rows = info()
    assert ("backend", "numpy         <- chosen") in rows and (
        "threads",
        "1, from GPT2C_NUM_THREADS",
    ) in rows


@pytest.mark.skipif("base" not in backends(), reason="no kernels here")
@pytest.mark.parametrize("flags", [(), ("--verbose",)])
def test_info_shows_what_limits_the_speed(
    flags: tuple[str, ...], info, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {"fp32": 180e9, "bf16": 360e9, "fp16": 350e9, "int8": 720e9}
    monkeypatch.setattr(machine, "fma_peak", lambda name, threads, kind="fp32": peaks[kind])
    monkeypatch.setattr(cli_info, "caches", lambda: ["L1 32K", "L2 512K"])
    rows = info(*flags)
    facts = dict(rows)
    assert facts["caches"] == "L1 32K, L2 512K"
    assert facts["distance"].endswith(
        "171 ns from core to core: the cores share no cache at the moment"
    )
    assert facts["bandwidth"] == "35 GB/s when memory is read"
    own = [text for name, text in rows if name == "backend" and text.split()[0] in backends()]
    for text in own[:-1]:  # the last is numpy
        also = "".join(
            f", {one} {peaks[one] / 1e9:.0f} GFLOP/s"
            for one in fast_precisions(text.split()[0])[1:]
        )
        assert "  peak on " in text
        assert f": fp32 180 GFLOP/s{also}, int8 720 GOP/s" in text
    monkeypatch.setattr(cli_info, "free_bytes", lambda: 400_000_000)
    assert dict(info(*flags))["bandwidth"] == "not measured: that takes 268 MB of memory"

    def refuse() -> float:
        raise OSError("2 threads are wanted")

    monkeypatch.setattr(cli_info, "core_distance", refuse)
    assert dict(info(*flags))["distance"] == "unknown: 2 threads are wanted"


@pytest.mark.parametrize("others", [0.0, 1.25])
def test_info_says_that_other_programs_spoiled_the_peaks(
    others: float, info, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BusyCores, "others", lambda self: others)
    said = [text for name, text in info() if name == "busy"]
    cores = len(cli_info.AFFINITY)
    used = f"other programs used 1.2 of the {cores} cores that this process may use"
    assert said == ([f"{used}, so the peaks are too low"] if others else [])


def test_verbose_info_has_the_rows_of_a_bug_report(info) -> None:
    rows = info("--verbose")
    facts = dict(reversed(rows))  # the first of several rows with one name
    for package in ("numpy", "cffi", "tiktoken", "rustbpe", "safetensors", "tqdm"):
        assert facts[package] == importlib.metadata.version(package)
    extras = importlib.metadata.requires("gpt2c") or []
    named = {re.split(r"[>=<; ]", extra)[0].replace("-", "_").lower() for extra in extras}
    assert named and named <= {name.replace("-", "_").lower() for name in cli_info.PACKAGES}
    for name in cli_info.PACKAGES:
        assert re.fullmatch(r"not installed|\d\S*", facts[name])
    assert facts["Python"].startswith(platform.python_version())
    assert (
        facts["gpt2c"]
        == f"{importlib.metadata.version('gpt2c')} in {Path(backend.__file__).parents[1]}"
    )
    assert facts["kernel"].startswith(platform.system())
    assert facts["executable"] == sys.executable
    assert facts["threads"] == f"{default_threads()}, the cores that this process may run on"
    wanted = {*facts["CPU has"].split(), *facts["CPU lacks"].split()} - {"none", "of", "these"}
    assert wanted == {feature for needs in REQUIRES.values() for feature in needs}
    for name in ("installed", "libc", "output", "caches", "cores", "load", "memory"):
        assert facts[name], name
    for name in ("limit of address space", "limit of data", "huge pages", "NumPy's BLAS"):
        assert facts[name], name
    kernels = [text for name, text in rows if name == "file" and "_kernels_" in text]
    assert len(kernels) == len(list(Path(backend.__file__).parents[1].glob("_kernels_*")))
    assert all(re.search(r"[\d,]{6,} bytes  sha256 [0-9a-f]{12}  \S", text) for text in kernels)


def test_info_shows_the_limits_of_this_process(info, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_info, "AFFINITY", frozenset(range(4)))
    monkeypatch.setattr(cli_info, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(cli_info, "usable_cores", lambda: 2)
    monkeypatch.setattr(backend, "usable_cores", lambda: 2)
    monkeypatch.setattr(cli_info, "memory_limit", lambda: 300_000_000)
    monkeypatch.setattr(cli_info, "free_bytes", lambda: 120_000_000)
    monkeypatch.setattr(cli_info, "CORES", 8)
    for flags in ((), ("--verbose",)):
        facts = dict(info(*flags))
        assert facts["cores"] == "8, of which 4 for this process, a CPU quota of 1.5"
        assert facts["threads"] == "2, as the CPU quota allows"
        said = ", of which 120 MB free for this process, a cgroup limit of 300 MB"
        assert facts["memory"].endswith(said)


@pytest.mark.skipif("base" not in backends(), reason="no kernels here")
def test_info_shows_whether_threads_start(info, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = dict(info("--verbose"))
    assert facts["threads"] == "3, from OMP_NUM_THREADS"
    assert facts["they start"] == "yes"


def test_info_hides_secrets_of_the_environment(info, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {
        "GPT2C_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HF_HOME": "/a b",
        "HF_HUB_OFFLINE": "",
        "TIKTOKEN_CACHE_DIR": "/nowhere",
    }
    for name, value in shown.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_KEY", "UNRELATED_VARIABLE"):
        monkeypatch.setenv(name, "hf_s3cret")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hf_s3cret@hf_s3cret@host:1/x@y")
    monkeypatch.setenv("https_proxy", "me:hf_s3cret@host:1")
    monkeypatch.setenv("HTTP_PROXY", "http://me:hf_s3cret@host:1")
    rows = info("--verbose")
    facts = dict(rows)
    assert "s3cret" not in str(rows) and "UNRELATED_VARIABLE" not in facts
    assert {name: facts[name] for name in shown} == {k: repr(v) for k, v in shown.items()}
    assert facts["HF_TOKEN"] == facts["HUGGING_FACE_HUB_TOKEN"] == facts["HF_API_KEY"] == "set"
    assert facts["HF_ENDPOINT"] == "'http://***@host:1/x@y'"
    assert facts["https_proxy"] == facts["HTTP_PROXY"] == "'host:1'"
    assert facts["tiktoken's cache"] == "/nowhere lacks GPT-2's vocabulary"
    monkeypatch.delenv("HF_TOKEN")
    assert ("HF_TOKEN", "unset") in info("--verbose")


def test_info_shows_the_cache_of_tiktoken(
    info, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in gpt2_vocabulary._FILES:
        assert dict(info("--verbose"))["tiktoken's cache"].endswith("lacks GPT-2's vocabulary")
        (tmp_path / name).touch()
    facts = dict(info("--verbose"))
    assert facts["tiktoken's cache"] == f"{tmp_path} has GPT-2's vocabulary"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert "is empty" in dict(info("--verbose"))["tiktoken's cache"]


def test_info_works_without_proc_sys_and_etc(info, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other systems lack them: the rows say so, and nothing fails."""

    def gone() -> dict[str, str]:
        raise FileNotFoundError(2, "No such file or directory")

    elsewhere = Path("/nowhere")  # in place of /proc and /sys
    original = Path.read_text
    names = [name for name, _ in info("--verbose")]
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **how: original(
            elsewhere if path.is_relative_to("/proc") or path.is_relative_to("/sys") else path,
            **how,
        ),
    )
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    monkeypatch.setattr(platform, "freedesktop_os_release", gone)
    for name in ("sched_getaffinity", "getloadavg", "confstr"):
        monkeypatch.delattr(os, name, raising=False)
    facts = dict(info("--verbose"))
    assert list(facts) == list(dict.fromkeys(name for name in names if name != "file"))
    assert facts["cores"].endswith("no CPU quota")
    assert facts["memory"].endswith("no cgroup limit")
    for name in ("caches", "huge pages", "libc"):
        assert facts[name] == "unknown"
    assert facts["distance"] and facts["bandwidth"]
    assert facts["load"].startswith("unknown")


def test_info_shows_errors_as_rows(info, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user runs info because something is broken: it shows every fact all the same."""
    monkeypatch.setenv("GPT2C_NUM_THREADS", "many")
    facts = dict(info("--verbose"))
    assert re.match(r"none: GPT2C_NUM_THREADS must be .*, got 'many'$", facts["threads"])
    assert facts["backend"].startswith("none chosen: GPT2C_NUM_THREADS must be")
    monkeypatch.delenv("GPT2C_NUM_THREADS")
    for name in NAMES:
        monkeypatch.setitem(sys.modules, f"gpt2c._kernels_{name}", None)  # their import fails
    why_missing.cache_clear()
    try:
        rows = info("--verbose")
    finally:
        monkeypatch.undo()
        why_missing.cache_clear()
    assert [name for name, _ in rows[-2:]] == ["tiktoken's cache", "MPI"]
    facts = dict(rows)
    assert facts["backend"].startswith("none chosen: no kernels here")
    for name in ("CPU has", "they start", "distance", "bandwidth"):
        assert facts[name] == "unknown: no kernels to ask"


def test_info_shows_whether_ranks_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    lacking = "mpi4py is not installed; several ranks need it: pip install mpi4py, and an MPI"
    if importlib.util.find_spec("mpi4py") is None:
        assert cli_info._mpi() == lacking
    else:
        own = f"mpi4py {importlib.metadata.version('mpi4py')}"
        assert re.match(rf"{own}( with .+, for several|, and no MPI that it can)", cli_info._mpi())
    monkeypatch.setattr(cli_info, "version", lambda package: "not installed")
    assert cli_info._mpi() == lacking
    monkeypatch.setattr(cli_info, "version", lambda package: "4.1")
    monkeypatch.setattr(cli_info, "LOADS_MPI", "raise RuntimeError('no libmpi')")
    no = "mpi4py 4.1, and no MPI that it can load"
    assert cli_info._mpi() == f"{no} (RuntimeError: no libmpi)"
    monkeypatch.setattr(cli_info, "LOADS_MPI", "import os; os.abort()")
    assert cli_info._mpi() == f"{no} (it ends with code -6)"


def test_info_shows_an_mpi_that_does_not_connect(info, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone() -> Any:
        raise ValueError("2 processes were started, and MPI sees 1")

    monkeypatch.setattr(cli_info, "join", alone)
    assert info()[-1] == ("MPI", "none: 2 processes were started, and MPI sees 1")


def test_cores_are_written_as_ranges() -> None:
    assert cli_info._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_info_imports_no_package_for_its_version() -> None:
    """Torch takes seconds and starts threads, and other packages do too."""
    done = run_process(program("programs.fresh", "imports", "info", "--verbose"))
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "gpt2c.cli.info" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "huggingface_hub", "gguf"}


def test_python_m_gpt2c() -> None:
    command = [sys.executable, "-W", "error", "-m", "gpt2c"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    version = importlib.metadata.version("gpt2c")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gpt2c {version}\n", "")
    done = subprocess.run([*command, "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: gpt2c ")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "by an unknown tool"),
        ({"INSTALLER": "pip\n", "WHEEL": "Tag: cp311-abi3-any\n"}, "by pip, tag cp311-abi3-any"),
        (
            {
                "INSTALLER": "uv",
                "direct_url.json": json.dumps(
                    {"url": "file://u:p@host/x", "dir_info": {"editable": True}}
                ),
            },
            "by uv, editable, from file://***@host/x",
        ),
        ({"direct_url.json": "{"}, "by an unknown tool"),
        ({"direct_url.json": "[]"}, "by an unknown tool"),
    ],
)
def test_info_shows_how_gpt2c_was_installed(
    files, said: str, info, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distribution(importlib.metadata.PathDistribution):
        def read_text(self, name: str) -> str | None:  # type: ignore[override]
            return files.get(name)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution(Path()))
    assert cli_info._installed() == said
