"""Kill ranks of mpiexec at random moments, and go on each time: `make kills`.

    python tests/ranks_kill.py --kills 50

A job is `mpiexec -n RANKS gpt2c train`, in processes of this Python's MPI. Runs keep their number
of ranks (2, 3, 4) or change it at each launch (2, 3, 4, 1). One rank is killed by SIGKILL after a
random time, at the start of the processes too; the job must end in seconds, and leave no process.
Then the same command with --resume goes on, to the losses of a run that nothing has killed: the
same bits with as many ranks, 1e-5 with others. Last, a rank is stopped by SIGSTOP, which
--mpi-timeout must find, and the launcher is killed. It prints how long the jobs took to end.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from helpers.command import environment
from helpers.mpi import MPIEXEC, OPEN_MPI, rank_processes

from gpt2c.files.atomic import TEMPORARY
from gpt2c.text.prepare import prepare
from gpt2c.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
SETTINGS = (
    f"--n-layer=3 --n-head=4 --n-embd=128 --block-size=64 --batch-size=4 --dropout=0.1"
    f" --gradient-accumulation-steps=3 --max-iters={STEPS} --warmup-iters=4 --learning-rate=1e-3"
    " --eval-interval=8 --eval-iters=4 --save-interval=3 --backend=avx2"
).split()
LONGEST = 60.0  # seconds from a kill to the end of all processes: a limit, not what is wanted
TIMEOUT = 6.0  # of --mpi-timeout, for the rank that hangs


class Job:
    """mpiexec and its ranks."""

    def __init__(self, ranks: int, data: Path, out: Path, *flags: str) -> None:
        self.ranks = ranks
        settings = ["--resume"] if (out / "run.json").exists() else SETTINGS
        train = [sys.executable, "-m", "gpt2c", "train", "--data", str(data), "--out", str(out)]
        self.log = out.with_suffix(".log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(MPIEXEC), "-n", str(ranks), *train, *settings, *flags],
                env=environment(GPT2C_NUM_THREADS="1", **OPEN_MPI),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def finish(self) -> None:
        """Wait for the end of a job that nobody kills."""
        if self.process.wait(600):
            sys.exit(f"a job of {self.ranks} ranks failed:\n{self.said()}")

    def processes(self) -> list[int]:
        """Return the ids of the ranks; wait until all have started. None if the job has ended."""
        while self.process.poll() is None:
            found = rank_processes(self.process.pid)
            if len(found) >= self.ranks:
                return found
            time.sleep(0.01)
        return []

    def end(self, victim: int, number: int) -> float:
        """Send a signal to a process; return the seconds until the job and all ranks have ended."""
        pids, began = [*rank_processes(self.process.pid), self.process.pid], time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(victim, number)
        while self.process.poll() is None or any(map(is_running, pids)):
            if time.monotonic() - began > LONGEST:
                left = [pid for pid in pids if is_running(pid)]
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                sys.exit(f"{left} still run {LONGEST:.0f} s after a kill:\n{self.said()}")
            time.sleep(0.01)
        return time.monotonic() - began


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def compare(out: Path, whole: Path, same: bool) -> None:
    """Compare a killed run with one that nothing has killed."""
    for name in ("loss", "val_loss"):
        losses = [
            [step[name] for step in read_metrics(path / "metrics.jsonl") if name in step]
            for path in (out, whole)
        ]
        assert len(losses[1]) == (STEPS if name == "loss" else STEPS // 8)
        if same:
            assert losses[0] == losses[1], name
        np.testing.assert_allclose(*losses, rtol=1e-5)
    for name in ("model.safetensors", f"checkpoints/{STEPS:08}/trainer.safetensors"):
        assert not same or (out / name).read_bytes() == (whole / name).read_bytes(), name
    for directory in (out, out / "checkpoints"):
        assert not [p.name for p in directory.iterdir() if TEMPORARY.fullmatch(p.name)], directory
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"{STEPS:08}"]


def kills(work: Path, count: int, seed: int, longest: dict[int, float]) -> None:
    """Kill ranks at random moments until there were `count` kills; compare each finished run."""
    chance, killed = random.Random(seed), 0
    seconds: list[float] = []
    resumed, kinds = 0, itertools.cycle([(2,), (3,), (4,), (2, 3, 4, 1), (1, 4, 3, 2)])
    for kind in kinds:
        out, turn = work / "killed", itertools.cycle(kind)
        for _ in range(5):
            if killed == count:
                break
            had = (out / "run.json").exists()
            job = Job(ranks := next(turn), work / "data", out)
            pids = job.processes()
            time.sleep(chance.uniform(0, longest[ranks]))
            if job.process.poll() is not None:
                job.finish()
                break
            rank = chance.randrange(ranks)
            seconds.append(job.end(pids[rank], signal.SIGKILL))
            killed, resumed = killed + 1, resumed + had
            code, steps = job.process.returncode, len(read_lines(out))
            print(f"{killed}: {ranks} ranks, {seconds[-1]:.2f} s, exit {code}, {steps} steps")
            sys.stdout.flush()
        Job(next(turn), work / "data", out).finish()
        compare(out, work / f"whole{kind[0]}", len(kind) == 1)
        shutil.rmtree(out)
        if killed == count:
            break
    print(
        f"{killed} kills, {resumed} of a resumed run; from a kill to the end of all processes"
        f" {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (longest)"
    )


def read_lines(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def once(work: Path, what: str, number: int, *flags: str) -> None:
    """Stop or kill one process of a job that trains; go on, and compare."""
    out = work / "once"
    job = Job(2, work / "data", out, *flags)
    pids = job.processes()
    while len(read_lines(out)) < 5:
        time.sleep(0.01)
    victim = job.process.pid if what == "the launcher" else pids[-1]
    seconds = job.end(victim, number)
    print(f"{signal.Signals(number).name} of {what}: {seconds:.2f} s; {job.said().splitlines()}")
    if number == signal.SIGSTOP:
        assert f"waited {TIMEOUT:.0f} s (--mpi-timeout)" in job.said(), job.said()
    Job(2, work / "data", out).finish()
    compare(out, work / "whole2", True)
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="kill ranks of mpiexec, and go on each time")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--keep", type=Path, help="work here and keep the unbroken runs")
    options = parser.parse_args()
    if MPIEXEC is None:
        sys.exit("there is no mpiexec: pip install mpi4py mpich")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.keep or Path(temporary)
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        prepare(text.split("\n## "), work / "data", "bytes")
        longest = {}
        for ranks in (1, 2, 3, 4):
            began = time.monotonic()
            Job(ranks, work / "data", work / f"whole{ranks}").finish()
            longest[ranks] = time.monotonic() - began
            compare(work / f"whole{ranks}", work / "whole1", False)
        print("unbroken:", ", ".join(f"{n} ranks {s:.1f} s" for n, s in longest.items()))
        once(work, "a rank", signal.SIGSTOP, f"--mpi-timeout={TIMEOUT}")
        once(work, "the launcher", signal.SIGKILL)
        kills(work, options.kills, options.seed, longest)


if __name__ == "__main__":
    main()
