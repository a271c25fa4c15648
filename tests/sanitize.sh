#!/bin/sh
# Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of this tree and run the tests of
# kernels and decoder, and their fuzz; then the same without vectors.
# Usage: sh tests/sanitize.sh PYTHON
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/csrc" "$root/gpt2c" "$root/tests" "$root/build.py" "$root/pyproject.toml" "$copy"
rm -f "$copy"/gpt2c/*.so
cd "$copy"
# The code of these sets is that of a wider one, if this CPU runs it.
covered=
! grep -qs avx512_bf16 /proc/cpuinfo || covered=avx512vnni
! grep -qs avx512_fp16 /proc/cpuinfo || covered="$covered avx512bf16"
"$1" -c 'import build, sys; from pathlib import Path
for name in sys.argv[1:]:
    del build.ISAS["x86_64"][name]
build.build(Path("gpt2c"), sanitize=True)' $covered
# Its threads under ThreadSanitizer, without Python.
${CC:-cc} -std=gnu11 -O1 -g -fsanitize=thread -pthread -Icsrc tests/threads.c csrc/team.c -o threads
./threads
# Left out: comparing bits of many texts. Tests beside it read texts in pieces, and make steps of 3 and 66 texts.
# The interpreter itself is not instrumented: the runtime must come first, and Python's own leaks are not ours.
runtime=$(${CC:-cc} -print-file-name=libasan.so)
case $runtime in /*) ;; *) echo "${CC:-cc} has no libasan.so: install gcc's sanitizers" >&2; exit 1 ;; esac
LD_PRELOAD="$runtime $(${CC:-cc} -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH="$copy" \
    "$1" -m pytest -q -n 2 --dist worksteal -p no:cacheprovider tests/kernels/test_kernels.py tests/kernels/test_fp16.py tests/model/test_reader.py tests/kernels/test_kernel_fuzz.py -k "not numpy and not among_others"
# A CPU without vectors that simd.h knows: one lane.
if [ "$(uname -m)" = x86_64 ]; then
    rm -f gpt2c/*.so
    "$1" -c 'import build; from pathlib import Path
build.ISAS = {"x86_64": {"base": ["-U__SSE2__"]}}
build.build(Path("gpt2c"), werror=True)'
    PYTHONPATH="$copy" "$1" -m pytest -q -n 2 --dist worksteal -p no:cacheprovider tests/kernels/test_kernels.py tests/kernels/test_fp16.py tests/model/test_reader.py -k "not numpy"
    PYTHONPATH="$copy" "$1" -m pytest -q -n 2 --dist worksteal -p no:cacheprovider tests/kernels/test_kernel_fuzz.py
fi
