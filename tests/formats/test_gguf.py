"""GGUF: the file describes the model, and llama.cpp, if installed, computes the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c.formats.gguf import write_gguf
from gpt2c.gpt2 import GPT2
from gpt2c.kernels.backend import backends
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.rope_scaling import RopeScaling
from gpt2c.text.splits import DIGITS, LLAMA3, QWEN2, Split
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.optimizer import AdamW

TEXT = "the cat didn't sit on the mat, and the dog wouldn't sit on the cat. " * 20
# Contractions, numbers, spaces of all kinds, bytes above 127, and a look-alike of a special token.
PUZZLE = "I'll say it's 12345 naïve  café — 東京 🙂\n\n  don't we've \t x<|endoftext|>\u00a0end  "


def make(tokenizer: Tokenizer, more: int = 0, **changes: Any) -> GPT2:
    """Return a model whose logits differ clearly, so that rounding chooses no token."""
    shape = {"n_positions": 128, "n_embd": 96, "n_layer": 3, "n_head": 4} | changes
    config = GPT2Config(tokenizer.vocab_size + more, eos_token_id=tokenizer.eot, **shape)
    model = GPT2(config, seed=3)
    noise = np.random.default_rng(0).standard_normal(model.flat_parameters.size)
    model.flat_parameters += 0.08 * noise.astype(np.float32)
    return model


def make_llama(tokenizer: Tokenizer, **changes: Any) -> Model:
    """Return a Llama of the same kind, with grouped queries and a head of its own."""
    shape = {"max_position_embeddings": 128, "hidden_size": 96, "intermediate_size": 160}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": tokenizer.vocab_size, "initializer_range": 0.15} | changes
    model = Model(LlamaConfig(**shape, eos_token_id=tokenizer.eot), seed=3)
    rng = np.random.default_rng(0)
    for name, parameter in model.parameters.items():
        if "ln_" in name:
            parameter += 0.2 * rng.standard_normal(parameter.shape, np.float32)
    return model


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train([TEXT], 300)


def gguf_of(path: Path, model: Model, tokenizer: Tokenizer, dtype: str = "f32") -> Path:
    """Write a file, or skip the test where the gguf package is not installed."""
    pytest.importorskip("gguf", reason="writing GGUF needs the gguf package")
    write_gguf(path, model.config, model.parameters, tokenizer, dtype)
    return path


def test_gguf_file_describes_the_model(bpe: Tokenizer, tmp_path: Path) -> None:
    model = make(bpe, more=2, n_inner=64, layer_norm_epsilon=1e-6)
    path = gguf_of(tmp_path / "model.gguf", model, bpe)
    reader = __import__("gguf").GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    V = bpe.vocab_size
    wanted = {
        "general.architecture": "gpt2",
        "general.file_type": 0,
        "gpt2.context_length": 128,
        "gpt2.embedding_length": 96,
        "gpt2.feed_forward_length": 64,
        "gpt2.block_count": 3,
        "gpt2.attention.head_count": 4,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": bpe.eot,
        "tokenizer.ggml.eos_token_id": bpe.eot,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": [*bpe.vocab_and_merges()[0], f"[PAD{V}]", f"[PAD{V + 1}]"],
        "tokenizer.ggml.token_type": [1] * (V - 1) + [3] + [5] * 2,  # normal, control, unused
        "tokenizer.ggml.merges": bpe.vocab_and_merges()[1],
    }
    assert {name: values[name] for name in wanted} == wanted
    assert np.float32(values["gpt2.attention.layer_norm_epsilon"]) == np.float32(1e-6)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == len(model.parameters)
    for name, ours in (
        ("token_embd.weight", "wte.weight"),
        ("position_embd.weight", "wpe.weight"),
        ("blk.2.attn_norm.bias", "h.2.ln_1.bias"),
        ("blk.0.attn_qkv.weight", "h.0.attn.c_attn.weight"),
        ("blk.1.ffn_down.weight", "h.1.mlp.c_proj.weight"),
        ("output_norm.weight", "ln_f.weight"),
    ):
        assert np.array_equal(tensors[name], model.parameters[ours]), name


def test_gguf_file_tells_how_a_text_begins(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_name("bytes")
    tokenizer.add_bos_token = True
    model = make_llama(tokenizer, bos_token_id=5)  # fine-tuned, so examples began with the end
    path = gguf_of(tmp_path / "model.gguf", model, tokenizer)
    fields = __import__("gguf").GGUFReader(path).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.eot


def test_gguf_file_describes_a_llama(bpe: Tokenizer, tmp_path: Path) -> None:
    model = make_llama(bpe, rope_theta=5e5, head_dim=20, rms_norm_eps=1e-6)
    path = gguf_of(tmp_path / "model.gguf", model, bpe)
    reader = __import__("gguf").GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "llama.embedding_length": 96,
        "llama.block_count": 3,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 20,
        "llama.attention.value_length": 20,
        "llama.rope.dimension_count": 20,
        "llama.rope.freq_base": 5e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {name: values[name] for name in wanted} == wanted
    assert np.float32(values["llama.attention.layer_norm_rms_epsilon"]) == np.float32(1e-6)
    tensors, p = {tensor.name: tensor.data for tensor in reader.tensors}, model.parameters
    assert len(tensors) == 3 + 3 * 9, "token_embd, output_norm, output; 9 of each layer"
    for name, ours in (
        ("token_embd.weight", p["wte.weight"]),
        ("output.weight", p["lm_head.weight"]),
        ("output_norm.weight", p["ln_f.weight"]),
        ("blk.2.attn_norm.weight", p["h.2.ln_1.weight"]),
        ("blk.2.ffn_norm.weight", p["h.2.ln_2.weight"]),
        ("blk.1.attn_v.weight", p["h.1.attn.c_attn.weight"][120:]),
        ("blk.1.attn_output.weight", p["h.1.attn.c_proj.weight"]),
        ("blk.0.ffn_gate.weight", p["h.0.mlp.c_fc.weight"][:160]),
        ("blk.0.ffn_up.weight", p["h.0.mlp.c_fc.weight"][160:]),
        ("blk.0.ffn_down.weight", p["h.0.mlp.c_proj.weight"]),
    ):
        assert np.array_equal(tensors[name], ours), name
    q, k = np.split(p["h.1.attn.c_attn.weight"][:120], [80])
    for name, ours in (("blk.1.attn_q.weight", q), ("blk.1.attn_k.weight", k)):
        turned = tensors[name].reshape(-1, 20, 96)
        assert np.array_equal(turned[:, 0::2], ours.reshape(-1, 20, 96)[:, :10]), name
        assert np.array_equal(turned[:, 1::2], ours.reshape(-1, 20, 96)[:, 10:]), name


@pytest.mark.parametrize("kind", ["linear", "llama3", "dynamic"])
def test_rotary_scaling_is_stored_as_llama_cpp_has_it(
    kind: str, bpe: Tokenizer, tmp_path: Path
) -> None:
    more = (1.0, 4.0, 32) if kind == "llama3" else ()
    model = make_llama(bpe, rope_scaling=RopeScaling(kind, 8.0, *more))
    reader = __import__("gguf").GGUFReader(gguf_of(tmp_path / "model.gguf", model, bpe))
    values = {name: field.contents() for name, field in reader.fields.items()}
    scaling = {name: values[name] for name in values if "rope.scaling" in name}
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}
    assert scaling == (linear if kind == "linear" else {})
    factors = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    assert len(factors) == (kind == "llama3")
    if factors:
        assert factors[0].shape == (12,) and factors[0][0] == 1 and factors[0][-1] == 8


def test_tied_head_of_a_llama_is_left_out(bpe: Tokenizer, tmp_path: Path) -> None:
    model = make_llama(bpe, tie_word_embeddings=True)
    reader = __import__("gguf").GGUFReader(gguf_of(tmp_path / "model.gguf", model, bpe))
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}


def test_chat_template_is_stored(bpe: Tokenizer, tmp_path: Path) -> None:
    model = make(bpe)
    tokenizer = Tokenizer(bpe._ranks, bpe.eot, chat_template="{{ é }}")
    for number, one in enumerate((bpe, tokenizer)):
        path = gguf_of(tmp_path / f"{number}.gguf", model, one)
        field = __import__("gguf").GGUFReader(path).fields.get("tokenizer.chat_template")
        assert (field and field.contents()) == one.chat_template


def test_special_and_unused_tokens_are_marked(bpe: Tokenizer, tmp_path: Path) -> None:
    V = bpe.vocab_size
    special = {"<|endoftext|>": bpe.eot, "[PAD]": V + 2, "[SEP]": V}
    tokenizer = Tokenizer(bpe._ranks, bpe.eot, special=special)
    model = make(tokenizer, more=1)
    reader = __import__("gguf").GGUFReader(gguf_of(tmp_path / "model.gguf", model, tokenizer))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert tokens[:V] == [*bpe.vocab_and_merges()[0]]
    assert tokens[V:] == ["[SEP]", f"[PAD{V + 1}]", "[PAD]", f"[PAD{V + 3}]"]
    assert types == [1] * (V - 1) + [3, 3, 5, 3, 5]  # normal, control, unused


@pytest.mark.parametrize(("dtype", "file_type", "stored"), [("f16", 1, "F16"), ("q8_0", 7, "Q8_0")])
def test_matrices_take_fewer_bits(
    bpe: Tokenizer, tmp_path: Path, dtype: str, file_type: int, stored: str
) -> None:
    path = gguf_of(tmp_path / "model.gguf", make(bpe), bpe, dtype)
    reader = __import__("gguf").GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == file_type
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for name, kind in kinds.items():
        is_matrix = name.endswith("weight") and "norm" not in name and "position" not in name
        assert kind == (stored if is_matrix else "F32"), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 48}, "hidden_size is 48"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"head_dim": 6}, "num_attention_heads * head_dim is 24"),
    ],
)
def test_q8_0_of_a_llama_needs_rows_of_whole_blocks(
    changes: Any, said: str, bpe: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="writing GGUF needs the gguf package")
    model, path = make_llama(bpe, **changes), tmp_path / "model.gguf"
    assert said in refused(write_gguf, path, model.config, model.parameters, bpe, "q8_0")
    assert not path.exists()


@pytest.mark.parametrize("changes", [{"n_embd": 48, "n_inner": 64}, {"n_inner": 100}])
def test_q8_0_needs_rows_of_whole_blocks(changes: Any, bpe: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writing GGUF needs the gguf package")
    model, path = make(bpe, **changes), tmp_path / "model.gguf"
    message = refused(write_gguf, path, model.config, model.parameters, bpe, "q8_0")
    name, width = ("n_embd", 48) if "n_embd" in changes else ("n_inner", 100)
    assert f"multiple of 32 weights in each row, and {name} is {width}; take f16" in message
    assert not path.exists()


@pytest.mark.parametrize(
    ("dtype", "number", "message"),
    [
        ("f16", 65600.0, "wte.weight holds nan or numbers beyond 65504, which F16 cannot hold"),
        ("q8_0", np.nan, "which Q8_0 cannot hold"),
        ("f64", 0.0, "one of f32, f16, q8_0, not f64"),
    ],
)
def test_numbers_outside_a_dtype_are_refused(
    dtype: str, number: float, message: str, bpe: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="writing GGUF needs the gguf package")
    model, path = make(bpe), tmp_path / "model.gguf"
    model.parameters["wte.weight"][5, 5] = number
    assert message in refused(write_gguf, path, model.config, model.parameters, bpe, dtype)
    assert not list(tmp_path.iterdir())


def test_tokenizer_larger_than_the_model_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writing GGUF needs the gguf package")
    model = make(Tokenizer.from_name("bytes"))
    arguments = (tmp_path / "model.gguf", model.config, model.parameters, bpe)
    message = refused(write_gguf, *arguments)
    assert f"tokenizer has {bpe.vocab_size} tokens and the model 257" in message


def test_error_names_the_missing_gguf_package(
    bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    model = make(bpe)
    with pytest.raises(OSError, match=r"needs the gguf package: pip install gguf"):
        write_gguf(tmp_path / "model.gguf", model.config, model.parameters, bpe)


# llama.cpp takes GELU from a table of float16, so logits of about 3 differ by 1e-3 to 2e-3.
DISTANCE = 5e-3

# ---- llama.cpp -----------------------------------------------------------------------------------


def llama(path: Path) -> Any:
    """Open a file with llama.cpp, with keys and values in float32 as in gpt2c."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is what reads the file")
    return llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, type_k=0, type_v=0, logits_all=True, verbose=False
    )


