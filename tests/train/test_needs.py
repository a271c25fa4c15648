"""Memory: a run takes what was estimated, and a run that does not fit is refused with a mend."""

from __future__ import annotations

import dataclasses
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2c import GPT2, AdamW, GPT2Config
from gpt2c.cli.main import main
from gpt2c.files.tensors import StoredTensor
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.binding import Kernels
from gpt2c.kernels.memory import aligned_offsets
from gpt2c.text.batches import Batches
from gpt2c.text.prepare import prepare
from gpt2c.text.shards import read_shards
from gpt2c.train import needs
from gpt2c.train.needs import SCRATCH, check_training, training_parts, with_scratch
from gpt2c.train.settings import TrainSettings

SETTINGS = TrainSettings(n_layer=3, n_head=2, n_embd=48, block_size=32, batch_size=16)
CONFIG = SETTINGS.model_config(257, 256)
ORDER = 123_456  # bytes of the windows' order
TWO = get_backend(threads=2)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the number of free bytes."""

    def say(size: int) -> None:
        for module in ("train.needs", "kernels.memory"):
            monkeypatch.setattr(f"gpt2c.{module}.available_bytes", lambda: size)

    return say


def need(settings: TrainSettings = SETTINGS, **changes: Any) -> int:
    return sum(
        training_parts(CONFIG, dataclasses.replace(settings, **changes), TWO, ORDER).values()
    )


def refusal(settings: TrainSettings = SETTINGS, **how: Any) -> str:
    with pytest.raises(MemoryError) as error:
        check_training(CONFIG, settings, TWO, ORDER, **how)
    return str(error.value)


@pytest.mark.parametrize("recompute", ["none", "light", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_takes_the_estimated_memory(
    recompute: str, precision: str, accumulate: int
) -> None:
    settings = dataclasses.replace(
        SETTINGS,
        recompute=recompute,
        precision=precision,
        gradient_accumulation_steps=accumulate,
    )
    parts = training_parts(CONFIG, settings, TWO, ORDER)
    model = GPT2(CONFIG, recompute=settings.recomputation, precision=precision)
    optimizer = AdamW(model)
    idx = np.arange(16 * 32).reshape(16, 32) % 257
    model.zero_grad()
    for _ in range(accumulate):
        model.loss(idx, idx)
        model.backward()
    optimizer.step()
    model.loss(idx, idx, keep=False)
    assert parts["weights"] == model.flat_parameters.nbytes
    assert parts["gradients"] == model.flat_gradients.nbytes + model._spare_memory.nbytes
    assert parts["moments"] == optimizer.m.nbytes + optimizer.v.nbytes
    assert parts["activations"] == model._memory._memory.nbytes
    assert parts["a save"] == model.parameters["wte.weight"].nbytes
    assert parts["order of the windows"] == ORDER
    assert aligned_offsets(CONFIG.parameter_shapes())[""] == model.flat_parameters.size


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shards", [1, 7])
def test_order_of_the_windows_takes_the_estimated_memory(order: int, shards: int) -> None:
    tokens = [np.zeros(16 * 40_000 // shards, np.uint16) for _ in range(shards)]
    batches = Batches(tokens, 4, 16, 1, order)
    steps = batches.windows_per_epoch // 4 + 1  # the last touches the next epoch
    Batches([np.zeros(100, np.uint16)], 4, 16, 1, order).batch(0)  # the first one imports
    tracemalloc.start()
    try:
        for epoch in range(4):
            batches.batch(epoch * steps)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held == pytest.approx(32 * batches.windows_per_epoch, rel=0.05)  # of two epochs
    assert 0.95 * batches.order_bytes < peak < 1.01 * batches.order_bytes + 20_000


def test_order_of_the_windows_counts_as_memory(
    free: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a long text in short windows it takes more memory than the model."""
    prepare(["the cat sat on the mat. " * 4000], tmp_path / "data", "bytes")
    flags = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 2 --batch-size 2 --max-iters 1"
    call = f"train --data {tmp_path}/data --out {tmp_path}/run {flags}".split()
    free(needs.PYTHON)
    assert main(call) == 2
    windows = int(len(read_shards(tmp_path / "data", "train")[0]) - 1) // 2
    found = re.search(r"order of the windows (\d\.\d) MB", capsys.readouterr().err)
    assert found and float(found[1]) == pytest.approx(56 * windows / 1e6, abs=0.06)


