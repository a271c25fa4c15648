"""Distillation: its formulas, its limits, its runs, and bad input."""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.exact import check_differences, exact, odd_model
from helpers.tuning import capitals, losses, resumes_to_the_bit, weights

import gpt2c
from gpt2c.finetune import distill, sft
from gpt2c.finetune.distill import Distillation, DistillSettings, divergence, student_config
from gpt2c.model.objective import CrossEntropy
from gpt2c.text.tokenizer import Tokenizer

BETAS = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
QUICK: dict[str, Any] = {
    "learning_rate": 0.01, "max_iters": 6, "eval_interval": 3, "batch_size": 6, "backend": "base",
}  # fmt: skip


def softmax(logits: Any) -> Any:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.fixture
def logits(rng: np.random.Generator) -> tuple[Any, Any]:
    """Return logits of a student and of a teacher, (5, 7) float64."""
    return 3 * rng.standard_normal((5, 7)), 3 * rng.standard_normal((5, 7))


@BETAS
@pytest.mark.parametrize("tau", [0.7, 2.0])
def test_divergence_is_its_definition(beta: float, tau: float, logits: Any) -> None:
    z, t = logits
    p, q = softmax(z / tau), softmax(t / tau)
    m = beta * q + (1 - beta) * p
    wanted = {
        0.0: (q * np.log(q / p)).sum(-1),
        1.0: (p * np.log(p / q)).sum(-1),
    }.get(beta, (beta * q * np.log(q / m) + (1 - beta) * p * np.log(p / m)).sum(-1))
    found, _ = divergence(z, t, tau, beta)
    np.testing.assert_allclose(found, tau**2 * wanted, rtol=1e-10)
    same, slope = divergence(z, z + 3, tau, beta)  # a softmax does not see a constant
    np.testing.assert_allclose([same, slope.sum(1)], 0, atol=1e-12)


@BETAS
@pytest.mark.parametrize("tau", [0.7, 2.0])
def test_gradient_is_the_central_difference(beta: float, tau: float, logits: Any) -> None:
    z, t = logits
    _, gradient = divergence(z, t, tau, beta)
    for v in range(z.shape[1]):
        step = np.zeros_like(z)
        step[:, v] = 1e-5
        above, below = (divergence(z + sign * step, t, tau, beta)[0] for sign in (1, -1))
        np.testing.assert_allclose((above - below) / 2e-5, gradient[:, v], rtol=1e-6, atol=1e-9)


