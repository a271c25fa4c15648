"""`gpt2c classify`: train a classifier of texts, evaluate it, predict with it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from gpt2c.cli.finetune import add_run, given_run, print_change, print_done, say_stopped
from gpt2c.cli.flags import add_model
from gpt2c.evaluate.classifier import Classifier
from gpt2c.evaluate.confusion import confusion_text, plot_confusion
from gpt2c.evaluate.metrics import Report, calibration_error, compare
from gpt2c.evaluate.text_baselines import INSTALL, baselines, have_sklearn
from gpt2c.files.atomic import atomic_path
from gpt2c.files.names import CONFUSION_FILE
from gpt2c.files.untrusted import shown
from gpt2c.finetune import classify
from gpt2c.finetune.classify import ClassifySettings
from gpt2c.parallel.world import join
from gpt2c.screen.picture import why_not
from gpt2c.screen.terminal import columns
from gpt2c.text.examples import read_records, string
from gpt2c.text.labelled import Labelled, labelled

__all__ = ["add_verbs", "run_eval", "run_predict", "run_train"]

TRAIN = """\
DATA has a text and a label in each record: JSONL, a JSON list, or CSV with a line of names. Labels
are strings or whole numbers; 1 in JSON is "1" in CSV. Each text counts once. A text that is longer
than the model's context is cut: its beginning counts."""


