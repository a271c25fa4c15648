"""The score head: a classifier, a reward, a value for each token; their gradients and files."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.exact import check_differences, exact, odd_model
from safetensors.numpy import load_file

from gpt2c import GPT2, AdamW, Engine, GPT2Config, Tokenizer, from_pretrained
from gpt2c.formats.convert import convert
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.block import Life
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.plan import KEPT

V, K, P = 61, 3, 33
ODD = GPT2Config(
    vocab_size=V, n_positions=P, n_embd=34, n_layer=3, n_head=2, n_inner=51, num_labels=K
)
LLAMA = LlamaConfig(V, 30, 71, 2, 6, 2, 10, P, num_labels=K)
TIED = LlamaConfig(V, 24, 40, 1, 3, max_position_embeddings=P, tie_word_embeddings=True)
CONFIGS = pytest.mark.parametrize("config", [ODD, LLAMA], ids=["GPT-2", "Llama"])
LENGTHS = (3, 33, 1, 17)
N, B = sum(LENGTHS), len(LENGTHS)
LAST = np.cumsum(LENGTHS) - 1
LABELS = np.array([2, 0, -1, 1])


def sequences(rng: np.random.Generator) -> list[Any]:
    return [rng.integers(0, V, length) for length in LENGTHS]


def floats(rng: np.random.Generator, *shape: int) -> Any:
    """Return numbers that are float32 in every dtype."""
    return rng.standard_normal(shape, np.float32).astype(np.float64)


def weighted_sum(weights: Any, scores: Any) -> float:
    if isinstance(scores, list):
        return float(sum((w * s).sum() for w, s in zip(weights, scores, strict=True)))
    return float((weights * scores).sum())


def of_scores(model: Model, idx: Any, d_scores: Any, per_token: bool = False) -> Any:
    """Return copies of the scores, and of the fresh gradients of sum(d_scores * scores)."""
    model.zero_grad()
    scores = model.scores(idx, per_token)
    model.backward(d_scores=d_scores)
    return scores, {name: array.copy() for name, array in model.gradients.items()}


def of_labels(model: Model, idx: Any, labels: Any = LABELS) -> Any:
    """Return the loss of labels, and copies of fresh gradients."""
    model.zero_grad()
    loss = model.loss(idx, labels)
    model.backward()
    return loss, {name: array.copy() for name, array in model.gradients.items()}


def check_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert np.array_equal(gradient, expected[name]), name


# ---- what scores are -----------------------------------------------------------------------------


@CONFIGS
def test_scores_are_products_of_the_last_norms_output(
    config: Any, backend: Any, rng: np.random.Generator
) -> None:
    model, idx = odd_model(config, backend), rng.integers(0, V, (4, 9))
    expected = model.trace(idx)["ln_f"] @ model.parameters["score.weight"].T
    per_token, scores = model.scores(idx, per_token=True), model.scores(idx)
    assert isinstance(per_token, np.ndarray) and per_token.shape == (4, 9, K)
    assert scores.shape == (4, K) and scores.dtype == per_token.dtype == np.float32
    assert normalised_error(per_token, expected) <= 1e-5
    assert normalised_error(scores, expected[:, -1]) <= 1e-5
    assert np.array_equal(model.scores(idx, keep=False), scores)
    assert np.array_equal(model(idx), scores)


def test_call_returns_the_hidden_states_beside_the_scores(rng: np.random.Generator) -> None:
    model, idx = odd_model(ODD), rng.integers(0, V, (2, 9))
    scores, states = model(idx, hidden_states=True)
    assert np.array_equal(scores, model(idx)) and states.shape == (4, 2, 9, 34)
    last = states[-1, :, -1] @ model.parameters["score.weight"].T
    assert normalised_error(scores, last) <= 1e-5


@CONFIGS
def test_scores_of_ragged_sequences_are_those_of_each_alone(
    config: Any, backend: Any, rng: np.random.Generator
) -> None:
    model, idx = odd_model(config, backend), sequences(rng)
    scores, values = model.scores(idx), model.scores(idx, per_token=True)
    assert isinstance(values, list) and [value.shape for value in values] == [
        (length, K) for length in LENGTHS
    ]
    for row, own, value in zip(idx, scores, values, strict=True):
        np.testing.assert_allclose(own, model.scores([row])[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(value, model.scores([row], True)[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(value[-1], own, rtol=1e-4, atol=1e-5)


def test_parameters_are_transformers_and_the_table_of_tokens_is_the_embeddings_alone() -> None:
    shapes = ODD.parameter_shapes()
    assert shapes.pop("score.weight") == (K, 34)
    tokens = GPT2Config(V, P, 34, 3, 2, 51)
    assert shapes == tokens.parameter_shapes()
    model = GPT2(ODD)
    decayed = model.flat_parameters[: model.decay_size]
    for name in ("wte.weight", "score.weight"):
        assert np.shares_memory(model.parameters[name], decayed)
    assert LLAMA.parameter_shapes().keys() >= {"score.weight", "wte.weight"}
    assert "lm_head.weight" not in LLAMA.parameter_shapes()


def test_first_scores_have_the_configs_deviation() -> None:
    config = GPT2Config(V, P, 512, 1, 1, num_labels=50, initializer_range=0.01)
    weight = GPT2(config).parameters["score.weight"]
    assert weight.std() == pytest.approx(0.01, rel=0.03)


def test_loss_of_scores_that_are_zero_is_the_log_of_the_labels(backend: Any) -> None:
    model = GPT2(ODD, backend=backend)
    model.parameters["score.weight"].fill(0)
    assert model.loss([[1, 2], [3]], [0, 2]) == pytest.approx(math.log(K), rel=1e-6)


def test_loss_is_the_mean_cross_entropy_of_labels(backend: Any, rng: np.random.Generator) -> None:
    model, idx = odd_model(ODD, backend), sequences(rng)
    scores = model.scores(idx).astype(np.float64)
    losses = np.log(np.exp(scores).sum(-1)) - scores[np.arange(B), LABELS]
    for keep in (True, False):
        loss = model.loss(idx, LABELS, keep=keep)
        assert loss == pytest.approx(losses[LABELS >= 0].mean(), rel=1e-5)
        assert model.loss(idx, LABELS, keep=keep, count=6) == pytest.approx(loss / 2, rel=1e-6)


# ---- gradients -----------------------------------------------------------------------------------


@CONFIGS
def test_gradients_of_labels_are_derivatives(
    config: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, idx = exact(odd_model(config), monkeypatch), sequences(rng)
    of_labels(model, idx)
    check_differences(model, lambda: model.loss(idx, LABELS, keep=False))


@CONFIGS
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_of_scores_are_derivatives(
    config: Any,
    per_token: bool,
    ragged: bool,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = exact(odd_model(config), monkeypatch)
    idx: Any = sequences(rng) if ragged else rng.integers(0, V, (2, 9))
    d_scores: Any = floats(rng, len(idx), K)
    if per_token:
        d_scores = [floats(rng, len(row), K) for row in idx]
        d_scores = d_scores if ragged else np.stack(d_scores)
    of_scores(model, idx, d_scores, per_token)
    check_differences(
        model, lambda: weighted_sum(d_scores, model.scores(idx, per_token, keep=False))
    )


def test_gradients_of_a_reward_loss_are_derivatives(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bradley-Terry and TRL's centring: -log sigmoid(chosen - rejected) + (chosen + rejected)^2."""
    model = exact(odd_model(GPT2Config(V, P, 34, 2, 2, num_labels=1)), monkeypatch)
    idx = sequences(rng)

    def loss() -> float:
        chosen, rejected = np.split(model.scores(idx), 2)
        margins, sums = chosen - rejected, chosen + rejected
        return float((np.log1p(np.exp(-margins)) + sums**2).mean())

    chosen, rejected = np.split(model.scores(idx), 2)
    slopes, sums = -1 / (1 + np.exp(chosen - rejected)), 2 * (chosen + rejected)
    model.backward(scale=1 / 2, d_scores=np.concatenate([slopes + sums, -slopes + sums]))
    check_differences(model, loss)


