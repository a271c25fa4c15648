"""gpt2c classify: train, eval and predict on files, and what they refuse."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from gpt2c import GPT2, GPT2Config, Tokenizer
from gpt2c.evaluate import text_baselines
from gpt2c.evaluate.classifier import Classifier
from gpt2c.evaluate.metrics import compare

FLAGS = "--learning-rate 1e-2 --max-epochs 8 --batch-size 8 --backend base"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a base, texts, and a classifier of them."""
    path, rng = tmp_path_factory.mktemp("world"), random.Random(1)
    GPT2(GPT2Config(257, 24, 32, 1, 2, eos_token_id=256), seed=1).save_pretrained(path / "base")
    Tokenizer.from_name("bytes").save_pretrained(path / "base")
    words = [f"{''.join(rng.choice('xyz') for _ in range(4))}{n}" for n in range(60)]
    rows = [{"text": f"{word} {n % 2}", "label": n % 2} for n, word in enumerate(words)]
    (path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["Message,Kind", *(f"{row['text']},{row['label']}" for row in rows[:20])]
    (path / "texts.csv").write_text("\n".join(lines) + "\n")
    (path / "other.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 2}\n')
    (path / "empty.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n')
    return path


@pytest.fixture
def run(gpt2c, world: Path, no_picture: None) -> str:
    """Return the name of a trained classifier."""
    if not (world / "run").exists():
        assert gpt2c(f"classify train base texts.jsonl --out run {FLAGS}")[0] == 0
    return "run"


def test_train_shows_the_report(gpt2c, world: Path, no_picture: None) -> None:
    code, out, err = gpt2c(f"classify train base texts.jsonl --out shown {FLAGS} --folds 2")
    assert (code, err) == (0, "")
    for part in (
        "fold 2 of 2, in shown/fold-2",
        "30 texts to learn from, of 2 labels: 0 15, 1 15",
        "on 60 texts that it did not learn from, those of the 2 folds pooled:",
        "              precision    recall  f1-score   support\n\n           0       ",
        "      predicted\ntrue   0   1\n",
        "macro F1, mean of the 2 folds: ",
        "picture: shown/confusion.png",
    ):
        assert part in out, part
    stored = json.loads((world / "shown" / "result.json").read_text())["test"]
    assert f"accuracy {stored['accuracy']:.4f} (95% interval: " in out
    assert (world / "shown" / "confusion.png").is_file()


def test_baselines_are_shown(
    gpt2c, world: Path, no_picture: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_baselines, "find_spec", lambda name: None)
    code, out, _ = gpt2c(f"classify train base texts.jsonl --out base-lines {FLAGS} --baselines")
    assert code == 0 and "\nthis classifier " in out and "\nmost frequent label " in out
    said = "baselines of words and characters need scikit-learn: pip install scikit-learn\n"
    assert out.startswith(said)
    code, out, _ = gpt2c("classify eval base-lines texts.jsonl --baselines texts.jsonl")
    assert code == 0 and "most frequent label    0.5000  0.3774 to 0.6226    0.3333\n" in out
    code, out, err = gpt2c("classify train base nothing.csv --out new --baselines")
    assert (code, out) == (2, "") and "nothing.csv" in err, "a missing file comes first"


def test_eval_reports_what_predict_says(gpt2c, world: Path, run: str) -> None:
    code, out, err = gpt2c(f"classify predict {run} texts.jsonl")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    rows = [json.loads(line) for line in (world / "texts.jsonl").read_text().splitlines()]
    p = Classifier.from_pretrained(world / run).probabilities([row["text"] for row in rows])
    assert np.allclose([[*one["probabilities"].values()] for one in found], p)
    assert [one["label"] for one in found] == [str(k) for k in p.argmax(1)]
    report = compare([row["label"] for row in rows], p.argmax(1), ["0", "1"])
    code, out, err = gpt2c(f"classify eval {run} texts.jsonl --plot matrix.png")
    assert (code, err) == (0, "") and out.startswith(str(report))
    assert (world / "matrix.png").is_file()
    # the same texts as CSV, under other names
    code, out, _ = gpt2c(f"classify eval {run} texts.csv --text-field Message --label-field Kind")
    expected = compare([row["label"] for row in rows[:20]], p[:20].argmax(1), ["0", "1"])
    assert code == 0 and out.startswith(str(expected))


def test_predict_writes_a_file(gpt2c, world: Path, run: str) -> None:
    _, shown, _ = gpt2c(f"classify predict {run} texts.jsonl")
    assert gpt2c(f"classify predict {run} texts.jsonl --out found.jsonl") == (0, "", "")
    assert (world / "found.jsonl").read_text() == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("eval run other.jsonl", "other.jsonl, line 2: the label '2' is none of the 2 that the"),
        ("eval base texts.jsonl", "a classifier has at least 2 labels, and this model has logits"),
        ("predict base texts.jsonl", "a classifier has at least 2 labels"),
        ("predict run empty.jsonl", "empty.jsonl, line 3: the text is empty, so it has no label"),
        ("predict run missing.jsonl", "missing.jsonl"),
        ("train base other.jsonl --out x --folds 2", "the label '0' has 1 text, and 2 folds"),
        (
            "train base texts.csv --out x",
            "wanted are text and label (other names: --text-field, --label-field)",
        ),
        ("train base texts.jsonl --out run", "run"),
        ("train base texts.jsonl --out x --bad", "unrecognized argument --bad"),
        ("guess", "invalid choice: 'guess'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments_are_refused(gpt2c, world: Path, run: str, arguments: str, said: str) -> None:
    code, out, err = gpt2c(f"classify {arguments}")
    assert (code, out) == (2, "") and said in err and "Traceback" not in err
    assert not (world / "x").exists()
