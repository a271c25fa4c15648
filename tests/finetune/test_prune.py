"""Pruning: what goes is what does least, files of the result, zeros that stay, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.tuning import capitals, losses

import gpt2c
from gpt2c.cli.main import main
from gpt2c.finetune import distill, prune, sft
from gpt2c.finetune.prune import PruneSettings, observe, stays
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.model.llama import LlamaConfig
from gpt2c.text.tokenizer import Tokenizer

ROWS = capitals(24)
GPT = gpt2c.GPT2Config(257, 48, 24, 3, 2, n_inner=40, eos_token_id=256)
LLAMA = LlamaConfig(257, 24, 40, 3, 4, 2, max_position_embeddings=48, eos_token_id=256)
BOTH = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["GPT-2", "Llama"])
IDS = [np.arange(40, dtype=np.int32) * 5 % 257, np.arange(7, dtype=np.int32)]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prune.__globals__, "TIMED_SECONDS", 0.0)


def odd(config: Any) -> Any:
    """Return a model whose parameters are all random."""
    kind = gpt2c.Llama if isinstance(config, LlamaConfig) else gpt2c.GPT2
    model, rng = kind(config, 3, "base"), np.random.default_rng(3)
    for parameter in model.parameters.values():
        parameter += np.float32(0.1) * rng.standard_normal(parameter.shape, np.float32)
    return model


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    Tokenizer.from_name("bytes").save_pretrained(path)
    return path


def logits(model: Any) -> Any:
    return model.logits(model.hidden(IDS))


# ---- what goes -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("still", [0, 1, 2])
def test_layer_that_changes_nothing_goes_first(config: Any, still: int, tmp_path: Path) -> None:
    model = odd(config)
    for name, parameter in model.parameters.items():
        if name.startswith(f"h.{still}.") and "c_proj" in name:
            parameter[...] = 0
    seen = observe(model, IDS)
    assert seen.influence[still] == pytest.approx(0, abs=1e-6)
    assert seen.influence.argmin() == still and seen.influence.max() > 1e-3
    pruned = prune(saved(model, tmp_path / "m"), ROWS, tmp_path / "out", layers=2, backend="base")
    small = gpt2c.from_pretrained(tmp_path / "out", "base")
    assert small.config.n_layer == 2 and f"layers {still} of 3 went" in pruned.said[0]
    np.testing.assert_array_equal(logits(small), logits(model))
    assert pruned.after["val_loss"] == pruned.before["val_loss"]


@BOTH
def test_neurons_that_never_fire_go_without_a_change(config: Any, tmp_path: Path) -> None:
    model, rng = odd(config), np.random.default_rng(4)
    F, alive = config.inner, np.zeros(config.inner, bool)
    for layer in model.config.stack().layers:
        alive[...] = False
        alive[rng.choice(F, F // 2, replace=False)] = True
        fc = layer.mlp.fc
        rows = np.tile(alive, fc.OC // F)
        model.parameters[fc.weight][~rows] = 0
        if fc.bias:
            model.parameters[fc.bias][~rows] = 0
    pruned = prune(saved(model, tmp_path / "m"), ROWS, tmp_path / "out", mlp=0.5, backend="base")
    small = gpt2c.from_pretrained(tmp_path / "out", "base")
    assert small.config.inner == F // 2
    np.testing.assert_allclose(logits(small), logits(model), atol=1e-5)
    assert pruned.after["parameters"] == small.config.num_parameters()
    assert pruned.after["bytes"] == 4 * small.config.num_parameters() < pruned.before["bytes"]
    assert pruned.said == (f"{F // 2} of {F} inner neurons of each layer went",)


@BOTH
def test_observations_are_those_of_the_blocks(config: Any) -> None:
    model = odd(config)
    seen = observe(model, IDS)
    traces = [model.trace(ids[None]) for ids in IDS]
    acts = np.concatenate([trace["h.1.mlp.act"][0] for trace in traces]).astype(np.float64)
    np.testing.assert_allclose(seen.firing[1], np.abs(acts).mean(0), rtol=1e-6)
    layers = model.config.stack().layers
    np.testing.assert_allclose(
        seen.norms[layers[1].mlp.proj.weight], np.linalg.norm(acts, axis=0), rtol=1e-6
    )
    fc = layers[2].mlp.fc  # the inputs of a linear layer give its outputs
    inputs = traces[0]["h.2.ln_2"][0]
    out = inputs @ model.parameters[fc.weight].T
    out += model.parameters[fc.bias] if fc.bias else 0
    np.testing.assert_allclose(out, traces[0]["h.2.mlp.fc"][0], atol=1e-4)
    middle = np.concatenate([trace["h.0.attn.att"][0] for trace in traces]).astype(np.float64)
    np.testing.assert_allclose(
        seen.norms[layers[0].attention.proj.weight], np.linalg.norm(middle, axis=0), rtol=1e-6
    )


def test_each_row_keeps_its_highest_scores(rng: np.random.Generator) -> None:
    scores = rng.random((5, 12))
    mask = stays(scores, 0.25)
    assert (mask.sum(1) == 9).all()
    assert all(row[own].min() > row[~own].max() for row, own in zip(scores, mask, strict=True))
    for group in ((2, 4), (1, 3), (4, 6)):
        mask = stays(scores, None, group).reshape(5, -1, group[1])
        parts = scores.reshape(mask.shape)
        assert (mask.sum(2) == group[0]).all()
        assert (np.where(mask, parts, 2).min(2) > np.where(mask, -1, parts).max(2)).all()
    assert stays(np.ones((1, 4)), 0.5).tolist() == [[True, True, False, False]]  # equal: the first
    said = refused(lambda: stays(scores, None, (2, 5)))
    assert said == "a mask of 2:5 needs rows of a multiple of 5, got 12"


@BOTH
def test_wanda_of_equal_norms_is_magnitude(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, bits = saved(odd(config), tmp_path / "m"), {}
    for name in ("wanda", "magnitude"):
        prune(path, ROWS, tmp_path / name, sparsity=0.5, method=name, backend="base")
        bits[name] = gpt2c.from_pretrained(tmp_path / name).flat_parameters.copy()
    assert not np.array_equal(bits["wanda"], bits["magnitude"])

    def even(*arguments: Any) -> Any:
        seen = observe(*arguments)
        return seen._replace(norms={name: 0 * norm + 2 for name, norm in seen.norms.items()})

    monkeypatch.setitem(prune.__globals__, "observe", even)
    prune(path, ROWS, tmp_path / "even", sparsity=0.5, method="wanda", backend="base")
    assert np.array_equal(
        gpt2c.from_pretrained(tmp_path / "even").flat_parameters, bits["magnitude"]
    )


@BOTH
def test_wanda_sees_what_pruned_layers_give(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = odd(config), []

    def kept(model: Any, texts: Any) -> Any:
        calls.append([*texts])
        return observe(model, calls[-1])

    monkeypatch.setitem(prune.__globals__, "observe", kept)
    prune(saved(model, tmp_path / "m"), ROWS, tmp_path / "out", sparsity=0.5, backend="base")
    assert len(calls) == config.n_layer
    sparse = gpt2c.from_pretrained(tmp_path / "out", "base")
    name = config.stack().layers[-1].attention.qkv.weight  # no zeros of its own layer change x
    by = [observe(one, calls[-1]).norms[name] for one in (sparse, model)]
    masks = [stays(np.abs(model.parameters[name]) * norms, 0.5) for norms in by]
    assert np.array_equal(sparse.parameters[name] != 0, masks[0])
    assert not np.array_equal(*masks)


@BOTH
@pytest.mark.parametrize("given", [{"sparsity": 0.75}, {"mask_structure": "1:4"}])
def test_zeros_are_in_the_layers_alone(config: Any, given: Any, tmp_path: Path) -> None:
    model = odd(config)
    pruned = prune(saved(model, tmp_path / "m"), ROWS, tmp_path / "out", **given, backend="base")
    small = gpt2c.from_pretrained(tmp_path / "out", "base")
    for name, parameter in small.parameters.items():
        if parameter.ndim == 2 and name.startswith("h."):
            assert (parameter == 0).mean() == pytest.approx(0.75)
            assert np.array_equal(parameter[parameter != 0], model.parameters[name][parameter != 0])
        else:
            assert np.array_equal(parameter, model.parameters[name])
    assert pruned.said == ("75% of the layers' weights are 0, by wanda",)
    assert 0 < pruned.after["zeros"] < 0.75 and pruned.after["bytes"] == pruned.before["bytes"]


# ---- healing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zeros_stay_through_healing(decay: float, tmp_path: Path) -> None:
    model = odd(GPT)
    model.parameters["h.0.mlp.c_fc.bias"][...] = 0  # no pruned weights: they may move
    path = saved(model, tmp_path / "m")
    prune(path, ROWS, tmp_path / "zeros", sparsity=0.5, backend="base")
    given: dict[str, Any] = {
        "learning_rate": 0.01, "max_iters": 20, "eval_interval": 20, "batch_size": 4,
        "weight_decay": decay, "backend": "base",
    }  # fmt: skip
    first = gpt2c.from_pretrained(tmp_path / "zeros").parameters
    distill(path, ROWS, tmp_path / "kd", student=tmp_path / "zeros", keep_zeros=True, **given)
    sft(tmp_path / "zeros", ROWS, tmp_path / "sft", keep_zeros=True, eval_answers=0, **given)
    sft(tmp_path / "zeros", ROWS, tmp_path / "free", eval_answers=0, **given)
    for name in ("kd", "sft", "free"):
        healed = gpt2c.from_pretrained(tmp_path / name).parameters
        held = [
            np.array_equal(first[key] == 0, healed[key] == 0)
            for key in first
            if key.startswith("h.") and first[key].ndim == 2
        ]
        assert all(held) == (name != "free")
        assert not np.array_equal(first["h.0.attn.c_attn.weight"], healed["h.0.attn.c_attn.weight"])
        assert losses(tmp_path / name)[-1]["loss"] < losses(tmp_path / name)[0]["loss"]
        assert (healed["h.0.mlp.c_fc.bias"] != 0).mean() > 0.8  # but of neurons without outputs


def test_parts_follow_each_other(tmp_path: Path, data: Path) -> None:
    path = saved(odd(GPT), tmp_path / "m")
    pruned = prune(
        path, data, tmp_path / "out", layers=1, mlp=0.5, mask_structure="2:4", backend="base"
    )
    small = gpt2c.from_pretrained(tmp_path / "out")
    assert (small.config.n_layer, small.config.inner) == (1, 20) and len(pruned.said) == 3
    assert (small.parameters["h.0.mlp.c_fc.weight"] == 0).mean() == 0.5
    assert Tokenizer.from_pretrained(tmp_path / "out").fingerprint is not None


# ---- the command and bad input -------------------------------------------------------------------


def test_command_prints_a_table(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = saved(odd(GPT), tmp_path / "m"), tmp_path / "out"
    assert main(["prune", str(path), str(data), "--out", str(out), "--sparsity", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "before" in text and "zeros bring no speed and no smaller file" in text
    assert f"--student {out} --keep-zeros --out {out}-healed" in text
    heal = ["distill", str(path), str(data), "--student", str(out), "--keep-zeros"]
    quick = ["--max-iters", "2", "--max-length", "16", "--batch-size", "2"]
    assert main([*heal, "--out", str(tmp_path / "healed"), *quick]) == 0
    assert "val_teacher_loss" in capsys.readouterr().out
    assert main(["prune", str(path), str(data), "--out", str(out), "--layers", "2"]) == 2
    assert f"{out} is not empty: name another directory" in capsys.readouterr().err


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path, out = saved(odd(GPT), tmp_path / "m"), tmp_path / "out"
    for given, said in (
        ({}, "name what to prune: layers, mlp, sparsity or mask_structure"),
        ({"layers": 0}, "layers says how many stay, from 1 to 2 of 3, got 0"),
        ({"layers": 1.5}, "layers must be a whole number, got 1.5"),
        ({"mlp": "half"}, "mlp must be a number, got 'half'"),
        ({"mask_structure": 24}, "such as 2:4, got 24"),
        ({"layers": 3}, "layers says how many stay, from 1 to 2 of 3, got 3"),
        ({"mlp": 0.0}, "mlp must be a share above 0 and below 1, got 0.0"),
        ({"mlp": 0.001}, "mlp 0.001 of 40 inner neurons leaves 0: from 1 to 39 must stay"),
        ({"sparsity": 1.0}, "sparsity must be a share above 0 and below 1, got 1.0"),
        ({"sparsity": 0.5, "mask_structure": "2:4"}, "mask_structure is a sparsity of its own"),
        ({"mask_structure": "4:4"}, "mask_structure must be N:M with N of M weights that stay"),
        ({"mask_structure": "2-4"}, "such as 2:4, got '2-4'"),
        ({"mask_structure": "2:7"}, "a mask of 2:7 needs rows of a multiple of 7, got 24"),
        ({"sparsity": 0.5, "method": "gptq"}, "method must be wanda or magnitude, got 'gptq'"),
        ({"layers": 1, "calibration_tokens": 0}, "calibration_tokens must be at least 1, got 0"),
    ):
        assert said in refused(lambda given=given: prune(path, ROWS, out, **given))
        assert not out.exists()
    small = tmp_path / "int8"
    gpt2c.from_pretrained(path).quantize("int8").save_pretrained(small)
    Tokenizer.from_name("bytes").save_pretrained(small)
    said = refused(lambda: prune(small, ROWS, out, layers=1))
    assert "has int8 weights: prune it before it is quantized" in said
    adapted = gpt2c.from_pretrained(path)
    adapted.add_lora(r=2)
    adapted.save_pretrained(tmp_path / "adapters")
    said = refused(lambda: prune(tmp_path / "adapters", ROWS, out, layers=1))
    assert "holds adapters: make one model with gpt2c merge" in said and not out.exists()
    assert PruneSettings(mask_structure="2:4").group() == (2, 4)
    said = refused(lambda: FinetuneSettings(keep_zeros=True, lora=True))
    assert "merged adapters would fill the zeros" in said