@CONFIGS
@pytest.mark.parametrize("recompute", KEPT)
def test_gradients_are_those_of_the_reference(
    config: Any, recompute: str | None, backend: Any, rng: np.random.Generator
) -> None:
    idx, d_scores = sequences(rng), floats(rng, B, K)
    found = []
    for model in (odd_model(config, backend, recompute=recompute), odd_model(config)):
        for _ in range(2):  # written, then added to
            model.loss(idx, LABELS)
            model.backward(scale=0.5)
            model.scores(idx)
            model.backward(scale=0.5, d_scores=d_scores)
        found.append(model.gradients)
    for name, gradient in found[0].items():
        assert normalised_error(gradient, found[1][name]) <= 2e-5, name


@TWO_BACKENDS
@CONFIGS
@pytest.mark.parametrize("per_token", [False, True])
def test_recomputed_gradients_have_the_same_bits(
    config: Any, per_token: bool, backend: Any, rng: np.random.Generator
) -> None:
    idx = sequences(rng)
    d_scores = [floats(rng, n, K) for n in LENGTHS] if per_token else floats(rng, B, K)
    models = [odd_model(config, backend, recompute=policy) for policy in KEPT]
    results = [of_scores(model, idx, d_scores, per_token) for model in models]
    losses = [of_labels(model, idx) for model in models]
    for (scores, gradients), (loss, of_loss) in zip(results[1:], losses[1:], strict=True):
        for own, wanted in zip(scores, results[0][0], strict=True):
            assert np.array_equal(own, wanted)
        check_equal(gradients, results[0][1])
        assert loss == losses[0][0]
        check_equal(of_loss, losses[0][1])


