"""AdamW against a plain float64 loop, and the corners of every schedule."""

import math
import pickle
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import refused

from gpt2c import GPT2, GPT2Config
from gpt2c.kernels import reference
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.train.optimizer import SCHEDULES, AdamW, Schedule


def make_model(size=37, decay_size=25, seed=0):
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        backend=reference,
        flat_parameters=rng.normal(size=size).astype(np.float32),
        flat_gradients=rng.normal(size=size).astype(np.float32),
        decay_size=decay_size,
        trained_size=size,
        trained=("weights",),
    )


@pytest.mark.parametrize("decay_size", [0, 25, 37])
@pytest.mark.parametrize("grad_clip", [None, 0.5, 1e9])
def test_adamw_matches_a_plain_loop(decay_size, grad_clip):
    model = make_model(decay_size=decay_size)
    lr, beta1, beta2, eps, weight_decay = 1e-2, 0.9, 0.95, 1e-8, 0.1
    optimizer = AdamW(model, lr, (beta1, beta2), eps, weight_decay)
    param = model.flat_parameters.astype(np.float64)
    m, v = np.zeros_like(param), np.zeros_like(param)
    rng = np.random.default_rng(1)
    for t in range(1, 11):
        grad = rng.normal(size=param.size).astype(np.float32)
        model.flat_gradients[...] = grad
        norm = math.sqrt(sum(float(g) ** 2 for g in grad))
        scale = 1.0 if grad_clip is None else min(1.0, grad_clip / (norm + 1e-6))
        for i in range(param.size):
            g = float(grad[i]) * scale
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            direction = (m[i] / (1 - beta1**t)) / (math.sqrt(v[i] / (1 - beta2**t)) + eps)
            decay = weight_decay if i < decay_size else 0.0
            param[i] -= lr * (direction + decay * param[i])
        assert optimizer.step(grad_clip=grad_clip) == pytest.approx(norm, rel=1e-12)
        assert optimizer.steps == t
    np.testing.assert_allclose(model.flat_parameters, param, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optimizer.m, m, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(optimizer.v, v, rtol=1e-5, atol=1e-7)


def test_step_is_about_the_learning_rate():
    # Adam's first step is lr * sign(gradient) whatever the gradient's size.
    model = make_model()
    before = model.flat_parameters.copy()
    AdamW(model, weight_decay=0.0).step(learning_rate=0.25)
    moved = before - model.flat_parameters
    np.testing.assert_allclose(moved, 0.25 * np.sign(model.flat_gradients), rtol=1e-5)


def test_only_the_first_part_decays():
    model = make_model()
    model.flat_gradients[...] = 0
    before = model.flat_parameters.copy()
    AdamW(model, learning_rate=0.5, weight_decay=0.1).step()
    np.testing.assert_allclose(model.flat_parameters[:25], before[:25] * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(model.flat_parameters[25:], before[25:])


def test_resuming_from_state_and_steps_is_bit_equal():
    whole, first = make_model(), make_model()
    one = AdamW(whole)
    one.step()
    one.step()
    before = AdamW(first)
    before.step()
    after = AdamW(first)
    after.load_state(before.state(), before.steps)
    before.m[...] = 7  # what was loaded is a copy
    after.step()
    np.testing.assert_array_equal(whole.flat_parameters, first.flat_parameters)
    assert after.steps == 2 and after.state_bytes(37) == after.m.nbytes + after.v.nbytes


@pytest.mark.parametrize(
    ("change", "steps", "wanted"),
    [
        ({"v": None}, 1, "the state of AdamW must be m, v, got m$"),
        ({"momentum": np.ones(37)}, 1, "the state of AdamW must be m, v, got m, momentum, v$"),
        ({"v": np.ones(36)}, 1, r"v must have shape \(37,\), got \(36,\)$"),
        ({"m": np.ones((37, 1))}, 1, r"m must have shape \(37,\), got \(37, 1\)$"),
        ({}, -1, "steps must be at least 0, got -1$"),
        ({}, np.nan, "steps must be a whole number, got nan$"),
        ({}, 2.0, r"steps must be a whole number, got 2\.0$"),
    ],
)
def test_another_state_is_refused_and_nothing_is_loaded(change, steps, wanted):
    optimizer = AdamW(make_model())
    state = {"m": np.ones(37), "v": np.ones(37)} | change
    with pytest.raises(ValueError, match=wanted):
        optimizer.load_state({k: a for k, a in state.items() if a is not None}, steps)
    assert optimizer.steps == 0 and not optimizer.m.any() and not optimizer.v.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_names_the_array(bad):
    optimizer = AdamW(make_model())
    assert optimizer.not_finite() == ""
    parts = {"moment v": optimizer.v, "moment m": optimizer.m}
    for name, array in (parts | {"weights": optimizer.model.flat_parameters}).items():
        array[36] = bad
        assert optimizer.not_finite() == name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_gradient_changes_nothing(bad):
    model = make_model()
    optimizer = AdamW(model)
    optimizer.step()
    saved = [a.copy() for a in (model.flat_parameters, optimizer.m, optimizer.v)]
    model.flat_gradients[3] = bad
    with pytest.raises(ValueError, match=r"gradient norm is \w+ at step 2"):
        optimizer.step(grad_clip=1.0)
    for a, b in zip((model.flat_parameters, optimizer.m, optimizer.v), saved, strict=True):
        np.testing.assert_array_equal(a, b)
    assert optimizer.steps == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("learning_rate", "1"),
        ("betas", (0.9,)),
        ("betas", None),
        ("betas", (0.9, None)),
        ("betas", (0.9, math.nan)),
        ("eps", 0.0),
        ("eps", None),
        ("weight_decay", -0.1),
        ("weight_decay", "1"),
    ],
)
def test_adamw_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        AdamW(make_model(), **{name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "1"])
def test_grad_clip_out_of_range(value):
    with pytest.raises(ValueError, match="grad_clip"):
        AdamW(make_model()).step(grad_clip=value)


