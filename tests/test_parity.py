"""PyTorch and transformers compute the same: logits, losses, gradients, ten steps, texts, each op.

All weights are random, also biases and layernorms. Errors are max|a - b| / max|b| over a tensor.
Both sides compute in float32 and round differently, by 6e-8 at each of thousands of operations.
"""

from __future__ import annotations

import collections
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.cases import small_shape

from gpt2c import GPT2, AdamW, Dropout, GPT2Config, Llama, Tokenizer, from_pretrained, ops
from gpt2c.bench.worker import TINY, Worker
from gpt2c.evaluate.classifier import Classifier, encode
from gpt2c.evaluate.metrics import compare
from gpt2c.finetune import prune
from gpt2c.finetune.classify import class_weights, classify, weighted_cross_entropy
from gpt2c.finetune.distill import divergence
from gpt2c.finetune.policy import (
    LOSS_TYPES,
    PolicyLoss,
    PolicyObjective,
    TokenFacts,
    token_factors,
)
from gpt2c.finetune.preference import PairLoss, bradley_terry, kto, reference_point
from gpt2c.formats.llama_layout import LLAMA
from gpt2c.formats.load import find_model
from gpt2c.formats.peft import PARTS
from gpt2c.generate.sampling import GenerationConfig, distribution, penalised
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.cases import OPS, normalised_error
from gpt2c.kernels.reference.dropout import keep_factors
from gpt2c.model.gpt2 import ARITHMETIC
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.rope_scaling import RopeScaling
from gpt2c.text.chat import CHAT_TEMPLATE, Message, encode_chat
from gpt2c.text.splits import DIGITS, LLAMA3, QWEN2, REGEXES, Split
from gpt2c.text.splits import GPT2 as GPT2_SPLIT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they are not ours
    torch = pytest.importorskip("torch", reason="PyTorch is not installed, nor is it needed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import tokenizers
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{category}:{package}")
    for category in ("DeprecationWarning", "FutureWarning")
    for package in ("torch", "transformers")
]

LOGITS, GRADIENT, STEP, OP = 1e-5, 1e-4, 1e-4, 1e-5  # largest errors allowed
IGNORED = -100  # PyTorch's; gpt2c's is -1

SMALL = GPT2Config(vocab_size=97, n_positions=29, n_embd=30, n_layer=3, n_head=3, n_inner=71)
ODD = GPT2Config(vocab_size=101, n_positions=64, n_embd=84, n_layer=2, n_head=7)
GPT2_124M = GPT2Config()

# Conv1D keeps (C, OC), gpt2c (OC, C)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

Batch = tuple[np.ndarray, np.ndarray]


