"""Fine-tuning on several ranks, each method against one process, in few launches of mpiexec."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_nothing
from helpers import mpi
from helpers.mpi import MPIEXEC
from helpers.tuning import TIMES
from programs.methods import CASES, tune

import gpt2c
from gpt2c.files.tensors import read_tensors
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.metrics import read_metrics

pytest.importorskip("mpi4py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec"),
]
OF_RANKS = ("mpi_bytes", "mpi_share")
launch = partial(mpi.launch, "programs.methods")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of random weights, of bytes; some weights are 0."""
    path, tokenizer = tmp_path_factory.mktemp("base"), Tokenizer.from_name("bytes")
    config = gpt2c.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=48, vocab_size=257, eos_token_id=tokenizer.eot
    )
    model = gpt2c.GPT2(config, seed=1)
    model.parameters["h.0.mlp.c_fc.weight"][::3] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runs of one process."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        patch.setenv("GPT2C_NUM_THREADS", "1")
        for name in CASES:
            tune(name, base, out)
    return out


@pytest.fixture(scope="module")
def two(base: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runs of two ranks."""
    out = tmp_path_factory.mktemp("two")
    launch(2, "every", base, out)
    return out


@pytest.fixture(scope="module")
def killed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two ranks; one was killed, after a save in the middle of a cycle."""
    out = tmp_path_factory.mktemp("killed")
    launch(2, "killed", base, out, "cycles", status=2)
    assert [path.name for path in (out / "cycles" / "checkpoints").iterdir()] == ["00000003"]
    return out


@pytest.fixture(scope="module")
def three(base: Path, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runs of three ranks; the killed one goes on."""
    out = tmp_path_factory.mktemp("three")
    shutil.copytree(killed / "cycles", out / "cycles")
    launch(3, "some", base, out, "sft", "cycles")
    return out


def numbers(entry: Any, name: str = "") -> dict[str, float]:
    """Return the numbers of nested entries by their paths; nan of none."""
    if isinstance(entry, dict):
        pairs = entry.items()
    elif isinstance(entry, list):
        pairs = dict(enumerate(entry)).items()
    else:
        told = math.nan if entry is None else entry
        return {name: told} if isinstance(told, int | float) else {}
    found: dict[str, float] = {}
    for key, value in pairs:
        if key not in (*TIMES, *OF_RANKS, "seconds", "step_seconds"):
            found |= numbers(value, f"{name}/{key}")
    return found


def close(found: Any, expected: Any) -> None:
    pair = numbers(found), numbers(expected)
    assert pair[0].keys() == pair[1].keys()
    for name, value in pair[0].items():
        assert value == pytest.approx(pair[1][name], rel=1e-5, abs=1e-5, nan_ok=True), name


def same_run(run: Path, expected: Path) -> None:
    """Compare the metrics of each step, the figures and the weights with those of one process."""
    for part in [path.relative_to(expected) for path in expected.rglob("metrics.jsonl")]:
        close(read_metrics(run / part), read_metrics(expected / part))
        assert all(step["mpi_bytes"] > 0 for step in read_metrics(run / part)[-3:])
        weights = [
            read_tensors(next((path / part).parent.glob("*model.safetensors")))[0]
            for path in (run, expected)
        ]
        flat = [np.concatenate([one[name].ravel() for name in one]) for one in weights]
        assert np.linalg.norm(flat[0] - flat[1]) < 1e-5 * np.linalg.norm(flat[1])
    for part in [path.relative_to(expected) for path in expected.rglob("result.json")]:
        close(*(json.loads((path / part).read_text()) for path in (run, expected)))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_tune_as_one_process(one: Path, two: Path, name: str) -> None:
    same_run(two / name, one / name)


def test_files_are_those_of_one_process(one: Path, two: Path) -> None:
    for name in CASES:
        pair = [{path.relative_to(out) for path in (out / name).rglob("*")} for out in (one, two)]
        assert pair[0] == pair[1]


@pytest.mark.parametrize("name", ["sft", "cycles"])
def test_three_ranks_tune_as_one_process(one: Path, three: Path, name: str) -> None:
    same_run(three / name, one / name)


def test_one_process_goes_on_with_a_run_of_ranks(
    base: Path, one: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    shutil.copytree(killed / "cycles", tmp_path / "cycles")
    tune("cycles", base, tmp_path, resume=True)
    assert len(read_metrics(tmp_path / "cycles" / "metrics.jsonl")) == 6
    close(*(json.loads((out / "cycles" / "result.json").read_text()) for out in (tmp_path, one)))
