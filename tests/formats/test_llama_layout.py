"""Files of Llamas: names, joined matrices, heads, shards, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from safetensors.numpy import load_file, save_file

import gpt2c
from gpt2c import Llama
from gpt2c.files.tensors import JoinedTensor
from gpt2c.formats.huggingface import save_weights
from gpt2c.formats.load import find_model
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.parameters import check_shapes
from gpt2c.model.rope_scaling import RopeScaling

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=16,
    rope_scaling=RopeScaling("linear", 2.0),
    eos_token_id=2,
    bos_token_id=1,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True, head_dim=10)
WEIGHTS = "model.safetensors"
Q, K, V, OUT = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo")
UP = "model.layers.0.mlp.up_proj.weight"

Tensors = dict[str, np.ndarray]


def save(directory: Path, config: LlamaConfig = CONFIG) -> Tensors:
    """Save a model and return its parameters."""
    parameters = dict(Model(config, seed=1, backend="numpy").parameters)
    save_weights(directory, config.to_dict(), parameters)
    return parameters


def change(directory: Path, how: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(directory / WEIGHTS)
    how(tensors)
    whole = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    save_file(whole, directory / WEIGHTS, metadata={"format": "pt"})


def assert_found(directory: Path, expected: Tensors) -> None:
    found = find_model(directory)
    check_shapes(found.config.parameter_shapes(), found.tensors, found.source)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in found.tensors.items():
        array = np.asarray(tensor)
        assert array.dtype == np.float32 and array.shape == tensor.shape
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_a_saved_llama_is_found(config: LlamaConfig, tmp_path: Path) -> None:
    expected = save(tmp_path, config)
    found = find_model(tmp_path)
    assert (found.config, found.weights, found.ends) == (config, "fp32", [2])
    assert_found(tmp_path, expected)
    model = gpt2c.from_pretrained(tmp_path, backend="numpy")
    assert type(model) is Llama and model.config == config
    assert np.array_equal(model.flat_parameters, Model(config, 1, "numpy").flat_parameters)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_file_has_the_names_of_transformers(tmp_path: Path) -> None:
    own, stored = save(tmp_path), load_file(tmp_path / WEIGHTS)
    assert len(stored) == 3 + 2 * 9
    assert stored["lm_head.weight"].shape == stored["model.embed_tokens.weight"].shape == (61, 24)
    assert stored[Q].shape == (24, 24) and stored[K].shape == stored[V].shape == (8, 24)
    joined = np.concatenate([stored[Q], stored[K], stored[V]])
    np.testing.assert_array_equal(joined, own["h.1.attn.c_attn.weight"])
    gate, up = (stored[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    np.testing.assert_array_equal(np.concatenate([gate, up]), own["h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_joined_as_float32(dtype: type, tmp_path: Path) -> None:
    expected = save(tmp_path)
    change(
        tmp_path, lambda tensors: tensors.update({n: t.astype(dtype) for n, t in tensors.items()})
    )
    assert_found(tmp_path, {n: t.astype(dtype).astype(np.float32) for n, t in expected.items()})


def test_names_may_lack_the_prefix_and_buffers_are_ignored(tmp_path: Path) -> None:
    expected = save(tmp_path)
    change(
        tmp_path,
        lambda tensors: (
            [
                tensors.update({name.removeprefix("model."): tensors.pop(name)})
                for name in list(tensors)
            ]
            + [tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2)})]
        ),
    )
    assert_found(tmp_path, expected)


@pytest.mark.parametrize("only", [True, False])
def test_tied_head_may_be_stored(only: bool, tmp_path: Path) -> None:
    expected = save(tmp_path, TIED)

    def store(tensors: Tensors) -> None:
        table = tensors.pop("model.embed_tokens.weight")
        tensors["lm_head.weight"] = table
        if not only:
            tensors["model.embed_tokens.weight"] = table.copy()

    change(tmp_path, store)
    assert_found(tmp_path, expected)


def test_shards_are_joined(tmp_path: Path) -> None:
    """The parts of a matrix may lie in two files."""
    expected = save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    files = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        names = sorted(tensors)[number - 1 :: 2]
        save_file({name: tensors[name] for name in names}, tmp_path / file)
        files |= dict.fromkeys(names, file)
    assert len({files[Q], files[K], files[V]}) == 2
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_found(tmp_path, expected)


def test_matrices_are_joined_when_they_are_read(tmp_path: Path) -> None:
    """The memory is that of one matrix, not that of the model."""
    config = dataclasses.replace(CONFIG, hidden_size=240, num_hidden_layers=16)
    expected = save(tmp_path, config)
    largest = max(tensor.nbytes for tensor in expected.values())
    tracemalloc.start()
    try:
        found = find_model(tmp_path)
        assert isinstance(found.tensors["h.0.attn.c_attn.weight"], JoinedTensor)
        opened = tracemalloc.get_traced_memory()[1]
        for tensor in found.tensors.values():
            np.asarray(tensor)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    total = sum(tensor.nbytes for tensor in expected.values())
    assert peak - opened <= 2 * largest < total / 8


@pytest.mark.parametrize("method", ["fp16", "int8"])
def test_quantized_llama_is_stored(method: str, tmp_path: Path) -> None:
    quantized = Llama(TIED, seed=1, backend="numpy").quantize(method)
    quantized.save_pretrained(tmp_path)
    found = find_model(tmp_path)
    assert (found.config, found.weights) == (TIED, method)
    again = gpt2c.from_pretrained(tmp_path, backend="numpy")
    assert (type(again), again.weights) == (Llama, method)
    for name, parameter in again.parameters.items():
        np.testing.assert_array_equal(parameter, quantized.parameters[name])


def cut(name: str, rows: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[name][:rows]})


def swapped(tensors: Tensors) -> None:
    """Let q and both others have each other's rows, so that the sum is nearly right."""
    tensors[Q], tensors[K], tensors[V] = (np.zeros((rows, 24), np.float32) for rows in (8, 16, 16))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: t.pop(V), "tensor layers.1.self_attn.v_proj.weight is missing"),
        (lambda t: t.pop(Q), "tensor layers.1.self_attn.q_proj.weight is missing"),
        (lambda t: t.pop(UP), "tensor layers.0.mlp.up_proj.weight is missing"),
        (lambda t: [t.pop(name) for name in (Q, K, V)], "tensor h.1.attn.c_attn.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda t: t.pop("model.norm.weight"), "tensor ln_f.weight is missing"),
        (lambda t: t.update({"h.0.ln_1.weight": t[Q]}), "a Llama has no tensor 'h.0.ln_1.weight'"),
        (
            lambda t: t.update({"model.layers.00.mlp.up_proj.weight": t[UP]}),
            "no tensor 'layers.00",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[Q]}),
            "a Llama has no tensor 'layers.0.self_attn.q_proj.bias'",
        ),
        (
            lambda t: t.update({f"model.layers.2.{Q.split('.', 3)[3]}": t[Q]}),
            "tensor layers.2.self_attn.k_proj.weight is missing",
        ),
        (
            lambda t: t.update({name.replace(".1.", ".2."): t[name] for name in (Q, K, V)}),
            "this model has no tensor h.2.attn.c_attn.weight",
        ),
        (lambda t: t.update({"norm.weight": t["model.norm.weight"]}), "holds norm.weight twice"),
        (swapped, "must fit each other, got (8, 24), (16, 24), (16, 24)"),
        (cut(V, 4), "must fit each other, got (24, 24), (8, 24), (4, 24)"),
        (cut(UP, 39), "must fit each other, got (40, 24), (39, 24)"),
        (cut(OUT, 23), "h.1.attn.c_proj.weight must be (24, 24) for its config, got (23, 24)"),
        (lambda t: t.update({K: t[K][:, :23], V: t[V][:, :23]}), "(8, 23), (8, 23)"),
        (lambda t: t.update({Q: t[Q].reshape(-1)}), "must fit each other, got (576,)"),
        (lambda t: t.update({K: np.ones(()), V: np.ones(())}), "got (24, 24), (), ()"),
        (lambda t: t.update({K: t[K][:7], V: t[V][:7]}), "c_attn.weight must be (40, 24)"),
        (lambda t: t.update({Q: t[Q].astype(np.int32)}), "has dtype I32"),
    ],
)
def test_damaged_llamas_are_refused(
    how: Callable[[Tensors], Any], said: str, tmp_path: Path
) -> None:
    save(tmp_path)
    change(tmp_path, how)

    def load() -> None:
        found = find_model(tmp_path)
        check_shapes(found.config.parameter_shapes(), found.tensors, found.source)

    message = refused(load)
    assert said in message and message.startswith(str(tmp_path)) and len(message) < 400