# ---- groups --------------------------------------------------------------------------------------


CONFIG = GPT2Config(vocab_size=61, n_positions=9, n_embd=24, n_layer=3, n_head=3)
GROUPS = [
    {"params": ["wte.*", "h.[01].attn.*"], "learning_rate": 1e-3, "weight_decay": 0.5},
    {"params": "h.0.*", "learning_rate": 0.0},
    {"params": "ln_f.*", "learning_rate": 3e-2, "weight_decay": 0.0},
    {"params": ["h.2.mlp.*", "*.bias"], "weight_decay": 0.02},
]


def expected_settings(name, decays):
    """Return learning rate and weight decay of a parameter by GROUPS, of 1e-2 and 0.1."""
    rate, decay = 1e-2, 0.1
    if name.startswith(("wte.", "h.0.attn.", "h.1.attn.")):
        rate, decay = 1e-3, 0.5
    elif name.startswith("h.0."):
        rate = 0.0
    elif name.startswith("ln_f."):
        rate, decay = 3e-2, 0.0
    elif name.startswith("h.2.mlp.") or name.endswith(".bias"):
        decay = 0.02
    return rate, decay if decays else 0.0


def learn(model, optimizer, rates=(None,), seed=1):
    """Take a step for each of the rates, each on other tokens; return the gradients of each."""
    rng, gradients = np.random.default_rng(seed), []
    for rate in rates:
        ids = rng.integers(0, model.config.vocab_size, (2, 9))
        model.zero_grad()
        model.loss(ids, ids)
        model.backward()
        gradients.append({name: array.copy() for name, array in model.gradients.items()})
        optimizer.step(rate)
    return gradients


@pytest.mark.parametrize("frozen", [(), ("h.1.attn.*", "*.ln_1.bias", "wpe.*")])
def test_each_group_is_updated_with_its_own_settings(frozen, backend):
    model = GPT2(CONFIG, seed=1, backend=backend)
    if frozen:
        model.freeze(*frozen)
    start = {name: array.copy() for name, array in model.parameters.items()}
    rates = [None, 1e-2, 5e-3, 0.0, 2e-2]  # a schedule scales the rates of groups, too
    gradients = learn(model, AdamW(model, 1e-2, groups=GROUPS), rates)
    for name, array in model.parameters.items():
        own, m, v = start[name], np.zeros_like(array), np.zeros_like(array)
        if name in model.trained:
            rate, decay = expected_settings(name, array.ndim == 2)
            for t, (scaled, gradient) in enumerate(zip(rates, gradients, strict=True), 1):
                scaled = rate * (1.0 if scaled is None else scaled / 1e-2)
                settings = (scaled, 0.9, 0.95, 1e-8, decay, t, 1.0)
                backend.adamw_update(own, m, v, gradient[name], *settings)
        assert np.array_equal(array, own), name


