"""Commands in messages, ready to be pasted into a shell."""

import shlex

from gpt2c.screen.command import command


def test_command_can_be_pasted() -> None:
    assert shlex.split(command("train", "--out", "a b"))[-3:] == ["train", "--out", "a b"]
    words = shlex.split(command("train", "--resume", ranks=4))
    assert words[:3] == ["mpiexec", "-n", "4"] and words[-2:] == ["train", "--resume"]
