"""Training: the loss falls, a seed fixes every bit, and a resumed run equals a whole one."""

from __future__ import annotations

import functools
import json
import math
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOCUMENTS
from helpers.kills import TINY, same
from helpers.runs import FIRST, checkpoint_names, files_below, train

import gpt2c
from gpt2c import GPT2, Dropout
from gpt2c.cli.main import main
from gpt2c.kernels.backend import backends
from gpt2c.kernels.busy import BusyCores
from gpt2c.text.prepare import prepare
from gpt2c.train import pretrain
from gpt2c.train.metrics import read_metrics
from gpt2c.train.optimizer import SCHEDULES, AdamW

FILES = (
    *("model.safetensors", "config.json", "generation_config.json"),
    *("vocab.json", "merges.txt"),
)

pytestmark = pytest.mark.usefixtures("no_picture")


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the entries of metrics.jsonl, without those that depend on time."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "loss", "learning_rate", "grad_norm", "val_loss")
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


def nothing_half_written(out: Path) -> None:
    known = {
        *FILES,
        "tokenizer_config.json",
        "metrics.jsonl",
        "loss.png",
        "run.json",
        "result.json",
    }
    assert {path.name for path in out.iterdir()} <= known | {"checkpoints"}
    assert all(path.name.isdecimal() for path in (out / "checkpoints").glob("*"))


# ---- learning ------------------------------------------------------------------------------------


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", max_iters=60, eval_interval=30)
    entries = metrics(tmp_path / "run")
    assert [entry["step"] for entry in entries] == list(range(1, 61))
    assert entries[0]["loss"] == pytest.approx(math.log(257), abs=0.1)  # an untrained model
    assert entries[-1]["loss"] < 3.5
    evaluated = {entry["step"]: entry["val_loss"] for entry in entries if "val_loss" in entry}
    assert list(evaluated) == [30, 60]
    assert result.val_loss == evaluated[60] < evaluated[30]
    assert (result.step, result.max_iters, result.interrupted) == (60, 60, False)
    nothing_half_written(tmp_path / "run")


