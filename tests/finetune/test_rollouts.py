"""Rollouts: drawn from the policy, the same whatever runs beside them, and scored as trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.exact import odd_model

from gpt2c import GPT2, GPT2Config, LlamaConfig
from gpt2c.finetune import rollouts
from gpt2c.finetune.policy import PolicyLoss, PolicyObjective, TokenFacts
from gpt2c.finetune.rollouts import draw, sample

V, END = 23, 5
CONFIG = GPT2Config(vocab_size=V, n_positions=20, n_embd=24, n_layer=2, n_head=2)
LLAMA = LlamaConfig(V, 24, 40, 2, 4, 2, 6, 20)
PROMPTS = [[1, 2, 3], [4], [7, 8, 9, 10, 11]]


def sampled(model: Any, prompts: Any = PROMPTS, **settings: Any) -> Any:
    given = {"count": 4, "ends": [END], "max_tokens": 12, "temperature": 1.0, "key": (1, 2)}
    return sample(model, prompts, **(given | settings))


# ---- draw ----------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_they_are_likely(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(6).astype(np.float32)
    logits[4] = -np.inf
    n = 20000
    tokens, logps, entropies = draw(np.tile(logits, (n, 1)), 0.7, rng.random(n))
    p = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    counts = np.bincount(tokens, minlength=6)
    assert counts[4] == 0
    assert np.abs(counts - n * p).max() < 2.5 * np.sqrt(
        n
    )  # five deviations, which are at most sqrt(n) / 2
    assert logps == pytest.approx(np.log(p[tokens]), rel=1e-6)
    assert entropies == pytest.approx(-sum(x * np.log(x) for x in p if x), rel=1e-6)


def test_first_and_last_token_are_drawn_at_the_ends(rng: np.random.Generator) -> None:
    tokens = draw(np.zeros((3, 4), np.float32), 1.0, np.array([0.0, 0.25, 1 - 2**-53]))[0]
    assert tokens.tolist() == [0, 1, 3]


def test_temperature_0_takes_the_likeliest(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((5, 9)).astype(np.float32)
    tokens, logps, _ = draw(logits, 0.0, rng.random(5))
    assert tokens.tolist() == logits.argmax(1).tolist()
    p = np.exp(logits.astype(np.float64))
    assert logps == pytest.approx(np.log(p.max(1) / p.sum(1)))


def test_diverged_logits_are_refused() -> None:
    for bad in (np.nan, np.inf):
        logits = np.array([[0, bad, 1], [0, 0, 0]], np.float32)
        assert "nan or infinity" in refused(draw, logits, 1.0, np.zeros(2))


# ---- sample --------------------------------------------------------------------------------------


def test_completions_end_where_they_should(backend: Any) -> None:
    found = sampled(odd_model(CONFIG, backend))
    assert len(found.completions) == 12 and found.lengths.tolist() == list(
        map(len, found.completions)
    )
    for ids, truncated in zip(found.completions, found.truncated, strict=True):
        assert END not in ids[:-1]
        assert truncated == (ids[-1] != END) and (len(ids) == 12 or not truncated)
    assert found.truncated.any() and not found.truncated.all()
    assert [found.prompt_of(i) for i in (0, 3, 4, 11)] == [PROMPTS[p] for p in (0, 0, 1, 2)]
    assert len({tuple(ids) for ids in found.completions}) == 12


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["GPT-2", "Llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_have_the_same_log_probabilities(
    config: Any, temperature: float, backend: Any
) -> None:
    model = odd_model(config, backend)
    found = sampled(model, temperature=temperature, unused=[0, 13])
    assert not np.isin(np.concatenate(found.completions), [0, 13]).any()
    idx, targets = [], []
    for number, ids in enumerate(found.completions):
        prompt = found.prompt_of(number)
        idx.append([*prompt, *ids][:-1])
        targets += [*[-1] * (len(prompt) - 1), *ids]
    tokens = TokenFacts(*np.ones((2, len(targets))))
    one = PolicyObjective(np.array(targets, np.int32), tokens, PolicyLoss(), temperature, [0, 13])
    model.loss(idx, one, keep=False)
    gap = np.abs(one.logps[one.live] - np.concatenate(found.logps))
    assert 0 < gap.max() < 1e-4


def test_a_completion_is_the_same_whatever_runs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd_model(CONFIG, "auto")
    expected = sampled(model)
    monkeypatch.setattr(rollouts, "MEMORY", 1)  # one group at a time
    alone = sampled(model)
    for a, b in zip(expected.completions, alone.completions, strict=True):
        assert a.tolist() == b.tolist()
    assert np.array_equal(np.concatenate(expected.logps), np.concatenate(alone.logps))


def test_key_decides_the_completions() -> None:
    model = odd_model(CONFIG, "auto")
    same, other = sampled(model), sampled(model, key=(1, 3))
    assert [*map(list, same.completions)] == [*map(list, sampled(model).completions)]
    assert [*map(list, same.completions)] != [*map(list, other.completions)]


def test_greedy_completions_are_those_of_generate() -> None:
    model = odd_model(CONFIG, "auto")
    found = sampled(model, count=1, temperature=0.0)
    writer = GPT2(CONFIG, backend="auto")
    writer.load_parameters(model.parameters, "the model")
    for prompt, ids in zip(PROMPTS, found.completions, strict=True):
        text = writer.generate([prompt], 12, temperature=0, eos_token_id=END)[0]
        assert text[len(prompt) :].tolist() == ids.tolist()


def test_smaller_weights_sample_too() -> None:
    model = odd_model(CONFIG, "auto")
    found = sampled(model.quantize("int8"))
    assert len(found.completions) == 12
