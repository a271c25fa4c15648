"""Copies, pickles and repr of models, optimizers and tokenizers; and threads= everywhere."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.command import program, run_process

from gpt2c import GPT2, AdamW, Engine, Generator, GPT2Config, Tokenizer
from gpt2c.evaluate.scoring import Scorer
from gpt2c.kernels.backend import backends
from gpt2c.kernels.checks import counted
from gpt2c.text.batches import Batches
from gpt2c.text.shards import open_tokens, write_tokens

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3)
IDX = np.arange(12).reshape(2, 6)
TARGETS = IDX + 1
KINDS = ["fp32", "fp16", "int8"]
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda it, n=n: pickle.loads(pickle.dumps(it, n)) for n in (2, 5)},
}


@pytest.fixture(params=COPIES)
def copied(request: pytest.FixtureRequest) -> Any:
    """Copy in every way, in turn."""
    return COPIES[request.param]


def make(kind: str = "fp32", backend: Any = "auto", **settings: Any) -> Any:
    model = GPT2(CONFIG, seed=3, backend=backend, **settings)
    return model if kind == "fp32" else model.quantize(kind)


def train(model: GPT2, optimizer: AdamW, steps: int = 2) -> list[float]:
    losses = []
    for _ in range(steps):
        model.zero_grad()
        losses.append(model.loss(IDX, TARGETS))
        model.backward()
        optimizer.step(grad_clip=1.0)
    return losses


# ---- copies --------------------------------------------------------------------------------------


@TWO_BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_copy_gives_the_same_bits_in_memory_of_its_own(
    kind: str, copied: Any, backend: Any
) -> None:
    model = make(kind, backend)
    logits = model(IDX)
    other = copied(model)
    assert type(other) is type(model) and other.config == model.config
    assert repr(other) == repr(model)
    assert other.backend is model.backend
    assert np.array_equal(other(IDX), logits)
    for name, parameter in other.parameters.items():
        assert parameter.dtype == model.parameters[name].dtype
        assert not np.shares_memory(parameter, model.parameters[name])
        assert parameter.ctypes.data % 64 == 0, name
        parameter[...] = 1
    assert np.array_equal(model(IDX), logits)
    assert other.generate(IDX, 2).shape == (2, 8)


def test_training_leaves_a_copy_alone(copied: Any) -> None:
    """For a reference model, or a moving average of weights."""
    model = make()
    reference = copied(model)
    logits = model(IDX)
    train(model, AdamW(model, learning_rate=0.1))
    assert not np.array_equal(model(IDX), logits)
    assert np.array_equal(reference(IDX), logits)
    reference.flat_parameters[...] *= 0.5
    reference.flat_parameters[...] += 0.5 * model.flat_parameters


@TWO_BACKENDS
@pytest.mark.parametrize("recompute", [None, "light", "full"])
def test_copied_model_and_optimizer_train_on_to_the_same_bits(
    recompute: str | None, copied: Any, backend: Any
) -> None:
    model = make("fp32", backend, recompute=recompute)
    optimizer = AdamW(model, learning_rate=0.05)
    train(model, optimizer)
    if copied is copy.copy:  # copied alone, the optimizer keeps its model
        assert copied(optimizer).model is model
        return
    pair = {"model": model, "optimizer": optimizer}
    other = copied(pair)
    assert other["optimizer"].model is other["model"] is not model
    assert other["model"].recompute == recompute and other["optimizer"].steps == 2
    losses = train(model, optimizer)
    moments = optimizer.m.copy(), optimizer.v.copy()
    assert train(other["model"], other["optimizer"]) == losses
    assert np.array_equal(other["model"].flat_parameters, model.flat_parameters)
    for moment, same in zip(moments, (other["optimizer"].m, other["optimizer"].v), strict=True):
        assert np.array_equal(moment, same)


def test_valid_gradients_are_copied(copied: Any) -> None:
    model = make()
    model.loss(IDX, TARGETS)
    pending = copied(model)
    assert "needs a loss" in refused(pending.backward)
    assert not pending.flat_gradients.any()
    model.backward()
    other = copied(model)
    assert np.array_equal(other.flat_gradients, model.flat_gradients)
    for each in (model, other):
        each.loss(IDX, TARGETS)
        each.backward()
    assert np.array_equal(other.flat_gradients, model.flat_gradients), "both add to what was there"
    model.zero_grad()
    assert not copied(model).flat_gradients.any()
    assert other.flat_gradients.any()


def test_copy_of_an_untrained_model_allocates_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    zeros = np.zeros

    def seen(size: int) -> Any:
        sizes.append(size)
        return zeros(size, np.float32)

    for module in ("weights", "model"):
        monkeypatch.setattr(f"gpt2c.model.{module}.aligned_zeros", seen)
    model = make()
    copy.deepcopy(model)(IDX)
    model.generate(IDX, 2)
    model.loss(IDX, TARGETS, keep=False)
    assert sizes.count(model.flat_parameters.size) == 2, "the two models' parameters"
    model.loss(IDX, TARGETS)
    assert sizes.count(model.flat_parameters.size) == 3


def test_loaded_model_is_copied(tmp_path: Path, copied: Any) -> None:
    make().save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    logits = model(IDX)
    other = copied(model)
    (tmp_path / "model.safetensors").unlink()
    assert np.array_equal(other(IDX), logits)
    other.flat_parameters.fill(0)
    assert np.array_equal(model(IDX), logits)


def test_generator_is_copied(copied: Any) -> None:
    tokenizer = Tokenizer.from_name("bytes")
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=24, n_layer=1, n_head=3)
    generator = Generator(GPT2(config), tokenizer)
    text = generator.generate("abc", max_new_tokens=5, temperature=0)
    other = copied(generator)
    assert other.generate("abc", max_new_tokens=5, temperature=0) == text
    assert copied(tokenizer).encode("abc") == tokenizer.encode("abc")
    assert copied(config) == config


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_computes_the_same(kind: str, tmp_path: Path) -> None:
    """As in a worker of multiprocessing's spawn."""
    if kind == "fp16":
        pytest.skip("a process is dear, and int8 has two arrays where this has one")
    model = make(kind, threads=1)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, IDX)))
    done = run_process(program("programs.fresh", "compute", str(file)))
    assert done.returncode == 0, done.stderr
    other, logits = pickle.loads(file.read_bytes())
    assert np.array_equal(logits, model(IDX)) and np.array_equal(other(IDX), logits)
    assert repr(other) == repr(model)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.skipif(backends()[0] == "numpy", reason="no kernels are built")
