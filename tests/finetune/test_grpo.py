"""Reinforcement learning: runs of each algorithm, their equivalences, metrics, and bad input."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.tuning import losses, resumes_to_the_bit, weights

import gpt2c
from gpt2c.cli.main import main
from gpt2c.finetune import beginner, grpo
from gpt2c.finetune.beginner import careless_examples
from gpt2c.finetune.cycles import load
from gpt2c.finetune.grpo import CHOICES, GRPOSettings
from gpt2c.finetune.policy import group_advantages
from gpt2c.finetune.prompts import read_prompts
from gpt2c.finetune.rollouts import sample
from gpt2c.text.ragged import Order
from gpt2c.text.tokenizer import Tokenizer

PROMPTS = [{"prompt": text, "wanted": "e"} for text in ("a", "bc", "def", "ghij", "k", "lm", "no")]
QUICK: dict[str, Any] = {
    "learning_rate": 0.01, "max_iters": 6, "eval_interval": 3, "batch_size": 3, "backend": "base",
    "num_generations": 4, "max_completion_length": 8, "val_fraction": 0.3, "least_pass": 0.0,
    "threshold": 0.5, "max_epochs": 1.0,
}  # fmt: skip


def low(completion_ids: Any, **_: Any) -> list[float]:
    """Return the share of bytes below 128, which a random model writes half of the time."""
    return [float(np.mean(np.array(ids) < 128)) for ids in completion_ids]


def noisy(completion_ids: Any, **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def tuned(base: Path, out: Path, **given: Any) -> Any:
    return grpo(base, PROMPTS, out, **{"reward_funcs": [low], **QUICK, **given})


@pytest.mark.parametrize("algorithm", CHOICES["algorithm"])
def test_reward_rises(base: Path, tmp_path: Path, algorithm: str) -> None:
    given = {"max_iters": 30, "eval_interval": 30, "batch_size": 5, "num_generations": 8}
    result = tuned(base, tmp_path / "run", algorithm=algorithm, val_fraction=0.0, **given)
    assert result.before["val_reward"] < 0.65
    assert result.after["val_reward"] > 0.75
    assert result.after["val_greedy"] >= result.before["val_greedy"]
    assert result.after["val_loss"] == 1 - result.after["val_pass@1"]
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (stored["verb"], stored["after"]) == ("grpo", result.after)


def test_metrics_have_trls_names_and_meanings(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "run", reward_funcs=[low, noisy], max_iters=2)
    for entry in losses(tmp_path / "run"):
        assert entry["reward"] == pytest.approx(
            entry["rewards/low/mean"] + entry["rewards/noisy/mean"]
        )
        assert 0 < entry["reward_std"] and entry["frac_reward_zero_std"] == 0
        assert entry["completions/min_length"] <= entry["completions/mean_length"] <= 8
        assert entry["completions/clipped_ratio"] > 0.5  # of a random model, an end is rare
        assert 4 < entry["entropy"] < np.log(257)
        assert 0 <= entry["pass@1"] <= entry["pass@4"] <= 1
        mean, most = (
            entry[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max")
        )
        assert 0 < mean < most < 1e-4
        assert "kl" not in entry and "clip_ratio/region_mean" not in entry


def test_first_step_is_that_of_reinforce(base: Path, tmp_path: Path) -> None:
    """The gradient is that of the sum of -A log p over the tokens, by the model's own losses."""
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0}
    tuned(base, tmp_path / "run", **given)
    model, tokenizer = gpt2c.from_pretrained(base, "base"), Tokenizer.from_name("bytes")
    chosen = [PROMPTS[n]["prompt"] for n in Order(len(PROMPTS), 3, 1337).step(0)]
    prompts = [[256, *tokenizer.encode(text)] for text in chosen]
    found = sample(model, prompts, 4, {256}, 8, 1.0, (1337, 0))
    rewards = np.array(low([ids.tolist() for ids in found.completions])).reshape(3, 4)
    shares = group_advantages(rewards).reshape(-1) / found.lengths.sum()
    idx, targets, factors = [], [], []
    for number, (ids, share) in enumerate(zip(found.completions, shares, strict=True)):
        start = prompts[number // 4]
        idx.append([*start, *ids][:-1])
        targets.append([-1] * (len(start) - 1) + ids.tolist())
        factors.append(np.full(len(idx[-1]), share))
    found_losses = model.losses(idx, targets)
    model.backward(weights=factors)
    (entry,) = losses(tmp_path / "run")
    assert entry["grad_norm"] == pytest.approx(np.linalg.norm(model.flat_gradients), rel=1e-5)
    expected = sum(np.sum(a * b) for a, b in zip(factors, found_losses, strict=True))
    assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    assert entry["tokens"] == found.lengths.sum() + 4 * sum(map(len, prompts))


def test_division_of_a_step_changes_rounding_alone(base: Path, tmp_path: Path) -> None:
    runs = {}
    for most in (1, 40, 4096):
        tuned(base, tmp_path / str(most), batch_tokens=most, max_iters=2)
        entries = losses(tmp_path / str(most))
        runs[most] = [[entry[name] for name in ("loss", "grad_norm")] for entry in entries]
    np.testing.assert_allclose(runs[1], runs[4096], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(runs[40], runs[4096], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_iterations": 3, "beta": 0.1, "dropout": 0.1},
        {"algorithm": "ppo", "num_iterations": 2},
        {"rollouts": "int8", "algorithm": "rloo", "lora": True},
    ],
    ids=["grpo", "iterations", "ppo", "int8"],
)
def test_killed_run_goes_on_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, given: Any
) -> None:
    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        own = {} if resume else QUICK | given | others
        return grpo(base, PROMPTS, out, reward_funcs=[low], resume=resume, **own)

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, at)


