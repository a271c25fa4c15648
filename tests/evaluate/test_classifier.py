"""Classifier: texts that are read together, cut texts, and models without labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from gpt2c import GPT2, GPT2Config, Tokenizer
from gpt2c.evaluate.classifier import Classifier, encode, scores, softmax

CONFIG = GPT2Config(257, 12, 32, 1, 2, eos_token_id=256, num_labels=3, id2label=("a", "b", "c"))
BYTES = Tokenizer.from_name("bytes")
TEXTS = ["hello", "x", "as long as the context", "hello again", "as long as the others"]


def test_texts_do_not_depend_on_each_other() -> None:
    model = GPT2(dataclasses.replace(CONFIG, initializer_range=0.3), seed=2)
    found = Classifier(model, BYTES).probabilities(TEXTS)
    assert found.shape == (5, 3) and np.allclose(found.sum(1), 1)
    for text, p in zip(TEXTS, found, strict=True):
        row = [256, *text.encode()][:12]
        assert np.allclose(p, softmax(model.scores([row], keep=False))[0], rtol=1e-5)
    assert np.array_equal(found[2], found[4])  # their beginnings are the same
    rows, read = [[256, *text.encode()][:12] for text in TEXTS], []
    parted = scores(model, rows, batch_tokens=8, check=lambda: read.append(1))
    assert np.allclose(softmax(parted), found, rtol=1e-5) and len(read) == 4
    assert Classifier(model, BYTES).predict(TEXTS) == ["abc"[k] for k in found.argmax(1)]


def test_softmax_of_large_scores() -> None:
    assert softmax(np.array([[1000.0, 1000.0, -1000.0]], np.float32)).tolist() == [[0.5, 0.5, 0]]


def test_text_begins_as_the_model_knows_it() -> None:
    assert encode("hi", BYTES, CONFIG) == [256, *b"hi"]
    assert encode("", BYTES, dataclasses.replace(CONFIG, eos_token_id=None)) == [256]
    assert encode("hi", BYTES, dataclasses.replace(CONFIG, eos_token_id=7)) == [7, *b"hi"]


@pytest.mark.parametrize("quantize", [None, "int8", "fp16"])
def test_classifier_comes_from_its_files(quantize: str | None, tmp_path: Path) -> None:
    model = GPT2(CONFIG)
    model.save_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    found = Classifier.from_pretrained(tmp_path, quantize=quantize)
    assert found.labels == ("a", "b", "c")
    expected = Classifier(model, BYTES).probabilities(TEXTS)
    assert np.allclose(found.probabilities(TEXTS), expected, atol=0 if quantize is None else 0.01)


def test_what_is_no_classifier_is_refused() -> None:
    for K, has in ((None, "logits of tokens"), (1, "one score, as a reward model has")):
        config = dataclasses.replace(CONFIG, num_labels=K, id2label=None)
        said = refused(Classifier, GPT2(config), BYTES)
        assert said == f"a classifier has at least 2 labels, and this model has {has}"
    small = GPT2(dataclasses.replace(CONFIG, vocab_size=250, eos_token_id=3))
    assert "they do not belong together" in refused(Classifier, small, BYTES)
    said = refused(Classifier(GPT2(CONFIG), BYTES).probabilities, ["a", ""])
    assert said == "text 2 of 2 is empty, so it has no label"
