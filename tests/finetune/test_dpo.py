"""DPO and KTO: the first loss, known optima, equivalences, runs that go on, and bad input."""

from __future__ import annotations

import json
import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.tuning import Killed, kill_after, losses, resumes_to_the_bit, weights

import gpt2c
from gpt2c.files.names import REFERENCE_FILE, ROLLOUTS
from gpt2c.finetune import dpo, reference
from gpt2c.finetune.dpo import DPOSettings, Pairs, Singles
from gpt2c.finetune.pairs import Unit, pair_of
from gpt2c.finetune.preference import PairLoss
from gpt2c.text.examples import Example, Record, read_records
from gpt2c.text.tokenizer import Tokenizer

dpo_module = sys.modules[DPOSettings.__module__]  # its name is the function's too
QUICK: dict[str, Any] = {
    "learning_rate": 3e-3, "max_iters": 8, "eval_interval": 4, "batch_size": 6, "backend": "base",
}  # fmt: skip


def words(rng: random.Random) -> str:
    return "".join(rng.choice("abcde") for _ in range(rng.randint(2, 8)))


def numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with a group each, so that a prompt that comes twice moves no split."""
    return [row | {"number": number} for number, row in enumerate(rows)]


def shorter_first(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return pairs of words of which the shorter is preferred."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        chosen, rejected = sorted([words(rng), words(rng)], key=len)
        if len(chosen) < len(rejected):
            rows.append({"prompt": words(rng) + "?", "chosen": chosen, "rejected": rejected})
    return rows


def liked(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return single answers, of which those that begin with a are liked."""
    rng = random.Random(seed)
    rows = [{"prompt": words(rng), "completion": words(rng)} for _ in range(count)]
    return [{**row, "label": row["completion"].startswith("a")} for row in rows]


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.1}, math.log(2)),
        ({"loss_type": "robust", "label_smoothing": 0.1}, math.log(2)),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "ipo", "beta": 0.5}, 1.0),
    ],
)
def test_first_loss_is_known(base: Path, tmp_path: Path, given: Any, first: float) -> None:
    result = dpo(base, shorter_first(20), tmp_path / "run", **QUICK | given | {"max_iters": 1})
    (entry,) = losses(tmp_path / "run")
    assert entry["loss"] == pytest.approx(first, abs=1e-5)
    assert entry["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert result.before["val_loss"] == pytest.approx(first, abs=1e-5)
    assert result.before["val_rewards/accuracies"] == 0.5


def test_first_loss_of_kto(base: Path, tmp_path: Path) -> None:
    rows = liked(12)
    given = QUICK | {"batch_size": 12, "val_fraction": 0.0, "max_iters": 1}
    dpo(base, rows, tmp_path / "run", loss_type="kto", desirable_weight=3.0, **given)
    share = sum(row["label"] for row in rows) / 12
    assert 0 < share < 1
    (entry,) = losses(tmp_path / "run")
    assert entry["loss"] == pytest.approx(1.5 * share + 0.5 * (1 - share), abs=1e-5)


def test_first_loss_of_another_reference_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "run", QUICK | {"val_fraction": 0.0}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1)
        dpo(base, shorter_first(20), out, **given)
    key, *lines = (out / REFERENCE_FILE).read_text().splitlines()
    spoiled = [json.dumps(json.loads(line) * 1.01) for line in lines]
    (out / REFERENCE_FILE).write_text("\n".join([key, *spoiled, ""]))
    message = refused(dpo, base, shorter_first(20), out, resume=True)
    assert "the first loss is" in message and "must be 0.693147" in message
    assert not [*(out / "checkpoints").iterdir()]


def test_a_run_that_is_refused_at_its_first_step_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, own, rows = tmp_path / "made" / "run", tmp_path / "own", shorter_first(20)
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(dpo_module, "NEAR", -1.0)
        assert "the first loss is" in refused(dpo, base, rows, out, **QUICK)
        assert "the first loss is" in refused(dpo, base, rows, own, overwrite=True, **QUICK)
    assert not out.parent.exists()
    assert [path.name for path in own.iterdir()] == ["notes.txt"]
    dpo(base, rows, out, **QUICK | {"max_iters": 1})