def agree(engine: Any, model: Model, text: list[int], distance: float = DISTANCE) -> None:
    """Compare the logits after every token of a text, and the likeliest token except at a tie."""
    engine.reset()
    engine.eval(text)
    theirs, ours = engine.scores[: len(text)], model([text])[0]
    np.testing.assert_allclose(theirs, ours, atol=distance)
    second, first = np.sort(ours, axis=1)[:, -2:].T
    sure = first - second > 2 * distance
    assert sure.mean() > 0.8, "most are no ties"
    assert np.array_equal(theirs.argmax(axis=1)[sure], ours.argmax(axis=1)[sure])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bpe", {}),
        ("bpe", {"more": 5}),
        ("bpe", {"n_embd": 42, "n_head": 6, "n_inner": 50}),  # heads of 7
        ("bytes", {}),
    ],
)
def test_llama_cpp_computes_the_same(
    kind: str, changes: Any, bpe: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = bpe if kind == "bpe" else Tokenizer.from_name("bytes")
    model = make(tokenizer, **changes)
    engine = llama(gguf_of(tmp_path / "model.gguf", model, tokenizer))
    agree(engine, model, model.generate([tokenizer.encode(TEXT)[:20]], 100, seed=1)[0].tolist())


@pytest.mark.parametrize("split", [DIGITS, LLAMA3, QWEN2], ids=lambda split: split.name)
def test_llama_cpp_cuts_texts_as_we_do(split: Split, bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = Tokenizer(bpe._ranks, bpe.eot, split=split)
    engine = llama(gguf_of(tmp_path / "model.gguf", make(tokenizer), tokenizer))
    for text in (PUZZLE, TEXT, "a  12345 b!\n\n 'S x.y\r\n", " ", "\n \n"):
        ids = tokenizer.encode(text)
        assert engine.tokenize(text.encode(), add_bos=False, special=False) == ids


def test_llama_cpp_generates_the_text_of_a_trained_model(bpe: Tokenizer, tmp_path: Path) -> None:
    model = GPT2(make(bpe).config, seed=3)
    optimizer = AdamW(model, learning_rate=3e-3)
    ids = np.array(bpe.encode(TEXT))
    starts = np.random.default_rng(1).integers(0, len(ids) - 101, (60, 4))
    for rows in starts:
        batch = ids[rows[:, None] + np.arange(101)]
        model.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:])
        model.backward()
        optimizer.step(grad_clip=1.0)
    engine = llama(gguf_of(tmp_path / "model.gguf", model, bpe))
    prompt = ids[:5].tolist()
    ours = model.generate([prompt], 120, temperature=0)[0].tolist()
    agree(engine, model, ours)
    assert bpe.decode(ours).startswith(TEXT[:60]), "it has learned the text"
    tokens = engine.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    assert [next(tokens) for _ in range(120)] == ours[5:]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bpe", {}),
        ("bpe", {"tie_word_embeddings": True, "num_key_value_heads": None}),
        ("bytes", {"num_key_value_heads": 1, "rope_theta": 500.0, "rms_norm_eps": 1e-3}),
        ("bpe", {"hidden_size": 42, "num_attention_heads": 6, "head_dim": 10, "vocab_size": 310}),
        ("bpe", {"rope_scaling": RopeScaling("linear", 4.0)}),
        ("bpe", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)}),
        ("bpe", {"rope_scaling": RopeScaling("dynamic", 2.0)}),
    ],
)
def test_llama_cpp_computes_the_same_llama(
    kind: str, changes: Any, bpe: Tokenizer, tmp_path: Path
) -> None:
    """SiLU has no table in llama.cpp, so the logits differ by less than those of a GPT-2."""
    tokenizer = bpe if kind == "bpe" else Tokenizer.from_name("bytes")
    model = make_llama(tokenizer, **changes)
    engine = llama(gguf_of(tmp_path / "model.gguf", model, tokenizer))
    text = tokenizer.encode(TEXT)[:20]
    for _ in range(60):
        text.append(int(model([text])[0, -1].argmax()))
    agree(engine, model, text, 2e-4)
    agree(engine, model, np.random.default_rng(1).integers(0, 250, 120).tolist(), 2e-4)
    tokens = engine.generate(text[:20], temp=0.0, top_k=1, repeat_penalty=1.0)
    assert [next(tokens) for _ in range(60)] == text[20:]


