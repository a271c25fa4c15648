"""A tiny base model; no run draws its loss."""

from __future__ import annotations

from pathlib import Path

import pytest

import gpt2c
from gpt2c.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2c.train.loop.plot_loss", lambda *_: False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a model with random weights, of bytes."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.from_name("bytes")
    config = gpt2c.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=48, vocab_size=257, eos_token_id=tokenizer.eot
    )
    gpt2c.GPT2(config, seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