def test_margin_goes_to_its_optimum(base: Path, tmp_path: Path) -> None:
    """With a share e of wrong labels, the best reward margin is log((1 - e) / e), exactly."""
    rows = [{"prompt": "abc", "chosen": "d", "rejected": "e"}]
    given = QUICK | {
        "batch_size": 1, "val_fraction": 0.0, "max_iters": 80, "eval_interval": 80,
    }  # fmt: skip
    result = dpo(base, rows, tmp_path / "run", label_smoothing=0.2, beta=0.5, **given)
    assert result.after["val_rewards/margins"] == pytest.approx(math.log(0.8 / 0.2), rel=1e-3)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert result.after["val_loss"] == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "ipo", "simpo"])
def test_pairs_are_learned(base: Path, tmp_path: Path, loss_type: str) -> None:
    given = QUICK | {"max_iters": 30, "eval_interval": 30, "val_fraction": 0.2}
    given |= {"beta": {"simpo": 2.0, "ipo": 1.0}.get(loss_type, 0.1)}
    result = dpo(base, shorter_first(100), tmp_path / "run", loss_type=loss_type, **given)
    assert result.after["val_loss"] < result.before["val_loss"]
    assert result.after["val_rewards/accuracies"] > 0.8
    low, high = (result.after[f"val_rewards/accuracies/{end}"] for end in ("low", "high"))
    assert 0 < low < result.after["val_rewards/accuracies"] <= high <= 1
    assert (tmp_path / "run" / REFERENCE_FILE).exists() == (loss_type != "simpo")


@pytest.mark.parametrize("label", [True, False, None])
def test_kto_tells_that_its_answers_are_of_one_kind(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], label: bool | None
) -> None:
    rows = [row | {"label": row["label"] if label is None else label} for row in liked(30)]
    dpo(base, rows, tmp_path / "run", **QUICK | {"loss_type": "kto", "max_iters": 1})
    shown = capsys.readouterr().out
    assert shown.count("all answers to learn from are") == (label is not None)
    assert ("are liked: kto" in shown) == (label is True)
    assert ("are not liked: kto" in shown) == (label is False)


def test_kto_learns_the_labels(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 60, "eval_interval": 60, "val_fraction": 0.2, "batch_size": 16}
    given |= {"loss_type": "kto", "group_field": "number"}
    result = dpo(base, numbered(liked(160)), tmp_path / "run", **given)
    assert result.after["val_loss"] < 0.9 * result.before["val_loss"]
    assert result.after["val_rewards/chosen"] > result.after["val_rewards/rejected"] + 0.3


def test_sft_term_keeps_the_chosen_likely(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    given, rows = QUICK | {"learning_rate": 0.01, "group_field": "number"}, shorter_first(60)
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        found.append(dpo(base, numbered(rows), out, sft_weight=weight, **given))
        told = "the chosen answers became less likely, too (logps/chosen" in capsys.readouterr().out
        assert told == (weight == 0.0)
    plain, kept = (result.after["val_logps/chosen"] for result in found)
    assert kept > plain + 1
    entry = losses(tmp_path / "1.0")[0]
    assert entry["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert entry["loss"] == pytest.approx(entry["preference_loss"] + entry["nll_loss"])


def test_random_preferences_teach_nothing(base: Path, tmp_path: Path) -> None:
    rng, rows = random.Random(3), shorter_first(260)
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    given = QUICK | {"max_iters": 20, "eval_interval": 20, "val_fraction": 0.6}
    after = dpo(base, rows, tmp_path / "run", **given).after
    assert after["val_rewards/accuracies/low"] < 0.5 < after["val_rewards/accuracies/high"]
    assert after["val_rewards/accuracies/high"] - after["val_rewards/accuracies/low"] < 0.17


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_division_of_a_step_changes_rounding_alone(
    base: Path, tmp_path: Path, loss_type: str
) -> None:
    rows = shorter_first(30) if loss_type == "sigmoid" else liked(30)
    found = {}
    for most in (1, 60, 4096):  # each unit alone, a few, all of a step together
        out = tmp_path / str(most)
        dpo(base, rows, out, loss_type=loss_type, batch_tokens=most, **QUICK)
        found[most] = [[entry["loss"], entry["grad_norm"]] for entry in losses(out)]
    np.testing.assert_allclose(found[1], found[4096], rtol=1e-3)
    np.testing.assert_allclose(found[60], found[4096], rtol=1e-3)


@pytest.mark.parametrize(("loss_type", "at"), [("sigmoid", 1), ("sigmoid", 5), ("kto", 3)])
def test_killed_run_goes_on_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str, at: int
) -> None:
    rows = shorter_first(30) if loss_type == "sigmoid" else liked(30)

    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        given = {} if resume else QUICK | {"loss_type": loss_type} | others
        return dpo(base, rows, out, resume=resume, **given)

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, at)


