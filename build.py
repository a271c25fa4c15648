"""Compile csrc/ into one cffi extension per instruction set: gpt2c/_kernels_<name>.abi3.so.

    python build.py              rebuild in place, after editing C   (--werror: warnings are errors)
    python build.py --isa avx2   the same for one instruction set; the others stay as they are
    python build.py --sanitize   the same with AddressSanitizer and UndefinedBehaviorSanitizer
    pip install .                a wheel, through the hatchling hook at the bottom
    make wheel                   the same, checked

This is the only build logic. cffi generates the Python side of each extension from csrc/gpt2c.h,
and the C compiler checks it against the same header. The result uses CPython's stable ABI: one
wheel serves every CPython >= 3.11.

A build in place compiles only what changed: .build/ keeps each object under the hash of all that it
is made from. A wheel and a sanitized build are always compiled from nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".build"
KEPT = 1000  # objects in it: about twenty builds, 25 MB

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
# machine -> extension -> flags. gpt2c/kernels/backend.py asks the CPU for exactly these features
# before it imports one.
ISAS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "base": [],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
        "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        "avx512fp16": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mavx512fp16"],
        "amx": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    },
    "aarch64": {"base": []},  # NEON is the baseline
}
# FMA only where it is written, and no -ffast-math: NaN stays NaN, sums keep their order.
CFLAGS = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
SANITIZE = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover",
]


def compiler() -> list[str]:
    """Return the C compiler's command; end with one sentence if there is none."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        sys.exit(
            f"gpt2c needs a C compiler and found no {command[0]!r}: install one"
            " (Debian and Ubuntu: apt-get install gcc libc6-dev) or name it in the variable CC"
        )
    return command


def accepts(cc: list[str], flags: list[str]) -> bool:
    """Return whether the compiler compiles and links an empty program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("int main(void) { return 0; }\n")
        command = [*cc, *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def run(command: list[str]) -> bool:
    """Run a compiler command, show its messages, and return whether there were none.

    If it fails, the build ends with one sentence.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        sys.exit(f"gpt2c: the C compiler failed: {shlex.join(command)}")
    return not done.stderr


def included(source: Path) -> list[Path]:
    """Return a C file and the files of csrc/ that it includes, directly or through another."""
    found = [source]
    for path in found:  # which grows as we go
        for name in re.findall(r'^\s*#\s*include\s+"(.+?)"', path.read_text(), re.MULTILINE):
            header = ROOT / "csrc" / name
            if header not in found and header.is_file():
                found.append(header)
    return found


def content_hash(key: str, source: Path) -> str:
    """Hash all that an object is made from: `key`, the source, the headers that it includes."""
    content = hashlib.sha256(key.encode())
    for path in included(source):
        content.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def make_object(command: list[str], source: Path, output: Path, key: str | None) -> None:
    """Compile `source` into `output`, or copy what an earlier build made of the same things.

    Parameters
    ----------
    command : the compiler and its flags, without input and output
    key : what the object depends on beside the files; None compiles it afresh and keeps nothing
    """
    compile_it = [*command, "-c", str(source), "-o", str(output)]
    if key is None:
        run(compile_it)
        return
    content = content_hash(key, source)
    kept = CACHE / f"{content}.o"
    try:
        shutil.copyfile(kept, output)  # no question first: another build may remove it meanwhile
        os.utime(kept)
    except OSError:
        silent = run(compile_it)  # else it is not kept: the next build shows the warning again
        if silent and content == content_hash(key, source):  # nobody edited it meanwhile
            with contextlib.suppress(OSError):  # a cache that cannot be written is none
                CACHE.mkdir(exist_ok=True)
                part = CACHE / f"{output.parent.name}-{output.name}"
                shutil.copyfile(output, part)
                os.replace(part, kept)