def torch_model(config: GPT2Config, seed: int = 0) -> Any:
    """Return a GPT-2 of transformers without dropout, with random parameters."""
    entries = {
        **{name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd")},
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_inner")},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    }
    settings = transformers.GPT2Config(**entries, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(settings).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "ln_" in name:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * (0.05 if parameter.ndim == 2 else 0.1))
    return model


def batch_of(config: GPT2Config, B: int, T: int, seed: int = 0) -> Batch:
    """Return token ids and targets, about a tenth of which are ignored."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (B, T + 1))
    return ids[:, :-1], np.where(rng.random((B, T)) < 0.1, -1, ids[:, 1:])


def torch_loss(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Return logits and loss."""
    idx, targets = batch
    logits = model(torch.tensor(idx)).logits
    labels = torch.tensor(np.where(targets == -1, IGNORED, targets))
    return logits, torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )


def named(tensors: Any) -> dict[str, np.ndarray]:
    """Return tensors under gpt2c's names and in its layout."""
    return {
        name.removeprefix("transformer."): tensor.detach().numpy().T
        if name.endswith(TRANSPOSED)
        else tensor.detach().numpy()
        for name, tensor in tensors
    }


def assert_close(name: str, actual: Any, expected: Any, bound: float) -> None:
    error = normalised_error(actual, expected)
    assert error <= bound, f"{name}: error {error:.1e}, allowed is {bound:.0e}"


@dataclass
class Pair:
    """One model on both sides."""

    torch: Any
    gpt2c: GPT2

    def check_gradients(self, batch: Batch) -> None:
        """Compare logits, loss and every gradient of a batch."""
        logits, loss = torch_loss(self.torch, batch)
        assert_close("logits", self.gpt2c(batch[0]), logits.detach().numpy(), LOGITS)
        self.torch.zero_grad()
        loss.backward()
        self.gpt2c.zero_grad()
        assert self.gpt2c.loss(*batch) == pytest.approx(loss.item(), rel=LOGITS)
        self.gpt2c.backward()
        expected = named((n, p.grad) for n, p in self.torch.named_parameters())
        assert self.gpt2c.gradients.keys() == expected.keys()
        for name, gradient in self.gpt2c.gradients.items():
            assert_close(f"gradient of {name}", gradient, expected[name], GRADIENT)

    def check_steps(self, batches: list[Batch]) -> None:
        """Compare the losses and gradient norms of steps of AdamW on the same batches."""
        parameters = list(self.torch.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        rate, betas = 1e-3, (0.9, 0.95)
        theirs = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8)
        ours = AdamW(self.gpt2c, rate, betas, eps=1e-8, weight_decay=0.1)
        for step, batch in enumerate(batches):
            theirs.zero_grad()
            loss = torch_loss(self.torch, batch)[1]
            loss.backward()
            # clip_grad_norm_ sums in float32; at 124M its norm is wrong by 1e-4 and more
            norm = sum(p.grad.double().square().sum().item() for p in parameters) ** 0.5
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            theirs.step()
            self.gpt2c.zero_grad()
            own_loss = self.gpt2c.loss(*batch)
            self.gpt2c.backward()
            own_norm = ours.step(grad_clip=1.0)
            assert_close(f"loss of step {step}", own_loss, loss.item(), STEP)
            assert_close(f"gradient norm of step {step}", own_norm, norm, STEP)


def pair(config: GPT2Config, backend: str) -> Pair:
    """Make a model in transformers, save it, and load it here."""
    model = torch_model(config)
    with tempfile.TemporaryDirectory() as directory:  # not pytest's, which stays: 0.5 GB
        model.save_pretrained(directory)
        own = GPT2.from_pretrained(directory, backend=backend)
    return Pair(model, own)


# ---- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_small_models_agree(config: GPT2Config, backend_name: str) -> None:
    both = pair(config, backend_name)
    assert both.gpt2c.config.to_dict() | {"n_inner": 0} == config.to_dict() | {
        "n_inner": 0,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    }
    weights = named(both.torch.named_parameters())
    assert weights.keys() == both.gpt2c.parameters.keys()
    for name, parameter in both.gpt2c.parameters.items():
        assert np.array_equal(parameter, weights[name]), name
    for B, T in [(2, config.n_positions), (3, 1), (1, 17)]:
        both.check_gradients(batch_of(config, B, T))
    both.check_steps([batch_of(config, 2, config.n_positions, seed) for seed in range(10)])


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_dropout_agrees(
    config: GPT2Config, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the places where transformers calls dropout, it gets the masks of our reference."""
    dropout, batch = Dropout(0.2, seed=3 << 32 | 17, first=40), batch_of(config, 3, 17)
    layers = range(config.n_layer)
    names = [f"h.{i}.{place}" for i in layers for place in ("attn", "middle", "out")]
    places = iter(["encoded", *names])

    def drop(x: Any, p: float, training: bool, inplace: bool = False) -> Any:
        assert (p, training) == (dropout.rate, True)
        B, NH, T, columns = x.shape if x.ndim == 4 else (len(x), 1, *x.shape[1:])
        factors = keep_factors(B * T, NH, columns, *dropout.at(next(places)))
        factors = factors.reshape(B, T, NH, columns).swapaxes(1, 2).reshape(x.shape)
        return x * torch.tensor(factors, dtype=x.dtype)

    both = pair(config, backend_name)
    for module in both.torch.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout.rate
    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    loss = torch_loss(both.torch.train(), batch)[1]
    loss.backward()
    assert next(places, None) is None
    own = both.gpt2c.loss(*batch, dropout=dropout)
    assert own == pytest.approx(loss.item(), rel=LOGITS) != both.gpt2c.mean_loss(*batch)
    both.gpt2c.backward()
    expected = named((n, p.grad) for n, p in both.torch.named_parameters())
    for name, gradient in both.gpt2c.gradients.items():
        assert_close(f"gradient of {name}", gradient, expected[name], GRADIENT)


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_hidden_states_agree(config: GPT2Config, backend_name: str) -> None:
    both, (idx, _) = pair(config, backend_name), batch_of(config, 2, 17)
    with torch.no_grad():
        expected = both.torch(torch.tensor(idx), output_hidden_states=True).hidden_states
    logits, states = both.gpt2c(idx, hidden_states=True)
    assert np.array_equal(logits, both.gpt2c(idx))
    assert len(states) == len(expected) == config.n_layer + 1
    for layer, (own, state) in enumerate(zip(states, expected, strict=True)):
        assert_close(f"state {layer}", own, state.numpy(), LOGITS)
    for row, vector in zip(expected[-1], both.gpt2c.embed(idx), strict=True):
        assert_close("embedding", vector, row.mean(dim=0).numpy(), LOGITS)


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_trace_agrees(config: GPT2Config, backend_name: str) -> None:
    both, (idx, _) = pair(config, backend_name), batch_of(config, 2, 17)
    with torch.no_grad():
        found = both.torch(torch.tensor(idx), output_hidden_states=True, output_attentions=True)
    trace = both.gpt2c.trace(idx)
    names = ["encoded", *(f"h.{layer}.out" for layer in range(config.n_layer - 1)), "ln_f"]
    for name, state in zip(names, found.hidden_states, strict=True):
        assert_close(name, trace[name], state.numpy(), LOGITS)
    for layer, weights in enumerate(found.attentions):
        assert_close(f"attention {layer}", trace.attention(layer), weights.numpy(), LOGITS)
    last = trace.lens(f"h.{config.n_layer - 1}.out")
    assert_close("lens", last, found.logits.numpy(), LOGITS)


def test_groups_of_adamw_are_those_of_pytorch(backend_name: str) -> None:
    """PyTorch gets our gradients, so that only the steps are compared."""
    both = pair(SMALL, backend_name)
    named_groups: list[Any] = [
        {"params": ["w[tp]e.*", "h.0.*"], "learning_rate": 2e-4, "weight_decay": 0.0},
        {"params": "h.1.*", "weight_decay": 0.3},
    ]
    rate, groups = 1e-3, {}
    for name, parameter in both.torch.named_parameters():
        name, low, high = name.removeprefix("transformer."), ("wte", "wpe", "h.0."), "h.1."
        own = 2e-4 if name.startswith(low) else rate
        decay = 0.0 if name.startswith(low) else 0.3 if name.startswith(high) else 0.1
        settings = own, decay if parameter.ndim >= 2 else 0.0
        groups.setdefault(settings, []).append(parameter)
    theirs = torch.optim.AdamW(
        [{"params": some, "lr": lr, "weight_decay": decay} for (lr, decay), some in groups.items()],
        betas=(0.9, 0.95),
    )
    factors = [1.0, 1.0, 0.5, 0.25, 0.1]
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: [*factors, 0.0][step])
    ours = AdamW(both.gpt2c, rate, groups=named_groups)
    for step, factor in enumerate(factors):
        both.gpt2c.zero_grad()
        both.gpt2c.loss(*batch_of(SMALL, 2, 17, step))
        both.gpt2c.backward()
        for name, parameter in both.torch.named_parameters():
            gradient = both.gpt2c.gradients[name.removeprefix("transformer.")].copy()
            parameter.grad = torch.tensor(gradient.T if name.endswith(TRANSPOSED) else gradient)
        theirs.step()
        schedule.step()
        ours.step(rate * factor)
    for name, expected in named(both.torch.named_parameters()).items():
        assert_close(name, both.gpt2c.parameters[name], expected, OP)


@pytest.fixture(scope="module")
def whole() -> Iterator[Pair]:
    """Return GPT-2 124M on the default backend."""
    yield pair(GPT2_124M, get_backend().name)


@pytest.mark.parametrize(("B", "T"), [(1, 64), (2, 128)])
def test_124m_agrees(B: int, T: int, whole: Pair) -> None:
    whole.check_gradients(batch_of(GPT2_124M, B, T))


def test_124m_trains_alike(whole: Pair) -> None:  # the last: it changes the weights
    whole.check_steps([batch_of(GPT2_124M, 1, 64, seed) for seed in range(10)])


def test_transformers_loads_a_saved_model(backend_name: str, tmp_path: Path) -> None:
    own, idx = GPT2(SMALL, backend=backend_name), batch_of(SMALL, 2, 29)[0]
    rng = np.random.default_rng(1)
    for parameter in own.parameters.values():
        parameter += np.float32(0.1) * rng.standard_normal(parameter.shape, np.float32)
    own.save_pretrained(tmp_path)
    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], f"{kind}: {report[kind]}"
    model.eval()
    for name, weight in named(model.named_parameters()).items():
        assert np.array_equal(own.parameters[name], weight), name
    assert_close("logits", own(idx), model(torch.tensor(idx)).logits.detach().numpy(), LOGITS)
    greedy = model.generate(
        torch.tensor(idx[:, :9]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert np.array_equal(own.generate(idx[:, :9], 12, temperature=0), greedy.numpy())


# ---- files ---------------------------------------------------------------------------------------


def save_state(model: Any, directory: Path, change: Any) -> None:
    """Save a model after tensors, named as in transformers, were changed."""
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"}
    )


SAVES: dict[str, Any] = {
    "one file": lambda m, d: m.save_pretrained(d),
    "shards": lambda m, d: m.save_pretrained(d, max_shard_size="40KB"),
    "float16": lambda m, d: m.half().save_pretrained(d),
    "bfloat16": lambda m, d: m.bfloat16().save_pretrained(d),
    "bfloat16 shards": lambda m, d: m.bfloat16().save_pretrained(d, max_shard_size="20KB"),
    "float64": lambda m, d: m.double().save_pretrained(d),
    "no prefix": lambda m, d: m.transformer.save_pretrained(d),
    "no prefix, float16 shards": lambda m, d: m.transformer.half().save_pretrained(
        d, max_shard_size="20KB"
    ),
    "lm_head twice": lambda m, d: save_state(m, d, lambda t: None),
    "lm_head only": lambda m, d: save_state(m, d, lambda t: t.pop("transformer.wte.weight")),
    "masks": lambda m, d: save_state(
        m,
        d,
        lambda t: t.update(
            {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 29, 29).bool() for i in range(3)}
        ),
    ),
}


@pytest.mark.parametrize("save", SAVES)
def test_model_saved_by_transformers_is_read(save: str, tmp_path: Path) -> None:
    """Weights have equal bits; logits of 16-bit files equal those of transformers in float32."""
    SAVES[save](torch_model(SMALL), tmp_path)
    assert ("shards" in save) == (len(list(tmp_path.glob("*.safetensors"))) > 2)
    own = GPT2.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for name, weight in named(theirs.named_parameters()).items():
        assert np.array_equal(own.parameters[name], weight), name
    idx = batch_of(SMALL, 2, 29)[0]
    assert_close("logits", own(idx), theirs(torch.tensor(idx)).logits.detach().numpy(), LOGITS)


@pytest.mark.parametrize(
    "changes",
    [
        *({"activation_function": name} for name in ARITHMETIC["activation_function"]),
        {"reorder_and_upcast_attn": True},
        {"layer_norm_epsilon": 1e-3},
        {"n_inner": 40},
    ],
    ids=str,
)
def test_variants_that_are_read_compute_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    """Every accepted name of the activation means the same function."""
    theirs = torch_model(dataclasses.replace(SMALL, n_inner=changes.get("n_inner", 71)))
    config = transformers.GPT2Config(**theirs.config.to_dict() | changes)
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config).eval()
    model.load_state_dict(theirs.state_dict())
    model.save_pretrained(tmp_path)
    assert all(getattr(model.config, name) == value for name, value in changes.items())
    own, idx = GPT2.from_pretrained(tmp_path), batch_of(SMALL, 2, 29)[0]
    assert_close("logits", own(idx), model(torch.tensor(idx)).logits.detach().numpy(), LOGITS)


@pytest.mark.parametrize(
    ("changes", "model", "said"),
    [
        ({"activation_function": "gelu"}, "GPT2LMHeadModel", "activation_function must be"),
        ({"scale_attn_by_inverse_layer_idx": True}, "GPT2LMHeadModel", "scale_attn_by_inverse"),
        ({"scale_attn_weights": False}, "GPT2LMHeadModel", "scale_attn_weights must be True"),
        ({"add_cross_attention": True}, "GPT2LMHeadModel", "add_cross_attention must be False"),
        ({"tie_word_embeddings": False}, "GPT2LMHeadModel", "tie_word_embeddings must be True"),
        ({}, "GPT2ForTokenClassification", "architectures must be"),
        ({}, "GPT2ForQuestionAnswering", "architectures must be"),
        ({}, "GPT2DoubleHeadsModel", "architectures must be"),
    ],
    ids=str,
)
def test_other_models_are_refused_by_name(
    changes: dict[str, Any], model: str, said: str, tmp_path: Path
) -> None:
    config = transformers.GPT2Config(**torch_model(SMALL).config.to_dict() | changes)
    getattr(transformers, model)(config).save_pretrained(tmp_path)
    for quantize in (None, "int8"):
        assert said in refused(GPT2.from_pretrained, tmp_path, quantize=quantize)


@pytest.mark.parametrize("end", [None, 0, 96])
def test_saved_models_texts_end_alike(end: int | None, tmp_path: Path) -> None:
    """transformers reads the end from generation_config.json, and does not report it."""
    own = GPT2(dataclasses.replace(SMALL, eos_token_id=end), seed=3)
    own.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == theirs.generation_config.bos_token_id == end
    assert theirs.config.eos_token_id == end
    theirs.save_pretrained(tmp_path / "again")
    assert GPT2.from_pretrained(tmp_path / "again").config == own.config
    idx = batch_of(SMALL, 1, 9)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = torch.ones(idx.shape, dtype=torch.int64)
        text = theirs.generate(
            torch.tensor(idx), attention_mask=mask, max_new_tokens=9, do_sample=False
        )
    stop = {} if end is None else {"eos_token_id": end}
    expected = own.generate(idx, 9, temperature=0, **stop)[0]
    ends = -1 if end is None else end
    assert ended(text.numpy()[0], 9, ends) == ended(np.asarray(expected), 9, ends)


SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280)}


@pytest.mark.parametrize(("L", "NH", "C"), [*SIZES.values(), (48, 25, 1600)], ids=[*SIZES, "1558M"])
def test_four_sizes_have_transformers_shapes(L: int, NH: int, C: int) -> None:
    """On PyTorch's meta device, which allocates nothing."""
    config = GPT2Config(n_layer=L, n_head=NH, n_embd=C)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict()))
    shapes = {
        name.removeprefix("transformer."): tuple(p.shape)[:: -1 if name.endswith(TRANSPOSED) else 1]
        for name, p in model.named_parameters()
    }
    assert shapes == config.parameter_shapes()


