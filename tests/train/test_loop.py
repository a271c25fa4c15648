"""Training: the loss falls, a seed fixes every bit, and a run that is stopped loses nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOCUMENTS, draw_nothing
from helpers.kills import TINY

from gpt2c.cli.main import main
from gpt2c.screen.progress import Progress
from gpt2c.text.prepare import prepare
from gpt2c.train import loop
from gpt2c.train.loop import TrainResult
from gpt2c.train.optimizer import SCHEDULES, AdamW
from gpt2c.train.settings import (
    OLDER,
    TABLES,
    TrainSettings,
    find_recipe,
    read_recipe,
    recipe_settings,
    resumed,
)

FILES = (
    *("model.safetensors", "config.json", "generation_config.json"),
    *("vocab.json", "merges.txt"),
)
# All settings of the first run.json. None is ever added here: a setting that comes later declares
# what a run like this one has in its place.
FIRST: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4,
    "gradient_accumulation_steps": 2, "max_iters": 3, "learning_rate": 0.01, "min_lr": 0.001,
    "warmup_iters": 0, "schedule": "constant", "decay_fraction": 0.2, "step_size": 1000,
    "gamma": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "eval_interval": 0, "eval_iters": 0, "log_interval": 10, "save_interval": 0, "keep": 1,
    "skip_nonfinite": False, "tensorboard": False, "seed": 1337, "backend": "auto",
    "recompute": "none",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_picture")


def train(data: Path, out: Path, *, resume: bool = False, **changes: Any) -> TrainResult:
    """Train with TINY settings and these changes; a resumed run is given the changes alone."""
    given = changes if resume else TINY | changes
    return loop.train(data, out, given, resume=resume)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without what depends on the time of day."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "loss", "learning_rate", "grad_norm", "val_loss")
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


def same_run(a: Path, b: Path, names: tuple[str, ...] = FILES) -> None:
    """Check that two runs are the same to the last bit."""
    assert metrics(a) == metrics(b)
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    (newest,), (other,) = ((out / "checkpoints").iterdir() for out in (a, b))
    assert newest.name == other.name
    moments = "trainer.safetensors"
    assert (newest / moments).read_bytes() == (other / moments).read_bytes()


def everything(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def nothing_half_written(out: Path) -> None:
    known = {*FILES, "tokenizer_config.json", "metrics.jsonl", "loss.png", "run.json"}
    assert {path.name for path in out.iterdir()} <= known | {"checkpoints"}
    assert all(path.name.isdecimal() for path in (out / "checkpoints").glob("*"))


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Return a way to have something happen in the middle of a step, before it is logged."""
    original = Progress.step

    def arrange(wanted: int, action: Callable[[], Any]) -> None:
        if action is power_cut:  # which saves nothing
            monkeypatch.setattr(loop, "_rescue", lambda *run: None)

        def step(self: Progress, step: int, figures: str) -> None:
            original(self, step, figures)
            if step == wanted:
                action()

        monkeypatch.setattr(Progress, "step", step)

    return arrange


def power_cut() -> None:
    raise RuntimeError("power cut")


# ---- learning ------------------------------------------------------------------------------------


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", max_iters=60, eval_interval=30)
    entries = metrics(tmp_path / "run")
    assert [entry["step"] for entry in entries] == list(range(1, 61))
    assert entries[0]["loss"] == pytest.approx(math.log(257), abs=0.1)  # it knows nothing yet
    assert entries[-1]["loss"] < 3.5
    evaluated = {entry["step"]: entry["val_loss"] for entry in entries if "val_loss" in entry}
    assert list(evaluated) == [30, 60]
    assert result.val_loss == evaluated[60] < evaluated[30]
    assert (result.step, result.max_iters, result.interrupted) == (60, 60, False)
    nothing_half_written(tmp_path / "run")


