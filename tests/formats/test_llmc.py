"""llm.c's files: they are as its own programs write and read them; truncated ones are refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA, refused
from hypothesis import given
from hypothesis import strategies as st

from gpt2c.formats import llmc
from gpt2c.formats.llmc import read_model, read_tokenizer, round_bf16, write_model, write_tokenizer
from gpt2c.gpt2 import GPT2
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.text.tokenizer import Tokenizer

CONFIG = GPT2Config(vocab_size=130, n_positions=6, n_embd=8, n_layer=2, n_head=2)
HEADER = "magic version max_seq_len vocab_size num_layers num_heads channels padded_vocab_size"


# ---- the model -----------------------------------------------------------------------------------


def by_hand(tensors: dict[str, Any], version: int) -> bytes:
    """Return a file as llm.c's write_model writes it, for CONFIG only."""
    out = struct.pack("<256i", 20240326, version, 6, 130, 2, 2, 8, 256, *[0] * 248)

    def put(array: Any) -> bytes:
        flat = np.asarray(array, np.float32).ravel().tolist()
        whole = struct.pack(f"<{len(flat)}f", *flat)
        if version == 3:
            return whole
        return b"".join(whole[i + 2 : i + 4] for i in range(0, len(whole), 4))  # the upper halves

    out += put(tensors["wte.weight"]) + put(np.zeros((126, 8))) + put(tensors["wpe.weight"])
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            out += b"".join(put(tensors[f"h.{layer}.{name}.{kind}"]) for layer in (0, 1))
    return out + put(tensors["ln_f.weight"]) + put(tensors["ln_f.bias"])


@pytest.fixture(scope="module")
def model() -> GPT2:
    """Return a model whose weights differ and are exact in bf16, of which they use all 8 bits."""
    model = GPT2(CONFIG, seed=1)
    noise = np.random.default_rng(1).standard_normal(model.flat_parameters.size)
    model.flat_parameters += noise.astype(np.float32)
    model.flat_parameters.view(np.uint32)[...] &= 0xFFFF0000
    return model


@pytest.mark.parametrize(("dtype", "version"), [("fp32", 3), ("bf16", 5)])
def test_model_file_has_the_layout_of_llm_c(
    model: GPT2, tmp_path: Path, dtype: str, version: int
) -> None:
    path = tmp_path / "model.bin"
    write_model(path, CONFIG, model.parameters, dtype)
    assert path.read_bytes() == by_hand(model.parameters, version)
    config, tensors = read_model(path)
    assert config == CONFIG
    assert tensors.keys() == model.parameters.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        assert np.array_equal(tensor, model.parameters[name]), name


def test_fp32_weights_round_trip_bit_for_bit(tmp_path: Path) -> None:
    model = GPT2(CONFIG, seed=2)
    model.parameters["wpe.weight"][0, :4] = np.nan, -np.inf, -0.0, 1e-45
    write_model(tmp_path / "a.bin", CONFIG, model.parameters)
    _, tensors = read_model(tmp_path / "a.bin")
    assert all(tensors[name].tobytes() == p.tobytes() for name, p in model.parameters.items())
    assert not tensors["wte.weight"].flags.writeable, "memory of the file's, not a copy"


@pytest.mark.parametrize(("V", "rows"), [(1, 128), (127, 128), (128, 128), (129, 256)])
def test_vocabulary_is_padded(tmp_path: Path, V: int, rows: int) -> None:
    config = GPT2Config(vocab_size=V, n_positions=2, n_embd=2, n_layer=1, n_head=1)
    model = GPT2(config, seed=1)
    write_model(tmp_path / "a.bin", config, model.parameters)
    content = (tmp_path / "a.bin").read_bytes()
    assert struct.unpack_from("<i", content, 28) == (rows,)
    assert not any(content[1024 + 8 * V : 1024 + 8 * rows]), "rows beyond the vocabulary are 0"
    config_read, tensors = read_model(tmp_path / "a.bin")
    assert config_read == config and tensors["wte.weight"].shape == (V, 2)


