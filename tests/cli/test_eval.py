"""gpt2c eval: the loss of held-out tokens, answers to questions, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.likely import GOOD, by_hand, random_model, slide, write_lines

from gpt2c import GPT2, GPT2Config, Tokenizer
from gpt2c.evaluate.loss import evaluate
from gpt2c.text.shards import read_tokens, write_tokens

BYTES = Tokenizer.from_name("bytes")
RESULT = r"loss (\S+) nats/token  perplexity (\S+)  bits per byte (\S+)\n"
ANSWERS = (
    r"acc (\S+) \+/- (\S+)  acc_norm (\S+) \+/- (\S+) \(per character\)"
    r"  acc_per_token (\S+) \+/- (\S+)  questions (\d+)\n"
)


def padded_model(model: GPT2, vocab_size: int) -> GPT2:
    """Return the model with more rows in the token table than there are tokens; they are zeros."""
    padded = GPT2(dataclasses.replace(model.config, vocab_size=vocab_size), seed=None)
    for name, parameter in model.parameters.items():
        padded.parameters[name][: len(parameter)] = parameter
    return padded


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a run, held-out tokens and questions."""
    path = tmp_path_factory.mktemp("world")
    config = GPT2Config(257, n_positions=16, n_embd=24, n_layer=1, n_head=3, eos_token_id=256)
    random_model(config).save_pretrained(path / "run")
    for directory in ("run", "data"):
        BYTES.save_pretrained(path / directory)
    tokens = np.random.default_rng(5).integers(0, 257, 90)  # one is an end of text, 0 bytes
    tokens[40] = 256
    write_tokens(path / "data" / "val.bin", tokens)
    endings = ["sat", "ran far", "\u00e9\u00e9\u00e9"]  # 3, 7 and 3 characters, 4, 8 and 7 tokens
    few = [GOOD | {"label": label, "endings": endings} for label in (0, 1, 2, 2)]
    write_lines(path / "few.jsonl", *few)
    write_lines(path / "many.jsonl", *few * 15)
    write_lines(path / "bad.jsonl", *few, GOOD | {"label": 9})
    write_lines(path / "long.jsonl", GOOD | {"ctx": "a cat, a dog"})
    model = GPT2.from_pretrained(path / "run")
    for name in ("sure", "diverged", "padded", "alone", "alone-padded"):
        shutil.copytree(path / "run", path / name)
    for name in ("alone", "alone-padded"):
        (path / name / "vocab.json").unlink()
    model.parameters["ln_f.weight"][...] *= 1e5
    model.save_pretrained(path / "sure")
    model.parameters["ln_f.weight"][3] = np.nan
    model.save_pretrained(path / "diverged")
    padded = padded_model(GPT2.from_pretrained(path / "run"), 320)
    for name in ("padded", "alone-padded"):
        padded.save_pretrained(path / name)
    # another tokenizer of the same size: the bytes have the ids in reverse order
    Tokenizer({bytes([255 - i]): i for i in range(256)}, 256).save_pretrained(path / "reversed")
    for name in ("reversed", "beyond", "ends", "ended"):
        if name != "reversed":
            BYTES.save_pretrained(path / name)
        write_tokens(path / name / "val.bin", tokens)
    write_tokens(path / "beyond" / "val.bin", [*range(9), 300])
    write_tokens(path / "ends" / "val.bin", [256] * 9)
    write_tokens(path / "ended" / "val.bin", [256])
    Tokenizer({bytes([(i + 1) % 256]): i for i in range(1, 257)}, 0).save_pretrained(path / "first")
    write_tokens(path / "first" / "val.bin", tokens)
    large = Tokenizer.train(["the cat sat on the mat"] * 5, 270)
    (path / "other").mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / "other" / name).write_bytes((path / "run" / name).read_bytes())
    large.save_pretrained(path / "other")
    return path


def test_eval_agrees_with_a_sum_by_hand(gpt2c, world: Path) -> None:
    model = GPT2.from_pretrained(world / "run")
    tokens = read_tokens(world / "data" / "val.bin").astype(np.int64)
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):
        x, y = tokens[start : start + 16][: len(tokens) - 1 - start], tokens[start + 1 : start + 17]
        logits = model(x[None])[0].astype(np.float64)
        nats += float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]).sum())
    loss = nats / (len(tokens) - 1)
    size = int((tokens[1:] != 256).sum())  # each token is a byte, except 256, the end of text
    assert 0 < size < len(tokens) - 1
    for flags in ("", " --batch-size 3 --backend numpy"):
        code, out, err = gpt2c(f"eval run --data data{flags}")
        assert (code, err) == (0, "")
        shown = re.fullmatch(RESULT, out)
        assert shown
        expected = [loss, math.exp(loss), nats / math.log(2) / size]
        assert [float(text) for text in shown.groups()] == pytest.approx(expected, abs=6e-3)
        assert float(shown[1]) == pytest.approx(loss, abs=1e-4)
        assert float(shown[3]) == pytest.approx(expected[2], abs=1e-4)