# ---- Llama ---------------------------------------------------------------------------------------

LLAMAS = {
    "grouped": LlamaConfig(97, 60, 71, 2, 6, 2, None, 64, tie_word_embeddings=False),
    "wide heads": LlamaConfig(101, 48, 84, 2, 3, 1, 20, 40, rope_theta=500.0),
    "smollm2": LlamaConfig(64, 72, 96, 3, 9, 3, None, 64, tie_word_embeddings=True),
    "tinyllama": LlamaConfig(83, 128, 96, 2, 32, 4, None, 48, eos_token_id=2, bos_token_id=1),
} | {
    scaling.rope_type: LlamaConfig(59, 48, 80, 2, 3, 1, None, 64, rope_scaling=scaling)
    for scaling in (
        RopeScaling("linear", 2.5),
        RopeScaling("dynamic", 4.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
    )
}


def torch_llama(config: LlamaConfig) -> Any:
    """Return a Llama of transformers with random parameters."""
    pad = None if config.num_labels is None else PAD
    changes = {"attn_implementation": "eager", "pad_token_id": pad}
    settings = transformers.LlamaConfig(**config.to_dict() | changes)
    kind = "LlamaForCausalLM" if config.num_labels is None else "LlamaForSequenceClassification"
    model = getattr(transformers, kind)(settings).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
    return model


def as_ours(tensors: dict[str, Any], config: LlamaConfig) -> dict[str, np.ndarray]:
    """Return gpt2c's parameters of transformers': q, k, v and gate, up stand in one matrix each."""
    arrays = {name.removeprefix("model."): tensor.numpy() for name, tensor in tensors.items()}
    ours = {"wte.weight": arrays["embed_tokens.weight"], "ln_f.weight": arrays["norm.weight"]}
    for head in ("lm_head.weight", "score.weight"):
        if head in arrays and head in config.parameter_shapes():
            ours[head] = arrays[head]
    for i in range(config.num_hidden_layers):
        layer, h = f"layers.{i}.", f"h.{i}."
        qkv = [arrays[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
        gates = [arrays[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours |= {
            h + "ln_1.weight": arrays[layer + "input_layernorm.weight"],
            h + "attn.c_attn.weight": np.concatenate(qkv),
            h + "attn.c_proj.weight": arrays[layer + "self_attn.o_proj.weight"],
            h + "ln_2.weight": arrays[layer + "post_attention_layernorm.weight"],
            h + "mlp.c_fc.weight": np.concatenate(gates),
            h + "mlp.c_proj.weight": arrays[layer + "mlp.down_proj.weight"],
        }
    return ours


EACH_LLAMA = pytest.mark.parametrize("config", LLAMAS.values(), ids=LLAMAS)


@EACH_LLAMA
def test_llama_agrees(config: LlamaConfig, backend_name: str, tmp_path: Path) -> None:
    theirs = torch_llama(config)
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path, backend_name)
    for name, weight in as_ours(theirs.state_dict(), config).items():
        assert np.array_equal(ours.parameters[name], weight), name
    rng = np.random.default_rng(1)
    idx, targets = rng.integers(0, config.vocab_size, (2, 2, config.n_positions))
    targets[1, 5:9] = -1
    logits = theirs(torch.from_numpy(idx)).logits
    assert normalised_error(ours(idx), logits.detach().numpy()) <= LOGITS
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=-1
    )
    assert ours.loss(idx, targets) == pytest.approx(loss.item(), rel=LOGITS)
    loss.backward()
    ours.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in as_ours(gradients, config).items():
        assert normalised_error(ours.gradients[name], gradient) <= GRADIENT, name
    prompt = idx[0, :9]
    text = theirs.generate(
        torch.from_numpy(prompt[None]),
        max_new_tokens=config.n_positions - 9,
        do_sample=False,
        eos_token_id=None,
    )
    own = ours.generate([prompt], config.n_positions - 9, temperature=0)[0]
    assert own.tolist() == text[0].tolist()


@EACH_LLAMA
def test_transformers_loads_a_saved_llama(config: LlamaConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, eos_token_id=5, bos_token_id=4)
    first, again = tmp_path / "theirs", tmp_path / "ours"
    torch_llama(config).save_pretrained(first)
    ours = Llama.from_pretrained(first)
    ours.save_pretrained(again)
    settings, both = {"attn_implementation": "eager", "output_loading_info": True}, []
    for directory in (first, again):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, **settings)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            assert not report[kind], f"{kind}: {report[kind]}"
        both.append(model.eval())
    idx = torch.from_numpy(np.random.default_rng(1).integers(0, config.vocab_size, (2, 33)))
    assert torch.equal(both[0](idx).logits, both[1](idx).logits)
    assert normalised_error(ours(idx.numpy()), both[1](idx).logits.detach().numpy()) <= LOGITS
    configs = [model.config.to_dict() for model in both]
    assert configs[0].pop("_name_or_path") != configs[1].pop("_name_or_path")
    assert configs[0] == configs[1]
    for model in both:
        generation = model.generation_config
        assert (generation.bos_token_id, generation.eos_token_id) == (4, 5)


LLAMA_SAVES: dict[str, Any] = {
    "shards": lambda m, d: m.save_pretrained(d, max_shard_size="40KB"),
    "float16": lambda m, d: m.half().save_pretrained(d),
    "bfloat16 shards": lambda m, d: m.bfloat16().save_pretrained(d, max_shard_size="20KB"),
    "float64": lambda m, d: m.double().save_pretrained(d),
    "no prefix": lambda m, d: m.model.save_pretrained(d),
    "lm_head twice": lambda m, d: save_state(m, d, lambda t: None),
    "lm_head only": lambda m, d: save_state(m, d, lambda t: t.pop("model.embed_tokens.weight")),
}


@pytest.mark.parametrize("save", LLAMA_SAVES)
def test_llama_saved_by_transformers_is_read(save: str, tmp_path: Path) -> None:
    config = LLAMAS["smollm2"]
    LLAMA_SAVES[save](torch_llama(config), tmp_path)
    assert ("shards" in save) == (len(list(tmp_path.glob("*.safetensors"))) > 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = Llama.from_pretrained(tmp_path)
    for name, weight in as_ours(theirs.state_dict(), config).items():
        assert np.array_equal(ours.parameters[name], weight), name


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
        LlamaConfig(32000, 2048, 5632, 22, 32, 4),
    ],
    ids=["SmolLM2-135M", "TinyLlama-1.1B"],
)
def test_two_llamas_have_transformers_names_and_shapes(config: LlamaConfig) -> None:
    """On PyTorch's meta device, which allocates nothing, as ours are views of one zero."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict()))
    zeros = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, shape in config.parameter_shapes().items()
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in LLAMA.write(zeros).items()} == shapes


@pytest.mark.parametrize(
    ("changes", "model", "said"),
    [
        ({"hidden_act": "gelu"}, "LlamaForCausalLM", "hidden_act must be"),
        ({"attention_bias": True}, "LlamaForCausalLM", "attention_bias must be False"),
        ({"mlp_bias": True}, "LlamaForCausalLM", "mlp_bias must be False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "LlamaForCausalLM", "got 'yarn'"),
        ({}, "LlamaForTokenClassification", "architectures must be"),
    ],
    ids=str,
)
def test_other_llamas_are_refused_by_name(
    changes: dict[str, Any], model: str, said: str, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**LLAMAS["grouped"].to_dict() | changes)
    getattr(transformers, model)(config).save_pretrained(tmp_path)
    assert said in refused(find_model, tmp_path)


# ---- scores of texts -----------------------------------------------------------------------------

PAD = 0  # a token that no text has
LENGTHS = (5, 29, 1, 17, 2, 29, 8, 11)
LABELS = np.array([2, 0, 1, -1, 1, 2, 2, 0])
ENDS = {"num_labels": 3, "eos_token_id": PAD, "pad_token_id": PAD}
SCORED = {
    "gpt2": dataclasses.replace(SMALL, **ENDS),
    "llama": LlamaConfig(
        97, 60, 71, 2, 6, 2, None, 64, num_labels=3, eos_token_id=PAD, pad_token_id=PAD
    ),
    "tied": LlamaConfig(64, 48, 96, 3, 4, None, None, 64, num_labels=3, tie_word_embeddings=True),
}
KINDS = pytest.mark.parametrize("config", SCORED.values(), ids=SCORED)


def torch_classifier(config: GPT2Config) -> Any:
    """Return GPT2ForSequenceClassification of transformers with random parameters."""
    base = torch_model(config)
    settings = transformers.GPT2Config(
        **base.config.to_dict() | {"num_labels": config.num_labels, "pad_token_id": PAD},
        attn_implementation="eager",
    )
    model = transformers.GPT2ForSequenceClassification(settings).float().eval()
    model.transformer.load_state_dict(base.transformer.state_dict())
    torch.nn.init.normal_(model.score.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return model


def scoring_pair(config: Any, backend: str) -> tuple[Any, Model, Any]:
    """Return a classifier on both sides, and a function that gives theirs our names."""
    ours = Model(config, None, backend)
    if isinstance(config, GPT2Config):
        theirs, rename = torch_classifier(config), lambda tensors: named(tensors.items())
    else:
        theirs, rename = torch_llama(config), lambda tensors: as_ours(tensors, config)
    ours.load_parameters(rename(theirs.state_dict()), "transformers")
    return theirs, ours, rename


def texts_of(config: Any) -> tuple[list[np.ndarray], Any, Any]:
    """Return texts of different lengths; padded at the right, and a mask, for transformers."""
    rng = np.random.default_rng(3)
    idx = [rng.integers(1, config.vocab_size, length) for length in LENGTHS]
    padded = np.full((len(idx), max(LENGTHS)), PAD)
    for row, text in zip(padded, idx, strict=True):
        row[: len(text)] = text
    return idx, torch.tensor(padded), torch.tensor(padded != PAD).long()


def check_gradients(theirs: Any, ours: Model, rename: Any) -> None:
    expected = rename({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert ours.gradients.keys() == expected.keys()
    for name, gradient in ours.gradients.items():
        assert_close(f"gradient of {name}", gradient, expected[name], GRADIENT)


@KINDS
def test_classifiers_agree(config: Any, backend_name: str) -> None:
    theirs, ours, rename = scoring_pair(config, backend_name)
    idx, padded, mask = texts_of(config)
    labels = torch.tensor(np.where(LABELS < 0, IGNORED, LABELS))
    found = theirs(padded, attention_mask=mask, labels=labels)
    scores = found.logits.detach().numpy()
    assert_close("scores", ours.scores(idx), scores, LOGITS)
    for text, expected in zip(idx, scores, strict=True):
        alone = theirs(torch.tensor(text)[None]).logits.detach().numpy()
        assert_close("scores of one text", ours(text[None]), alone, LOGITS)
        assert_close("scores of one text and of a batch", alone[0], expected, LOGITS)
    assert ours.loss(idx, LABELS) == pytest.approx(found.loss.item(), rel=LOGITS)
    found.loss.backward()
    ours.backward()
    check_gradients(theirs, ours, rename)


@KINDS
def test_rewards_and_values_agree(config: Any, backend_name: str) -> None:
    """Bradley-Terry of the last tokens' score, and the squared error of a value at each token."""
    theirs, ours, rename = scoring_pair(dataclasses.replace(config, num_labels=1), backend_name)
    idx, padded, mask = texts_of(config)
    rewards = theirs(padded, attention_mask=mask).logits[:, 0]
    loss = -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
    loss.backward()
    own = ours.scores(idx)[:, 0].astype(np.float64)
    slopes = -1 / (1 + np.exp(own[0::2] - own[1::2])) / 4
    ours.backward(d_scores=np.stack([slopes, -slopes], axis=1).reshape(8, 1))
    returns = np.random.default_rng(4).standard_normal(padded.shape)
    hidden = theirs.base_model(padded, attention_mask=mask).last_hidden_state
    values, wanted = theirs.score(hidden)[..., 0], torch.tensor(returns, dtype=torch.float32)
    (((values - wanted) ** 2) * mask).sum().div(100).backward()  # added to those of the rewards
    found = ours.scores(idx, per_token=True)
    for row, value, length in zip(values.detach().numpy(), found, LENGTHS, strict=True):
        assert_close("values", value[:, 0], row[:length], LOGITS)
    slopes = [2 * (v - r[: len(v), None]) for v, r in zip(found, returns, strict=True)]
    ours.backward(scale=1 / 100, d_scores=slopes)
    check_gradients(theirs, ours, rename)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_classifier_is_exchanged_with_transformers(num_labels: int, tmp_path: Path) -> None:
    config = dataclasses.replace(SCORED["gpt2"], num_labels=num_labels)
    ours, (idx, padded, mask) = GPT2(config), texts_of(config)
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert isinstance(theirs, transformers.GPT2ForSequenceClassification)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], f"{kind}: {report[kind]}"
    assert (theirs.config.num_labels, theirs.config.pad_token_id) == (num_labels, PAD)
    for name, weight in named(theirs.named_parameters()).items():
        assert np.array_equal(ours.parameters[name], weight), name
    scores = theirs.eval()(padded, attention_mask=mask).logits.detach().numpy()
    assert_close("scores", ours.scores(idx), scores, LOGITS)
    theirs.save_pretrained(tmp_path / "theirs")
    back = GPT2.from_pretrained(tmp_path / "theirs")
    assert back.config == config
    assert np.array_equal(back.scores(idx), ours.scores(idx))