def add_verbs(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `train`, `eval` and `predict`; `add` makes a verb of its name, function and help."""
    verb = add("train", run_train, "train a classifier from a base model")
    verb.epilog = TRAIN
    add_run(verb, ClassifySettings)
    text = f"test others on the same texts: words and characters ({INSTALL})"
    verb.add_argument("--baselines", action="store_true", help=text)

    verb = add("eval", run_eval, "compare a classifier's labels with those of a file", shows=True)
    add_model(verb)
    _add_file(verb, "texts with labels")
    verb.add_argument("--label-field", default="label", metavar="NAME", help="(label)")
    verb.add_argument("--plot", type=Path, metavar="PNG", help="draw the confusion matrix")
    text = f"also test baselines that learn from this file ({INSTALL})"
    verb.add_argument("--baselines", type=Path, metavar="DATA", help=text)

    text = "label the texts of a file: JSONL, a label and the probability of each"
    verb = add("predict", run_predict, text, shows=True)
    add_model(verb)
    _add_file(verb, "texts")
    verb.add_argument("--out", type=Path, metavar="JSONL", help="write here, not to the terminal")


def _add_file(verb: argparse.ArgumentParser, what: str) -> None:
    verb.add_argument("data", type=Path, metavar="DATA", help=f"{what}: JSONL, JSON or CSV")
    verb.add_argument("--text-field", default="text", metavar="NAME", help="(text)")


def run_train(options: argparse.Namespace) -> int:
    """`gpt2c classify train`."""
    out: Path = options.out
    if Path(options.data).exists():  # else it is missing, and that is the error
        _say_lacking(options.baselines)
    found = classify(
        *(options.base, options.data, out),
        baselines=options.baselines,
        **given_run(options, ClassifySettings),
    )
    last = found.runs[-1]
    if last.interrupted:
        flags = ["--baselines"] * options.baselines
        return say_stopped(last, "classify train", options, *flags)
    print_done(options, found.runs)
    if found.report is None:
        print_change(last.before, last.after)
        return 0
    folds = len(found.reports)
    pooled = f", those of the {folds} folds pooled" * (folds > 1)
    print(f"\non {found.report.count:,} texts that it did not learn from{pooled}:")
    _show(found.report, found.calibration)
    if folds > 1:
        for name, values in {
            "accuracy": [each.accuracy for each in found.reports],
            "macro F1": [each.macro.f1 for each in found.reports],
        }.items():
            mean, spread = statistics.mean(values), statistics.stdev(values)
            print(f"{name}, mean of the {folds} folds: {mean:.4f} +/- {spread:.4f}")
    if options.baselines:
        _compare({"this classifier": found.report, **found.baselines})
    if join().rank == 0 and not why_not():
        plot_confusion(found.report, out / CONFUSION_FILE)
        print(f"picture: {out / CONFUSION_FILE}")
    return 0


def _show(report: Report, calibration: float) -> None:
    """Print a report, the confusion matrix, and figures of the whole."""
    print(report)
    print(confusion_text(report))
    low, high = report.interval
    print(
        f"accuracy {report.accuracy:.4f} (95% interval: {low:.4f} to {high:.4f}); Matthews"
        f" correlation {report.matthews:.4f}; calibration error {calibration:.4f}"
    )
    for note in report.notes:
        print(note)


def _compare(reports: Mapping[str, Report]) -> None:
    """Print a table of classifiers."""
    width = max(map(columns, reports))
    print(f"\n{'':{width}}  accuracy  95% interval      macro F1")
    for name, report in reports.items():
        low, high = report.interval
        print(
            f"{name:{width}}  {report.accuracy:8.4f}  {low:.4f} to {high:.4f}"
            f"  {report.macro.f1:8.4f}"
        )


def _say_lacking(wanted: object) -> None:
    """Say before the work which of the baselines that are wanted there will not be."""
    if wanted and not have_sklearn():
        print(f"baselines of words and characters need scikit-learn: {INSTALL}")


def run_eval(options: argparse.Namespace) -> int:
    """`gpt2c classify eval`."""
    classifier = _open(options)
    texts = _labelled(options.data, options, classifier.labels)
    learned = _labelled(options.baselines, options, classifier.labels) if options.baselines else []
    _say_lacking(options.baselines)
    numbers = {label: place for place, label in enumerate(classifier.labels)}
    true = np.array([numbers[each.label] for each in texts])
    p = classifier.probabilities([each.text for each in texts])
    report = compare(true, p.argmax(1), classifier.labels)
    _show(report, calibration_error(p, true))
    if learned:
        answers = baselines(
            [each.text for each in learned],
            np.array([numbers[each.label] for each in learned]),
            [each.text for each in texts],
        )
        found = {name: compare(true, y, classifier.labels) for name, y in answers.items()}
        _compare({"this classifier": report, **found})
    if options.plot:
        plot_confusion(report, options.plot)
    return 0


def _open(options: argparse.Namespace) -> Classifier:
    return Classifier.from_pretrained(
        options.model, options.backend, options.quantize, options.threads or None
    )


def _labelled(path: Path, options: argparse.Namespace, labels: Iterable[str]) -> list[Labelled]:
    """Read texts with labels that the classifier knows."""
    names = {"text": options.text_field, "label": options.label_field}
    texts = labelled(read_records(path, ["label"], names).records)
    known = {*labels}
    for each in texts:
        if each.label not in known:
            raise ValueError(
                f"{each.where}: the label {shown(each.label)} is none of the {len(known)} that the"
                " classifier has learned"
            )
    return texts


def run_predict(options: argparse.Namespace) -> int:
    """`gpt2c classify predict`."""
    if options.out is not None and options.out.exists() and options.out.samefile(options.data):
        raise ValueError(f"{options.out} holds the texts, which --out would replace: name another")
    classifier = _open(options)
    records = read_records(options.data, ["text"], {"text": options.text_field}).records
    texts = [string(record, "text") for record in records]
    for record, text in zip(records, texts, strict=True):
        if not text:
            raise ValueError(f"{record.where}: the text is empty, so it has no label")
    lines = (_line(classifier.labels, p) for p in classifier.probabilities(texts).tolist())
    if options.out is None:
        for line in lines:
            sys.stdout.write(line)
        return 0
    with atomic_path(options.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return 0


def _line(labels: Iterable[str], probabilities: list[float]) -> str:
    found = dict(zip(labels, probabilities, strict=True))
    answer = {"label": max(found, key=lambda label: found[label]), "probabilities": found}
    return json.dumps(answer, ensure_ascii=False) + "\n"