def test_gradient_of_a_loss_is_that_of_its_scores(backend: Any, rng: np.random.Generator) -> None:
    """The same objective through both doors: softmax - onehot, by the caller and by the head."""
    model, idx = odd_model(ODD, backend), sequences(rng)
    expected = of_labels(model, idx)[1]
    scores = model.scores(idx).astype(np.float64)
    softmax = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    d_scores = (softmax - np.eye(K)[LABELS]) * (LABELS >= 0)[:, None]
    for name, gradient in of_scores(model, idx, d_scores / 3)[1].items():
        assert normalised_error(gradient, expected[name]) <= 1e-5, name


def test_values_at_last_tokens_alone_have_the_gradients_of_scores(
    backend: Any, rng: np.random.Generator
) -> None:
    model, idx, d_scores = odd_model(ODD, backend), sequences(rng), floats(rng, B, K)
    expected = of_scores(model, idx, d_scores)[1]
    each = [np.zeros((length, K)) for length in LENGTHS]
    for values, own in zip(each, d_scores, strict=True):
        values[-1] = own
    for name, gradient in of_scores(model, idx, each, per_token=True)[1].items():
        assert normalised_error(gradient, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("door", ["loss", "scores"])
def test_eight_sequences_add_up_to_a_batch_of_eight(
    door: str, backend: Any, rng: np.random.Generator
) -> None:
    model = odd_model(ODD, backend)
    idx = [rng.integers(0, V, length) for length in (3, 9, 1, 33, 7, 7, 2, 20)]
    labels, d_scores = rng.integers(0, K, 8), floats(rng, 8, K)
    labels[5] = -1

    def add(part: slice) -> float:
        if door == "loss":
            loss = model.loss(idx[part], labels[part], count=7)
            model.backward()
            return loss
        loss = weighted_sum(d_scores[part], model.scores(idx[part]))
        model.backward(d_scores=d_scores[part])
        return loss

    whole = add(slice(0, 8))
    expected = model.flat_gradients.copy()
    model.zero_grad()
    parts = sum(add(slice(one, one + 1)) for one in range(8))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert np.abs(model.flat_gradients - expected).max() <= 1e-5 * np.abs(expected).max()


@TWO_BACKENDS
@CONFIGS
@pytest.mark.parametrize("per_token", [False, True])
def test_changing_one_sequence_leaves_the_others_bits(
    config: Any, per_token: bool, backend: Any, rng: np.random.Generator
) -> None:
    model, idx = odd_model(config, backend), sequences(rng)
    d_scores: Any = floats(rng, B, K)
    if per_token:
        d_scores = [floats(rng, length, K) for length in LENGTHS]
    d_scores[1][...] = 0
    before, expected = of_scores(model, idx, d_scores, per_token)
    loss, of_loss = of_labels(model, idx, [2, -1, 0, 1])
    idx[1] = (idx[1] + 1) % V
    after, gradients = of_scores(model, idx, d_scores, per_token)
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, False]
    check_equal(gradients, expected)
    again, of_same = of_labels(model, idx, [2, -1, 0, 1])
    assert again == loss
    check_equal(of_same, of_loss)


