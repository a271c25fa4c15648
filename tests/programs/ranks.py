"""Several ranks: each function runs in all processes of mpiexec, and fails on any of them."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from helpers.measured import CEILINGS

import gpt2c
from gpt2c.bench.worker import TINY
from gpt2c.cli import bench as cli_bench
from gpt2c.cli import info as cli_info
from gpt2c.cli.main import main as command
from gpt2c.files import tensors
from gpt2c.gpt2 import GPT2
from gpt2c.kernels.backend import backends
from gpt2c.kernels.reference.rounding import bf16
from gpt2c.parallel import gradients
from gpt2c.parallel.gradients import Exchange
from gpt2c.parallel.world import Ranks, first_voice, join
from gpt2c.text.batches import Batches
from gpt2c.train import checkpoints, hooks, loop, pretrain
from gpt2c.train.run import Run
from gpt2c.train.sharded import ShardedAdamW, optimizer_of
from programs.common import main


def replace(owner: Any, name: str, stub: Any) -> None:
    setattr(owner, name, stub)


# A step of 12 windows, which 2, 3 and 4 ranks share; those of 4 are 3, of which a batch takes 2.
SETTINGS: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2, "dropout": 0.1,
    "gradient_accumulation_steps": 6, "max_iters": 8, "learning_rate": 1e-2, "warmup_iters": 0,
    "schedule": "constant", "eval_interval": 4, "save_interval": 4, "keep": 2,
}  # fmt: skip


def world() -> Ranks:
    found = join()
    assert isinstance(found, Ranks)
    return found


def train(data: str, out: Path, resume: bool = False, **changes: Any) -> None:
    given = changes if resume else SETTINGS | changes
    with first_voice():
        pretrain.train(Path(data), out, given, resume)


def halves(data: str, out: str) -> None:
    """Train whole runs, with ZeRO and without, in 32 bits and 16, and such in two halves."""
    place = Path(out)
    gradients.BUCKET = 1000  # floats: many buckets, some of which divide an array
    train(data, place / "whole")
    train(data, place / "again")
    train(data, place / "unsharded", zero=0)
    for zero in (0, 1):
        train(data, place / f"recomputed {zero}", zero=zero, recompute="full", precision="bf16")
    train(data, place / "halves", max_iters=4)
    train(data, place / "halves", resume=True, max_iters=8)
    train(data, place / "narrow", transport="bf16")
    train(data, place / "narrow halves", transport="bf16", max_iters=4)
    train(data, place / "narrow halves", resume=True, max_iters=8)
    others(data, out)
    exchange()
    arriving()
    moved()
    narrow()
    faults(data, out)
    refusals(data, out)


def faults(data: str, out: str) -> None:
    """Skip a step that one rank alone finds not finite; go on after a save that fails halfway."""
    ranks, place, original, write = world(), Path(out), GPT2.loss, tensors.write_tensors
    calls: list[int] = []

    def loss(self: GPT2, x: Any, y: Any, keep: bool = True, **given: Any) -> float:
        found = original(self, x, y, keep, **given)
        calls.append(keep)
        return float("nan") if keep and ranks.rank == 1 and sum(calls) == 5 else found

    def full(path: Path, given: Any, metadata: Any) -> None:
        if path.parent.name.startswith(".") and "00000004" in path.parent.name:
            next(given["m"].pieces())
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, given, metadata)

    replace(GPT2, "loss", loss)
    train(data, place / "skips", skip_nonfinite=True)
    replace(GPT2, "loss", original)
    replace(checkpoints, "write_tensors", full)
    train(data, place / "full")
    replace(checkpoints, "write_tensors", write)


def others(data: str, out: str) -> None:
    """Go on with runs of one process, and of as many ranks as there are not."""
    place = Path(out)
    for name in ("of one", "of two"):
        if (place / name).exists():
            train(data, place / name, resume=True, max_iters=8)


def thirds(data: str, out: str) -> None:
    train(data, Path(out) / "whole")
    train(data, Path(out) / "unsharded", zero=0)
    others(data, out)
    exchange()
    arriving()


def exchange() -> None:
    """Sum gradients of models whose memory differs; each rank has its rows of one batch."""
    ranks = world()
    config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=8, vocab_size=257)
    llama = gpt2c.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, tie_word_embeddings=False,
    )  # fmt: skip
    frozen, adapted = gpt2c.GPT2(config, seed=1), gpt2c.GPT2(config, seed=1)
    frozen.freeze("w[tp]e.*", "h.0.*")
    adapted.add_lora(r=2)
    idx = np.random.default_rng(1).integers(0, 257, (6, 9))
    for model in (gpt2c.GPT2(config, seed=1), gpt2c.Llama(llama, seed=1), frozen, adapted):
        model.loss(idx[:, :-1], idx[:, 1:])
        model.backward()
        expected = model.flat_gradients.copy()
        weights = model.flat_parameters.copy()
        found = []
        for zero in (0, 1):
            model.flat_parameters[...] = weights
            optimizer, exchanged = optimizer_of(ranks, model, zero, "fp32")
            assert exchanged is not None
            for _ in range(2):
                step(ranks, model, exchanged, idx)
                if zero == 0:
                    exchanged.gather(model.flat_gradients)
                    worst = np.abs(model.flat_gradients - expected).max()
                    assert worst <= 1e-6 * np.abs(expected).max(), worst
                norm = optimizer.step(grad_clip=0.5)
                assert abs(norm - np.linalg.norm(expected)) < 1e-5 * norm
                if zero == 1:
                    held = optimizer.m.size + optimizer.v.size
                    assert held <= 2 * model.trained_size / ranks.size + 64 * len(exchanged.own)
                found.append((norm, model.flat_parameters.tobytes()))
                model.flat_parameters[...] = weights
        assert found[:2] == found[2:]  # the same bits
        norms = [norm for norm, _ in found]
        assert ranks.all(norms) == [norms] * ranks.size


def arriving() -> None:
    """Read weights on their way: each layer waits for its own, all other readers for all."""
    ranks, before = world(), gradients.BUCKET
    assert 0 < ranks.memory <= min(place.free for place in ranks._places) / ranks.size
    gradients.BUCKET = 1000
    config = gpt2c.GPT2Config(n_layer=3, n_head=2, n_embd=32, n_positions=8, vocab_size=257)
    idx = np.random.default_rng(1).integers(0, 257, (6, 9))

    def stepped(zero: int) -> tuple[Any, Any, Exchange]:
        model = gpt2c.GPT2(config, seed=1)
        optimizer, exchanged = optimizer_of(ranks, model, zero, "fp32")
        assert exchanged is not None
        for _ in range(2):
            step(ranks, model, exchanged, idx)
            assert not exchanged._coming
            optimizer.step(grad_clip=0.5)
        assert len(exchanged._coming) == (len(exchanged.buckets) if zero else 0)
        return model, optimizer, exchanged

    def again(model: Any, optimizer: Any) -> Any:
        optimizer.step(grad_clip=0.5)
        return model.flat_parameters

    doors: list[Any] = [
        lambda model, _: model.flat_parameters,
        lambda model, _: np.concatenate([one.ravel() for one in model.parameters.values()]),
        lambda model, _: copy.copy(model).flat_parameters,
        lambda model, _: model(idx[:, :8]),
        lambda model, _: model.generate(idx[:, :3], 4, temperature=0)[0],
        lambda model, _: model.loss(idx[:, :-1], idx[:, 1:], keep=False),
        lambda _, optimizer: np.array([optimizer.not_finite() == ""]),
        again,  # without a forward pass in between
    ]
    for read in doors:
        expected = read(*stepped(0)[:2])
        model, optimizer, exchanged = stepped(1)
        if ranks.rank == 1:
            time.sleep(0.05)  # the weights of this rank are late
        np.testing.assert_array_equal(read(model, optimizer), expected)
        exchanged.arrive()
    model, _, exchanged = stepped(1)
    told: list[int] = []  # the buckets that are on their way when a layer has its own

    def arrive(names: Any) -> None:
        exchanged.arrive(names)
        assert all(bucket.names.isdisjoint(names) for bucket in exchanged._coming)
        told.append(len(exchanged._coming))

    model.expect(arrive)
    model.loss(idx[:, :-1], idx[:, 1:], keep=False)
    assert len(told) == 5 and told == [*sorted({*told}, reverse=True), 0], told
    gradients.BUCKET = before


def narrow() -> None:
    """Sum gradients that are sent in 16 bits: each is rounded once, and their sum is not."""
    ranks = world()
    config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=8, vocab_size=257)
    model = gpt2c.GPT2(config, seed=1)
    exchanged = Exchange(ranks, model, "bf16")
    rng = np.random.default_rng(ranks.rank)
    model.flat_gradients[...] = own = rng.standard_normal(model.trained_size, np.float32)
    every = np.empty((ranks.size, own.size), np.float32)
    ranks.comm.Allgather(own, every)
    exchanged.finish()
    exchanged.gather(model.flat_gradients)
    expected = np.zeros_like(own)
    for gradients_of_rank in every:
        expected += bf16(gradients_of_rank)
    np.testing.assert_array_equal(model.flat_gradients, expected)
    error = np.abs(model.flat_gradients - every.astype(np.float64).sum(0))
    assert 0 < (error / np.abs(every).sum(0)).max() <= 2.0**-8  # half a unit
    for bad in (np.nan, np.inf):  # also of one rank
        model.flat_gradients[...] = bad if ranks.rank else 1.0
        exchanged.finish()
        assert not np.isfinite(exchanged.norm())


def moved() -> None:
    """Between hosts a thread moves what is on its way, from the first bucket to the last."""

    def moving() -> int:
        return sum(thread.name == "gpt2c-mpi" for thread in threading.enumerate())

    ranks = world()
    model = gpt2c.GPT2(
        gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=8, vocab_size=257), seed=1
    )
    idx = np.random.default_rng(1).integers(0, 257, (6, 9))
    here, found = ranks.here, []
    for ranks.here in (here, 1):
        exchanged = Exchange(ranks, model)
        model.zero_grad()
        model.loss(idx[:, :-1], idx[:, 1:])
        model.backward(final=exchanged.send)
        assert moving() == (ranks.here == 1)
        exchanged.finish()
        assert not moving()
        exchanged.gather(model.flat_gradients)
        found.append(model.flat_gradients.copy())
        exchanged.finish()  # all at once: nothing to move meanwhile
        assert not moving()
        exchanged.begin(model.flat_parameters)
        assert moving() == (ranks.here == 1)
        exchanged.arrive(["wte.weight"])
        assert moving() == (ranks.here == 1 and bool(exchanged._coming))
        exchanged.arrive()
        assert not moving()
    ranks.here = here
    assert np.array_equal(found[0], found[1])


def step(ranks: Ranks, model: Any, exchanged: Exchange, idx: Any) -> None:
    own = np.array_split(idx, ranks.size)[ranks.rank]
    model.zero_grad()
    for last, rows in enumerate((own[:1], own[1:])):
        if len(rows):
            model.loss(rows[:, :-1], rows[:, 1:], count=idx[:, 1:].size)
            model.backward(final=exchanged.send if last or len(own) == 1 else None)
    assert exchanged._next == len(exchanged.buckets)  # all were sent on the way
    exchanged.finish()


def refusals(data: str, out: str) -> None:
    """Refuse what a user can get wrong: exit code 2 everywhere, a sentence on rank 0 alone."""
    ranks, bad = world(), Path(out) / f"bad{world().size}"
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    tokens = str(Path(out) / "other") if ranks.rank == 1 else data
    cases: list[tuple[str, Sequence[str]]] = [
        (
            "a step has 3 windows, batch_size 3 x gradient_accumulation_steps 1, which 2 ranks"
            " cannot share equally: start a number of ranks that divides it",
            ["--batch-size=3", "--gradient-accumulation-steps=1"],
        ),
        (
            "rank 1 has learning_rate=1.0 and rank 0 has learning_rate=0.1: start all ranks with"
            " the same settings",
            [f"--learning-rate={1.0 if ranks.rank else 0.1}"],
        ),
        (
            "rank 1 has other training or validation tokens than rank 0: each machine needs the"
            " same data",
            [f"--data={tokens}"],
        ),
        (
            "/nowhere is not a directory of token files; gpt2c prepare makes one",
            ["--data=/nowhere"],
        ),
        (
            "rank 1: /nowhere is not a directory of token files; gpt2c prepare makes one",
            [f"--data={'/nowhere' if ranks.rank else data}"],
        ),
        ("zero must be 0 or 1, got 2", ["--zero=2"]),
        ("transport must be fp32 or bf16, got 'fp16'", ["--transport=fp16"]),
        ("/nowhere.toml: no such recipe; gpt2c comes with", ["--config=/nowhere.toml"]),
        (f"--resume continues the run in {bad} and --overwrite", ["--resume", "--overwrite"]),
        (
            "rank 1: argument --keep: invalid int value: 'two'",
            [f"--keep={'two' if ranks.rank else 2}"],
        ),
        ("rank 1: unrecognized argument more", ["more"] if ranks.rank else []),
    ]
    calls = [(said, ["train", "--data", data, *flags, *given]) for said, given in cases]
    # A rank that was started otherwise may have other flags, unknown ones, or another verb.
    for differs, other in (
        ("with '--resume'", ["train", "--data", data, "--resume"]),
        ("with '--typo' and without '--data'", ["train", "--typo"]),
        ("with 'sft' and without 'train --data'", ["sft", "base", "examples.jsonl"]),
    ):
        said = f"rank 1 was started {differs}, unlike rank 0: start all ranks with the same"
        calls.append((said, other if ranks.rank == 1 else ["train", "--data", data]))
    for said, words in calls:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            try:
                code: Any = command([*words, "--out", str(bad)])
            except SystemExit as error:
                code = error.code
        assert code == 2
        lines = errors.getvalue().splitlines()
        assert len(lines) == (ranks.rank == 0), lines
        assert all(line.startswith(f"gpt2c: {said}") for line in lines), lines
        assert not bad.exists()


def said(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Run a command; return its exit code and the lines of its output and errors."""
    texts = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
        try:
            code: Any = command(arguments)
        except SystemExit as error:
            code = error.code
    out, errors = (text.getvalue().splitlines() for text in texts)
    return code, out, errors


