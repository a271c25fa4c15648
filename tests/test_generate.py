"""Sampling at its limits and against its distribution; the decoding loop, its seeds and stops."""

from types import SimpleNamespace

import numpy as np
import pytest

from gpt2c.generate import sample, stream

VOCAB = 11


def make_logits(rows=1, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 2


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def frequencies(logits, draws=40_000, **settings):
    """Share of each token among `draws` samples of one row of logits."""
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    rng = np.random.default_rng(7)
    tokens = sample(np.repeat(logits, draws, axis=0), rng=rng, **settings)
    return np.bincount(tokens, minlength=VOCAB) / draws


def assert_distributed(share, p, draws=40_000):
    """Chi-square within 5 standard deviations, and nothing that has no probability."""
    kept = p > 0
    assert share[~kept].sum() == 0
    chi2 = draws * ((share - p)[kept] ** 2 / p[kept]).sum()
    freedom = kept.sum() - 1
    assert chi2 <= freedom + 5 * np.sqrt(2 * freedom)


# ---- sample --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 1e-320},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"temperature": 0, "top_k": 3, "top_p": 0.9},
    ],
)
def test_limits_are_greedy(settings):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    logits = make_logits(rows=50)
    logits[3] = 0  # all equal: the first
    logits[4, [2, 6]] = 9  # a tie: the first of the two
    if settings["temperature"] == 1e-320:
        logits = np.delete(logits, [3, 4], axis=0)  # a temperature chooses freely among equals
    tokens = sample(logits, rng=np.random.default_rng(0), **settings)
    assert tokens.dtype == np.int64 and tokens.shape == (len(logits),)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = make_logits()
    p = softmax(logits[0].astype(np.float64) / temperature)
    assert_distributed(frequencies(logits, temperature=temperature), p)


@pytest.mark.parametrize("top_k", [2, 5, VOCAB, VOCAB + 100])
def test_top_k_keeps_the_k_largest(top_k):
    logits = make_logits()
    p = softmax(logits[0].astype(np.float64))
    p[np.argsort(-p)[top_k:]] = 0
    assert_distributed(frequencies(logits, top_k=top_k), p / p.sum())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, 1), (0.39, 1), (0.41, 2), (0.79, 3), (0.81, 4), (1.0, 5)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    p = np.array([0.1, 0.4, 0.1, 0.2, 0.2])
    expected = np.zeros(VOCAB)
    largest_first = [1, 3, 4, 0, 2][:kept]
    expected[largest_first] = p[largest_first] / p[largest_first].sum()
    logits = np.full((1, VOCAB), -1000.0)
    logits[0, :5] = np.log(p)
    assert_distributed(frequencies(logits, top_p=top_p), expected)


def test_top_p_sees_what_top_k_left():
    # Of 0.4 0.3 0.2 0.1, top_k=2 leaves 4/7 and 3/7: the first alone reaches 0.5.
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    share = frequencies(logits, top_k=2, top_p=0.5)
    assert share[0] == 1


def test_equal_logits_are_cut_to_k():
    share = frequencies(np.zeros((1, VOCAB)), top_k=3)
    expected = np.zeros(VOCAB)
    expected[:3] = 1 / 3
    assert_distributed(share, expected)


def test_a_row_does_not_see_the_others():
    logits = make_logits(rows=4)
    settings = {"temperature": 1.0, "top_k": 5, "top_p": 0.9}
    together = sample(logits, rng=np.random.default_rng(3), **settings)
    logits[:3] = make_logits(rows=3, seed=9)
    other = sample(logits, rng=np.random.default_rng(3), **settings)
    assert together[3] == other[3]


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (np.nextafter(1, 0), 2)])
def test_extreme_draws_take_no_impossible_token(draw, token):
    rng = SimpleNamespace(random=lambda rows: np.full(rows, draw))
    logits = np.array([[-1e4, 0.0, 0.0, -1e4]])
    assert sample(logits, 1.0, None, None, rng) == [token]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_must_be_finite(bad, temperature):
    logits = make_logits(rows=2)
    logits[1, 4] = bad
    with pytest.raises(ValueError, match="nan or infinity"):
        sample(logits, temperature, None, None, np.random.default_rng(0))


@pytest.mark.parametrize("shape", [(5,), (2, 0), (1, 2, 3)])
def test_logits_must_be_two_dimensional(shape):
    with pytest.raises(ValueError, match=r"\(B, V\)"):
        sample(np.zeros(shape), 1.0, None, None, np.random.default_rng(0))


# ---- stream --------------------------------------------------------------------------------------


def successor(ids):
    """Logits that make (last token + 1) mod VOCAB certain."""
    logits = np.zeros((len(ids), VOCAB))
    logits[np.arange(len(ids)), (ids[:, -1] + 1) % VOCAB] = 100
    return logits


def random_logits(ids):
    """Logits that depend on every token so far."""
    return np.concatenate([make_logits(seed=int(row @ np.arange(1, len(row) + 1))) for row in ids])


def tokens_of(*args, **kwargs):
    """All steps of a stream as (B, steps)."""
    return np.stack(list(stream(*args, **kwargs)), axis=1)


def test_each_token_is_fed_back():
    idx = np.array([[5, 0], [5, 8]], dtype=np.int32)
    out = tokens_of(successor, idx, 5)
    np.testing.assert_array_equal(out, [[1, 2, 3, 4, 5], [9, 10, 0, 1, 2]])
    assert out.dtype == np.int64
    np.testing.assert_array_equal(idx, [[5, 0], [5, 8]])


def test_the_function_sees_all_tokens_so_far():
    lengths = []

    def next_logits(ids):
        lengths.append(ids.shape[1])
        return successor(ids)

    tokens_of(next_logits, [[1, 2, 3]], 4)
    assert lengths == [3, 4, 5, 6]


def test_seeds_reproduce():
    idx = np.zeros((2, 1), dtype=np.int64)
    first = tokens_of(random_logits, idx, 30, seed=1)
    np.testing.assert_array_equal(first, tokens_of(random_logits, idx, 30, seed=1))
    assert (first != tokens_of(random_logits, idx, 30, seed=2)).any()
    assert (first != tokens_of(random_logits, idx, 30)).any()


@pytest.mark.parametrize("stop", [3, np.int64(3), [3], {3, 7}, (7, 3), np.array([3])])
def test_a_stop_token_is_yielded_and_ends_the_loop(stop):
    np.testing.assert_array_equal(tokens_of(successor, [[0]], 100, stop=stop), [[1, 2, 3]])


def test_a_stopped_row_repeats_its_stop_token():
    out = tokens_of(successor, [[0], [4]], 100, stop={2, 9})
    np.testing.assert_array_equal(out, [[1, 2, 2, 2, 2], [5, 6, 7, 8, 9]])


def test_a_stop_token_in_the_prompt_does_not_stop():
    np.testing.assert_array_equal(tokens_of(successor, [[3]], 2, stop=3), [[4, 5]])


def test_no_new_tokens():
    assert list(stream(successor, [[0]], 0)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", np.nan),
        ("max_new_tokens", -1),
        ("idx", [1, 2]),
        ("idx", [[]]),
        ("idx", [[0.5]]),
    ],
)
def test_bad_arguments_are_refused_at_the_call(name, value):
    arguments = {"idx": [[0]], "max_new_tokens": 1} | {name: value}
    with pytest.raises(ValueError, match=name):
        stream(successor, **arguments)
