"""Weights on their way from other ranks: whoever reads them waits for them, forward layer by layer.

A stand-in for the exchange of ranks fills the weights with NaN until they are asked for.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2c
from gpt2c.evaluate.scoring import Scorer
from gpt2c.files.tensors import read_tensors

IDX = np.arange(24).reshape(2, 12)
SHAPE = gpt2c.GPT2Config(n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=64)
LLAMA = gpt2c.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
)  # fmt: skip


class Late:
    """Sends a model's weights away: each comes back when it is asked for."""

    def __init__(self, model: gpt2c.GPT2 | gpt2c.Llama) -> None:
        self._away: dict[str, Any] = {}
        self.asked: list[tuple[str, ...]] = []
        model.expect(self.arrive)
        self.send(model)

    def send(self, model: Any) -> None:
        self._places = model.parameters
        self._away = {name: array.copy() for name, array in self._places.items()}
        for array in self._places.values():
            array.fill(np.nan)
        self.asked.clear()

    def arrive(self, names: Iterable[str]) -> None:
        self.asked.append(tuple(names))
        for name in self._away.keys() & {*self.asked[-1]}:
            self._places[name][...] = self._away.pop(name)


def make(kind: str = "tied", **given: Any) -> Any:
    if kind == "untied":
        return gpt2c.Llama(LLAMA, seed=1, **given)
    model = gpt2c.GPT2(SHAPE, seed=1, **given)
    if kind == "adapted":
        model.add_lora(r=2)
    if kind == "frozen":
        model.freeze("w[tp]e.*", "h.0.*")
    return model


def learned(model: Any) -> list[Any]:
    loss = model.loss(IDX[:, :-1], IDX[:, 1:])
    model.backward()
    return [loss, model.flat_gradients.copy()]


@pytest.mark.parametrize("kind", ["tied", "untied", "adapted", "frozen"])
@pytest.mark.parametrize(
    "given",
    [{}, {"recompute": "full"}, {"precision": "bf16"}, {"backend": "numpy"}],
    ids=lambda given: "".join(given) or "plain",
)
def test_each_layer_waits_for_its_weights_in_the_order_of_forward(
    kind: str, given: dict[str, Any]
) -> None:
    expected = learned(make(kind, **given))
    late = Late(model := make(kind, **given))
    loss = model.loss(IDX[:, :-1], IDX[:, 1:])
    assert late.asked == [*reversed(model.final_order)]  # no other reader was before them
    assert not late._away
    model.backward()
    for found, wanted in zip([loss, model.flat_gradients], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def saved(model: Any, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path)
    return [np.asarray(one) for one in read_tensors(tmp_path / "model.safetensors")[0].values()]


def stepped(model: Any, optimizer: Any) -> Any:
    optimizer.step(0.1)
    return model.flat_parameters.copy()


def adapted(model: Any) -> Any:
    model.add_lora(r=2)
    return model.flat_parameters.copy()


def frozen(model: Any) -> Any:
    model.freeze("wte.*")
    return [*model.parameters.values()]


def engine(model: Any) -> Any:
    with gpt2c.Engine(model, slots=1) as one:
        return one.submit([1, 2], max_new_tokens=4, temperature=0).result()


DOORS: dict[str, Callable[[Any], Any]] = {
    "parameters": lambda model: [*model.parameters.values()],
    "flat parameters": lambda model: model.flat_parameters.copy(),
    "logits": lambda model: model(IDX),
    "hidden states": lambda model: model(IDX, hidden_states=True),
    "a loss to look at": lambda model: model.loss(IDX, IDX, keep=False),
    "losses": lambda model: model.losses(IDX, IDX),
    "hidden": lambda model: model.hidden(IDX),
    "logits of rows": lambda model: model.logits(np.ones((2, 32), np.float32)),
    "trace": lambda model: model.trace(IDX).lens("encoded"),
    "mean loss": lambda model: model.mean_loss(IDX, IDX),
    "logprobs": lambda model: model.logprobs(IDX),
    "vectors": lambda model: model.embed(IDX),
    "texts": lambda model: model.generate(IDX[:, :3], 5, seed=1),
    "engine": engine,
    "quantize": lambda model: [*model.quantize("int8").parameters.values()],
    "copy": lambda model: copy.copy(model).flat_parameters,
    "deep copy": lambda model: copy.deepcopy(model).flat_parameters,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).flat_parameters,
    "adapters": adapted,
    "freeze": frozen,
    "loss and backward": learned,
}


def same(found: Any, expected: Any) -> None:
    if isinstance(found, list | tuple):
        for pair in zip(found, expected, strict=True):
            same(*pair)
    else:
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", DOORS)
def test_every_reader_gets_whole_weights(name: str) -> None:
    expected = DOORS[name](make())
    late = Late(model := make())
    same(DOORS[name](model), expected)
    assert not late._away and late.asked


def test_other_readers_get_whole_weights(tmp_path: Path) -> None:
    for read in (lambda model: saved(model, tmp_path), scored):
        expected = read(make())
        Late(model := make())
        same(read(model), expected)
    expected = make("adapted").merge().flat_parameters
    Late(model := make("adapted"))
    same(model.merge().flat_parameters, expected)
    tensors = dict(make().parameters)
    Late(model := make())
    model.load_parameters(tensors, "another model")
    same([*model.parameters.values()], [*tensors.values()])


def scored(model: Any) -> Any:
    return Scorer(model)(np.arange(8, dtype=np.int32), 2)[0]


def test_optimizer_gets_whole_weights() -> None:
    model, late_model = make(), make()
    optimizers = [gpt2c.AdamW(one) for one in (model, late_model)]
    late = Late(late_model)
    for one in (model, late_model):
        learned(one)
    for _ in range(2):  # the second one without a forward pass
        late.send(late_model)
        assert optimizers[1].not_finite() == ""
        late.send(late_model)
        same(stepped(late_model, optimizers[1]), stepped(model, optimizers[0]))


def test_backward_gets_whole_weights_that_left_after_the_loss() -> None:
    expected = learned(make())[1]
    late = Late(model := make())
    model.loss(IDX[:, :-1], IDX[:, 1:])
    late.send(model)
    model.backward()
    same(model.flat_gradients, expected)


def test_a_copy_waits_for_nobody() -> None:
    late = Late(model := make())
    own = copy.copy(model)
    late.send(model)
    own(IDX)
    assert not late.asked