def shows(out: str) -> None:
    """Show the ranks, one of which has another backend; measure them; refuse the rest."""
    ranks, variable = world(), "GPT2C_BACKEND"
    replace(cli_info, "_machine_rows", lambda verbose: [("gpt2c", "here")])
    os.environ[variable] = "numpy" if ranks.rank else backends()[0]
    code, lines, errors = said("info")
    assert (code, errors) == (0, []) and len(lines) == (0 if ranks.rank else 3 + ranks.size)
    if ranks.rank == 0:
        assert lines[0].split() == ["gpt2c", "here"] and "mpi4py" in lines[1]
        assert lines[2].split() == ["ranks", "host", "cores", "threads", "backend"]
        host = ranks.MPI.Get_processor_name()
        for rank, (line, name) in enumerate(zip(lines[3:], (backends()[0], "numpy"), strict=True)):
            assert line.split()[:3] == ["rank", str(rank), host] and line.split()[5] == name
            assert line.endswith("<- not that of rank 0") == (rank > 0 and name != backends()[0])
    os.environ[variable] = "foo"
    code, lines, errors = said("info")
    assert (code, errors) == (0, [])
    for line in lines[3:]:  # only the backend is wrong
        assert line.split()[4].isdecimal() and "none: backend 'foo': unknown name" in line
    del os.environ[variable]
    measured(Path(out) / "bench.json")
    for wanted, given in [
        ("gpt2c bench ops does not run on several ranks yet: start it without mpiexec", "ops"),
        ("2 ranks cannot share 3 rows equally: pass a --shape such as 2x8", "train --shape 3x8"),
        ("PyTorch is measured in one process: start gpt2c bench train", "train --torch-compile"),
        ("PyTorch is measured in one process", "train --backends numpy,torch"),
        ("threads must be", "train --threads 0"),
        ("T = 64 is more than the model's n_positions, 32", "train --shape 2x64"),
    ]:
        code, lines, errors = said("bench", *given.split())
        late = "n_positions" in wanted  # found by rank 0, which the other serves already
        assert code == (0 if ranks.rank and late else 2)
        assert not [line for line in lines if "waiting" in line]
        errors = [line for line in errors if "measuring" not in line]
        assert len(errors) == (ranks.rank == 0), errors
        assert all(line.startswith(f"gpt2c: {wanted}") for line in errors), errors