def test_groups_of_a_llama_with_a_head_of_its_own_and_with_a_tied_one():
    for tied in (False, True):
        config = LlamaConfig(61, 24, 40, 1, 3, tie_word_embeddings=tied, rms_norm_eps=1e-5)
        model = Model(config, seed=1, backend="base")
        before = {name: array.copy() for name, array in model.parameters.items()}
        head = "wte.*" if tied else "lm_head.*"
        optimizer = AdamW(model, 1e-2, groups=[{"params": head, "learning_rate": 0.0}])
        learn(model, optimizer)
        kept = {name for name, old in before.items() if np.array_equal(model.parameters[name], old)}
        assert kept == {"wte.weight" if tied else "lm_head.weight"}


class Counting:
    """The reference, which lists the slices that it updates."""

    global_norm = staticmethod(reference.global_norm)

    def __init__(self):
        self.calls = []

    def adamw_update(self, param, m, v, grad, learning_rate, *settings):
        self.calls.append((len(param), learning_rate, settings[3]))
        reference.adamw_update(param, m, v, grad, learning_rate, *settings)


def test_neighbours_with_the_same_settings_are_one_slice(monkeypatch):
    model = GPT2(CONFIG, seed=1, backend="base")
    decayed, rest = model.decay_size, model.trained_size - model.decay_size
    model.loss([[1, 2]], [[2, 3]])
    model.backward()
    made = []
    for groups in (
        [],
        [{"params": "*"}],
        [{"params": "h.*", "learning_rate": 3e-4}],
        [{"params": ["w?e.*", "ln_f.*"], "learning_rate": 6e-4}],
    ):
        optimizer = AdamW(model, groups=groups)
        monkeypatch.setattr(model, "backend", Counting())
        optimizer.step()
        made.append(model.backend.calls)
    plain = [(decayed, 3e-4, 0.1), (rest, 3e-4, 0.0)]
    assert made[0] == made[1] == made[2] == plain
    tables, ln_f = 61 * 24 + 8 + 9 * 24 + 8, 64  # each array begins on a cache line, 16 floats
    assert made[3] == [
        (tables, 6e-4, 0.1),
        (decayed - tables, 3e-4, 0.1),
        (rest - ln_f, 3e-4, 0.0),
        (ln_f, 6e-4, 0.0),
    ]


def test_training_with_groups_resumes_bit_by_bit():
    whole, half = (GPT2(CONFIG, seed=1, backend="base") for _ in range(2))
    learn(whole, AdamW(whole, groups=GROUPS), [None] * 2)
    first = AdamW(half, groups=GROUPS)
    learn(half, first)
    second = AdamW(half, groups=GROUPS)
    second.load_state({name: array.copy() for name, array in first.state().items()}, first.steps)
    ids = np.random.default_rng(1).integers(0, 61, (2, 2, 9))[1]
    half.zero_grad()
    half.loss(ids, ids)
    half.backward()
    second.step()
    assert np.array_equal(half.flat_parameters, whole.flat_parameters)
    copied = pickle.loads(pickle.dumps(second))
    for optimizer in (second, copied):
        learn(optimizer.model, optimizer, seed=2)
    assert np.array_equal(half.flat_parameters, copied.model.flat_parameters)
    assert f"groups={GROUPS}, steps=3)" in repr(copied)


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ([{"params": "h.7.*"}], "no parameter has a name like 'h.7.*'"),
        ([{"params": "h.0"}], "did you mean 'h.0.*'?"),
        ([{"params": ["wte.*", "wpe.*"]}], "all parameters with a name like 'wpe.*' are frozen"),
        ([{"params": []}], "the group of params [] is empty"),
        ([{"params": "h.*"}, {"params": "h.1.*"}], "params 'h.1.*' is empty: name parameters that"),
        ([{"learning_rate": 1.0}], "a dict with params and perhaps learning_rate, weight_decay"),
        ([{"params": "wte.*", "lr": 1e-3}], "got {'params': 'wte.*', 'lr': 0.001}"),
        ([{"params": 5}], "params must be a pattern of names, or a list of them, got 5"),
        ([{"params": [5]}], "a pattern of names must be a string, got 5"),
        (["wte.*"], "a group is a dict with params"),
        ({"params": "wte.*"}, "groups must be a list of dicts, got {'params'"),
        ([{"params": "wte.*", "learning_rate": -1.0}], "learning_rate must be finite"),
        ([{"params": "wte.*", "weight_decay": np.nan}], "weight_decay must be at least 0, got nan"),
        ([{"params": "ln_f.*", "weight_decay": 0.1}], "has weight_decay 0.1, but no parameter"),
    ],
)
def test_groups_that_say_nothing_are_refused(groups, wanted):
    model = GPT2(CONFIG, seed=1, backend="base")
    model.freeze("wpe.*")
    assert wanted in refused(AdamW, model, groups=groups)


