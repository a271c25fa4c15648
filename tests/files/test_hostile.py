"""Bad files, made by hand and by mutation: a sentence that names file and field refuses each.

A reader raises only ValueError and OSError, quickly and with little memory. hostile.py has the
readers and their good files; `make fuzz` runs for ten minutes, this file for seconds.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
from helpers.hostile import READERS, Pairs, attempt, dumps, joined, limits, split

from gpt2c.files.names import ADAPTER_FILES
from gpt2c.model.gpt2 import GPT2Config

Change = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """Return a function that copies a reader's good files to a directory."""
    made: dict[str, Path] = {}

    def copy(reader: str, to: Path) -> Path:
        if reader not in made:
            made[reader] = tmp_path_factory.mktemp(reader)
            READERS[reader].make(made[reader])
        return Path(shutil.copytree(made[reader], to / reader))

    return copy


# ---- by hand -------------------------------------------------------------------------------------


def raw(content: bytes) -> Change:
    return lambda _: content


def swap(old: bytes | str, new: bytes | str) -> Change:
    """Replace the first occurrence of a text, which must be there."""
    before, after = (part.encode() if isinstance(part, str) else part for part in (old, new))

    def change(content: bytes) -> bytes:
        assert before in content
        return content.replace(before, after, 1)

    return change


def at(offset: int, value: int, width: int = 4) -> Change:
    """Overwrite the bytes at an offset with a number; a negative offset counts from the end."""

    def change(content: bytes) -> bytes:
        new, start = bytearray(content), offset % len(content)
        new[start : start + width] = (value % 256**width).to_bytes(width, "little")
        return bytes(new)

    return change


def size(change: Callable[[int], int]) -> Change:
    """Cut a file to another size, or fill it with zeros."""
    return lambda content: content[: change(len(content))].ljust(change(len(content)), b"\0")


def entries(**changes: Any) -> Change:
    """Change entries of a JSON object; None removes one."""

    def change(content: bytes) -> bytes:
        kept = {**json.loads(content), **changes}
        return json.dumps({key: kept[key] for key in kept if kept[key] is not None}).encode()

    return change


def twice(content: bytes) -> bytes:
    """Repeat the first key of a JSON object with another value."""
    pairs = json.loads(content, object_pairs_hook=Pairs)
    return dumps(Pairs([*pairs, (pairs[0][0], pairs[1][1])])).encode()


def header(change: Change) -> Change:
    """Change the header of a safetensors file, and the header's size at the start of the file."""

    def whole(content: bytes) -> bytes:
        text, body = split(content)
        return joined(change(text), body)

    return whole


def tensor(name: str = "wte.weight", **changes: Any) -> Change:
    """Change a tensor's entry in the header of a safetensors file; None removes a field."""

    def change(text: bytes) -> bytes:
        top = json.loads(text)
        top[name] = {k: v for k, v in {**top.get(name, {}), **changes}.items() if v is not None}
        return json.dumps(top).encode()

    return header(change)


def weight(name: str, value: float) -> Change:
    """Change the first number of a float32 tensor."""

    def change(content: bytes) -> bytes:
        text, body = split(content)
        start = len(content) - len(body) + json.loads(text)[name]["data_offsets"][0]
        return at(start, int(np.float32(value).view(np.uint32)))(content)

    return change


def placed(place: Any) -> Change:
    """Change an index, so that it puts a tensor into another file."""

    def change(content: bytes) -> bytes:
        top = json.loads(content)
        assert "ln_f.bias" in top["weight_map"]
        top["weight_map"]["ln_f.bias"] = place
        return json.dumps(top).encode()

    return change


def inside(outer: str, **changes: Any) -> Change:
    """Change entries of an object in a JSON object; None makes them null."""

    def change(content: bytes) -> bytes:
        top = json.loads(content)
        top[outer] |= changes
        return json.dumps(top).encode()

    return change


