"""Buckets: every gradient is in one, in the order in which backward finishes them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import gpt2c
from gpt2c.parallel.gradients import Bucket, buckets

IDX = np.arange(24).reshape(2, 12)


def models() -> dict[str, Any]:
    """Return models whose gradients lie and end differently: tied, untied, frozen, adapted."""
    config = gpt2c.GPT2Config(n_layer=3, n_head=2, n_embd=16, n_positions=16, vocab_size=64)
    llama = gpt2c.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    found = {"tied": gpt2c.GPT2(config), "untied": gpt2c.Llama(llama)}
    found |= {"frozen": gpt2c.GPT2(config), "adapted": gpt2c.GPT2(config)}
    found["frozen"].freeze("w[tp]e.*", "h.0.*")
    found["adapted"].add_lora(r=2)
    return found


@pytest.fixture(params=["tied", "untied", "frozen", "adapted"])
def model(request: pytest.FixtureRequest) -> Any:
    return models()[request.param]


def test_backward_tells_each_gradient_once_when_it_is_final(model: Any) -> None:
    told: dict[str, Any] = {}

    def final(names: Any) -> None:
        for name in set(names) & model.gradients.keys():
            assert name not in told
            told[name] = model.gradients[name].copy()

    for scale in (0.25, 0.75):  # the second adds to the first
        told.clear()
        model.loss(IDX[:, :-1], IDX[:, 1:])
        model.backward(scale, final=final)
        assert told.keys() == model.gradients.keys()
        for name, gradient in model.gradients.items():
            np.testing.assert_array_equal(told[name], gradient, err_msg=name)
    first, *_, last = told
    assert not first.startswith("h.0") and not last.startswith("h.2")


@pytest.mark.parametrize("most", [64, 1000, 10**6])
def test_buckets_have_every_float_once_and_none_is_long(model: Any, most: int) -> None:
    found = buckets(model.final_order, model.trained_slices, most)
    ends = sorted((one.start, one.end) for one in found)
    assert ends[0][0] == 0 and ends[-1][1] == model.trained_size
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    assert all(one.end - one.start <= most for one in found)
    for one in found:
        inside = {
            name
            for name, own in model.trained_slices.items()
            if own.start < one.end and one.start < own.stop
        }
        assert inside <= one.names


def test_buckets_stand_in_the_order_of_backward(model: Any) -> None:
    groups = [set(names) for names in model.final_order]
    when = {name: number for number, names in enumerate(groups) for name in names}
    found = buckets(model.final_order, model.trained_slices, 1000)
    ready = [max(when[name] for name in one.names) for one in found]
    assert ready == sorted(ready)
    assert len(set(ready)) > 1  # so that some are sent before the end


def test_pieces_of_ranks_are_a_bucket() -> None:
    for size in (1, 2, 3, 7):
        for end in (16, 32, 160, 1600):
            pieces = Bucket(32, 32 + end, frozenset()).pieces(size)
            assert len(pieces) == size
            assert (pieces[0].start, pieces[-1].stop) == (32, 32 + end)
            for piece, after in pairwise(pieces):
                assert piece.stop == after.start and piece.stop % 16 == 0
            lengths = [piece.stop - piece.start for piece in pieces]
            assert max(lengths) - min(lengths) <= 16
