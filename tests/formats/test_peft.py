"""Adapters in files: what is written, read back, joined and refused; `gpt2c merge`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpt2c
from gpt2c import GPT2, GPT2Config, Llama, LlamaConfig
from gpt2c.cli.main import main
from gpt2c.formats.load import find_model

CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=257, n_positions=16, n_embd=12, n_layer=2, n_head=2),
    "llama": LlamaConfig(257, 24, 20, 2, 4, 2, None, 16),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDX = [[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]]


def adapted(kind: str, directory: Path, **settings: Any) -> Any:
    """Save a base, and its adapters with random numbers; return the model."""
    model = (GPT2 if kind == "gpt2" else Llama)(CONFIGS[kind], seed=1)
    model.save_pretrained(directory / "base")
    gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory / "base")
    model = gpt2c.from_pretrained(directory / "base")
    model.add_lora(**{"r": 3, "alpha": 5.0} | settings)
    rng = np.random.default_rng(2)
    for name in model.trained:
        model.parameters[name][...] = 0.3 * rng.standard_normal(model.parameters[name].shape)
    model.save_pretrained(directory / "adapter")
    return model


@KINDS
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"targets": ["mlp.c_proj"]}], ids=str
)
def test_adapters_come_back(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(kind, tmp_path, **settings)
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == [CONFIG, WEIGHTS]
    base = tmp_path / "base"
    for found in (
        gpt2c.from_pretrained(tmp_path / "adapter"),
        gpt2c.from_pretrained(base, adapter=tmp_path / "adapter"),
        type(model).from_pretrained(base, adapter=tmp_path / "adapter"),
    ):
        assert found.config == model.config and found.trained == model.trained
        assert np.array_equal(found(IDX), model(IDX))
    small = gpt2c.from_pretrained(tmp_path / "adapter", quantize="int8")
    assert small.weights == "int8" and small.trained == model.trained
    small.save_pretrained(tmp_path / "again")  # which still names the base and its weights
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "adapter" / name
        ).read_bytes()


def test_names_are_those_of_peft(tmp_path: Path) -> None:
    adapted("gpt2", tmp_path, targets=["attn.c_proj"])
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    prefix = "base_model.model.transformer.h."
    wanted = {f"{prefix}{i}.attn.c_proj.lora_{s}.weight" for i in range(2) for s in "AB"}
    assert stored.keys() == wanted
    entries = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert entries["target_modules"] == ["attn.c_proj"]
    assert (entries["r"], entries["lora_alpha"], entries["task_type"]) == (3, 5.0, "CAUSAL_LM")
    with safe_open(tmp_path / "adapter" / WEIGHTS, "np") as file:
        assert file.metadata().keys() == {"format", "base_sha256"}


def test_llamas_parts_have_the_same_a_and_their_rows_of_b(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    layer = "base_model.model.model.layers.1."
    a, b = (model.parameters[f"h.1.attn.c_attn.lora_{side}.weight"] for side in "AB")
    parts = [f"{layer}self_attn.{part}_proj" for part in "qkv"]
    assert all(np.array_equal(stored[part + ".lora_A.weight"], a) for part in parts)
    assert np.array_equal(np.concatenate([stored[p + ".lora_B.weight"] for p in parts]), b)
    assert [len(stored[p + ".lora_B.weight"]) for p in parts] == [24, 12, 12]
    targets = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    assert len(targets) == 7 and "mlp.gate_proj" in targets


def test_llamas_parts_with_different_a_become_one_adapter(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    path = tmp_path / "adapter" / WEIGHTS
    stored = load_file(path)
    rng = np.random.default_rng(3)
    kept = {name: tensor for name, tensor in stored.items() if "k_proj" not in name}
    for name, tensor in kept.items():
        if "v_proj.lora_A" in name:
            tensor[...] = rng.standard_normal(tensor.shape)
    save_file(kept, path)
    found = gpt2c.from_pretrained(tmp_path / "adapter")
    lora = found.config.lora
    assert (lora.r, lora.scale) == (6, model.config.lora.scale)
    merged = found.merge()
    for i in range(2):
        own = model.parameters[f"h.{i}.attn.c_attn.weight"]
        layer, change = f"base_model.model.model.layers.{i}.self_attn.", []
        for part, rows in (("q", 24), ("k", 12), ("v", 12)):
            pair = [kept.get(f"{layer}{part}_proj.lora_{side}.weight") for side in "AB"]
            change.append(np.zeros((rows, 24)) if pair[0] is None else 5 / 3 * pair[1] @ pair[0])
        weight = merged.parameters[f"h.{i}.attn.c_attn.weight"]
        np.testing.assert_allclose(weight, own + np.concatenate(change), atol=1e-6)


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    adapted("gpt2", tmp_path)
    other = GPT2.from_pretrained(tmp_path / "base")
    other.parameters["wpe.weight"][3, 3] += 1
    other.save_pretrained(tmp_path / "other")
    given = {"adapter": tmp_path / "adapter"}
    said = refused(gpt2c.from_pretrained, tmp_path / "other", **given)
    wanted = f"was trained on a base with other weights than {tmp_path}/other has"
    assert said == f"{tmp_path}/adapter/{WEIGHTS} {wanted}"
    model = gpt2c.from_pretrained(tmp_path / "other", **given, check_base=False)
    assert model.config.lora is not None
    wide = GPT2(GPT2Config(vocab_size=257, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    wide.save_pretrained(tmp_path / "wide")
    wanted = "lora_A.weight must be (3, 16) for its config, got (3, 12)"
    assert wanted in refused(gpt2c.from_pretrained, tmp_path / "wide", **given, check_base=False)
    Llama(CONFIGS["llama"]).save_pretrained(tmp_path / "llama")
    assert "has no place for" in refused(gpt2c.from_pretrained, tmp_path / "llama", **given)


def test_bases_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    adapted("gpt2", tmp_path)
    adapter = tmp_path / "adapter"
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"adapter adapts .*base, which does not exist"):
        gpt2c.from_pretrained(adapter)
    assert gpt2c.from_pretrained(tmp_path / "moved", adapter=adapter).config.lora.r == 3
    entries = json.loads((adapter / CONFIG).read_text())
    for base, wanted in ((None, "names no base"), (str(adapter), "which holds adapters")):
        (adapter / CONFIG).write_text(json.dumps(entries | {"base_model_name_or_path": base}))
        assert wanted in refused(gpt2c.from_pretrained, adapter)
    assert "takes no others" in refused(gpt2c.from_pretrained, adapter, adapter=adapter)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        gpt2c.from_pretrained(tmp_path / "moved", adapter=tmp_path / "moved")


def test_whole_models_and_adapters_do_not_hide_each_other(tmp_path: Path) -> None:
    model = adapted("gpt2", tmp_path)
    assert "holds a model" in refused(model.save_pretrained, tmp_path / "base")
    model.merge().save_pretrained(tmp_path / "adapter")
    found = gpt2c.from_pretrained(tmp_path / "adapter")
    assert found.config.lora is None
    model.unfreeze("ln_f.*")
    assert "other parameters than adapters" in refused(model.save_pretrained, tmp_path / "next")
    assert not (tmp_path / "next").exists()


# ---- commands ------------------------------------------------------------------------------------


@KINDS
def test_merge(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(kind, tmp_path)
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: the model of {tmp_path}/base with its adapters of rank 3; logits of 16" in said
    assert float(said.split("differ by ")[1].split()[0]) < 1e-5
    merged = gpt2c.from_pretrained(out)
    assert merged.config == CONFIGS[kind]
    np.testing.assert_allclose(merged(IDX), model(IDX), atol=1e-5)
    assert gpt2c.Generator.from_pretrained(out).generate("a", max_new_tokens=3, temperature=0)
    assert find_model(out).config.lora is None
    for arguments, wanted in [
        ((tmp_path / "base", "--out", tmp_path / "new"), "holds no adapters to merge"),
        ((tmp_path / "adapter", "--out", out), "merged"),
        ((tmp_path / "adapter", "--out", tmp_path / "adapter", "--overwrite"), "holds adapters"),
    ]:
        assert main(["merge", *map(str, arguments)]) == 2
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    shutil.copytree(tmp_path / "adapter", out / "own")
    for model, adapter, given in (
        ("base", "adapter", "base"),  # the base, named and by its adapters
        ("adapter", None, "base"),
        ("base", out / "own", out),
    ):
        flags = [] if adapter is None else ["--adapter", str(tmp_path / adapter)]
        place = ["--out", str(tmp_path / given), "--overwrite"]
        assert main(["merge", str(tmp_path / model), *flags, *place]) == 2
        assert "and its content would be replaced" in capsys.readouterr().err
    together = ["--adapter", str(tmp_path / "adapter"), "--out", str(out), "--overwrite"]
    assert main(["merge", str(tmp_path / "base"), *together]) == 0


def test_generate_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("gpt2", tmp_path)
    shutil.copytree(tmp_path / "adapter", tmp_path / "run")
    texts = []
    for arguments in (["run"], ["base", "--adapter", str(tmp_path / "adapter")], ["base"]):
        flags = ["--prompt", "ab", "--max-new-tokens", "8", "--temperature", "0"]
        assert main(["generate", str(tmp_path / arguments[0]), *arguments[1:], *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert model.config.lora is not None
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "model.bin")]) == 2
    assert "make one model of them with gpt2c merge" in capsys.readouterr().err
