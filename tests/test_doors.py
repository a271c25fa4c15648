"""The public names: mypy and the program agree on the types that they return."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, assert_type, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray

import gpt2c
import gpt2c.finetune
import gpt2c.scoring
from gpt2c.finetune import given
from gpt2c.finetune.classify import WEIGHTS
from gpt2c.finetune.grpo import CHOICES
from gpt2c.finetune.preference import PAIR_LOSSES
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.generate.engine import Request
from gpt2c.generator import Continuation
from gpt2c.kernels.backend import NAMES, PRECISIONS, REQUIRES, Precision
from gpt2c.model.quantized import DTYPES, Weights
from gpt2c.model.reader import CACHES, CacheType
from gpt2c.parallel.gradients import TRANSPORTS
from gpt2c.train.optimizer import SCHEDULES

Ids = NDArray[np.int64]
Logprobs = NDArray[np.float64]
IDS, IDS_OF_LENGTHS = np.array([[65, 66]]), [[65], [66, 67]]


@pytest.fixture(scope="module")
def model() -> gpt2c.GPT2:
    config = gpt2c.GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    return gpt2c.GPT2(config, backend="numpy")


def test_types_of_generate(model: gpt2c.GPT2) -> None:
    ids = model.generate(IDS, 3)
    assert_type(ids, Ids)
    assert ids.shape == (1, 5) and ids.dtype == np.int64
    either = model.generate([[65], [66]], 3)
    assert_type(either, Ids | list[Ids])
    assert isinstance(either, np.ndarray)
    texts = model.generate(IDS_OF_LENGTHS, 3)
    assert_type(texts, Ids | list[Ids])
    assert isinstance(texts, list) and [text.dtype for text in texts] == [np.int64] * 2
    pair = model.generate(IDS, 3, logprobs=True, top_k=5)
    assert_type(pair, tuple[Ids, Logprobs])
    assert pair[0].shape == (1, 5) and pair[1].shape == (1, 3) and pair[1].dtype == np.float64
    assert_type(model.generate(IDS_OF_LENGTHS, logprobs=True), tuple[Ids | list[Ids], Logprobs])


def test_types_of_stream(model: gpt2c.GPT2) -> None:
    steps = model.stream(IDS_OF_LENGTHS, 3)
    assert_type(steps, Iterator[Ids])
    assert next(steps).shape == (2,)
    pairs = model.stream(IDS, 3, logprobs=True)
    assert_type(pairs, Iterator[tuple[Ids, Logprobs]])
    ids, logprobs = next(pairs)
    assert ids.dtype == np.int64 and logprobs.dtype == np.float64


def test_types_of_the_engine(model: gpt2c.GPT2) -> None:
    with gpt2c.Engine(model) as engine:
        request = engine.submit([65], 3)
        assert_type(request, Request[int])
        tokens = request.result(60)
        assert_type(tokens, Ids)
        assert tokens.dtype == np.int64
        for token in request:
            assert_type(token, int)
        likely = engine.submit([65], 3, logprobs=True)
        result = likely.result(60)
        assert_type(result, tuple[Ids, Logprobs])
        assert result[1].dtype == np.float64
        for new, logprob in likely:
            assert_type(new, int)
            assert_type(logprob, float)


def test_types_of_the_generator(model: gpt2c.GPT2) -> None:
    generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
    assert_type(generator.generate("a", max_new_tokens=1), Continuation)
    assert_type(generator.generate(["a"], max_new_tokens=1), list[Continuation])
    assert_type(generator.stream("a", max_new_tokens=1), Iterator[str])
    assert_type(next(generator.tokens("a", max_new_tokens=1)).probability, float)


def test_text_says_why_it_ended(model: gpt2c.GPT2) -> None:
    generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
    whole = generator.generate("a", max_new_tokens=4, seed=1)
    assert whole.ended == "length" and type(str(whole)) is str
    (stopped,) = generator.generate(["a"], max_new_tokens=4, seed=1, stop=whole[:1])
    assert stopped == "" and stopped.ended == "stop"
    for twin in (copy.deepcopy(stopped), pickle.loads(pickle.dumps(stopped))):
        assert twin == stopped and twin.ended == "stop"
    second = int(model.generate([[97]], 2, seed=1)[0][2])
    assert generator.generate("a", max_new_tokens=4, seed=1, eos_token_id=second).ended == "end"


# The doors of texts, and the settings that each lacks.
TEXTS: list[tuple[Callable[..., Any], set[str]]] = [
    (gpt2c.GenerationConfig, set()),
    (gpt2c.GPT2.generate, set()),
    (gpt2c.GPT2.stream, set()),
    (gpt2c.Engine.submit, {"num_return_sequences", "cache"}),
    (gpt2c.Generator.generate, {"logprobs"}),
    (gpt2c.Generator.stream, {"logprobs", "num_return_sequences"}),
    (gpt2c.Generator.tokens, {"logprobs", "num_return_sequences"}),
    (gpt2c.Chat, {"logprobs", "num_return_sequences", "on_full"}),
]
OTHER = {"Chat": {"max_new_tokens": 256}}  # defaults


@pytest.mark.parametrize(("door", "lacks"), TEXTS)
def test_signature_shows_every_setting(door: Callable[..., Any], lacks: set[str]) -> None:
    """With its default; of eos_token_id and cache those of the generator are not known there."""
    shown = inspect.signature(door).parameters
    fields = {one.name: one.default for one in dataclasses.fields(gpt2c.GenerationConfig)}
    of_generator = set()
    if door.__module__ in ("gpt2c.generator", "gpt2c.chat"):
        of_generator = {"eos_token_id", "cache"}
    assert fields.keys() - shown.keys() == lacks
    for name in fields.keys() - lacks - of_generator:
        wanted = OTHER.get(door.__name__, {}).get(name, fields[name])
        assert shown[name].default == wanted and shown[name].annotation not in ("Any", Any), name


@pytest.mark.parametrize("door", [door for door, _ in TEXTS[1:-1]])
def test_every_setting_has_a_line(door: Callable[..., Any]) -> None:
    entries = re.findall(r"^(\w[\w, ]*) : ", inspect.getdoc(door) or "", re.M)
    told = {name for entry in entries for name in entry.split(", ")}
    assert inspect.signature(door).parameters.keys() - told == {"self"}


def test_unknown_and_mistyped_settings_are_refused(model: gpt2c.GPT2) -> None:
    """By mypy, too, which reports an ignored error that is none."""
    generator = gpt2c.Generator(model, gpt2c.Tokenizer.from_name("bytes"))
    with pytest.raises(TypeError, match="did you mean temperature"):
        model.generate(IDS, temperatur=1)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="top_k"):
        model.stream(IDS, top_k="two")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="did you mean top_p"):
        generator.stream("a", topp=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean seed"):
        gpt2c.GenerationConfig(seeds=1)  # type: ignore[call-arg]


METHODS: dict[str, tuple[type[FinetuneSettings], type[Any]]] = {
    "sft": (gpt2c.finetune.SFTSettings, given.SFTGiven),
    "distill": (gpt2c.finetune.DistillSettings, given.DistillGiven),
    "classify": (gpt2c.finetune.ClassifySettings, given.ClassifyGiven),
    "reward": (gpt2c.finetune.RewardSettings, given.RewardGiven),
    "dpo": (gpt2c.finetune.DPOSettings, given.DPOGiven),
    "grpo": (gpt2c.finetune.GRPOSettings, given.GRPOGiven),
}


@pytest.mark.parametrize("verb", METHODS)
def test_types_of_given_settings_are_those_of_the_settings(verb: str) -> None:
    kind, names = METHODS[verb]
    door = getattr(gpt2c.finetune, verb)
    assert door.__annotations__["settings"] == f"Unpack[{names.__name__}]"
    types, wanted = get_type_hints(names), get_type_hints(kind)
    assert types.keys() == kind.fields().keys()
    known: dict[str, Iterable[object]] = {
        "schedule": SCHEDULES,
        "backend": ("auto", *REQUIRES),
        "recompute": ("none", "light", "full"),
        "precision": (*PRECISIONS, "auto"),
        "zero": (0, 1),
        "transport": TRANSPORTS,
        "quantize": ("none", *DTYPES),
        "class_weights": WEIGHTS,
        **(CHOICES if verb == "grpo" else {"loss_type": (*PAIR_LOSSES, "kto")}),
    }
    for name, own in types.items():
        if get_origin(own) is Literal:
            assert {*get_args(own)} == {*known[name]}, name
            own = type(get_args(own)[0])
        assert own is wanted[name], name


def test_prune_takes_the_fields_of_its_settings() -> None:
    shown = inspect.signature(gpt2c.finetune.prune).parameters
    for field in dataclasses.fields(gpt2c.finetune.PruneSettings):
        assert shown[field.name].default == field.default


def test_mypy_refuses_wrong_settings_of_fine_tuning(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    with pytest.raises(ValueError, match="did you mean learning_rate"):
        gpt2c.finetune.sft(base, [], out, learning_rat=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="precision must be fp32, bf16, fp16 or auto"):
        gpt2c.finetune.dpo(base, [], out, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_epochs must be float, got str"):
        gpt2c.finetune.grpo(base, [], out, max_epochs="3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer"):
        gpt2c.finetune.prune(base, [], out, layer=3)  # type: ignore[call-arg]


def test_types_of_the_models(model: gpt2c.GPT2, tmp_path: Path) -> None:
    small = model.quantize("int8")
    assert_type(small, gpt2c.GPT2)
    assert type(small) is gpt2c.GPT2
    model.save_pretrained(tmp_path)
    assert_type(gpt2c.GPT2.from_pretrained(tmp_path, quantize="fp16"), gpt2c.GPT2)
    either = gpt2c.from_pretrained(tmp_path, "numpy")
    assert_type(either, gpt2c.GPT2 | gpt2c.Llama)
    assert type(either) is gpt2c.GPT2
    assert_type(either.config.vocab_size, int)


def test_types_of_names_are_those_that_the_program_knows(model: gpt2c.GPT2) -> None:
    assert NAMES == (*REQUIRES,) and get_args(Precision) == (*PRECISIONS, "auto")
    assert get_args(CacheType) == (*CACHES,) and get_args(Weights) == ("fp32", *DTYPES)
    for name in gpt2c.backends():
        gpt2c.GPT2(model.config, backend=name)
    with pytest.raises(ValueError, match="backend 'cuda': unknown name"):
        gpt2c.GPT2(model.config, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision must be"):
        gpt2c.GPT2(model.config, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config must be a LlamaConfig"):
        gpt2c.Llama(model.config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache must be one of"):
        gpt2c.Engine(model, cache="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule must be one of"):
        gpt2c.Schedule("cos", 1.0, 10)  # type: ignore[arg-type]


def test_types_of_the_ops() -> None:
    x = np.ones((2, 3), np.float32)
    assert_type(gpt2c.ops.gelu_forward(x, backend="numpy"), NDArray[Any])
    assert_type(gpt2c.ops.global_norm(x, backend="numpy"), float)
    with pytest.raises(TypeError):
        gpt2c.ops.gelu_forward(y=x)  # type: ignore[call-arg]


DOORS = [
    (module, name)
    for module in (gpt2c, gpt2c.finetune, gpt2c.scoring, gpt2c.ops)
    for name in module.__all__
    if callable(getattr(module, name))
]


@pytest.mark.parametrize(("module", "name"), DOORS)
def test_no_door_takes_or_returns_any(module: ModuleType, name: str) -> None:
    """Except arrays of any type of numbers."""
    door: Any = getattr(module, name)
    called = [inspect.unwrap(door)]
    if inspect.isclass(door):
        members = [
            inspect.getattr_static(door, key)
            for key in dir(door)
            if key in ("__call__", "__init__") or key[0] != "_"
        ]
        called = [getattr(m, "fget", None) or getattr(m, "__func__", m) for m in members]
    called = [function for function in called if inspect.isfunction(function)]
    assert called
    for function in called:
        signature = inspect.signature(function)
        told = {key: value.annotation for key, value in signature.parameters.items()}
        told |= {"->": signature.return_annotation}
        for key, annotation in told.items():
            text = str(annotation).replace("NDArray[Any]", "")
            assert not re.search(r"\bAny\b", text), f"{function.__qualname__}: {key}: {annotation}"
            assert key in ("self", "cls") or annotation is not inspect.Parameter.empty, key
