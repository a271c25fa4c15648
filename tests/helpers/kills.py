"""Training that is killed: each run is a child process, forked before anything was computed.

    python tests/helpers/kills.py '{"what": "moments", "kills": 200, "data": "...", "out": "...",
                            "settings": {"max_iters": 20, "save_interval": 1}}'

It prints JSON of its counts. It fails if a run cannot be resumed, or ends with other bits than an
uninterrupted run. A child dies of SIGKILL: Python cleans up, flushes and unlocks nothing; only the
system does.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2c.files.atomic import TEMPORARY
from gpt2c.screen.progress import Progress
from gpt2c.text.batches import Batches
from gpt2c.train import hooks, loop, pretrain

TINY: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_iters": 20,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "warmup_iters": 4,
    "eval_interval": 0,
    "log_interval": 1000,
}

# The calls by which a save or a start changes the disk.
OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "write")
LOGGED = ("step", "loss", "learning_rate", "grad_norm", "val_loss", "tokens", "skipped")


def main(job: dict[str, Any]) -> Any:
    """Do a job; `what` names one of the functions below."""
    os.environ["GPT2C_NUM_THREADS"] = "1"  # for so small a model a second thread only costs time
    # A kill leaves the system's buffers, so no fsync is needed; the others only take time.
    os.fsync = lambda descriptor: None
    loop.plot_loss = lambda *_: False
    hooks.fma_peak = lambda *_: 0.0
    kinds = {"points": points, "moments": moments, "exact": exact}
    return kinds[job.pop("what")](
        **{k: Path(v) if k in ("data", "out", "other") else v for k, v in job.items()}
    )


def child(action: Callable[[], Any]) -> int:
    """Run a function in a child process; return its id."""
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    """Wait for a child; return its exit code, or the negative number of its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trained(data: Path, out: Path, settings: dict[str, Any], resume: bool = False) -> None:
    """Train in a child to the end; settings are changes to TINY."""
    code = ended(child(lambda: pretrain.train(data, out, full(settings, resume), resume=resume)))
    assert code == 0, f"{out} ended with {code}"


