"""build.py: its compiler flags, its results, and one sentence for each failure."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gpt2c

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(gpt2c.__file__).parent
EXTENSIONS = sorted(PACKAGE.glob("_kernels_*"))
Capture = pytest.CaptureFixture[str]
UNSAFE = ("-march=", "-mtune=", "-mcpu=", "-ffast-math", "-Ofast", "-funsafe-math", "-ffinite-math")

pytestmark = pytest.mark.skipif(
    not (ROOT / "build.py").exists(), reason="no build.py: not a source tree"
)


@pytest.fixture
def build() -> ModuleType:
    """Return build.py as a module, without running it."""
    spec = importlib.util.spec_from_file_location("gpt2c_build", ROOT / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the files that build.py reads, so that no file here is overwritten."""
    shutil.copy(ROOT / "build.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "gpt2c").mkdir()
    return tmp_path


def header_functions() -> list[str]:
    """Return the functions that gpt2c.h declares."""
    header = (ROOT / "csrc" / "gpt2c.h").read_text()
    return sorted(re.findall(r"^(?:void|int|int64_t|double) (\w+)\(", header, re.MULTILINE))


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "CC")}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment | variables
    )


# ---- failures ------------------------------------------------------------------------------------


def test_missing_compiler_is_one_sentence(copy: Path) -> None:
    done = run([sys.executable, "build.py"], copy, CC="/nonexistent/cc -m64")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpt2c needs a C compiler and found no '/nonexistent/cc': ")
    assert done.stderr.count("\n") == 1
    assert not list((copy / "gpt2c").iterdir())


def test_python_m_build_runs_the_package_build() -> None:
    """In this folder `python -m build` finds build.py before the package of that name."""
    if not importlib.util.find_spec("pyproject_hooks"):  # only that package brings it
        pytest.skip("the package build is not installed")
    done = run([sys.executable, "-m", "build", "--version"], ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"build \d", done.stdout)


def test_python_m_build_names_the_missing_package(copy: Path) -> None:
    done = run([sys.executable, "-S", "-m", "build"], copy)  # without site-packages
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "No module named build: pip install build\n"


