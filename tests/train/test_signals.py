"""Signals: a run that is told to stop saves first, and resumes to the same bits."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import program, run_process
from helpers.kills import TINY, contents
from helpers.runs import checkpoint_names, resume_and_compare, train, train_short

from gpt2c.cli.main import main
from gpt2c.gpt2 import GPT2
from gpt2c.train import checkpoints
from gpt2c.train.optimizer import AdamW
from gpt2c.train.stop import SIGNALS

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("step", [3, 4, 8], ids=["a step", "an evaluation", "the last evaluation"])
def test_signal_saves_the_run_and_resume_goes_on(
    data: Path, tmp_path: Path, whole_short: Path, at_step: Any, name: str, step: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    number = getattr(signal, name)
    before, out = signal.getsignal(number), tmp_path / "run"
    at_step(step, lambda: signal.raise_signal(number))
    result = train_short(data, out)
    assert (result.step, result.interrupted) == (step, True)
    assert signal.getsignal(number) is before
    assert checkpoint_names(out) == [f"{step:08d}"]
    assert GPT2.from_pretrained(out).config.n_layer == 1  # the directory's own model is there
    assert resume_and_compare(data, out, whole_short, monkeypatch).started == step
    assert "step 8: validation loss " in capsys.readouterr().out.splitlines()[-1]


def test_train_command_reports_a_stop_in_the_last_evaluation(
    data: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(8, lambda: signal.raise_signal(signal.SIGTERM))
    flags = [f"--{name}={value}" for name, value in (TINY | {"max_iters": 8}).items()]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 130
    assert "stopped and saved after step 8 of 8; continue with: " in capsys.readouterr().out


def test_ignored_signal_stays_ignored(data: Path, tmp_path: Path, at_step: Any) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, lambda: signal.raise_signal(signal.SIGHUP))
        assert not train_short(data, tmp_path / "run").interrupted
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step", [3, 8])
def test_second_ctrl_c_saves_and_raises(
    data: Path,
    tmp_path: Path,
    whole_short: Path,
    at_step: Any,
    step: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    at_step(step, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train_short(data, out)
    assert f"saved after step {step}; continue with --resume\n" in capsys.readouterr().out
    assert resume_and_compare(data, out, whole_short, monkeypatch).started == step


def test_ctrl_c_interrupts_no_save_and_no_update(
    data: Path, tmp_path: Path, whole_short: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is pressed."""
    save, step = checkpoints.save, AdamW.step

    def pressed(call: Callable[..., Any]) -> Callable[..., Any]:
        def first(*arguments: Any) -> Any:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            return call(*arguments)

        return first

    monkeypatch.setattr(checkpoints, "save", pressed(save))
    monkeypatch.setattr(AdamW, "step", pressed(step))
    assert train_short(data, tmp_path / "run").step == 1
    assert resume_and_compare(data, tmp_path / "run", whole_short, monkeypatch).started == 1


def test_train_command_exits_130_after_a_second_ctrl_c(
    data: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    at_step(7, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 130
    assert capsys.readouterr().err == "gpt2c: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.slow
def test_train_process_prints_how_to_resume_after_sigint(data: Path, tmp_path: Path) -> None:
    """Only the number of steps may vary; it is read from the output."""
    settings = TINY | {"schedule": "constant", "max_iters": 10**6, "log_interval": 1}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    out = tmp_path / "a run"  # the space must survive a copy of the command to a shell
    command = [sys.executable, "-W", "error", "-m", "gpt2c"]
    child = subprocess.Popen(
        [*command, "train", "--data", str(data), "--out", str(out), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout
        assert "parameters, backend" in child.stdout.readline()
        assert child.stdout.readline().startswith("step ")
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, errors) == (130, "")
    message, _, advice = output.splitlines()[-1].partition("; continue with: ")
    step = int(message.split()[5])
    assert message == f"stopped and saved after step {step} of 1000000"
    program, arguments = shlex.split(advice)[:3], shlex.split(advice)[3:]
    assert program == [sys.executable, "-m", "gpt2c"]  # as it was called
    assert arguments == ["train", "--data", str(data), "--out", str(out), "--resume"]
    assert main([*arguments, "--max-iters", str(step + 5)]) == 0
    train(data, tmp_path / "whole", schedule="constant", max_iters=step + 5, log_interval=1)
    found, wanted = contents(out), contents(tmp_path / "whole")
    del found["loss.png"]  # the process draws one, and this test's own run does not
    assert found == wanted


def test_ctrl_c_during_import_prints_no_traceback(tmp_path: Path) -> None:
    done = run_process(program("programs.importing"))
    assert (done.returncode, done.stderr, done.stdout) == (130, "gpt2c: interrupted\n", "")
