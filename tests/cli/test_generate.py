"""gpt2c generate: its flags, where its prompt comes from, and the table of probabilities."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import SPEED, TINY, Terminal, crafted

from gpt2c import GPT2, Tokenizer
from gpt2c.cli.main import main
from gpt2c.generator import Generator, Token
from gpt2c.screen.terminal import spelled

Capture = pytest.CaptureFixture[str]
BYTES = Tokenizer.from_name("bytes")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a trained run, and models that write a bell or line ends."""
    path = tmp_path_factory.mktemp("world")
    (path / "text.txt").write_text("the cat sat on the mat. " * 40)
    assert main(f"prepare {path}/text.txt --out {path}/data --tokenizer bytes".split()) == 0
    assert main(f"train --data {path}/data --out {path}/run {TINY}".split()) == 0
    crafted(path / "bell", 7, 27)  # its third token rings the bell, then come escapes
    crafted(path / "lines", ord("c"), ord("\n"))
    return path


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


# ---- texts ---------------------------------------------------------------------------------------


def test_seed_draws_the_same_text(gpt2c) -> None:
    texts = [gpt2c(f"generate run --prompt the --seed {seed}")[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the") and text.endswith("\n") for text in texts)


def test_temperature_0_needs_no_seed(gpt2c) -> None:
    texts = {gpt2c("generate run --prompt a --temperature 0 --top-k 1")[1] for _ in range(3)}
    assert len(texts) == 1


def test_generate_counts_and_stops(gpt2c, tmp_path: Path) -> None:
    model = crafted(tmp_path / "cx", ord("c"), ord("x"))
    for flags, text in (
        ("--prompt ab --max-new-tokens 9", "abcxxxxxxxx\n"),
        ("--prompt ab --max-new-tokens 0", "ab\n"),
        ("--max-new-tokens 3", "xcx\n"),  # the start of a text is one token
    ):
        code, out, err = gpt2c(f"generate {model} --temperature 0 {flags}")
        assert (code, out) == (0, text)
        assert int(re.fullmatch(SPEED, err)[1]) == len(out) - len("\n") - (2 if "ab" in text else 0)
    model = crafted(tmp_path / "end", 256, ord("x"))
    assert gpt2c(f"generate {model} --temperature 0 --prompt ab")[:2] == (0, "ab\n")


def test_prompt_may_hold_special_tokens_with_the_flag(
    gpt2c, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = crafted(tmp_path, ord("c"), ord("x")), "<|endoftext|>b"
    command = f"generate {model} --temperature 0 --max-new-tokens 3"
    code, _, err = gpt2c(f"{command} --prompt {prompt}")
    assert code == 2 and "the prompt is 14 tokens" in err
    (tmp_path / "prompt").write_text(prompt)
    for given in (f"--prompt {prompt}", f"--prompt-file {tmp_path / 'prompt'}"):
        assert gpt2c(f"{command} --special {given}")[:2] == (0, f"{prompt}cxx\n")
    several = gpt2c(f"{command} --special --prompt {prompt} --num-samples 2")[1]
    assert several == "".join(f"--- sample {n} ---\n{prompt}cxx\n" for n in (1, 2))
    table = gpt2c(f"{command} --special --prompt {prompt} --show-probabilities 0")[1]
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["99", "120", "120"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\nab\n"))
    answers = f"{prompt}cxx\n---\nabcxx\n---\n"
    assert gpt2c(f"{command} --special --interactive")[1] == answers
    out = gpt2c(f"tokens {prompt} --tokenizer bytes --special")[1].splitlines()
    assert out[0] == "bytes, a vocabulary of 257: 2 tokens, 14 characters, 14 bytes"
    assert out[2] == "<|endoftext|>|b" and out[5].startswith("256  '<|endoftext|>'  3C 7C")
    assert "14 tokens" in gpt2c(f"tokens {prompt} --tokenizer bytes")[1]


def test_generate_ends_before_a_stop_string(gpt2c, tmp_path: Path) -> None:
    model = crafted(tmp_path, ord("c"), ord("x"))
    for stops, text, count in (
        ("--stop xx", "abc", 3),
        ("--stop q --stop cx", "ab", 2),
        ("--stop q", "abcxxx", 4),
        ("--stop c --stop x", "ab", 1),
    ):
        code, out, err = gpt2c(
            f"generate {model} --temperature 0 --prompt ab --max-new-tokens 4 {stops}"
        )
        assert (code, out) == (0, text + "\n") and int(re.fullmatch(SPEED, err)[1]) == count


def test_generate_has_the_flags_of_sampling(gpt2c, tmp_path: Path) -> None:
    """Compare each with the only text that this model writes without the flag."""
    model = crafted(tmp_path, ord("c"), ord("x"))
    command = f"generate {model} --prompt ab --max-new-tokens 4 --seed 1"
    plain = gpt2c(f"{command} --temperature 0")[1]
    assert plain == "abcxxx\n"
    for flags in ("--top-k 1", "--top-p 0.001", "--min-p 1"):
        assert gpt2c(f"{command} --temperature 100 {flags}")[1] == plain
    assert gpt2c(f"{command} --temperature 100")[1] != plain
    text = gpt2c(f"{command} --temperature 0 --no-repeat-ngram-size 1")[1].strip()
    assert text.startswith("abcx") and len(set(text)) == len(text) == 6
    assert gpt2c(f"{command} --temperature 0.8")[1] == plain  # the likeliest is far ahead
    assert gpt2c(f"{command} --temperature 0.8 --repetition-penalty 1000")[1] != plain


def test_generate_writes_several_texts(gpt2c, world: Path) -> None:
    command = "generate run --prompt the --max-new-tokens 8 --seed 3"
    code, out, err = gpt2c(f"{command} --num-samples 3")
    pattern = "".join(rf"--- sample {number} ---\n(the.*)\n" for number in (1, 2, 3))
    texts = re.fullmatch(pattern, out, re.DOTALL)
    assert code == 0 and texts and len(set(texts.groups())) == 3
    assert int(re.fullmatch(SPEED, err)[1]) <= 24
    assert gpt2c(command)[1] == f"{texts[1]}\n"
    generator = Generator(GPT2.from_pretrained(world / "run"), Tokenizer.from_pretrained("run"))
    expected = generator.generate(
        "the", max_new_tokens=8, seed=3, temperature=0.8, num_return_sequences=3
    )
    assert [f"the{text}" for text in expected] == list(texts.groups())


@pytest.mark.parametrize("method", ["int8", "fp16"])
def test_generate_with_smaller_weights(gpt2c, world: Path, tmp_path: Path, method: str) -> None:
    model = GPT2.from_pretrained(world / "run").quantize(method)
    model.save_pretrained(tmp_path / "small")
    tokenizer = Tokenizer.from_pretrained("run")
    tokenizer.save_pretrained(tmp_path / "small")
    settings = "--prompt the --max-new-tokens 8 --temperature 0"
    expected = Generator(model, tokenizer).generate("the", max_new_tokens=8, temperature=0)
    for arguments in (
        f"run --quantize {method}",
        f"{tmp_path}/small",  # the file says the method, without a flag
        f"{tmp_path}/small --quantize {method}",
        f"run --quantize {method} --backend numpy",
    ):
        code, out, err = gpt2c(f"generate {arguments} {settings}")
        assert (code, out) == (0, f"the{expected}\n") and re.fullmatch(SPEED, err)
    other = {"int8": "fp16", "fp16": "int8"}[method]
    code, out, err = gpt2c(f"generate {tmp_path}/small --quantize {other}")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"holds {method} weights, which cannot become {other}" in err


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_generate_with_a_small_cache(
    gpt2c, world: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    decoder = GPT2.decoder
    monkeypatch.setattr(
        GPT2, "decoder", lambda model, *given: taken.append(given[2]) or decoder(model, *given)
    )
    settings = "--prompt the --max-new-tokens 8 --temperature 0"
    code, out, err = gpt2c(f"generate run --cache {cache} {settings}")
    assert code == 0 and out.startswith("the") and re.fullmatch(SPEED, err) and taken == [cache]
    code, out, err = gpt2c(f"generate run --cache bf16 {settings}")
    assert (code, out) == (2, "") and "bf16" in err and "fp16" in err and "Traceback" not in err


def test_interactive_generate_continues_each_line(
    gpt2c, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = crafted(tmp_path, ord("c"), ord("x"))
    command = f"generate {model} --interactive --temperature 0 --max-new-tokens 3"
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n\nfar too long\nab"))
    code, out, err = gpt2c(command)
    assert (code, out) == (0, "abcxx\n---\nxcx\n---\n---\nabcxx\n---\n")  # a text too long has none
    wrong, speed = err.splitlines(keepends=True)
    assert (
        wrong == "gpt2c: the prompt is 12 tokens; this model's context is 8 (n_positions): give a"
        " shorter prompt, or at most its last 8 tokens\n"
    )
    assert int(re.fullmatch(SPEED, speed)[1]) == 9


def test_ctrl_c_ends_a_text_and_not_interactive_generate(
    gpt2c, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = crafted(tmp_path, ord("c"), ord("x"))
    right = Generator.stream

    def stream(self: Generator, prompt: str, **settings: object) -> Iterator[str]:
        for number, piece in enumerate(right(self, prompt, **settings)):
            if prompt == "stop" and number == 1:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Generator, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("stop\nab\n"))
    code, out, _ = gpt2c(f"generate {model} --interactive --temperature 0 --max-new-tokens 3")
    assert (code, out) == (0, "stopx\n---\nabcxx\n---\n")


# ---- prompts and stop strings --------------------------------------------------------------------


def test_interactive_generate_answers_any_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"ab\ncaf\xe9\r\nab"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    assert main("generate bell --interactive --temperature 0 --max-new-tokens 1".split()) == 0
    first, second, third, rest = capsys.readouterr().out.split("\n---\n")
    assert first == third == "ab\x07" and second.startswith("caf\ufffd") and rest == ""


def test_prompt_may_hold_any_bytes(capsys: Capture) -> None:
    call = ["generate", "run", "--max-new-tokens", "0", "--prompt", "caf\udce9"]
    for more, out in (
        ([], "caf\ufffd\n"),
        (
            ["--num-samples", "2"],
            "--- sample 1 ---\ncaf\ufffd\n--- sample 2 ---\ncaf\ufffd\n",
        ),
    ):
        assert main([*call, *more]) == 0
        assert capsys.readouterr().out == out


def test_prompt_comes_from_a_file_or_standard_input(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    call = ["generate", "run", "--max-new-tokens", "0"]
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines\n"), encoding="utf-8")
    )
    assert main([*call, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == "two\nlines\n"
    (tmp_path / "prompt.txt").write_text("from a\nfile\n")
    assert main([*call, "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
    assert capsys.readouterr().out == "from a\nfile\n"


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"caf\xe9 \xe4\xbd\n", "caf\ufffd \ufffd"),
        (b"\xef\xbb\xbfcaf\xc3\xa9\r\nb\xff\r\n", "café\nb\ufffd"),
    ],
    ids=["stray bytes", "as Windows writes it"],
)
def test_prompt_is_the_same_from_a_file_and_from_standard_input(
    content: bytes, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    call = ["generate", "run", "--max-new-tokens", "0"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    (tmp_path / "prompt.txt").write_bytes(content)
    for flags in (["--prompt", "-"], ["--prompt-file", str(tmp_path / "prompt.txt")]):
        assert main([*call, *flags]) == 0
        assert capsys.readouterr().out == f"{prompt}\n"


def test_prompt_of_another_encoding_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompt.txt").write_bytes("café".encode("utf-16"))
    assert main(["generate", "run", "--prompt-file", str(tmp_path / "prompt.txt")]) == 2
    assert "prompt.txt is UTF-16, not UTF-8; save it as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["-->", "---", "--", "-ab", "-", "-h", "--seed", "--seed=1", "-5", "-1e5", "- a", ""]
)
def test_values_may_begin_with_dashes(value: str, capsys: Capture) -> None:
    call = ["generate", "run", "--max-new-tokens", "0"]
    if value != "-":  # standard input
        assert main([*call, "--prompt", value, "--seed", "1"]) == 0
        assert capsys.readouterr().out == value + "\n"
    if value:
        assert main([*call, "--stop", value, "--stop", "x", "--prompt", "a"]) == 0
        assert capsys.readouterr().out == "a\n"


def test_stop_string_may_be_a_newline(capsys: Capture) -> None:
    call = "generate lines --temperature 0 --prompt ab --max-new-tokens 5".split()
    for stop, text in (r"\n", "abc"), ("\n", "abc"), (r"c\n", "ab"), (r"\\n", "abc\n\n\n\n"):
        assert main([*call, "--stop", stop]) == 0
        assert capsys.readouterr().out == text + "\n"


# ---- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--temperature 0", "--temperature 5 --top-k 200 --seed 3"])
def test_probabilities_are_the_models_own(flags: str, world: Path, capsys: Capture) -> None:
    call = f"generate run --prompt the --max-new-tokens 6 {flags} --show-probabilities 3"
    assert main(call.split()) == 0
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("the model's own probabilities: before temperature")
    assert names.endswith("the 3 likeliest") and len(rows) == 6
    model, ids = GPT2.from_pretrained(world / "run"), BYTES.encode("the")
    for row in rows:
        logits = model([ids])[0, -1].astype(np.float64)
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        token = int(row.split()[0])
        cells = re.findall(r"('.+?') +(\d+\.\d\d)%(?=  |$)", row)
        expected = [token, *np.argsort(-p, kind="stable")[:3].tolist()]
        assert [piece for piece, _ in cells] == [spelled(bytes([i])) for i in expected]
        shown = [float(share) / 100 for _, share in cells]
        assert shown == pytest.approx(p[expected], abs=6e-5)
        ids.append(token)


def test_probabilities_without_candidates(capsys: Capture) -> None:
    flags = "--temperature 0 --max-new-tokens 2 --prompt ab --show-probabilities"
    assert main(f"generate lines {flags} 0".split()) == 0
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("the model's own probabilities") and names == "    id  token"
    assert [row.split() for row in rows] == [["99", "'c'", "100.00%"], ["10", r"'\n'", "100.00%"]]


def test_probabilities_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {0.5: "42", 0.49: "43", 0.1: "43", 0.09: "41", 0.0: "41"}

    def tokens(*arguments: Any, **settings: Any) -> Iterator[Token]:
        return (Token(97, b"a", share, [(98, share)]) for share in shares)

    monkeypatch.setattr(Generator, "tokens", tokens)
    monkeypatch.delenv("NO_COLOR", raising=False)
    call = "generate run --show-probabilities 1".split()
    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(call) == 0
    _, legend, _, *rows = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    steps = (("42", "50%"), ("43", "10%"), ("41", "0%"))
    assert legend == ", ".join(f"\x1b[30;{color}mfrom {share}\x1b[0m" for color, share in steps)
    for row, (share, color) in zip(rows, shares.items(), strict=True):
        cell = f"{{}}  {share:7.2%}"
        first, other = (cell.format(f"{name:<14}") for name in ("'a'", "'b'"))
        assert row == f"    97  \x1b[30;{color}m{first}\x1b[0m   {other}"
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(call) == 0
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown and len(shown.splitlines()) == 2 + len(shares)
