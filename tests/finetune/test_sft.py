"""Supervised fine-tuning: its loss, its equivalences, its runs, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.tuning import Killed, capitals, losses, resumes_to_the_bit, weights

import gpt2c
from gpt2c.files.tensors import map_tensors, write_tensors
from gpt2c.finetune import sft
from gpt2c.finetune import tune as tune_module
from gpt2c.finetune.data import open_data
from gpt2c.finetune.sft import Answers, SFTSettings, answered
from gpt2c.finetune.tune import Base
from gpt2c.formats.load import find_model
from gpt2c.text.examples import Example, Record, supervised
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train import run as run_module

QUICK: dict[str, Any] = {
    "learning_rate": 0.01, "max_iters": 8, "eval_interval": 4, "batch_size": 6, "eval_answers": 4,
    "backend": "base",
}  # fmt: skip


def test_model_learns_the_answers_and_to_end_them(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 60, "eval_interval": 60, "learning_rate": 0.01}
    result = sft(base, capitals(100), tmp_path / "run", **given)
    assert result.before["val_ended"] == 0.0
    assert result.after["val_ended"] == 1.0
    assert result.after["val_loss"] < 0.5 * result.before["val_loss"]
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["after"] == result.after and stored["before"] == result.before
    assert (stored["verb"], stored["step"]) == ("sft", 60)


def test_prompt_alone_gets_the_learned_answer(base: Path, tmp_path: Path) -> None:
    """The tokenizer tells that examples begin with the end of text, here and to other programs."""
    example = {"prompt": "a prompt", "completion": " its answer"}
    sft(base, [example], tmp_path / "run", **QUICK | {"max_iters": 60, "val_fraction": 0.0})
    generator = gpt2c.Generator.from_pretrained(tmp_path / "run")
    assert generator.generate("a prompt", temperature=0) == " its answer"
    generator.tokenizer.add_bos_token = False
    assert generator.generate("a prompt", temperature=0) != " its answer"


def test_default_rate_is_told_for_a_small_model(base: Path, tmp_path: Path, capsys: Any) -> None:
    given = QUICK | {"max_iters": 1}
    told = "small models take about 0.001"
    sft(base, capitals(9), tmp_path / "given", **given)
    assert told not in capsys.readouterr().out
    given.pop("learning_rate")
    sft(base, capitals(9), tmp_path / "default", **given)
    assert told in capsys.readouterr().out


def test_wrong_arguments_are_told(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = refused(sft, base, capitals(9), out, lr=1e-3)
    assert said == "no setting 'lr'; did you mean learning_rate?"
    assert refused(sft, base, [], out) == "there are no examples"
    model = gpt2c.from_pretrained(base)
    assert "got a GPT2: save it with save_pretrained" in refused(sft, model, capitals(9), out)
    (tmp_path / "all").mkdir()
    shutil.copytree(base, tmp_path / "all" / "one")
    with pytest.raises(FileNotFoundError, match=r"all holds no model; did you mean .*all/one\?$"):
        sft(tmp_path / "all", capitals(9), out)


def test_first_loss_is_that_of_the_base_on_the_learned_tokens(base: Path, tmp_path: Path) -> None:
    rows = capitals(6)
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0, "eval_answers": 0}
    sft(base, rows, tmp_path / "run", **given)
    model, tokenizer = gpt2c.from_pretrained(base, "base"), Tokenizer.from_name("bytes")
    total = count = 0.0
    for row in rows:
        one = supervised(Record(row, ""), "prompt and completion", tokenizer)
        found = model.logprobs([one.ids])[0][one.learned[1:]]
        total, count = total - found.sum(dtype=np.float64), count + found.size
    (entry,) = losses(tmp_path / "run")
    assert entry["loss"] == pytest.approx(total / count, rel=1e-6)
    assert entry["tokens"] == sum(len(row["prompt"] + row["completion"]) + 1 for row in rows)


def test_division_of_a_step_changes_rounding_alone(base: Path, tmp_path: Path) -> None:
    rows = capitals(24)
    runs = {}
    for most in (1, 20, 4096):  # each example alone, a few, all of a step together
        out = tmp_path / str(most)
        sft(base, rows, out, **QUICK, batch_tokens=most)
        runs[most] = np.array([entry["loss"] for entry in losses(out)])
        norms = [entry["grad_norm"] for entry in losses(out)]
        runs[most] = np.array([runs[most], norms])
    np.testing.assert_allclose(runs[1], runs[4096], rtol=2e-4)
    np.testing.assert_allclose(runs[20], runs[4096], rtol=2e-4)


def test_text_that_is_all_learned_has_the_loss_of_pretraining(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0, "batch_size": 2}
    texts = [{"text": "all of it"}, {"text": "and that!"}]  # of one length
    sft(base, texts, tmp_path / "run", **given)
    ids = [[256, *text["text"].encode(), 256] for text in texts]
    model = gpt2c.from_pretrained(base, "base")
    loss = model.loss([row[:-1] for row in ids], [row[1:] for row in ids])
    assert losses(tmp_path / "run")[0]["loss"] == loss  # to the bit, whatever their order


def test_accuracy_counts_the_likeliest_tokens(base: Path) -> None:
    model = gpt2c.from_pretrained(base, "base")
    ids = np.arange(40)[None] % 7
    right = model(ids)[0].argmax(axis=1).astype(np.int32)
    objective = Answers(np.where(np.arange(40) % 4 == 0, -1, right).astype(np.int32))
    model.loss(ids, objective, keep=False)
    assert objective.right == 30
    other = Answers(((right + 1) % 257).astype(np.int32))
    model.loss(ids, other)
    assert other.right == 0


@pytest.mark.parametrize("at", [1, 5, 8])
def test_killed_run_goes_on_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    tune = partial(sft, base, capitals(30))
    given = QUICK | {"dropout": 0.1}

    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        return tune(out, resume=resume, **({} if resume else given | others))

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, at)


def test_finished_run_stays_as_it_is(base: Path, tmp_path: Path, capsys: Any) -> None:
    out, rows = tmp_path / "run", capitals(30)
    done = sft(base, rows, out, **QUICK)
    before, record = weights(out), (out / "run.json").read_bytes()
    capsys.readouterr()
    again = sft(base, rows, out, resume=True, learning_rate=0.5)
    assert (out / "run.json").read_bytes() == record  # it was not trained with 0.5
    said = "is already finished after 8 steps, so learning_rate=0.5 has no effect: raise max_iters"
    assert said in capsys.readouterr().out
    assert again.step_seconds == done.step_seconds > 0
    assert (again.step, again.before, again.after) == (8, done.before, done.after)
    assert weights(out) == before
    longer = sft(base, rows, out, resume=True, max_iters=10)
    assert longer.step == 10 and weights(out) != before
    assert longer.step_seconds > done.step_seconds
    assert (
        "the run continues after step 8 of 10, now with max_iters=10\n" in capsys.readouterr().out
    )


def test_figures_outlive_a_kill_before_the_result_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = tmp_path / "run", capitals(30)
    real, kept = run_module.write_result, []

    def write(path: Path, verb: str, entries: Any) -> None:
        if "step" in entries and not kept:
            kept.append(entries)
            raise Killed
        real(path, verb, entries)

    monkeypatch.setattr(run_module, "write_result", write)
    with pytest.raises(Killed):
        sft(base, rows, out, **QUICK)
    again = sft(base, rows, out, resume=True)
    assert (again.before, again.after) == (kept[0]["before"], kept[0]["after"])
    assert again.after and again.before and not again.interrupted
    stored = json.loads((out / "result.json").read_text())
    assert (stored["before"], stored["after"]) == (again.before, again.after)


def test_a_base_that_does_not_fit_its_config_is_refused(base: Path, tmp_path: Path) -> None:
    for name, change, said in (
        ("wte.weight", lambda tensor: tensor[:-1], "tensor wte.weight must be (257, 32)"),
        ("ln_f.bias", None, "tensor ln_f.bias is missing"),
    ):
        spoiled, out = tmp_path / name, tmp_path / "run"
        shutil.copytree(base, spoiled)
        tensors, metadata = map_tensors(spoiled / "model.safetensors")
        arrays = {each: np.array(np.asarray(tensor)) for each, tensor in tensors.items()}
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])
        write_tensors(spoiled / "model.safetensors", arrays, metadata)
        assert said in refused(lambda spoiled=spoiled, out=out: sft(spoiled, capitals(9), out))
        assert not out.exists()


def test_figures_of_learned_examples_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0}
    sft(base, capitals(4), tmp_path / "run", **given)
    said = "none held out, so the figures are of learned ones"
    assert capsys.readouterr().out.count(said) == 1
    sft(base, capitals(4), tmp_path / "other", **given | {"val_fraction": 0.3})
    assert said not in capsys.readouterr().out


def test_a_base_with_another_chat_template_keeps_it(base: Path, tmp_path: Path) -> None:
    own, out, ask = tmp_path / "own", tmp_path / "run", [{"role": "user", "content": "Hi"}]
    shutil.copytree(base, own)
    (own / "chat_template.jinja").write_text("[INST]{{ messages }}")
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Ho", "He"))
    pair = {"prompt": ask, "chosen": yes, "rejected": no}
    said = "the model has a chat template of its own"
    assert said in refused(lambda: sft(own, [{"messages": ask + yes}], out))
    assert said in refused(lambda: gpt2c.finetune.dpo(own, [pair], out))
    talks: list[Any] = [{"messages": ask}] * 2
    assert said in refused(lambda: gpt2c.finetune.grpo(own, talks, out, reward="regex:a"))
    assert not out.exists()
    sft(own, capitals(4), out, **QUICK | {"max_iters": 1})
    assert (out / "chat_template.jinja").read_text() == "[INST]{{ messages }}"


def test_answers_that_are_cut_are_told_and_not_asked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{n}", "completion": "a" * 90} for n in range(3)] + capitals(3)
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0}
    sft(base, rows, tmp_path / "run", **given)
    assert "6 examples (prompt and completion), none held out, so the figures are of learned" in (
        shown := capsys.readouterr().out
    )
    assert "ones, 3 cut at the end; left out: none;" in shown
    assert "; the longest example is cut to 49 tokens\n" in shown  # its context reads 48 of them
    model = gpt2c.from_pretrained(base, "base")
    (row,) = model.generate([[1, 2, 3]], 1, temperature=0)
    one = Example(np.array(row, np.int32), np.arange(4) > 2, "")
    other = one._replace(ids=np.array([1, 2, 3, (row[-1] + 1) % 257], np.int32))
    for examples, right in (
        ([one], 1.0),
        ([one, other], 0.5),
        ([one, other._replace(cut=True)], 1),
    ):
        found = answered(model, examples, eot=int(row[-1]))
        assert found == {"val_ended": 1.0, "val_exact_match": right}


def test_memory_is_counted_as_it_is_taken(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, int]] = []
    monkeypatch.setattr(tune_module, "require", lambda what, parts, *_: found.append(parts))
    given = QUICK | {"max_iters": 1, "val_fraction": 0.0}
    for how in ({}, {"batch_tokens": 20}, {"batch_tokens": 20, "freeze": "wte.*,h.0.*"}):
        sft(base, capitals(9), tmp_path / str(len(found)), **given | how)
    head, layer = 4 * 257 * 32, 4 * (12 * 32 * 32 + 13 * 32)
    whole, divided, frozen = found
    assert divided["gradients"] - whole["gradients"] == head
    assert whole["gradients"] - frozen["gradients"] == head + layer
    assert whole["moments"] - frozen["moments"] == 2 * (head + layer)
    assert whole["a save"] == head and whole["threads"] > 0


def test_a_prompt_is_on_one_side_of_the_split(base: Path) -> None:
    rows = [{"prompt": "abcdef"[n % 6], "completion": str(n)} for n in range(24)]
    opened = Base(find_model(base), Tokenizer.from_name("bytes"))
    data = open_data(rows, opened, SFTSettings(val_fraction=0.3))
    train, val = ({int(one.ids[1]) for one in side} for side in (data.train, data.val))
    assert train and val and not train & val


def test_conversations_leave_their_template_for_others(base: Path, tmp_path: Path) -> None:
    talk = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "Yes."}]}
        for word in "abcd"
    ]
    sft(base, talk, tmp_path / "run", **QUICK | {"max_iters": 1})
    chat = gpt2c.Chat(tmp_path / "run", max_new_tokens=2, min_new_tokens=1)
    assert chat.ask("a") == chat.messages[-1].content
    sft(base, capitals(4), tmp_path / "other", **QUICK | {"max_iters": 1})
    assert not (tmp_path / "other" / "chat_template.jinja").exists()


def test_epochs_become_steps() -> None:
    settings = SFTSettings(max_epochs=2.5, batch_size=8).planned(20)
    assert (settings.max_iters, settings.eval_interval, settings.warmup) == (7, 3, 1)
    assert SFTSettings(max_iters=5, eval_interval=2).planned(20).max_iters == 5
    for given, said in (
        ({"max_epochs": 0.0}, "max_epochs must be above 0, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must be in [0, 1), got 1.0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be in [0, 1), got 1.5"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"max_iters": 3, "schedule": "no"}, "schedule must be one of constant, linear, cosine, w"),
    ):
        assert said in refused(lambda given=given: SFTSettings(**given))


def test_bad_input_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for rows, given, said in (
        ([{"prompt": "a", "completion": ""}], {}, "no example is left to learn from: 1 without an"),
        ([{"prompt": "a" * 60, "completion": "b"}], {}, "1 whose prompt fills the context"),
        (capitals(1), {}, "validation needs at least 2 different examples, or val_fraction 0"),
        (capitals(9), {"max_iters": -1}, "max_iters must be at least 0, got -1"),
        (capitals(9), {"backend": "gpu"}, "gpu"),
    ):
        assert said in refused(lambda rows=rows, given=given: sft(base, rows, out, **given))
        assert not out.exists()
    sft(base, capitals(9), out, **QUICK | {"max_iters": 2})
    bits = weights(out)
    with pytest.raises(OSError, match="not empty"):
        sft(base, capitals(9), out, **QUICK)
    shutil.copytree(base, tmp_path / "other")
    gpt2c.GPT2(gpt2c.from_pretrained(base).config, seed=9).save_pretrained(tmp_path / "other")
    for rows, resumed_base, said in (
        (capitals(8), base, "the examples are not those of the run"),
        (capitals(9), tmp_path / "other", "the base has other weights than that of the run"),
    ):
        assert said in refused(
            lambda rows=rows, of=resumed_base: sft(of, rows, out, resume=True, max_iters=9)
        )
    larger = gpt2c.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=48, vocab_size=257)
    gpt2c.GPT2(dataclasses.replace(larger, eos_token_id=256)).save_pretrained(tmp_path / "other")
    said = refused(lambda: sft(tmp_path / "other", capitals(9), out, resume=True, max_iters=9))
    wanted = "another config: its n_head is 2, and what the run is given now makes it 4"
    assert said == f"{out / 'run.json'} holds a model of {wanted}"
    assert "batch_size=6, so it cannot continue with 7" in refused(
        lambda: sft(base, capitals(9), out, resume=True, batch_size=7)
    )
    assert weights(out) == bits


def test_quantized_base_is_refused(base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    gpt2c.from_pretrained(base).quantize("int8").save_pretrained(small)
    Tokenizer.from_name("bytes").save_pretrained(small)
    said = refused(lambda: sft(small, capitals(9), tmp_path / "run", **QUICK))
    assert "has int8 weights: only fp32 weights are trained" in said


def test_base_is_not_replaced_by_its_own_run(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    (tmp_path / "link").symlink_to(own)
    for out in (own, tmp_path / "link"):
        said = refused(lambda out=out: sft(own, capitals(9), out, overwrite=True, **QUICK))
        assert f"{out} is read itself, and its content would be replaced" in said
    assert weights(own) == weights(base)


def test_classifier_and_larger_tokenizer_are_refused_as_a_base(base: Path, tmp_path: Path) -> None:
    model = gpt2c.from_pretrained(base)
    shutil.copytree(base, tmp_path / "scores")
    config = dataclasses.replace(model.config, num_labels=2)
    gpt2c.GPT2(config).save_pretrained(tmp_path / "scores")
    shutil.copytree(base, tmp_path / "less")
    config = dataclasses.replace(model.config, vocab_size=256, eos_token_id=None)
    gpt2c.GPT2(config).save_pretrained(tmp_path / "less")
    for name, said in (("scores", "sft needs a language head"), ("less", "257 token")):
        assert said in refused(
            lambda name=name: sft(tmp_path / name, capitals(9), tmp_path / "run", **QUICK)
        )
        assert not (tmp_path / "run").exists()


def test_diverged_run_stops_at_its_evaluation(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"learning_rate": 1e9, "skip_nonfinite": True, "grad_clip": 0.0}
    said = refused(lambda: sft(base, capitals(30), tmp_path / "run", **given))
    assert "is nan" in said or "is inf" in said or "not finite" in said


def test_damaged_result_is_written_again(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = sft(base, capitals(30), out, **QUICK)
    for content in ('{"before": {"val_loss": "x"}}', "[", '{"before": 3}'):
        (out / "result.json").write_text(content)
        again = sft(base, capitals(30), out, resume=True)
        assert (again.before, again.after) == ({}, done.after)


def test_run_does_without_its_result(base: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run" / "result.json").mkdir(parents=True)
    result = sft(base, capitals(30), tmp_path / "run", overwrite=True, **QUICK | {"max_iters": 4})
    assert result.step == 4
    told = f"{tmp_path}/run/result.json cannot be written (Is a directory): it is left out\n"
    assert capsys.readouterr().out.count(told) == 1