def trim_cache() -> None:
    """Remove the objects that were not used for longest, and what a killed build left."""
    with contextlib.suppress(OSError):  # another build does the same
        kept = sorted(CACHE.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[KEPT:]:
            path.unlink()


# A kernel in csrc/gpt2c.h: its result, its name, its parameters before `Team *team`.
KERNEL = re.compile(r"^(void|double) (\w+)\(([^;]*),\s*Team \*team\);", re.MULTILINE)


def call_together(kernel: re.Match[str]) -> str:
    """Write the C function by which Python calls a kernel: it takes a pool in place of the team.

    All threads of the pool run the kernel, so the arguments are stored where all of them look.
    """
    result, name, parameters = kernel[1], kernel[2], " ".join(kernel[3].split())
    names = [parameter.split()[-1].lstrip("*") for parameter in parameters.split(",")]
    members = "".join(f"    {parameter.strip()};\n" for parameter in parameters.split(","))
    call = f"{name}({', '.join(f'a->{n}' for n in names)}, team)"
    if result == "void":
        fields, run, give = members, f"{call};", ""
    else:  # each thread computes the result; the caller's is returned
        fields = f"{members}    {result} result;\n"
        run = f"const {result} result = {call};\n    if (team->member == 0) a->result = result;"
        give = "    return a.result;\n"
    return (
        f"typedef struct {{\n{fields}}} {name}_arguments;\n"
        f"static void {name}_member(void *given, Team *team) {{\n"
        f"    {name}_arguments *a = given;\n    {run}\n}}\n"
        f"static {result} {name}_together({parameters}, Pool *pool) {{\n"
        f"    {name}_arguments a = {{{', '.join(names)}}};\n"
        f"    run_together(pool, {name}_member, &a);\n{give}}}\n"
        f"#define {name} {name}_together\n"
    )


def emit(name: str, path: Path) -> None:
    """Write the C source of module gpt2c._kernels_<name>, which cffi generates from gpt2c.h."""
    from cffi import FFI  # only here: `import build` by a curious tool needs nothing

    header = (ROOT / "csrc/gpt2c.h").read_text()
    callers = "\n".join(call_together(kernel) for kernel in KERNEL.finditer(header))
    declarations = KERNEL.sub(r"\1 \2(\3, Pool *pool);", header)
    ffi = FFI()
    ffi.cdef("\n".join(line for line in declarations.splitlines() if not line.startswith("#")))
    ffi.set_source(f"gpt2c._kernels_{name}", f'#include "gpt2c.h"\n#include "team.h"\n\n{callers}')
    ffi.emit_c_code(str(path))


def target() -> str:
    """Name the platform that is built for, as "linux-x86_64" or "macosx-11.0-arm64".

    It is this one, or what setuptools and cibuildwheel set to cross-compile.
    """
    name = os.environ.get("_PYTHON_HOST_PLATFORM") or sysconfig.get_platform()
    if name.endswith("-universal2"):  # python.org's for macOS: both halves, the compiler makes one
        arm = platform.machine() == "arm64"  # which began with macOS 11
        return "macosx-11.0-arm64" if arm else name.replace("universal2", "x86_64")
    return name


def build(
    out: Path,
    werror: bool = False,
    sanitize: bool = False,
    wanted: Sequence[str] = (),
    incremental: bool = False,
) -> list[Path]:
    """Compile the kernels into `out` and return the paths of the extensions.

    Parameters
    ----------
    werror : warnings in csrc/ are errors
    sanitize : with AddressSanitizer and UndefinedBehaviorSanitizer
    wanted : names of instruction sets; without any, all that this platform and compiler know
    incremental : take objects that an earlier build left in .build/, and leave new ones there
    """
    if target().startswith("win"):
        sys.exit("gpt2c does not run on Windows itself: install it in WSL, the Linux in Windows")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit(
            "gpt2c is built for CPython's stable ABI, which free-threaded Python does not have:"
            " take the ordinary Python of this version"
        )
    cc = compiler()
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        sys.exit(
            f"gpt2c needs Python's C headers, and {include} has no Python.h: install python3-dev"
        )
    machine = target().rpartition("-")[2]
    isas = ISAS.get({"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine), {"base": []})
    for name in wanted:
        if name not in isas:
            sys.exit(f"gpt2c: no instruction set {name!r} for {machine}: {', '.join(isas)}")
    flags = [*CFLAGS, "-pthread", *(SANITIZE if sanitize else [])]
    # Python's symbols are found in the process that loads the extension; only macOS must be told.
    link = ["-shared", "-pthread", *(SANITIZE if sanitize else [])]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    version = subprocess.run([*cc, "--version"], capture_output=True, text=True).stdout
    compiles: list[tuple[list[str], Path, Path, str | None]] = []
    links: list[list[str]] = []
    built: list[Path] = []
    # Beside the result: taking its name is then one step, which a user of the old file survives.
    with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as folder:
        for name, isa in isas.items():
            if wanted and name not in wanted:
                continue
            if isa and not accepts(cc, isa):  # of `base`, the compiler's own message says more
                refusal = f"{shlex.join(cc)} does not know {' '.join(isa)}: no {name} kernels"
                if wanted:
                    sys.exit(f"gpt2c: {refusal}")
                print(f"gpt2c: {refusal}", file=sys.stderr)
                continue
            generated = Path(folder, f"_kernels_{name}.c")
            emit(name, generated)
            objects = []
            for source in [generated, *sorted((ROOT / "csrc").glob("*.c"))]:
                objects.append(Path(folder, f"{name}-{source.stem}.o"))
                if source == generated:  # cffi's own code: the stable ABI, no isa flags, and its
                    # warnings are not ours
                    own = [*flags, "-w", f"-I{include}", "-DPy_LIMITED_API=0x030B0000"]
                else:
                    own = [*flags, *isa, *WARNINGS, "-fvisibility=hidden"]
                key = "\0".join([version, sys.version, *cc, *own])
                # Not in the key, for they change no byte: where the files are, and -Werror.
                # cffi's asserts name their file: without the folder's name, the same bytes come out
                # of every build.
                own += [f"-I{ROOT / 'csrc'}", f"-ffile-prefix-map={folder}=."]
                own += ["-Werror"] if werror and source != generated else []
                compiles.append(([*cc, *own], source, objects[-1], key if incremental else None))
            library = Path(folder, f"_kernels_{name}.abi3.so")
            links.append([*cc, *map(str, objects), *link, "-lm", "-o", str(library)])
            built.append(library)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda each: make_object(*each), compiles))
            list(pool.map(run, links))
        for library in built:
            os.replace(library, out / library.name)
    if incremental:
        trim_cache()
    return [out / library.name for library in built]


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # python build.py needs cffi alone
    pass
else:

    class KernelBuildHook(BuildHookInterface[Any]):
        """Adds the extensions to a wheel, or puts them into gpt2c/ for an editable install."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: D102
            if version == "editable":
                build(ROOT / "gpt2c", incremental=True)
            else:
                self.folder = tempfile.TemporaryDirectory()
                for library in build(Path(self.folder.name)):
                    build_data["force_include"][str(library)] = f"gpt2c/{library.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"cp311-abi3-{target().replace('-', '_').replace('.', '_')}"


def run_namesake() -> None:
    """Hand over to the package `build`: in this folder `python -m build` finds this file first."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    sys.modules.pop("build", None)
    try:
        runpy.run_module("build", run_name="__main__", alter_sys=True)
    except ImportError as error:
        sys.exit(f"{error}: pip install build")


if __name__ == "__main__":
    if __spec__ is not None:  # started as `python -m build`, not as `python build.py`
        run_namesake()
        sys.exit()
    parser = argparse.ArgumentParser(description="compile csrc/ into gpt2c/_kernels_*.abi3.so")
    parser.add_argument("--werror", action="store_true", help="warnings in csrc/ are errors")
    parser.add_argument(
        "--sanitize", action="store_true", help="build with AddressSanitizer and UBSan"
    )
    parser.add_argument(
        "--isa",
        action="extend",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME",
        help="build this instruction set alone (base, avx2, ...); more with commas",
    )
    options = parser.parse_args()
    paths = build(
        ROOT / "gpt2c", options.werror, options.sanitize, options.isa, not options.sanitize
    )
    for path in paths:
        print(path.relative_to(ROOT))
    for path in sorted(set((ROOT / "gpt2c").glob("_kernels_*.abi3.so")) - set(paths)):
        print(f"{path.relative_to(ROOT)} stays as it was")
