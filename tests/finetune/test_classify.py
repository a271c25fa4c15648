"""Classification: its loss and gradient, its runs and folds, controls, and bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.tuning import Killed, kill_after, losses, resumes_to_the_bit, weights

import gpt2c
from gpt2c.evaluate import text_baselines
from gpt2c.evaluate.classifier import Classifier
from gpt2c.evaluate.metrics import wilson
from gpt2c.finetune import classify
from gpt2c.finetune.classify import (
    ClassifySettings,
    _Classify,
    class_weights,
    weighted_cross_entropy,
)
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train import hooks

QUICK: dict[str, Any] = {
    "learning_rate": 0.01, "max_iters": 8, "eval_interval": 4, "batch_size": 6, "backend": "base",
}  # fmt: skip


def texts(count: int, labels: str = "abc", seed: int = 1) -> list[dict[str, Any]]:
    """Return words of different lengths, whose first and last letter is their label."""
    rng = random.Random(seed)
    inner = ("".join(rng.choice("xyz") for _ in range(rng.randint(3, 7))) for _ in range(2 * count))
    words = dict.fromkeys(f"{label}{rest}{label}" for rest in inner for label in rng.choice(labels))
    return [{"text": word, "label": word[0]} for word in list(words)[:count]]


# ---- formulas ------------------------------------------------------------------------------------


def test_weights_of_labels_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    assert class_weights(labels, 3).tolist() == [6 / 9, 6 / 3, 6 / 6]
    assert class_weights(labels, 3)[labels].sum() == pytest.approx(6)
    assert class_weights(labels, 3, "none").tolist() == [1, 1, 1]


def test_loss_and_gradient_agree_with_central_differences(rng: np.random.Generator) -> None:
    scores, labels, w = rng.normal(0, 3, (4, 3)), np.array([0, 2, 2, 1]), np.array([1, 0.3, 0.3, 2])
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = (-np.log(p[np.arange(4), labels]) * w).sum() / 5
    loss, slopes = weighted_cross_entropy(scores, labels, w, 5)
    assert loss == pytest.approx(expected, rel=1e-12)
    for place in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[place] = 1e-5
        up, down = (weighted_cross_entropy(scores + d, labels, w, 5)[0] for d in (step, -step))
        assert slopes[place] == pytest.approx((up - down) / 2e-5, abs=1e-9)


def test_loss_of_large_scores_is_finite() -> None:
    scores = np.array([[3e4, -3e4], [-3e4, 3e4]], np.float32)
    loss, slopes = weighted_cross_entropy(scores, np.array([0, 0]), np.ones(2), 2)
    assert loss == 3e4 and slopes.tolist() == [[0, 0], [-0.5, 0.5]]


def test_without_weights_it_is_the_loss_of_the_model(base: Path, tmp_path: Path) -> None:
    rows = texts(9)
    given = QUICK | {"max_iters": 1, "batch_size": 9, "val_fraction": 0.0, "test_fraction": 0.0}
    classify(base, rows, tmp_path / "run", **given, keep=2)
    (entry,) = losses(tmp_path / "run")
    found = gpt2c.from_pretrained(base, "base")
    config = dataclasses.replace(found.config, num_labels=3)
    model = gpt2c.GPT2(config, seed=1337, backend="base")  # whose head is the run's
    for name, parameter in found.parameters.items():
        model.parameters[name][...] = parameter
    loss = model.loss(
        [[256, *row["text"].encode()] for row in rows], ["abc".index(r["label"]) for r in rows]
    )
    assert entry["loss"] == pytest.approx(loss, rel=1e-6)
    model.backward()
    assert entry["grad_norm"] == pytest.approx(np.linalg.norm(model.flat_gradients), rel=1e-5)


def test_first_loss_is_ln_k_with_a_head_of_zeros(base: Path, tmp_path: Path) -> None:
    model = gpt2c.from_pretrained(base)
    small = gpt2c.GPT2(dataclasses.replace(model.config, initializer_range=1e-30))
    for name, parameter in model.parameters.items():
        small.parameters[name][...] = parameter
    small.save_pretrained(tmp_path / "base")
    Tokenizer.from_name("bytes").save_pretrained(tmp_path / "base")
    for how in ("none", "balanced"):
        out = tmp_path / how
        result = classify(tmp_path / "base", texts(40), out, **QUICK, class_weights=how)
        assert result.runs[0].before["val_loss"] == pytest.approx(math.log(3), abs=1e-7)
        assert losses(out)[0]["loss"] == pytest.approx(math.log(3), abs=1e-7)


def test_texts_that_are_one_for_the_model_are_one(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = texts(20) + [
        {"text": "one and " + end, "label": "abb"[n]} for n, end in enumerate("xyz")
    ]
    given = QUICK | {"max_iters": 1, "max_length": 9, "test_fraction": 0.0}
    rows.append({"text": "zz", "label": "z"})
    classify(base, rows, tmp_path / "run", **given)
    shown = capsys.readouterr().out
    assert "a single text to learn from, too few, has each of: z\n" in shown
    assert shown.startswith("19 texts to learn from") and "held out: 3 for validation;" in shown
    assert (
        "left out: 2 that are there already, with another label: 'one and y' is 'a' in example 21"
        f" and 'b' in example 22; cut at the end: {sum(len(row['text']) > 8 for row in rows) - 2};"
    ) in shown


# ---- runs ----------------------------------------------------------------------------------------


def test_labels_are_learned_and_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("gpt2c.train.loop.plot_loss", lambda *how: drawn.append(how[2]))
    given = QUICK | {"max_iters": 60, "eval_interval": 60}
    result = classify(base, texts(100), tmp_path / "run", **given)
    assert result.report and result.report.accuracy == 1.0 and result.report.count == 10
    assert 0 < result.calibration < 0.2
    assert drawn == ["loss, nats per text (lower is better)"]
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["test"] == result.figures() and stored["verb"] == "classify"
    assert stored["after"] == result.runs[0].after and stored["after"]["val_accuracy"] == 1.0
    found = Classifier.from_pretrained(tmp_path / "run")
    assert found.labels == ("a", "b", "c")
    assert found.predict(["axxa", "byyb", "czzc"]) == ["a", "b", "c"]
    config = found.model.config
    assert (config.pad_token_id, config.id2label) == (256, ("a", "b", "c"))


@pytest.mark.parametrize("how", ["none", "balanced"])
def test_division_of_a_step_changes_rounding_alone(how: str, base: Path, tmp_path: Path) -> None:
    rows = [row for row in texts(60) if row["label"] != "c" or len(row["text"]) < 6]
    runs = {}
    for most in (1, 20, 4096):  # each text alone, a few, all of a step together
        out = tmp_path / str(most)
        classify(base, rows, out, **QUICK, batch_tokens=most, class_weights=how)
        runs[most] = np.array([[entry["loss"], entry["grad_norm"]] for entry in losses(out)])
    np.testing.assert_allclose(runs[1], runs[4096], rtol=2e-4)
    np.testing.assert_allclose(runs[20], runs[4096], rtol=2e-4)


def test_balanced_weights_find_the_rare_label(base: Path, tmp_path: Path) -> None:
    few = [row for row in texts(80) if row["label"] == "b"][:5]
    rows = [row for row in texts(80, "a")] + few
    given = QUICK | {"max_iters": 6, "eval_interval": 6, "val_fraction": 0.0, "test_fraction": 0.0}
    recall = {}
    for how in ("none", "balanced"):
        result = classify(base, rows, tmp_path / how, **given, class_weights=how)
        found = Classifier.from_pretrained(tmp_path / how)
        recall[how] = found.probabilities([row["text"] for row in few])[:, 1].mean()
        assert result.report is None  # nothing was held out
    assert recall["balanced"] > 2 * recall["none"]


def test_shuffled_labels_are_not_learned(base: Path, tmp_path: Path) -> None:
    rows, rng = texts(150, "ab"), random.Random(0)
    for row in rows:
        row["label"] = rng.choice("ab")
    given = QUICK | {"max_iters": 40, "eval_interval": 40, "test_fraction": 0.4}
    report = classify(base, rows, tmp_path / "run", **given).report
    assert report
    low, high = wilson(report.right, report.count, 0.999)
    assert report.count == 60 and low < 0.5 < high


@pytest.mark.parametrize("at", [1, 5, 8])
def test_killed_run_goes_on_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    given = QUICK | {"dropout": 0.1, "class_weights": "balanced", "freeze": "wte.*,h.0.*"}

    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        settings = {} if resume else given | others
        found = classify(base, texts(50), out, resume=resume, **settings)
        reports[out] = found.report.confusion.tolist()
        return found.runs[0]

    reports: dict[Path, Any] = {}
    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, at)
    assert reports[tmp_path / "whole"] == reports[tmp_path / "parts"]


def test_frozen_parameters_stay(base: Path, tmp_path: Path) -> None:
    classify(base, texts(30), tmp_path / "run", **QUICK, freeze="w?e.*,h.0.*")
    before, after = (gpt2c.from_pretrained(path).parameters for path in (base, tmp_path / "run"))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(("wte.", "wpe.", "h.0."))}
    assert same == frozen and "score.weight" in after
    said = refused(lambda: classify(base, texts(30), tmp_path / "x", **QUICK, freeze="h.7.*"))
    assert "h.7.*" in said and not (tmp_path / "x").exists()


def test_random_weights_are_those_of_the_seed(base: Path, tmp_path: Path) -> None:
    classify(base, texts(30), tmp_path / "run", **QUICK, random_weights=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    config = gpt2c.from_pretrained(tmp_path / "run").config
    first = gpt2c.GPT2(config, seed=1337).flat_parameters
    assert record["base"]["sha256"] == hashlib.sha256(first.data).hexdigest()
    # of a base that is a classifier of these labels already
    classify(tmp_path / "run", texts(30), tmp_path / "more", **QUICK, random_weights=True)
    assert weights(tmp_path / "more") == weights(tmp_path / "run")


def test_groups_are_on_one_side(base: Path, tmp_path: Path) -> None:
    rows = texts(80)
    for number, row in enumerate(rows):
        row["source"] = number // 8
    given = QUICK | {"max_iters": 1, "group_field": "source"}
    report = classify(base, rows, tmp_path / "run", **given).report
    assert report and report.count == 8
    report = classify(base, rows, tmp_path / "folds", **given, folds=2).report
    assert report and report.count == 80


# ---- folds ---------------------------------------------------------------------------------------


def test_each_fold_begins_with_the_base_and_tests_other_texts(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 40, "eval_interval": 40, "folds": 3}
    result = classify(base, texts(60), tmp_path / "run", **given)
    assert result.report and result.report.count == 60 and result.report.accuracy > 0.9
    assert [each.count for each in result.reports] == [20, 20, 20]
    records = [
        json.loads((tmp_path / "run" / f"fold-{k}" / "run.json").read_text()) for k in (1, 2, 3)
    ]
    assert len({record["base"]["sha256"] for record in records}) == 1
    assert len({record["data"]["sha256"] for record in records}) == 3
    # a fold on its own has the same bits: nothing of an earlier one is left
    again = classify(base, texts(60), tmp_path / "again", **given)
    for k in (1, 2, 3):
        assert weights(tmp_path / "run" / f"fold-{k}") == weights(tmp_path / "again" / f"fold-{k}")
    assert weights(tmp_path / "run" / "fold-1") != weights(tmp_path / "run" / "fold-2")
    stored = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert stored == again.figures() and len(stored["folds"]) == 3


@pytest.mark.parametrize("evaluated", [False, True])
def test_ctrl_c_ends_all_folds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool
) -> None:
    """At a step, or after the last step of a fold; then --resume goes on."""
    tune = partial(classify, base, texts(50))
    whole = tune(tmp_path / "whole", **QUICK, folds=2)
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patched:
        where, name = (_Classify, "answer") if evaluated else (hooks.Show, "__call__")
        original = getattr(where, name)
        patched.setattr(where, name, interrupted)
        stopped = tune(tmp_path / "folds", **QUICK, folds=2)
    assert [run.interrupted for run in stopped.runs] == [True] and stopped.report is None
    assert stopped.runs[0].step == (8 if evaluated else 1)
    assert signal.getsignal(signal.SIGINT) is before
    assert tune(tmp_path / "folds", resume=True).figures() == whole.figures()


def test_killed_folds_go_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = partial(classify, base, texts(50))
    whole = tune(tmp_path / "whole", **QUICK, folds=2)
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4)
        tune(out, **QUICK, folds=2)
    assert not (out / "fold-2").exists()
    assert tune(out, resume=True).figures() == whole.figures()
    for k in (1, 2):
        assert weights(out / f"fold-{k}") == weights(tmp_path / "whole" / f"fold-{k}")


# ---- baselines -----------------------------------------------------------------------------------


def test_baselines_learn_and_answer_the_same_texts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def record(known: Any, labels: Any, others: Any, *rest: Any) -> dict[str, Any]:
        asked.append((known, others))
        return {"first": np.zeros(len(others), np.int64)}

    monkeypatch.setattr(text_baselines, "baselines", record)
    given = QUICK | {"max_iters": 1, "baselines": True}
    rows = texts(60)
    result = classify(base, rows, tmp_path / "run", **given)
    ((known, others),) = asked
    assert (len(known), len(others)) == (48, 6) and not {*known} & {*others}
    assert (
        result.report
        and result.baselines["first"].support.tolist() == result.report.support.tolist()
    )
    asked.clear()
    result = classify(base, rows, tmp_path / "folds", **given, folds=2)
    assert sorted([*asked[0][1], *asked[1][1]]) == sorted(row["text"] for row in rows)
    assert result.baselines["first"].count == 60
    assert result.figures()["baselines"]["first"]["texts"] == 60


# ---- what is refused -----------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    out, one = tmp_path / "run", {"text": "other", "label": "z"}
    for rows, given, said in (
        (texts(9, "a"), {}, "all texts have one label, 'a': a classifier needs at least 2"),
        ([*texts(9), one], {"folds": 2}, "the label 'z' has 1 text, and 2 folds need at least 2"),
        (texts(9), {"folds": 1}, "folds must be 0, or at least 2, got 1"),
        (texts(9), {"class_weights": "x"}, "class_weights must be none or balanced, got 'x'"),
        (texts(9), {"max_length": 1}, "a text needs at least 2 tokens, one before it, and 1 are"),
        (texts(9), {"val_fraction": 0.5, "test_fraction": 0.5}, "must be below 1 together"),
        ([*texts(9), {"text": "", "label": "a"}], {}, "example 10: the text is empty"),
        ([{"text": "a"}], {}, "example 1 has the fields 'text'; wanted are text and label"),
        (texts(9), {"group_field": "from"}, "example 1 has no field 'from' for its group"),
    ):
        call = partial(classify, base, rows, out, **QUICK | given)
        assert said in refused(call), said
        assert not out.exists()
    lonely = [dict(row, label=f"{n}") for n, row in enumerate(texts(20))]
    said = refused(classify, base, lonely, out, **QUICK)
    assert "has 1 text, and none is left to learn from: remove the label" in said
    classify(base, texts(40), out, **QUICK | {"max_iters": 2})
    said = refused(classify, base, texts(30), out, resume=True)
    assert "the examples are not those of the run" in said
    said = refused(classify, out, texts(20, "ab"), tmp_path / "other", **QUICK)
    assert said.startswith("the base has 3 scores for a, b, c and the texts have a, b: name the")
    assert not (tmp_path / "other").exists()


def test_diverged_run_stops(base: Path, tmp_path: Path) -> None:
    scores = np.array([[np.inf, 1], [0, 1]], np.float32)
    assert math.isnan(weighted_cross_entropy(scores, np.array([1, 0]), np.ones(2), 2)[0])
    given = QUICK | {"learning_rate": 1e38, "min_lr": 1e38, "schedule": "constant"}
    said = refused(classify, base, texts(30), tmp_path / "run", **given)
    assert "loss is nan" in said or "not finite" in said


def test_folds_and_a_run_have_directories_of_their_own(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 1}
    classify(base, texts(30), tmp_path / "run", **given)
    classify(base, texts(30), tmp_path / "folds", **given, folds=3)
    for name, folds, other in (
        ("run", 2, "run.json"),
        ("folds", 0, "fold-1"),
        ("folds", 2, "fold-3"),
    ):
        with pytest.raises(FileExistsError, match=f"{other} is of another run: name another"):
            classify(base, texts(30), tmp_path / name, **given, folds=folds, overwrite=True)
    again = classify(base, texts(30), tmp_path / "folds", **given, folds=3, overwrite=True)
    assert len(again.reports) == 3


def test_classifier_learns_more_of_its_labels(base: Path, tmp_path: Path) -> None:
    classify(base, texts(60), tmp_path / "run", **QUICK | {"max_iters": 60, "eval_interval": 60})
    more = classify(tmp_path / "run", texts(60, seed=2), tmp_path / "more", **QUICK)
    assert more.runs[0].before["val_accuracy"] == 1.0


def test_settings_of_examples() -> None:
    settings = ClassifySettings().planned(100)
    assert settings.max_iters == 63 and settings.learning_rate == 5e-5
