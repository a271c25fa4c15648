"""Fine-tuning with adapters: what is trained and stored, the same bits after a kill, bad input."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.tuning import capitals, losses, resumes_to_the_bit

import gpt2c
from gpt2c.finetune import classify, dpo, reward, sft
from gpt2c.finetune.sft import SFTSettings

QUICK: dict[str, Any] = {
    "learning_rate": 0.02, "max_iters": 8, "eval_interval": 4, "batch_size": 6, "eval_answers": 4,
    "backend": "base", "lora": True, "lora_r": 4,
}  # fmt: skip
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("quantize", ["none", "fp16", "int8"])
def test_adapters_learn_and_the_base_stays(base: Path, tmp_path: Path, quantize: str) -> None:
    before, out = gpt2c.from_pretrained(base), tmp_path / "run"
    given = QUICK | {"max_iters": 60, "eval_interval": 60, "quantize": quantize}
    result = sft(base, capitals(100), out, **given)
    assert result.after["val_loss"] < result.before["val_loss"] - 0.2  # the tied head is random
    assert sorted(p.name for p in out.iterdir() if "model" in p.name or "config" in p.name) == [
        *ADAPTER, "tokenizer_config.json",
    ]  # fmt: skip
    (checkpoint,) = (out / "checkpoints").iterdir()
    files = [*ADAPTER, "state.json", "trainer.safetensors"]
    assert sorted(file.name for file in checkpoint.iterdir()) == files
    model = gpt2c.from_pretrained(out)
    assert model.config.lora == gpt2c.LoRA(4, 16.0)
    for name, weight in before.parameters.items():
        assert np.array_equal(model.parameters[name], weight), name
    stored = json.loads((out / ADAPTER[0]).read_text())
    assert stored["base_model_name_or_path"] == str(base)


def test_adapters_bring_their_chat_template(base: Path, tmp_path: Path) -> None:
    chats = [
        {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        }
        for pair in (("Hi", "Ho"), ("He", "Ha"))
    ]
    given = QUICK | {"max_iters": 1, "eval_interval": 1, "val_fraction": 0.0}
    sft(base, chats, tmp_path / "run", **given)
    assert gpt2c.Generator.from_pretrained(base).tokenizer.chat_template is None
    for model, adapter in ((base, tmp_path / "run"), (tmp_path / "run", None)):
        found = gpt2c.Generator.from_pretrained(model, adapter=adapter)
        assert found.tokenizer.chat_template is not None


def test_first_loss_is_the_bases(base: Path, tmp_path: Path) -> None:
    given = QUICK | {"max_iters": 1, "eval_answers": 0}
    sft(base, capitals(12), tmp_path / "adapters", **given)
    sft(base, capitals(12), tmp_path / "whole", **given | {"lora": False})
    runs = [losses(tmp_path / name) for name in ("adapters", "whole")]
    assert runs[0][0]["loss"] == runs[1][0]["loss"]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_killed_run_resumes_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    tune = partial(sft, base, capitals(24), **QUICK, quantize=quantize)
    resumes_to_the_bit(tune, tmp_path / "whole", tmp_path / "killed", monkeypatch, at=5)


def test_rate_is_ten_times_that_of_a_whole_model_unless_given(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"max_iters": 1, "eval_answers": 0, "backend": "base", "lora": True}
    for rate in (None, 3e-3):
        out = tmp_path / str(rate)
        sft(base, capitals(12), out, **given | ({} if rate is None else {"learning_rate": rate}))
        wanted = rate or 10 * SFTSettings.fields()["learning_rate"].default
        stored = json.loads((out / "run.json").read_text())["settings"]["learning_rate"]
        assert stored == wanted
        assert f"the learning rate is {wanted:g}, usually 10 times" in capsys.readouterr().out
        sft(base, capitals(12), out, resume=True)  # the rate is the run's own


def test_bad_settings_are_refused_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "run", capitals(12)
    for given, wanted in [
        ({"lora_targets": "c_attn,ln_1"}, "no linear layer has a name that ends with 'ln_1'"),
        ({"lora_alpha": -1.0}, "alpha must be positive"),
        ({"quantize": "int4"}, "quantize must be one of int8, fp16"),
        ({"lora": False, "quantize": "int8"}, "quantize needs lora"),
    ]:
        assert wanted in refused(sft, base, rows, out, **QUICK | given)
    assert not out.exists()
    sft(base, rows, out, **QUICK)
    assert "it cannot continue with 2" in refused(sft, base, rows, out, resume=True, lora_r=2)
    assert "holds adapters: make one model" in refused(sft, out, rows, tmp_path / "next", **QUICK)
    other = gpt2c.from_pretrained(base)
    other.parameters["ln_f.bias"][0] += 1
    other.save_pretrained(tmp_path / "other")
    gpt2c.Tokenizer.from_name("bytes").save_pretrained(tmp_path / "other")
    wanted = "the base has other weights than that of the run"
    assert wanted in refused(sft, tmp_path / "other", rows, out, resume=True)


def test_classifier_keeps_its_names_and_is_evaluated(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": word * n, "label": word} for word in ("ab", "cd", "ef") for n in range(1, 7)]
    given = {"lora": True, "max_iters": 6, "eval_interval": 3, "batch_size": 6, "backend": "base"}

    def tune(out: Path, **others: Any) -> Any:
        return classify(base, rows, out, **given | others).runs[0]

    resumes_to_the_bit(tune, tmp_path / "whole", tmp_path / "killed", monkeypatch, at=3)
    model = gpt2c.from_pretrained(tmp_path / "whole")
    assert model.config.id2label == ("ab", "cd", "ef") and model.trained[0] == "score.weight"
    merged = model.merge()
    merged.save_pretrained(tmp_path / "merged")
    same = gpt2c.from_pretrained(tmp_path / "merged")
    assert same.config == merged.config == dataclasses.replace(model.config, lora=None)
    idx = [[1, 2, 3]]
    np.testing.assert_allclose(same.scores(idx), model.scores(idx), atol=1e-5)


def test_preferences_train_adapters(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{a}=", "chosen": a, "rejected": a.upper()} for a in "abcdefgh"]
    given = {"lora": True, "max_iters": 6, "eval_interval": 3, "batch_size": 3, "backend": "base"}
    for method in (dpo, reward):
        out = tmp_path / method.__name__
        tune = partial(method, base, rows, **given)
        resumes_to_the_bit(tune, out / "whole", out / "killed", monkeypatch, at=3)
        assert gpt2c.from_pretrained(out / "whole").config.lora == gpt2c.LoRA()