def full(changes: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Return TINY with changes, or nothing for a resumed run."""
    return {} if resume else TINY | changes


def gone_on(data: Path, out: Path, settings: dict[str, Any]) -> None:
    """Finish a killed run, as its user would."""
    # Without a run.json no run had begun; then the same command begins it, without --overwrite.
    trained(data, out, settings, (out / "run.json").exists())


def same(out: Path, whole: Path) -> None:
    """Check that two finished runs have equal bits, and that no temporary file is left."""
    a, b = contents(out), contents(whole)
    assert a == b, f"{out}: {[(k, a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k)]}"
    for directory in (out, out / "checkpoints"):
        assert not [p.name for p in directory.iterdir() if TEMPORARY.fullmatch(p.name)], directory
    assert len(list((out / "checkpoints").iterdir())) == 1


def contents(out: Path) -> dict[str, Any]:
    """Return the content of a run, without times of day."""
    files = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("metrics.jsonl", "state.json", "result.json")
    }
    if (out / "result.json").exists():
        result = json.loads((out / "result.json").read_text())
        files["result"] = {k: v for k, v in result.items() if k not in ("seconds", "out")}
    for path in (out / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())["state"]
        files[str(path)[len(str(out)) :]] = {k: v for k, v in state.items() if k != "seconds"}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    files["metrics"] = [{k: json.loads(line).get(k) for k in LOGGED} for line in lines]
    return files


# ---- between any two operations on the disk ------------------------------------------------------


def counted(kill_at: int, log: Path) -> Callable[[], int]:
    """Count this process's points; die at one of them. Return a function that returns the count.

    A point is before an operation that finds the disk other than the point before did, or half way
    through a write. After an operation that failed, or a sync, there is nothing new to find.
    """
    done, changed = 0, True

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changed
        if event == "open" and isinstance(arguments[2], int):
            changed = changed or bool(arguments[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))

    def watch(name: str) -> None:
        original = getattr(os, name)

        def operation(*arguments: Any, **keywords: Any) -> Any:
            nonlocal done, changed
            if changed or name == "write":
                done, changed = done + 1, False
                if done == kill_at:
                    with open(log, "w") as file:
                        print(name, arguments, file=file)
                    if name == "write":
                        original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **keywords)
            changed = changed or name != "fsync"
            return result

        setattr(os, name, operation)

    sys.addaudithook(opened)
    for name in OPERATIONS:
        watch(name)
    return lambda: done


def points(
    data: Path, out: Path, settings: dict[str, Any], first: int = 0, other: Path | None = None
) -> dict[str, int]:
    """Kill a run in each state of the disk that its operations leave.

    With `first` the killed run resumes after that step; with `other` it overwrites a run of that
    data.
    """

    old = out / "old"  # the directory before each kill

    def begin(path: Path) -> None:
        if old.exists():
            shutil.copytree(old, path)

    def attempt(path: Path, kill_at: int) -> int:
        def action() -> None:
            count = counted(kill_at, out / "killed at")
            resume, overwrite = bool(first), bool(other)
            given = full(settings, resume)
            pretrain.train(data, path, given, resume=resume, overwrite=overwrite)
            (out / "count").write_text(str(count()))

        return ended(child(action))

    out.mkdir()
    if first:
        assert ended(child(lambda: stopped(data, old, settings, first))) == -signal.SIGKILL
    if other:
        trained(other, old, settings)
        for name in ("plot.png", "loss.png", "metrics.jsonl.damaged", "added_tokens.json"):
            (old / name).write_text("{}")
    begin(out / "whole")
    assert attempt(out / "whole", 0) == 0
    if other:
        trained(data, out / "fresh", settings)
        same(out / "whole", out / "fresh")
    total = int((out / "count").read_text())
    for k in range(1, total + 1):
        path = out / f"{k}"
        begin(path)
        assert attempt(path, k) == -signal.SIGKILL
        if other and not begun(path, out / "whole"):
            assert attempt(path, 0) == 0
        else:
            gone_on(data, path, settings)
        same(path, out / "whole")
        shutil.rmtree(path)
    return {"points": total}


def begun(out: Path, whole: Path) -> bool:
    """Return whether a directory holds a run on the data of `whole`; an overwritten run may not."""
    records = [path / "run.json" for path in (out, whole)]
    if not records[0].exists():
        return False
    a, b = (json.loads(path.read_text())["data"] for path in records)
    return bool(a == b)


def stopped(data: Path, out: Path, settings: dict[str, Any], step: int) -> None:
    """Train, and die in the middle of a step."""
    original = Progress.step

    def watch(self: Progress, now: int, figures: str) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, now, figures)

    Progress.step = watch
    pretrain.train(data, out, full(settings))


# ---- at any moment -------------------------------------------------------------------------------


def moments(
    data: Path, out: Path, settings: dict[str, Any], kills: int, seed: int = 1337
) -> dict[str, int]:
    """Kill runs at random moments until each is done."""
    out.mkdir()
    start = time.monotonic()
    trained(data, out / "whole", settings)
    longest = time.monotonic() - start
    chance, killed, runs, begun = random.Random(seed), 0, 0, 0
    while killed < kills:
        path, runs = out / f"{runs}", runs + 1
        for _ in range(5):
            resume = (path / "run.json").exists()
            given = full(settings, resume)
            pid = child(lambda: pretrain.train(data, path, given, resume=resume))  # noqa: B023
            time.sleep(chance.uniform(0, longest))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code in (0, -signal.SIGKILL), f"{path} ended with {code}"
            killed += code != 0
            begun += code != 0 and resume
            if code == 0 or killed == kills:
                break
        gone_on(data, path, settings)
        same(path, out / "whole")
        shutil.rmtree(path)
    return {"kills": killed, "runs": runs, "kills of a resumed run": begun}


# ---- to the bit ----------------------------------------------------------------------------------


def exact(data: Path, out: Path, settings: list[dict[str, Any]], stop: int) -> dict[str, int]:
    """Compare uninterrupted runs with runs killed in step `stop`: their batches and their files."""
    out.mkdir()
    seen = 0
    for i, given in enumerate(settings):
        whole, parts = out / f"{i}-whole", out / f"{i}-parts"
        with logged(out / f"{i}-whole.batches"):
            trained(data, whole, given)
        with logged(out / f"{i}-parts.batches"):
            assert ended(child(lambda: stopped(data, parts, given, stop))) == -signal.SIGKILL  # noqa: B023
            trained(data, parts, given, resume=True)
        same(parts, whole)
        alone = dict(map(str.split, (out / f"{i}-whole.batches").read_text().splitlines()))
        again = [line.split() for line in (out / f"{i}-parts.batches").read_text().splitlines()]
        assert {step for step, _ in again} == alone.keys()
        assert all(alone[step] == batch for step, batch in again), "other batches"
        seen += len(alone)
    return {"runs": len(settings), "batches": seen}


class logged:
    """Write a line for each batch to a file: its number, and a hash of its content."""

    def __init__(self, path: Path) -> None:
        self.path, self.original = path, Batches.windows

    def __enter__(self) -> None:
        path, original = self.path, self.original

        def windows(self: Batches, first: int, count: int) -> Any:
            x, y = original(self, first, count)
            digest = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
            with open(path, "a") as file:
                file.write(f"{first // count} {digest}\n")
            return x, y

        Batches.windows = windows

    def __exit__(self, *error: object) -> None:
        Batches.windows = self.original


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