def test_large_temperature_matches_centred_logits(logits: Any) -> None:
    z, t = logits
    loss, gradient = divergence(z, t, 1e4, 0.0)
    apart = (z - z.mean(1, keepdims=True)) - (t - t.mean(1, keepdims=True))
    np.testing.assert_allclose(gradient, apart / z.shape[1], rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(loss, (apart**2).mean(1) / 2, rtol=2e-3)


def test_far_logits_stay_finite() -> None:
    z, t = np.array([[300.0, -300, 0]], np.float32), np.array([[-300.0, 300, 0]], np.float32)
    for beta in (0.0, 0.5, 1.0):
        loss, gradient = divergence(z, t, 1.0, beta)
        assert np.isfinite(loss).all() and np.isfinite(gradient).all()
        assert loss[0] > 0.6 and loss.dtype == gradient.dtype == np.float32


# ---- the objective -------------------------------------------------------------------------------


class Sure:
    """A teacher that is sure of the token that each row's number names."""

    def logits(self, hidden: Any) -> Any:
        out = np.zeros((len(hidden), 257), np.float32)
        out[np.arange(len(hidden)), hidden[:, 0].astype(int)] = 200
        return out


@pytest.mark.parametrize("block", [1 << 20, 600])  # all rows at once; two
def test_teacher_that_is_sure_is_cross_entropy(
    base: Path, block: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(
        import_module("gpt2c.finetune.distill"), "BLOCK", block
    )  # 600: blocks of two rows
    model, idx = gpt2c.from_pretrained(base, "base"), [[1, 2, 3, 4, 5], [6, 7]]
    targets = rng.integers(0, 257, 7).astype(np.int32)
    targets[[1, 6]] = -1
    hidden = targets[:, None].astype(np.float32)
    found = []
    for objective in (
        CrossEntropy(targets),
        Distillation(targets, Sure(), hidden, 1.0, 1.0, 0.0),
        Distillation(targets, Sure(), hidden, 0.3, 1.0, 0.0),
        Distillation(targets, Sure(), hidden, 0.0, 7.0, 0.5),
    ):
        model.zero_grad()
        loss = model.loss(idx, objective)
        model.backward()
        found.append((loss, model.flat_gradients.copy()))
        assert model.loss(idx, objective, keep=False) == pytest.approx(loss, rel=1e-6)
    for loss, gradient in found[1:3]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        np.testing.assert_allclose(gradient, found[0][1], atol=1e-6)
    assert found[3][0] == pytest.approx(found[0][0], rel=1e-7)  # without the teacher
    np.testing.assert_array_equal(found[3][1], found[0][1])


@BETAS
def test_gradients_of_a_model_are_derivatives(
    base: Path, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, idx = gpt2c.from_pretrained(base, "base").config, [[1, 2, 3, 4], [5, 6]]
    teacher = gpt2c.GPT2(config, seed=7, backend="base")
    teacher.flat_parameters[...] *= 3
    hidden, targets = teacher.hidden(idx), np.array([2, 3, -1, 5, 6, 7], np.int32)
    student = exact(odd_model(config), monkeypatch)

    def loss() -> float:
        return student.loss(idx, Distillation(targets, teacher, hidden, 0.6, 2.0, beta))

    loss()
    student.backward()
    check_differences(student, loss)


def test_logits_of_hidden_states_are_the_models(base: Path) -> None:
    model = gpt2c.from_pretrained(base, "base")
    hidden = model.hidden([[1, 2, 3], [4, 5]])
    np.testing.assert_allclose(model.logits(hidden[:3]), model([[1, 2, 3]])[0], atol=1e-6)
    np.testing.assert_allclose(model.logits(hidden[3:]), model([[4, 5]])[0], atol=1e-6)
    for wrong in (hidden[:, :5], hidden.astype(np.float64), hidden[0], hidden[:0], None):
        assert "hidden must be float32 (n, 32)" in refused(lambda wrong=wrong: model.logits(wrong))


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that has learned the capitals."""
    out = tmp_path_factory.mktemp("taught") / "teacher"
    sft(base, capitals(60), out, **QUICK | {"max_iters": 60, "eval_interval": 60}, eval_answers=0)
    return out


def test_student_comes_near_its_teacher(teacher: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 60, "eval_interval": 60, "n_layer": 1}
    bits = weights(teacher)
    result = distill(teacher, capitals(60), tmp_path / "run", **given, kd_ratio=1.0)
    assert weights(teacher) == bits
    student = gpt2c.from_pretrained(tmp_path / "run")
    assert (student.config.n_layer, student.config.n_embd) == (1, 32)
    assert result.after["val_loss"] < 0.5 * result.before["val_loss"]
    assert result.after["val_teacher_loss"] == result.before["val_teacher_loss"]
    entries = losses(tmp_path / "run")
    assert entries[-1]["kd"] < 0.3 * entries[0]["kd"]
    assert all(entry["loss"] == pytest.approx(entry["kd"], rel=1e-5) for entry in entries)


def test_loss_is_the_sum_of_its_parts(teacher: Path, tmp_path: Path) -> None:
    for batch_tokens in (20, 4096):
        out = tmp_path / str(batch_tokens)
        given = QUICK | {"n_embd": 16, "kd_ratio": 0.3, "batch_tokens": batch_tokens}
        distill(teacher, capitals(30), out, **given)
        for entry in losses(out):
            assert entry["loss"] == pytest.approx(0.7 * entry["ce"] + 0.3 * entry["kd"], rel=1e-5)
    few, all_of_them = (
        [(entry["ce"], entry["kd"]) for entry in losses(tmp_path / name)] for name in ("20", "4096")
    )
    np.testing.assert_allclose(few, all_of_them, rtol=1e-4)


def test_without_the_teachers_share_it_is_fine_tuning(
    base: Path, teacher: Path, tmp_path: Path
) -> None:
    given = QUICK | {"eval_interval": 6}
    distill(teacher, capitals(30), tmp_path / "kd", student=base, kd_ratio=0.0, **given)
    sft(base, capitals(30), tmp_path / "sft", eval_answers=0, **given)
    assert weights(tmp_path / "kd") == weights(tmp_path / "sft")


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"lmbda": 0.5, "max_new_tokens": 5}])
def test_killed_run_goes_on_to_the_bit(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    tune = partial(distill, teacher, capitals(30))
    given = QUICK | {"n_layer": 1, "beta": 0.5} | changes

    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        return tune(out, resume=resume, **({} if resume else given | others))

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, 3)
    if "lmbda" in changes:
        policies = [entry["on_policy"] for entry in losses(tmp_path / "whole")]
        assert {0.0, 1.0} == set(policies)
        assert all(("ce" in entry) != entry["on_policy"] for entry in losses(tmp_path / "whole"))


def test_student_learns_on_its_own_texts(teacher: Path, tmp_path: Path) -> None:
    given = QUICK | {"n_layer": 1, "lmbda": 1.0, "beta": 1.0, "max_new_tokens": 6}
    result = distill(
        teacher, capitals(60), tmp_path / "run", **given | {"max_iters": 80, "eval_interval": 80}
    )
    assert result.after["val_loss"] < result.before["val_loss"]
    entries = losses(tmp_path / "run")
    assert np.mean([one["kd"] for one in entries[-5:]]) < 0.5 * entries[0]["kd"]


def test_new_student_of_a_llama_keeps_its_proportions() -> None:
    config = gpt2c.LlamaConfig(257, 64, 176, 4, 4, 2, max_position_embeddings=48)
    small = student_config(config, 2, 2, 32)
    assert (small.n_layer, small.n_embd, small.inner) == (2, 32, 88)
    assert (small.num_attention_heads, small.KV, small.HS) == (2, 1, 16)
    assert student_config(gpt2c.GPT2Config(n_inner=100, n_embd=48, n_head=2), 0, 0, 24).inner == 50


def test_bad_input_is_refused_before_anything_is_written(
    base: Path, teacher: Path, tmp_path: Path
) -> None:
    out, rows = tmp_path / "run", capitals(9)
    other = tmp_path / "other"
    config = gpt2c.GPT2Config(vocab_size=260, n_layer=1, n_head=1, n_embd=8, n_positions=48)
    gpt2c.GPT2(config).save_pretrained(other)
    Tokenizer.from_name("bytes").save_pretrained(other)
    short = tmp_path / "short"
    gpt2c.GPT2(
        gpt2c.GPT2Config(vocab_size=257, n_layer=1, n_head=1, n_embd=8, n_positions=4)
    ).save_pretrained(short)
    Tokenizer.from_name("bytes").save_pretrained(short)
    for of, student, given, said in (
        (teacher, None, {}, "a student is needed: name one, or give n_layer, n_head or n_embd"),
        (teacher, base, {"n_layer": 1}, "has its own shape: drop n_layer, or the student"),
        (teacher, other, {}, "has another vocabulary than the student, 257 and 260 tokens"),
        (short, base, {}, "reads at most 4 tokens, but an example has"),
        (teacher, None, {"n_embd": 33}, "n_embd must be divisible by n_head"),
        (teacher, None, {"n_layer": 1, "kd_ratio": 1.5}, "kd_ratio must be in [0, 1], got 1.5"),
        (teacher, None, {"n_layer": 1, "beta": -0.5}, "beta must be at least 0, got -0.5"),
        (teacher, None, {"n_layer": 1, "temperature": 0.0}, "temperature must be from 0.001 to"),
    ):
        text = refused(
            lambda of=of, student=student, given=given: distill(
                of, rows, out, student=student, **given
            )
        )
        assert said in text
    scorer = tmp_path / "scorer"
    gpt2c.GPT2(dataclasses.replace(config, num_labels=2)).save_pretrained(scorer)
    Tokenizer.from_name("bytes").save_pretrained(scorer)
    said = refused(lambda: distill(scorer, rows, out, student=base))
    assert "distillation needs a language head" in said
    texts = [{"text": word} for word in ("one", "two", "three")]
    said = refused(lambda: distill(teacher, texts, out, n_layer=1, lmbda=0.5))
    assert "on-policy steps need prompts, but the data is text: lmbda must be 0" in said
    assert not out.exists()
    distill(teacher, rows, out, student=base, **QUICK | {"max_iters": 2})
    said = refused(lambda: distill(base, rows, out, student=base, resume=True, max_iters=4))
    assert "the teacher has other weights than that of the run" in said
    assert DistillSettings().learning_rate == 3e-4
