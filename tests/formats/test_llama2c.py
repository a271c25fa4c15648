"""llama2.c's file: it is as export.py writes and run.c reads it; others are refused."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS

from gpt2c.formats.llama2c import is_llama2c, read_model, write_model
from gpt2c.formats.llmc import write_model as write_llmc
from gpt2c.formats.load import find_model
from gpt2c.formats.rotary import FromAdjacent, to_adjacent
from gpt2c.gpt2 import GPT2
from gpt2c.kernels.cases import normalised_error
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.rope_scaling import RopeScaling

FIELDS = "dim hidden_dim n_layers n_heads n_kv_heads vocab_size max_seq_len"
GROUPED = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=19,
    rms_norm_eps=1e-5,
)
TIED = dataclasses.replace(
    GROUPED, num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True
)
CONFIGS = pytest.mark.parametrize("config", [GROUPED, TIED], ids=["grouped", "tied"])


def theirs(config: LlamaConfig) -> dict[str, Any]:
    """Return random tensors of llama2.c's Transformer, a list for what each layer has."""
    rng = np.random.default_rng(1)
    C, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    W = C // config.num_attention_heads * (config.num_key_value_heads or 0)

    def some(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    def norm(layer: int = 0) -> Any:
        return 1 + some(C)

    layers = range(config.num_hidden_layers)
    tensors: dict[str, Any] = {
        "tok_embeddings": some(V, C),
        "attention_norm": [norm(layer) for layer in layers],
        "wq": [some(C, C) for _ in layers],
        "wk": [some(W, C) for _ in layers],
        "wv": [some(W, C) for _ in layers],
        "wo": [some(C, C) for _ in layers],
        "ffn_norm": [norm(layer) for layer in layers],
        "w1": [some(F, C) for _ in layers],
        "w2": [some(C, F) for _ in layers],
        "w3": [some(F, C) for _ in layers],
        "norm": norm(),
    }
    angles = angles_of(config)
    tensors |= {"freqs_cos": np.cos(angles), "freqs_sin": np.sin(angles)}
    return tensors | ({} if config.tie_word_embeddings else {"output": some(V, C)})


def angles_of(config: LlamaConfig) -> Any:
    HS = config.hidden_size // config.num_attention_heads
    frequencies = 10000.0 ** -(np.arange(0, HS, 2) / HS)
    return np.arange(config.max_position_embeddings)[:, None] * frequencies


def run_c(config: LlamaConfig, p: dict[str, Any], idx: list[int]) -> Any:
    """Return logits (T, V) in float64 as run.c's forward computes them, one position at a time."""
    C, NH = config.hidden_size, config.num_attention_heads
    KV, HS = config.num_key_value_heads or NH, C // NH
    angles, rows = angles_of(config), []
    keys: list[list[Any]] = [[] for _ in range(config.num_hidden_layers)]
    values: list[list[Any]] = [[] for _ in range(config.num_hidden_layers)]

    def norm(x: Any, weight: Any) -> Any:
        return weight * (x / np.sqrt((x * x).mean() + 1e-5))

    def turn(vector: Any, position: int) -> Any:
        """Multiply the complex numbers of adjacent channels by e^(i angle)."""
        pairs = vector.reshape(-1, HS // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles[position])
        return np.stack([turned.real, turned.imag], -1).reshape(-1, HS)

    for position, token in enumerate(idx):
        x = p["tok_embeddings"][token].astype(np.float64)
        for layer in range(config.num_hidden_layers):
            own = {
                name: array[layer].astype(np.float64)
                for name, array in p.items()
                if isinstance(array, list)
            }
            xb = norm(x, own["attention_norm"])
            q, k = turn(own["wq"] @ xb, position), turn(own["wk"] @ xb, position)
            keys[layer].append(k)
            values[layer].append((own["wv"] @ xb).reshape(KV, HS))
            heads = []
            for head in range(NH):
                shared = head // (NH // KV)
                scores = np.array([q[head] @ key[shared] for key in keys[layer]]) / np.sqrt(HS)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads.append(weights @ np.array([value[shared] for value in values[layer]]))
            x = x + own["wo"] @ np.concatenate(heads)
            xb = norm(x, own["ffn_norm"])
            gate = own["w1"] @ xb
            x = x + own["w2"] @ (gate / (1 + np.exp(-gate)) * (own["w3"] @ xb))
        rows.append(p.get("output", p["tok_embeddings"]).astype(np.float64) @ norm(x, p["norm"]))
    return np.array(rows)


def by_hand(config: LlamaConfig, p: dict[str, Any], version: int = 0) -> bytes:
    """Return a file as export.py's legacy_export and version1_export write it."""
    tied = config.tie_word_embeddings
    V = config.vocab_size if tied or version else -config.vocab_size
    numbers = (
        *(config.hidden_size, config.intermediate_size, config.num_hidden_layers),
        *(config.num_attention_heads, config.num_key_value_heads, V),
        config.max_position_embeddings,
    )
    out = struct.pack("<7i", *numbers)
    order = "tok_embeddings attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm freqs_cos freqs_sin"
    if version:
        out = struct.pack("<Ii", 0x616B3432, version) + out + struct.pack("<B", tied)
        out = out.ljust(256, b"\0")
        order = "attention_norm ffn_norm norm tok_embeddings wq wk wv wo w1 w2 w3"
    for name in [*order.split(), *([] if tied else ["output"])]:
        for array in p[name] if isinstance(p[name], list) else [p[name]]:
            flat = np.asarray(array, np.float32).ravel().tolist()
            out += struct.pack(f"<{len(flat)}f", *flat)
    return out


def loaded(path: Path, backend: Any = "auto") -> Model:
    found = find_model(path)
    model = Model(found.config, None, backend)
    model.load_parameters(found.tensors, found.source)
    return model


@TWO_BACKENDS
@CONFIGS
@pytest.mark.parametrize("version", [0, 1])
def test_file_of_export_py_has_the_logits_of_run_c(
    config: LlamaConfig, version: int, tmp_path: Path, backend: Any, rng: np.random.Generator
) -> None:
    p, path = theirs(config), tmp_path / "model.bin"
    path.write_bytes(by_hand(config, p, version))
    model = loaded(path, backend)
    assert model.config == config
    idx = rng.integers(0, 61, 19).tolist()
    assert normalised_error(model([idx])[0], run_c(config, p, idx)) <= 1e-5


@CONFIGS
def test_file_is_written_as_export_py_writes_it(config: LlamaConfig, tmp_path: Path) -> None:
    content = by_hand(config, theirs(config))
    (tmp_path / "model.bin").write_bytes(content)
    found = find_model(tmp_path / "model.bin")
    model = loaded(tmp_path / "model.bin")
    assert found.config == model.config == config
    write_model(tmp_path / "again.bin", model.config, model.parameters)
    assert (tmp_path / "again.bin").read_bytes() == content


@CONFIGS
@pytest.mark.parametrize("version", [0, 1])
def test_tensors_round_trip_bit_for_bit_and_stay_in_the_file(
    config: LlamaConfig, version: int, tmp_path: Path
) -> None:
    path, p = tmp_path / "model.bin", theirs(config)
    p["w1"][0][0, :4] = np.nan, -np.inf, -0.0, 1e-45
    path.write_bytes(by_hand(config, p, version))
    tensors = read_model(path)[1]
    model = loaded(path)
    assert tensors.keys() == model.parameters.keys()
    for name, parameter in model.parameters.items():
        assert tensors[name].shape == parameter.shape
        assert np.asarray(tensors[name]).tobytes() == parameter.tobytes(), name
    write_model(tmp_path / "again.bin", config, model.parameters)
    assert (tmp_path / "again.bin").read_bytes() == by_hand(config, p)
    for name in ("wte.weight", "h.1.mlp.c_proj.weight", "ln_f.weight"):
        tensor = tensors[name]
        assert isinstance(tensor, np.ndarray) and not tensor.flags.writeable
    assert not isinstance(tensors["h.1.attn.c_attn.weight"], np.ndarray), "joined when it is read"


def test_orders_of_pairs_are_inverse() -> None:
    weight = np.arange(2 * 6 * 3).reshape(12, 3)
    ours = np.asarray(FromAdjacent(weight, 6))
    assert ours[:, 0].tolist() == [0, 6, 12, 3, 9, 15, 18, 24, 30, 21, 27, 33]
    assert np.array_equal(to_adjacent(ours, 6), weight)


def test_token_1_ends_a_text_of_llama_2s_vocabulary(tmp_path: Path) -> None:
    config = LlamaConfig(32000, 2, 1, 1, 1, max_position_embeddings=1, rms_norm_eps=1e-5)
    write_model(tmp_path / "model.bin", config, Model(config, seed=1).parameters)
    assert read_model(tmp_path / "model.bin")[0].eos_token_id == 1
    assert read_model_of(GROUPED, tmp_path)[0].eos_token_id is None


def read_model_of(config: LlamaConfig, directory: Path) -> Any:
    write_model(directory / "some.bin", config, Model(config, seed=1).parameters)
    return read_model(directory / "some.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-6}, "have rms_norm_eps 1e-05, this one has 1e-06"),
        ({"rope_theta": 5e5}, "have rope_theta 10000, this one has 500000.0"),
        ({"head_dim": 8}, "have head_dim 6, this one has 8"),
        (
            {"rope_scaling": RopeScaling("linear", 2.0)},
            "no rope_scaling, this one has RopeScaling(",
        ),
        ({"num_attention_heads": 10, "head_dim": 2}, "have head_dim 2.4, this one has 2"),
    ],
)
def test_models_outside_run_c_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    config, path = dataclasses.replace(GROUPED, **changes), tmp_path / "model.bin"
    said = refused(write_model, path, config, Model(config, seed=1).parameters)
    assert message in said and str(path) in said and not path.exists()


def test_fields_that_the_file_does_not_hold_may_differ(tmp_path: Path) -> None:
    config = dataclasses.replace(GROUPED, head_dim=6, initializer_range=0.5, eos_token_id=3)
    config = dataclasses.replace(config, bos_token_id=2)
    assert read_model_of(config, tmp_path)[0] == GROUPED
    all_heads = dataclasses.replace(GROUPED, num_key_value_heads=None)
    assert read_model_of(all_heads, tmp_path)[0].num_key_value_heads == 4


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "hidden_size must be a whole number from 1 to 2147483647, got 0"),
        ({"dim": 23}, "hidden_size must be divisible by num_attention_heads, got 23 and 4"),
        ({"dim": 20}, "an even number of channels, got 5"),
        ({"dim": 48}, "needs"),
        ({"hidden_dim": -1}, "intermediate_size must be a whole number from 1"),
        ({"n_layers": 10_001}, "num_hidden_layers must be a whole number from 1 to 10000"),
        ({"n_layers": 10_000}, "needs"),
        ({"n_layers": 1}, "needs"),
        ({"n_heads": 0}, "num_attention_heads must be a whole number from 1"),
        ({"n_kv_heads": 3}, "divisible by num_key_value_heads, got 4 and 3"),
        ({"n_kv_heads": 0}, "num_key_value_heads must be a whole number from 1"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1"),
        ({"vocab_size": -(2**31)}, "vocab_size must be a whole number from 1"),
        ({"vocab_size": 62}, "needs"),
        ({"max_seq_len": 0}, "max_position_embeddings must be a whole number from 1"),
        ({"hidden_dim": 2**31 - 1, "n_layers": 10_000}, "needs"),  # beyond 64 bits
    ],
)
def test_lying_headers_are_refused(
    version: int, changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    path, content = tmp_path / "model.bin", bytearray(by_hand(GROUPED, theirs(GROUPED), version))
    for field, value in changes.items():
        place = FIELDS.split().index(field) + 2 * version
        struct.pack_into("<i", content, 4 * place, value)
    path.write_bytes(content)
    said = refused(read_model, path)
    assert message in said and str(path) in said


@pytest.mark.parametrize(
    ("version", "damage", "message"),
    [
        (0, lambda content: content[:27], "truncated: it has 27 bytes, its header needs 28"),
        (0, lambda content: content[:28], "has 28 bytes; the llama2.c model of its header needs"),
        (0, lambda content: content[:-1], "needs"),
        (0, lambda content: content + b"\0", "needs"),
        (0, lambda content: content * 2, "needs"),
        (1, lambda content: content[:8], "truncated: it has 8 bytes, its header needs 256"),
        (1, lambda content: content[:-4], "needs"),
        (1, lambda content: content[:4] + b"\2" + content[5:], "version 2, whose weights have 8"),
        (1, lambda content: content[:4] + b"\0" + content[5:], "version 0, which is unknown"),
        (1, lambda content: content[:7] + b"\x80" + content[8:], "version 2147483649, which is un"),
        (1, lambda content: content[:36] + b"\2" + content[37:], "output is the embedding's table"),
        (1, lambda content: content[:36] + b"\1" + content[37:], "needs"),
    ],
)
def test_damaged_files_are_refused(
    version: int, damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(damage(by_hand(GROUPED, theirs(GROUPED), version)))
    said = refused(read_model, path)
    assert message in said and str(path) in said
    if len(path.read_bytes()) >= 28:
        assert is_llama2c(path) and refused(find_model, path) == said


def test_other_files_are_not_llama2_cs(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for content in (b"", b"\0" * 2000, b"PK\3\4" + b"\0" * 2000, b"24k", b"GGUF\3" + b"\0" * 99):
        path.write_bytes(content)
        assert not is_llama2c(path)
    for V, C in ((1, 2), (2, 2)):  # llm.c's magic number is even, a likely dim
        config = GPT2Config(vocab_size=V, n_positions=2, n_embd=C, n_layer=1, n_head=1)
        write_llmc(path, config, GPT2(config, seed=1).parameters)
        assert not is_llama2c(path)
    np.arange(5000, dtype="<u2").tofile(path)  # nanoGPT's tokens, without a header
    assert not is_llama2c(path)
    path.with_suffix(".txt").write_bytes(by_hand(GROUPED, theirs(GROUPED)))
    assert not is_llama2c(path.with_suffix(".txt"))
    assert not is_llama2c(tmp_path) and not is_llama2c(tmp_path / "none.bin")
    os.mkfifo(tmp_path / "pipe.bin")  # if opened, it would wait for a writer
    assert not is_llama2c(tmp_path / "pipe.bin")


def test_gpt2_of_a_llama_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(by_hand(GROUPED, theirs(GROUPED)))
    assert str(path) in refused(GPT2.from_pretrained, path)
