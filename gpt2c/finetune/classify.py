"""Classification: a model learns the label of each text.

    z = W h                                 the scores of a text, h at its last token
    L = sum of w_y (-log softmax(z)_y) / sum of w_y            over the texts of a step
    dz = w_y (softmax(z) - onehot(y)) / sum of w_y

The weight w_y of a label is 1, or n / (K n_y) with balanced class weights, as scikit-learn has it:
then each label counts as much as any other. A text is what starts a text and its tokens, without an
end (see `gpt2c.evaluate.classifier.encode`).

Source: Radford et al. 2018, Improving Language Understanding by Generative Pre-Training, 3.2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from gpt2c.evaluate import text_baselines
from gpt2c.evaluate.classifier import encode, scores, softmax
from gpt2c.evaluate.folds import stratified_folds
from gpt2c.evaluate.metrics import Report, calibration_error, compare
from gpt2c.files.atomic import check_apart, claimed
from gpt2c.files.names import RESULT_FILE, RUN_FILE
from gpt2c.files.untrusted import read_json, shown
from gpt2c.finetune.given import ClassifyGiven
from gpt2c.finetune.report import Counts
from gpt2c.finetune.settings import FinetuneSettings, rate
from gpt2c.finetune.tune import Base, Method, Result, tune
from gpt2c.formats.load import AnyConfig, find_model
from gpt2c.kernels.checks import counted
from gpt2c.parallel.world import World, join
from gpt2c.pretrained import open_found
from gpt2c.screen.terminal import one_line
from gpt2c.text.examples import read_records
from gpt2c.text.labelled import Labelled, labelled, sorted_labels, unique
from gpt2c.text.ragged import Order, held_out, parts
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.directory import read_record, report, write_result
from gpt2c.train.hooks import Learned
from gpt2c.train.logs import Logs
from gpt2c.train.loop import dropout_of
from gpt2c.train.run import LostModel, Run
from gpt2c.train.settings import resumed, setting
from gpt2c.train.stop import Check, interruptible

__all__ = [
    "Classified",
    "ClassifySettings",
    "class_weights",
    "classify",
    "weighted_cross_entropy",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WEIGHTS = ("none", "balanced")
MOST_LABELS = 12  # that a line lists
LONGEST = 200  # characters of a text in a line


@dataclasses.dataclass(frozen=True)
class ClassifySettings(FinetuneSettings):
    """The settings of `gpt2c classify train`.

    Examples
    --------
    >>> settings = gpt2c.finetune.ClassifySettings(max_epochs=2.0).planned(examples=100)
    >>> settings.max_iters, settings.eval_interval  # an evaluation after each epoch
    (25, 13)
    """

    learning_rate: float = rate(5e-5)
    max_epochs: float = setting("run", 5.0, "how often each text is learned")
    val_fraction: float = setting(
        "data", 0.1, "the share of the texts that is evaluated after each epoch", fixed=True
    )
    test_fraction: float = setting(
        *("classify", 0.1, "the share of the texts that is evaluated once, at the end"),
        least=0,
        fixed=True,
    )
    folds: int = setting(
        *("classify", 0, "cross-validation: K runs, each tested on another K-th of the texts"),
        least=0,
        fixed=True,
    )
    class_weights: str = setting(
        *("classify", "none", "none, or balanced: each label counts as much as any other"),
        fixed=True,
    )
    text_field: str = setting("classify", "", "the name of the field text, if it is another")
    label_field: str = setting("classify", "", "the name of the field label")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_weights not in WEIGHTS:
            known = " or ".join(WEIGHTS)
            raise ValueError(f"class_weights must be {known}, got {shown(self.class_weights)}")
        if not self.val_fraction + self.test_fraction < 1:
            raise ValueError(
                "val_fraction and test_fraction must be below 1 together, got"
                f" {self.val_fraction} and {self.test_fraction}"
            )
        if self.folds == 1:
            raise ValueError("folds must be 0, or at least 2, got 1")


class HeldOut(NamedTuple):
    """Texts to learn from and texts held out, and the labels of both.

    Attributes
    ----------
    train, val, test : learned; evaluated after each epoch; evaluated once
    labels : the K names
    rows : text -> its tokens as the model reads them, without the end of one that is too long
    cut : the texts that are too long
    reasons : how many texts were left out, for each reason
    """

    train: list[Labelled]
    val: list[Labelled]
    test: list[Labelled]
    labels: tuple[str, ...]
    rows: Mapping[str, list[int]]
    cut: Set[str]
    reasons: dict[str, int]

    @property
    def held(self) -> list[Labelled]:
        """The texts of the final report."""
        return self.test or self.val

    def numbers(self, texts: Sequence[Labelled]) -> Ints:
        """Return the place of each text's label, (n,)."""
        places = {label: place for place, label in enumerate(self.labels)}
        return np.array([places[each.label] for each in texts], np.int64)


