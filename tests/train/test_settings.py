"""Settings and recipes: their ranges, their tables, and those that a resumed run keeps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from helpers.runs import FIRST, FIRST_OWN, FIRST_TUNED

from gpt2c import finetune
from gpt2c.cli.finetune import METHODS
from gpt2c.finetune.classify import ClassifySettings
from gpt2c.finetune.distill import DistillSettings
from gpt2c.train.settings import (
    Settings,
    TrainSettings,
    find_recipe,
    read_recipe,
    recipe_settings,
    resumed,
)

SETTINGS: dict[str, type[Settings]] = {name: kind for name, (_, kind, _) in METHODS.items()}
SETTINGS |= {"classify": ClassifySettings, "distill": DistillSettings}


def test_shipped_recipes_are_valid_settings() -> None:
    recipes = list((Path(__file__).resolve().parents[2] / "gpt2c" / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        kind = SETTINGS.get(path.stem.split("-")[0], TrainSettings)
        kind(**read_recipe(path, kind))
        assert find_recipe(path.stem) == path


def test_recipe_settings_stand_in_their_table_or_in_none(tmp_path: Path) -> None:
    default = dataclasses.asdict(TrainSettings())
    recipe = tmp_path / "recipe.toml"
    tables = {"model": "n_layer = 3", "data": "batch_size = 2", "optimizer": "beta1 = 0.8"}
    tables |= {
        "schedule": 'schedule = "linear"',
        "run": "tensorboard = true",
        "parallel": "zero = 0",
    }
    assert list(tables) == list(TrainSettings.tables())
    recipe.write_text("seed = 5\n" + "".join(f"[{n}]\n{line}\n" for n, line in tables.items()))
    mixed = read_recipe(recipe)
    assert mixed == {
        "seed": 5, "n_layer": 3, "batch_size": 2, "beta1": 0.8, "schedule": "linear",
        "tensorboard": True, "zero": 0,
    }  # fmt: skip
    recipe.write_text("seed = 5\n" + "\n".join(tables.values()))
    assert read_recipe(recipe) == mixed
    assert TrainSettings(**mixed) == TrainSettings(**(default | mixed))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"arch": "rnn"}, "arch must be one of gpt2, llama, got 'rnn'"),
        ({"arch": "gpt2", "n_kv_head": 2}, "n_kv_head is for arch llama, got arch gpt2"),
        ({"n_kv_head": 3}, "n_head must be divisible by n_kv_head, got 4 and 3"),
        ({"n_embd": 30}, "n_embd must be divisible by n_head, got 30 and 4"),
        ({"n_embd": 36}, "a head must have an even number of channels, got 9"),
        ({"n_head": 0}, "n_head must be a whole number from 1 to 2147483647, got 0"),
        ({"n_layer": 0}, "n_layer must be a whole number from 1 to 10000, got 0"),
    ],
)
def test_settings_refuse_a_llama_by_their_own_names(given: dict[str, Any], said: str) -> None:
    assert refused(lambda: TrainSettings(**{"arch": "llama"} | given)) == said


def test_llama_of_the_settings_has_as_many_parameters_as_a_gpt2() -> None:
    sizes = {"n_embd": 384, "n_layer": 6, "n_head": 6}
    gpt2, llama = (
        TrainSettings(arch=arch, **sizes).model_config(1000).num_parameters()
        for arch in ("gpt2", "llama")
    )
    assert llama == pytest.approx(gpt2, rel=0.02)
    fewer = TrainSettings(arch="llama", n_kv_head=1, **sizes).model_config(1000)
    assert fewer.cache_floats() == 6 * 2 * 64


def test_file_precedes_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # as of gpt2c demo --out demo
    assert find_recipe("demo").parent.name == "recipes"
    Path("demo").rmdir()
    Path("demo").write_text("n_layer = 3")
    assert read_recipe(find_recipe("demo")) == {"n_layer": 3}
    with pytest.raises(
        FileNotFoundError, match=r"other: no such recipe; .* demo, .*shakespeare-char"
    ):
        find_recipe("other")


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({}, 400),
        ({"max_iters": 300}, 30),
        ({"max_iters": 3}, 0),
        ({"max_iters": 20_000}, 2000),
        ({"max_iters": 300, "warmup_iters": 200}, 200),
        ({"warmup_iters": 200}, 200),
    ],
)
def test_warmup_keeps_its_share_of_a_recipes_steps(given: dict[str, int], warmup: int) -> None:
    settings = TrainSettings(**recipe_settings("demo", given))
    assert settings.warmup_iters == warmup
    assert settings.max_iters == given.get("max_iters", 4000)


def test_warmup_of_a_recipe_without_warmup_or_without_steps(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("n_layer = 3")
    assert recipe_settings(str(tmp_path / "a.toml"), {"max_iters": 50}) == {
        "n_layer": 3,
        "max_iters": 50,
    }
    (tmp_path / "a.toml").write_text("warmup_iters = 40")  # of 1,000
    found = recipe_settings(str(tmp_path / "a.toml"), {"max_iters": 50})
    assert found == {"warmup_iters": 2, "max_iters": 50}
    with pytest.raises(ValueError, match="max_iters must be at least 1, got 0"):
        recipe_settings("demo", {"max_iters": 0})


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"n_layer": "1"}, "n_layer must be int, got str '1'"),
        ({"n_layer": True}, "n_layer must be int, got bool True"),
        ({"n_layer": 1.0}, r"n_layer must be int, got float 1\.0"),
        ({"beta1": True}, "beta1 must be float, got bool"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0\.1"),
        ({"dropout": math.nan}, r"dropout must be finite, got nan"),
        ({"schedule": 1}, "schedule must be str, got int 1"),
        ({"schedule": "zigzag"}, "schedule must be one of"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"max_iters": -1}, "max_iters must be at least 1, got -1"),
        ({"log_interval": 0}, "log_interval must be at least 1, got 0"),
        ({"eval_interval": -1}, "eval_interval must be at least 0, got -1"),
        ({"save_interval": -1}, "save_interval must be at least 0, got -1"),
        ({"grad_clip": -0.5}, r"grad_clip must be at least 0, got -0\.5"),
        ({"grad_clip": math.nan}, "grad_clip must be at least 0, got nan"),
        ({"grad_clip": math.inf}, "grad_clip must be finite, got inf"),
        ({"gamma": math.nan}, "gamma must be finite, got nan"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"skip_nonfinite": 1}, "skip_nonfinite must be bool, got int 1"),
        (
            {"max_iters": 2**31},
            "max_iters must be a whole number from 1 to 2147483647, got 2147483648",
        ),
        ({"learning_rate": 10**400}, r"learning_rate is too large: a number of 1,329 bits"),
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
        ({"min_lr": 1.0}, "min_lr must be in"),
        ({"warmup_iters": -1}, "warmup_iters must be at least 0, got -1"),
        ({"decay_fraction": 0.0}, "decay_fraction must be in"),
        ({"gamma": 2.0}, "gamma must be in"),
        ({"step_size": 0}, "step_size must be at least 1"),
    ],
)
def test_settings_refuse_values_out_of_range(settings: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted) as error:
        TrainSettings(**settings)
    assert "\n" not in str(error.value)


def test_float_setting_takes_a_whole_number(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("learning_rate = 1\n")
    value = TrainSettings(**read_recipe(recipe)).learning_rate
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"n_layer = = 1", "recipe.toml is not TOML: "),
        (b"n_layer = 1\nn_layer = 2", "recipe.toml is not TOML: "),
        (b"n_layer = '\xe9'", "recipe.toml is not UTF-8: byte 11 is 0xe9"),
        (b"n_layers = 1", r"recipe.toml: no setting 'n_layers'; did you mean n_layer\?"),
        (b"[model]\nn-layer = 1", r"recipe.toml: no setting 'n-layer'; did you mean n_layer\?"),
        (
            b"xyz = 1",
            "recipe.toml: no setting 'xyz'; the settings are arch, backend, batch_order, ",
        ),
        (b"[model]\nn_layer = 'one'", "recipe.toml: n_layer must be int, got str 'one'"),
        (
            b"[modle]\nn_layer = 1",
            "no table 'modle'; the tables are model, data, optimizer, s",
        ),
        (b"model = 1", "recipe.toml: no setting 'model'"),
        (b"[data]\nn_layer = 1", r"recipe.toml: n_layer belongs in \[model\], not in \[data\]$"),
        (b"n_layer = 1\n[model]\nn_layer = 1", r"n_layer is there twice: in \[model\] and in no t"),
        (b"schedule = 'linear'\n[schedule]\ngamma = 0.1", "recipe.toml is not TOML: "),
        (b"[[model]]\nn_layer = 1", "recipe.toml: no setting 'model'"),
        (b"[model.n_layer]", r"recipe.toml: n_layer must be int, got dict \{\}"),
        (b"n_layer = 'one'", "recipe.toml: n_layer must be int, got str 'one'"),
        (b"n_layer = true", "recipe.toml: n_layer must be int, got bool True"),
        (b"n_layer = 1e3", r"recipe.toml: n_layer must be int, got float 1000\.0"),
        (b"n_layer = [1]", r"recipe.toml: n_layer must be int, got list \[1\]"),
        (b"n_layer = 1999-12-31", "recipe.toml: n_layer must be int, got date"),
        (b"tensorboard = 1", "recipe.toml: tensorboard must be bool, got int 1"),
        (b"beta1 = nan", "recipe.toml: beta1 must be finite, got nan"),
        (b"learning_rate = -inf", "recipe.toml: learning_rate must be finite, got -inf"),
        (b"learning_rate = 1" + b"0" * 400, "recipe.toml: learning_rate is too large"),
        (
            b"max_iters = 9223372036854775807",
            "recipe.toml: max_iters must be a whole number from 1 to 2147483647, got 92",
        ),
        (
            b"n_layer = 0x" + b"f" * 5000,
            "recipe.toml: n_layer is too large: a number of 20,000 bits",
        ),
        (b"n_layer = " + b"9" * 5000, "recipe.toml is not TOML: "),
        (b"n_layer = " + b"[" * 5000, "recipe.toml is not TOML: "),
        (b"#" * (1 << 21), "recipe.toml has 2,097,152 bytes"),
    ],
)
def test_read_recipe_refuses_a_bad_file(tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(ValueError, match=wanted) as error:
        read_recipe(tmp_path / "recipe.toml")
    assert "\n" not in str(error.value)


def test_resumed_run_keeps_its_settings() -> None:
    stored = dataclasses.asdict(TrainSettings(n_layer=2, max_iters=10, seed=3))
    settings = resumed(TrainSettings, stored, {"max_iters": 20, "n_layer": 2}, "runs/a")
    assert (settings.n_layer, settings.max_iters, settings.seed) == (2, 20, 3)
    with pytest.raises(
        ValueError, match="runs/a: the run was trained with n_layer=2, so it cannot continue"
    ):
        resumed(TrainSettings, stored, {"n_layer": 3}, "runs/a")
    older = {name: value for name, value in stored.items() if name != "batch_order"}
    assert (
        stored["batch_order"] == 2 and resumed(TrainSettings, older, {}, "runs/a").batch_order == 1
    )
    with pytest.raises(
        ValueError, match="trained with batch_order=1, so it cannot continue with 2"
    ):
        resumed(TrainSettings, older, {"batch_order": 2}, "runs/a")
    for strange, wanted in (
        ({}, "lack learning_rate: put it back, or start a new run"),
        ({**stored, "rope": 0.1}, "have 'rope', which this version of gpt2c lacks: continue"),
        ([], r"must be an object, got \[\]"),
        (None, "must be an object, got None"),
    ):
        with pytest.raises(ValueError, match=f"runs/a: its settings {wanted}"):
            resumed(TrainSettings, strange, {}, "runs/a")


def test_missing_setting_of_an_older_run_gets_the_value_of_its_time() -> None:
    then = {"batch_order": 1, "save_minutes": 0.0, "threads": 0, "dropout": 0.0}
    assert resumed(TrainSettings, FIRST, {}, "runs/a") == TrainSettings(**FIRST, **then)
    assert resumed(TrainSettings, FIRST, {"save_minutes": 5.0}, "runs/a").save_minutes == 5
    assert FIRST.keys() | TrainSettings.older().keys() == dataclasses.asdict(TrainSettings()).keys()
    for name in FIRST:
        lacking = {other: value for other, value in FIRST.items() if other != name}
        with pytest.raises(ValueError, match=f"lack {name}: put it back, or start a new run"):
            resumed(TrainSettings, lacking, {}, "runs/a")


def test_missing_setting_of_an_older_run_of_fine_tuning_gets_the_value_of_its_time() -> None:
    """A new setting needs a value for the runs that began before it, in every class of settings."""
    public = [getattr(finetune, name) for name in finetune.__all__]
    stored = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Settings)}
    assert FIRST_OWN.keys() == SETTINGS.keys() and stored == set(SETTINGS.values())
    then = {"lora": False, "freeze": "", "random_weights": False, "keep_zeros": False}
    for verb, kind in SETTINGS.items():
        names = FIRST_TUNED | set(FIRST_OWN[verb].split())
        assert names | kind.older().keys() == kind.fields().keys(), verb
        first = {name: kind.fields()[name].default for name in names} | {"seed": 3}
        settings = resumed(kind, first, {}, "runs/a")
        assert settings == kind(**then | first) and settings.seed == 3
        for name in names - kind.older().keys():
            lacking = {other: value for other, value in first.items() if other != name}
            with pytest.raises(ValueError, match=f"lack {name}: put it back"):
                resumed(kind, lacking, {}, "runs/a")
