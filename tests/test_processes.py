"""Forks, threads, signals and limits: the process lives, nothing hangs, and the bits are the same.

Each test runs a program of tests/programs in its own process, which is killed if it hangs.
"""

from __future__ import annotations

import sys

import pytest
from helpers.command import program, run_process
from programs.limits import STAGES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="forks, limits and /proc are Linux's here"
)


def run(module: str, *arguments: str, threads: int = 2, status: int = 0, **variables: str) -> str:
    """Run a program, a function of a module, in its own process; return its output."""
    # From Python 3.12 on a fork beside threads is a DeprecationWarning, and these tests fork.
    command = program(module, *arguments, flags=("-W", "ignore::DeprecationWarning"))
    done = run_process(command, GPT2C_NUM_THREADS=str(threads), **variables)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout


# ---- forks ---------------------------------------------------------------------------------------


def test_parent_child_and_grandchild_compute_in_turn() -> None:
    run("programs.forks", "in_turn")


@pytest.mark.parametrize("used", ["before", "after"])
def test_pool_of_forks_computes_beside_its_parent(used: str) -> None:
    run("programs.forks", "pool", used)


@pytest.mark.parametrize("computing", [(), ("main",), ("thread",), ("main", "thread")], ids=str)
def test_thread_may_fork(computing: tuple[str, ...]) -> None:
    """After the thread has computed, after the main thread has, after both, and after neither."""
    run("programs.forks", "from_a_thread", *computing)


def test_fork_while_another_thread_computes() -> None:
    run("programs.forks", "while_another_computes")


def test_engine_stays_with_the_parent() -> None:
    run("programs.forks", "engine")


def test_child_ends_without_waiting_for_engines() -> None:
    """A program closes its engines at its end; a child has not their threads."""
    run("programs.forks", "child_ends_by_itself")


def test_forks_leave_no_threads_files_or_memory() -> None:
    run("programs.forks", "nothing_left")


# ---- threads -------------------------------------------------------------------------------------


def test_pool_ends_with_the_thread_that_used_it() -> None:
    run("programs.threads", "pool_ends")


def test_threads_leave_the_core_that_openmp_bound_this_one_to() -> None:
    run("programs.threads", "bound_core", OMP_PROC_BIND="true")


def test_bits_do_not_depend_on_the_threads() -> None:
    """A task is whole sums, and sizes alone cut tasks: with 1, 2, 3 and 8 threads."""
    run("programs.threads", "counts")


def test_two_models_in_two_threads_do_not_disturb_each_other() -> None:
    run("programs.threads", "models_at_once")


def test_busy_model_refuses_a_second_thread() -> None:
    """The batches differ in size: arrays of one with the sizes of another would crash."""
    run("programs.threads", "one_model_at_once")


# ---- signals -------------------------------------------------------------------------------------


def test_storm_of_signals_changes_no_bit() -> None:
    assert int(run("programs.signals", "storm")) > 10


def test_ctrl_c_leaves_a_model_usable() -> None:
    """It takes effect after the kernel; backward then needs a new loss, with whole gradients."""
    run("programs.signals", "ctrl_c")


def test_sigterm_ends_a_training_process() -> None:
    run("programs.signals", "told_to_end", status=-15)


# ---- limits --------------------------------------------------------------------------------------


def test_thread_that_cannot_start_is_an_error() -> None:
    """Root has no such limit, so the program becomes the user nobody."""
    if "skip" in run("programs.limits", "thread_limit", threads=8):
        pytest.skip("this process may not become another user")


def test_stacks_that_do_not_fit_are_an_error() -> None:
    run("programs.limits", "stacks", threads=64)


def test_threads_that_start_at_once_do_not_take_each_others_memory() -> None:
    """Each pool fits alone; the second one must count the memory that the first one took."""
    # otherwise each Python thread's own arena takes 64 MB or more
    run("programs.limits", "pools_at_once", threads=8, MALLOC_ARENA_MAX="1")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_missing_memory_is_an_error(stage: str) -> None:
    """Each stage gets less than it needs; smaller work must succeed under the same limit."""
    run("programs.limits", "stage", stage)


@pytest.mark.parametrize("room", [0, 2000, 50_000, 500_000, 3_000_000, 9_000_000])
def test_process_survives_however_little_memory(room: int) -> None:
    """Down to none."""
    run("programs.limits", "little_memory", str(room))


# ---- beside other libraries ----------------------------------------------------------------------

LIBRARIES = ["gpt2c", "torch", "sklearn.cluster", "numpy"]
ORDERS = [LIBRARIES, LIBRARIES[1:] + LIBRARIES[:1], LIBRARIES[::-1]]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_training_beside_torch_and_scikit_learn(order: list[str]) -> None:
    """They bring OpenMP; the kernels neither use nor disturb its threads."""
    for name in ("torch", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed here")
    run("programs.libraries", "beside", *order, OMP_NUM_THREADS="3")