def test_gradient_of_the_table_is_that_of_the_tokens_that_came(
    backend: Any, rng: np.random.Generator
) -> None:
    """The head does not have it: a first backward clears what the memory holds from before."""
    model = odd_model(ODD, backend)
    of_labels(model, [[1, 2, 3], [4]], [0, 1])
    for call in (
        lambda: of_labels(model, [[5, 6]], [2])[1],
        lambda: of_scores(model, [[5, 6]], floats(rng, 1, K))[1],
    ):
        rows = call()["wte.weight"].any(axis=1)
        assert np.flatnonzero(rows).tolist() == [5, 6]


def test_only_last_tokens_cost_a_product_of_the_head(rng: np.random.Generator) -> None:
    idx, model, rows = sequences(rng), odd_model(ODD), []
    reference = get_backend("numpy")

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(reference, name)

        def matmul_backward(self, dx: Any, dweight: Any, *rest: Any) -> None:
            if dweight is not None and dweight.shape == (K, 34):
                rows.append(len(dx))
            reference.matmul_backward(dx, dweight, *rest)

    model.backend = Watched()  # type: ignore[assignment]
    of_labels(model, idx)
    of_scores(model, idx, floats(rng, B, K))
    assert rows == [3, 4]  # one label is -1


# ---- the order of calls --------------------------------------------------------------------------


def test_scores_can_be_asked_for_again_and_others_read_in_between(
    backend: Any, rng: np.random.Generator
) -> None:
    model, idx, d_scores = odd_model(ODD, backend), sequences(rng), floats(rng, B, K)
    expected = of_scores(model, idx, d_scores)[1]
    model.zero_grad()
    first = model.scores([[1, 2], [3]])
    second = model.scores(idx).copy()
    first.fill(np.nan)  # the caller's own
    given = [row.copy() for row in idx]
    scores = model.scores(given)
    for row in given:
        row.fill(0)
    assert np.array_equal(scores, second)
    model.backward(d_scores=d_scores)
    check_equal(dict(model.gradients), expected)


def test_backward_asks_for_what_the_last_call_needs(rng: np.random.Generator) -> None:
    model, idx, d_scores = odd_model(ODD), sequences(rng), floats(rng, B, K)
    model.loss(idx, LABELS)
    assert "d_scores is for scores(idx)" in refused(model.backward, d_scores=d_scores)
    model.scores(idx)
    assert "needs d_scores" in refused(model.backward)
    assert "weights are for losses" in refused(model.backward, weights=d_scores)
    model.backward(d_scores=d_scores)
    assert "backward needs a loss" in refused(model.backward, d_scores=d_scores)
    model.scores(idx, keep=False)
    assert "backward needs a loss" in refused(model.backward, d_scores=d_scores)


@pytest.mark.parametrize("recompute", KEPT)
def test_backward_of_scores_reads_no_activation_whose_life_has_ended(
    recompute: str | None, rng: np.random.Generator
) -> None:
    model, idx, d_scores = odd_model(ODD, recompute=recompute), sequences(rng), floats(rng, B, K)
    expected = of_scores(model, idx, d_scores)[1]
    model.zero_grad()
    model.scores(idx)
    assert model._pending is not None
    run = model._pending.ctx
    ended = [
        slot for slot in model._stack.slots_with_head(run.batch) if slot.life > KEPT[recompute]
    ]
    for slot in ended:
        if slot.name.startswith("h.") or slot.life is Life.SCRATCH:
            run.a[slot.name].fill(np.nan)
    model.backward(d_scores=d_scores)
    assert ended
    check_equal(dict(model.gradients), expected)


# ---- frozen parameters ---------------------------------------------------------------------------

FREEZE = [
    ("score.*",),
    ("wte.*",),
    ("w?e.*", "h.0.*", "h.1.*"),
    ("w?e.*", "h.*"),
    ("w?e.*", "h.*", "ln_f.*"),
    ("w?e.*", "h.*", "score.*"),
    ("*.bias",),
]