@pytest.mark.parametrize("flags", ["", " --quantize int8", " --quantize fp16 --backend numpy"])
@pytest.mark.parametrize("stride", [1, 8, 16])
def test_eval_slides_its_window(gpt2c, world: Path, stride: int, flags: str) -> None:
    model = GPT2.from_pretrained(world / "run")
    if flags:
        model = model.quantize(flags.split()[1])
    tokens = np.random.default_rng(5).integers(0, 257, 90)
    tokens[40] = 256
    logprobs = slide(model, tokens, stride, max(16, stride + 1))
    scored = ~np.isnan(logprobs)
    nats, size = -np.nansum(logprobs), int((tokens[scored] != 256).sum())
    assert size < scored.sum() == 89
    code, out, err = gpt2c(f"eval run --data data --stride {stride}{flags}")
    assert (code, err) == (0, "")
    shown = re.search(f"(?:^|\n){RESULT}$", out)
    assert shown
    loss = nats / scored.sum()
    assert [float(shown[1]), float(shown[3])] == pytest.approx(
        [loss, nats / math.log(2) / size], abs=2e-3 if "int8" in flags else 1.1e-4
    )
    assert float(shown[2]) == pytest.approx(math.exp(float(shown[1])), rel=2e-4)
    lines = re.findall(r"^window (\d+)/75  loss \d", out, re.MULTILINE)
    assert lines == (["15", "30", "45", "60", "75"] if stride == 1 else []), "if it is long"


def test_stride_of_the_context_is_windows_side_by_side(gpt2c) -> None:
    assert gpt2c("eval run --data data --stride 16") == gpt2c("eval run --data data")


def test_eval_of_a_padded_vocabulary(gpt2c, world: Path) -> None:
    tokens = read_tokens(world / "data" / "val.bin")
    model = padded_model(GPT2.from_pretrained(world / "run"), 320)
    loss = evaluate(model, [tokens], 8, 16)
    assert loss > evaluate(GPT2.from_pretrained(world / "run"), [tokens], 8, 16)
    for flags in ("", " --stride 16"):
        code, out, err = gpt2c(f"eval padded --data data{flags}")
        assert (code, err) == (0, "")
        shown = re.fullmatch(RESULT, out)
        assert shown and float(shown[1]) == pytest.approx(loss, abs=1e-4)


def test_eval_reports_that_only_sizes_were_compared(gpt2c) -> None:
    for name, size, like in (("alone", 257, "run"), ("alone-padded", 320, "padded")):
        code, out, err = gpt2c(f"eval {name} --data data")
        assert (code, out) == (0, gpt2c(f"eval {like} --data data")[1])
        assert err.count("\n") == 1 and err.startswith(
            f"gpt2c: only the sizes of the vocabularies could be compared, 257 of data and {size}"
            f" of {name}: "
        )


def test_eval_of_an_infinite_perplexity(gpt2c, world: Path) -> None:
    tokens = read_tokens(world / "data" / "val.bin")
    loss = evaluate(GPT2.from_pretrained(world / "sure"), [tokens], 8, 16)
    for flags in ("", " --stride 16"):
        code, out, err = gpt2c(f"eval sure --data data{flags}")
        shown = re.fullmatch(RESULT, out)
        assert (code, err) == (0, "") and shown
        assert float(shown[1]) == pytest.approx(loss, rel=1e-5) and loss > 1000
        assert shown[2] == "inf"
        bits = loss * 89 / math.log(2) / np.count_nonzero(tokens[1:] != 256)
        assert float(shown[3]) == pytest.approx(bits, rel=1e-5)


def test_eval_of_tokens_without_bytes(gpt2c, world: Path) -> None:
    loss = evaluate(GPT2.from_pretrained(world / "run"), [np.full(9, 256, np.uint16)], 8, 16)
    code, out, err = gpt2c("eval run --data ends")
    assert (code, err) == (0, "")
    shown = re.fullmatch(r"loss (\S+) nats/token  perplexity \S+  bits per byte none, as .*\n", out)
    assert shown and float(shown[1]) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("flags", ["", " --quantize int8", " --quantize fp16 --backend numpy"])