def test_llama_classifier_is_exchanged_with_transformers(tmp_path: Path) -> None:
    config = SCORED["llama"]
    ours, (idx, padded, mask) = Llama(config), texts_of(config)
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert isinstance(theirs, transformers.LlamaForSequenceClassification)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], f"{kind}: {report[kind]}"
    scores = theirs.eval()(padded, attention_mask=mask).logits.detach().numpy()
    assert_close("scores", ours.scores(idx), scores, LOGITS)
    theirs.save_pretrained(tmp_path / "theirs")
    back = Llama.from_pretrained(tmp_path / "theirs")
    assert back.config.num_labels == config.num_labels
    assert np.array_equal(back.scores(idx), ours.scores(idx))


# ---- adapters ------------------------------------------------------------------------------------

ADAPTED = {"gpt2": SMALL, "llama": LLAMAS["grouped"], **{"classifier": SCORED["gpt2"]}}
EACH_ADAPTED = pytest.mark.parametrize("kind", ADAPTED)


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="peft is not installed")


def save_base(kind: str, directory: Path) -> Any:
    """Save a model of transformers with random parameters, and return it."""
    config = ADAPTED[kind]
    if kind == "classifier":
        theirs = torch_classifier(config)
    else:
        theirs = torch_llama(config) if kind == "llama" else torch_model(config)
    theirs.save_pretrained(directory)
    return theirs


def check_adapted(theirs: Any, ours: Any, config: Any) -> None:
    """Compare logits, or scores of texts of different lengths."""
    if config.num_labels:
        idx, padded, mask = texts_of(config)
        scores = theirs(padded, attention_mask=mask).logits.detach().numpy()
        assert_close("scores", ours.scores(idx), scores, LOGITS)
        return
    idx, _ = batch_of(config, 2, 23)
    assert_close("logits", ours(idx), theirs(torch.tensor(idx)).logits.detach().numpy(), LOGITS)


def their_parts(kind: str, number: str, layer: str) -> list[str]:
    """Return the names in transformers of a linear layer's parts."""
    if kind == "gpt2":
        return [f"transformer.h.{number}.{layer}"]
    return [f"model.layers.{number}.{part}" for part in PARTS[layer]]


@EACH_ADAPTED
def test_peft_loads_our_adapters(kind: str, peft: Any, tmp_path: Path) -> None:
    theirs, config, rng = (
        save_base(kind, tmp_path / "base"),
        ADAPTED[kind],
        np.random.default_rng(5),
    )
    ours = from_pretrained(tmp_path / "base")
    ours.add_lora(r=3, alpha=7, use_rslora=kind == "gpt2")
    for name, parameter in ours.parameters.items():
        if "lora_B" in name or name == "score.weight":
            parameter[...] = 0.3 * rng.standard_normal(parameter.shape)
    ours.save_pretrained(tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True).eval()
    check_adapted(adapted, ours, config)
    merged = ours.merge()
    check_adapted(adapted, merged, config)
    if kind == "classifier":
        return
    batch = batch_of(config, 2, 23)
    torch_loss(adapted, batch)[1].backward()
    ours.loss(*batch)
    ours.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad.numpy()
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    for name, gradient in ours.gradients.items():
        _, number, layer = name.removesuffix(".weight").split(".", 2)
        layer, side = layer.rsplit(".", 1)
        parts = [gradients[f"{part}.{side}.weight"] for part in their_parts(kind, number, layer)]
        expected = np.concatenate(parts) if side == "lora_B" else sum(parts)
        assert_close(f"gradient of {name}", gradient, expected, GRADIENT)


@EACH_ADAPTED
def test_we_load_adapters_of_peft(kind: str, peft: Any, tmp_path: Path) -> None:
    theirs, config = save_base(kind, tmp_path / "base"), ADAPTED[kind]
    targets = {
        "gpt2": ["c_attn", "mlp.c_proj"],
        "classifier": ["c_attn"],
        "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    }[kind]
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets,
        task_type="SEQ_CLS" if kind == "classifier" else "CAUSAL_LM",
        fan_in_fan_out=kind != "llama",
        use_rslora=kind == "gpt2",
        init_lora_weights=False,  # B is not 0
    )
    adapted = peft.get_peft_model(theirs, settings).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "base", adapter=tmp_path / "theirs")
    check_adapted(adapted, ours, config)
    ours.save_pretrained(tmp_path / "ours")
    check_adapted(adapted, from_pretrained(tmp_path / "ours"), config)


# ---- preferences ---------------------------------------------------------------------------------

PROMPTS, ENDS_AT = (5, 3, 1, 9), ((17, 29, 4, 10), (8, 29, 3, 20))  # of the chosen, the rejected
PREFERENCES = [
    PairLoss(),
    PairLoss("sigmoid", 0.3, label_smoothing=0.2),
    PairLoss("robust", 0.3, label_smoothing=0.2),
    PairLoss("hinge", 0.2),
    PairLoss("ipo", 0.5),
    PairLoss("simpo", 2.0, simpo_gamma=0.7),
    PairLoss("simpo", 2.0, label_smoothing=0.1, simpo_gamma=0.7),
]


@pytest.fixture
def trl() -> Any:
    """Return TRL's trainers, whose losses are called on an object that stands for a trainer."""
    pytest.importorskip("trl", reason="TRL is not installed, nor is it needed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are not ours
        from trl import DPOTrainer, KTOTrainer, RewardTrainer
        from trl.experimental.cpo import CPOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, reward=RewardTrainer, cpo=CPOTrainer)