def test_model_of_another_machine_takes_the_backend_that_there_is(kind: str) -> None:
    model = make(kind, "base", threads=3)
    state = model.__getstate__() | {"backend": ("avx1024", 3)}
    other = type(model).__new__(type(model))
    with pytest.warns(UserWarning, match="'avx1024': unknown name; .* results differ slightly"):
        other.__setstate__(state)
    assert (other.backend.name, other.backend.threads) == (backends()[0], 3)
    np.testing.assert_allclose(other(IDX), model(IDX), rtol=0.05, atol=1e-2)


@TWO_BACKENDS
def test_copy_shares_its_kernels(backend: Any, copied: Any) -> None:
    if backend.name == "numpy":
        pytest.skip("numpy is a module")
    assert copied({"held": [backend]})["held"][0] is backend


# ---- repr ----------------------------------------------------------------------------------------


@pytest.mark.skipif(backends()[0] == "numpy", reason="no kernels are built")
def test_repr_of_models_and_optimizers() -> None:
    model = make("fp32", "base", threads=2)
    size = f"{CONFIG.num_parameters():,} parameters"
    assert repr(model) == f"GPT2(2 layers, 24 channels, {size}, base, 2 threads)"
    quantized = model.quantize("int8")
    assert repr(quantized) == (f"GPT2(2 layers, 24 channels, {size}, int8, base, 2 threads)")
    optimizer = AdamW(model, learning_rate=0.01)
    train(model, optimizer, 1)
    assert repr(optimizer) == (
        f"AdamW({model!r}, learning_rate=0.01, betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1,"
        " steps=1)"
    )
    tokenizer = Tokenizer.from_name("bytes")
    assert repr(tokenizer) == "Tokenizer(257 tokens, <|endoftext|> is 256)"
    config = GPT2Config(vocab_size=257, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    small = GPT2(config, None, "base", threads=1)
    assert repr(Generator(small, tokenizer)) == f"Generator({small!r}, {tokenizer!r})"
    assert "(1 layer, 4 channels" in repr(small) and repr(small).endswith("base, 1 thread)")
    assert repr(GPT2(CONFIG, backend="numpy")).endswith(f"{size}, numpy)")


@pytest.mark.skipif(backends()[0] == "numpy", reason="no kernels are built")
def test_repr_of_other_objects(tmp_path: Path) -> None:
    model = make("fp32", "base", threads=2)
    assert repr(model.backend) == "Kernels('base', threads=2)"
    decoder = model.decoder(2, 8)
    assert repr(decoder) == "Decoder(slots=2, capacity=8, base)"
    assert repr(Scorer(model)) == "Scorer(Decoder(slots=1, capacity=16, base))"
    sizes = "slots=3, queue=64, capacity=16"
    with Engine(model, slots=3) as engine:
        assert repr(engine) == f"Engine({model!r}, {sizes})"
        request = engine.submit([1], 1)
        request.result(60)
        assert repr(request) == "Request(1 new token, length)"
        assert repr(engine.submit([1], 0)) == "Request(0 new tokens, length)"
        long = engine.submit([1], 100_000)
        assert repr(long).endswith(", continues)")
    assert repr(engine) == f"Engine({model!r}, {sizes}, closed)"
    assert re.fullmatch(r"Request\([\d,]+ new tokens?, error\)", repr(long))
    write_tokens(tmp_path / "a.bin", np.arange(40))
    tokens = open_tokens(tmp_path / "a.bin")
    assert repr(tokens) == f"StoredTokens('{tmp_path}/a.bin', 40 tokens)"
    batches = Batches([tokens], 2, 4, seed=5)
    assert repr(batches) == "Batches(1 shard, batch_size=2, block_size=4, seed=5)"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (1000, "1,000 tokens")]
)
def test_counted_uses_the_singular_for_one(number: int, text: str) -> None:
    assert counted(number, "token") == text


def test_repr_rounds_large_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(GPT2Config, "num_parameters", lambda config: 124_439_808)
    assert "124M parameters" in repr(model)


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.skipif(backends()[0] == "numpy", reason="no kernels are built")
def test_threads_are_an_argument_at_every_door(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_name("bytes")
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=24, n_layer=1, n_head=3)
    model = GPT2(config, threads=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = [
        model,
        GPT2.from_pretrained(tmp_path, threads=3),
        GPT2.from_pretrained(tmp_path, "base", quantize="int8", threads=3),
        GPT2(config, threads=3, weights="fp16"),
        GPT2.from_pretrained(tmp_path, quantize="fp16", threads=3),
        model.quantize("int8"),
        Generator.from_pretrained(tmp_path, threads=3).model,
        Generator.from_pretrained(tmp_path, quantize="int8", threads=3).model,
    ]
    assert [each.backend.threads for each in opened] == [3] * len(opened)
    for wrong in (0, -1, 1.5, "2", True):
        assert refused(GPT2, config, threads=wrong).startswith("threads must be")
    assert "needs a backend's name" in refused(GPT2, config, backend=model.backend, threads=2)