@dataclasses.dataclass(frozen=True)
class Classified:
    """The result of a classifier's training, or of that of each fold.

    Attributes
    ----------
    runs : the result of each run
    reports : of each run's texts that it did not learn from
    report : of all of these together; None if a signal ended a run early, or none were held out
    calibration : the expected calibration error on them
    baselines : name -> the report of a baseline that learned and was tested on the same texts
    """

    runs: list[Result]
    reports: list[Report]
    report: Report | None
    calibration: float
    baselines: Mapping[str, Report]

    def figures(self) -> dict[str, object]:
        """Return the figures for result.json."""
        if self.report is None:
            return {}
        found = _figures(self.report) | {
            "calibration_error": self.calibration,
            "labels": list(self.report.labels),
            "confusion": self.report.confusion.tolist(),
        }
        if len(self.reports) > 1:
            found["folds"] = [_figures(each) for each in self.reports]
        if self.baselines:
            found["baselines"] = {name: _figures(each) for name, each in self.baselines.items()}
        return found


def _figures(report: Report) -> dict[str, Any]:
    return {
        "texts": report.count,
        "accuracy": report.accuracy,
        "accuracy_interval": list(report.interval),
        "macro_f1": report.macro.f1,
        "weighted_f1": report.weighted.f1,
        "matthews": report.matthews,
    }


# ---- formulas ------------------------------------------------------------------------------------


def class_weights(labels: Ints, K: int, how: str = "balanced") -> Floats:
    """Return the weight of each label, (K,): n / (K n_k) for balanced, 1 for none.

    Source: King and Zeng 2001, Logistic Regression in Rare Events Data; scikit-learn's "balanced".
    """
    if how == "none":
        return np.ones(K)
    return len(labels) / (K * np.bincount(labels, minlength=K))


def weighted_cross_entropy(
    scores: NDArray[Any], labels: Ints, weights: Floats, total: float
) -> tuple[float, Floats]:
    """Return the loss in nats, and its gradient with respect to the scores (n, K).

    Parameters
    ----------
    scores : (n, K)
    labels : (n,) in [0, K)
    weights : (n,) of each text
    total : the sum of the weights of the whole step, of which these texts are a part
    """
    z = scores.astype(np.float64)
    rows, share = np.arange(len(z)), weights / total
    with np.errstate(invalid="ignore"):  # of scores that are infinite: the loss is nan
        z -= z.max(1, keepdims=True)
        losses = np.log(np.exp(z).sum(1)) - z[rows, labels]
        d_scores = softmax(z)
    d_scores[rows, labels] -= 1
    return float(share @ losses), d_scores * share[:, None]


# ---- texts ---------------------------------------------------------------------------------------


def _splits(
    examples: str | Path | Sequence[Mapping[str, object]],
    settings: ClassifySettings,
    tokenizer: Tokenizer,
    base: AnyConfig,
) -> list[HeldOut]:
    """Read texts and divide them: one split, or one for each fold.

    Texts that differ only behind what the model reads are one.
    """
    most = min(settings.max_length or base.n_positions, base.n_positions)
    if most < 2:
        raise ValueError(
            f"a text needs at least 2 tokens, one before it, and {most} are read: take another"
            " model, or a larger max_length"
        )
    names = {"text": settings.text_field, "label": settings.label_field}
    found = read_records(examples, ["label"], names)
    rows: dict[str, list[int]] = {}
    cut: set[str] = set()

    def read(text: str) -> tuple[int, ...]:
        row = encode(text, tokenizer, base)
        if len(row) > most:
            cut.add(text)
        rows[text] = row[:most]
        return tuple(rows[text])

    texts, reasons = unique(labelled(found.records, settings.group_field), read)
    labels = sorted_labels(texts)
    if len(labels) < 2:
        raise ValueError(
            f"all texts have one label, {shown(labels[0])}: a classifier needs at least 2"
        )
    if settings.folds:
        groups = [each.group for each in texts] if settings.group_field else None
        every = HeldOut(texts, [], [], labels, rows, cut, reasons)
        fold = stratified_folds(
            *(every.numbers(texts), settings.folds, settings.seed, groups, labels)
        )
        return [
            every._replace(
                train=[each for each, own in zip(texts, fold, strict=True) if own != k],
                val=[each for each, own in zip(texts, fold, strict=True) if own == k],
            )
            for k in range(settings.folds)
        ]
    test, rest = _divided(texts, settings.test_fraction, settings.seed + 1)
    val, train = _divided(rest, settings.val_fraction / (1 - settings.test_fraction), settings.seed)
    learned = {each.label for each in train}
    for label in labels:
        if label not in learned:
            has = counted(sum(each.label == label for each in texts), "text")
            raise ValueError(
                f"the label {shown(label)} has {has}, and none is left to learn from: remove the"
                " label, or take another seed or smaller fractions"
            )
    return [HeldOut(train, val, test, labels, rows, cut, reasons)]