class Preferring:
    """A model on both sides, and completions of which some are chosen and as many rejected."""

    def __init__(self) -> None:
        self.both = pair(SMALL, get_backend().name)
        rng = np.random.default_rng(5)
        self.ends = [end for side in ENDS_AT for end in side]
        self.idx = [rng.integers(0, SMALL.vocab_size, end) for end in self.ends]
        self.starts = PROMPTS * 2
        self.lengths = np.subtract(self.ends, self.starts)
        self.mask = torch.zeros(len(self.idx), max(self.ends), dtype=torch.long)
        for row, start, end in zip(self.mask, self.starts, self.ends, strict=True):
            row[start:end] = 1

    def theirs(self) -> Any:
        """Return the log-probability of each token of a completion, and 0 elsewhere."""
        padded = torch.zeros_like(self.mask)
        for row, ids in zip(padded, self.idx, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        logs = self.both.torch(padded).logits[:, :-1].log_softmax(-1)
        return logs.gather(-1, padded[:, 1:, None])[..., 0] * self.mask[:, 1:]

    def ours(self) -> Any:
        """Return the log-probabilities of completions, (B,) float64."""
        masks = zip(self.idx, self.starts, strict=True)
        targets = [np.where(np.arange(1, len(ids)) >= start, ids[1:], -1) for ids, start in masks]
        losses = self.both.gpt2c.losses([ids[:-1] for ids in self.idx], targets)
        return -np.array([one.sum(dtype=np.float64) for one in losses])

    def stand_in(self, **fields: Any) -> Any:
        """Return what a trainer's loss asks of the trainer."""
        same = lambda value: value  # noqa: E731
        return SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
            args=SimpleNamespace(center_rewards_coefficient=None),
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            _metrics={"train": collections.defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
            **fields,
        )

    def output(self, logs: Any) -> Any:
        """Return what a trainer's loss asks of the model: only log_probs are in a loss."""
        others = dict.fromkeys(("entropy", "mean_logits"), torch.zeros_like(logs))
        return SimpleNamespace(log_probs=logs, is_top1=self.mask[:, 1:] > 0, **others)

    def check(self, losses: Any, slopes: Any, loss: Any) -> None:
        """Compare the mean of losses, and the gradients that slopes (B,) of sequences give."""
        assert losses.mean() == pytest.approx(loss.item(), rel=LOGITS)
        self.both.torch.zero_grad()
        loss.backward()
        self.both.gpt2c.zero_grad()
        share = -slopes / losses.size
        self.both.gpt2c.backward(
            weights=[np.full(end - 1, s) for end, s in zip(self.ends, share, strict=True)]
        )
        check_gradients(self.both.torch, self.both.gpt2c, lambda tensors: named(tensors.items()))


@pytest.mark.parametrize("loss", PREFERENCES, ids=str)
def test_losses_of_pairs_are_those_of_trl(loss: PairLoss, trl: Any) -> None:
    on = Preferring()
    logs, policy, lengths = on.theirs(), on.ours().reshape(2, 4), on.lengths.reshape(2, 4)
    reference = policy + np.random.default_rng(6).normal(0, 3, (2, 4))
    stand_in = on.stand_in(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss.name],
        loss_weights=[1.0],
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        use_weighting=False,
    )
    if loss.name == "simpo" or (loss.name, loss.label_smoothing > 0) == ("sigmoid", True):
        # TRL's DPO has neither SimPO nor smoothing of "sigmoid", but its CPO has both
        stand_in.loss_type, stand_in.alpha, stand_in.simpo_gamma = loss.name, 0.0, loss.simpo_gamma
        each = logs.sum(-1)
        if loss.name == "simpo":
            each = each / torch.tensor(on.lengths)
        else:
            each = each - torch.tensor(reference.reshape(-1))
        theirs = trl.cpo.cpo_loss(stand_in, each[:4], each[4:])[0].mean()
        on.check(*flat(loss(policy, reference if loss.has_reference else None, lengths)), theirs)
        return
    inputs = {
        "input_ids": torch.zeros_like(on.mask),
        "attention_mask": torch.ones_like(on.mask),
        "completion_mask": on.mask,
        "ref_chosen_logps": torch.tensor(reference[0]),
        "ref_rejected_logps": torch.tensor(reference[1]),
    }
    theirs = trl.dpo._compute_loss(stand_in, lambda **_: on.output(logs), inputs, False)
    on.check(*flat(loss(policy, reference, lengths)), theirs)


def flat(found: Any) -> Any:
    """Return losses, and slopes (2,B) as those of the 2B sequences."""
    return found[0], found[1].reshape(-1)


def test_loss_of_single_completions_is_that_of_trl(trl: Any) -> None:
    on = Preferring()
    logs, policy = on.theirs(), on.ours()
    rng, liked = np.random.default_rng(7), np.arange(8) % 3 > 0
    reference = policy + rng.normal(0, 3, 8)
    far = rng.normal(2, 1, (2, 8))
    stand_in = on.stand_in(
        loss_type="kto",
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        calculate_KL=True,
        _compute_kl_logps=lambda *_: torch.tensor(far[0]),
    )
    inputs = {
        "input_ids": torch.zeros_like(on.mask),
        "attention_mask": torch.ones_like(on.mask),
        "completion_mask": on.mask,
        "label": torch.tensor(liked),
        "ref_logps": torch.tensor(reference),
        "ref_KL_logps": torch.tensor(far[1]),
    }
    theirs = trl.kto._compute_loss(stand_in, lambda **_: on.output(logs), inputs, False)
    point = reference_point(*far)
    assert point == pytest.approx(stand_in._metrics["train"]["kl"][0])
    losses, slopes = kto(policy, reference, liked, point, 0.2, 1.5, 0.7)
    on.check(losses, slopes, theirs)


@pytest.mark.parametrize(("margin", "centring"), [(None, None), ([0.5, 0.0, 2.0, 1.0], 0.02)])
def test_loss_of_rewards_is_that_of_trl(margin: Any, centring: Any, trl: Any) -> None:
    config = dataclasses.replace(SCORED["gpt2"], num_labels=1)
    theirs, ours, rename = scoring_pair(config, get_backend().name)
    idx, padded, mask = texts_of(config)
    stand_in = Preferring.stand_in(None)
    stand_in.args.center_rewards_coefficient = centring
    inputs = {"input_ids": padded, "attention_mask": mask}
    if margin:
        inputs["margin"] = torch.tensor(margin)

    def model(input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        return theirs(input_ids, attention_mask=attention_mask)

    loss = trl.reward.compute_loss(stand_in, model, inputs)
    rewards = ours.scores(idx)[:, 0].astype(np.float64).reshape(2, 4)
    losses, slopes = bradley_terry(rewards, np.array(margin or 0.0), centring or 0.0)
    assert losses.mean() == pytest.approx(loss.item(), rel=LOGITS)
    loss.backward()
    ours.backward(d_scores=slopes.reshape(8, 1) / 4)
    # Differences alone count then: what all rewards share has no slope, only its rounding.
    if centring is None:
        largest = np.abs(ours.gradients["ln_f.weight"]).max()
        for bias in (ours.gradients["ln_f.bias"], theirs.transformer.ln_f.bias.grad.numpy()):
            assert np.abs(bias).max() <= 1e-5 * largest
            bias[...] = 0
    check_gradients(theirs, ours, rename)


# ---- texts ---------------------------------------------------------------------------------------

END = 0  # of torch_model

GREEDY: list[dict[str, Any]] = [
    {},
    {"eos_token_id": END},
    {"eos_token_id": [END, 7, 50], "min_new_tokens": 6},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8, "no_repeat_ngram_size": 4},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "eos_token_id": [3, 9], "min_new_tokens": 2},
]


@pytest.fixture(scope="module")
def wordy() -> Iterator[Any]:
    """Return a model of transformers whose greedy texts vary, and its files."""
    model = torch_model(ODD, seed=3)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(6)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        yield model, directory


def ended(row: np.ndarray, start: int, ends: Any) -> list[int]:
    """Return a text up to its first end after `start`."""
    places = np.flatnonzero(np.isin(row[start:], ends))
    return row[: start + places[0] + 1 if len(places) else None].tolist()


def their_texts(model: Any, prompts: list[np.ndarray], **settings: Any) -> list[np.ndarray]:
    """Continue prompts in transformers; shorter ones are padded on the left, and masked."""
    longest = max(map(len, prompts))
    padded = [np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    mask = [np.arange(longest) >= longest - len(prompt) for prompt in prompts]
    out = model.generate(
        torch.tensor(np.stack(padded)),
        attention_mask=torch.tensor(np.stack(mask).astype(np.int64)),
        do_sample=False,
        pad_token_id=END,
        **settings,
    )
    return [row[longest - len(p) :] for row, p in zip(out.numpy(), prompts, strict=True)]


@TWO_BACKENDS  # the settings are Python's; the logits agree above on every backend
@pytest.mark.parametrize("lengths", [(11, 11, 11, 11), (1, 5, 17, 40)], ids=str)
@pytest.mark.parametrize("settings", GREEDY, ids=str)
def test_greedy_texts_agree(
    settings: dict[str, Any], lengths: tuple[int, ...], wordy: Any, backend_name: str
) -> None:
    theirs, directory = wordy
    own = GPT2.from_pretrained(directory, backend=backend_name)
    rng, ends = np.random.default_rng(4), settings.get("eos_token_id", -1)
    prompts = [rng.integers(0, ODD.vocab_size, length) for length in lengths]
    # their penalties count padding as text, so there one prompt at a time
    alone = {"repetition_penalty", "no_repeat_ngram_size"} & settings.keys()
    batches = [[prompt] for prompt in prompts] if alone else [prompts]
    settings = {"max_new_tokens": 24, **settings}
    rows = [row for batch in batches for row in their_texts(theirs, batch, **settings)]
    texts = own.generate(prompts, temperature=0, **settings)
    for text, row, start in zip(texts, rows, lengths, strict=True):
        assert ended(text, start, ends) == ended(row, start, ends)
    assert len({tuple(text[-5:]) for text in texts}) > 1


PROCESSORS: list[dict[str, Any]] = [
    *({"temperature": value} for value in (0.3, 1.0, 2.5)),
    *({"top_k": value} for value in (1, 5, 96, 97, 500)),
    *({"top_p": value} for value in (0.05, 0.5, 0.9, 0.999)),
    *({"min_p": value} for value in (0.01, 0.2, 0.9)),
    *({"repetition_penalty": value} for value in (0.7, 1.2, 3.0)),
    *({"no_repeat_ngram_size": value} for value in (1, 2, 3, 5)),
    *({"min_new_tokens": value} for value in (1, 4, 5)),
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "top_p": 0.8},
    {"min_new_tokens": 9, "top_k": 3, "repetition_penalty": 1.1},
]


