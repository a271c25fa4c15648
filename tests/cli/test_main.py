"""The command line: each verb does its job, and a user's mistake prints one line."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import COMMAND, SPEED, TINY

from gpt2c.cli.main import main
from gpt2c.evaluate import scoring
from gpt2c.gpt2 import GPT2
from gpt2c.kernels.backend import backends
from gpt2c.text.shards import read_tokens, write_tokens
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.settings import TrainSettings

Capture = pytest.CaptureFixture[str]
TEXT = "<|endoftext|>".join(
    f"Document {n}. " + "the cat sat on the mat. " * (3 + n % 4) for n in range(30)
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a text, its tokens, a run, and broken copies of them."""
    path = tmp_path_factory.mktemp("world")
    text = path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    assert main(f"prepare {text} --out {path}/data --tokenizer bytes".split()) == 0
    assert main(f"train --data {path}/data --out {path}/run {TINY}".split()) == 0
    (path / "blank.txt").write_text(" \n")
    (path / "latin1.txt").write_bytes(b"caf\xe9")
    (path / "folder").mkdir()
    (path / "bad.toml").write_text("n_layer = = 1\n")
    (path / "huge.toml").write_text(f"learning_rate = {10**400}\n")

    shutil.copytree(path / "data", path / "truncated")
    for split in ("train.bin", "val.bin"):
        file = path / "truncated" / split
        file.write_bytes(file.read_bytes()[:-1])
    shutil.copytree(path / "data", path / "beyond")
    for split in ("train.bin", "val.bin"):
        write_tokens(path / "beyond" / split, np.arange(300))
    Tokenizer.train([TEXT], 260).save_pretrained(path / "bpe")
    for split in ("train.bin", "val.bin"):
        write_tokens(path / "bpe" / split, np.arange(200))

    weights = (path / "run" / "model.safetensors").read_bytes()
    config = json.loads((path / "run" / "config.json").read_text())
    for name in ("corrupt", "other", "weights", "notext", "damaged"):
        shutil.copytree(path / "run", path / name)
    (path / "corrupt" / "model.safetensors").write_bytes(weights[:-100])
    (path / "other" / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
    (path / "weights" / "run.json").unlink()
    (newest,) = (path / "damaged" / "checkpoints").iterdir()
    (newest / "model.safetensors").write_bytes(weights[:-100])
    (path / "notext" / "vocab.json").unlink()
    shutil.copytree(path / "run", path / "mixed")
    Tokenizer.train([TEXT], 260).save_pretrained(path / "mixed")
    return path


# ---- prepare, train ------------------------------------------------------------------------------


def test_train_and_eval_read_shards(gpt2c, world: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    prepare = f"prepare text.txt --out {data} --tokenizer bytes"
    assert gpt2c(f"{prepare} --shard-tokens 900")[0] == 0
    whole = np.concatenate([read_tokens(path) for path in sorted(data.glob("train_*.bin"))])
    assert np.array_equal(whole, read_tokens(world / "data" / "train.bin"))
    val = read_tokens(data / "val.bin")
    (data / "val.bin").unlink()
    (data / "manifest.json").unlink()  # it lists val.bin, and not the shards
    write_tokens(data / "val_000001.bin", val[:100])
    write_tokens(data / "val_000002.bin", val[100:])
    assert gpt2c(f"train --data {data} --out {run} {TINY}")[0] == 0
    model = GPT2.from_pretrained(run)
    nats, parts = 0.0, (val[:100], val[100:])
    for part in parts:
        for start in range(0, len(part) - 1, 16):
            x, y = part[start : min(start + 16, len(part) - 1)], part[start + 1 : start + 17]
            nats += model.loss([x], [y], keep=False) * len(y)
    code, out, _ = gpt2c(f"eval {run} --data {data}")
    assert code == 0 and f"loss {nats / (len(val) - 2):.4f} nats/token" in out
    strided = np.concatenate([scoring.token_logprobs(model, part, 8) for part in parts])
    code, out, _ = gpt2c(f"eval {run} --data {data} --stride 8")
    assert code == 0 and f"loss {-np.nanmean(strided):.4f} nats/token" in out
    last = sorted(data.glob("train_*.bin"))[-1]
    write_tokens(last, read_tokens(last)[::-1].copy())
    code, _, err = gpt2c(f"train --data {data} --out {run} --resume --max-iters 30")
    assert code == 2 and "does not hold the training and validation tokens" in err


def test_prepare_writes_token_files_and_tokenizer(gpt2c, world: Path, tmp_path: Path) -> None:
    code, out, err = gpt2c(
        f"prepare text.txt text.txt --out {tmp_path}/data --tokenizer bpe:270 --val-fraction 0.3"
    )
    assert (code, err) == (0, "")
    assert out.startswith("60 documents, 7.1 kB; ")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "data")
    assert f"vocabulary {tokenizer.vocab_size}\n" in out
    train, val = (read_tokens(tmp_path / "data" / f"{name}.bin") for name in ("train", "val"))
    assert f"{len(train):,} tokens to train, {len(val):,} to validate" in out
    assert 0.2 < len(val) / (len(train) + len(val)) < 0.35
    assert ("too little for 270 tokens" in out) == (tokenizer.vocab_size < 270)


def test_prepare_needs_no_network_and_no_tokenizer(gpt2c, tmp_path: Path) -> None:
    code, out, err = gpt2c(f"prepare text.txt --out {tmp_path}/data")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "data")
    assert (code, err) == (0, "") and 257 < tokenizer.vocab_size < 4096
    assert f"too small for 4,096 tokens: using {tokenizer.vocab_size}\n" in out