def measured(path: Path) -> None:
    """Measure training steps of one rank alone and of all."""
    ranks, name = world(), backends()[0]
    replace(cli_bench, "measure_ceilings", lambda threads: CEILINGS)
    replace(cli_bench, "SHAPES", {"gpt2": TINY})
    flags = ["--quick", "--backends", f"{name},numpy", "--shape", "4x8", "--json", str(path)]
    flags += ["--report", str(path.with_suffix(".md"))]
    code, lines, errors = said("bench", "train", *flags)
    assert code == 0
    if ranks.rank:
        assert lines == errors == []
        return
    found = {result["row"]: result for result in json.loads(path.read_text())["results"]}
    assert [*found] == [name, f"2 x {name}", "numpy", "2 x numpy"]
    size = 4 * GPT2(TINY).trained_size
    for alone in (name, "numpy"):
        one, both = found[alone], found[f"2 x {alone}"]
        facts = both["facts"]
        assert one["note"] == both["note"] == "" and len(both["seconds"]) == 3
        assert math.isclose(facts["loss"], one["facts"]["loss"], rel_tol=1e-5)  # of their 4th step
        assert math.isclose(facts["speed_up"], one["median"] / both["median"])
        assert math.isclose(facts["efficiency"], facts["speed_up"] / 2)
        assert abs(facts["mpi_bytes"] - size) < 0.05 * size and 0 <= facts["mpi_share"] <= 1
        (line,) = (line for line in lines if line.split()[:3] == ["2", "x", alone])
        assert f"{facts['efficiency']:.0%}" in line
        assert f"| 2 x {alone} |" in path.with_suffix(".md").read_text()


