"""Finding a model: what a path is, and that each file is read once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import program, run_process

import gpt2c
from gpt2c.formats import llama2c, llmc
from gpt2c.formats.load import model_kind

GPT2 = gpt2c.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=3)
LLAMA = gpt2c.LlamaConfig(
    vocab_size=11,
    max_position_embeddings=8,
    hidden_size=12,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=3,
    rms_norm_eps=1e-5,
)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("end", [None, 3])
def test_each_json_file_of_a_model_is_opened_once(
    tmp_path: Path, weights: str, end: int | None
) -> None:
    model = gpt2c.GPT2(GPT2, seed=1)
    (model if weights == "fp32" else model.quantize(weights)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": end}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_process(program("programs.opens", "count", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    opened = dict(line.split() for line in done.stdout.splitlines())
    assert opened.pop("model.safetensors") and opened == {
        "config.json": "1",
        "generation_config.json": "1",
    }


def test_model_kind_tells_every_format(tmp_path: Path) -> None:
    gpt2, llama = gpt2c.GPT2(GPT2, seed=1), gpt2c.Llama(LLAMA, seed=1)
    gpt2.save_pretrained(tmp_path / "directory")
    llmc.write_model(tmp_path / "gpt2.bin", GPT2, gpt2.parameters)
    gpt2.add_lora(2)
    gpt2.save_pretrained(tmp_path / "adapters")
    llama2c.write_model(tmp_path / "llama.bin", LLAMA, llama.parameters)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "ckpt.pt").write_bytes(b"\x80\x02")
    kinds = {path.name: model_kind(path) for path in tmp_path.iterdir()}
    assert kinds == {
        "directory": "huggingface",
        "adapters": "adapters",
        "gpt2.bin": "llm.c",
        "llama.bin": "llama2.c",
        "ckpt.pt": "llm.c",  # whose reader refuses it
        "empty": None,
        "notes.txt": None,
    }
    assert model_kind(tmp_path / "directory" / "model.safetensors") == "huggingface"
    assert model_kind(tmp_path / "none.safetensors") is None