def zipped() -> bytes:
    """Return a file as torch.save writes it: a zip file with a pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"wte.weight": [1.0]}))
    return file.getvalue()


PLACES = [
    *("../x", "../x.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", "..", ".", ""),
    *("\0", "a\\b", "\n", 1, None, ["x"], {}, "x" * 5000, "model.safetensors.index.json"),
    *("config.json", "no.safetensors"),
]
INDEX, PART = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
ONE_FILE = "tokenizer.json"
STATE = "run/checkpoints/00000002/state.json"
MOMENTS = "run/checkpoints/00000002/trainer.safetensors"
THIRD = '"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
CLASSIFIER = [GPT2Config.classifier]
NO_JSON = {
    "empty": raw(b""),
    "zeros": raw(bytes(9)),
    "a list": raw(b"[]"),
    "null": raw(b"null"),
    "cut": size(lambda n: n // 2),
    "one byte short": lambda content: content.rstrip()[:-1],
    "more after it": lambda content: content + b"{}",
    "not UTF-8": swap(b'"', b'"\xff\xfe'),
    "a key twice": twice,
    "NaN": swap(b"{", b'{"x": NaN,'),
    "Infinity": swap(b"{", b'{"x": -Infinity,'),
    "endless digits": swap(b"{", b'{"x": ' + b"9" * 5000 + b","),
    "nested deeply": swap(b"{", b'{"x": ' + b"[" * 99_999 + b"]" * 99_999 + b","),
    "half an escape": swap(b"{", rb'{"\ud8": 1,'),
}
CONFIGS = {
    "n_layer": [10**9, 2**62, 0, -1, 1.5, "1", True, [1], {}],
    "n_head": [0, 3, -2, 2.0, False],
    "vocab_size": [0, 2**62, 10**30, "262", 262.0],
    "n_embd": [0, 2**31, 2**62, -4],
    "n_positions": [2**40, 2**63, 0],
    "n_inner": [0, -1, 2**40, "16"],
    "layer_norm_epsilon": [0, -1e-5, "1e-5", True, []],
    "eos_token_id": [-1, "261", 1.5],
    "model_type": ["mistral", 2, []],
    "activation_function": ["relu", "", ["gelu_new"]],
    "scale_attn_by_inverse_layer_idx": [True, "yes"],
    "tie_word_embeddings": [False],
}
HEADERS = {
    "no end": (raw(bytes(7)), ""),
    "size 0": (at(0, 0, 8), ""),
    "size 1": (at(0, 1, 8), ""),
    "size 2^31 - 1": (at(0, 2**31 - 1, 8), ""),
    "size 2^63": (at(0, 2**63, 8), ""),
    "size 2^64 - 1": (at(0, -1, 8), ""),
    "size of the file": (lambda content: at(0, len(content) - 8, 8)(content), ""),
    "header cut": (size(lambda n: 100), ""),
    "no tensor's bytes": (lambda content: content[: -len(split(content)[1])], ""),
    "one byte short": (size(lambda n: n - 1), ""),
    "one byte more": (size(lambda n: n + 1), ""),
    "a page more": (size(lambda n: n + 4096), ""),
    "zip": (raw(zipped()), ""),
    "pickle": (raw(pickle.dumps({"wte.weight": 1.0})), ""),
    "header of spaces": (raw(joined(b" " * 64, b"")), ""),
    "a tensor twice": (header(twice), ""),
    "shape beyond 2^64": (tensor(shape=[2**32, 2**32]), ""),
    "shape of 2^63": (tensor(shape=[2**63, 4]), ""),
    "a huge shape with a 0": (tensor(shape=[2**62, 0]), ""),
    "a negative shape": (tensor(shape=[-262, -4]), ""),
    "a shape of floats": (tensor(shape=[262.0, 4.0]), ""),
    "a shape of truths": (tensor(shape=[True, 1048]), ""),
    "shape too large": (tensor(shape=[263, 4]), ""),
    "another shape of the size": (tensor(shape=[4, 262]), "wte.weight"),
    "one dimension": (tensor(shape=[1048]), "wte.weight"),
    "a thousand dimensions": (tensor(shape=[1] * 1000 + [262, 4]), "wte.weight"),
    "no shape": (tensor(shape=None), ""),
    "offsets the wrong way": (tensor(data_offsets=[4192, 0]), ""),
    "offsets beyond the file": (tensor(data_offsets=[0, 2**40]), ""),
    "offsets beyond 2^64": (tensor(data_offsets=[2**64, 2**64 + 4192]), ""),
    "negative offsets": (tensor(data_offsets=[-4192, 0]), ""),
    "one offset": (tensor(data_offsets=[0]), ""),
    "offsets that overlap": (tensor("wpe.weight", data_offsets=[0, 128]), ""),
    "a gap": (tensor("wpe.weight", data_offsets=[2**20, 2**20 + 128]), ""),
    "a tensor too many": (tensor("h.7.ln_1.bias", **ONE), ""),
    "no such dtype": (tensor(dtype="F33"), ""),
    "integers": (tensor(dtype="I32"), "wte.weight"),
    "a dtype half as long": (tensor(dtype="F16"), ""),
    "a dtype that is a list": (tensor(dtype=["F32"]), ""),
    "metadata that is no text": (tensor("__metadata__", step=1), ""),
    "a name nobody knows": (header(swap("wpe.weight", "wpf.weight")), "wpe.weight"),
}
# Place in the header, field, bad values, message.
LLMC = [
    (0, "magic", (0, 20240520, 20240328), "starts with"),
    (1, "version", (0, 1, 2, 4, 5, -1, 2**31 - 1), ""),
    (2, "n_positions", (0, -1, 7, 2**31 - 1), ""),
    (3, "vocab_size", (0, -1, 2**31 - 1), ""),
    (4, "n_layer", (0, -1, 2, 2**31 - 1), ""),
    (5, "n_head", (0, -1, 3, 2**31 - 1), "n_head"),
    (6, "n_embd", (0, -1, 2, 2**31 - 1), ""),
    (7, "padded_vocab_size", (0, -1, 261, 385, 2**31 - 1), ""),
]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = (f"adapter/{name}" for name in ADAPTER_FILES)
CORPUS: list[tuple[str, str, str, Change, str]] = [
    *(("model", "config.json", what, change, "") for what, change in NO_JSON.items()),
    *(("tokenizer", "vocab.json", what, change, "") for what, change in NO_JSON.items()),
    *(
        ("model", "config.json", f"{name} {value!r}", entries(**{name: value}), name)
        for name, values in CONFIGS.items()
        for value in values
    ),
    ("model", "config.json", "epsilon 1e999", swap("1e-05", "1e999"), "layer_norm_epsilon"),
    *(
        ("generation", "generation_config.json", what, change, "")
        for what, change in {**NO_JSON, "ends of a kind": entries(eos_token_id="x")}.items()
    ),
    *(
        ("classifier", "config.json", f"id2label {value!r}", entries(id2label=value), said)
        for value, said in [
            *(([], "id2label"), ("LABEL_0", "id2label"), ({}, "num_labels"), (3, "id2label")),
            *(({"0": "a"}, "score.weight"), (None, "score.weight")),
        ]
    ),
    *(
        ("classifier", "config.json", f"num_labels {value!r}", entries(num_labels=value), said)
        for value, said in [(2, "num_labels"), (2**62, "num_labels"), ("3", "num_labels")]
    ),
    *(
        (
            "adapters",
            f"adapter/{ADAPTER_FILES[0]}",
            f"{name} {value!r}",
            entries(**{name: value}),
            said,
        )
        for name, said, values in [
            ("peft_type", "peft_type", ("LOHA", None, 1)),
            ("r", "r must be", (0, -1, 2.5, "2", None, 2**40, True)),
            ("r", "must have lora_A", (1, 3)),
            ("lora_alpha", "alpha must be", (0, -1.0, "16", None, [1])),
            ("use_dora", "use_dora must be empty", (True, "yes")),
            ("rank_pattern", "rank_pattern must be empty", ({"c_attn": 3},)),
            ("alpha_pattern", "alpha_pattern must be empty", ({"c_attn": 3},)),
            ("layers_to_transform", "layers_to_transform must be empty", ([0],)),
            ("bias", "bias must be", ("all", "lora_only")),
            ("modules_to_save", "modules_to_save must be", (["wte"], "score", [["score"]])),
            ("init_lora_weights", "changes the base", ("pissa", "PiSSA_niter_4", "olora")),
            ("use_rslora", "use_rslora", ("yes", 1)),
            ("base_model_name_or_path", "base_model_name_or_path", (1, ["gpt2"])),
        ]
        for value in values
    ),
    *(("adapters", ADAPTER_CONFIG, w, c, "") for w, c in NO_JSON.items()),
    *(
        (reader, ADAPTER_WEIGHTS, what, header(swap(old, new)), said)
        for reader, what, old, new, said in [
            ("adapters", "another layer", "h.0.attn.c_attn", "h.7.attn.c_attn", "h.7."),
            ("adapters", "no such layer", "h.0.attn.c_attn", "h.0.attn.c_bttn", "no layer for"),
            ("adapters", "no adapter", "base_model.model", "case_model.model", "no part of"),
            ("adapters", "no lora_B", "c_attn.lora_B", "c_attn.lora_C", "no place for"),
            ("adapters", "another kind", "transformer.h.0", "transformer.g.0", "no place for"),
            ("adapters", "another base", '"base_sha256":"', '"base_sha256":"0', "other weights"),
            ("llama_adapters", "no q", "self_attn.q_proj", "self_attn.w_proj", "no layer for"),
            ("llama_adapters", "q twice", "self_attn.k_proj", "self_attn.q_proj", ""),
        ]
    ),
    ("classifier", "config.json", "no head", entries(architectures=None), "score.weight"),
    ("model", "config.json", "a head", entries(architectures=CLASSIFIER), "score.weight"),
    ("model", "config.json", "more tokens", entries(vocab_size=2**31 - 1), "wte.weight"),
    *(("tokenizer", "tokenizer_config.json", what, c, "") for what, c in NO_JSON.items()),
    ("model", "config.json", "more layers", entries(n_layer=2), "h.1."),
    ("int8", "config.json", "others' bits", entries(quantization_config=[]), "quantization_config"),
    (
        "int8",
        "config.json",
        "bits of no kind",
        entries(quantization_config={"quant_method": "gpt2c", "weights": ["int8"]}),
        "quantization_config",
    ),
    *(("model", "model.safetensors", what, *entry) for what, entry in HEADERS.items()),
    ("int8", "model.safetensors", "signed bytes", tensor(dtype="I8"), "wte.weight"),
    ("int8", "model.safetensors", "no factors", header(swap("wte.scale", "wte.skale")), "wte."),
    ("foreign", "model.safetensors", "another head", weight("lm_head.weight", 7), "lm_head"),
    (
        "foreign",
        "model.safetensors",
        "a name with and without prefix",
        header(swap("transformer.ln_f.bias", "ln_f.weight")),
        "ln_f.weight",
    ),
    *(
        ("tokenizer", "vocab.json", f'"!" is {value!r}', entries(**{"!": value}), "")
        for value in (True, 0.0, "0", -1, 1, 2**63, 10**30, [], None)
    ),
    ("tokenizer", "vocab.json", "no end of text", swap("<|endoftext|>", "<|end|>"), "<|end"),
    ("tokenizer", "vocab.json", "a character of no byte", swap('"!"', '"☃"'), "☃"),
    ("tokenizer", "vocab.json", "a token twice", swap('"!"', '"A"'), "'A'"),
    ("tokenizer", "vocab.json", "an empty token", swap('"!"', '""'), ""),
    ("tokenizer", "merges.txt", "empty", raw(b""), ""),
    ("tokenizer", "merges.txt", "not UTF-8", raw(b"\xff"), "UTF-8"),
    ("tokenizer", "merges.txt", "UTF-16", lambda c: c.decode().encode("utf-16"), "UTF-16"),
    ("tokenizer", "merges.txt", "one half", lambda c: c + b"x\n", "line 7"),
    ("tokenizer", "merges.txt", "three halves", lambda c: c + b"a b c\n", "line 7"),
    ("tokenizer", "merges.txt", "a blank line", lambda c: c + b"\n", "line 7"),
    ("tokenizer", "merges.txt", "NUL", lambda c: c + b"\0 \0\n", "line 7"),
    ("tokenizer", "merges.txt", "one too many", lambda c: c + b"a b\n", ""),
    ("tokenizer", "merges.txt", "a merge twice", lambda c: c + c.splitlines()[-1] + b"\n", ""),
    ("tokenizer", "merges.txt", "one too few", lambda c: c[: c[:-1].rfind(b"\n") + 1], ""),
    ("tokenizer", "merges.txt", "another order", lambda c: b"\n".join(sorted(c.split(b"\n"))), ""),
    ("tokens", "train.bin", "nothing", raw(b""), ""),
    ("tokens", "train.bin", "half a header", size(lambda n: 512), ""),
    ("tokens", "train.bin", "a header", size(lambda n: 1024), ""),
    ("tokens", "train.bin", "half a token short", size(lambda n: n - 1), ""),
    ("tokens", "train.bin", "a token short", size(lambda n: n - 2), ""),
    ("tokens", "train.bin", "half a token more", size(lambda n: n + 1), ""),
    ("tokens", "train.bin", "a header more", size(lambda n: n + 1024), ""),
    ("tokens", "train.bin", "no header", lambda content: content[1024:], "nanoGPT"),
    ("tokens", "train.bin", "a model", at(0, 20240326), "20240326"),
    ("tokens", "train.bin", "a vocabulary", at(0, 20240328), "20240328"),
    ("tokens", "train.bin", "another byte order", raw((20240520).to_bytes(4, "big") * 500), ""),
    ("tokens", "train.bin", "zip", raw(zipped()), ""),
    *(("tokens", "train.bin", f"version {n}", at(4, n), "version") for n in (0, 2, -1, 2**31 - 1)),
    *(
        ("tokens", "train.bin", f"{count} tokens", at(8, count), "tokens")
        for count in (0, 1, -1, 299, 301, 2**30, 2**31 - 1, -(2**31))
    ),
    *(("tokens", "train.bin", f"token {n}", at(-2, n, 2), str(n)) for n in (262, 2**16 - 1)),
    ("recipe", "recipe.toml", "no setting", swap("n_layer", "n_layers"), "n_layers"),
    ("recipe", "recipe.toml", "a setting twice", lambda c: c + b"n_layer = 2\n", "recipe.toml"),
    ("recipe", "recipe.toml", "a table", lambda c: c + b"[seed]\n", "seed"),
    ("recipe", "recipe.toml", "a table in a name", lambda c: c + b"seed.x = 1\n", "seed"),
    ("recipe", "recipe.toml", "a date", swap("2_000", "1979-05-27"), "max_iters"),
    ("recipe", "recipe.toml", "endless digits", swap("2_000", "9" * 5000), ""),
    ("recipe", "recipe.toml", "endless hex", swap("2_000", "0x" + "f" * 5000), "max_iters"),
    ("recipe", "recipe.toml", "nested deeply", swap("2_000", "[" * 9999 + "]" * 9999), ""),
    ("recipe", "recipe.toml", "not UTF-8", raw(b"backend = '\xff'"), ""),
    ("recipe", "recipe.toml", "NUL", lambda c: c + b"\0", ""),
    ("questions", "questions.jsonl", "empty", raw(b""), "empty"),
    ("questions", "questions.jsonl", "blank", raw(b"\n \n\r\n"), "no questions"),
    ("questions", "questions.jsonl", "cut", size(lambda n: n - 5), "line 2"),
    ("questions", "questions.jsonl", "not UTF-8", swap(b"c", b"\xff"), "UTF-8"),
    ("questions", "questions.jsonl", "a mark in a line", swap("{", "{\ufeff"), "line 1"),
    ("questions", "questions.jsonl", "two on a line", lambda c: c.replace(b"\n", b""), "line 1"),
    ("questions", "questions.jsonl", "a label twice", swap("{", '{"label": 0, '), "'label'"),
    ("questions", "questions.jsonl", "label 2^63", swap('"label": 1', f'"label": {2**63}'), "labe"),
    ("questions", "questions.jsonl", "label true", swap('"label": 1', '"label": true'), "label"),
    ("questions", "questions.jsonl", "long label", swap('"0"', f'"{"0" * 5000}1"'), "line 2"),
    ("questions", "questions.jsonl", "nested", raw(b"[" * 99_999 + b"]" * 99_999), "line 1"),
    ("questions", "questions.jsonl", "too long", swap("a b", "a b" * 9), "line 1"),
    *(
        ("llmc", "model.bin", f"{field} {value}", at(4 * place, value), said)
        for place, field, values, said in LLMC
        for value in values
    ),
    *(
        ("llmc", "model.bin", what, change, "")
        for what, change in {
            "nothing": raw(b""),
            "half a header": size(lambda n: 512),
            "a header": size(lambda n: 1024),
            "one byte short": size(lambda n: n - 1),
            "one byte more": size(lambda n: n + 1),
            "twice": lambda content: content * 2,
            "half as many": size(lambda n: 1024 + (n - 1024) // 2),
            "zeros": raw(bytes(2000)),
            "another byte order": lambda content: content[3::-1] + content[4:],
        }.items()
    ),
    ("llmc", "model.bin", "zip", raw(zipped()), "pickle"),
    ("llmc", "model.bin", "pickle", raw(pickle.dumps({"a": [1.0] * 999})), "pickle"),
    ("llmc", "model.bin", "safetensors", raw(joined(b"{}", bytes(2000))), "starts with"),
    ("llmc_bf16", "model.bin", "fp32", at(4, 3), ""),
    *(
        ("llama2c", "model.bin", f"{field} {value}", at(4 * place, value), "")
        for place, field, values in [
            (0, "dim", (0, -1, 7, 16, 2**31 - 2, 20240326)),
            (1, "hidden_dim", (0, -1, 7, 2**31 - 1)),
            (2, "n_layers", (0, -1, 3, 10_000, 2**31 - 1)),
            (3, "n_heads", (0, -1, 1, 3, 2**31 - 1)),
            (4, "n_kv_heads", (0, -1, 3, 4)),
            (5, "vocab_size", (0, 262, -263, 2**31 - 1, -(2**31))),
            (6, "max_seq_len", (0, -1, 5, 2**31 - 1)),
        ]
        for value in values
    ),
    *(
        ("llama2c", "model.bin", what, change, "")
        for what, change in {
            "nothing": raw(b""),
            "half a header": size(lambda n: 14),
            "a header": size(lambda n: 28),
            "one byte short": size(lambda n: n - 1),
            "one byte more": size(lambda n: n + 1),
            "another version": lambda content: b"24ka\2\0\0\0" + content,
            "the magic number alone": raw(b"24ka"),
        }.items()
    ),
    *(
        ("llmc_tokenizer", "tokenizer.bin", f"{field} {value}", at(4 * place, value), "")
        for place, field, values in [
            (0, "magic", (0, 20240326, 20240520)),
            (1, "version", (0, 1, 3, -1, 2**31 - 1)),
            (2, "tokens", (0, -1, 1, 261, 263, 2**31 - 1)),
            (3, "eot_token", (-1, 0, 262, 2**31 - 1)),
        ]
        for value in values
    ),
    ("llmc_tokenizer", "tokenizer.bin", "nothing", raw(b""), ""),
    ("llmc_tokenizer", "tokenizer.bin", "a header", size(lambda n: 1024), ""),
    ("llmc_tokenizer", "tokenizer.bin", "one byte short", size(lambda n: n - 1), ""),
    ("llmc_tokenizer", "tokenizer.bin", "one byte more", size(lambda n: n + 1), ""),
    ("llmc_tokenizer", "tokenizer.bin", "an empty token", at(1024, 0, 1), "token 0"),
    ("llmc_tokenizer", "tokenizer.bin", "a long token", at(1024, 255, 1), ""),
    ("llmc_tokenizer", "tokenizer.bin", "a token twice", at(1025, ord("B"), 1), "b'B'"),
    ("llmc_tokenizer", "tokenizer.bin", "another end", swap("endof", "ENDOF"), "eot_token"),
    ("shards", "train_000002.bin", "one byte short", size(lambda n: n - 1), ""),
    ("shards", "train_000002.bin", "token 262", at(-2, 262, 2), "262"),
    ("nanogpt", "train.bin", "nothing", raw(b""), ""),
    ("nanogpt", "train.bin", "half a token", size(lambda n: n + 1), ""),
    ("nanogpt", "train.bin", "a header", at(0, 20240520), "header"),
    *(("sharded", INDEX, what, change, "") for what, change in NO_JSON.items()),
    *(("sharded", INDEX, f"a file {place!r}", placed(place), "ln_f.bias") for place in PLACES),
    *(
        ("sharded", INDEX, f"weight_map {value!r}", entries(weight_map=value), "")
        for value in ([], {}, "x", 1, None, [["ln_f.bias", PART]])
    ),
    ("sharded", INDEX, "another file's tensor", placed(PART.replace("1-", "2-")), "ln_f.bias"),
    (
        "sharded",
        INDEX,
        "a name twice",
        swap('"weight_map": {', '"weight_map": {"ln_f.bias": "x",'),
        "ln_f",
    ),
    ("sharded", INDEX, "a name nobody knows", swap('"ln_f.bias"', '"ln_f.bier"'), "ln_f"),
    ("sharded", PART, "nothing", raw(b""), ""),
    ("sharded", PART, "cut", size(lambda n: n - 1), ""),
    ("sharded", PART, "a name nobody knows", header(swap("ln_f.bias", "ln_f.bier")), "ln_f"),
    *(("one_tokenizer", ONE_FILE, what, change, "") for what, change in NO_JSON.items()),
    *(
        ("one_tokenizer", ONE_FILE, f"{name} {value!r}", inside("model", **{name: value}), "")
        for name, values in {
            "type": ["WordPiece", 1, []],
            "dropout": [0.1, "x"],
            "vocab": [[], {}, None, {"a": 0}, 1],
            "merges": [
                {},
                None,
                "a b",
                [[]],
                [["a"]],
                [["a", "b", "c"]],
                [1],
                ["a"],
                [["t", 1]],
                [],
            ],
            "continuing_subword_prefix": ["##"],
            "end_of_word_suffix": ["</w>"],
            "byte_fallback": [True],
            "ignore_merges": ["x"],
        }.items()
        for value in values
    ),
    *(
        ("one_tokenizer", ONE_FILE, f"{name} {value!r}", entries(**{name: value}), "")
        for name, values in {
            "model": [[], None, "BPE", {}],
            "normalizer": [{"type": "Lowercase"}, []],
            "pre_tokenizer": [{"type": "Whitespace"}, None, 1],
            "added_tokens": [[1], [{"id": 0, "content": "<|endoftext|>"}], "x"],
        }.items()
        for value in values
    ),
    *(("run", "run/run.json", what, change, "run.json") for what, change in NO_JSON.items()),
    *(("run", STATE, what, change, "state.json") for what, change in NO_JSON.items()),
    *(
        ("run", "run/run.json", f"{name} {value!r}", entries(**{name: value}), "")
        for name, values in {
            "version": [0, 2, -1, "1", True, None, 2**63],
            "settings": [[], {}, None, 1, {"n_layer": 10**9}],
            "config": [[], {}, None, {"n_embd": 2**40}, {"n_layer": 10**9}],
            "data": [[], None, "x", {}],
        }.items()
        for value in values
    ),
    *(
        ("mended", STATE, f"{name} {value!r}", entries(**{name: value}), "state.json")
        for name, values in {
            "version": [0, 2, "1", None],
            "state": [[], {}, None, {"step": -1}, {"step": 2**63}, {"step": True}, {"step": 3}],
            "files": [[], {}, None, 1, {"../run.json": 1}, {"/etc/passwd": 1}, {"no": 1}, {"": 1}],
        }.items()
        for value in values
    ),
    *(
        (reader, f"run/checkpoints/00000002/{name}", what, change, "")
        for reader in ("run", "mended")
        for name in ("model.safetensors", "trainer.safetensors")
        for what, change in {
            "nothing": raw(b""),
            "cut": size(lambda n: n - 1),
            "more": size(lambda n: n + 1),
            "zip": raw(zipped()),
            "size 2^63": at(0, 2**63, 8),
        }.items()
    ),
    ("mended", MOMENTS, "another name", header(swap('"m"', '"w"')), "trainer.safetensors"),
    ("mended", MOMENTS, "a third", header(swap('"m":', THIRD + '"m":')), "trainer"),
    ("mended", MOMENTS, "another dtype", header(lambda h: h.replace(b"F32", b"I32")), "trainer"),
    ("text", "text.txt", "not UTF-8", raw(b"a\xff"), "UTF-8"),
    ("texts", "text.txt", "not UTF-8", raw(b"a\xff"), "UTF-8"),
    ("text", "text.txt", "half a character", raw("é".encode()[:1]), "UTF-8"),
]


def test_corpus_has_over_200_different_files() -> None:
    names = [entry[:3] for entry in CORPUS]
    assert len(set(names)) == len(names) > 200


@pytest.mark.parametrize(
    ("reader", "name", "what", "change", "said"),
    [pytest.param(*entry, id=": ".join(entry[:3])) for entry in CORPUS],
)
def test_bad_file_is_refused(
    reader: str, name: str, what: str, change: Change, said: str, goods: Any, tmp_path: Path
) -> None:
    directory = goods(reader, tmp_path)
    path = directory / name
    good = path.read_bytes()
    bad = change(good)
    assert bad != good
    path.write_bytes(bad)
    with limits(), pytest.raises((ValueError, OSError)) as error:
        READERS[reader].read(directory)
    message = str(error.value)
    assert any(file.name in message for file in directory.rglob("*.*")), message
    assert said in message and len(message) < 1000, message


# ---- pipes, devices and loops --------------------------------------------------------------------

EMPTY = {"recipe.toml", "metrics.jsonl"}  # which may be empty
PIPES = {"text", "texts", "questions"}  # a shell's <(zcat book.gz) waits for its writer


def loop(path: Path) -> None:
    path.symlink_to(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def locked(path: Path) -> None:
    path.touch(mode=0)


THINGS = [Path.mkdir, os.mkfifo, loop, endless, nowhere, locked, Path.touch]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("put", THINGS, ids=lambda put: put.__name__)
def test_pipe_device_or_loop_in_place_of_a_file_is_refused(
    put: Callable[[Path], None], reader: str, goods: Any, tmp_path: Path
) -> None:
    if put is locked and os.geteuid() == 0:
        pytest.skip("no file is locked for root")
    if put is os.mkfifo and reader in PIPES:
        pytest.skip("it may be a pipe, and waits for who writes to it")
    for name in READERS[reader].spoilable(goods(reader, tmp_path / "good")):
        directory = goods(reader, tmp_path / name)
        path = directory / name
        path.unlink()
        put(path)
        with limits():
            outcome = attempt(READERS[reader], directory)
        fine = name in READERS[reader].optional or (put is Path.touch and name in EMPTY)
        assert outcome == "refused" or fine, name


def test_index_leads_to_no_file_outside(goods: Any, tmp_path: Path) -> None:
    directory = goods("sharded", tmp_path)
    (directory / PART).rename(tmp_path / "elsewhere")
    (directory / PART).symlink_to(tmp_path / "elsewhere")
    with pytest.raises((ValueError, OSError), match=PART):
        READERS["sharded"].read(directory)


# ---- by mutation ---------------------------------------------------------------------------------

INPUTS = 100  # of each reader, always the same


@pytest.mark.parametrize("part", range(4))
@pytest.mark.slow
def test_mutated_files_raise_value_error_or_os_error_only(part: int, tmp_path: Path) -> None:
    """Every fourth reader, so that a few tests share the imports and can share the cores."""
    for reader, counts, findings in fuzz.start_rounds([*READERS][part::4], 1, INPUTS, tmp_path):
        texts = [path.read_text()[-2000:] for path in tmp_path.glob("*/finding.txt")]
        assert not findings, "\n".join([reader, *findings, *texts])
        assert counts["read"] and counts["read"] + counts["refused"] == counts["inputs"] >= INPUTS