def test_last_token_of_the_gpt2_vocabulary_ends_a_text(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=50257, n_positions=1, n_embd=1, n_layer=1, n_head=1)
    write_model(tmp_path / "a.bin", config, GPT2(config).parameters, "bf16")
    assert read_model(tmp_path / "a.bin")[0].eos_token_id == 50256


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bf16_rounds_to_nearest_even(bits: list[int]) -> None:
    numbers = np.array(bits, np.uint32).view(np.float32)
    for number, rounded in zip(numbers.tolist(), round_bf16(numbers).tolist(), strict=True):
        low, wide = np.array([number], np.float32).view(np.uint32) >> 16, {}
        if np.isnan(number):
            assert np.isnan(np.array([rounded << 16], np.uint32).view(np.float32)[0])
            continue
        for candidate in (int(low[0]), int(low[0]) + 1):  # the bf16 on either side
            upper = np.array([candidate << 16], np.uint32).view(np.float32)[0]
            # Infinity follows the largest number, and counts as 2**128 here.
            wide[candidate] = float(np.copysign(2.0**128, upper) if np.isinf(upper) else upper)
        if np.isinf(number):
            assert rounded == int(low[0])
            continue
        distance = {candidate: abs(number - value) for candidate, value in wide.items()}
        nearest = [c for c in distance if distance[c] == min(distance.values())]
        assert rounded == next(c for c in nearest if len(nearest) == 1 or c % 2 == 0)


def test_from_pretrained_takes_the_file(model: GPT2, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_model(path, CONFIG, model.parameters, "bf16")
    idx = np.arange(6)[None]
    assert np.array_equal(GPT2.from_pretrained(path)(idx), model(idx))
    quantized = GPT2.from_pretrained(path, quantize="int8")
    assert np.array_equal(quantized(idx), model.quantize("int8")(idx))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n_inner": 16}, "n_inner = 4"), ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-05")],
)
def test_models_outside_llm_c_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=9, n_positions=2, n_embd=2, n_layer=1, n_head=1, **changes)
    path = tmp_path / "a.bin"
    assert message in refused(write_model, path, config, GPT2(config).parameters)
    assert "fp32 or bf16, not fp16" in refused(write_model, path, CONFIG, {}, "fp16")
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 20240520}, "starts with 20240520, not 20240326"),
        ({"magic": 0}, "is not an llm.c model"),
        ({"version": 1}, "version 1; version 3 or 5 is wanted"),
        ({"version": -3}, "version -3"),
        ({"version": 5}, "needs"),
        ({"max_seq_len": 0}, "n_positions must be a whole number from 1 to 2147483647, got 0"),
        ({"max_seq_len": 7}, "needs"),
        ({"vocab_size": -1}, "vocab_size must be a whole number from 1 to 2147483647, got -1"),
        ({"vocab_size": 257}, "padded_vocab_size is 256, less than its vocab_size, 257"),
        ({"num_layers": 0}, "n_layer must be a whole number from 1 to 10000, got 0"),
        (
            {"num_layers": 2**31 - 1},
            "n_layer must be a whole number from 1 to 10000, got 2147483647",
        ),
        ({"num_layers": 10000}, "needs"),
        ({"num_heads": 3}, "n_embd must be divisible by n_head, got 8 and 3"),
        ({"num_heads": -2}, "n_head must be a whole number from 1 to 2147483647, got -2"),
        ({"channels": 0}, "n_embd must be a whole number from 1 to 2147483647, got 0"),
        ({"channels": 2**31 - 2, "num_layers": 10000}, "needs"),  # beyond 64 bits
        ({"padded_vocab_size": -1}, "padded_vocab_size is -1"),
        ({"padded_vocab_size": 2**31 - 1}, "needs"),
    ],
)
def test_lying_headers_are_refused(model: GPT2, tmp_path: Path, changes: Any, message: str) -> None:
    path = tmp_path / "a.bin"
    content = bytearray(by_hand(model.parameters, 3))
    for field, value in changes.items():
        struct.pack_into("<i", content, 4 * HEADER.split().index(field), value)
    path.write_bytes(content)
    said = refused(read_model, path)
    assert message in said and str(path) in said


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "starts with 0"),
        (lambda content: content[:3], "is not an llm.c model"),
        (lambda content: content[:1000], "truncated: it has 1000 bytes, its header needs 1024"),
        (lambda content: content[:1024], "has 1024 bytes"),
        (lambda content: content[:-1], "needs"),
        (lambda content: content[:-4], "needs"),
        (lambda content: content + b"\0", "needs"),
        (lambda content: content * 2, "needs"),
    ],
)
def test_truncated_files_are_refused(
    model: GPT2, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(damage(by_hand(model.parameters, 3)))
    assert message in refused(read_model, path)
    assert message in refused(GPT2.from_pretrained, path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ckpt.pt", b"anything"),
        ("model.pth", b""),
        ("last.ckpt", b"\0" * 2000),
        ("meta.pkl", b"\x80\x04"),
        ("pytorch_model.bin", b"PK\3\4" + b"\0" * 2000),
        ("legacy.bin", b"\x80\x02\x8a\nl\xfc"),
    ],
)
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_model, read_tokenizer, GPT2.from_pretrained):
        message = refused(read, path)
        assert "is a pickle" in message and "model.safetensors" in message and name in message


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.bin")  # if opened, it would wait for a writer
    with pytest.raises(OSError, match="is a pipe or a device"):
        read_model(tmp_path / "a.bin")
    with pytest.raises(IsADirectoryError):
        read_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_model(tmp_path / "none.bin")


