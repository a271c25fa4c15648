"""Sdist and wheel: their content, and older CPUs.

Interpreters are tried with the wheel that `make wheel` makes: see CONTRIBUTING.md.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import gpt2c
from gpt2c.kernels.backend import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(gpt2c.__file__).parent
SMOKE = Path(__file__).with_name("smoke.py")
BURN = SMOKE.parent / "programs" / "burn.py"
QEMU = shutil.which("qemu-x86_64")
TOP = {"build.py", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
TOP |= {"LICENSE", "README.zh-CN.md", ".clang-format", ".gitignore", "PKG-INFO"}
FOLDERS = ("csrc", "gpt2c", "tests", "benchmarks")


def python(*arguments: str, emulator: tuple[str, ...] = (), **variables: str) -> str:
    """Run this Python in a new process on these modules; return its output."""
    # OpenBLAS chooses its instructions for the real CPU, not for an emulated one.
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "gpt2c"))}
    plain |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | variables
    done = subprocess.run(
        [*emulator, sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=plain,
        timeout=600,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


# ---- sdist and wheel -----------------------------------------------------------------------------


def hatch(source: Path, target: str, out: Path, **variables: str) -> Path:
    """Build an sdist or a wheel of a source tree, with the installed builders."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)],
        cwd=source,
        env=os.environ | variables,
        capture_output=True,
        check=True,
    )
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "build.py").exists():
        pytest.skip("no build.py: not a source tree")
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    return hatch(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


def unpack(sdist: Path, where: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # new in 3.11.4
        archive.extractall(where)
    (source,) = where.iterdir()
    return source


def test_sdist_is_the_source_and_nothing_else(sdist: Path) -> None:
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *FOLDERS]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip("no git, or not a clone: nothing says what the source is")
    source = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    with tarfile.open(sdist) as archive:
        assert {name.partition("/")[2] for name in archive.getnames()} == source | TOP


def test_sdist_builds_the_same_sdist(sdist: Path, tmp_path: Path) -> None:
    again = hatch(unpack(sdist, tmp_path / "source"), "sdist", tmp_path / "again")
    assert (again.name, again.read_bytes()) == (sdist.name, sdist.read_bytes())


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.slow
def test_wheel_is_reproducible_and_complete(sdist: Path, tmp_path: Path) -> None:
    """Two folders give the same bytes, though one has a developer's leftovers.

    Of the C sources there is one, which any could be: `make wheel` compiles all.
    """
    quick = tmp_path / "cc"  # another test checks the compiled code
    quick.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    quick.chmod(0o755)
    wheels = []
    for name in ("clean", "used"):
        source = unpack(sdist, tmp_path / name)
        for path in (source / "csrc").glob("*.c"):
            if path.name != "gelu.c":
                path.unlink()
        if name == "used":
            for left in ("_kernels_old.abi3.so", ".build-x/y.c", "__pycache__/cli.cpython-311.pyc"):
                (source / "gpt2c" / left).parent.mkdir(exist_ok=True)
                (source / "gpt2c" / left).write_bytes(b"\x7fELF")
        wheels.append(hatch(source, "wheel", tmp_path / f"{name}-out", CC=str(quick)))
    first, second = wheels
    assert re.fullmatch(r"gpt2c-[\d.]+-cp311-abi3-\w+\.whl", first.name)
    assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())
    with zipfile.ZipFile(first) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith("gpt2c/_kernels_")}
        kernels = sorted(set(wheel.namelist()) - names)
        metadata = {name.rpartition("/")[2]: name for name in names if ".dist-info/" in name}
        tag = wheel.read(metadata["WHEEL"]).decode()
        needs = wheel.read(metadata["METADATA"]).decode()
        content = b"".join(wheel.read(name) for name in kernels)
    python_files = {str(path.relative_to(ROOT)) for path in (ROOT / "gpt2c").rglob("*.py")}
    python_files |= {"gpt2c/kernels/op_types.pyi"}
    recipes = {f"gpt2c/recipes/{path.name}" for path in (ROOT / "gpt2c/recipes").glob("*.toml")}
    assert recipes and names - set(metadata.values()) == python_files | recipes | {"gpt2c/py.typed"}
    wanted = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}
    assert metadata.keys() == wanted
    assert "Root-Is-Purelib: false" in tag and re.findall(r"Tag: (.*)", tag) == [first.stem[12:]]
    assert "Requires-Python: >=3.11" in needs
    built = {path.name for path in PACKAGE.glob("_kernels_*")}
    assert {name.removeprefix("gpt2c/") for name in kernels} == built
    assert str(tmp_path).encode() not in content and b"/.build-" not in content


# ---- CPUs ----------------------------------------------------------------------------------------


def emulated(test):  # type: ignore[no-untyped-def]
    """Skip where a CPU cannot be emulated."""
    for missing, reason in (
        (QEMU is None, "no qemu-x86_64: Debian and Ubuntu have qemu-user"),
        (platform.machine() != "x86_64", "emulates x86-64 on x86-64"),
        ("base" not in backends(), "no kernels are built"),
    ):
        test = pytest.mark.skipif(missing, reason=reason)(test)
    return test


# NumPy's wheels need SSE4.2, which Nehalem (2008) was the first to have.
CPUS = [("Nehalem", "base"), ("Haswell,-fma,-f16c", "base"), ("Haswell", "avx2")]


@emulated
@pytest.mark.parametrize(("cpu", "expected"), CPUS, ids=[cpu for cpu, _ in CPUS])
def test_older_cpu_gets_the_same_bits(cpu: str, expected: str, tmp_path: Path) -> None:
    """Code for a newer CPU would end the process there (see the next test)."""
    if expected not in backends():
        pytest.skip(f"{expected} does not run here, to be compared with")
    there, here = tmp_path / "there.npz", tmp_path / "here.npz"
    python(str(SMOKE), str(there), emulator=(str(QEMU), "-cpu", cpu))
    python(str(SMOKE), str(here), GPT2C_BACKEND=expected)
    with np.load(there) as one, np.load(here) as other:
        assert one["backend"] == other["backend"] == expected
        assert one.files == other.files and len(one.files) > 20
        assert not [name for name in one.files if not np.array_equal(one[name], other[name])]


@emulated
def test_emulator_refuses_what_the_cpu_lacks() -> None:
    if not (PACKAGE / "_kernels_avx2.abi3.so").exists():
        pytest.skip("no avx2 kernels are built")
    for name, right in (("base", 0), ("avx2", -signal.SIGILL)):
        command = [str(QEMU), "-cpu", "Nehalem", sys.executable, str(BURN), str(PACKAGE), name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == right, done.stderr
        assert (done.stdout == "True\n") is (right == 0)