@TWO_BACKENDS
@pytest.mark.parametrize("recompute", KEPT)
@pytest.mark.parametrize("patterns", FREEZE, ids="-".join)
def test_frozen_parameters_change_no_bit_of_the_others_gradients(
    patterns: tuple[str, ...], recompute: str | None, backend: Any, rng: np.random.Generator
) -> None:
    idx, d_scores = sequences(rng), floats(rng, B, K)
    model = odd_model(ODD, backend, recompute=recompute)

    def gradients() -> Any:
        for _ in range(2):  # written, then added to
            model.loss(idx, LABELS)
            model.backward(scale=0.5)
            model.scores(idx)
            model.backward(scale=0.5, d_scores=d_scores)
        return {name: array.copy() for name, array in model.gradients.items()}

    expected = gradients()
    model.freeze(*patterns)
    found = gradients()
    assert 0 < len(found) < len(expected)
    check_equal(found, {name: expected[name] for name in found})


def test_head_alone_is_trained_without_going_back_through_the_layers(
    rng: np.random.Generator,
) -> None:
    model, called = odd_model(ODD), []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(get_backend("numpy"), name)

    model.freeze("w?e.*", "h.*", "ln_f.*")
    model.scores(sequences(rng))
    model._pending.ctx.ops = Counted()  # type: ignore[union-attr, assignment]
    model.backward(d_scores=floats(rng, B, K))
    assert called == ["matmul_backward", "layernorm_backward"]  # the head, ln_f


# ---- learning ------------------------------------------------------------------------------------


def test_classifier_learns_which_token_came_first(rng: np.random.Generator) -> None:
    config = GPT2Config(16, 8, 32, 1, 2, num_labels=2)
    model = GPT2(config)
    optimizer = AdamW(model, learning_rate=3e-3)
    for _ in range(120):
        idx = [rng.integers(0, 16, length) for length in rng.integers(1, 9, 16)]
        model.zero_grad()
        model.loss(idx, [row[0] % 2 for row in idx])
        model.backward()
        optimizer.step(grad_clip=1.0)
    idx = [rng.integers(0, 16, length) for length in rng.integers(1, 9, 200)]
    found = model.scores(idx, keep=False).argmax(-1)
    assert (found == [row[0] % 2 for row in idx]).mean() > 0.95


def test_copies_and_pickles_score_alike(rng: np.random.Generator) -> None:
    model, idx = GPT2(ODD), sequences(rng)
    of_labels(model, idx)
    for same in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(same.scores(idx), model.scores(idx))
        assert np.array_equal(same.flat_gradients, model.flat_gradients)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_classifier_comes_back_from_its_files(
    num_labels: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    config = GPT2Config(V, P, 34, 2, 2, eos_token_id=7, num_labels=num_labels, pad_token_id=3)
    model, idx = GPT2(config), sequences(rng)
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["architectures"] == ["GPT2ForSequenceClassification"]
    assert entries["id2label"] == {str(n): f"LABEL_{n}" for n in range(num_labels)}
    assert entries["label2id"] == {f"LABEL_{n}": n for n in range(num_labels)}
    assert entries["pad_token_id"] == 3 and "num_labels" not in entries
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name for name in names if not name.startswith("transformer.")} == {"score.weight"}
    for loaded in (GPT2.from_pretrained(tmp_path), from_pretrained(tmp_path)):
        assert isinstance(loaded, GPT2) and loaded.config == config
        assert np.array_equal(loaded.scores(idx), model.scores(idx))


def test_pad_of_a_classifier_stays(tmp_path: Path) -> None:
    """transformers reads the scores at the last token that is no pad."""
    for config in (GPT2Config(V, P, 34, 1, 2, num_labels=2), TIED):
        for pad in (None, 0, 5):
            labelled = dataclasses.replace(config, num_labels=2, eos_token_id=2, pad_token_id=pad)
            entries = json.loads(json.dumps(labelled.to_dict()))
            assert entries["pad_token_id"] == pad
            assert type(config).from_dict(entries) == labelled
        older = type(config).from_dict(entries | {"pad_token_id": -1})
        assert older == dataclasses.replace(labelled, pad_token_id=None)
        assert "pad_token_id must be in [0, " in refused(
            type(config).from_dict, entries | {"pad_token_id": "0"}
        )


def test_gradient_of_scores_beyond_float32_is_refused() -> None:
    model = GPT2(GPT2Config(V, P, 34, 1, 2, num_labels=2))
    model.scores([[1, 2]])
    message = refused(model.backward, 3e38, d_scores=[[3e38, 1]])
    assert message == "scale times d_scores must be finite as float32"