def test_updates_on_the_same_completions_are_clipped(base: Path, tmp_path: Path) -> None:
    given = {"num_iterations": 3, "epsilon": 0.02, "epsilon_high": 0.03, "batch_size": 4}
    tuned(base, tmp_path / "run", max_iters=6, **given)
    entries = losses(tmp_path / "run")
    rewards = [entry["reward"] for entry in entries]
    assert rewards[0] == rewards[1] == rewards[2] != rewards[3]
    shares = [entry.get("clip_ratio/region_mean") for entry in entries]
    assert shares[0] is None is shares[3] and 0 < shares[1] < shares[2] < 1
    # The second cycle is all that the last checkpoint needs.
    names = [path.name for path in (tmp_path / "run" / "rollouts").iterdir()]
    assert names == ["00000001.safetensors"]
    (tmp_path / "run" / "rollouts" / "00000001.safetensors").write_bytes(b"damaged")
    assert "00000001.safetensors" in refused(load, tmp_path / "run", 1)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_divergence_holds_the_policy_at_the_base(base: Path, tmp_path: Path, kl: str) -> None:
    found = {}
    for beta in (0.001, 3.0):
        out = tmp_path / str(beta)
        tuned(base, out, beta=beta, kl_estimator=kl, max_iters=12, eval_interval=12)
        found[beta] = [entry["kl"] for entry in losses(out)]
        assert found[beta][0] < 1e-8 < found[beta][-1]
    assert found[3.0][-1] < found[0.001][-1] / 2


