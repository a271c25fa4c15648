"""Sampling: which tokens may be drawn, how likely they are, and settings out of range."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c.generate.sampling import (
    OFF,
    GenerationConfig,
    TextSettings,
    TokenSettings,
    choose,
    distribution,
    penalised,
)

V = 11
DRAWS = 2000


def make_logits(seed: int = 0, size: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32) * 2


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def probabilities(logits: np.ndarray, **settings: Any) -> np.ndarray:
    """Return the probability of every token, (V,), 0 for what cannot be drawn."""
    ids, weights = distribution(logits, GenerationConfig(**settings))
    assert len(set(ids.tolist())) == len(ids) == len(weights) and (weights > 0).all()
    p = np.zeros(len(logits))
    p[ids] = weights / weights.sum()
    return p


class Draws:
    """A generator of fixed numbers that counts its calls."""

    def __init__(self, *numbers: float) -> None:
        self.left = list(numbers)

    def random(self) -> float:
        return self.left.pop(0)


def shares(logits: np.ndarray, **settings: Any) -> np.ndarray:
    """Return each token's share for evenly spaced random numbers: exact to one draw."""
    rng: Any = Draws(*((np.arange(DRAWS) + 0.5) / DRAWS))
    tokens = [choose(logits, GenerationConfig(**settings), rng) for _ in range(DRAWS)]
    assert not rng.left, "one random number for each token"
    return np.bincount(tokens, minlength=len(logits)) / DRAWS


# ---- filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_are_the_softmax(temperature: float) -> None:
    logits = make_logits()
    p = softmax(logits.astype(np.float64) / temperature)
    np.testing.assert_allclose(probabilities(logits, temperature=temperature), p, rtol=1e-12)
    np.testing.assert_allclose(shares(logits, temperature=temperature), p, atol=1.001 / DRAWS)


@pytest.mark.parametrize("top_k", [1, 2, 5, V - 1, V, V + 100])
def test_top_k_keeps_the_k_largest(top_k: int) -> None:
    logits = make_logits()
    p = softmax(logits)
    p[np.argsort(-p)[top_k:]] = 0
    np.testing.assert_allclose(probabilities(logits, top_k=top_k), p / p.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, 1), (0.39, 1), (0.41, 2), (0.79, 3), (0.81, 4), (1.0, 5)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    p = np.array([0.1, 0.4, 0.1, 0.2, 0.2])
    expected = np.zeros(V)
    largest_first = [1, 3, 4, 0, 2][:kept]  # the first among equals
    expected[largest_first] = p[largest_first] / p[largest_first].sum()
    logits = np.full(V, -1000.0)
    logits[:5] = np.log(p)
    np.testing.assert_allclose(probabilities(logits, top_p=top_p), expected, rtol=1e-12)
    np.testing.assert_allclose(shares(logits, top_p=top_p), expected, atol=1.001 / DRAWS)


@pytest.mark.parametrize(("min_p", "kept"), [(0.01, 4), (0.26, 3), (0.49, 3), (0.51, 2), (0.76, 1)])
def test_min_p_keeps_tokens_by_their_share_of_the_likeliest(min_p: float, kept: int) -> None:
    p = np.array([0.1, 0.4, 0.2, 0.3])
    expected = np.zeros(4)
    largest_first = [1, 3, 2, 0][:kept]
    expected[largest_first] = p[largest_first] / p[largest_first].sum()
    np.testing.assert_allclose(probabilities(np.log(p), min_p=min_p), expected, rtol=1e-12)


def test_min_p_of_1_keeps_all_of_the_likeliest() -> None:
    assert probabilities(np.array([1.0, 3.0, 3.0, 2.0]), min_p=1.0).tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        # of 0.4 0.3 0.2 0.1, top_k=2 leaves 4/7 and 3/7: the first alone reaches 0.5
        ({"top_k": 2, "top_p": 0.5}, 1),
        ({"top_p": 0.5}, 2),
        # squared and renormalised they are 16 9 4 1 of 30: the first alone reaches 0.5
        ({"temperature": 0.5, "top_p": 0.5}, 1),
        # and 4/16 is below 0.3, where 0.2/0.4 was above it
        ({"min_p": 0.3}, 3),
        ({"temperature": 0.5, "min_p": 0.3}, 2),
        # min_p compares with the likeliest, whatever was cut off before it
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.6}, 2),
    ],
)
def test_temperature_top_k_top_p_min_p_in_this_order(settings: dict[str, Any], kept: int) -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    p = softmax(logits / settings.get("temperature", 1.0))
    p[kept:] = 0
    np.testing.assert_allclose(probabilities(logits, **settings), p / p.sum(), rtol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"top_p": 1.0}])