def test_a_seed_fixes_every_bit(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(data, tmp_path / name, seed=seed, eval_interval=7)
    same_run(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a")[0]["loss"] != metrics(tmp_path / "c")[0]["loss"]


def test_a_bad_backend_or_shape_claims_no_directory(data: Path, tmp_path: Path) -> None:
    for changes in ({"backend": "abacus"}, {"n_head": 3}, {"batch_size": 10**6}, {"beta1": 1.5}):
        with pytest.raises(ValueError):
            train(data, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


def test_accumulated_batches_are_one_big_batch(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "big", batch_size=8, max_iters=10)
    train(data, tmp_path / "small", batch_size=2, gradient_accumulation_steps=4, max_iters=10)
    big, small = metrics(tmp_path / "big"), metrics(tmp_path / "small")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [entry[name] for entry in big], [entry[name] for entry in small], rtol=1e-4
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_applied(data: Path, tmp_path: Path, schedule: str) -> None:
    train(data, tmp_path / "run", schedule=schedule, max_iters=9, step_size=2, gamma=0.5)
    rates = [entry["learning_rate"] for entry in metrics(tmp_path / "run")]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    low, span = 1e-3, 9e-3
    expected = {
        "constant": [1e-2] * 5,
        "linear": [1e-2 - span * i / 5 for i in range(5)],
        "cosine": [low + span * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)],
        "wsd": [1e-2] * 4 + [low + span * (1 - math.sqrt(1 / 2))],  # its last 2 of 9 decay
        "step": [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3],
    }[schedule]
    assert rates[4:] == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_is_cut(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", max_iters=5, warmup_iters=100)
    assert metrics(tmp_path / "run")[-1]["learning_rate"] == pytest.approx(1e-2)


def test_a_run_that_diverges_says_so(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss is nan at step 2, .*lower the learning rate"):
        train(data, tmp_path / "run", learning_rate=1e30)


def test_steps_go_through_adamw(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = AdamW.step

    def step(self: AdamW, learning_rate: float, grad_clip: float | None) -> float:
        seen.append((self.betas, self.weight_decay, grad_clip))
        return original(self, learning_rate, grad_clip)

    monkeypatch.setattr(AdamW, "step", step)
    settings = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "max_iters": 1}
    train(data, tmp_path / "clipped", **settings, grad_clip=0.5)
    train(data, tmp_path / "free", **settings, grad_clip=0)
    assert seen == [((0.8, 0.9), 0.2, 0.5), ((0.8, 0.9), 0.2, None)]


# ---- stop and go on ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 20 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        train(data, out, save_interval=10)
    return out


def test_resume_after_a_power_cut_is_the_run_that_had_none(
    data: Path, whole: Path, tmp_path: Path, at_step: Any
) -> None:
    out = tmp_path / "run"
    at_step(14, power_cut)
    with pytest.raises(RuntimeError):
        train(data, out, save_interval=10)
    assert len(metrics(out)) == 13
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000010"]
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 14, "lo')  # the cut came in the middle of a line
    at_step(0, power_cut)  # never
    assert train(data, out, resume=True).step == 20
    same_run(out, whole)
    nothing_half_written(out)


def test_ctrl_c_saves_and_resume_goes_on(
    data: Path, whole: Path, tmp_path: Path, at_step: Any
) -> None:
    before, out = signal.getsignal(signal.SIGINT), tmp_path / "run"
    at_step(7, lambda: signal.raise_signal(signal.SIGINT))
    result = train(data, out, save_interval=10)
    assert (result.step, result.interrupted) == (7, True)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(metrics(out)) == 7
    at_step(0, power_cut)  # never
    assert not train(data, out, resume=True).interrupted
    same_run(out, whole)


def test_the_second_ctrl_c_does_not_wait(
    data: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    at_step(7, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 130
    assert capsys.readouterr().err == "gpt2c: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before
    nothing_half_written(tmp_path / "run")


def test_training_in_a_thread(data: Path, whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(data, tmp_path), kwargs={"save_interval": 10})
    thread.start()
    thread.join()
    same_run(tmp_path, whole)


def test_a_peak_that_a_step_passes_is_measured_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where other programs kept the machine busy at the start."""
    peaks = iter([1.0, 1e18])
    measure = functools.cache(lambda name, threads: next(peaks))
    monkeypatch.setattr("gpt2c.train.hooks.fma_peak", measure)
    train(data, tmp_path, max_iters=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("share_of_peak") for line in lines]
    assert shares[0] is None and all(share < 1 for share in shares[1:]) and len(shares) == 3


@pytest.mark.parametrize(("peak", "is_shown"), [(1.0, False), (1e13, True)])
def test_a_share_above_1_is_left_out_of_the_lines(
    peak: float,
    is_shown: bool,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = functools.cache(lambda name, threads: peak)
    monkeypatch.setattr("gpt2c.train.hooks.fma_peak", measure)
    train(data, tmp_path, max_iters=2, log_interval=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert ["% of peak" in line for line in lines] == [is_shown] * 2


@pytest.mark.slow
def test_sigint_to_a_process(data: Path, tmp_path: Path) -> None:
    """Nothing but the number of steps may differ, so that is read from what the process says."""
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
    message, _, advice = output.splitlines()[-1].partition("; go on with: ")
    step = int(message.split()[5])
    assert message == f"stopped and saved after step {step} of 1000000"
    program, arguments = shlex.split(advice)[:3], shlex.split(advice)[3:]
    assert program == [sys.executable, "-m", "gpt2c"]  # as it was called
    assert arguments == ["train", "--data", str(data), "--out", str(out), "--resume"]
    assert main([*arguments, "--max-iters", str(step + 5)]) == 0
    train(data, tmp_path / "whole", schedule="constant", max_iters=step + 5, log_interval=1)
    same_run(out, tmp_path / "whole")


def test_a_finished_run_can_be_made_longer(data: Path, tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    train(data, parts, schedule="constant", max_iters=5)
    weights = (parts / "model.safetensors").read_bytes()
    assert train(data, parts, resume=True).step == 5  # nothing is left to do
    assert (parts / "model.safetensors").read_bytes() == weights
    train(data, parts, resume=True, max_iters=9)
    train(data, whole, schedule="constant", max_iters=9)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    entries = metrics(parts)
    assert entries[4].pop("val_loss")  # it was the last step once
    assert entries == metrics(whole)


def test_a_run_of_the_first_version_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Its run.json lacks what was added later, among it an order of the batches of its own."""
    whole, parts, new = tmp_path / "whole", tmp_path / "parts", tmp_path / "new"
    then = {"batch_order": 1, "save_minutes": 0.0, "threads": 0}
    loop.train(data, whole, FIRST | then | {"max_iters": 6})
    loop.train(data, parts, FIRST | then)
    record = json.loads((parts / "run.json").read_text(encoding="utf-8"))
    record["settings"] = FIRST
    (parts / "run.json").write_text(json.dumps(record), encoding="utf-8")
    train(data, parts, resume=True, max_iters=6)
    loop.train(data, new, FIRST | {"max_iters": 6})
    kept = [(metrics(out), (out / "model.safetensors").read_bytes()) for out in (whole, parts, new)]
    del kept[1][0][2]["val_loss"]  # step 3 was its last once
    assert kept[0] == kept[1] != kept[2]


def test_resume_refuses_another_model_or_tokenizer(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    prepare(DOCUMENTS, tmp_path / "own", "bpe:270")
    prepare([text.replace("cat", "dog") for text in DOCUMENTS], tmp_path / "same size", "bpe:270")
    train(tmp_path / "own", out, max_iters=3)
    files = everything(out)
    for changes, wanted in (
        ({"n_embd": 32}, r"was trained with n_embd=16, so it cannot go on with 32; drop that"),
        ({"seed": 5}, r"was trained with seed=1337"),
    ):
        with pytest.raises(ValueError, match=wanted):
            train(tmp_path / "own", out, resume=True, **changes)
    for other in (data, tmp_path / "same size"):
        with pytest.raises(ValueError, match=r"has another tokenizer than the run [^\n]*$"):
            train(other, out, resume=True)
    assert everything(out) == files
    (out / "run.json").write_text(
        (out / "run.json").read_text().replace('"n_positions": 16', '"n_positions": 8')
    )
    with pytest.raises(ValueError, match="holds a model of another config"):
        train(tmp_path / "own", out, resume=True)


def change_last_token(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + (content[-2] ^ 1).to_bytes() + content[-1:])


def cut_last_token(path: Path) -> None:
    content = bytearray(path.read_bytes())[:-2]
    content[8:12] = (int.from_bytes(content[8:12], "little") - 1).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("change", [change_last_token, cut_last_token])
def test_resume_refuses_other_tokens(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Any
) -> None:
    monkeypatch.setattr("gpt2c.text.shards._BLOCK", 100)  # so that there is more than one block
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    train(copy, tmp_path / "run", max_iters=3)
    change(copy / name)
    with pytest.raises(ValueError, match=f"{name} is not the file that manifest.json"):
        train(copy, tmp_path / "run", resume=True, max_iters=4)
    (copy / "manifest.json").unlink()  # as a directory that prepare did not write
    with pytest.raises(ValueError, match="does not hold the training and validation tokens of"):
        train(copy, tmp_path / "run", resume=True, max_iters=4)
    train(data, tmp_path / "run", resume=True, max_iters=4)


def test_the_same_tokenizer_in_other_files_goes_on(data: Path, tmp_path: Path) -> None:
    """White space, and tokenizer.json in place of the pair."""
    plain, json_only = tmp_path / "own", tmp_path / "json"
    prepare(DOCUMENTS, plain, "bpe:270")
    shutil.copytree(plain, json_only)
    vocab = json.loads((plain / "vocab.json").read_text())
    merges = (plain / "merges.txt").read_text().splitlines()[1:]
    added = {"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    (json_only / "tokenizer.json").write_text(json.dumps(content))
    (plain / "vocab.json").write_text(json.dumps(vocab, indent=2))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (json_only / name).unlink()
    for i, directory in enumerate((plain, json_only)):
        train(directory, tmp_path / f"run {i}", max_iters=2)
        assert train(directory, tmp_path / f"run {i}", resume=True, max_iters=3).step == 3
    (tmp_path / "run 0" / "merges.txt").unlink()  # as a kill at the start might leave it
    assert train(json_only, tmp_path / "run 0", resume=True, max_iters=4).step == 4


def test_resume_and_overwrite_exclude_each_other(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", max_iters=2)
    files = everything(tmp_path / "run")
    with pytest.raises(ValueError, match=r"--resume .* and --overwrite .*: pass one of them$"):
        loop.train(data, tmp_path / "run", {}, resume=True, overwrite=True)
    assert everything(tmp_path / "run") == files


def test_a_finished_run_that_was_not_evaluated_has_no_figure(
    data: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    at_step(7, lambda: signal.raise_signal(signal.SIGINT))
    assert train(data, out, eval_interval=3).step == 7
    capsys.readouterr()
    command = ["train", "--data", str(data), "--out", str(out), "--resume", "--max-iters", "7"]
    assert main(command) == 0
    line = f"{out}: was finished already, after 7 steps (a larger --max-iters goes on)\n"
    assert capsys.readouterr().out == line


# ---- the directory -------------------------------------------------------------------------------


def test_a_directory_that_holds_something_is_refused(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    files = everything(whole)
    with pytest.raises(FileExistsError, match="is not empty; name another directory or pass"):
        train(data, whole)
    assert everything(whole) == files
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        train(data, tmp_path / "file")


def test_overwrite_replaces_a_run(data: Path, tmp_path: Path, at_step: Any) -> None:
    old, fresh = tmp_path / "old", tmp_path / "fresh"
    train(data, old, seed=5)
    train(data, fresh)
    loop.train(data, old, TINY, overwrite=True)
    same_run(old, fresh)
    at_step(3, power_cut)
    with pytest.raises(RuntimeError):
        loop.train(data, old, TINY, overwrite=True)
    at_step(0, power_cut)  # never
    train(data, old, resume=True)  # and not the run that was overwritten
    same_run(old, fresh)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from gpt2c.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("limit", [1_000, 20_000], ids=["metrics", "checkpoint"])
def test_a_disk_that_is_full_leaves_the_old_checkpoint(
    data: Path, tmp_path: Path, limit: int
) -> None:
    pytest.importorskip("resource")
    out = tmp_path / "run"
    train(data, out, save_interval=10, max_iters=10)
    (newest,) = (out / "checkpoints").iterdir()
    files = everything(newest) | {out / name: (out / name).read_bytes() for name in FILES}
    command = [sys.executable, "-B", "-c", LIMITED.format(limit=limit), "train", "--resume"]
    command += ["--data", str(data), "--out", str(out), "--max-iters", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpt2c: ")
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in files} == files
    nothing_half_written(out)
    assert train(data, out, resume=True, max_iters=20).step == 20
    assert [entry["step"] for entry in metrics(out)] == list(range(1, 21))


# ---- the picture ---------------------------------------------------------------------------------


def test_the_loss_is_drawn(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    assert train(data, tmp_path / "run", eval_interval=5).has_plot
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_no_matplotlib_is_no_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not train(data, tmp_path / "run").has_plot
    assert not (tmp_path / "run" / "loss.png").exists()


# ---- settings ------------------------------------------------------------------------------------


def test_the_recipes_are_settings() -> None:
    recipes = list((Path(__file__).resolve().parents[2] / "gpt2c" / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        TrainSettings(**read_recipe(path))
        assert find_recipe(path.stem) == path


def test_a_setting_stands_in_its_table_or_in_none(tmp_path: Path) -> None:
    default = dataclasses.asdict(TrainSettings())
    recipe = tmp_path / "recipe.toml"
    tables = {"model": "n_layer = 3", "data": "batch_size = 2", "optimizer": "beta1 = 0.8"}
    tables |= {"schedule": 'schedule = "linear"', "run": "tensorboard = true"}
    assert tuple(tables) == TABLES
    recipe.write_text("seed = 5\n" + "".join(f"[{n}]\n{line}\n" for n, line in tables.items()))
    mixed = read_recipe(recipe)
    assert mixed == {
        "seed": 5, "n_layer": 3, "batch_size": 2, "beta1": 0.8, "schedule": "linear",
        "tensorboard": True,
    }  # fmt: skip
    recipe.write_text("seed = 5\n" + "\n".join(tables.values()))
    assert read_recipe(recipe) == mixed
    assert TrainSettings(**mixed) == TrainSettings(**(default | mixed))


def test_a_file_stands_before_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # as of gpt2c demo --out demo
    assert find_recipe("demo").parent.name == "recipes"
    Path("demo").rmdir()
    Path("demo").write_text("n_layer = 3")
    assert read_recipe(find_recipe("demo")) == {"n_layer": 3}
    with pytest.raises(
        FileNotFoundError, match=r"other: no such recipe; .* demo, shakespeare-char"
    ):
        find_recipe("other")


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({}, 400),
        ({"max_iters": 300}, 30),
        ({"max_iters": 3}, 0),
        ({"max_iters": 20_000}, 2000),
        ({"max_iters": 300, "warmup_iters": 200}, 200),
        ({"warmup_iters": 200}, 200),
    ],
)
def test_a_recipes_warm_up_keeps_its_share(given: dict[str, int], warmup: int) -> None:
    settings = TrainSettings(**recipe_settings("demo", given))
    assert settings.warmup_iters == warmup
    assert settings.max_iters == given.get("max_iters", 4000)


def test_a_recipe_that_names_no_warm_up_or_no_steps(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("n_layer = 3")
    assert recipe_settings(str(tmp_path / "a.toml"), {"max_iters": 50}) == {
        "n_layer": 3,
        "max_iters": 50,
    }
    (tmp_path / "a.toml").write_text("warmup_iters = 40")  # of 1,000
    found = recipe_settings(str(tmp_path / "a.toml"), {"max_iters": 50})
    assert found == {"warmup_iters": 2, "max_iters": 50}
    with pytest.raises(ValueError, match="max_iters must be at least 1, got 0"):
        recipe_settings("demo", {"max_iters": 0})


def test_train_with_the_demos_recipe_is_the_demos_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 400)
    monkeypatch.chdir(tmp_path)
    flags = "--max-iters 20 --n-layer 1 --n-head 2 --n-embd 8 --block-size 16 --eval-interval 0"
    assert main(f"demo --text text.txt --out demo {flags}".split()) == 0
    assert main(f"train --data demo/data --out run --config demo {flags}".split()) == 0
    runs = [json.loads(Path(out, "run.json").read_text()) for out in ("demo/run", "run")]
    assert runs[0] == runs[1] and runs[0]["settings"]["warmup_iters"] == 2


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"n_layer": "1"}, "n_layer must be int, got str '1'"),
        ({"n_layer": True}, "n_layer must be int, got bool True"),
        ({"n_layer": 1.0}, r"n_layer must be int, got float 1\.0"),
        ({"beta1": True}, "beta1 must be float, got bool"),
        ({"schedule": 1}, "schedule must be str, got int 1"),
        ({"schedule": "zigzag"}, "schedule must be one of"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"max_iters": -1}, "max_iters must be at least 1, got -1"),
        ({"log_interval": 0}, "log_interval must be at least 1, got 0"),
        ({"eval_interval": -1}, "eval_interval must be at least 0, got -1"),
        ({"save_interval": -1}, "save_interval must be at least 0, got -1"),
        ({"grad_clip": -0.5}, r"grad_clip must be at least 0, got -0\.5"),
        ({"grad_clip": math.nan}, "grad_clip must be at least 0, got nan"),
        ({"grad_clip": math.inf}, "grad_clip must be finite, got inf"),
        ({"gamma": math.nan}, "gamma must be finite, got nan"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"skip_nonfinite": 1}, "skip_nonfinite must be bool, got int 1"),
        (
            {"max_iters": 2**31},
            "max_iters must be a whole number from 1 to 2147483647, got 2147483648",
        ),
        ({"learning_rate": 10**400}, r"learning_rate is too large: a number of 1,329 bits"),
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
        ({"min_lr": 1.0}, "min_lr must be in"),
        ({"warmup_iters": -1}, "warmup_iters must be at least 0, got -1"),
        ({"decay_fraction": 0.0}, "decay_fraction must be in"),
        ({"gamma": 2.0}, "gamma must be in"),
        ({"step_size": 0}, "step_size must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted) as error:
        TrainSettings(**settings)
    assert "\n" not in str(error.value)


def test_a_whole_number_is_a_float_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("learning_rate = 1\n")
    value = TrainSettings(**read_recipe(recipe)).learning_rate
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"n_layer = = 1", "recipe.toml is not TOML: "),
        (b"n_layer = 1\nn_layer = 2", "recipe.toml is not TOML: "),
        (b"n_layer = '\xe9'", "recipe.toml is not UTF-8: byte 11 is 0xe9"),
        (b"n_layers = 1", r"recipe.toml: no setting 'n_layers'; did you mean n_layer\?"),
        (b"[model]\nn-layer = 1", r"recipe.toml: no setting 'n-layer'; did you mean n_layer\?"),
        (b"xyz = 1", "recipe.toml: no setting 'xyz'; the settings are backend, batch_order, "),
        (b"[model]\nn_layer = 'one'", "recipe.toml: n_layer must be int, got str 'one'"),
        (
            b"[modle]\nn_layer = 1",
            "no table 'modle'; the tables are model, data, optimizer, s",
        ),
        (b"model = 1", "recipe.toml: no setting 'model'"),
        (b"[data]\nn_layer = 1", r"recipe.toml: n_layer belongs in \[model\], not in \[data\]$"),
        (b"n_layer = 1\n[model]\nn_layer = 1", r"n_layer is there twice: in \[model\] and in no t"),
        (b"schedule = 'linear'\n[schedule]\ngamma = 0.1", "recipe.toml is not TOML: "),
        (b"[[model]]\nn_layer = 1", "recipe.toml: no setting 'model'"),
        (b"[model.n_layer]", r"recipe.toml: n_layer must be int, got dict \{\}"),
        (b"n_layer = 'one'", "recipe.toml: n_layer must be int, got str 'one'"),
        (b"n_layer = true", "recipe.toml: n_layer must be int, got bool True"),
        (b"n_layer = 1e3", r"recipe.toml: n_layer must be int, got float 1000\.0"),
        (b"n_layer = [1]", r"recipe.toml: n_layer must be int, got list \[1\]"),
        (b"n_layer = 1999-12-31", "recipe.toml: n_layer must be int, got date"),
        (b"tensorboard = 1", "recipe.toml: tensorboard must be bool, got int 1"),
        (b"beta1 = nan", "recipe.toml: beta1 must be finite, got nan"),
        (b"learning_rate = -inf", "recipe.toml: learning_rate must be finite, got -inf"),
        (b"learning_rate = 1" + b"0" * 400, "recipe.toml: learning_rate is too large"),
        (
            b"max_iters = 9223372036854775807",
            "recipe.toml: max_iters must be a whole number from 1 to 2147483647, got 92",
        ),
        (
            b"n_layer = 0x" + b"f" * 5000,
            "recipe.toml: n_layer is too large: a number of 20,000 bits",
        ),
        (b"n_layer = " + b"9" * 5000, "recipe.toml is not TOML: "),
        (b"n_layer = " + b"[" * 5000, "recipe.toml is not TOML: "),
        (b"#" * (1 << 21), "recipe.toml has 2,097,152 bytes"),
    ],
)
def test_a_recipe_that_is_none(tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(ValueError, match=wanted) as error:
        read_recipe(tmp_path / "recipe.toml")
    assert "\n" not in str(error.value)


def test_a_resumed_run_keeps_its_settings() -> None:
    stored = dataclasses.asdict(TrainSettings(n_layer=2, max_iters=10, seed=3))
    settings = resumed(stored, {"max_iters": 20, "n_layer": 2}, "runs/a")
    assert (settings.n_layer, settings.max_iters, settings.seed) == (2, 20, 3)
    with pytest.raises(
        ValueError, match="runs/a: the run was trained with n_layer=2, so it cannot go on"
    ):
        resumed(stored, {"n_layer": 3}, "runs/a")
    older = {name: value for name, value in stored.items() if name != "batch_order"}
    assert stored["batch_order"] == 2 and resumed(older, {}, "runs/a").batch_order == 1
    with pytest.raises(ValueError, match="trained with batch_order=1, so it cannot go on with 2"):
        resumed(older, {"batch_order": 2}, "runs/a")
    for strange, wanted in (
        ({}, "lack n_layer: put it back, or start a new run"),
        ({**stored, "dropout": 0.1}, "have 'dropout', which this version of gpt2c lacks: go on"),
        ([], r"must be an object, got \[\]"),
        (None, "must be an object, got None"),
    ):
        with pytest.raises(ValueError, match=f"runs/a: its settings {wanted}"):
            resumed(strange, {}, "runs/a")


def test_a_setting_that_a_run_lacks_is_that_of_its_time() -> None:
    then = {"batch_order": 1, "save_minutes": 0.0, "threads": 0}
    assert resumed(FIRST, {}, "runs/a") == TrainSettings(**FIRST, **then)
    assert resumed(FIRST, {"save_minutes": 5.0}, "runs/a").save_minutes == 5
    assert FIRST.keys() | OLDER.keys() == dataclasses.asdict(TrainSettings()).keys()
    for name in FIRST:
        lacking = {other: value for other, value in FIRST.items() if other != name}
        with pytest.raises(ValueError, match=f"lack {name}: put it back, or start a new run"):
            resumed(lacking, {}, "runs/a")
