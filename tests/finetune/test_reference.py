"""The file of the reference's log-probabilities: interrupted, resumed, of other data or models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from gpt2c import GPT2, GPT2Config
from gpt2c.finetune.completions import log_probabilities
from gpt2c.finetune.reference import reference_of
from gpt2c.text.examples import Example, divided

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=61, n_positions=24)
Batches = Sequence[Sequence[Example]]
MOST = 55  # tokens of a batch: there are 3


@pytest.fixture
def batches() -> Batches:
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.integers(4, 24, 12):
        learned = np.arange(length) >= length // 2
        examples.append(Example(rng.integers(0, 61, length).astype(np.int32), learned, ""))
    return list(divided(examples, MOST))


KEY = {"examples": "1f", "base": "2e"}


class Asked:
    """Computes a reference, and notes how many batches were computed."""

    def __init__(self, path: Path) -> None:
        self.path, self.computed = path, 0

    def __call__(
        self,
        model: Any,
        batches: Batches,
        untrained: bool = True,
        most: int = 99,
        key: dict[str, str] = KEY,
    ) -> Any:
        self.computed = 0

        def check() -> None:
            if self.computed == most:
                raise KeyboardInterrupt
            self.computed += 1

        examples = [one for batch in batches for one in batch]
        return reference_of(model, examples, MOST, self.path, key, untrained, check)


def whole(model: Any, batches: Batches) -> Any:
    return np.concatenate([log_probabilities(model, batch) for batch in batches])


def test_a_reference_is_computed_once(tmp_path: Path, batches: Batches) -> None:
    model, ask = GPT2(CONFIG), Asked(tmp_path / "reference.jsonl")
    expected = whole(model, batches)
    assert np.array_equal(ask(model, batches), expected) and ask.computed == 3
    assert np.array_equal(ask(model, batches), expected) and ask.computed == 0
    trained = GPT2(CONFIG, seed=2)
    assert np.array_equal(ask(trained, batches, untrained=False), expected) and ask.computed == 0


@pytest.mark.parametrize("torn", [b"", b"-3.", b"-3.5\n", b"[-3.5]\n", b"\0" * 40, b"null\n"])
def test_a_killed_computation_goes_on(tmp_path: Path, batches: Batches, torn: bytes) -> None:
    model, ask = GPT2(CONFIG), Asked(tmp_path / "reference.jsonl")
    with pytest.raises(KeyboardInterrupt):
        ask(model, batches, most=1)
    with open(ask.path, "ab") as file:
        file.write(torn)
    assert np.array_equal(ask(model, batches), whole(model, batches))
    assert ask.computed == 2
    assert np.array_equal(ask(model, batches), whole(model, batches)) and ask.computed == 0


@pytest.mark.parametrize("change", ["examples", "base"])
def test_another_key_is_computed_again(tmp_path: Path, batches: Batches, change: str) -> None:
    model, ask = GPT2(CONFIG), Asked(tmp_path / "reference.jsonl")
    ask(model, batches)
    other = KEY | {change: "3d"}
    assert "lacks log-probabilities" in refused(ask, model, batches, False, key=other)
    model.parameters["h.0.mlp.c_fc.bias"][3] += 1
    assert np.array_equal(ask(model, batches, key=other), whole(model, batches))
    assert ask.computed == 3


@pytest.mark.parametrize("content", [None, b"", b"{}\n", b"[1]\n", b"\xff\n\n\n\n"])
def test_a_trained_model_is_no_reference(
    tmp_path: Path, batches: Batches, content: bytes | None
) -> None:
    ask = Asked(tmp_path / "reference.jsonl")
    if content is not None:
        ask.path.write_bytes(content)
    assert "begin the run again" in refused(ask, GPT2(CONFIG), batches, False)
    assert (ask.path.read_bytes() if ask.path.exists() else None) == content


def test_a_lost_model_is_no_reference(tmp_path: Path, batches: Batches) -> None:
    model, ask = GPT2(CONFIG), Asked(tmp_path / "reference.jsonl")
    model.parameters["ln_f.weight"][0] = np.nan
    assert "not finite" in refused(ask, model, batches)