def test_reference_goes_on_after_a_kill(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the reference, then in the middle of the run."""
    tune = partial(dpo, base, shorter_first(30))
    out, whole, real = tmp_path / "run", tmp_path / "whole", reference.log_probabilities
    computed = []

    def count(model: Any, examples: Any, keep: bool) -> Any:
        if len(computed) == 4:
            raise Killed
        computed.append(len(examples))
        return real(model, examples, keep)

    given = QUICK | {"batch_tokens": 60}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(reference, "log_probabilities", count)
        tune(out, **given)
    lines = (out / REFERENCE_FILE).read_bytes()
    tune(out, resume=True)
    assert (out / REFERENCE_FILE).read_bytes().startswith(lines)
    tune(whole, **given)
    assert weights(out) == weights(whole) and losses(out) == losses(whole)
    (out / REFERENCE_FILE).unlink()
    assert "lacks log-probabilities" in refused(tune, out, resume=True, max_iters=9)


def test_reference_does_not_depend_on_the_batches(base: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "run", shorter_first(30)
    dpo(base, rows, out, **QUICK | {"batch_tokens": 60})
    stored = (out / REFERENCE_FILE).read_bytes()
    dpo(base, rows, out, resume=True, max_iters=9, batch_tokens=99)
    assert (out / REFERENCE_FILE).read_bytes() == stored


def test_an_overwritten_run_computes_its_own_reference(base: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "run", shorter_first(30)
    dpo(base, rows, out, **QUICK)
    stored = (out / REFERENCE_FILE).read_bytes()
    (out / REFERENCE_FILE).write_bytes(stored.replace(b"-", b"-1"))
    (out / ROLLOUTS).mkdir()
    (out / ROLLOUTS / "00000001.safetensors").write_bytes(b"of another run")
    dpo(base, rows, out, overwrite=True, **QUICK)
    assert (out / REFERENCE_FILE).read_bytes() == stored
    assert not [*(out / ROLLOUTS).iterdir()]


def test_metrics_have_the_names_of_trl(base: Path, tmp_path: Path) -> None:
    dpo(base, shorter_first(20), tmp_path / "pairs", **QUICK)
    names = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    names |= {"logps/chosen", "logps/rejected"}
    assert names <= losses(tmp_path / "pairs")[0].keys()
    dpo(base, liked(20), tmp_path / "singles", loss_type="kto", **QUICK)
    names = {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"}
    assert names <= set().union(*losses(tmp_path / "singles"))


def test_conversations_leave_their_template_for_others(base: Path, tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "Hi"}]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Ho", "He"))
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0}
    dpo(base, [{"prompt": ask, "chosen": yes, "rejected": no}], tmp_path / "talk", **given)
    assert (tmp_path / "talk" / "chat_template.jinja").exists()
    dpo(base, shorter_first(4), tmp_path / "text", **given)
    assert not (tmp_path / "text" / "chat_template.jinja").exists()


def unit(lengths: tuple[int, ...], reference: tuple[float, ...], label: bool = True) -> Unit:
    ids = [np.zeros(n + 3, np.int32) for n in lengths]
    examples = tuple(Example(one, np.arange(len(one)) >= 3, "") for one in ids)
    return Unit(examples, label, reference=reference)


def test_figures_of_pairs() -> None:
    units = [unit((2, 5), (-3.0, -6.0)), unit((4, 1), (-2.0, -1.0))]
    values = np.array([[-1.0, -5.0], [-8.0, -0.5]])
    judged = Pairs(PairLoss(beta=0.5))(units, values)
    expected = {
        "rewards/chosen": [1.0, -1.5],
        "rewards/rejected": [-1.0, 0.25],
        "rewards/margins": [2.0, -1.75],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-1.0, -5.0],
        "logps/rejected": [-8.0, -0.5],
    }
    assert {name: list(row) for name, row in judged.figures.items()} == expected
    simpo = Pairs(PairLoss("simpo", beta=2.0))(units, values)
    assert list(simpo.figures["rewards/chosen"]) == [-1.0, -2.5]
    assert list(simpo.figures["rewards/rejected"]) == pytest.approx([-3.2, -1.0])


def test_each_loss_has_its_own_beta() -> None:
    assert DPOSettings().pair_loss().beta == 0.1
    assert DPOSettings(loss_type="simpo").pair_loss().beta == 2.0
    assert DPOSettings(loss_type="simpo", beta=0.5).pair_loss().beta == 0.5
    units = [unit((2,), (-3.0, -1.0))]
    judged = Singles(DPOSettings(loss_type="kto"), 0.0)(units, np.array([[-1.0]]))
    assert judged.figures["rewards/chosen"] == pytest.approx([0.2])


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_evaluations_keep_nothing_for_a_backward(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str
) -> None:
    real, kept = gpt2c.GPT2.losses, []

    def losses_of(self: Any, *given: Any, keep: bool = True) -> Any:
        kept.append(keep)
        return real(self, *given, keep=keep)

    monkeypatch.setattr(gpt2c.GPT2, "losses", losses_of)
    rows = shorter_first(20) if loss_type == "sigmoid" else liked(20)
    dpo(base, rows, tmp_path / "run", loss_type=loss_type, **QUICK | {"max_iters": 2})
    assert kept.count(True) == 2  # the steps


def sides_of(
    base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, rows: Any, **given: Any
) -> list[set[str]]:
    """Return the prompts of the two sides of a run's split."""
    made: list[Any] = []
    real = dpo_module.Judging.__init__

    def keep(self: Any, *args: Any) -> None:
        real(self, *args)
        made.append(self)

    monkeypatch.setattr(dpo_module.Judging, "__init__", keep)
    dpo(base, rows, out, **QUICK | {"val_fraction": 0.3, "max_iters": 1} | given)
    return [{unit.asked.decode("utf-32-le")[1:] for unit in side} for side in
            (made[0].train, made[0].val)]  # fmt: skip


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_a_prompt_is_on_one_side_of_the_split(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str
) -> None:
    rows = shorter_first(24) if loss_type == "sigmoid" else liked(24)
    rows = [row | {"prompt": "abcdef"[n % 6], "of": n % 6 // 3} for n, row in enumerate(rows)]
    train, val = sides_of(base, tmp_path / "run", monkeypatch, rows, loss_type=loss_type)
    assert train | val == {*"abcdef"} and train and val and not train & val
    given = {"loss_type": loss_type, "group_field": "of"}
    train, val = sides_of(base, tmp_path / "own", monkeypatch, rows, **given)
    assert {"".join(sorted(side)) for side in (train, val)} == {"abc", "def"}
    said = refused(dpo, base, rows, tmp_path / "x", loss_type=loss_type, group_field="no")
    assert said == "example 1 has no field 'no' for its group"


def test_mismatched_answers_are_of_the_same_side(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = dpo_module._KTO.__init__

    def keep(self: Any, *given: Any) -> None:
        real(self, *given)
        made.append(self)

    monkeypatch.setattr(dpo_module._KTO, "__init__", keep)
    given = QUICK | {"loss_type": "kto", "val_fraction": 0.3, "max_iters": 1}
    dpo(base, liked(20), tmp_path / "run", **given)
    for side in (made[0].train, made[0].val):
        own = {one.ids[one.learned].tobytes() for unit in side for one in unit.examples}
        assert {unit.other.ids[unit.other.learned].tobytes() for unit in side} <= own


def test_figures_of_single_answers() -> None:
    units = [unit((2,), (-3.0, -1.0)), unit((5,), (-2.0, -1.0), label=False)]
    judged = Singles(DPOSettings(loss_type="kto", beta=0.5), 0.4)(units, np.array([[-1.0, -5.0]]))
    np.testing.assert_equal(judged.figures["rewards/chosen"], [1.0, np.nan])
    np.testing.assert_equal(judged.figures["rewards/rejected"], [np.nan, -1.5])
    np.testing.assert_equal(judged.figures["logps/rejected"], [np.nan, -5.0])
    assert list(judged.figures["kl"]) == [0.4, 0.4]


def test_prompts_are_not_learned() -> None:
    tokenizer = Tokenizer.from_name("bytes")
    row = {"prompt": "ab", "chosen": "c", "rejected": "de"}
    chosen, rejected = pair_of(Record(row, ""), tokenizer).examples
    assert bytes(chosen.ids[1:-1].tolist()) == b"abc" and chosen.ids[-1] == tokenizer.eot
    assert chosen.learned.tolist() == [False] * 3 + [True] * 2
    assert rejected.learned.tolist() == [False] * 3 + [True] * 3
    ask = [{"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Ho", "He")]
    split = {"prompt": ask, "chosen": answers[0], "rejected": answers[1]}
    joined = {"prompt": "Hi", "chosen": ask + answers[0], "rejected": ask + answers[1]}
    openai = {"input": {"messages": ask, "tools": []}} | dict(
        zip(("preferred_output", "non_preferred_output"), answers, strict=True)
    )
    (renamed,) = read_records([openai], ["preference"]).records
    for fields in (split, joined, renamed.fields):
        for one, said in zip(
            pair_of(Record(fields, ""), tokenizer).examples, (b"Ho", b"He"), strict=True
        ):
            assert bytes(one.ids[~one.learned][1:].tolist()) == b"user:\nHi\n\nassistant:\n"
            assert bytes(one.ids[one.learned][:-1].tolist()) == said


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SINGLE = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        (
            [{"input": {}, "preferred_output": [], "non_preferred_output": []}],
            {},
            "example 1: input must hold messages, got {}",
        ),
        (
            [PAIR | {"preferred_output": []}],
            {},
            "example 1 has both chosen and preferred_output, which mean the same",
        ),
        ([PAIR | {"rejected": "b"}], {}, "example 1: chosen and rejected are equal, so neither"),
        ([PAIR | {"chosen": " "}], {}, "example 1: chosen is empty"),
        ([PAIR | {"chosen": 3}], {}, "example 1: chosen must be a string, got int"),
        ([PAIR | {"margin": "much"}], {}, "example 1: margin must be a number, got 'much'"),
        ([PAIR | {"margin": math.inf}], {}, "example 1: margin must be finite, got inf"),
        (
            [PAIR | {"chosen": "b" * 60 + "x", "rejected": "b" * 60 + "y"}],
            {},
            "1 whose answers are equal up to where they are cut",
        ),
        ([PAIR | {"prompt": "a" * 60}], {}, "1 whose prompt fills the context"),
        ([SINGLE], {}, "wanted are chosen and rejected"),
        ([PAIR], {"loss_type": "kto"}, "wanted are prompt and completion and label"),
        ([SINGLE | {"label": "yes"}], {"loss_type": "kto"}, "label must be true or false, got 'y"),
        ([PAIR], {"dropout": 0.1}, "dropout must be 0 to learn from judgements, got 0.1"),
        ([PAIR], {"loss_type": "dpo"}, "loss_type must be one of sigmoid, robust, hinge, ipo, si"),
        ([PAIR], {"beta": -1.0}, "beta must be at least 0, got -1.0"),
        ([SINGLE], {"loss_type": "kto", "batch_size": 1}, "batch_size must be at least 2"),
        ([SINGLE], {"loss_type": "kto", "sft_weight": 1.0}, "are for losses of pairs, not for kto"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, rows: Any, given: Any, said: str
) -> None:
    given = {"val_fraction": 0.0} | given
    assert said in refused(dpo, base, rows, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_is_no_base(tmp_path: Path) -> None:
    config = gpt2c.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=48, vocab_size=257, num_labels=1
    )
    gpt2c.GPT2(config).save_pretrained(tmp_path / "base")
    Tokenizer.from_name("bytes").save_pretrained(tmp_path / "base")
    assert "language head" in refused(dpo, tmp_path / "base", [PAIR], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_of_csv_and_names_of_fields(base: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("q,completion,label\na,b,True\nc,d,0\ne,f,false\ng,h,1\n")
    given = QUICK | {"val_fraction": 0.0, "max_iters": 1, "prompt_field": "q", "loss_type": "kto"}
    result = dpo(base, table, tmp_path / "run", **given)
    assert {"val_rewards/chosen", "val_rewards/rejected"} <= result.after.keys()
