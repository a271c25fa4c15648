"""Training on several ranks, against one process, in few launches of mpiexec."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import DOCUMENTS, draw_nothing
from helpers import mpi
from helpers.command import environment, program
from helpers.mpi import MPIEXEC, OPEN_MPI
from programs.ranks import SETTINGS

from gpt2c.files.tensors import read_tensors
from gpt2c.text.prepare import prepare
from gpt2c.train import pretrain
from gpt2c.train.metrics import read_metrics

pytest.importorskip("mpi4py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec"),
]
launch = partial(mpi.launch, "programs.ranks")


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of one process: a whole one, and its first half."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        patch.setenv("GPT2C_NUM_THREADS", "1")
        pretrain.train(data, out / "whole", SETTINGS)
        pretrain.train(data, out / "half", SETTINGS | {"max_iters": 4})
    return out


@pytest.fixture(scope="module")
def two(data: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of two ranks; "of one" is the half run of one process, and two went on."""
    out = tmp_path_factory.mktemp("two")
    prepare(DOCUMENTS[1:], out / "other", "bytes")
    shutil.copytree(one / "half", out / "of one")
    launch(2, "halves", data, out)
    return out


@pytest.fixture(scope="module")
def three(data: Path, one: Path, two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of three ranks; "of two" is the first half of one of two ranks."""
    out = tmp_path_factory.mktemp("three")
    shutil.copytree(two / "whole", out / "of two")
    shutil.rmtree(out / "of two" / "checkpoints" / "00000008")
    launch(3, "thirds", data, out)
    return out


def checkpoint(run: Path) -> dict[str, bytes]:
    """Return the files of a run's last checkpoint whose bytes are those of its numbers."""
    names = ("model.safetensors", "trainer.safetensors")
    return {name: (run / "checkpoints" / "00000008" / name).read_bytes() for name in names}


def close(run: Path, whole: Path) -> None:
    """Compare losses, weights and moments with those of one process."""
    losses = [
        [step["loss"] for step in read_metrics(path / "metrics.jsonl")] for path in (run, whole)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    found, expected = (
        [step["val_loss"] for step in read_metrics(path / "metrics.jsonl") if "val_loss" in step]
        for path in (run, whole)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(found) == 2
    for name in ("model.safetensors", "trainer.safetensors"):
        files = [read_tensors(path / "checkpoints" / "00000008" / name)[0] for path in (run, whole)]
        assert files[0].keys() == files[1].keys()
        # All together: the bias of keys has no gradient but rounding, which Adam makes large.
        pair = [np.concatenate([file[key].ravel() for key in file]) for file in files]
        assert np.linalg.norm(pair[0] - pair[1]) < 1e-5 * np.linalg.norm(pair[1]), name


@pytest.mark.parametrize("name", ["whole", "halves", "of one"])
def test_two_ranks_train_as_one_process(one: Path, two: Path, name: str) -> None:
    close(two / name, one / "whole")


@pytest.mark.parametrize("name", ["whole", "of two"])
def test_three_ranks_train_as_one_process(one: Path, three: Path, name: str) -> None:
    close(three / name, one / "whole")


@pytest.mark.parametrize("name", ["again", "unsharded", "halves"])
def test_two_ranks_give_the_same_bits(two: Path, name: str) -> None:
    assert checkpoint(two / name) == checkpoint(two / "whole")


def test_recomputation_and_bf16_give_the_same_bits_with_zero_and_without(two: Path) -> None:
    assert checkpoint(two / "recomputed 1") == checkpoint(two / "recomputed 0")
    assert checkpoint(two / "recomputed 1") != checkpoint(two / "whole")


def test_transport_in_16_bits_gives_the_same_bits_after_a_resume(two: Path) -> None:
    assert checkpoint(two / "narrow halves") == checkpoint(two / "narrow")
    assert checkpoint(two / "narrow") != checkpoint(two / "whole")


def test_transport_in_16_bits_trains_nearly_as_one_process(one: Path, two: Path) -> None:
    """A gradient loses at most 2^-8 of itself; AdamW makes more of that in small gradients."""
    found, expected = (
        [step["loss"] for step in read_metrics(path / "metrics.jsonl")]
        for path in (two / "narrow", one / "whole")
    )
    np.testing.assert_allclose(found, expected, rtol=2**-8)


def test_save_that_fails_halfway_changes_no_bit(two: Path) -> None:
    assert checkpoint(two / "full") == checkpoint(two / "whole")
    assert [path.name for path in (two / "full" / "checkpoints").iterdir()] == ["00000008"]
    assert len([*(two / "whole" / "checkpoints").iterdir()]) == 2


def test_all_ranks_skip_a_step_that_one_finds_not_finite(two: Path) -> None:
    skipped = [step["skipped"] for step in read_metrics(two / "skips" / "metrics.jsonl")]
    assert skipped == [0, 1, 1, 1, 1, 1, 1, 1]  # a rank takes three batches in a step


def test_three_ranks_give_the_same_bits_without_zero(three: Path) -> None:
    assert checkpoint(three / "unsharded") == checkpoint(three / "whole")


def test_one_process_goes_on_with_a_run_of_ranks(
    data: Path, one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    shutil.copytree(two / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000008")
    pretrain.train(data, tmp_path / "run", {}, resume=True)
    close(tmp_path / "run", one / "whole")


def test_metrics_have_the_bytes_of_the_model_of_traffic(two: Path, three: Path) -> None:
    for run, p in ((two, 2), (three, 3)):
        config = json.loads((run / "whole" / "config.json").read_text())
        moments, _ = read_tensors(run / "whole/checkpoints/00000008/trainer.safetensors")
        size = 4 * moments["m"].size  # the flat gradients
        assert config["n_layer"] == 2
        for step in read_metrics(run / "whole" / "metrics.jsonl"):
            wanted = 2 * (p - 1) / p * size
            assert abs(step["mpi_bytes"] - wanted) < 0.05 * wanted  # pieces differ by a line
            assert 0 <= step["mpi_share"] <= 1


def test_transport_in_16_bits_halves_the_bytes_of_gradients(two: Path) -> None:
    narrow, whole = (
        [step["mpi_bytes"] for step in read_metrics(two / name / "metrics.jsonl")]
        for name in ("narrow", "whole")
    )
    np.testing.assert_allclose(narrow, np.multiply(0.75, whole), rtol=0.01)


def test_ranks_are_shown_and_measured(tmp_path: Path) -> None:
    launch(2, "shows", tmp_path)


def test_job_ends_with_the_reason_of_a_rank(data: Path, tmp_path: Path) -> None:
    said = launch(2, "raises", data, tmp_path, status=2)
    assert said.count("gpt2c: rank 1: a broken disk\n") == 1
    assert (tmp_path / "raises" / "checkpoints").is_dir()


def test_rank_that_fails_does_not_wait_for_others(data: Path, tmp_path: Path) -> None:
    said = launch(2, "stays", data, tmp_path, status=2)
    assert said.count("gpt2c: rank 1: a broken disk\n") == 1 and "--mpi-timeout" not in said


def test_rank_that_fails_in_a_save_tells_its_own_reason(data: Path, tmp_path: Path) -> None:
    said = launch(2, "serves", data, tmp_path, status=2)
    assert said.count("gpt2c: rank 1: a bucket does not fit\n") == 1


@pytest.mark.parametrize("who", ["mpiexec", "a rank"])
def test_signal_saves_and_stops_all_ranks(
    data: Path, tmp_path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(MPIEXEC), "-n", "2", *program("programs.ranks", "signalled")]
    command += [str(data), str(tmp_path), "1" if who == "a rank" else ""]
    with subprocess.Popen(
        command, env=environment(GPT2C_NUM_THREADS="1", **OPEN_MPI), stdout=subprocess.PIPE
    ) as job:
        assert job.stdout is not None
        if who == "mpiexec":
            while b" 3/100000 " not in (line := job.stdout.readline()):
                assert line
            assert b"% waiting" in line
            job.send_signal(signal.SIGINT)
        job.communicate(timeout=60)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert int(saved.name) == len(steps) > 2
    draw_nothing(monkeypatch)
    pretrain.train(data, tmp_path / "run", {"max_iters": len(steps) + 1}, resume=True)


def test_rank_that_hangs_is_found(data: Path, tmp_path: Path) -> None:
    said = launch(2, "hangs", data, tmp_path, status=2)
    assert "gpt2c: rank 0: waited 4 s (--mpi-timeout) for gradients in step 1: another" in said


def test_rank_that_does_not_start_mpi_is_found() -> None:
    command = [str(MPIEXEC), "-n", "2", *program("programs.fresh", "join_late")]
    done = subprocess.run(
        command, env=environment(**OPEN_MPI), timeout=40, capture_output=True, text=True
    )
    assert done.returncode and "Timeout (0:00:02)!" in done.stderr, done