# ---- the tokenizer -------------------------------------------------------------------------------


def tokenizer_by_hand(
    tokens: list[bytes], version: int = 2, eot: int = 256, count: int = -1
) -> bytes:
    """Return a file as llm.c's write_tokenizer writes it."""
    count = len(tokens) if count == -1 else count
    out = struct.pack("<256i", 20240328, version, count, eot, *[0] * 252)
    return out + b"".join(struct.pack("<B", len(token)) + token for token in tokens)


BYTES = [bytes([byte]) for byte in range(256)]
TOKENS = [*BYTES, b"<|endoftext|>", b"th", b"the"]


def tokens_of(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]


def test_tokenizer_file_has_the_layout_of_llm_c(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    write_tokenizer(path, TOKENS, 256)
    assert path.read_bytes() == tokenizer_by_hand(TOKENS)
    ranks, eot = read_tokenizer(path)
    assert eot == 256
    assert ranks == {token: n for n, token in enumerate(TOKENS) if n != 256}
    tokenizer = Tokenizer(ranks, eot)
    assert tokenizer.encode("the th t") == [258, 32, 257, 32, 116]


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_tokenizer_round_trips(kind: str, tmp_path: Path) -> None:
    text = "the cat sat on the mat; the dog didn't. " * 9
    given = Tokenizer.from_name("bytes") if kind == "bytes" else Tokenizer.train([text], 300)
    write_tokenizer(tmp_path / "a.bin", tokens_of(given), given.eot)
    found = Tokenizer(*read_tokenizer(tmp_path / "a.bin"))
    assert found.vocab_and_merges() == given.vocab_and_merges()
    assert found.encode(text) == given.encode(text)


@pytest.mark.parametrize("version", [1, 2])
def test_merges_of_gpt2_are_recovered_from_the_file(
    version: int, tmp_path: Path, data_file: Callable[[str], Path]
) -> None:
    data_file("tiktoken-cache")
    tokenizer = Tokenizer.from_name("gpt2")
    path = tmp_path / "gpt2_tokenizer.bin"
    # Version 1 has no field for the end of text.
    path.write_bytes(tokenizer_by_hand(tokens_of(tokenizer), version, 50256 * (version - 1)))
    found = Tokenizer(*read_tokenizer(path))
    assert found.eot == 50256
    found.save_pretrained(tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    (openai,) = (
        lines
        for cached in (DATA / "tiktoken-cache").iterdir()
        if (lines := cached.read_text(encoding="utf-8").splitlines())[0] == "#version: 0.2"
    )
    assert merges == openai[1:], "OpenAI's own list, merge for merge"


def test_vocabulary_that_is_no_bpe_has_no_merges(tmp_path: Path) -> None:
    tokens = [*TOKENS, b"xyz"]  # neither "xy" nor "yz" comes before it
    write_tokenizer(tmp_path / "a.bin", tokens, 256)
    tokenizer = Tokenizer(*read_tokenizer(tmp_path / "a.bin"))
    assert tokenizer.decode([259, 258]) == "xyzthe", "what llm.c does with it works"
    assert "token 259 (b'xyz') cannot be made" in refused(tokenizer.save_pretrained, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_token_of_256_bytes_is_refused(tmp_path: Path) -> None:
    message = refused(write_tokenizer, tmp_path / "a.bin", [*TOKENS, b"x" * 256], 256)
    assert "token 259 has 256 bytes" in message
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with 0, not 20240328"),
        (tokenizer_by_hand(TOKENS)[:500], "truncated: it has 500 bytes"),
        (tokenizer_by_hand(TOKENS, version=3), "version 3; version 1 or 2"),
        (tokenizer_by_hand(TOKENS, count=0), "header has 0 tokens; 1 to 65536 are possible"),
        (tokenizer_by_hand(TOKENS, count=-7), "header has -7 tokens; 1 to 65536 are possible"),
        (
            tokenizer_by_hand(TOKENS, count=2**31 - 1),
            "header has 2147483647 tokens; 1 to 65536",
        ),
        (tokenizer_by_hand(TOKENS, count=260), "token 259 of 260 is empty or cut off"),
        (tokenizer_by_hand(TOKENS, count=258), "4 bytes after its last token"),
        (tokenizer_by_hand(TOKENS)[:-1], "token 258 of 259 is empty or cut off"),
        (tokenizer_by_hand(TOKENS) + b"\1", "1 bytes after its last token"),
        (tokenizer_by_hand(TOKENS) + b"\0" * 70000, "its 259 tokens of 1 to 255 bytes need"),
        (tokenizer_by_hand([*TOKENS, b""]), "token 259 of 260 is empty"),
        (tokenizer_by_hand([*TOKENS, b"th"]), "tokens 257 and 259 are both b'th'"),
        (tokenizer_by_hand(TOKENS[1:], eot=255), "lacks 1 of the 256 single bytes, the first of"),
        (tokenizer_by_hand(TOKENS, eot=259), "its eot_token is 259, not one of 259"),
        (tokenizer_by_hand(TOKENS, eot=-1), "its eot_token is -1"),
        (tokenizer_by_hand(TOKENS, eot=7), "its eot_token, 7, is b'\\x07'"),
        (tokenizer_by_hand(TOKENS, version=1), "version 1 has 50257 tokens, this file has 259"),
        (struct.pack("<256i", 20240326, *[0] * 255), "starts with 20240326"),
    ],
)
def test_damaged_tokenizer_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(content)
    said = refused(read_tokenizer, path)
    assert message in said and str(path) in said


@given(data=st.data())
def test_changed_bytes_raise_value_error_only(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = data.draw(st.sampled_from(["model", "tokenizer"]))
    read: Callable[[Path], Any] = read_model if kind == "model" else read_tokenizer
    zeros = {name: np.zeros(shape) for name, shape in CONFIG.parameter_shapes().items()}
    good = by_hand(zeros, 3) if kind == "model" else tokenizer_by_hand(TOKENS)
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 40), st.integers(0, len(content))))
        new = data.draw(st.binary(max_size=9))
        cut = data.draw(st.sampled_from([0, len(new), 1, 100, len(content)]))
        content[at : at + cut] = new
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    path.write_bytes(content)
    try:
        read(path)
    except ValueError as error:
        assert str(path) in str(error)


def test_suggested_conversion_of_a_pickle_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="what is exported is PyTorch's")
    config = GPT2Config(vocab_size=11, n_positions=5, n_embd=6, n_layer=2, n_head=2)
    wanted = GPT2(config, seed=4)
    saved = {"_orig_mod.lm_head.weight": torch.tensor(wanted.parameters["wte.weight"].copy())}
    for name, parameter in wanted.parameters.items():
        if name.endswith(".bias"):
            parameter[...] = 0  # nanoGPT's bias=False leaves them out
        else:
            saved[f"_orig_mod.transformer.{name}"] = torch.tensor(parameter.copy())
    saved["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 5, 5)  # of old versions
    args = {"n_layer": 2, "n_head": 2, "n_embd": 6, "block_size": 5, "bias": False}
    monkeypatch.chdir(tmp_path)
    torch.save({"model": saved, "model_args": args | {"vocab_size": 11, "dropout": 0.0}}, "ckpt.pt")
    assert "is a pickle" in refused(GPT2.from_pretrained, "ckpt.pt")
    exec(llmc.EXPORT, {})
    found = GPT2.from_pretrained("model")
    assert np.array_equal(found.flat_parameters, wanted.flat_parameters)