def processors(settings: dict[str, Any], prompt: int, ends: list[int]) -> Any:
    """Return transformers' own processors, in the order in which its generate applies them."""
    makers: dict[str, Any] = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": transformers.NoRepeatNGramLogitsProcessor,
        "min_new_tokens": lambda least: transformers.MinNewTokensLengthLogitsProcessor(
            prompt, least, ends, device="cpu"
        ),
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    return [make(settings[name]) for name, make in makers.items() if name in settings]


@pytest.mark.parametrize("settings", PROCESSORS, ids=str)
def test_probabilities_of_sampling_agree(settings: dict[str, Any]) -> None:
    """The same tokens remain, with the same probabilities to float32's precision."""
    V, prompt, ends = 97, 6, [11, 12]
    config = GenerationConfig(**settings)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=V).astype(np.float32) * 3
        text = rng.integers(0, 8, 10)  # a text of few tokens, which repeats itself; 4 are new
        logits[ends] = logits.max() + np.array([1, 2], np.float32)
        scores = torch.tensor(logits[None])
        for process in processors(settings, prompt, ends):
            scores = process(torch.tensor(text[None]), scores)
        expected = torch.softmax(scores.double(), dim=1)[0].numpy()
        forbidden = ends if len(text) - prompt < config.min_new_tokens else []
        ids, weights = distribution(penalised(logits, config, text.tolist(), forbidden), config)
        p = np.zeros(V)
        p[ids] = weights / weights.sum()
        assert np.array_equal(p > 0, expected > 0)
        np.testing.assert_allclose(p, expected, rtol=2e-5)  # logits of 30, rounded by 6e-8 of that


# ---- policies ------------------------------------------------------------------------------------


class Policies:
    """A model on both sides, completions of prompts, and log-probabilities before an update."""

    temperature, most = 0.8, 20

    def __init__(self) -> None:
        self.both, rng = pair(SMALL, get_backend().name), np.random.default_rng(7)
        self.starts, self.ends = np.array([5, 3, 1, 9, 9, 2]), np.array([8, 20, 15, 29, 10, 17])
        self.idx = rng.integers(0, SMALL.vocab_size, (6, 29))
        places = np.arange(1, 29)
        self.mask = (places >= self.starts[:, None]) & (places < self.ends[:, None])
        logs = self.logps(torch.tensor(self.idx)).detach().numpy()
        moves = rng.standard_normal((3, *logs.shape), np.float32) / 4
        self.old, self.reference, self.sampled = logs + moves
        self.advantages = rng.standard_normal(6).astype(np.float32)

    def logps(self, idx: Any) -> Any:
        """Return the log-probability of each token after the first, by the model in PyTorch."""
        logits = self.both.torch(idx).logits[:, :-1] / self.temperature
        return logits.log_softmax(-1).gather(-1, idx[:, 1:, None])[..., 0]

    def theirs(self, loss_type: str, beta: float, sampled: bool) -> tuple[float, Any]:
        """Return TRL's loss, with its gradients in the model, and its metrics."""
        same = lambda value, **_: value  # noqa: E731
        lengths = self.mask.sum()
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda model, idx, *_, **__: (
                *(self.logps(idx), torch.zeros(self.mask.shape)),
                None,
            ),
            accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            **{"loss_type": loss_type, "beta": beta, "epsilon_low": 0.2, "epsilon_high": 0.3},
            **{"use_vllm": sampled, "vllm_importance_sampling_correction": sampled},
            **{"aux_loss_enabled": False, "_entropy_bonus_enabled": False},
            **{"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None},
            **{"importance_sampling_level": "token", "current_gradient_accumulation_steps": 1},
            max_completion_length=self.most,
            model=SimpleNamespace(training=True),
            _metrics={"train": collections.defaultdict(list)},
        )
        inputs = {
            **{"prompt_ids": self.idx[:, :1], "prompt_mask": np.ones((6, 1), np.int64)},
            **{"completion_ids": self.idx[:, 1:], "completion_mask": self.mask.astype(np.int64)},
            **{"advantages": self.advantages, "old_per_token_logps": self.old},
            **{"ref_per_token_logps": self.reference, "num_items_in_batch": lengths},
            "importance_sampling_ratio": np.minimum(np.exp(self.old - self.sampled), 2.0),
        }
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
        self.both.torch.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are not ours
            trainers = pytest.importorskip("trl", reason="TRL is not installed, nor is it needed")
            loss = trainers.GRPOTrainer._compute_loss(trainer, None, tensors)
        loss.backward()
        return loss.item(), trainer._metrics["train"]

    def ours(self, loss_type: str, beta: float, sampled: bool) -> tuple[float, Any]:
        """Return our loss, with its gradients in the model, and the terms of all tokens."""
        flat = [
            np.concatenate([row[: end - 1] for row, end in zip(rows, self.ends, strict=True)])
            for rows in (self.idx[:, 1:], self.mask, self.old, self.reference, self.sampled)
        ]
        counts = np.repeat(np.arange(6), self.ends - 1)
        factors = token_factors(loss_type, self.ends - self.starts, self.most)
        tokens = TokenFacts(
            *(factors[counts], self.advantages[counts].astype(np.float64), flat[2]),
            reference=flat[3] if beta else None,
            sampled=flat[4] if sampled else None,
        )
        loss = PolicyLoss(0.2, 0.3, beta, "k3")
        targets = np.where(flat[1], flat[0], -1).astype(np.int32)
        objective = PolicyObjective(targets, tokens, loss, self.temperature)
        idx = [row[: end - 1] for row, end in zip(self.idx, self.ends, strict=True)]
        self.both.gpt2c.zero_grad()
        value = self.both.gpt2c.loss(idx, objective, count=1)
        self.both.gpt2c.backward()
        return value, loss(tokens.at(objective.live), objective.logps[objective.live])


