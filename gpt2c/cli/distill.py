"""`gpt2c distill`: a small model learns the probabilities of a large one."""

from __future__ import annotations

import argparse

from gpt2c.cli.finetune import add_run, given_run, print_change, print_done, say_stopped
from gpt2c.finetune import distill
from gpt2c.finetune.distill import DistillSettings

__all__ = ["add_flags", "run_distill"]

EPILOG = """\
BASE is the teacher. The student is a model of its own, for instance a pruned teacher (--student),
or a new one: the teacher's shape but for --n-layer, --n-head and --n-embd."""


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the flags of a run, and the student."""
    verb.epilog = EPILOG
    add_run(verb, DistillSettings)
    verb.add_argument("--student", metavar="DIR", help="the model that learns, if it exists")


def run_distill(options: argparse.Namespace) -> int:
    """Distill a teacher into a student."""
    given = given_run(options, DistillSettings)
    result = distill(options.base, options.data, options.out, student=options.student, **given)
    if result.interrupted:
        flags = () if options.student is None else ("--student", options.student)
        return say_stopped(result, "distill", options, *flags)
    print_done(options, [result])
    print_change(result.before, result.after)
    return 0