def test_seed_fixes_every_bit(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(data, tmp_path / name, seed=seed, eval_interval=7)
    same(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a")[0]["loss"] != metrics(tmp_path / "c")[0]["loss"]


def test_bad_setting_makes_no_directory(data: Path, tmp_path: Path) -> None:
    for changes in ({"backend": "abacus"}, {"n_head": 3}, {"batch_size": 10**6}, {"beta1": 1.5}):
        with pytest.raises(ValueError):
            train(data, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_accumulated_batches_are_one_big_batch(data: Path, tmp_path: Path, dropout: float) -> None:
    given: dict[str, Any] = {"dropout": dropout, "max_iters": 10}
    train(data, tmp_path / "big", batch_size=8, **given)
    train(data, tmp_path / "small", batch_size=2, gradient_accumulation_steps=4, **given)
    big, small = metrics(tmp_path / "big"), metrics(tmp_path / "small")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [entry[name] for entry in big], [entry[name] for entry in small], rtol=1e-4
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_run_follows_its_schedule(data: Path, tmp_path: Path, schedule: str) -> None:
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


def test_warmup_is_cut_to_the_length_of_the_run(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", max_iters=5, warmup_iters=100)
    assert metrics(tmp_path / "run")[-1]["learning_rate"] == pytest.approx(1e-2)


def test_diverging_run_names_the_learning_rate(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss is nan at step 2, .*lower the learning rate"):
        train(data, tmp_path / "run", learning_rate=1e30)


def test_run_passes_its_settings_to_adamw(
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


# ---- stop and resume -----------------------------------------------------------------------------


def test_resume_after_a_power_cut_gives_the_uninterrupted_run(
    data: Path, whole: Path, tmp_path: Path, cut: Any
) -> None:
    out = cut(data, tmp_path / "run", 14, save_interval=5)
    assert len(metrics(out)) == 13
    assert checkpoint_names(out) == ["00000010"]
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 14, "lo')  # the cut came in the middle of a line
    assert train(data, out, resume=True).step == 20
    same(out, whole)
    nothing_half_written(out)


def test_resumed_run_with_dropout_has_the_masks_of_a_whole_one(
    data: Path, tmp_path: Path, cut: Any
) -> None:
    given: dict[str, Any] = {"dropout": 0.3, "gradient_accumulation_steps": 2, "save_interval": 5}
    train(data, tmp_path / "whole", **given)
    out = cut(data, tmp_path / "run", 14, **given)
    assert train(data, out, resume=True).step == 20
    same(out, tmp_path / "whole")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_run_in_16_bits_equals_a_whole_one(
    precision: str,
    data: Path,
    tmp_path: Path,
    whole: Path,
    cut: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {"precision": precision, "save_interval": 5}
    train(data, tmp_path / "uncut", **given)
    assert f", products in {precision}" in capsys.readouterr().out
    out = cut(data, tmp_path / "run", 14, **given)
    assert train(data, out, resume=True).step == 20
    same(out, tmp_path / "uncut")
    losses = [[entry["loss"] for entry in metrics(run)] for run in (out, whole)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert json.loads((out / "run.json").read_text())["precision"] == precision


@pytest.mark.skipif("base" not in backends(), reason="no kernels here")
def test_slow_precision_is_said_with_who_is_fast(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data, tmp_path / "run", backend="base", precision="fp16", max_iters=1)
    own = "avx512fp16" in backends()
    who = "--backend avx512fp16 has" if own else "this CPU has no"
    assert f"products in fp16 (slow: {who} instructions for them)" in capsys.readouterr().out


def test_resumed_run_keeps_what_auto_was(data: Path, tmp_path: Path, cut: Any) -> None:
    """Measured again, it could be another precision, and the bits would be others."""
    out = cut(data, tmp_path / "run", 14, precision="auto", save_interval=5)
    file = out / "run.json"
    record = json.loads(file.read_text())
    other = "bf16" if record["precision"] == "fp32" else "fp32"
    file.write_text(json.dumps(record | {"precision": other}))
    train(data, out, resume=True)
    assert json.loads(file.read_text())["precision"] == other


def test_evaluation_has_no_dropout(data: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly 0, the weights stay: only the masks make a difference."""
    given: dict[str, Any] = {"learning_rate": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        train(data, tmp_path / name, dropout=dropout, max_iters=4, eval_interval=2, **given)
    dropped, plain = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert [e.get("val_loss") for e in dropped] == [e.get("val_loss") for e in plain]
    assert all(a["loss"] != b["loss"] for a, b in zip(dropped, plain, strict=True))


def test_each_step_has_masks_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, seen = GPT2.loss, []

    def watched(model: GPT2, *batch: Any, **given: Any) -> float:
        seen.append(given.get("dropout"))
        return loss(model, *batch, **given)

    monkeypatch.setattr(GPT2, "loss", watched)
    train(data, tmp_path, dropout=0.5, max_iters=3, gradient_accumulation_steps=2, seed=9)
    rows = TINY["batch_size"] * TINY["block_size"]
    steps = [Dropout(0.5, 9 << 32 | step, row) for step in range(3) for row in (0, rows)]
    assert seen[:6] == steps and len(seen) > 6
    assert not any(seen[6:])  # the evaluation


def test_training_in_a_thread_gives_the_same_bits(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    thread = threading.Thread(target=train, args=(data, out), kwargs={"save_interval": 5})
    thread.start()
    thread.join()
    same(out, whole)


def test_peak_is_measured_again_when_a_step_exceeds_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If other programs kept the machine busy at the start, the first figure is too low."""
    peaks = iter([1.0, 1e18])
    measure = functools.cache(lambda *_: next(peaks))
    monkeypatch.setattr("gpt2c.train.hooks.fma_peak", measure)
    train(data, tmp_path, max_iters=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("share_of_peak") for line in lines]
    assert shares[0] is None and all(share < 1 for share in shares[1:]) and len(shares) == 3


@pytest.mark.parametrize(("peak", "is_shown"), [(1.0, False), (1e13, True)])
def test_progress_lines_leave_out_a_share_of_peak_above_1(
    peak: float,
    is_shown: bool,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = functools.cache(lambda *_: peak)
    monkeypatch.setattr("gpt2c.train.hooks.fma_peak", measure)
    train(data, tmp_path, max_iters=2, log_interval=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert ["% of peak" in line for line in lines] == [is_shown] * 2


def test_run_of_the_first_version_resumes_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Its run.json lacks later settings, and its batches have their own order."""
    whole, parts, new = tmp_path / "whole", tmp_path / "parts", tmp_path / "new"
    then = {"batch_order": 1, "save_minutes": 0.0, "threads": 0, "dropout": 0.0}
    pretrain.train(data, whole, FIRST | then | {"max_iters": 6})
    pretrain.train(data, parts, FIRST | then)
    record = json.loads((parts / "run.json").read_text(encoding="utf-8"))
    record["settings"] = FIRST
    (parts / "run.json").write_text(json.dumps(record), encoding="utf-8")
    train(data, parts, resume=True, max_iters=6)
    pretrain.train(data, new, FIRST | {"max_iters": 6})
    kept = [(metrics(out), (out / "model.safetensors").read_bytes()) for out in (whole, parts, new)]
    del kept[1][0][2]["val_loss"]  # step 3 was its last once
    assert kept[0] == kept[1] != kept[2]


def test_llama_is_trained_resumed_and_opened(data: Path, tmp_path: Path) -> None:
    kind = {"arch": "llama", "n_kv_head": 1, "dropout": 0.1, "schedule": "constant"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train(data, whole, **kind)
    losses = [entry["loss"] for entry in metrics(whole)]
    assert losses[-1] < 0.9 * losses[0] and math.isfinite(result.val_loss)
    train(data, parts, max_iters=7, **kind)
    train(data, parts, resume=True, max_iters=20)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    model = gpt2c.from_pretrained(whole)
    assert isinstance(model, gpt2c.Llama) and model.config.num_key_value_heads == 1
    assert model.generate([[1, 2]], 3, temperature=0).shape == (1, 5)
    with pytest.raises(ValueError, match="trained with arch=llama, so it cannot continue with"):
        train(data, whole, resume=True, arch="gpt2")


def test_resume_refuses_another_model_or_tokenizer(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    prepare(DOCUMENTS, tmp_path / "own", "bpe:270")
    prepare([text.replace("cat", "dog") for text in DOCUMENTS], tmp_path / "same size", "bpe:270")
    train(tmp_path / "own", out, max_iters=3)
    files = files_below(out)
    for changes, wanted in (
        ({"n_embd": 32}, r"was trained with n_embd=16, so it cannot continue with 32; drop that"),
        ({"seed": 5}, r"was trained with seed=1337"),
    ):
        with pytest.raises(ValueError, match=wanted):
            train(tmp_path / "own", out, resume=True, **changes)
    for other in (data, tmp_path / "same size"):
        with pytest.raises(ValueError, match=r"has another tokenizer than the run [^\n]*$"):
            train(other, out, resume=True)
    assert files_below(out) == files
    (out / "run.json").write_text(
        (out / "run.json").read_text().replace('"n_positions": 16', '"n_positions": 8')
    )
    said = "holds a model of another config: its n_positions is 8, and what the run is given now"
    with pytest.raises(ValueError, match=f"{said} makes it 16$"):
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


def test_resume_takes_the_same_tokenizer_in_other_files(data: Path, tmp_path: Path) -> None:
    """Other white space, and tokenizer.json in place of the two files."""
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


def test_result_is_kept_for_scripts(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for given in ({"max_iters": 2, "eval_iters": 0}, {"resume": True, "max_iters": 4}):
        done = train(data, out, **given)
        assert json.loads((out / "result.json").read_text()) == {
            "verb": "train",
            "versions": {"gpt2c": gpt2c.__version__},
            "out": str(out),
            "step": given["max_iters"],
            "max_iters": given["max_iters"],
            "skipped": 0,
            "seconds": done.seconds,
            "interrupted": False,
            "after": {"val_loss": done.val_loss},
        }
    (out / "result.json").unlink()
    (out / "result.json").mkdir()  # it cannot be written, and the run does not fail for it
    assert train(data, out, resume=True, max_iters=5).step == 5


def test_resume_and_overwrite_exclude_each_other(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", max_iters=2)
    files = files_below(tmp_path / "run")
    with pytest.raises(ValueError, match=r"--resume .* and --overwrite .*: pass one of them$"):
        train(data, tmp_path / "run", resume=True, overwrite=True)
    assert files_below(tmp_path / "run") == files


def test_finished_run_without_an_evaluation_prints_no_loss(
    data: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    at_step(7, lambda: signal.raise_signal(signal.SIGINT))
    assert train(data, out, eval_interval=3).step == 7
    capsys.readouterr()
    command = ["train", "--data", str(data), "--out", str(out), "--resume", "--max-iters", "7"]
    assert main(command) == 0
    line = f"{out}: is already finished after 7 steps: raise --max-iters to train further\n"
    assert capsys.readouterr().out == line


# ---- the lines of progress -----------------------------------------------------------------------


def test_progress_lines_show_means_since_the_last_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data, tmp_path / "run", max_iters=8, log_interval=3)
    lines = [x for x in capsys.readouterr().out.splitlines() if " tokens/s" in x]
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for line, (first, last) in zip(lines, ((0, 3), (3, 6), (6, 8)), strict=True):
        loss = math.fsum(entry["loss"] for entry in entries[first:last]) / (last - first)
        assert line.startswith(f"step {last}/8  loss {loss:.3f}  ")
        speed = float(line.split("  ")[2].removesuffix(" tokens/s").replace(",", ""))
        seconds = math.fsum(64 / entry["tokens_per_second"] for entry in entries[first:last])
        assert speed == pytest.approx(64 * (last - first) / seconds, abs=1)
        assert line.endswith(" left") == (last < 8)


def test_run_reports_busy_cores_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BusyCores, "others", lambda self: 1.25)
    train(data, tmp_path / "run")
    assert capsys.readouterr().out.count("other programs use 1.2 of the ") == 1


# ---- the directory -------------------------------------------------------------------------------


def test_train_refuses_a_directory_that_is_not_empty(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    files = files_below(whole)
    with pytest.raises(FileExistsError, match="is not empty; name another directory or pass"):
        train(data, whole)
    assert files_below(whole) == files
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        train(data, tmp_path / "file")


def test_overwrite_replaces_a_run(data: Path, tmp_path: Path, cut: Any) -> None:
    old, fresh = tmp_path / "old", tmp_path / "fresh"
    train(data, old, seed=5)
    train(data, fresh)
    train(data, old, overwrite=True)
    same(old, fresh)
    cut(data, old, 3, overwrite=True)
    train(data, old, resume=True)  # it resumes the new run, and not the overwritten one
    same(old, fresh)


# ---- the picture ---------------------------------------------------------------------------------


def test_run_draws_its_loss(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    assert train(data, tmp_path / "run", eval_interval=5).has_plot
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_run_succeeds_without_matplotlib(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not train(data, tmp_path / "run").has_plot
    assert not (tmp_path / "run" / "loss.png").exists()


# ---- the demo ------------------------------------------------------------------------------------


def test_train_with_the_demo_recipe_equals_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 400)
    monkeypatch.chdir(tmp_path)
    flags = "--max-iters 20 --n-layer 1 --n-head 2 --n-embd 8 --block-size 16 --eval-interval 0"
    assert main(f"demo --text text.txt --out demo {flags}".split()) == 0
    assert main(f"train --data demo/data --out run --config demo {flags}".split()) == 0
    runs = [json.loads(Path(out, "run.json").read_text()) for out in ("demo/run", "run")]
    assert runs[0] == runs[1] and runs[0]["settings"]["warmup_iters"] == 2