@pytest.mark.parametrize("sampled", [False, True], ids=["", "sampler"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_of_policies_are_those_of_trl(loss_type: str, beta: float, sampled: bool) -> None:
    policies = Policies()
    expected, metrics = policies.theirs(loss_type, beta, sampled)
    loss, terms = policies.ours(loss_type, beta, sampled)
    assert loss == pytest.approx(expected, rel=LOGITS)
    gradients = named((n, p.grad) for n, p in policies.both.torch.named_parameters())
    for name, gradient in policies.both.gpt2c.gradients.items():
        assert_close(f"gradient of {name}", gradient, gradients[name], GRADIENT)
    for name, value in [
        ("low", terms.low),
        ("high", terms.high),
        ("region", terms.low | terms.high),
    ]:
        assert 0 < metrics[f"clip_ratio/{name}_mean"][0] == pytest.approx(value.mean(), rel=1e-6)
    if beta:
        assert terms.kl.mean() == pytest.approx(metrics["kl"][0], rel=1e-4)


# ---- each op -------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def tensors(*arrays: np.ndarray) -> list[Any]:
    """Return float64 tensors with gradients, so that PyTorch's own error does not count."""
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


def check(actual: Any, *expected: Any) -> None:
    for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"output {position}", a, b.detach().numpy(), OP)


def test_embedding(backend_name: str, rng: np.random.Generator) -> None:
    wte, wpe, dout = normal(rng, 31, 17), normal(rng, 9, 17), normal(rng, 3, 7, 17)
    idx = rng.integers(0, 31, (3, 7), np.int32)
    t_wte, t_wpe = tensors(wte, wpe)
    embed = torch.nn.functional.embedding
    out = embed(torch.tensor(idx), t_wte) + embed(torch.arange(7), t_wpe)
    out.backward(torch.tensor(dout))
    check([ops.encoder_forward(idx, wte, wpe, backend_name)], out)
    check(ops.encoder_backward(dout, idx, 31, 9, backend_name), t_wte.grad, t_wpe.grad)


def test_layernorm(backend_name: str, rng: np.random.Generator) -> None:
    x, weight, bias, dout = normal(rng, 7, 33), normal(rng, 33), normal(rng, 33), normal(rng, 7, 33)
    given = tensors(x, weight, bias)
    expected = torch.nn.functional.layer_norm(given[0], (33,), *given[1:], eps=1e-5)
    expected.backward(torch.tensor(dout))
    out, mean, rstd = ops.layernorm_forward(x, weight, bias, 1e-5, backend_name)
    check([out], expected)
    gradients = ops.layernorm_backward(dout, x, weight, mean, rstd, backend_name)
    check(gradients, *(tensor.grad for tensor in given))


def test_linear(backend_name: str, rng: np.random.Generator) -> None:
    x, weight, bias = normal(rng, 9, 35), normal(rng, 21, 35), normal(rng, 21)
    given, dout = tensors(x, weight, bias), normal(rng, 9, 21)
    expected = torch.nn.functional.linear(*given)
    expected.backward(torch.tensor(dout))
    check([ops.matmul_forward(x, weight, bias, backend_name)], expected)
    check(ops.matmul_backward(dout, x, weight, backend_name), *(tensor.grad for tensor in given))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_small_linear(dtype: type, backend_name: str, rng: np.random.Generator) -> None:
    for N in (1, 5, 40):
        x, weight, bias = normal(rng, N, 35), normal(rng, 21, 35).astype(dtype), normal(rng, 21)
        expected = torch.nn.functional.linear(*tensors(x, weight, bias))
        check([ops.matmul_forward(x, weight, bias, None, backend_name)], expected)


def test_cache_attention(backend_name: str, rng: np.random.Generator) -> None:
    NH, HS, P = 3, 19, 90
    keys, values = normal(rng, NH, P, HS), normal(rng, NH, P, HS)
    for T, position in [(1, 0), (1, 70), (20, 65), (25, 0)]:
        qkv, end = normal(rng, T, 3 * NH * HS), position + T
        q, k, v = qkv.reshape(T, 3, NH, HS).transpose(1, 2, 0, 3)
        before = [cache[:, :position] for cache in (keys, values)]
        k, v = (np.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
        visible = torch.tensor(np.tril(np.ones((T, end), np.bool_), k=position))
        attend = torch.nn.functional.scaled_dot_product_attention
        expected = attend(*tensors(q, k, v), attn_mask=visible).transpose(0, 1).reshape(T, NH * HS)
        given = (qkv[None], NH, keys[None], values[None], position, backend_name)
        out, _, *caches = ops.attention_forward(*given)
        check([out[0]], expected)
        for cache, new in zip(caches, (k, v), strict=True):
            assert np.array_equal(cache[0, :, :end], new)


def test_attention(backend_name: str, rng: np.random.Generator) -> None:
    B, T, NH, HS = 2, 37, 3, 19
    qkv, dout = normal(rng, B, T, 3 * NH * HS), normal(rng, B, T, NH * HS)
    (given,) = tensors(qkv)
    heads = [part.view(B, T, NH, HS).transpose(1, 2) for part in given.split(NH * HS, dim=2)]
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(*heads, is_causal=True).transpose(1, 2).reshape(B, T, NH * HS)
    expected.backward(torch.tensor(dout))
    out, lse = ops.attention_forward(qkv, NH, backend_name)
    check([out], expected)
    check([ops.attention_backward(dout, qkv, out, lse, backend_name)], given.grad)


def test_gelu(backend_name: str, rng: np.random.Generator) -> None:
    x, dout = 3 * normal(rng, 1003), normal(rng, 1003)
    (given,) = tensors(x)
    expected = torch.nn.functional.gelu(given, approximate="tanh")
    expected.backward(torch.tensor(dout))
    check([ops.gelu_forward(x, backend_name)], expected)
    check([ops.gelu_backward(dout, x, backend_name)], given.grad)


def test_cross_entropy(backend_name: str, rng: np.random.Generator) -> None:
    logits, targets = 3 * normal(rng, 11, 97), rng.integers(0, 97, 11, np.int32)
    targets[[2, 7]] = -1
    (given,) = tensors(logits)
    labels = torch.tensor(np.where(targets == -1, IGNORED, targets), dtype=torch.int64)
    expected = torch.nn.functional.cross_entropy(
        given, labels, ignore_index=IGNORED, reduction="none"
    )
    (expected.sum() / 9).backward()
    losses, lse = ops.crossentropy_forward(logits, targets, backend_name)
    check([losses, lse], expected, given.logsumexp(dim=1))
    dlogits = ops.crossentropy_backward(logits, lse, targets, 1 / 9, backend_name)
    check([dlogits], given.grad)


def test_adamw(backend_name: str, rng: np.random.Generator) -> None:
    param = normal(rng, 133)
    (given,) = tensors(param)
    theirs = torch.optim.AdamW([given], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    m, v = np.zeros_like(param), np.zeros_like(param)
    for t in range(1, 6):
        grad = normal(rng, 133)
        given.grad = torch.tensor(grad, dtype=torch.float64)
        theirs.step()
        settings = {"learning_rate": 0.1, "weight_decay": 0.1, "t": t, "backend": backend_name}
        param, m, v = ops.adamw_update(param, m, v, grad, **settings)
        state = theirs.state[given]
        check([param, m, v], given, state["exp_avg"], state["exp_avg_sq"])


def test_global_norm(backend_name: str, rng: np.random.Generator) -> None:
    grad = normal(rng, 1003)
    expected = torch.linalg.vector_norm(torch.tensor(grad, dtype=torch.float64))
    check([ops.global_norm(grad, backend_name)], expected)


# ---- PyTorch as a row of the benchmark -----------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_pytorch_row_computes_the_op(name: str) -> None:
    worker = Worker("torch", 1)
    answer = worker.op(name, small_shape(name))
    if "missing" in answer:
        pytest.skip(answer["missing"])
    assert answer["error"] <= answer["rtol"]
    assert worker.sample()["seconds"] > 0


def test_pytorch_row_trains_as_ours_do() -> None:
    worker = Worker("torch", 1)
    answer = worker.train(dataclasses.asdict(TINY), 2, 8, None)
    assert answer["error"] <= answer["rtol"]
    ours = Worker("base", 1)
    ours.train(dataclasses.asdict(TINY), 2, 8, None)
    for _ in range(3):
        assert worker.step()["loss"] == pytest.approx(ours.step()["loss"], rel=1e-4)


# ---- tokenizers ----------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "hello world",
    "  two spaces,   three, and at the end  ",
    " " * 300 + "x" + "\t" * 50,
    "they're we've I'll he'd it's I'm DON'T",
    "😀👩‍👩‍👧 naïve café e\u0301 日本語 ١٢٣ 2024",
    "line\nbreaks\r\n\n\n and\x00control\x85characters\u2028",
    "\ufeffmark <|endoftext> |endoftext|> x" * 9,
]


@pytest.fixture(params=["bytes", "bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Return every kind of tokenizer."""
    if request.param == "bpe":
        return Tokenizer.train([text * 2 for text in TEXTS], 330)
    try:
        return Tokenizer.from_name(request.param)
    except OSError as error:
        pytest.skip(f"GPT-2's vocabulary is not reachable: {error}")


def same_ids(own: Tokenizer, theirs: Any) -> None:
    """Check that both sides give texts the same ids, and have the same end of text."""
    assert (len(theirs), theirs.eos_token_id) == (own.vocab_size, own.eot)
    for text in TEXTS:
        ids = own.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == own.decode(ids)
    text = "a<|endoftext|> b"  # theirs encodes the mark as a token, ours as text
    assert theirs.encode(text) == [*own.encode("a"), own.eot, *own.encode(" b")]
    assert theirs.encode(text, split_special_tokens=True) == own.encode(text)


def test_transformers_reads_our_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=8, n_embd=4, n_layer=1, n_head=1
    )
    GPT2(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for theirs in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
        same_ids(tokenizer, theirs.from_pretrained(tmp_path))


@pytest.mark.parametrize("split", [GPT2_SPLIT, LLAMA3], ids=lambda split: split.name)
def test_transformers_begins_texts_as_ours_does(split: Split, tmp_path: Path) -> None:
    """As our Generator does; transformers' own files say the same to us."""
    bpe = Tokenizer.train([text * 2 for text in TEXTS], 330)
    own = Tokenizer(bpe._ranks, bpe.eot, split=split, add_bos_token=True)
    own.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("line and control")["input_ids"] == [own.eot, *own.encode("line and control")]
    theirs.save_pretrained(tmp_path / "theirs")
    found = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert found.add_bos_token and found.fingerprint == own.fingerprint


def test_tokenizer_of_transformers_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Version 5 writes tokenizer.json alone; older versions write all three files."""
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").exists()
    own = Tokenizer.from_pretrained(tmp_path / "theirs")
    same_ids(own, theirs)
    own.save_pretrained(tmp_path / "back")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / name).read_bytes()
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path / "more")
    more = Tokenizer.from_pretrained(tmp_path / "more")
    same_ids(more, theirs)
    assert more.special_tokens["[PAD]"] == theirs.pad_token_id and more.covers(own)


def test_tokenizer_trained_by_tokenizers_is_read(tmp_path: Path) -> None:
    """Its special tokens come first, and its byte alphabet has another order."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, 400, 2, False, special_tokens=["<|endoftext|>"])
    trained.save_model(str(tmp_path))
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    own = Tokenizer.from_pretrained(tmp_path)
    assert own.eot == 0
    same_ids(own, theirs)
    theirs.save_pretrained(tmp_path / "fast")
    same_ids(Tokenizer.from_pretrained(tmp_path / "fast"), theirs)


def sequence(*steps: Any) -> Any:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])


def by_regex(split: Split) -> Any:
    pattern = split.steps["pretokenizers"][0]["pattern"]["Regex"]
    return sequence(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))


# name -> how the library tokenizers cuts texts, and our name of that
STEPS: dict[str, tuple[Any, Split]] = {
    "gpt2": (pre_tokenizers.ByteLevel(False), GPT2_SPLIT),
    "gpt2 by regex": (
        sequence(pre_tokenizers.Split(tokenizers.Regex(next(iter(REGEXES))), "isolated")),
        GPT2_SPLIT,
    ),
    "smollm2": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        ),
        DIGITS,
    ),
    "llama3": (by_regex(LLAMA3), LLAMA3),
    "qwen2": (by_regex(QWEN2), QWEN2),
}
ODD_TEXTS = [
    "It's 2024; they'VE 12345678 items, I'll pay $1,234.56!\n\n\tif (x) {\r\n    return;\r\n}\n",
    "a  5   b 6\t7 \n 8\n\n9 x   ",
    "日本語 テスト \uff11\uff12\uff13 ٣٤٥ Ⅷ ½x²",
    "😀👩‍👩‍👧!!! ...\n---\n\n  \u3000  end\u2028\x85\xa0 \x1c\x1d",
    "don't DON'T '\u017f ''s s'' _x_ (a) 'tis #1 @user\r\r\n!\n?\n\n",
    "",
    " ",
    "\n",
    "e\u0301 ẞß ŉ İi ﬁ Ǆ",
]
ALPHABETS = [
    [*"a\u017fsTé日1\uff12²'! \n\r\t_-\u3000😀\u0301", "'s", "'LL", "  ", "\n\n", "12"],
    ["x", "!", "\n"],
    [*"xé-!7_", "'s", "123", "ab"],  # no whitespace to cut at
    [*"0123456789"],
    [";\n"],
]