def test_language_model_says_nothing_about_labels(tmp_path: Path) -> None:
    config = GPT2Config(V, P, 34, 2, 2)
    GPT2(config).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert not entries.keys() & {"num_labels", "id2label", "label2id", "pad_token_id"}
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}}  # as distilgpt2 has them
    assert GPT2Config.from_dict(entries | labels) == config


@pytest.mark.parametrize("config", [GPT2Config(V, P, 34, 1, 2), TIED])
def test_names_of_labels_come_back(config: Any) -> None:
    names = ("ham", "spam 垃圾", "\n")
    labelled = dataclasses.replace(config, num_labels=3, id2label=names)
    entries = json.loads(json.dumps(labelled.to_dict()))
    assert entries["id2label"] == dict(zip("012", names, strict=True))
    assert entries["label2id"] == {name: number for number, name in enumerate(names)}
    assert type(config).from_dict(entries) == labelled and labelled.label_names == names
    assert dataclasses.replace(labelled, id2label=None).label_names[2] == "LABEL_2"


@pytest.mark.parametrize(
    "id2label",
    [{"0": "a", "1": "a"}, {"0": "a", "2": "b"}, {"0": "a", "1": 3}, {"0": "", "1": "b"}],
)
def test_names_that_name_no_label_count_as_none(id2label: dict[str, Any]) -> None:
    config = GPT2Config.from_dict(CLASSIFIER | {"id2label": id2label})
    assert (config.num_labels, config.id2label) == (2, None)


@pytest.mark.parametrize("names", [("a",), ("a", "a"), ["a", "b"], ("a", 1), ("a", ""), "ab"])
def test_bad_names_of_labels_are_refused(names: Any) -> None:
    for config in (GPT2Config, LlamaConfig):
        said = refused(config, num_labels=2, id2label=names)
        assert said.startswith("id2label must be None or a tuple of num_labels=2 different names")
    assert "num_labels=None" in refused(GPT2Config, id2label=("a", "b"))


CLASSIFIER = {"architectures": ["GPT2ForSequenceClassification"]}


@pytest.mark.parametrize(
    ("entries", "num_labels"),
    [
        ({}, 2),
        ({"num_labels": 5}, 5),
        ({"num_labels": None}, 2),
        ({"id2label": {"0": "ham", "1": "spam", "2": "eggs"}}, 3),
        ({"id2label": {"0": "reward"}, "num_labels": 1}, 1),
    ],
)
def test_labels_are_counted_as_transformers_counts_them(
    entries: dict[str, Any], num_labels: int
) -> None:
    assert GPT2Config.from_dict(CLASSIFIER | entries).num_labels == num_labels


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ({"id2label": ["ham", "spam"]}, "config.json: id2label must be an object, got ['ham',"),
        ({"id2label": {}}, "config.json: num_labels must be a whole number from 1 to"),
        ({"num_labels": "2"}, "config.json: num_labels must be a whole number from 1 to"),
        ({"num_labels": True}, "config.json: num_labels must be a whole number from 1 to"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, "config.json: num_labels must be the 1 of id2"),
        ({"num_labels": [0] * 10**5, "id2label": {"0": "a"}}, "config.json: num_labels must be"),
    ],
)
def test_labels_that_cannot_be_are_refused(entries: dict[str, Any], wanted: str) -> None:
    message = refused(GPT2Config.from_dict, CLASSIFIER | entries)
    assert message.startswith(wanted) and len(message) < 200


def test_classifier_is_not_written_to_files_of_language_models(tmp_path: Path) -> None:
    GPT2(GPT2Config(257, P, 34, 1, 2, num_labels=K)).save_pretrained(tmp_path / "model")
    Tokenizer.from_name("bytes").save_pretrained(tmp_path / "model")
    for name in ("model.bin", "model.gguf"):
        message = refused(convert, str(tmp_path / "model"), tmp_path / name)
        assert "needs a language head" in message and not (tmp_path / name).exists()


@pytest.mark.parametrize(("weights", "rtol"), [("fp16", 2e-3), ("int8", 0.05)])
def test_small_weights_score_as_their_model_does(
    weights: str, rtol: float, backend: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    model, idx = GPT2(ODD, 1, backend), sequences(rng)
    small = model.quantize(weights)
    scores = small.scores(idx)
    assert normalised_error(scores, model.scores(idx)) <= rtol
    small.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, backend)
    assert again.config == ODD and np.array_equal(again.scores(idx), scores)
    assert np.array_equal(small(idx[:1]), small.scores(idx[:1]))