def test_a_model_that_was_saved_without_its_head_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    change(tmp_path, lambda t: t.pop("lm_head.weight"))
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text()) | {"architectures": ["LlamaModel"]}
    path.write_text(json.dumps(entries))
    assert refused(find_model, tmp_path) == (
        f"{tmp_path / 'model.safetensors'} has no lm_head.weight, as it was saved from a"
        " LlamaModel, which has no head: save it from transformers' AutoModelForCausalLM"
    )
    path.write_text(json.dumps(entries | {"tie_word_embeddings": True}))
    assert find_model(tmp_path).config.vocab_size == 61


def test_head_that_is_tied_and_differs_is_refused(tmp_path: Path) -> None:
    save(tmp_path, TIED)
    change(tmp_path, lambda t: t.update({"lm_head.weight": 1 + t["model.embed_tokens.weight"]}))
    assert "lm_head.weight differs from embed_tokens.weight" in refused(find_model, tmp_path)


@pytest.mark.parametrize("kind", ["mistral", ["llama"], None])
def test_other_kinds_are_refused_by_name(kind: Any, tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind}))
    assert f"model_type must be gpt2 or llama, got {kind!r}" in refused(find_model, tmp_path)


def test_errors_name_the_field_of_a_llama_and_the_file(tmp_path: Path) -> None:
    save(tmp_path)
    model = gpt2c.from_pretrained(tmp_path)
    length = model.config.max_position_embeddings  # type: ignore[union-attr]
    for call in (
        lambda: model(np.zeros((1, length + 1), int)),
        lambda: model.logprobs(np.zeros((1, length + 2), int)),
        lambda: model.generate([[1] * (length + 1)], 1),
        lambda: model.decoder(1, length + 1),
    ):
        said = refused(call)
        assert "max_position_embeddings" in said and "n_positions" not in said
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    for wrong in ({"model_type": "mamba"}, {"hidden_size": "wide"}, {"quantization_config": 3}):
        path.write_text(json.dumps(entries | wrong))
        assert refused(find_model, tmp_path).startswith(f"{path}: {next(iter(wrong))} must be")
