"""Bad numbers and bad files: every numeric flag of every verb, taken from the parser.

Whatever a user types, gpt2c answers with an exit code and one line, never with a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import READERS, TEXT, limits
from helpers.runs import files_below

import gpt2c
import gpt2c.train.loop
from gpt2c.cli import bench as cli_bench
from gpt2c.cli.main import main, parser

SETTINGS = (
    "--n-layer=1 --n-head=2 --n-embd=4 --block-size=8 --batch-size=2 --max-iters=1 --backend=base"
)
# A call of each verb that takes no time; flags come after it.
CALLS = {
    "demo": f"demo --text text.txt --out out --overwrite {SETTINGS}",
    "prepare": "prepare text.txt --out out --overwrite --tokenizer bytes",
    "train": f"train --data data --out out --overwrite {SETTINGS}",
    "eval": "eval run --data data",
    "generate": "generate run --prompt a --max-new-tokens 1 --seed 1",
    "chat": "chat run",
    "classify train": "classify train run labels.csv --out out --overwrite --max-iters=1",
    "sft": "sft run answers.csv --out out --overwrite --max-iters=1",
    "reward": "reward run pairs.csv --out out --overwrite --max-iters=1",
    "dpo": "dpo run pairs.csv --out out --overwrite --max-iters=1",
    "classify eval": "classify eval classifier labels.csv",
    "classify predict": "classify predict classifier labels.csv",
    "distill": "distill run data --out out --overwrite --max-iters=1 --n-layer=1",
    "prune": "prune run data --out pruned --mlp=0.5",
    "grpo": "grpo run prompts.csv --out out --overwrite --max-iters=1 --reward regex:a"
    " --num-generations=2 --max-completion-length=2 --batch-size=1 --least-pass=0",
    "bench": "bench train --shape 1x8 --backends numpy",
}
# Flags whose large numbers ask for long work, which a user may want and interrupt.
LONG = {"max_iters", "gradient_accumulation_steps", "max_new_tokens", "num_samples", "batch_size"}
VALUES = [
    *("nan", "-nan", "inf", "-inf", "1e999", "-1e999", "1e-999", "1e308", "-0", "0", "-1", "0.5"),
    *(str(2**31 - 1), str(2**31), str(2**53 + 1), str(2**63 - 1), str(2**63), str(-(2**63))),
    *(str(2**64), "9" * 400, "9" * 5000, "", " ", "1_0", "٣", "0x10", "1,5", "None", "1e3", "\x1b"),
]
FEW = ["nan", "1e999", "1e308", str(2**63), ""]  # for settings that are those of train
SOME = [*FEW, "-1", "0", "-0", "1e-999"]  # for a method's own: declared as those of train are


def numeric_flags(options: argparse.ArgumentParser, verb: str = "") -> Iterator[tuple[str, str]]:
    """Return (verb, flag) of every flag that takes a number; a verb may have two words."""
    own = [action for action in options._actions if action.type in (int, float)]
    for action in own:
        yield verb, action.option_strings[0]
    for action in [] if own else options._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from numeric_flags(inner, f"{verb} {name}".strip())


FLAGS = sorted(set(numeric_flags(parser())))
SHARED = {flag for verb, flag in FLAGS if verb == "sft"}  # by all methods of fine-tuning
FLAGS = [
    (verb, flag)
    for verb, flag in FLAGS
    if verb not in ("reward", "dpo", "grpo", "distill") or flag not in SHARED
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a text, its tokens and a run."""
    path = tmp_path_factory.mktemp("world")
    READERS["run"].make(path)
    shutil.copytree(path / "run", path / "classifier")
    labels = {"num_labels": 2, "id2label": ("a", "b")}
    config = dataclasses.replace(gpt2c.from_pretrained(path / "run").config, **labels)
    gpt2c.GPT2(config, backend="numpy").save_pretrained(path / "classifier")
    rows = [f"{word},{word[0]}" for word in ("ant", "bee", "asp", "bat", "ape", "boa") * 2]
    (path / "labels.csv").write_text("text,label\n" + "\n".join(rows))
    (path / "answers.csv").write_text("prompt,completion\na,b\nc,d\ne,f\n")
    (path / "prompts.csv").write_text("prompt\na\nb\nc\n")
    (path / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\nd,e,f\ng,h,i\n")
    (path / "text.txt").write_text("<|endoftext|>".join(f"{n} {TEXT}" for n in range(40)))
    return path


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the world; draw nothing and measure nothing."""

    def measured(threads: int) -> None:
        raise ValueError("the benchmark would begin")

    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(gpt2c.train.loop, "plot_loss", lambda *_: False)
    monkeypatch.setattr(cli_bench, "measure_ceilings", measured)


@contextmanager
def interrupted() -> Iterator[None]:
    """Press Ctrl-C after every half second of work."""

    def press(signum: int, frame: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGVTALRM, press)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.5, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_every_verb_with_a_number_is_tested() -> None:
    assert {verb for verb, _ in FLAGS} == CALLS.keys()


@pytest.mark.parametrize(("verb", "flag"), FLAGS, ids=lambda part: part)
def test_bad_numbers_are_refused(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = flag.lstrip("-").replace("-", "_")
    few = {"demo": FEW, "classify train": FEW, "distill": FEW}
    few |= dict.fromkeys(("sft", "reward", "dpo", "grpo", "chat"), SOME)
    for value in few.get(verb, VALUES):
        try:
            with limits(60), interrupted() if name in LONG else nullcontext():
                code = main([*CALLS[verb].split(), f"{flag}={value}"])
        except SystemExit as stop:  # argparse's
            code = stop.code
        except KeyboardInterrupt:  # it was finished already
            code = 130
        _, err = capsys.readouterr()
        assert code in ((0, 2, 130) if name in LONG else (0, 2)), (value, err)
        if code == 2:
            last = err.splitlines()[-1]  # argparse shows the usage before it
            assert re.match(rf"gpt2c(: | {verb}( train)?: error: )", last) and last.isprintable()


@pytest.mark.parametrize(
    "call",
    [
        "train --data data --out data",
        "train --data out/data --out out",
        "sft run out/reference.jsonl --out out",
        "sft out/run answers.csv --out out",
        "dpo run out/reference.jsonl --out out",
        "reward run out/reference.jsonl --out out",
        "grpo run out/reference.jsonl --out out --reward regex:a",
        "classify train run out/reference.jsonl --out out",
        "classify train out/fold-2 labels.csv --out out --folds 2",
        "distill out data --out out --n-layer 1",
        "distill run data --student out/run --out out",
        "distill run out/data --student run --out out",
        "prepare out/vocab.json --out out --tokenizer bytes",
        "demo --text out/data/vocab.json --out out",
        "demo --text out/run/merges.txt --out out",
        "convert out/run/model.safetensors out/run",
    ],
)
def test_what_is_read_is_not_replaced(
    call: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("answers.csv", "labels.csv"):
        shutil.copy(world / name, name)
    for name in ("data", "run", "out/data", "out/run", "out/fold-2"):
        shutil.copytree(world / name.split("/")[-1].replace("fold-2", "run"), name)
    Path("out/reference.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "text": "a", "label":'
        ' "x"}\n'
    )
    Path("out/vocab.json").write_text(TEXT * 40)
    Path("out/data/vocab.json").write_text(TEXT * 40)
    before = files_below(tmp_path)
    assert main([*call.split(), "--overwrite"]) == 2
    assert "its content would be replaced: name another directory" in capsys.readouterr().err
    assert files_below(tmp_path) == before


# ---- bad files -----------------------------------------------------------------------------------

BAD_FILES = [  # a verb, the bad file, its content, the message
    ("train --data bad --out out --overwrite", "bad/train.bin", b"\0" * 2000, "train.bin"),
    ("train --data bad --out out --overwrite", "bad/vocab.json", b"{}", "vocab.json"),
    ("train --data bad --out out --overwrite", "bad/merges.txt", b"\xff", "merges.txt"),
    ("train --data data --out out --config bad.toml", "bad.toml", b"seed = [[[[", "bad.toml"),
    ("eval bad --data data", "bad/config.json", b'{"n_head": NaN}', "config.json"),
    ("eval bad --data data", "bad/model.safetensors", b"\xff" * 99, "model.safetensors"),
    ("eval run --choices bad.jsonl", "bad.jsonl", b"[]", "bad.jsonl"),
    ("generate bad", "bad/config.json", b"", "config.json"),
    ("generate bad --quantize int8", "bad/model.safetensors", b"PK\3\4" * 99, "model.safetensors"),
    ("generate bad", "bad/vocab.json", b'{"a": 0, "a": 1}', "vocab.json"),
    ("chat bad", "bad/chat_template.jinja", b"\xff", "chat_template.jinja"),
    ("prepare bad.txt --out out --overwrite --tokenizer bytes", "bad.txt", b"\xff", "bad.txt"),
    (
        "prepare text.txt --out out --overwrite --tokenizer bad",
        "bad/vocab.json",
        b"1",
        "vocab.json",
    ),
    ("demo --text bad.txt --out out --overwrite", "bad.txt", b"", "bad.txt"),
]


@pytest.fixture
def bad_file(world: Path) -> Callable[[str, bytes], None]:
    """Return a function that puts a bad file into the world, beside good ones if in a directory."""

    def put(name: str, content: bytes) -> None:
        shutil.rmtree("bad", ignore_errors=True)
        shutil.copytree("run", "bad")
        shutil.copytree("data", "bad", dirs_exist_ok=True)
        Path(name).write_bytes(content)

    return put


@pytest.mark.parametrize(("call", "name", "content", "said"), BAD_FILES, ids=lambda part: None)
def test_bad_files_are_refused(
    call: str, name: str, content: bytes, said: str, bad_file: Any, capsys: Any
) -> None:
    bad_file(name, content)
    assert main(call.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("gpt2c: ") and said in err
    assert err.count("\n") == 1 and not out


@pytest.mark.parametrize("call", ["generate bad", "eval bad --data data"])
def test_process_refuses_bad_files(call: str, bad_file: Any) -> None:
    bad_file("bad/model.safetensors", (2**63).to_bytes(8, "little"))
    command = [sys.executable, "-W", "error", "-m", "gpt2c", *call.split()]
    path = os.pathsep.join(os.path.abspath(part) for part in sys.path if part)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("gpt2c: ") and "model.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1