def raises(data: str, out: str) -> None:
    """Raise an error on rank 1 in a step: the job must end."""
    if world().rank == 1:
        original = Batches.windows

        def windows(self: Batches, first: int, count: int) -> Any:
            if first >= 24:
                raise RuntimeError("a broken disk")
            return original(self, first, count)

        replace(Batches, "windows", windows)
    train(data, Path(out) / "raises", max_iters=100)


def stays(data: str, out: str) -> None:
    """Raise an error on rank 1, whose gradients are on their way, while rank 0 does not come."""

    def broken(self: Exchange) -> None:
        raise RuntimeError("a broken disk")

    if world().rank == 1:
        replace(Exchange, "finish", broken)
    else:
        replace(Batches, "windows", lambda *_: time.sleep(60))
    train(data, Path(out) / "stays", mpi_timeout=4.0)


def serves(data: str, out: str) -> None:
    """Raise an error on rank 1, which serves rank 0 with its moments at the first save."""

    def failed(self: ShardedAdamW) -> None:
        raise MemoryError("a bucket does not fit")

    if world().rank == 1:
        share = Run.share

        def shared(self: Run) -> None:
            share(self)  # the start is over, where it serves, too
            replace(ShardedAdamW, "serve", failed)

        replace(Run, "share", shared)
    train(data, Path(out) / "serves", mpi_timeout=4.0)


def signalled(data: str, out: str, rank: str) -> None:
    """Train until a signal comes, to this rank in its third step or to mpiexec."""
    if rank and world().rank == int(rank):
        original = Batches.windows

        def windows(self: Batches, first: int, count: int) -> Any:
            if first >= 24:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, first, count)

        replace(Batches, "windows", windows)
    never = {"save_interval": 0, "eval_interval": 0}  # a stop in an evaluation leaves a step open
    train(data, Path(out) / "run", False, max_iters=100_000, log_interval=1, **never)


def hangs(data: str, out: str) -> None:
    """Sleep on rank 1 in a step: rank 0 must end the job."""
    if world().rank == 1:
        replace(Batches, "windows", lambda *_: time.sleep(60))
    train(data, Path(out) / "hangs", mpi_timeout=4.0)


if __name__ == "__main__":
    replace(loop, "plot_loss", lambda *_: False)  # see draw_nothing of conftest.py
    replace(hooks, "fma_peak", lambda *_: 0.0)
    with join().guard():
        main(globals())