@pytest.mark.parametrize("rollouts", ["fp16", "int8"])
def test_smaller_weights_sample_and_are_corrected_for(
    base: Path, tmp_path: Path, rollouts: str
) -> None:
    tuned(base, tmp_path / "run", rollouts=rollouts, max_iters=2)
    for entry in losses(tmp_path / "run"):
        gap = entry["sampling/sampling_logp_difference/max"]
        assert 1e-6 < gap < {"fp16": 0.01, "int8": 0.5}[rollouts]
        ratios = [
            entry[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")
        ]
        assert 0.5 < ratios[0] < ratios[1] < ratios[2] <= 2 and ratios[1] == pytest.approx(1, 0.1)


def test_ppos_value_is_a_row_that_no_text_has(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "run", algorithm="ppo", max_iters=12, vf_coef=1.0)
    trained = gpt2c.from_pretrained(tmp_path / "run" / "checkpoints" / "00000012")
    assert trained.config.vocab_size == 258
    assert np.abs(trained.parameters["wte.weight"][257]).max() > 0
    # Readers of the run get a model of texts alone, which a second run begins with.
    model = gpt2c.from_pretrained(tmp_path / "run")
    assert model.config == gpt2c.from_pretrained(base).config
    for name, value in model.parameters.items():
        assert np.array_equal(value, trained.parameters[name][: len(value)])
    tuned(tmp_path / "run", tmp_path / "again", algorithm="ppo", max_iters=1, eval_interval=1)
    again = gpt2c.from_pretrained(tmp_path / "again" / "checkpoints" / "00000001")
    assert again.config.vocab_size == 258


def test_evaluation_measures_the_model_that_is_saved(base: Path, tmp_path: Path) -> None:
    """The sampler's smaller weights have no part in it."""
    figures = {}
    for rollouts in ("fp32", "int8"):
        given = {"rollouts": rollouts, "learning_rate": 0.0, "max_iters": 1, "max_epochs": 1.0}
        figures[rollouts] = tuned(base, tmp_path / rollouts, **given)
    assert figures["int8"].before == figures["fp32"].before
    assert figures["int8"].after == figures["fp32"].after


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_random_weights_are_their_own_reference(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        given = {"random_weights": True, "beta": 0.5, "algorithm": algorithm, "max_iters": 4}
        own = {} if resume else QUICK | given | others
        return grpo(base, PROMPTS, out, reward_funcs=[low], resume=resume, **own)

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, 3)
    entries = losses(tmp_path / "parts")
    assert entries[0]["kl"] < 1e-8 < entries[-1]["kl"]


def test_reference_has_the_weights_and_the_precision_of_the_run(base: Path, tmp_path: Path) -> None:
    given = {"beta": 0.5, "lora": True, "quantize": "int8", "max_iters": 1}
    tuned(base, tmp_path / "run", **given)
    assert losses(tmp_path / "run")[0]["kl"] < 1e-8  # that of fp32 weights is far away


def test_a_stop_ends_an_evaluation_between_two_tokens(base: Path, tmp_path: Path) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model = gpt2c.from_pretrained(base)
    with pytest.raises(KeyboardInterrupt):
        sample(model, [[256, 97]], 2, {256}, 8, 1.0, (1, 2), check=check)
    assert len(calls) == 3


def test_cycle_without_signal_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rewards are equal, so a cycle has nothing to learn from, and is read again as such."""

    def same(completions: Any, **_: Any) -> list[float]:
        return [0.7] * len(completions)

    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        own = {} if resume else QUICK | {"num_iterations": 3} | others
        return grpo(base, PROMPTS, out, reward_funcs=[same], resume=resume, **own)

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, 3)
    assert load(tmp_path / "parts", 0).ids == []


def test_groups_without_signal_change_nothing(base: Path, tmp_path: Path) -> None:
    def same(completions: Any, **_: Any) -> list[float]:
        return [0.7] * len(completions)

    tuned(base, tmp_path / "run", reward_funcs=[same], max_iters=2)
    for entry in losses(tmp_path / "run"):
        assert (entry["frac_reward_zero_std"], entry["loss"], entry["grad_norm"]) == (1, 0, 0)
    assert weights(tmp_path / "run") == weights(base)


def test_rejection_fine_tuning_learns_what_passes_alone(base: Path, tmp_path: Path) -> None:
    """A completion that does not pass is not learned: with none, the weights stay."""
    tuned(base, tmp_path / "run", algorithm="rft", threshold=2.0, max_iters=2)
    assert weights(tmp_path / "run") == weights(base)


def test_truncated_completions_can_be_left_out(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "run", mask_truncated_completions=True, max_completion_length=1)
    # Completions of one token that is not the end: the rest has at most a token of signal.
    assert losses(tmp_path / "run")[0]["completions/clipped_ratio"] == 1.0
    assert weights(tmp_path / "run") == weights(base)


def test_tasks_make_prompts_and_name_their_verifier(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_completion_length": 8, "max_iters": 1, "task_prompts": 8}
    result = grpo(base, None, tmp_path / "run", task="sort", **given | {"eval_prompts": 4})
    assert result.before["val_pass@1"] == 0.0  # the base writes nonsense
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["examples"] == 12
    assert record["picture"]["metrics"] == ["reward", "pass@1", "entropy"]
    assert "validation: the share that fails" in record["picture"]["loss"]


def test_conversations_are_prompts(base: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, wanted: Any, **_: Any) -> list[float]:
        seen.extend(prompts)
        return [float(len(one)) for one in wanted]

    talk = [{"messages": [{"role": "user", "content": text}], "wanted": text} for text in "abc"]
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0}
    grpo(base, talk, tmp_path / "run", reward_funcs=[reward], **given)
    assert [*talk[0]["messages"]] in seen
    assert Tokenizer.from_pretrained(tmp_path / "run").chat_template
    answered = [{"messages": [*talk[0]["messages"], {"role": "assistant", "content": "no"}]}]
    said = refused(grpo, base, answered, tmp_path / "other", reward_funcs=[low], **QUICK)
    assert "example 1: the last message must be the user's" in said


def test_prompts_of_a_group_are_on_one_side_of_the_split() -> None:
    rows = [{"prompt": f"{n}", "of": n // 3} for n in range(9)]
    tokenizer = gpt2c.Tokenizer.from_name("bytes")
    found = read_prompts(rows, tokenizer, 9, "", 0.3, seed=1, group_field="of")
    train, val = ({one.columns["of"] for one in side} for side in (found.train, found.val))
    assert len(train) == 2 and len(val) == 1 and not train & val


def test_start_without_a_pass_is_refused(base: Path, tmp_path: Path) -> None:
    def same(completions: Any, **_: Any) -> list[float]:
        return [0.7] * len(completions)

    for given in ({"reward_funcs": [same]}, {"algorithm": "rft"}):
        said = refused(tuned, base, tmp_path / "run", threshold=9.0, least_pass=0.01, **given)
        assert (
            "of 3 prompts 0.0% have a completion whose reward is at least the threshold, 9, and"
            " 1.0% is wanted; the best reward is 0." in said
        )
        assert not (tmp_path / "run").exists()
    # Rewards that differ within groups teach something, whatever passes.
    assert tuned(base, tmp_path / "run", threshold=9.0, least_pass=0.01, max_iters=1).step == 1


def test_evaluations_keep_their_prompts(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "run", max_iters=2, eval_prompts=2)
    given = {"reward_funcs": [low], "resume": True, "eval_prompts": 3}
    said = refused(grpo, base, PROMPTS, tmp_path / "run", **given)
    assert "the run was trained with eval_prompts=2, so it cannot continue with 3" in said


def test_several_rewards_may_hold_spaces(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": one["prompt"], "answer": "a b"} for one in PROMPTS]
    given = QUICK | {"reward": "exact + regex:a b + regex:.*", "reward_weights": "1 2 3"}
    grpo(base, rows, tmp_path / "run", **given | {"max_iters": 1})
    entry = losses(tmp_path / "run")[0]
    means = [entry[f"rewards/{name}/mean"] for name in ("exact", "regex:a b", "regex:.*")]
    assert means == [0, 0, 1] and entry["reward"] == 3


def test_bad_input_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    def failing(completions: Any, **_: Any) -> list[float]:
        raise RuntimeError("no judge")

    for given, said in (
        ({"algorithm": "trpo"}, "algorithm must be one of grpo, rloo, reinforce, ppo, rft, got"),
        ({"loss_type": "mean"}, "loss_type must be one of dapo, dr_grpo, grpo, bnpo, got 'mean'"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"algorithm": "ppo", "lora": True}, "pass lora or algorithm ppo, not both"),
        (
            {"algorithm": "ppo", "freeze": "h.*,wte.*"},
            "values in a row of wte.weight, which freeze",
        ),
        ({"task": "sort"}, "name prompts or a task, not both"),
        ({"reward_funcs": []}, "name a reward: exact, number, regex:PATTERN or module:function"),
        ({"reward_funcs": [], "reward": "exact"}, "with the field answer, which prompt 'def'"),
        ({"reward_weights": "nan"}, "reward_weights must be finite numbers, got [nan]"),
        ({"reward_weights": "-inf"}, "reward_weights must be finite numbers, got [-inf]"),
        ({"reward_weights": "1 2"}, "reward_weights must be one for each of 1 reward, got 2"),
        ({"reward_weights": "x"}, "reward_weights must be numbers, got 'x'"),
        ({"reward_funcs": [failing]}, "reward failing raised RuntimeError('no judge') for"),
        ({"max_completion_length": 48}, "7 that leave no room for a completion"),
    ):
        assert said in refused(tuned, base, tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()
    for name in ("completions", "prompts", "completion_ids"):
        rows = [{"prompt": "a"}, {"prompt": "b", name: "mine"}]
        said = refused(grpo, base, rows, tmp_path / "run", reward_funcs=[low], **QUICK)
        assert f"example 2: reward functions get an argument {name} of gpt2c's own" in said
    said = refused(grpo, base, None, tmp_path / "run", **QUICK)
    assert said == "name prompts, or a task"
    said = refused(grpo, base, None, tmp_path / "run", task="sort", max_completion_length=48)
    assert "a prompt of task sort has" in said and "has room for 1: lower" in said


def test_policy_that_diverges_stops_the_run(base: Path, tmp_path: Path) -> None:
    given = {"learning_rate": 1e30, "max_iters": 4, "eval_interval": 4, "grad_clip": 0.0}
    said = refused(tuned, base, tmp_path / "run", **given)
    assert "the loss is nan at step" in said


def test_epochs_count_each_update() -> None:
    assert GRPOSettings().planned(4096).max_iters == 256


def test_command_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "judge.py").write_text(
        "def low(completion_ids, **_):\n    return [sum(i < 128 for i in ids) / len(ids) for ids"
        " in completion_ids]\n"
    )
    rows = "".join(json.dumps(one) + "\n" for one in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    flags = {name: value for name, value in QUICK.items() if name != "max_epochs"}
    given = [
        word
        for name, value in flags.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    words = ["grpo", str(base), "prompts.jsonl", "--reward", "judge.py:low", "--out", "run", *given]
    assert main(words) == 2
    assert "must name a module, not a file: write judge:low" in capsys.readouterr().err
    words[4] = "judge:low"
    assert main(words) == 0
    said = capsys.readouterr().out
    first, *seen = [line for line in said.splitlines() if line.startswith(("the first", "reward "))]
    assert first.startswith("the first prompt: ") and len(seen) == 2
    assert "before: validation reward " in said
    assert "4 prompts, 3 held out" in said and "val_pass@4" in said
    assert weights(tmp_path / "run") == weights_of(base, tmp_path)


def weights_of(base: Path, tmp_path: Path) -> bytes:
    tuned(base, tmp_path / "python")
    return weights(tmp_path / "python")


def interrupted(*given: Any) -> list[dict[str, str]]:
    signal.raise_signal(signal.SIGINT)
    return careless_examples(*given)


def test_command_line_begins_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A beginner, then the recipe; --resume does again what was not finished."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(beginner.LESSONS, "format", beginner.Lesson(60))
    few = {"max_iters": 2, "batch_size": 4, "backend": "base"}
    monkeypatch.setattr(beginner, "BASE", beginner.BASE | few | {"n_layer": 1, "warmup_iters": 1})
    monkeypatch.setattr(beginner, "SFT", beginner.SFT | few)
    words = ["grpo", "--task", "format", "--out", "run", "--num-generations", "2"]
    words += ["--least-pass", "0", "--eval-prompts", "2", "--max-iters", "2", "--backend", "base"]
    with monkeypatch.context() as patched:  # Ctrl-C between two runs ends all of them
        patched.setattr(beginner, "careless_examples", lambda *given: interrupted(*given))
        assert main(words) == 130 and not Path("run/sft").exists()
    out = capsys.readouterr().out
    assert f"continue with: gpt2c {' '.join(words)} --resume\n" in out
    assert main([*words, "--resume"]) == 0
    made = {"beginner.json", "text", "base", "sft", "grpo"}
    assert {path.name for path in Path("run").iterdir()} == made
    record = json.loads(Path("run/grpo/run.json").read_text())
    assert record["settings"]["max_completion_length"] == 15  # of the recipe
    bits = weights(Path("run/grpo"))
    assert main([*words, "--resume"]) == 0 and weights(Path("run/grpo")) == bits
    Path("run/grpo").rename("elsewhere")
    capsys.readouterr()
    times = [Path("run", name, "metrics.jsonl").read_bytes() for name in ("base", "sft")]
    assert main([*words, "--resume"]) == 0 and weights(Path("run/grpo")) == bits
    assert "before: " in capsys.readouterr().out
    after = [Path("run", name, "metrics.jsonl").read_bytes() for name in ("base", "sft")]
    assert after == times  # what was finished is not made again
    assert main(["grpo", "--out", "other"]) == 2
    assert "name a base, or a task to begin with: --task sort|add" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "began"),
    [(name, False) for name in ("text", "base", "sft", "grpo")]
    + [(name, True) for name in ("base", "sft", "grpo")],  # a text has no record of its own
)
def test_beginner_replaces_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, began: bool
) -> None:
    """With --resume it makes again what it had made, and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("run", name).mkdir(parents=True)
    mine = Path("run", name, "model.safetensors")
    mine.write_bytes(b"mine")
    if began:
        Path("run/beginner.json").write_text('{"task": "format"}')
    before = sorted(Path("run").rglob("*"))
    assert main(["grpo", "--task", "format", "--out", "run", "--resume"]) == 2
    assert f"run/{name} exists and is not empty" in capsys.readouterr().err
    assert sorted(Path("run").rglob("*")) == before and mine.read_bytes() == b"mine"


def test_beginner_keeps_its_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/beginner.json").write_text('{"task": "format"}')
    assert main(["grpo", "--task", "sort", "--out", "run", "--resume"]) == 2
    assert "the task must be 'format', got 'sort'" in capsys.readouterr().err