def test_rate_of_a_group_needs_one_to_follow():
    model = GPT2(CONFIG, seed=1, backend="base")
    groups = ({"params": "wte.*", "learning_rate": 1e-3},)
    for rate in (0.0, 1e-320):
        assert f"learning_rate {rate} is too small" in refused(AdamW, model, rate, groups=groups)
    AdamW(model, 1e-9, groups=groups)


# ---- schedules -----------------------------------------------------------------------------------


def make_schedule(kind, **overrides):
    settings = {
        "learning_rate": 1.0,
        "max_iters": 110,
        "warmup_iters": 10,
        "min_lr": 0.1,
        "decay_fraction": 0.2,
        "step_size": 20,
        "gamma": 0.5,
    }
    return Schedule(kind, **(settings | overrides))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_rises_and_never_falls_back(kind):
    schedule = make_schedule(kind)
    rates = [schedule(step) for step in range(200)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == pytest.approx(1.0)  # the first step after the warm-up is still the highest
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert min(rates[10:]) >= 0.1 and max(rates) <= 1.0 + 1e-15


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("constant", {10: 1.0, 109: 1.0, 500: 1.0}),
        ("linear", {35: 0.775, 60: 0.55, 109: 0.109, 110: 0.1, 500: 0.1}),
        ("cosine", {60: 0.55, 35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 110: 0.1, 500: 0.1}),
        ("wsd", {87: 1.0, 88: 1.0, 99: 0.1 + 0.9 * (1 - math.sqrt(0.5)), 110: 0.1, 500: 0.1}),
        ("step", {29: 1.0, 30: 0.5, 49: 0.5, 50: 0.25, 70: 0.125, 90: 0.1, 500: 0.1}),
    ],
)
def test_schedules_at_their_corners(kind, values):
    schedule = make_schedule(kind)
    assert {step: schedule(step) for step in values} == pytest.approx(values)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("max_iters", [1, 2, 3])
def test_schedules_of_short_runs(kind, max_iters):
    for warmup_iters in range(max_iters + 1):
        schedule = make_schedule(kind, max_iters=max_iters, warmup_iters=warmup_iters)
        assert all(0 < schedule(step) <= 1.0 for step in range(max_iters + 2))
        assert schedule(0) == pytest.approx(1 / max(warmup_iters, 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", "1"),
        ("max_iters", 0),
        ("max_iters", None),
        ("min_lr", 2.0),
        ("min_lr", "0"),
        ("warmup_iters", None),
        ("warmup_iters", 111),
        ("warmup_iters", -1),
        ("decay_fraction", 0.0),
        ("decay_fraction", None),
        ("step_size", 0),
        ("step_size", math.nan),
        ("gamma", 1.5),
        ("gamma", "1"),
    ],
)
def test_schedule_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make_schedule("cosine", **{name: value})


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("step", [-1, math.nan, math.inf, 0.5, None, "1"])
def test_steps_out_of_range(kind, step):
    with pytest.raises(ValueError, match=r"^step must be"):
        make_schedule(kind)(step)


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="constant, linear, cosine, wsd, step, got 'triangle'"):
        make_schedule("triangle")