def test_equal_logits_are_cut_to_k(settings: dict[str, float]) -> None:
    expected = [1 / 3] * 3 + [0.0] * (V - 3)
    np.testing.assert_allclose(probabilities(np.zeros(V), top_k=3, **settings), expected)
    logits = np.array([0.0, 5.0, 0.0, 0.0, 5.0])  # the cut falls among equals that are not first
    assert np.flatnonzero(probabilities(logits, top_k=3, **settings)).tolist() == [0, 1, 4]


def test_filtered_tokens_are_never_drawn() -> None:
    logits = make_logits()
    logits[[2, 7]] = -np.inf
    for settings in ({}, {"top_k": V}, {"top_p": 1.0}, {"min_p": 1e-9}, {"temperature": 100.0}):
        p = np.zeros(V)
        allowed = np.isfinite(logits)
        p[allowed] = softmax(logits[allowed] / np.float32(settings.get("temperature", 1.0)))
        # exp takes what float64 division gives, the logits here what float32 gives: 6e-8 of 5
        np.testing.assert_allclose(shares(logits, **settings), p, atol=1.001 / DRAWS)


# ---- the draw ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"do_sample": False},
        {"temperature": 1e-320},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"temperature": 0, "top_k": 3, "top_p": 0.9, "min_p": 0.5},
        {"do_sample": False, "temperature": 5.0, "top_k": 5},
    ],
)
def test_extreme_settings_are_greedy(settings: dict[str, Any]) -> None:
    config, rng = GenerationConfig(**settings), np.random.default_rng(0)
    rows = [make_logits(seed) for seed in range(50)]
    if settings.get("temperature") != 1e-320:  # a temperature draws among equals
        rows.append(np.zeros(V, np.float32))  # all equal: the first
        rows.append(make_logits())
        rows[-1][[2, 6]] = 9  # a tie: the first of the two
    for logits in rows:
        token = choose(logits, config, rng)
        assert type(token) is int and token == logits.argmax()


def test_greedy_draws_no_random_number() -> None:
    rng: Any = Draws()
    assert choose(make_logits(), GenerationConfig(temperature=0), rng) == make_logits().argmax()


@pytest.mark.parametrize(
    ("draw", "token"), [(0.0, 1), (0.49, 1), (0.51, 2), (np.nextafter(1, 0), 2)]
)
@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 1.0}])
def test_extreme_draws_take_no_impossible_token(
    draw: float, token: int, settings: dict[str, Any]
) -> None:
    rng: Any = SimpleNamespace(random=lambda: draw)
    for impossible in (-1e4, -np.inf):
        logits = np.array([impossible, 0.0, 0.0, impossible])
        assert choose(logits, GenerationConfig(**settings), rng) == token


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_must_be_numbers(bad: float, temperature: float) -> None:
    logits = make_logits()
    logits[4] = bad
    config, rng = GenerationConfig(temperature=temperature), np.random.default_rng(0)
    assert "nan or infinity" in refused(choose, logits, config, rng)
    assert "nan or infinity" in refused(choose, np.full(V, -np.inf), config, rng)


# ---- the text so far -----------------------------------------------------------------------------


def test_logits_are_unchanged_without_penalties() -> None:
    logits = make_logits()
    assert penalised(logits, GenerationConfig(), [1, 1, 1], ()) is logits


@pytest.mark.parametrize("penalty", [1.3, 2.0, 0.5])
def test_repetition_is_penalised_once(penalty: float) -> None:
    logits, text = make_logits(), [3, 3, 3, 0, 8]
    assert (logits[[3, 0, 8]] > 0).any() and (logits[[3, 0, 8]] < 0).any()
    before = logits.copy()
    scores = penalised(logits, GenerationConfig(repetition_penalty=penalty), text, ())
    assert np.array_equal(logits, before)
    for token in range(V):
        factor = 1.0 if token not in text else penalty if logits[token] < 0 else 1 / penalty
        assert scores[token] == pytest.approx(logits[token] * factor, rel=1e-6)  # of float32
        if token in text:
            assert (scores[token] < logits[token]) == (penalty > 1)


@pytest.mark.parametrize(
    ("n", "text", "forbidden"),
    [
        (1, [4, 2, 4], {2, 4}),
        (2, [1, 2, 3, 1], {2}),
        (2, [1, 2, 1, 3, 1], {2, 3}),
        (2, [5, 5], {5}),
        (3, [1, 2, 3, 4, 1, 2], {3}),
        (3, [1, 2, 3, 4, 2], set()),
        (3, [7, 7], set()),  # there are no three yet
        (3, [7, 7, 7], {7}),
        (4, [], set()),
        (0, [1, 1, 1, 1], set()),
    ],
)
def test_ngrams_are_not_repeated(n: int, text: list[int], forbidden: set[int]) -> None:
    scores = penalised(make_logits(), GenerationConfig(no_repeat_ngram_size=n), text, ())
    assert set(np.flatnonzero(scores == -np.inf)) == forbidden
    allowed = np.isfinite(scores)
    assert np.array_equal(scores[allowed], make_logits()[allowed])