def test_ranks_share_the_moments_with_zero_alone() -> None:
    alone = training_parts(CONFIG, SETTINGS, TWO, ORDER)
    shared = training_parts(CONFIG, SETTINGS, TWO, ORDER, ranks=4)
    others = {"gradients of other ranks": alone["gradients"]}
    assert shared == alone | others | {"moments": alone["moments"] // 4}
    whole = dataclasses.replace(SETTINGS, zero=0)
    assert training_parts(CONFIG, whole, TWO, ORDER, ranks=4) == alone | others


def test_run_that_just_fits_is_taken(free: Callable[[int], None]) -> None:
    free(need())
    check_training(CONFIG, SETTINGS, TWO, ORDER)
    free(need() - 1)
    assert refusal().startswith("training needs ")


def test_rank_takes_no_more_than_its_share_of_the_host(free: Callable[[int], None]) -> None:
    free(2 * need())
    check_training(CONFIG, SETTINGS, TWO, ORDER, most=need())
    assert refusal(most=need() - 1).startswith("training needs ")


@pytest.mark.parametrize("rows", [1, 2, 7, 15])
@pytest.mark.parametrize("recompute", ["none", "light", "full"])
def test_error_names_the_largest_batch_that_fits(
    rows: int, recompute: str, free: Callable[[int], None]
) -> None:
    settings = dataclasses.replace(SETTINGS, recompute=recompute)
    free(need(settings, batch_size=rows + 1) - 1)
    said = refusal(settings)
    assert f"lower --batch-size to {rows} (a row takes 0." in said
    check_training(CONFIG, dataclasses.replace(settings, batch_size=rows), TWO, ORDER)
    assert ("--recompute full" in said) == (recompute != "full")


def test_error_names_recompute_where_it_helps(free: Callable[[int], None]) -> None:
    free(need(recompute="full"))
    assert re.search(r", or pass --recompute full, or lower --block-size$", refusal())
    free(need(recompute="full", batch_size=5))
    assert ", or pass --recompute full with --batch-size 5, or lower" in refusal()
    free(need(recompute="full", batch_size=1))
    assert "are free: pass --recompute full with --batch-size 1, or lower --block-" in refusal()
    free(need(recompute="full", batch_size=1) - 1)
    assert refusal().endswith("are free: lower --n-layer, --n-embd or --block-size")
    free(0)
    assert "; 0.0 MB are free: lower --n-layer" in refusal()


def test_resumed_run_is_offered_no_other_batch(free: Callable[[int], None]) -> None:
    free(need(recompute="full"))
    assert refusal(resumed=True).endswith("are free: pass --recompute full")
    free(need(recompute="full") - 1)
    assert refusal(resumed=True).endswith("are free: continue where more memory is free")


def test_error_lists_the_parts_of_memory(free: Callable[[int], None]) -> None:
    config = GPT2Config()
    settings = TrainSettings(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=4)
    free(2_500_000_000)
    with pytest.raises(MemoryError) as error:
        check_training(config, settings, TWO, 56_000_000)
    assert re.match(
        r"training needs 4,\d{3} MB: weights 498 MB, gradients 498 MB, moments 996 MB,"
        r" activations 2,\d{3} MB, order of the windows 56 MB, threads 10 MB, Python 34 MB,"
        r" a save 154 MB; 2,500 MB are free:"
        r" pass --recompute full with --batch-size \d, or lower --block-size$",
        str(error.value),
    ), str(error.value)


def test_converted_tensor_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2(CONFIG)
    tensors = {
        name: StoredTensor(Path("file"), name, "F16", parameter.astype(np.float16))
        for name, parameter in model.parameters.items()
    }
    monkeypatch.setattr("gpt2c.kernels.memory.UNASKED", 0)
    largest = 4 * max(tensor.data.size for tensor in tensors.values())
    quantized = GPT2(CONFIG, weights="int8")
    for load in (model.load_parameters, quantized.load_parameters):
        monkeypatch.setattr("gpt2c.kernels.memory.available_bytes", lambda: largest - 1)
        with pytest.raises(MemoryError, match=r"a tensor in float32 0\.0 MB; 0\.0 MB are free"):
            load(tensors, "a file")
        monkeypatch.setattr("gpt2c.kernels.memory.available_bytes", lambda: largest)
        load(tensors, "a file")
        monkeypatch.setattr("gpt2c.kernels.memory.available_bytes", lambda: 0)
        load(model.parameters, "a model")


def test_run_that_does_not_fit_writes_nothing(
    free: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(["the cat sat on the mat. " * 60], tmp_path / "data", "bytes")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").touch()
    free(needs.PYTHON)
    flags = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --overwrite"
    assert main(f"train --data {tmp_path}/data --out {tmp_path}/run {flags}".split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpt2c: not enough memory: training needs ") and said.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


@pytest.mark.parametrize("row", [64, 1000, 8192, 100_000])
def test_threads_have_room_for_a_head_of_a_long_row(row: int) -> None:
    """Attention copies the keys and values of a head; scratch memory is of floats."""
    config = GPT2Config(n_layer=1, n_head=1, n_embd=130)
    found = with_scratch({"gradients": 0}, config, TWO, row, row, "fp32", divided=False)
    assert isinstance(TWO, Kernels)
    taken = 4 * TWO._lib.attention_scratch_size(row, 0, 130, 2)
    assert taken <= found["threads"] <= taken + 2 * SCRATCH
