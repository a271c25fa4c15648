"""Classifiers of real texts beside their baselines: `gpt2c classify` on sets made from packages.

    python benchmarks/classification.py sentiment names --base runs/demo/run --out runs/classes

Sets, each made anew; nothing of them is part of this repository:
    sections    one-line descriptions of Debian's packages -> their section (apt-cache dumpavail)
    glosses     WordNet's definitions of nouns -> one of 26 kinds of things (the Debian package
                wordnet-base; apt-get downloads it)
    sentiment   sentences of film reviews -> liked or not, from the mean of 20 people's ratings
                (the sdist of vaderSentiment 3.3.2; pip downloads it)
    names       given and family names -> one of 16 languages (the package Faker, installed)

Each row is a classifier; all of a set learn from the same texts and answer the same others.
Baselines of words and characters need the extra [baseline].
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from gpt2c.bench.report import provenance
from gpt2c.evaluate.metrics import Report
from gpt2c.finetune import classify
from gpt2c.finetune.classify import ClassifySettings
from gpt2c.kernels.limits import usable_cores
from gpt2c.train.settings import recipe_settings

Record = dict[str, str]

LEAST = 1000  # texts of a section, so that there are 19
FAKER = (
    *("cs_CZ", "de_DE", "en_US", "es_ES", "fi_FI", "fr_FR", "hr_HR", "hu_HU", "it_IT"),
    *("lt_LT", "nl_NL", "pt_BR", "ro_RO", "sk_SK", "sv_SE", "tr_TR"),
)
NOUNS = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person"),
    *("phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state"),
    *("substance", "time"),
)  # lexicographer files 3 to 28, see wninput(5WN)


SETTINGS = recipe_settings("classify-names", {}, ClassifySettings)
OWN: dict[str, dict[str, Any]] = {
    "sections": {"max_epochs": 2.0, "group_field": "group"},
    "glosses": {"max_epochs": 2.0},
    "sentiment": {"max_epochs": 3.0},
    "names": {},
}
ROWS: dict[str, dict[str, Any]] = {
    "pretrained": {},
    "random weights": {"learning_rate": 1e-3, "random_weights": True},
}


def sections() -> Iterator[Record]:
    """Yield descriptions; packages of one source, which have similar ones, are a group."""
    listed = subprocess.run(
        ["apt-cache", "dumpavail"], check=True, capture_output=True, text=True
    ).stdout
    found = []
    for stanza in listed.split("\n\n"):
        lines = (line.split(": ", 1) for line in stanza.splitlines() if line[:1] != " ")
        entry = {pair[0]: pair[1] for pair in lines if len(pair) == 2}
        if {"Description", "Section"} <= entry.keys():
            source = entry.get("Source", entry["Package"]).split(" ")[0]
            found.append((entry["Description"], entry["Section"], source))
    sizes = Counter(section for _, section, _ in found)
    for text, section, source in found:
        if sizes[section] >= LEAST:
            yield {"text": text, "label": section, "group": source}


def glosses() -> Iterator[Record]:
    """Yield definitions of nouns without their examples."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "-qq", "download", "wordnet-base"], check=True, cwd=folder)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        lines = Path(folder, "usr/share/wordnet/data.noun").read_text().splitlines()
    for line in lines:
        if line.startswith("  "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        text = gloss.split('; "')[0].strip()
        yield {"text": text, "label": NOUNS[int(fields.split()[1]) - 3]}


def sentiment() -> Iterator[Record]:
    """Yield sentences; ratings go from -4 to 4."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "-d", folder, "vaderSentiment==3.3.2"], check=True)
        (sdist,) = Path(folder).glob("*.tar.gz")
        inner = _member(sdist.read_bytes(), "hutto_ICWSM_2014.tar.gz")
    ratings = _member(inner, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace")
    for line in ratings.splitlines():
        _, mean, text = line.split("\t", 2)
        yield {"text": text.strip(), "label": "positive" if float(mean) > 0 else "negative"}


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (path,) = (path for path in tar.getnames() if path.rsplit("/", 1)[-1] == name)
        file = tar.extractfile(path)
        assert file
        return file.read()


def names() -> Iterator[Record]:
    """Yield names that one of the languages has and no other."""
    languages: dict[str, set[str]] = defaultdict(set)
    for locale in FAKER:
        provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
        for kind in ("last_names", "first_names", "first_names_female", "first_names_male"):
            for name in getattr(provider, kind, ()):
                languages[name].add(locale)
    for name, found in sorted(languages.items()):
        if len(found) == 1:
            yield {"text": name, "label": min(found)[:2]}


SETS: dict[str, Callable[[], Iterator[Record]]] = {
    each.__name__: each for each in (sections, glosses, sentiment, names)
}


def write_set(name: str, path: Path) -> None:
    """Write a set as JSONL, and say how many texts it has."""
    records = list(SETS[name]())
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    labels = len({record["label"] for record in records})
    print(f"{path}: {len(records):,} texts of {labels} labels", flush=True)


def main() -> None:
    """Make the sets, train on each, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description="classifiers of real texts")
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--base", type=Path, required=True, help="a run, such as that of the demo")
    parser.add_argument("--out", type=Path, required=True, help="gets the sets and the runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    lines, figures = [], []
    for name in options.sets:
        data = out / f"{name}.jsonl"
        if not data.exists():
            write_set(name, data)
        rows: dict[str, tuple[Report, str]] = {}
        for row, own in ROWS.items():
            is_first = not rows
            found = classify(
                *(options.base, data, out / f"{name}-{row.split()[0]}"),
                overwrite=True,
                baselines=is_first,
                **SETTINGS | OWN[name] | own,
            )
            if found.report is None:
                raise SystemExit(130)
            if is_first:
                rows |= {each: (report, "") for each, report in found.baselines.items()}
            rows[f"GPT-2, {row}"] = found.report, f"{found.runs[0].seconds:.0f}"
        for row, (report, seconds) in rows.items():
            low, high = report.interval
            figures.append(
                {"set": name, "classifier": row, "seconds": float(seconds) if seconds else None}
                | {"accuracy": report.accuracy, "low": low, "high": high}
                | {"macro_f1": report.macro.f1, "texts": report.count}
            )
            lines.append(
                f"| {name} ({report.count:,}) | {row} | {report.accuracy:.3f} | {low:.3f} to"
                f" {high:.3f} | {report.macro.f1:.3f} | {seconds} |"
            )
        print(*lines[-len(rows) :], sep="\n", flush=True)
    if options.json:
        record = {"date": date.today().isoformat(), "machine": provenance(usable_cores())}
        options.json.write_text(json.dumps(record | {"rows": figures}, indent=1) + "\n")
    print("\n| set (texts of the test) | | accuracy | 95% interval | macro F1 | seconds |")
    print("|---|---|---:|---|---:|---:|", *lines, sep="\n")


if __name__ == "__main__":
    main()