def test_forbidden_token_is_not_chosen() -> None:
    logits, rng = make_logits(), np.random.default_rng(0)
    first, second = np.argsort(-logits)[:2].tolist()
    greedy = GenerationConfig(temperature=0)
    assert choose(logits, greedy, rng, (), ()) == first
    assert choose(logits, greedy, rng, (), {first}) == second
    assert choose(logits, GenerationConfig(top_k=1), rng, (), {first}) == second
    seen = {choose(logits, GenerationConfig(), rng, (), {first, second}) for _ in range(500)}
    assert not seen & {first, second}


def test_penalties_change_the_choice() -> None:
    logits, rng = np.array([2.0, 1.9, -1.0]), np.random.default_rng(0)
    config = GenerationConfig(temperature=0, repetition_penalty=1.2)
    assert choose(logits, config, rng, [2]) == 0
    assert choose(logits, config, rng, [0]) == 1
    config = GenerationConfig(temperature=0, no_repeat_ngram_size=2)
    assert choose(logits, config, rng, [1, 0, 2, 1]) == 1
    assert choose(logits, config, rng, [1, 0, 1]) == 1
    assert choose(logits, config, rng, [2, 0, 2]) == 1


def test_choice_is_refused_when_every_token_is_forbidden() -> None:
    config, rng = GenerationConfig(no_repeat_ngram_size=1), np.random.default_rng(0)
    assert "no_repeat_ngram_size" in refused(choose, make_logits(), config, rng, range(V))


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [-1, 1.5, np.float32(1.5), np.inf, np.nan, "many"]),
        ("min_new_tokens", [-1, 2.5, 65]),  # more than max_new_tokens
        ("max_new_tokens", [True]),
        ("temperature", [-0.1, np.nan, np.inf, "0.7", True, [1.0]]),
        ("top_k", [-1, 2.5, "5"]),
        ("top_p", [-0.5, 1.1, np.nan, np.inf, "0.7"]),
        ("min_p", [-0.5, 1.1, np.nan, "0.1"]),
        ("repetition_penalty", [0.0, -1.0, np.nan, np.inf, "1"]),
        ("do_sample", ["no", 1]),
        ("logprobs", [5]),
        ("num_beams", [4, 0, "1"]),
        ("typical_p", [0.5]),
        ("bad_words_ids", [[[5]], 0]),
        ("sequence_bias", [{(5,): 1.0}]),
        ("guidance_scale", [1.5]),
        ("output_scores", [True, [False]]),
        ("suppress_tokens", [[5]]),
        ("no_repeat_ngram_size", [-1, 1.5]),
        ("num_return_sequences", [0, -1, -1.0, 1.5]),
        ("seed", [-1, 0.5]),
        ("on_full", ["", "forget", [1], np.array([1, 2])]),
        ("cache", ["bf16", np.array([1, 2])]),
    ],
)
def test_settings_out_of_range_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        message = refused(GenerationConfig, **{name: value})
        assert message.startswith(name) and message.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": np.int64(3), "min_new_tokens": 3},
        {"temperature": 0, "top_p": 1, "min_p": 1, "top_k": np.int32(1)},
        {"top_p": np.float32(0), "min_p": 0.0, "top_k": 0},
        {"repetition_penalty": 1e-3, "no_repeat_ngram_size": 1, "seed": 0, "on_full": "stop"},
    ],
)
def test_settings_at_their_limits_are_taken(settings: dict[str, Any]) -> None:
    config = GenerationConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    "off", [{"top_k": 0}, {"min_p": 0}, {"top_p": 1}, {"top_k": None, "min_p": None, "top_p": None}]
)
def test_switched_off_filters_keep_every_token(off: dict[str, Any]) -> None:
    logits = make_logits()
    np.testing.assert_allclose(probabilities(logits, **off), softmax(logits), rtol=1e-12)


def test_top_p_of_0_keeps_one_token() -> None:
    logits = make_logits()
    assert probabilities(logits, top_p=0)[logits.argmax()] == 1


def test_defaults_of_transformers_are_taken() -> None:
    defaults = {"num_beams": 1, "use_cache": False, "early_stopping": True, "length_penalty": 2.0}
    config = GenerationConfig(**defaults, pad_token_id=50256, typical_p=1.0)
    assert config == GenerationConfig() == dataclasses.replace(config)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