@pytest.mark.parametrize("name", STEPS)
def test_ids_of_every_split_are_those_of_tokenizers(name: str, tmp_path: Path) -> None:
    """Also of texts that we cut into windows, and after we saved the tokenizer."""
    steps, split = STEPS[name]
    rng = np.random.default_rng(0)
    mixed = ["".join(rng.choice(letters, 60)) for _ in range(200) for letters in ALPHABETS]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer, theirs.decoder = steps, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([text * 3 for text in (*ODD_TEXTS, *TEXTS, *mixed)], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    own = Tokenizer.from_pretrained(tmp_path)
    assert own.split == split and own.eot == 0 and own.vocab_size == theirs.get_vocab_size()
    own.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").fingerprint == own.fingerprint
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in (*ODD_TEXTS, *TEXTS, *mixed):
        ids = theirs.encode(text).ids
        assert own.encode(text) == ids, repr(text)
        assert again.encode(text) == ids, repr(text)
        assert own.decode(ids) == text
    own._window = 100  # characters, so that there are many windows
    for letters in ALPHABETS:
        text = "".join(rng.choice(letters, 20_000))
        assert own.encode(text) == theirs.encode(text).ids, letters


def test_bytes_that_a_tokenizer_lacks_are_refused(tmp_path: Path) -> None:
    """As SmolLM2's, which was learned without the whole alphabet; tokenizers drops such bytes."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = STEPS["smollm2"][0]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    printable = "".join(map(chr, range(32, 127)))
    theirs.train_from_iterator([f"{printable}\n", "the cat sat, é"] * 3, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    own = Tokenizer.from_pretrained(tmp_path)
    text = "the 12 cats, né é\n"
    assert own.encode(text) == theirs.encode(text).ids and own.decode(own.encode(text)) == text
    assert theirs.encode("a\0").ids == theirs.encode("a").ids
    said = "the tokenizer has no token for byte 0x00 of '\\x00' in the text: remove this character"
    assert refused(own.encode, "a\0") == said
    assert "byte 0xe6 of '日'" in refused(own.encode_batch, ["x" * 99, "a 日"])
    own.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").fingerprint == own.fingerprint


# ---- metrics of a classifier ---------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 12])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_sklearn(K: int, seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng, labels = np.random.default_rng(seed), [f"label {k}" * (1 + k % 2) for k in range(K)]
    true = rng.integers(0, K - (seed == 3), 60)  # with seed 3 the last label has no text
    found = np.where(rng.random(60) < 0.6, true, rng.integers(0, max(1, K - (seed == 2)), 60))
    report, wanted = compare(true, found, labels), {"labels": range(K), "zero_division": 0}
    assert str(report) == metrics.classification_report(true, found, target_names=labels, **wanted)
    assert np.array_equal(
        report.confusion, metrics.confusion_matrix(true, found, labels=wanted["labels"])
    )
    each = metrics.precision_recall_fscore_support(true, found, **wanted)
    ours = (report.precision, report.recall, report.f1, report.support)
    assert all(np.allclose(a, b, rtol=1e-12) for a, b in zip(ours, each, strict=True))
    for average in ("macro", "weighted"):
        each = metrics.precision_recall_fscore_support(true, found, average=average, **wanted)
        assert getattr(report, average) == pytest.approx(each[:3], rel=1e-12)
    assert report.accuracy == metrics.accuracy_score(true, found)
    assert report.matthews == pytest.approx(metrics.matthews_corrcoef(true, found), rel=1e-12)


def test_classifier_of_gpt2c_is_one_of_transformers(tmp_path: Path) -> None:
    """Its labels, its scores alone and in a padded batch, and the weighted loss of PyTorch."""
    config = GPT2Config(257, 32, 48, 2, 3, eos_token_id=256)
    GPT2(config, seed=2).save_pretrained(tmp_path / "base")
    Tokenizer.from_name("bytes").save_pretrained(tmp_path / "base")
    texts = [f"{'ab' * (1 + n % 5)} {n}" for n in range(24)]
    rows = [{"text": text, "label": ("ham", "spam")[n % 3 > 1]} for n, text in enumerate(texts)]
    classify(tmp_path / "base", rows, tmp_path / "run", learning_rate=0.01, max_iters=20)
    ours = Classifier.from_pretrained(tmp_path / "run")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run", attn_implementation="eager"
    ).eval()
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    assert theirs.config.label2id == {"ham": 0, "spam": 1}
    ids = [encode(text, ours.tokenizer, ours.model.config) for text in texts[:8]]
    scores = ours.model.scores(ids, keep=False)
    for row, expected in zip(ids, scores, strict=True):
        assert_close(
            "alone", theirs(torch.tensor([row])).logits[0].detach().numpy(), expected, 1e-5
        )
    longest = max(map(len, ids))
    padded = torch.tensor(
        [row + [theirs.config.pad_token_id] * (longest - len(row)) for row in ids]
    )
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    found = theirs(padded, attention_mask=mask).logits
    assert_close("padded", found.detach().numpy(), scores, LOGITS)
    theirs.save_pretrained(tmp_path / "theirs")
    assert GPT2.from_pretrained(tmp_path / "theirs").config.id2label == ("ham", "spam")

    labels = np.array([0, 0, 1, 0, 0, 1, 0, 1])
    weights = class_weights(labels, 2)
    found = found.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        found, torch.tensor(labels), torch.tensor(weights, dtype=torch.float32)
    )
    loss.backward()
    w = weights[labels]
    own, slopes = weighted_cross_entropy(found.detach().numpy(), labels, w, w.sum())
    assert own == pytest.approx(loss.item(), rel=1e-6)
    assert_close("gradient", slopes, found.grad.numpy(), 1e-6)


def test_class_weights_are_those_of_sklearn() -> None:
    utils = pytest.importorskip("sklearn.utils", reason="scikit-learn is not installed")
    labels = np.array([0, 0, 1, 2, 2, 2, 2])
    theirs = utils.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert np.allclose(class_weights(labels, 3), theirs, rtol=1e-12)


# ---- chat ----------------------------------------------------------------------------------------


def talks(count: int) -> Iterator[list[Message]]:
    """Yield random conversations, with every odd text among their contents."""
    rng = np.random.default_rng(0)
    texts = [text for text in (*ODD_TEXTS, *TEXTS, "user:\n", "\n\nassistant:\nHi") if text.strip()]
    for number in range(count):
        roles = ["system"] * (number % 2) + ["user", "assistant"] * int(rng.integers(1, 5))
        yield [Message(role, texts[rng.integers(len(texts))]) for role in roles]


def test_chat_template_of_transformers_is_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Their text, ids and mask of 200 conversations, and of the questions that begin these."""
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in talks(200):
        messages = [message._asdict() for message in talk]
        ids, learned = encode_chat(tokenizer, talk)
        out = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.decode(ids)
        assert out["input_ids"] == ids
        assert out["assistant_masks"] == list(map(int, learned))
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert asked["input_ids"] == encode_chat(tokenizer, talk[:-1], answer=True)[0]


# ---- distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.9, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_distillation_is_that_of_pytorch(beta: float, tau: float, rng: np.random.Generator) -> None:
    """The loss and its gradient; PyTorch's kl_div(a, b) is KL(b || a)."""
    given = [3 * rng.standard_normal((9, 50), np.float32) for _ in "zt"]
    z, t = (torch.tensor(each, dtype=torch.float64) for each in given)
    z.requires_grad_()
    p, q = (torch.log_softmax(each / tau, dim=1) for each in (z, t))

    def kl(first: Any, second: Any) -> Any:
        return torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(1)

    m = torch.log((1 - beta) * p.exp() + beta * q.exp())
    wanted = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta, beta * kl(q, m) + (1 - beta) * kl(p, m))
    (tau**2 * wanted).sum().backward()
    loss, gradient = divergence(*given, tau, beta)
    np.testing.assert_allclose(loss, tau**2 * wanted.detach().numpy(), rtol=2e-5)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=1e-4, atol=2e-6)


# ---- pruning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_transformers_loads_a_pruned_model(kind: str, tmp_path: Path) -> None:
    config = GPT2Config(257, 32, 48, 3, 3) if kind == "GPT-2" else LlamaConfig(257, 48, 80, 3, 4, 2)
    model = (GPT2 if kind == "GPT-2" else Llama)(config, seed=2)
    model.flat_parameters[...] *= 2
    model.save_pretrained(tmp_path / "whole")
    Tokenizer.from_name("bytes").save_pretrained(tmp_path / "whole")
    texts = [{"text": f"{n} and {n + 1}"} for n in range(20)]
    prune(tmp_path / "whole", texts, tmp_path / "small", layers=2, mlp=0.4, sparsity=0.5)
    small = type(model).from_pretrained(tmp_path / "small")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", attn_implementation="eager"
    )
    ids = np.arange(20)[None] * 11 % 257
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    assert small.config.n_layer == len(small.config.stack().layers) == 2
    np.testing.assert_allclose(small(ids), wanted, atol=2e-5)