# ---- what is refused -----------------------------------------------------------------------------


def test_what_needs_a_language_head_is_refused() -> None:
    model, idx = GPT2(ODD), [[1, 2, 3]]
    for call in (
        lambda: model.generate(idx),
        lambda: model.stream(idx),
        lambda: model.logprobs(idx),
        lambda: model.mean_loss(idx, idx),
        lambda: model.losses(idx, idx),
        lambda: model.embed(idx),
        model.decoder,
        lambda: Engine(model),
    ):
        message = refused(call)
        assert "needs a language head; this model has scores of texts" in message, message
        assert "(num_labels=3)" in message


def test_scores_of_a_language_model_are_refused() -> None:
    for config in (GPT2Config(V, P, 34, 1, 2), TIED):
        assert "scores need a config with num_labels" in refused(Model(config).scores, [[1, 2]])


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([0, 1, 2], "targets must be (4,), a label for each sequence, got (3,)"),
        ([[0, 1, 2, 0]], "targets must be (4,), a label for each sequence, got (1, 4)"),
        (1, "targets must be (4,), a label for each sequence, got ()"),
        ([0, 1, 2, K], f"targets: label {K} is not in [-1, {K})"),
        ([0, 1, 2, -2], f"targets: label -2 is not in [-1, {K})"),
        ([0, 1, 2, 0.5], "targets must be whole numbers, got dtype float64"),
        (["a", "b", "c", "d"], "targets must be whole numbers, got ['a', 'b', 'c', 'd']"),
        ([-1] * 4, "targets are all -1 (ignored): they have no mean"),
    ],
)
def test_labels_that_fit_no_batch_are_refused(
    labels: Any, wanted: str, rng: np.random.Generator
) -> None:
    assert refused(GPT2(ODD).loss, sequences(rng), labels) == wanted


def test_cross_entropy_of_one_score_is_refused() -> None:
    model = GPT2(GPT2Config(V, P, 34, 1, 2, num_labels=1))
    assert "always 0 (num_labels=1)" in refused(model.loss, [[1, 2]], [0])


@pytest.mark.parametrize(
    "d_scores", [3, "x", np.ones((4, 2)), np.ones(12), [np.ones((3, 3))] * 4, [["a"] * 3] * 4]
)
def test_d_scores_of_another_shape_are_refused(d_scores: Any, rng: np.random.Generator) -> None:
    model, idx = GPT2(ODD), sequences(rng)
    model.scores(idx)
    wanted = "d_scores must be numbers of the shape of scores, [(4, 3)]"
    assert refused(model.backward, d_scores=d_scores) == wanted
    model.scores(idx, per_token=True)
    wanted = "d_scores must be numbers of the shape of scores, [(3, 3), (33, 3), (1, 3), (17, 3)]"
    assert refused(model.backward, d_scores=d_scores) == wanted


def test_d_scores_that_are_not_finite_are_refused(rng: np.random.Generator) -> None:
    model, d_scores = GPT2(ODD), floats(rng, 1, K)
    expected = of_scores(model, [[1, 2]], d_scores)[1]
    model.zero_grad()
    model.scores([[1, 2]])
    for wrong in (np.nan, np.inf, 1e300):
        assert refused(model.backward, d_scores=[[0, wrong, 0]]) == "d_scores must be finite"
    model.backward(d_scores=d_scores)
    check_equal(dict(model.gradients), expected)


@pytest.mark.parametrize("idx", [[], [1, 2], [[1, V]], [[0.5]], [[1] * (P + 1)], [[1], []]])
def test_bad_texts_have_no_scores(idx: Any) -> None:
    assert refused(GPT2(ODD).scores, idx).startswith("idx")


@pytest.mark.parametrize("num_labels", [0, -1, 2.0, "2", True, 2**31, [2]])
@pytest.mark.parametrize("config", [GPT2Config, LlamaConfig])
def test_number_of_labels_is_a_whole_number(config: Any, num_labels: Any) -> None:
    message = refused(config, num_labels=num_labels)
    assert message.startswith("num_labels must be a whole number from 1 to")