def test_eval_answers_questions(gpt2c, world: Path, flags: str) -> None:
    model = GPT2.from_pretrained(world / "run")
    if flags:
        model = model.quantize(flags.split()[1])
    sums = []
    for ending in (" sat", " ran far", " \u00e9\u00e9\u00e9"):
        row = np.array(list(b"a cat" + ending.encode()))
        sums.append(by_hand(model, row)[4:].sum())
    labels = np.array([0, 1, 2, 2])
    expected = []
    for lengths in ((1, 1, 1), (3, 7, 3), (4, 8, 7)):
        share = (labels == np.argmax(np.array(sums) / lengths)).mean()
        expected += [share, math.sqrt(share * (1 - share) / 3)]
    code, out, err = gpt2c(f"eval run --choices few.jsonl{flags}")
    assert (code, err) == (0, "")
    shown = re.fullmatch(ANSWERS, out)
    assert shown
    assert [float(text) for text in shown.groups()] == pytest.approx([*expected, 4], abs=1e-4)


def test_eval_shows_progress_and_does_both(gpt2c) -> None:
    few, data = gpt2c("eval run --choices few.jsonl")[1], gpt2c("eval run --data data")[1]
    code, out, err = gpt2c("eval run --data data --choices many.jsonl")
    assert (code, err) == (0, "")
    assert out.startswith(data)
    steps = re.findall(
        r"^question +(\d+)/60((?:  acc\w* \d\.\d{4}){3})(?:  \S+ left)?$", out, re.MULTILINE
    )
    assert [step for step, _ in steps] == [str(step) for step in range(12, 61, 12)]
    last = out.splitlines()[-1]
    assert re.fullmatch(ANSWERS, last + "\n")
    assert last.split()[1] == few.split()[1] and last.endswith("questions 60")
    assert gpt2c("eval run --data data --choices few.jsonl")[1] == data + few


MISTAKES = [
    ("eval run", "eval needs --data, --choices or both: there is nothing to score"),
    ("eval run --stride 4", "eval needs --data"),
    ("eval run --choices few.jsonl --stride 4", "--stride is for --data, which is not given"),
    ("eval run --data data --stride 0", "stride must be from 1 to the window's 16 tokens, got 0"),
    ("eval run --data data --stride 17", "stride must be from 1 to .* got 17"),
    ("eval run --data data --choices bad.jsonl", r"bad\.jsonl, line 5: label must be .* got 9"),
    ("eval run --choices missing.jsonl", r"missing\.jsonl does not exist"),
    ("eval run --choices data", "data: Is a directory"),
    ("eval run --choices long.jsonl", r"line 1: ctx and ending 1 have 21 tokens"),
    ("eval other --choices few.jsonl", "tokenizer has 269 tokens and the model 257: they do not"),
    ("eval data --choices few.jsonl", r"config\.json does not exist"),
    ("eval diverged --data data", "the loss is nan: the model's weights have diverged"),
    ("eval diverged --data data --stride 4", "weights have diverged or are damaged"),
    ("eval diverged --choices few.jsonl", "weights have diverged or are damaged"),
    ("eval run --data reversed", "^gpt2c: reversed .* another tokenizer than that of run: they do"),
    ("eval run --data reversed --stride 4", "prepare --tokenizer DIRECTORY"),
    ("eval padded --data reversed", "reversed was made with another tokenizer than that of padded"),
    ("eval padded --data beyond", r"beyond/val\.bin holds token 300, outside a vocabulary of 257"),
    ("eval run --data other", "other has a vocabulary of 269 tokens and run one of 257: they do"),
    ("eval alone --data other", "other has a vocabulary of 269 tokens and alone one of 257"),
    ("eval alone --data first", "first has 0 for its end of text and alone 256: they do not"),
    ("eval run --data ended", "1 token is too few to evaluate on; at least 2 are needed"),
]


@pytest.mark.parametrize(("arguments", "wanted"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_mistake_prints_one_line(gpt2c, arguments: str, wanted: str) -> None:
    code, out, err = gpt2c(arguments)
    assert (code, out) == (2, "")
    assert err.startswith("gpt2c: ") and err.count("\n") == 1
    assert re.search(wanted, err), err
