"""The data of a method: token files as examples, beside files of records."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOCUMENTS, refused
from helpers.tuning import losses, resumes_to_the_bit

import gpt2c
from gpt2c.finetune import sft
from gpt2c.finetune.data import Windows
from gpt2c.text.prepare import prepare
from gpt2c.text.shards import open_tokens, read_shards, write_tokens
from gpt2c.text.tokenizer import Tokenizer

QUICK: dict[str, Any] = {
    "learning_rate": 0.01, "max_iters": 6, "eval_interval": 3, "batch_size": 4, "max_length": 32,
    "backend": "base",
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_windows_learn_every_token_of_a_file_but_its_first_once(tmp_path: Path, size: int) -> None:
    shards = []
    for number, count in enumerate((17, 1, 2, 30)):
        write_tokens(tmp_path / f"{number}.bin", np.arange(count) + 100 * number)
        shards.append(open_tokens(tmp_path / f"{number}.bin"))
    windows = Windows(shards, size)
    every = list(windows)
    assert len(windows) == len(every) and windows[-1].ids[-1] == 329
    assert all(2 <= len(one.ids) <= size + 1 for one in every)
    learned = np.concatenate([one.ids[one.learned] for one in every])
    wanted = [token for shard in shards for token in shard[1:].tolist()]
    assert learned.tolist() == wanted and windows.targets == len(wanted)
    assert [one.where for one in windows[1:3]] == [every[1].where, every[2].where]
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_tokens_go_on_with_the_pretraining(base: Path, data: Path, tmp_path: Path) -> None:
    result = sft(base, data, tmp_path / "run", **QUICK)
    model, (val,) = gpt2c.from_pretrained(base, "base"), read_shards(data, "val")
    ids = [val[start : start + 33] for start in range(0, len(val) - 1, 32)]
    loss = model.loss([one[:-1] for one in ids], [one[1:] for one in ids], keep=False)
    assert result.before["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert "val_exact_match" not in result.after
    assert result.after["val_loss"] < result.before["val_loss"]
    assert losses(tmp_path / "run")[0]["tokens"] <= 4 * 32


def test_killed_run_on_tokens_goes_on_to_the_bit(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = partial(sft, base, data)

    def run(out: Path, resume: bool = False, **others: Any) -> Any:
        return tune(out, resume=resume, **({} if resume else QUICK | others))

    resumes_to_the_bit(run, tmp_path / "whole", tmp_path / "parts", monkeypatch, 3)


def test_tokens_that_do_not_fit_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    prepare(DOCUMENTS, tmp_path / "merged", "bpe:260")
    said = refused(lambda: sft(base, tmp_path / "merged", out, **QUICK))
    assert "outside a vocabulary of 257; is it another tokenizer's?" in said
    with pytest.raises(FileNotFoundError, match="make it with `gpt2c prepare`"):
        sft(base, base, out, **QUICK)
    bare = tmp_path / "bare"  # llm.c's files have no manifest
    bare.mkdir()
    for split in ("train", "val"):
        write_tokens(bare / f"{split}.bin", [1])
    said = refused(lambda: sft(base, bare, out, **QUICK))
    assert "1 token for training are too few: 2 in a file are needed" in said
    assert not out.exists()
    sft(base, data, out, **QUICK | {"max_iters": 1})
    prepare(DOCUMENTS[:20], tmp_path / "others", "bytes")
    said = refused(lambda: sft(base, tmp_path / "others", out, resume=True))
    assert "the examples are not those of the run" in said
    assert Tokenizer.from_pretrained(out).fingerprint == Tokenizer.from_name("bytes").fingerprint
