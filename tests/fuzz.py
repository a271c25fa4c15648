"""Mutation fuzzing of every reader of hostile.py: `make fuzz`; for seconds, test_hostile.

    python -W error tests/fuzz.py --seconds 600            every reader in turn, on all cores
    python -W error tests/fuzz.py --again DIR/reader-3     read one saved input again

A round is a process with one reader, one seed and a number of inputs. If it crashes, hangs or
takes too much memory, that is a finding, like any exception except ValueError and OSError; the next
round goes on. A finding's directory holds the files that were read, and finding.txt.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers.hostile import READERS, SECONDS, HangError, attempt, limits, spoiled
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROUND = 1000  # inputs


def again(directory: Path) -> str:
    """Read one input as a round does; raise what the reader raises."""
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # C code delays a signal
    try:
        with limits():
            return attempt(READERS[directory.name.split("-")[0]], directory)
    finally:
        faulthandler.cancel_dump_traceback_later()


def play_all(readers: list[str], number: int, inputs: int, out: Path) -> None:
    """Run a round of each reader in a child, which need not import anything; print its end."""
    for reader in readers:
        child = os.fork()
        if child == 0:
            try:
                play(reader, number, inputs, out)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(json.dumps({"round": reader, "ended": code}), flush=True)


def play(reader: str, number: int, inputs: int, out: Path) -> None:
    """Run a round in this process: print its counts, and save what it found."""
    work = Path(tempfile.mkdtemp(prefix=f"{reader}-", dir=out))
    good, bad = work / "good", work / f"{reader}-{number}"
    good.mkdir()
    READERS[reader].make(good)
    files = READERS[reader].spoilable(good)
    counts: collections.Counter[str] = collections.Counter()
    known: set[str] = set()

    def one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(files))
        content = data.draw(spoiled(name, (good / name).read_bytes()))
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        (bad / name).write_bytes(content)
        counts["inputs"] += 1
        try:
            counts[again(bad)] += 1
        except Exception as error:
            where = [frame.name for frame in traceback.extract_tb(error.__traceback__)][-3:]
            signature = f"{type(error).__name__} in {' > '.join(where)}: {str(error)[:50]!r}"
            if signature not in known:
                if not isinstance(error, HangError):  # hypothesis looks for a smaller input
                    smaller.append(signature)
                    if signature == smaller[0]:
                        raise
                _save(bad, out, signature, traceback.format_exc())
                known.add(signature)

    attempts = 0
    while counts["inputs"] < inputs:
        smaller: list[str] = []
        run = settings(
            max_examples=inputs - counts["inputs"],
            phases=[Phase.generate, Phase.shrink],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )(seed(number + attempts)(given(st.data())(one)))
        try:
            run()
        except Exception:
            if not smaller:  # the fuzzer failed, and not the reader
                raise
            _save(bad, out, smaller[0], traceback.format_exc())
            known.add(smaller[0])
        attempts += 1
    shutil.rmtree(work)
    print(json.dumps({"round": reader, **counts, "findings": sorted(known)}), flush=True)


def _save(bad: Path, out: Path, signature: str, text: str) -> None:
    kept = Path(tempfile.mkdtemp(prefix=f"{bad.name}-", dir=out))
    shutil.copytree(bad, kept, dirs_exist_ok=True)
    (kept / "finding.txt").write_text(f"{signature}\n\n{text}", encoding="utf-8")


def start_rounds(
    readers: list[str], number: int, inputs: int, out: Path
) -> Iterator[tuple[str, collections.Counter[str], list[str]]]:
    """Run a round of each reader, in processes; yield the reader, its counts and its findings."""
    rounds = [str(number), str(inputs), str(out), *readers]
    command = [sys.executable, "-X", "faulthandler", "-W", "error", __file__, "--rounds", *rounds]
    threads = {"GPT2C_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, **threads}
    )
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"round":')]
    assert [end["round"] for end in ends] == readers, done.stderr
    for end in ends:
        reader = end.pop("round")
        if "ended" not in end:
            findings = end.pop("findings")
            yield reader, collections.Counter(end), findings
            continue
        signature = f"the process ended with {end['ended']}"
        for bad in out.glob(f"{reader}-*/{reader}-{number}"):
            _save(bad, out, signature, done.stderr)
            shutil.rmtree(bad.parent)
        yield reader, collections.Counter(inputs=1), [f"{signature}: {done.stderr[-2000:]}"]


def fuzz(readers: list[str], seconds: float, number: int, out: Path) -> int:
    """Run rounds of all readers in turn until the time is over; print a line for each."""
    end = time.monotonic() + seconds
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    findings: set[tuple[str, str]] = set()

    def line(task: tuple[int, str]) -> None:
        if time.monotonic() >= end:
            return
        ((_, counts, found),) = start_rounds([task[1]], number + task[0], ROUND, out)
        totals[task[1]].update({key: counts[key] for key in ("inputs", "read", "refused")})
        findings.update((task[1], signature.splitlines()[0]) for signature in found)
        total = totals[task[1]]
        print(
            f"{task[1]:<24}{total['inputs']:>9,} inputs{total['read']:>9,} read"
            f"{total['refused']:>9,} refused{len(findings):>4} findings in all",
            flush=True,
        )

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tasks = enumerate(itertools.cycle(readers))
    with ThreadPoolExecutor(cores) as pool:
        while time.monotonic() < end:
            list(pool.map(line, itertools.islice(tasks, len(readers))))
    inputs = sum(total["inputs"] for total in totals.values())
    print(f"{inputs:,} inputs, {len(findings)} findings, seed {number}; inputs of findings: {out}")
    for reader, signature in sorted(findings):
        print(f"  {reader}: {signature}")
    return 1 if findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Read spoiled files; report what comes out.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--reader", action="append", choices=READERS, help="default: all")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--again", type=Path, metavar="DIR", help="read a saved input again")
    parser.add_argument("--rounds", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.again:
        print(again(options.again))
        return 0
    if options.rounds:
        number, inputs, out, *readers = options.rounds
        play_all(readers, int(number), int(inputs), Path(out))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, {options.seconds:g} seconds", flush=True)
    return fuzz(options.reader or list(READERS), options.seconds, options.seed, options.out)


if __name__ == "__main__":
    sys.exit(main())
