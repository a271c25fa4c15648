"""The main job from text to text, and what it is measured against: xz and a bigram model."""

from __future__ import annotations

import lzma
import math
import re
import signal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpt2c.baselines import bigram_nats, bits_per_byte, xz_bits_per_byte
from gpt2c.cli import main
from gpt2c.demo import SAMPLES
from gpt2c.model import GPT2
from gpt2c.progress import Progress
from gpt2c.tokenfile import read_tokens
from gpt2c.tokenizer import Tokenizer
from gpt2c.train import evaluate

Capture = pytest.CaptureFixture[str]
ROW = re.compile(r"^(GPT-2, this run|bigram model|xz -9 after the rest) +([\d.]+)(?: +([\d.]+))?$")
TINY = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 16 --batch-size 4 --max-iters 3".split()


def rows(output: str) -> dict[str, list[float]]:
    """Read the table of the demo: name -> its figures."""
    found = (ROW.match(line) for line in output.splitlines())
    return {row[1]: [float(text) for text in row.groups()[1:] if text] for row in found if row}


# ---- the demo ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_main_job_on_pythons_documentation(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *TINY]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    lines = output.splitlines()
    assert lines[0] == "text        this Python's own documentation"
    assert lines[-1] == f'Go on with: gpt2c generate {out}/run --prompt "The string"'
    assert len(re.findall(r"^--- sample \d ---$", output, re.MULTILINE)) == SAMPLES == 3
    tokenizer = Tokenizer.from_pretrained(out / "run")
    assert tokenizer.vocab_size == 4096

    table = rows(output)
    assert list(table) == ["GPT-2, this run", "bigram model", "xz -9 after the rest"]
    tokens = read_tokens(out / "data" / "val.bin", 4096)
    loss = evaluate(GPT2.from_pretrained(out / "run"), [tokens], 128, 16, overlap=8)
    text = tokenizer.decode(tokens[tokens != tokenizer.eot]).encode()
    bits = loss * (len(tokens) - 1) / math.log(2) / len(text)
    assert table["GPT-2, this run"] == pytest.approx([loss, bits], abs=1e-3)
    assert 3 < table["bigram model"][0] < loss  # three steps have taught the model nothing
    assert 1 < table["xz -9 after the rest"][0] < 3

    assert main(["generate", str(out / "run"), "--prompt", "The string", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("The string")


def test_a_text_of_the_users(tmp_path: Path, capsys: Capture) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "demo"
    text.write_text("".join(f"{n} cats sat on {n * n} mats.\n" for n in range(400)))
    arguments = ["demo", "--text", str(text), "--out", str(out), *TINY]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"text        {text}\n")
    assert "1 of 0.01 MB; " in output
    assert "the tail, is held out for validation" in output
    assert len(rows(output)) == 3
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(
        "is not empty; name another directory or pass --overwrite\n"
    )
    assert main([*arguments, "--overwrite", "--max-iters", "2"]) == 0
    assert "2/2" in capsys.readouterr().out


def test_ctrl_c_names_the_command_that_goes_on(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "demo"
    text.write_text("The cat sat on the mat.\n" * 400)
    monkeypatch.setattr(Progress, "step", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(["demo", "--text", str(text), "--out", str(out), *TINY]) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    command = f"gpt2c train --data {out}/data --out {out}/run --resume"
    assert last == f"stopped and saved after step 1 of 3; go on with: {command}"
    monkeypatch.undo()
    assert main(command.split()[1:]) == 0
    assert ": 2 steps in " in capsys.readouterr().out


# ---- baselines -----------------------------------------------------------------------------------


def test_bits_per_byte() -> None:
    assert bits_per_byte(10 * 8 * math.log(2), 10) == pytest.approx(8)


def test_xz_knows_what_it_has_seen(rng: np.random.Generator) -> None:
    noise = rng.bytes(4000)
    assert xz_bits_per_byte(b"", noise) == pytest.approx(8, abs=0.2)
    assert xz_bits_per_byte(rng.bytes(4000), noise) == pytest.approx(8, abs=0.2)
    assert xz_bits_per_byte(noise, noise) < 0.2
    assert xz_bits_per_byte(noise[:2000], noise) == pytest.approx(4, abs=0.2)
    added = len(lzma.compress(b"a" * 99 + noise, preset=9)) - len(
        lzma.compress(b"a" * 99, preset=9)
    )
    assert xz_bits_per_byte(b"a" * 99, noise) == added * 8 / 4000


def bigram(history: list[int], V: int, k: int, a: int, b: int) -> Fraction:
    """Give p(b | a) by counting, exactly."""
    pairs = list(pairwise(history))
    prior = Fraction(history.count(b) + 1, len(history) + V)
    return (pairs.count((a, b)) + k * prior) / (history[:-1].count(a) + k)


def test_the_bigram_model_is_the_formula_by_hand(rng: np.random.Generator) -> None:
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
    """The tokens are uint16: a pair of large ones must not be taken for another."""
    history = rng.integers(60000, 65000, 3000).astype(np.uint16)
    seen, unseen = bigram_nats(history, history, 65536), bigram_nats(history, history[::-1], 65536)
    assert 0 < seen < unseen