@pytest.mark.parametrize("platform", ["win32", "win-amd64", "win-arm64"])
def test_windows_is_refused(
    build: ModuleType, tmp_path: Path, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", platform)
    with pytest.raises(SystemExit, match="does not run on Windows itself: install it in WSL"):
        build.build(tmp_path)


def test_free_threaded_python_is_refused(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED")
    with pytest.raises(SystemExit, match="stable ABI, which free-threaded Python does not have"):
        build.build(tmp_path)


# ---- compiler flags ------------------------------------------------------------------------------


def test_no_flag_changes_arithmetic_or_ties_to_this_machine(build: ModuleType) -> None:
    flags = [*build.CFLAGS, *build.WARNINGS, *build.SANITIZE]
    flags += [flag for isas in build.ISAS.values() for isa in isas.values() for flag in isa]
    assert "-ffp-contract=off" in build.CFLAGS
    assert not [flag for flag in flags if flag.startswith(UNSAFE)]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_build_runs_the_expected_commands(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled: the test records the commands, and writes empty outputs."""
    commands: list[list[str]] = []

    def note(command: list[str]) -> bool:
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()
        return True

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "run", note)
    built = build.build(tmp_path, werror=True)
    assert [path.parent for path in built] == [tmp_path] * len(built)
    assert all(path.name.endswith(".abi3.so") for path in built)
    assert not [flag for command in commands for flag in command if flag.startswith(UNSAFE)]
    sources = sorted((ROOT / "csrc").glob("*.c"))
    compiles = [command for command in commands if "-c" in command]
    assert len(compiles) == len(built) * (len(sources) + 1)
    for command in compiles:
        generated = Path(command[command.index("-c") + 1]).parent != ROOT / "csrc"
        assert ("-DPy_LIMITED_API=0x030B0000" in command) is generated
        assert ("-Werror" in command) is not generated
        assert ("-fvisibility=hidden" in command) is not generated
        if generated:  # runs before the CPU's features are known
            assert not [flag for flag in command if flag.startswith(("-mavx", "-mfma"))]


@pytest.mark.parametrize(
    ("says", "machine", "target"),
    [
        ("linux-x86_64", "x86_64", "linux-x86_64"),
        ("macosx-11.0-arm64", "arm64", "macosx-11.0-arm64"),
        # python.org's Python for macOS holds both halves, its compiler makes one; pip takes arm64
        # from macOS 11 on.
        ("macosx-10.13-universal2", "arm64", "macosx-11.0-arm64"),
        ("macosx-10.13-universal2", "x86_64", "macosx-10.13-x86_64"),
    ],
)
def test_target_follows_platform_and_machine(
    build: ModuleType, says: str, machine: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("_PYTHON_HOST_PLATFORM", raising=False)
    monkeypatch.setattr(build.sysconfig, "get_platform", lambda: says)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    assert build.target() == target


def test_build_without_instruction_sets_makes_base_alone(
    build: ModuleType, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels need no runtime library except the system's own, so no OpenMP."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    pytest.importorskip("cffi")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "accepts", lambda cc, flags: False)
    monkeypatch.setattr(build, "CFLAGS", ["-std=gnu11", "-fPIC"])  # quicker
    (built,) = build.build(tmp_path, werror=True)
    said = capsys.readouterr().err
    assert built.name == "_kernels_base.abi3.so"
    assert "does not know -mavx2 -mfma -mf16c: no avx2 kernels" in said
    needed = subprocess.run(["objdump", "-p", str(built)], capture_output=True, text=True).stdout
    libraries = set(re.findall(r"NEEDED +(\S+)", needed))
    assert libraries <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}, libraries


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc"), reason="no gcc-aarch64-linux-gnu")
def test_arm_kernels_compile_without_a_warning(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cffi")
    monkeypatch.setenv("CC", "aarch64-linux-gnu-gcc")
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
    (built,) = build.build(tmp_path, werror=True)
    assert built.name == "_kernels_base.abi3.so"
    assert built.read_bytes()[18:20] == (183).to_bytes(2, "little")  # ELF's number of aarch64


# ---- only what changed ---------------------------------------------------------------------------


class Compiler:
    """A build in a copy of the tree, with a compiler that records its commands.

    Its "object" is the text of the source and of the flags; its "library" is its objects in a row.
    """

    def __init__(self, build: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.build, self.root = build, root
        self.compiled: list[str] = []
        self.silent = True
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(build, "ROOT", root)
        monkeypatch.setattr(build, "CACHE", root / ".build")
        monkeypatch.setattr(build, "accepts", lambda cc, flags: True)
        monkeypatch.setattr(build, "target", lambda: "linux-x86_64")
        monkeypatch.setattr(build, "run", self.run)

    def run(self, command: list[str]) -> bool:
        output = Path(command[command.index("-o") + 1])
        if "-c" in command:
            self.compiled.append(output.name)
            source = Path(command[command.index("-c") + 1])
            flags = [part for part in command if not str(part).startswith("/")]
            output.write_text(f"{source.read_text()} {flags[:-2]}")
        else:
            output.write_text("".join(Path(p).read_text() for p in command if p.endswith(".o")))
        return self.silent

    def __call__(self, *arguments: object, **keywords: object) -> list[str]:
        """Build; return the names of the compiled objects."""
        self.compiled.clear()
        keywords = {"incremental": True, "wanted": ["base", "avx2"], **keywords}
        self.build.build(self.root / "gpt2c", *arguments, **keywords)
        return sorted(self.compiled)

    def library(self, name: str) -> str:
        return (self.root / "gpt2c" / f"_kernels_{name}.abi3.so").read_text()


@pytest.fixture
def compiler(build: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    pytest.importorskip("cffi")
    return Compiler(build, copy, monkeypatch)


def test_second_build_compiles_changed_files_alone(compiler: Compiler, copy: Path) -> None:
    sources = {path.stem for path in (copy / "csrc").glob("*.c")}
    everything = sorted(
        f"{isa}-{stem}.o" for isa in ("avx2", "base") for stem in {f"_kernels_{isa}", *sources}
    )
    assert compiler() == everything
    first = compiler.library("avx2")
    assert compiler() == []
    assert compiler.library("avx2") == first

    gelu = copy / "csrc" / "gelu.c"
    text = gelu.read_text()
    gelu.write_text(f"{text}// new\n")
    assert compiler() == ["avx2-gelu.o", "base-gelu.o"]
    assert "// new" in compiler.library("avx2") and "// new" in compiler.library("base")
    os.utime(gelu)  # a file's time does not count
    assert compiler() == []
    gelu.write_text(text)
    assert compiler() == []  # the content is one that was built before
    assert compiler.library("avx2") == first


def test_changed_header_recompiles_its_includers(compiler: Compiler, copy: Path) -> None:
    compiler(wanted=["avx2"])
    header = copy / "csrc" / "vmath.h"
    header.write_text(f"{header.read_text()}// new\n")
    users = [p for p in (copy / "csrc").glob("*.c") if '#include "vmath.h"' in p.read_text()]
    assert 0 < len(users) < len(list((copy / "csrc").glob("*.c")))
    assert compiler(wanted=["avx2"]) == sorted(f"avx2-{path.stem}.o" for path in users)
    header = copy / "csrc" / "gpt2c.h"  # which all include through internal.h, and cffi's code
    header.write_text(f"{header.read_text()}// new\n")
    assert len(compiler(wanted=["avx2"])) == len(list((copy / "csrc").glob("*.c"))) + 1


def test_cache_key_has_flags_and_compiler_version(
    compiler: Compiler, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = compiler()
    assert compiler(werror=True) == []  # a kept object had no warning
    monkeypatch.setattr(build, "CFLAGS", [*build.CFLAGS, "-O2"])
    assert compiler() == everything
    version = subprocess.CompletedProcess([], 0, stdout="cc 99", stderr="")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: version)
    assert compiler() == everything


def test_object_with_a_warning_is_not_kept(compiler: Compiler) -> None:
    compiler.silent = False
    everything = compiler()
    assert compiler() == everything
    compiler.silent = True
    assert compiler() == everything
    assert compiler() == []


def test_source_that_is_edited_while_it_compiles_is_not_kept(
    compiler: Compiler, copy: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the old content's name would have the new content's object."""
    gelu = copy / "csrc" / "gelu.c"
    text = gelu.read_text()

    def save(command: list[str]) -> bool:
        if str(gelu) in command:
            gelu.write_text(f"{text}// new\n")
        return compiler.run(command)

    monkeypatch.setattr(build, "run", save)
    compiler(wanted=["base"])
    monkeypatch.setattr(build, "run", compiler.run)
    gelu.write_text(text)
    assert compiler(wanted=["base"]) == ["base-gelu.o"]
    assert "// new" not in compiler.library("base")


def test_wheels_and_sanitized_builds_keep_nothing(compiler: Compiler, copy: Path) -> None:
    everything = compiler()
    shutil.rmtree(copy / ".build")
    assert compiler(incremental=False) == everything
    assert compiler(sanitize=True, incremental=False) == everything
    assert not (copy / ".build").exists()


def test_build_works_without_a_writable_cache(compiler: Compiler, copy: Path) -> None:
    (copy / ".build").touch()
    everything = compiler()
    assert compiler() == everything


def test_cache_is_bounded(
    compiler: Compiler, copy: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = compiler()
    monkeypatch.setattr(build, "KEPT", len(everything))
    for path in (copy / ".build").iterdir():
        os.utime(path, (0, 0))
    gelu = copy / "csrc" / "gelu.c"
    gelu.write_text(f"{gelu.read_text()}// new\n")
    compiler()
    assert len(list((copy / ".build").iterdir())) == len(everything)
    assert compiler() == []  # only files that no build used were removed


def test_build_may_be_of_one_instruction_set(copy: Path) -> None:
    """Chosen by the command line; the file of another set stays."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    pytest.importorskip("cffi")
    for path in (copy / "csrc").glob("*.c"):  # quicker: cffi's part alone, which needs no linker
        path.unlink()
    (copy / "gpt2c" / "_kernels_other.abi3.so").write_text("as it was")
    done = run([sys.executable, "build.py", "--isa", "base,base", "--isa", "base"], copy)
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()[-2:]
    assert said[0] == "gpt2c/_kernels_base.abi3.so"
    assert said[1] == "gpt2c/_kernels_other.abi3.so stays as it was"
    assert (copy / "gpt2c" / "_kernels_other.abi3.so").read_text() == "as it was"
    assert len(list((copy / ".build").iterdir())) == 1
    done = run([sys.executable, "build.py", "--isa", "avx1024"], copy)
    assert done.returncode == 1
    assert re.fullmatch(r"gpt2c: no instruction set 'avx1024' for \w+: base.*\n", done.stderr)


def test_build_reports_an_unknown_instruction_set(
    build: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of all sets leaves it out; a build that names it ends."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "accepts", lambda cc, flags: False)
    monkeypatch.setattr(build, "target", lambda: "linux-x86_64")
    with pytest.raises(SystemExit, match=r"^gpt2c: cc does not know -mavx2 -mfma -mf16c: no avx2"):
        build.build(copy / "gpt2c", wanted=["avx2"])


# ---- results -------------------------------------------------------------------------------------


def test_cffi_reads_the_whole_header(build: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("cffi")
    assert len(header_functions()) > 15
    build.emit("probe", tmp_path / "probe.c")
    generated = (tmp_path / "probe.c").read_text()
    assert sorted(set(re.findall(r"_cffi_d_(\w+)\(", generated))) == header_functions()


@pytest.mark.skipif(not EXTENSIONS, reason="no kernels are built")
def test_extensions_are_of_the_stable_abi_and_show_every_function() -> None:
    assert "_kernels_base.abi3.so" in [path.name for path in EXTENSIONS]
    assert all(path.name.endswith(".abi3.so") for path in EXTENSIONS)
    base = importlib.import_module("gpt2c._kernels_base")  # needs no special CPU feature
    functions = [name for name in dir(base.lib) if callable(getattr(base.lib, name))]
    assert sorted(functions) == header_functions()
    assert [base.lib.FP32, base.lib.FP16, base.lib.INT8] == [0, 1, 2]


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: path.name)
def test_extensions_export_their_init_alone(path: Path) -> None:
    """Otherwise the loader could bind one instruction set's calls to another's kernels."""
    done = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert [name for name in names if name not in ("_init", "_fini")] == [
        f"PyInit_{path.name.partition('.')[0]}"
    ]