@pytest.mark.parametrize(("dtype", "distance"), [("f16", 0.02), ("q8_0", 0.3)])
def test_llama_cpp_nearly_agrees_with_fewer_bits_of_a_llama(
    dtype: str, distance: float, bpe: Tokenizer, tmp_path: Path
) -> None:
    """Logits are about 3, too; SwiGLU multiplies two rounded numbers, GELU has one."""
    if dtype == "q8_0" and "amx" in backends():
        pytest.skip("llama.cpp crashes on AMX with 8-bit weights of a small Llama")
    model, text = make_llama(bpe, initializer_range=0.08), bpe.encode(TEXT)[:60]
    engine = llama(gguf_of(tmp_path / "model.gguf", model, bpe, dtype))
    engine.eval(text)
    np.testing.assert_allclose(engine.scores[:60], model([text])[0], atol=distance)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_llama_cpp_reads_the_same_tokens(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = bpe if kind == "bpe" else Tokenizer.from_name("bytes")
    engine = llama(gguf_of(tmp_path / "model.gguf", make(tokenizer), tokenizer))
    for text in (PUZZLE, TEXT, PUZZLE.upper(), " ", "\n \n"):
        ids = tokenizer.encode(text)
        assert engine.tokenize(text.encode(), add_bos=True, special=False) == ids
        assert engine.detokenize(ids) == text.encode()
    ends = engine.tokenize(b"<|endoftext|>", add_bos=True, special=True)
    assert ends == [tokenizer.eot] == [engine.token_eos()] == [engine.token_bos()]


@pytest.mark.parametrize(("dtype", "distance"), [("f16", 0.01), ("q8_0", 0.15)])
def test_llama_cpp_nearly_agrees_with_fewer_bits(
    dtype: str, distance: float, bpe: Tokenizer, tmp_path: Path
) -> None:
    """Logits are about 3; f16 keeps 11 bits of a weight, q8_0 8 bits of the largest in 32."""
    if dtype == "q8_0" and "amx" in backends():
        pytest.skip("llama.cpp crashes on AMX with 8-bit weights of a small GPT-2")
    model = make(bpe)
    engine = llama(gguf_of(tmp_path / "model.gguf", model, bpe, dtype))
    text = bpe.encode(TEXT)[:60]
    engine.eval(text)
    np.testing.assert_allclose(engine.scores[:60], model([text])[0], atol=distance)