def _divided(
    texts: list[Labelled], fraction: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Return the texts that are held out, and the others."""
    out = held_out([each.group for each in texts], fraction, seed)
    sides: tuple[list[Labelled], list[Labelled]] = ([], [])
    for each, held in zip(texts, out, strict=True):
        sides[0 if held else 1].append(each)
    return sides


# ---- the method ----------------------------------------------------------------------------------


class _Texts(NamedTuple):
    """Texts as the model reads them, and the numbers of their labels."""

    rows: list[list[int]]
    labels: Ints


class _Classify(Method):
    verb = "classify"
    shown = ("accuracy",)
    unit = "nats/text"

    def __init__(self, base: Base, settings: ClassifySettings, split: HeldOut) -> None:
        self.tokenizer, self._settings, self._split = base.tokenizer, settings, split
        start = base.found.config.start_token_id
        self.tokenizer.add_bos_token = start is None or start == self.tokenizer.eot
        self._train, self._val = self._read(split.train), self._read(split.val)
        self.test = self._read(split.test)
        how, K = settings.class_weights, len(split.labels)
        self._weights = class_weights(self._train.labels, K, how)
        self.examples = len(split.train)
        self.longest = max(map(len, (*self._train.rows, *self._val.rows)))
        self.facts = _fingerprint((self._train, self._val, self.test), split.labels)
        self._order = Order(self.examples, settings.batch_size, settings.seed)

    def _read(self, texts: Sequence[Labelled]) -> _Texts:
        return _Texts([self._split.rows[each.text] for each in texts], self._split.numbers(texts))

    def config(self, base: AnyConfig) -> AnyConfig:
        labels = self._split.labels
        if base.num_labels is not None and base.label_names != labels:
            raise ValueError(
                f"the base has {counted(base.num_labels, 'score')} for"
                f" {_listed(base.label_names)} and the texts have {_listed(labels)}: name the model"
                " that it began from"
            )
        pad = self.tokenizer.eot if base.pad_token_id is None else base.pad_token_id
        return dataclasses.replace(base, num_labels=len(labels), id2label=labels, pad_token_id=pad)

    def lines(self) -> Iterator[str]:
        split = self._split
        sizes = Counter(each.label for each in split.train)
        kinds = ", ".join(
            f"{one_line(label)} {sizes[label]:,}" for label in split.labels[:MOST_LABELS]
        )
        more = len(split.labels) - MOST_LABELS
        use = "the test of this fold" if self._settings.folds else "validation"
        held = ", ".join(
            f"{len(texts):,} for {use}"
            for use, texts in ((use, split.val), ("the test at the end", split.test))
            if texts
        )
        yield (
            f"{self.examples:,} texts to learn from, of {len(split.labels)} labels: {kinds}"
            + (f" and {more} more" if more > 0 else "")
        )
        if single := [label for label in split.labels if sizes[label] == 1]:
            yield f"a single text to learn from, too few, has each of: {_listed(single)}"
        cut = sum(each.text in split.cut for each in (*split.train, *split.val, *split.test))
        yield (
            f"held out: {held or 'none, so the figures are of texts that it learns from'};"
            f" left out: {Counts(split.reasons)}; cut at the end: {cut:,}; the longest text"
            f" has {self.longest} tokens"
        )
        first = split.train[0]
        text = one_line(first.text)
        text = text[:LONGEST] + "..." * (len(text) > LONGEST)
        yield f"the first text, of {one_line(first.label)}: {text}"

    def learn(self, run: Run) -> Learned:
        step = self._order.step(run.step)
        labels = self._train.labels[step]
        weights = self._weights[labels]
        total = float(weights.sum())
        rows = [self._train.rows[n] for n in step]
        lengths, own = [*map(len, rows)], run.world.share(len(rows))
        run.model.zero_grad()
        loss, right, first = 0.0, 0.0, sum(lengths[: own.start])
        rows, labels, weights = rows[own], labels[own], weights[own]
        for part in run.parts(parts(lengths[own], self._settings.batch_tokens)):
            dropout = dropout_of(run.settings, run.step, first)
            found = run.model.scores(rows[part], dropout=dropout)
            more, d_scores = weighted_cross_entropy(found, labels[part], weights[part], total)
            loss += more
            if not math.isfinite(loss):
                run.send()
                break
            run.model.backward(d_scores=d_scores, final=run.final)
            right += int((found.argmax(1) == labels[part]).sum())
            first += sum(map(len, rows[part]))
        loss, right = run.world.sum([loss, right])
        metrics = {"accuracy": right / len(step)} if math.isfinite(loss) else {}
        return Learned(loss, sum(lengths), metrics)

    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        texts = self._val if self._val.rows else self._train
        found = scores(run.model, texts.rows, self._settings.batch_tokens, check, run.world)
        weights = self._weights[texts.labels]
        loss, _ = weighted_cross_entropy(found, texts.labels, weights, float(weights.sum()))
        report = compare(texts.labels, found.argmax(1), self._split.labels)
        return {
            "val_loss": loss,
            "val_accuracy": report.accuracy,
            "val_macro_f1": report.macro.f1,
        }

    def answer(self, out: Path, world: World) -> tuple[Ints, Floats]:
        """Return the labels of the texts held out, and the probabilities of a run's model."""
        texts = self.test if self.test.rows else self._val
        settings = self._settings

        def probabilities() -> list[list[float]]:
            model = open_found(
                find_model(out),
                settings.backend,
                threads=settings.threads or None,
                precision=settings.precision,
            )
            found = softmax(scores(model, texts.rows, settings.batch_tokens))
            return [[*map(float, row)] for row in found]

        return texts.labels, np.array(world.by_first(probabilities))


def _listed(labels: Sequence[str]) -> str:
    more = ", ..." if len(labels) > MOST_LABELS else ""
    return ", ".join(map(one_line, labels[:MOST_LABELS])) + more


def _fingerprint(sides: Sequence[_Texts], labels: Sequence[str]) -> dict[str, Any]:
    """Return what identifies the texts: their numbers, and a checksum of all ids and labels."""
    digest = hashlib.sha256(json.dumps(labels).encode())
    for texts in sides:
        for row, label in zip(texts.rows, texts.labels.tolist(), strict=True):
            digest.update(np.array([*row, -1, label], np.int64).tobytes())
    return {"texts": [len(texts.rows) for texts in sides], "sha256": digest.hexdigest()}


def classify(
    base: str | os.PathLike[str],
    examples: str | Path | Sequence[Mapping[str, object]],
    out: str | os.PathLike[str],
    *,
    baselines: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Unpack[ClassifyGiven],
) -> Classified:
    """Train a classifier of texts from a base model, and test it on texts that it did not learn.

    Parameters
    ----------
    base : a directory of a model with its tokenizer, or a name on the hub
    examples : a file (JSONL, a JSON list, CSV), or a list of dicts, with text and label
    out : the directory of the run; with folds it holds one of each, fold-1 and so on
    baselines : also test others on the same texts, see `gpt2c.evaluate.text_baselines`; of several
        ranks the first one does
    resume : continue the run, or the folds, in `out`
    overwrite : `out` may exist and hold files
    settings : fields of `gpt2c.finetune.ClassifySettings`

    Raises
    ------
    OSError, ValueError, MemoryError : see `gpt2c.finetune.tune.tune`; there is one label only, or
        one that no fold or no text to learn from has

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> texts = [{"text": f"{w} {n}", "label": w[0]} for w in ("ant", "bee") for n in range(20)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/base")
    ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/base")
    ...     result = gpt2c.finetune.classify(
    ...         directory + "/base", texts, directory + "/run", learning_rate=0.01
    ...     )  # doctest: +ELLIPSIS
    ...     labels = gpt2c.Classifier.from_pretrained(directory + "/run").predict(["ant", "bee"])
    32 texts to learn from, of 2 labels: ...
    >>> result.report.accuracy, labels
    (1.0, ['a', 'b'])
    """
    out, world = Path(out), join()
    with world.guard(LostModel), ExitStack() as stack:
        return _classify(base, examples, out, baselines, resume, overwrite, settings, world, stack)


def _classify(
    base: str | os.PathLike[str],
    examples: str | Path | Sequence[Mapping[str, object]],
    out: Path,
    baselines: bool,
    resume: bool,
    overwrite: bool,
    settings: Mapping[str, Any],
    world: World,
    stack: ExitStack,
) -> Classified:
    """See `classify`; rank 0 alone looks at `out`."""
    record = world.by_first(lambda: _record(out) if resume else None)
    with world.agreement():
        ClassifySettings.check_names(settings)
        if record is None:
            own = ClassifySettings(**settings)
        else:
            own = resumed(ClassifySettings, record[1]["settings"], settings, record[0])
        if not resume:
            check_apart(out, base, examples)
        model = find_model(base)
        splits = _splits(examples, own, Tokenizer.from_pretrained(model.path), model.config)
    world.by_first(lambda: _check_place(out, own.folds))
    runs: list[Result] = []
    answers: list[tuple[Ints, Floats]] = []
    with world.agreement():
        if own.folds and not resume and world.rank == 0:
            stack.enter_context(claimed(out, overwrite))
    with interruptible(world) as stop:
        for k, split in enumerate(splits, 1):
            place = out / f"fold-{k}" if own.folds else out
            goes_on = resume and (not own.folds or world.by_first((place / RUN_FILE).exists))
            if own.folds:
                report(f"fold {k} of {own.folds}, in {place}")
            given = dataclasses.asdict(own) if resume else settings
            run, method = _run(base, place, given, split, goes_on, overwrite)
            if split.held and not run.interrupted:
                answers.append(method.answer(place, world))
            stopped = stop.asked
            runs.append(dataclasses.replace(run, interrupted=stopped))
            if stopped:
                return Classified(runs, [], None, math.nan, {})
    if not answers:
        return Classified(runs, [], None, math.nan, {})
    names = splits[0].labels
    reports = [compare(true, p.argmax(1), names) for true, p in answers]
    true = np.concatenate([labels for labels, _ in answers])
    p = np.concatenate([probabilities for _, probabilities in answers])
    found = Classified(
        *(runs, reports, compare(true, p.argmax(1), names), calibration_error(p, true)),
        _compared(splits, own) if baselines and world.rank == 0 else {},
    )
    if world.rank == 0:
        with Logs(out, tensorboard=False).writing(RESULT_FILE):
            stored = {} if own.folds else read_json(out / RESULT_FILE)
            write_result(out, "classify", stored | {"test": found.figures()})
    return found


def _record(out: Path) -> tuple[str, dict[str, Any]] | None:
    """Return run.json of the run that is resumed, or of its first fold, and where it is."""
    for place in (out, out / "fold-1"):
        if (place / RUN_FILE).exists():
            return str(place / RUN_FILE), read_record(place, "classify")
    return None


def _check_place(out: Path, folds: int) -> None:
    """Refuse a directory that holds other runs than these, which would seem to belong to them.

    Raises
    ------
    FileExistsError : it holds more folds, or a run beside which there would be folds
    """
    others = [out / f"fold-{folds + 1}", *([out / RUN_FILE] if folds else [])]
    for other in others:
        if other.exists():
            raise FileExistsError(f"{other} is of another run: name another directory")


def _run(
    base: str | os.PathLike[str],
    out: Path,
    given: Mapping[str, Any],
    split: HeldOut,
    resume: bool,
    overwrite: bool,
) -> tuple[Result, _Classify]:
    """Train one classifier; return its result, and the method, which knows the texts held out."""
    made: list[_Classify] = []

    def make(opened: Base, own: ClassifySettings) -> _Classify:
        made.append(_Classify(opened, own, split))
        return made[0]

    run = tune("classify", ClassifySettings, make, base, out, given, resume, overwrite)
    return run, made[0]


def _compared(splits: Sequence[HeldOut], settings: ClassifySettings) -> dict[str, Report]:
    """Return the report of each baseline, which learned the texts of each split."""
    labels = splits[0].labels
    found: dict[str, Report] = {}
    for split in splits:
        answers = text_baselines.baselines(
            [each.text for each in split.train],
            split.numbers(split.train),
            [each.text for each in split.held],
            settings.class_weights == "balanced",
            settings.seed,
        )
        for name, predicted in answers.items():
            report = compare(split.numbers(split.held), predicted, labels)
            before = found[name].confusion if name in found else 0
            found[name] = Report(labels, report.confusion + before)
    return found
