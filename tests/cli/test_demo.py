"""The demo, from a text to a model and its text; and its baselines, xz and a bigram model."""

from __future__ import annotations

import lzma
import math
import re
import shlex
import signal
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt2c.cli import demo
from gpt2c.cli.demo import SAMPLES, describe, openings
from gpt2c.cli.main import main
from gpt2c.evaluate import baselines
from gpt2c.evaluate.baselines import bigram_nats, xz_bits_per_byte
from gpt2c.screen.command import command
from gpt2c.screen.progress import Progress
from gpt2c.text.prepare import Prepared
from gpt2c.text.shards import read_tokens
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.directory import locked_run

Capture = pytest.CaptureFixture[str]
ROW = re.compile(
    r"^(GPT-2, this run|bigram model|xz -9 after training text) +([\d.]+)(?: +([\d.]+))?$"
)
TINY = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 16 --batch-size 4 --max-iters 3".split()


def rows(output: str) -> dict[str, list[float]]:
    """Return the demo's table: name -> figures."""
    found = (ROW.match(line) for line in output.splitlines())
    return {row[1]: [float(text) for text in row.groups()[1:] if text] for row in found if row}


# ---- the demo ------------------------------------------------------------------------------------


def follow(output: str, capsys: Capture) -> str:
    """Run the command in the demo's last line; return its prompt, with which its text begins."""
    _, line = output.splitlines()[-1].split("Go on with: ")
    words = shlex.split(line)
    assert words[:2] == ["gpt2c", "generate"] and words[-2] == "--prompt"
    assert main([*words[1:], "--seed", "1", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith(words[-1])
    return words[-1]


@pytest.mark.slow
def test_demo_on_the_python_documentation(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *TINY]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    lines = output.splitlines()
    assert lines[0] == "text        this Python's own documentation"
    tokenizer = Tokenizer.from_pretrained(out / "run")
    assert tokenizer.vocab_size == 4096
    assert (
        lines[3] == "loss        in nats per token: 0 if it was certain, 8.3 for a guess among all"
    )

    table = rows(output)
    assert list(table) == ["GPT-2, this run", "bigram model", "xz -9 after training text"]
    evaluate = next(line for line in lines if line.startswith("evaluate "))
    assert main([*shlex.split(evaluate)[2:], "--batch-size", "128"]) == 0
    figures = re.fullmatch(r"loss (\S+) nats/token .* byte (\S+)\n", capsys.readouterr().out)
    assert figures, "the command of the demo does not give figures"
    loss, bits = map(float, figures.groups())
    assert table["GPT-2, this run"] == pytest.approx([loss, bits], abs=1e-3)
    assert f"step 3: validation loss {loss:.4f} nats/token" in lines, "there are two losses"
    assert 3 < table["bigram model"][0] < loss  # three steps have taught the model nothing
    assert 1 < table["xz -9 after training text"][0] < 3
    of_training = re.search(r"that it was trained on, GPT-2's loss is (\d\.\d{3}):", output)
    assert of_training
    assert float(of_training[1]) == pytest.approx(loss, abs=0.2)  # the model knows no text yet

    assert len(follow(output, capsys).split()) == 3
    tokens = read_tokens(out / "data" / "val.bin", 4096)
    text = tokenizer.decode(tokens[tokens != tokenizer.eot])
    prompts = openings(tokenizer, tokens, 16)
    assert len(set(prompts)) == SAMPLES == 3
    for number, prompt in enumerate(prompts, start=1):
        assert prompt in text, "it does not stand in the held-out text"
        assert lines[lines.index(f"--- sample {number} ---") + 1].startswith(prompt)


def test_demo_on_a_text_of_the_user(tmp_path: Path, capsys: Capture) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "it's a demo"
    text.write_text("".join(f"{n} cats sat on {n * n} mats.\n" for n in range(400)))
    arguments = ["demo", "--text", str(text), "--out", str(out), *TINY]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"text        {text}\n")
    assert "1 of 11.0 kB; " in output
    assert "the last 10% is held out for validation" in output
    assert "warm-up" not in output
    assert ": not much lower, so it has learned next to nothing by heart.\n" in output
    assert len(rows(output)) == 3
    assert re.fullmatch(r"cats sat on", follow(output, capsys))
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(
        "is not empty; name another directory or pass --overwrite\n"
    )
    assert main([*arguments, "--overwrite", "--max-iters", "2"]) == 0
    assert "2/2" in capsys.readouterr().out


def test_demo_on_a_chinese_text(tmp_path: Path, capsys: Capture) -> None:
    text, out = tmp_path / "\u4e66.txt", tmp_path / "\u6a21\u578b"
    line = "\u4eca\u5929,\u5c0f\u660e\u5728\u516c\u56ed\u91cc\u770b\u4e66\u3002\n"
    text.write_text(line * 300, encoding="utf-8")
    assert main(["demo", "--text", str(text), "--out", str(out), *TINY]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert follow(output, capsys) == line[3:9]


def test_prompts_are_words_of_the_held_out_text() -> None:
    tokenizer = Tokenizer.from_name("bytes")

    def of(text: str, most: int = 64) -> list[str]:
        return openings(tokenizer, np.array(tokenizer.encode(text), np.uint16), most)

    lines = [f"# {word} one two three" for word in ("zero", "it's", "- 'a", "--b", "x_y")]
    assert of("\n".join(lines)) == ["zero one two", "s one two", "b one two"]
    assert of("too short\n", 64) == ["too", "too", "short"]
    assert of("$(reboot); `ls` \x1b[31m\n&&") == ["reboot", "ls", "31m"]
    assert of(" \n.;") == ["", "", ""]
    assert of("zero one two three", most=6) == ["zero o"] * 3
    assert of("\u5c0f\u660e\u5728\u516c\u56ed\u91cc\u770b\u4e66", most=7) == ["\u5c0f\u660e"] * 3


def test_sizes_have_a_fitting_unit() -> None:
    for size, shown in ((999, "999 bytes"), (2600, "2.6 kB"), (1_996_000, "2.00 MB")):
        sizes = {"train_bytes": size - size // 10, "val_bytes": size // 10, "vocab_size": 300}
        counts = dict.fromkeys(("documents", "train_documents", "val_documents"), 1)
        tokens = {"train_tokens": 9, "val_tokens": 1}
        prepared = Prepared(**sizes, **counts, **tokens, tail_held_out=True)
        assert describe(prepared) == f"{shown}; the last 10% is held out for validation"


def test_suggested_command_calls_the_program_as_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "gpt2c"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setattr("sys.orig_argv", ["python3", "-m", "gpt2c", "demo"])
    for argument, path, expected in (
        (str(program), str(program.parent), "gpt2c"),
        (str(program), str(tmp_path), str(program)),
        (".venv/bin/gpt2c", str(program.parent), ".venv/bin/gpt2c"),
        ("/somewhere/gpt2c/__main__.py", str(program.parent), "python3 -m gpt2c"),
        ("/somewhere/pytest", str(tmp_path), "gpt2c"),
    ):
        monkeypatch.setattr("sys.argv", [argument])
        monkeypatch.setenv("PATH", path)
        assert command("eval", Path("a b"), "it's") == f"{expected} eval 'a b' 'it'\"'\"'s'"


def everything(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Return the demo's arguments for a small text."""
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 400)
    return ["demo", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "demo"), *TINY]


def test_demo_keeps_no_data_of_too_few_tokens(
    tmp_path: Path, small: list[str], capsys: Capture
) -> None:
    assert main([*small, "--batch-size", "4000"]) == 2
    assert "too few for one batch" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("free", "flags", "wanted"),
    [
        (1000, [], "a checkpoint needs"),
        (1 << 60, ["--batch-size", "9999999"], "training needs"),
        (1 << 60, ["--backend", "abacus"], "abacus"),
        (1 << 60, ["--n-head", "5"], "n_embd"),
    ],
)
def test_demo_refuses_before_it_replaces_anything(
    tmp_path: Path,
    small: list[str],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    flags: list[str],
    wanted: str,
) -> None:
    assert main(small) == 0
    before = everything(tmp_path / "demo")
    disk = SimpleNamespace(total=1 << 60, free=free)
    monkeypatch.setattr("gpt2c.train.directory.shutil.disk_usage", lambda path: disk)
    (tmp_path / "text.txt").write_text("Another text is here.\n" * 400)
    capsys.readouterr()
    assert main([*small, "--overwrite", *flags]) == 2
    assert wanted in capsys.readouterr().err
    assert everything(tmp_path / "demo") == before


def test_demo_locks_the_run_from_before_the_text_to_the_end(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def is_held(call: Callable[..., Any]) -> None:
        with pytest.raises(BlockingIOError), locked_run(tmp_path / "demo" / "run"):
            pass
        tried.append(call.__name__)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **keywords: Any) -> Any:
            is_held(call)
            result = call(*arguments, **keywords)
            is_held(call)
            return result

        return attempt

    for name in ("prepare", "train"):
        monkeypatch.setattr(demo, name, watched(getattr(demo, name)))
    assert main(small) == 0
    assert tried == ["prepare", "prepare", "train", "train"]
    with locked_run(tmp_path / "demo" / "run"):
        pass


def test_demo_prints_how_to_resume_after_ctrl_c(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "demo"
    text.write_text("The cat sat on the mat.\n" * 400)
    monkeypatch.setattr(Progress, "step", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(["demo", "--text", str(text), "--out", str(out), *TINY]) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    command = f"gpt2c train --data {out}/data --out {out}/run --resume"
    assert last == f"stopped and saved after step 1 of 3; continue with: {command}"
    monkeypatch.undo()
    assert main(command.split()[1:]) == 0
    assert ": 2 steps in " in capsys.readouterr().out


# ---- baselines -----------------------------------------------------------------------------------


def test_xz_compresses_a_known_text_better(rng: np.random.Generator) -> None:
    noise = rng.bytes(4000)
    assert xz_bits_per_byte([], [noise]) == pytest.approx(8, abs=0.2)
    assert xz_bits_per_byte([rng.bytes(4000)], [noise]) == pytest.approx(8, abs=0.2)
    assert xz_bits_per_byte([noise], [noise]) < 0.2
    assert xz_bits_per_byte([noise[:2000]], [noise]) == pytest.approx(4, abs=0.2)
    added = len(lzma.compress(b"a" * 99 + noise, preset=9)) - len(
        lzma.compress(b"a" * 99, preset=9)
    )
    assert xz_bits_per_byte([b"a" * 99], [noise]) == added * 8 / 4000
    assert xz_bits_per_byte([b"a"] * 99, [noise[:7], noise[7:]]) == added * 8 / 4000


def bigram(history: list[int], V: int, k: int, a: int, b: int) -> Fraction:
    """Return p(b | a), exactly, by counting."""
    pairs = list(pairwise(history))
    prior = Fraction(history.count(b) + 1, len(history) + V)
    return (pairs.count((a, b)) + k * prior) / (history[:-1].count(a) + k)


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_bigram_model_is_the_formula_by_hand(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(baselines, "BLOCK", block)
    V, history = 5, [0, 1, 0, 1, 0, 2, 3, 0, 1, 1]  # 4 never occurs
    for k in (2, 50):
        for a in range(V):
            assert sum(bigram(history, V, k, a, b) for b in range(V)) == 1
    assert bigram(history, V, 2, 0, 1) == (3 + 2 * Fraction(5, 15)) / (4 + 2)
    for tokens in ([0, 1], [1, 4], [4, 4], [0, 1, 0, 4, 3, 2], list(rng.integers(0, V, 50))):
        expected = min(
            -sum(math.log(bigram(history, V, k, *pair)) for pair in pairwise(tokens))
            for k in (2, 5, 10, 20, 50, 100, 200)
        )
        nats = bigram_nats(np.array(history, np.uint16), np.array(tokens, np.uint16), V)
        assert nats == pytest.approx(expected, rel=1e-12)


def test_bigram_pairs_do_not_overflow(rng: np.random.Generator) -> None:
    """Tokens are uint16: a pair of large tokens must not be taken for another pair."""
    history = rng.integers(60000, 65000, 3000).astype(np.uint16)
    seen, unseen = bigram_nats(history, history, 65536), bigram_nats(history, history[::-1], 65536)
    assert 0 < seen < unseen
