"""Ranks: one process is a world of one; the errors that a launcher or an absent MPI can cause."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from helpers.command import program, run_process

from gpt2c.cli.main import main
from gpt2c.parallel import world
from gpt2c.parallel.same import check_same
from gpt2c.parallel.world import ALONE, World, first_voice, launched, require_alone


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as if nothing had launched this process, and start MPI again in each test."""
    for names in world.VARIABLES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(world, "join", world.join.__wrapped__)


def launch(patch: pytest.MonkeyPatch, rank: int, size: int, which: int = 0) -> None:
    for name, value in zip(world.VARIABLES[which], (rank, size), strict=True):
        patch.setenv(name, str(value))


def test_world_of_one_returns_what_it_gets() -> None:
    assert world.join() is ALONE and launched() is None
    assert (ALONE.rank, ALONE.size, ALONE.take_cores(3)) == (0, 1, 3)
    assert ALONE.sum([1.5, 2]) == [1.5, 2]
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.first("a") == "a" and ALONE.all("a") == ["a"]
    with pytest.raises(KeyError), ALONE.guard(), ALONE.agreement():
        raise KeyError


@pytest.mark.parametrize("which", range(len(world.VARIABLES)))
def test_launcher_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    launch(monkeypatch, 1, 4, which)
    assert launched() == (1, 4)
    launch(monkeypatch, 0, 1, which)
    assert world.join() is ALONE


def test_one_rank_does_not_import_mpi() -> None:
    done = run_process(program("programs.fresh", "join_world"), PMI_RANK="0", PMI_SIZE="1")
    assert "gpt2c.parallel.world" in done.stdout and "mpi4py" not in done.stdout


@pytest.mark.parametrize("error", [ImportError("no mpi4py"), RuntimeError("cannot load MPI")])
def test_absent_mpi_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any) -> Any:
        if name.startswith("mpi4py"):
            raise error
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    launch(monkeypatch, 0, 2)
    assert refused(world.join) == (
        f"2 processes were started, and mpi4py cannot be loaded ({error}): pip install"
        " mpi4py, and an MPI"
    )
    launch(monkeypatch, 1, 2)
    with pytest.raises(SystemExit) as ended:
        world.join()
    assert ended.value.code == 2


def test_mpi_of_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MPI that mpi4py loads sees one process where this launcher is not its own."""
    pytest.importorskip("mpi4py")
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    done = run_process(program("programs.fresh", "join_world"), **slurm)
    if "cannot be loaded" in done.stderr:
        pytest.skip("there is no MPI")
    assert "ValueError: 2 processes were started, and MPI sees 1: mpi4py has loaded" in done.stderr


def test_work_of_one_process_refuses_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    require_alone("gpt2c sft")
    launch(monkeypatch, 0, 1)
    require_alone("gpt2c sft")
    launch(monkeypatch, 0, 2)
    said = "gpt2c sft does not run on several ranks yet: start it without mpiexec"
    assert refused(require_alone, "gpt2c sft") == said
    launch(monkeypatch, 1, 2)
    with pytest.raises(SystemExit):
        require_alone("gpt2c sft")


def test_only_the_first_rank_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        launch(monkeypatch, rank, 2)
        with first_voice():
            print(rank)
    assert capsys.readouterr().out == "0\n"


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ("train --mpi-timeout 7 --data d", 7),
        ("train --mpi_timeout=7.5", 7.5),
        ("train --mpi-timeout=1e4", 1e4),
        ("train --mpi-timeout=inf", 600),
        ("train --mpi-timeout=never", 600),
        ("train --mpi-timeout", 600),
        ("train --mpi-timeout=0", 600),
        ("info", 600),
    ],
)
def test_ranks_must_start_within_the_time_of_the_command(words: str, limit: float) -> None:
    assert world._start_limit(["gpt2c", *words.split()]) == limit


class Told(World):
    """A world whose second rank has told other facts."""

    def __init__(self, **other: Any) -> None:
        super().__init__()
        self.other = other

    def all(self, value: Any) -> Any:
        return [value, {**value, **self.other}]


FACTS: dict[str, Any] = {
    "gpt2c": "1.0", "settings": {"seed": 1, "threads": 2}, "data": {"train": [5, 7]},
    "models": {"base": "1f", "teacher": "2e"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"gpt2c": "1.1"}, "rank 1 runs gpt2c 1.1 and rank 0 runs 1.0: install one version on all"),
        ({"settings": {"seed": 2}}, "rank 1 has seed=2 and rank 0 has seed=1: start all ranks"),
        ({"data": {"train": [5, 8]}}, "rank 1 has other training or validation tokens than rank 0"),
        ({"models": {"base": "1f"}}, "rank 1 has another teacher than rank 0: each machine needs"),
    ],
)
def test_ranks_that_differ_are_refused(other: dict[str, Any], said: str) -> None:
    assert refused(check_same, Told(**other), FACTS, {"threads"}).startswith(said)
    check_same(Told(settings={"seed": 1, "threads": 9}), FACTS, {"threads"})


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_all_things_nearly_equally_and_in_order(size: int) -> None:
    for count in (0, 1, 5, 12):
        shares, turns, checks = [], [], []
        for rank in range(size):
            world, asked = World(), [0]
            world.rank, world.size = rank, size
            shares.append([*range(count)][world.share(count)])
            turns.append([*world.turns(range(count), lambda: asked.append(1))])  # noqa: B023
            checks.append(len(asked))
        assert [thing for share in shares for thing in share] == [*range(count)]
        assert sorted(thing for turn in turns for thing in turn) == [*range(count)]
        for lengths in ([*map(len, shares)], [*map(len, turns)]):
            assert max(lengths) - min(lengths) <= 1
        assert len({*checks}) == 1  # a check is an exchange of all ranks


@pytest.mark.parametrize("flag", ["zero 1", "transport bf16"])
def test_flag_for_ranks_is_refused_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    places = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    command = ["train", *places, *f"--{flag}".split()]
    assert main(command) == 2
    said = f"gpt2c: --{flag} is for several ranks, and this process is alone: begin the command"
    assert capsys.readouterr().err.startswith(said)
    launch(monkeypatch, 0, 1)
    assert main(command) == 2
    assert "is not a directory of token files" in capsys.readouterr().err