# transformers 4.57's default of each setting whose default differs in gpt2c, or that gpt2c lacks.
THEIRS = {
    **{"min_length": 0, "num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "use_cache": True},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0, "length_penalty": 1.0},
    **{"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0},
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), False),
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions"), False),
    **dict.fromkeys(("output_hidden_states", "return_dict_in_generate", "early_stopping"), False),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens")),
    **dict.fromkeys(("begin_suppress_tokens", "guidance_scale", "penalty_alpha", "low_memory")),
    **dict.fromkeys(("max_time", "stop_strings", "watermarking_config", "max_new_tokens")),
    **{"bos_token_id": 50256, "num_assistant_tokens": 20, "transformers_version": "4.57.1"},
}


@pytest.mark.parametrize("name", THEIRS)
def test_switched_off_settings_of_transformers_are_taken(name: str) -> None:
    assert GenerationConfig(**{name: THEIRS[name]}) == GenerationConfig()
    assert GenerationConfig(**{name: None}) == GenerationConfig()


def test_every_setting_of_transformers_is_tested() -> None:
    assert OFF.keys() - {"max_length", "pad_token_id", "exponential_decay_length_penalty"} == (
        THEIRS.keys() - {"max_new_tokens", "logprobs"} | {"_from_model_config"}
    )


def test_none_is_the_default() -> None:
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    assert GenerationConfig(**dict.fromkeys(names)) == GenerationConfig()


def test_whole_number_may_be_a_float() -> None:
    whole = {"max_new_tokens": 9, "min_new_tokens": 2, "top_k": 2, "no_repeat_ngram_size": 3}
    whole |= {"num_return_sequences": 2, "seed": 7}
    for kind in (float, np.float32):
        config = GenerationConfig(**{name: kind(value) for name, value in whole.items()})
        assert config == GenerationConfig(**whole)
        assert all(type(getattr(config, name)) is int for name in whole)
    assert np.count_nonzero(probabilities(make_logits(), top_k=2.0)) == 2


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_length", "did you mean max_new_tokens?"),
        ("min_length", "did you mean min_new_tokens?"),
        ("stop_strings", "did you mean stop?"),
        ("temprature", "did you mean temperature?"),
        ("xyz", "its settings are cache, do_sample, "),
    ],
)
def test_error_suggests_the_setting_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(TypeError) as error:
        GenerationConfig(**{name: 5})
    assert str(error.value).startswith(f"GenerationConfig has no setting {name!r}; {meant}")


def test_type_checkers_know_every_setting() -> None:
    known = GenerationConfig.__dataclass_fields__.keys() - {"max_new_tokens", "logprobs"}
    often = {"num_beams", "typical_p", "use_cache", "early_stopping", "length_penalty"}
    often |= {"pad_token_id"}
    assert TokenSettings.__annotations__.keys() - often == known and often <= OFF.keys()
    assert known - TextSettings.__annotations__.keys() == {
        "num_return_sequences",
        "stop",
    }


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        GenerationConfig().temperature = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("value", [3, np.int64(3), [3], {3}, (3, 3), np.array([3]), frozenset({3})])
@pytest.mark.parametrize("name", ["stop", "eos_token_id"])
def test_ends_are_ids(name: str, value: Any) -> None:
    config = GenerationConfig(**{name: value})
    ends = config.ends(4)
    assert ends == {3} and all(type(token) is int for token in ends)
    assert refused(config.ends, 3).startswith(f"{name}: ")


def test_ends_join_eos_and_stop() -> None:
    assert GenerationConfig(stop=[3, 2], eos_token_id=1).ends(4) == {1, 2, 3}


def test_ends_may_be_none() -> None:
    assert GenerationConfig().ends(5) == GenerationConfig(stop=[]).ends(5) == frozenset()


@pytest.mark.parametrize("wrong", [-1, [1, -1], 2.0, [None]])
def test_ends_that_are_no_ids_are_refused(wrong: Any) -> None:
    assert refused(GenerationConfig(stop=wrong).ends, 5).startswith("stop: ")


@pytest.mark.parametrize("text", [".", ["."], [1, "."]])
def test_stop_strings_are_refused_without_a_generator(text: Any) -> None:
    assert "gpt2c.Generator" in refused(GenerationConfig(stop=text).ends, 5)


def test_bool_is_no_token_id() -> None:
    for name in ("eos_token_id", "stop"):
        config = GenerationConfig(**{name: True})
        assert refused(config.ends, V).startswith(f"{name}: True is not a token id")