def test_prepare_reads_directories_jsonl_and_standard_input(
    gpt2c, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_bytes("今天天气很好。\r\n".encode("utf-8-sig") * 20)
    lines = [json.dumps({"text": f"document {n}. ", "n": n}) for n in range(30)]
    (folder / "more" / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = f"--out {tmp_path}/data --tokenizer bytes --overwrite"
    code, out, err = gpt2c(f"prepare {folder} {command}")
    assert (code, err) == (0, "")
    assert out.startswith(f"2 files, {folder}/a.txt to {folder}/more/b.jsonl\n31 documents, ")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "data")
    text = tokenizer.decode(read_tokens(tmp_path / "data" / "train.bin"))
    assert "今天天气很好。\n" in text and "\r" not in text and '"' not in text
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = gpt2c(f"prepare - --text-field text {command}")
    assert (code, err) == (0, "") and out.startswith("30 documents, ")
    code, out, err = gpt2c(f"prepare {folder}/more/b.jsonl --text-field n {command}")
    assert code == 2 and "line 1: 'n' must be a string, got int" in err


def test_prepare_takes_the_tokenizer_of_a_run(gpt2c, tmp_path: Path) -> None:
    assert gpt2c(f"prepare text.txt --out {tmp_path}/data --tokenizer run")[0] == 0
    own, run = Tokenizer.from_pretrained(tmp_path / "data"), Tokenizer.from_pretrained("run")
    assert own.fingerprint == run.fingerprint


@pytest.mark.parametrize(("size", "said"), [("258", False), ("999", True)])
def test_prepare_reports_a_vocabulary_smaller_than_asked(
    gpt2c, tmp_path: Path, size: str, said: bool
) -> None:
    (tmp_path / "text.txt").write_text("abababab\n" * 99, encoding="utf-8")
    code, out, _ = gpt2c(
        f"prepare {tmp_path}/text.txt --out {tmp_path}/data --tokenizer bpe:{size}"
    )
    got = Tokenizer.from_pretrained(tmp_path / "data").vocab_size
    assert code == 0 and (got < int(size)) == said
    assert (f"too small for {size} tokens: using {got}\n" in out) == said
    assert out.endswith(f"vocabulary {got}\n"), "the last line is for scripts"


def test_flags_override_the_recipe(gpt2c, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("n_layer = 2\nn_head = 2\nn_embd = 8\nblock_size = 8\nmax_iters = 2\n")
    run = f"train --data data --config {recipe} --n_embd 16 --n-layer 1 --save_interval=1"
    code, out, err = gpt2c(f"{run} --out {tmp_path}/run")
    assert (code, err) == (0, "")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [config[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")] == [
        1,
        2,
        16,
        8,
    ]
    assert re.search(r"2 steps in \d+ s, validation loss \d\.\d{4} nats/token\n$", out)


def test_every_setting_is_a_flag_with_help(gpt2c) -> None:
    code, out, _ = gpt2c("train --help")
    assert code == 0
    for flag in ("--n-layer INT", "--grad-clip FLOAT", "--schedule STR", "(cosine)", "--resume"):
        assert flag in out
    tables = TrainSettings.tables()
    heads = [out.index(f"\n[{table}]:\n") for table in tables] + [len(out)]
    for number, names in enumerate(tables.values()):
        for name in names:
            flag = out.index(f"\n  --{name.replace('_', '-')}")
            assert heads[number] < flag < heads[number + 1], name


# ---- version -------------------------------------------------------------------------------------


def test_version_flag_prints_the_version(gpt2c) -> None:
    assert gpt2c("--version") == (0, f"gpt2c {importlib.metadata.version('gpt2c')}\n", "")


# ---- the user's mistakes -------------------------------------------------------------------------

TRAIN = f"train --out new {TINY}"
# A row for each path from an error to its line; tests of the modules have the other errors.
MISTAKES = [
    ("prepare missing.txt --out new", r"missing\.txt does not exist"),
    ("prepare latin1.txt --out new", "is not UTF-8: byte 3 is 0xe9"),
    ("prepare folder --out new", r"folder has no text files \(\*\.txt, "),
    ("prepare text.txt --out new --tokenizer=", "the name of the tokenizer is empty"),
    ("prepare text.txt --out run --tokenizer bytes", "run exists and is not empty"),
    ("prepare text.txt --out text.txt --tokenizer bytes", r"text\.txt is a file"),
    ("prepare text.txt --out text.txt/new --tokenizer bytes", r"text\.txt/new: Not a directory"),
    ("prepare text.txt --out new --tokenizer abacus", "neither a directory nor one of gpt2, bytes"),
    ("prepare text.txt --out new --tokenizer folder", r"vocab\.json does not exist"),
    ("prepare text.txt --out new --tokenizer bpe:x", "must name a vocabulary size"),
    ("prepare text.txt --out new --tokenizer bpe:99999", "asks for too many tokens"),
    ("prepare text.txt --out new --tokenizer bytes --seed -1", "non-negative|at least 0"),
    (
        f"{TRAIN} --data missing",
        r"missing is not a directory of token files; gpt2c prepare makes one",
    ),
    (f"{TRAIN} --data text.txt", r"text\.txt is not a directory of token files"),
    (f"{TRAIN} --data truncated", r"truncated/train\.bin has \d+ bytes; its \d+ tokens need"),
    (f"{TRAIN} --data beyond", "holds token 299, outside a vocabulary of 257"),
    (f"{TRAIN} --data data --batch-size 1000", "too few for one batch of 1000 x 16"),
    (f"{TRAIN} --data data --seed -1", "seed must be at least 0, got -1"),
    (f"{TRAIN} --data data --backend abacus", f"'abacus'.*has {', '.join(backends())}"),
    (
        f"{TRAIN} --data data --n-embd 100000000",
        "not enough memory: training needs [0-9,]+ MB: weights .* are free: lower --n-layer",
    ),
    (f"{TRAIN} --data data --config folder", "folder: Is a directory"),
    (f"{TRAIN} --data data --config bad.toml", r"bad\.toml is not TOML"),
    ("train --data data --out new --config huge.toml", "too large"),
    (f"train --data data {TINY} --out run", "run exists and is not empty"),
    (f"train --data data {TINY} --out text.txt", r"text\.txt is a file"),
    ("train --data data --out new --resume", "new is not a directory"),
    (
        "train --data data --out folder --resume",
        r"run\.json does not exist: .*no run to resume",
    ),
    ("train --data data --out weights --resume", r"weights/run\.json does not exist"),
    (
        "train --data data --out damaged --resume",
        r"no checkpoint .*model\.safetensors has \d+ bytes",
    ),
    ("plot missing", r"missing is not a run: it has no metrics\.jsonl"),
    ("plot run --out missing/picture.png", "missing/"),
    ("train --data bpe --out run --resume", "another tokenizer"),
    ("train --data data --out run --resume --n-layer 2", "was trained with n_layer=1"),
    ("eval missing --data data", "the file or directory missing does not exist here"),
    ("eval text.txt --data data", r"text\.txt is not a directory"),
    ("eval folder --data data", r"config\.json does not exist"),
    ("eval run --data bpe", "do not belong together"),
    ("eval run --data data --batch-size 0", "--batch-size must be at least 1, got 0"),
    ("generate missing", "the file or directory missing does not exist here"),
    ("generate corrupt", "is not a whole safetensors file"),
    ("generate other", r"wte\.weight must be"),
    ("generate notext", r"vocab\.json does not exist"),
    ("generate run --top-k -1", "top_k must be at least 0"),
    ("generate run --max-new-tokens -1", "max_new_tokens must be at least 0"),
    ("generate run --num-samples 0", "--num-samples must be at least 1, got 0"),
    (
        "generate run --num-samples 1000000000",
        "not enough memory: reading 1,000,000,000 texts of 16 tokens",
    ),
    ("generate run --prompt a --prompt-file text.txt", "two starts of one text"),
    ("generate run --prompt-file missing.txt", r"missing\.txt does not exist"),
    ("generate run --show-probabilities --num-samples 2", "is for one text"),
    ("generate run --show-probabilities -3", "--show-probabilities must be at least 0, got -3"),
    ("generate run --interactive --prompt a", "--interactive asks for prompts"),
    ("generate run --interactive --num-samples 2", "--interactive asks for prompts"),
    (
        "generate run --prompt seventeen-letters",
        "the prompt is 17 tokens; this model's context is 16",
    ),
    ("generate run --stop= ", "stop must be strings of at least one character"),
    ("generate mixed", "do not belong together"),
    ("generate run --seed -1", "non-negative|at least 0"),
    ("demo --text folder --out new/sub", r"folder has no text files \(\*\.txt, "),
    ("demo --text text.txt --out run", "run exists and is not empty"),
    ("demo --text blank.txt --out new", "there is no text"),
    ("demo --text text.txt --out new --batch-size 9999 --n-embd 99999999 --n-head 1", "memory"),
]


def tree(root: Path) -> dict[Path, bytes | None]:
    """Return the content of every file, and every directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize(("arguments", "wanted"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_mistake_prints_one_line_and_writes_nothing(
    gpt2c, world: Path, arguments: str, wanted: str
) -> None:
    before = tree(world)
    code, out, err = gpt2c(arguments)
    assert code == 2
    assert err.startswith("gpt2c: ")
    assert (err.count("\n"), err[-1]) == (1, "\n")
    assert re.search(wanted, err), err
    assert out.strip() == ""
    assert tree(world) == before


@pytest.mark.parametrize("verb", ["prepare text.txt", "train --data data", "demo"])
def test_empty_path_is_refused(gpt2c, world: Path, verb: str) -> None:
    before = tree(world)
    code, _, err = gpt2c(f"{verb} --overwrite --out=")
    assert code == 2 and "--out: it is empty" in err
    assert tree(world) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "", "new.bin"],
        ["convert", "run", ""],
        ["convert", "bytes", "", "--overwrite"],
        ["generate", ""],
        ["eval", "", "--data", "data"],
        ["train", "--data", "data", "--out", "new", "--config", ""],
        ["prepare", "text.txt", "--out", "new", "--tokenizer", ""],
        ["tokens", "a text", "--tokenizer", ""],
        ["prepare", "", "--out", "new"],
    ],
)
def test_empty_name_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str]
) -> None:
    monkeypatch.chdir(world / "run")  # a directory that the empty name could mean
    (world / "run" / "text.txt").write_text("some text")
    before = tree(world)
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(" is empty: is a variable of the shell not set?\n")
    assert tree(world) == before


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "9" * 12])
def test_bad_number_of_threads_is_refused(
    gpt2c, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GPT2C_NUM_THREADS", value)
    code, _, err = gpt2c("eval run --data data")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("gpt2c: ")


@pytest.mark.parametrize(
    "arguments",
    [
        *("fly", "train", "tokens", "generate run --top-k x", "train --n-layer 1.5", "info now"),
        *("generate run --quantize int4", "generate run --stop", "generate run --num-samples two"),
    ],
)
def test_argparse_errors_print_usage(gpt2c, arguments: str) -> None:
    code, out, err = gpt2c(arguments)
    assert (code, out) == (2, "")
    assert "usage: gpt2c" in err


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ("genrate run", "; did you mean generate?"),
        ("clasify train", "; did you mean classify?"),
        ("classify predit", "; did you mean predict?"),
        ("generate run --quantize int88", "; did you mean int8?"),
        ("train --data x --out y --layers 2", "; did you mean --n-layer?"),
        ("fly", ""),
        ("demo --tokenizer bytes", ""),
    ],
)
def test_only_a_near_name_is_meant(gpt2c, arguments: str, near: str) -> None:
    err = gpt2c(arguments)[2]
    assert err.endswith(f"{near}\n") and ("did you mean" in err) == bool(near)


# ---- real processes ------------------------------------------------------------------------------


def test_process_writes_plain_lines(world: Path, tmp_path: Path) -> None:
    for arguments in (
        f"prepare text.txt --out {tmp_path}/data --tokenizer bytes",
        f"train --data {tmp_path}/data --out {tmp_path}/run {TINY} --log-interval 5",
        f"eval {tmp_path}/run --data {tmp_path}/data",
        f"generate {tmp_path}/run --prompt the --max-new-tokens 3",
    ):
        done = subprocess.run(
            [*COMMAND, *arguments.split()], capture_output=True, text=True, cwd=world
        )
        speed = SPEED if arguments.startswith("generate") else ""
        assert done.returncode == 0 and re.fullmatch(speed, done.stderr)
        assert done.stdout.endswith("\n")
        assert not re.search(r"[\r\x1b]", done.stdout)
        if arguments.startswith("train"):
            steps = re.findall(r"^step +(\d+)/20  loss ", done.stdout, re.MULTILINE)
            assert steps == ["5", "10", "15", "20"]


def test_process_prints_a_mistake_without_traceback(world: Path) -> None:
    done = subprocess.run([*COMMAND, "eval", "missing", "--data", "data"], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"gpt2c: the file or directory missing does not exist here")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "arguments",
    ["info", "generate run", "eval run --data data", f"train --data data --out OUT {TINY}"],
)
def test_closed_pipe_ends_a_verb_quietly(world: Path, tmp_path: Path, arguments: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments.replace("OUT", str(tmp_path / "run")).split()],
            stdout=writer,
            stderr=subprocess.PIPE,
            cwd=world,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(writer)
    assert done.stderr == b""


@pytest.mark.parametrize("columns", [100, 0])  # 0: a terminal that does not know its size
def test_terminal_has_a_bar(world: Path, tmp_path: Path, columns: int) -> None:
    termios = pytest.importorskip("termios")
    terminal, child_side = os.openpty()
    termios.tcsetwinsize(child_side, (24, columns))
    child = subprocess.Popen(
        [*COMMAND, *f"train --data data --out {tmp_path}/run {TINY}".split()],
        stdout=child_side,
        stderr=subprocess.PIPE,
        cwd=world,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"},
    )
    os.close(child_side)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # Linux's error when the child has closed its side
        pass
    os.close(terminal)
    assert child.communicate(timeout=60)[1] == b""
    assert child.returncode == 0
    text = shown.decode()
    assert re.search(r"\r20/20 \[.*\] loss \d.*tokens/s.* \|█+\|", text)
    assert "validation loss" in text
    assert "step 10/20" not in text


def test_error_is_one_line_for_any_file_name(gpt2c) -> None:
    name = "\x1b[2J\u202e" + 9999 * "x"
    code, out, err = gpt2c(f"train --data data --out new --config {name}")
    assert (code, out) == (2, "") and len(err) < 2100
    assert err.startswith(r"gpt2c: \x1b[2J\u202exxx") and err.endswith("xxx...\n")


@pytest.mark.skipif(backends()[0] == "numpy", reason="no kernels are built")
def test_threads_are_a_flag(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """0 is as many as the machine allows, as without the flag."""
    seen = []
    loaded = GPT2.from_found

    def load(*arguments: Any) -> GPT2:
        model = loaded(*arguments)
        seen.append(model.backend.threads)
        return model

    monkeypatch.setattr(GPT2, "from_found", load)
    monkeypatch.setattr("gpt2c.kernels.backend.default_threads", lambda: 2)
    shutil.copytree(world / "run", tmp_path / "run")
    for flag, threads in (("--threads 3", 3), ("--threads 0", 2), ("", 2)):
        train = f"train --data {world}/data --out {tmp_path}/new --overwrite {TINY} --max-iters 1"
        assert main(f"{train} {flag}".split()) == 0
        assert json.loads((tmp_path / "new" / "run.json").read_text())["threads"] == threads
        assert main(f"generate {tmp_path}/run --max-new-tokens 1 {flag}".split()) == 0
        assert main(f"eval {tmp_path}/run --data {world}/data {flag}".split()) == 0
        assert seen[-2:] == [threads, threads]
    capsys.readouterr()
    for verb in (f"generate {tmp_path}/run", f"eval {tmp_path}/run --data {world}/data"):
        assert main(f"{verb} --threads 9999".split()) == 2
        assert capsys.readouterr().err == "gpt2c: threads must be in [1, 1024], got 9999\n"
    assert main(f"{train} --threads -1".split()) == 2
    assert capsys.readouterr().err == "gpt2c: threads must be at least 0, got -1\n"
