"""Pruning: a trained model becomes smaller, or gets zeros, by what it does with a few texts.

    layers    those that change the stream least go: influence = 1 - E[cos(x_in, x_out)]
              (Men et al. 2024, arXiv:2403.03853)
    mlp       the inner neurons with the smallest E|activation| of each layer go
              (Muralidharan et al. 2024, arXiv:2407.14679)
    sparsity  the weights of each output's row with the smallest score become 0
              (wanda: |W_ij| ||X_j||, Sun et al. 2023, arXiv:2306.11695; magnitude: |W_ij|)

Fewer layers and neurons make a model smaller and faster, for every program. Zeros do not: dense
kernels multiply by them. Embeddings and heads stay. A pruned model is worse until it is healed, by
`gpt2c distill` with the unpruned one as its teacher, or by `gpt2c sft`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2c.causal_lm import CausalLM
from gpt2c.files.atomic import atomic_directory, check_directory
from gpt2c.finetune.data import Data, Source, SupervisedSettings, open_data
from gpt2c.finetune.tune import Base
from gpt2c.formats.load import AnyConfig, find_model
from gpt2c.kernels.backend import BackendName, get_backend
from gpt2c.kernels.checks import number, whole
from gpt2c.model.llama import LlamaConfig
from gpt2c.pretrained import MODELS
from gpt2c.text.examples import divided
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["METHODS", "Observed", "PruneSettings", "Pruned", "observe", "prune", "stays"]

METHODS = ("wanda", "magnitude")
Calibration = Callable[[], Iterator[NDArray[np.int32]]]  # of token ids, (T,) each, from the start
READ_AT_ONCE = 4096  # tokens of an evaluation
TIMED_ROUNDS, TIMED_SECONDS = 3, 0.15  # of each model, in turn


@dataclasses.dataclass(frozen=True)
class PruneSettings:
    """What is pruned, and how; None leaves it.

    Parameters
    ----------
    layers : how many layers stay
    mlp : the share of the inner neurons that stay
    sparsity : the share of the layers' weights that become 0
    method : the scores of these weights, "wanda" or "magnitude"
    mask_structure : "2:4" keeps 2 of each 4 weights that follow each other in a row, in place of a
        sparsity
    calibration_tokens : tokens of the training part that are observed

    Raises
    ------
    ValueError : nothing to prune, or a value is out of its range

    Examples
    --------
    >>> gpt2c.finetune.PruneSettings()
    Traceback (most recent call last):
    ValueError: name what to prune: layers, mlp, sparsity or mask_structure
    """

    layers: int | None = None
    mlp: float | None = None
    sparsity: float | None = None
    method: str = "wanda"
    mask_structure: str | None = None
    calibration_tokens: int = 4096

    def __post_init__(self) -> None:
        """Refuse what prunes nothing or everything."""
        if all(one is None for one in (self.layers, self.mlp, self.sparsity, self.mask_structure)):
            raise ValueError("name what to prune: layers, mlp, sparsity or mask_structure")
        if self.layers is not None:
            whole("layers", self.layers)
        for name in ("mlp", "sparsity"):
            if (share := getattr(self, name)) is not None and not 0 < number(name, share) < 1:
                raise ValueError(f"{name} must be a share above 0 and below 1, got {share}")
        if self.method not in METHODS:
            raise ValueError(f"method must be {' or '.join(METHODS)}, got {self.method!r:.50}")
        if whole("calibration_tokens", self.calibration_tokens) < 1:
            raise ValueError(
                f"calibration_tokens must be at least 1, got {self.calibration_tokens}"
            )
        if self.mask_structure is not None and self.sparsity is not None:
            raise ValueError("mask_structure is a sparsity of its own: pass one of them")
        self.group()

    def group(self) -> tuple[int, int] | None:
        """Return N and M of mask_structure: N of M weights stay.

        Examples
        --------
        >>> gpt2c.finetune.PruneSettings(mask_structure="2:4").group()
        (2, 4)
        """
        if self.mask_structure is None:
            return None
        numbers = str(self.mask_structure).split(":")
        if len(numbers) == 2 and all(n.isascii() and n.isdecimal() for n in numbers):
            N, M = (int(n) for n in numbers)
            if 0 < N < M:
                return N, M
        raise ValueError(
            "mask_structure must be N:M with N of M weights that stay, such as 2:4, got"
            f" {self.mask_structure!r:.50}"
        )


class Observed(NamedTuple):
    """What a model did with some texts.

    Attributes
    ----------
    influence : of each layer, (L,)
    firing : the mean |activation| of the inner neurons, (F,) for each layer
    norms : name of a linear layer's weight -> the norm of each of its inputs over all tokens, (C,)
    """

    influence: NDArray[np.float64]
    firing: list[NDArray[np.float64]]
    norms: dict[str, NDArray[np.float64]]


def observe(model: CausalLM, texts: Iterable[NDArray[np.int32]]) -> Observed:
    """Read texts of token ids, (T,) each, and observe the layers."""
    layers = model.config.stack().layers
    influence, count = np.zeros(len(layers)), 0
    firing = [np.zeros(model.config.inner) for _ in layers]
    squares: dict[str, NDArray[np.float64]] = {}
    for ids in texts:
        trace = model.trace(ids[None])
        count += len(ids)
        before = trace["encoded"][0].astype(np.float64)
        for i, layer in enumerate(layers):
            after = trace[f"h.{i}.out"][0].astype(np.float64)
            lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            influence[i] += (1 - (before * after).sum(1) / np.maximum(lengths, 1e-30)).sum()
            before = after
            firing[i] += np.abs(trace[f"h.{i}.mlp.act"][0]).sum(0, dtype=np.float64)
            for name, place in (
                (layer.attention.qkv.weight, "ln_1"),
                (layer.attention.proj.weight, "attn.att"),
                (layer.mlp.fc.weight, "ln_2"),
                (layer.mlp.proj.weight, "mlp.act"),
            ):
                square = np.square(trace[f"h.{i}.{place}"][0], dtype=np.float64).sum(0)
                squares[name] = squares.get(name, 0) + square
    norms = {name: np.sqrt(square) for name, square in squares.items()}
    return Observed(influence / count, [sums / count for sums in firing], norms)


def stays(
    scores: NDArray[Any], sparsity: float | None, group: tuple[int, int] | None = None
) -> NDArray[np.bool_]:
    """Return which weights stay: those with the highest scores of each row, (OC, C) bool.

    Parameters
    ----------
    scores : (OC, C)
    sparsity : the share of each row that goes, rounded to a whole number of weights
    group : N and M: in place of a sparsity, N of each M weights in a row stay

    Raises
    ------
    ValueError : M does not divide C
    """
    OC, C = scores.shape
    keep, size = (C - round((sparsity or 0) * C), C) if group is None else group
    if C % size:
        raise ValueError(f"a mask of {keep}:{size} needs rows of a multiple of {size}, got {C}")
    groups = scores.reshape(OC, C // size, size)
    ranks = np.argsort(np.argsort(-groups, axis=2, kind="stable"), axis=2, kind="stable")
    mask: NDArray[np.bool_] = (ranks < keep).reshape(OC, C)
    return mask


def without_layers(
    model: CausalLM, texts: Calibration, own: PruneSettings
) -> tuple[AnyConfig, Mapping[str, Any], str]:
    """Return the config and the tensors without the layers of least influence, and what went."""
    config: Any = model.config
    keep = own.layers or 0
    if not 0 < keep < config.n_layer:
        raise ValueError(
            f"layers says how many stay, from 1 to {config.n_layer - 1} of {config.n_layer}, got"
            f" {keep}"
        )
    influence = observe(model, texts()).influence
    kept = np.sort(np.argsort(-influence, kind="stable")[:keep]).tolist()
    tensors = {}
    for name, tensor in model.parameters.items():
        start, _, rest = name.removeprefix("h.").partition(".")
        if not name.startswith("h."):
            tensors[name] = tensor
        elif int(start) in kept:
            tensors[f"h.{kept.index(int(start))}.{rest}"] = tensor
    gone = [str(i) for i in range(config.n_layer) if i not in kept]
    field = "num_hidden_layers" if isinstance(config, LlamaConfig) else "n_layer"
    said = f"layers {', '.join(gone)} of {config.n_layer} went (counted from 0)"
    return dataclasses.replace(config, **{field: keep}), tensors, said


def without_neurons(
    model: CausalLM, texts: Calibration, own: PruneSettings
) -> tuple[AnyConfig, Mapping[str, Any], str]:
    """Return the config and the tensors without the inner neurons that fire least, and a text."""
    config: Any = model.config
    F = config.inner
    keep = round((own.mlp or 0) * F)
    if not 0 < keep < F:
        raise ValueError(
            f"mlp {own.mlp} of {F} inner neurons leaves {keep}: from 1 to {F - 1} must stay"
        )
    tensors, seen = dict(model.parameters), observe(model, texts())
    for layer, firing in zip(config.stack().layers, seen.firing, strict=True):
        kept = np.sort(np.argsort(-firing, kind="stable")[:keep])
        fc, proj = layer.mlp.fc, layer.mlp.proj
        rows = np.concatenate([kept + start for start in range(0, fc.OC, F)])  # gate, then up
        tensors[fc.weight] = model.parameters[fc.weight][rows]
        if fc.bias:
            tensors[fc.bias] = model.parameters[fc.bias][rows]
        tensors[proj.weight] = model.parameters[proj.weight][:, kept]
    field = "intermediate_size" if isinstance(config, LlamaConfig) else "n_inner"
    said = f"{F - keep:,} of {F:,} inner neurons of each layer went"
    return dataclasses.replace(config, **{field: keep}), tensors, said


def with_zeros(
    model: CausalLM, texts: Calibration, own: PruneSettings
) -> tuple[AnyConfig, Mapping[str, Any], str]:
    """Return the config and the tensors with zeros in the layers' matrices, and a text.

    One layer after the other: Wanda's norms are those of the inputs that the layers below, which
    have their zeros by then, give a layer.
    """
    config: Any = model.config
    zeros = total = 0
    sparse = type(model)(config, None, model.backend)
    sparse.load_parameters(model.parameters, "the dense model")
    for i in range(config.n_layer):
        norms = observe(sparse, texts()).norms if own.method == "wanda" else {}
        for name, weight in sparse.parameters.items():
            if not name.startswith(f"h.{i}.") or weight.ndim < 2:
                continue
            scores = np.abs(weight) * norms.get(name, 1.0)
            weight[~stays(scores, own.sparsity, own.group())] = 0
            zeros, total = zeros + int((weight == 0).sum()), total + weight.size
    said = f"{zeros / total:.0%} of the layers' weights are 0, by {own.method}"
    return config, sparse.parameters, said


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Attributes
    ----------
    out : its directory
    before, after : val_loss in nats per token, parameters, bytes, zeros (a share of all weights),
        tokens_per_second of reading
    said : what went
    """

    out: Path
    before: Mapping[str, float]
    after: Mapping[str, float]
    said: tuple[str, ...]


def prune(
    model: str | os.PathLike[str],
    examples: Source,
    out: str | os.PathLike[str],
    *,
    layers: int | None = None,
    mlp: float | None = None,
    sparsity: float | None = None,
    method: Literal["wanda", "magnitude"] = "wanda",
    mask_structure: str | None = None,
    calibration_tokens: int = 4096,
    backend: BackendName = "auto",
    threads: int = 0,
) -> Pruned:
    """Remove layers or neurons of a model, or set weights to 0, by what it does with examples.

    Several at once follow each other: layers, neurons, zeros, each after a look at what is left.

    Parameters
    ----------
    model : a directory of a model with its tokenizer, or a name on the hub; it stays as it is
    examples : see `gpt2c.finetune.sft`; the part that is held out measures the loss
    out : the directory of the pruned model, new or empty
    layers, mlp, sparsity, method, mask_structure, calibration_tokens : what is pruned, and how: the
        fields of `gpt2c.finetune.PruneSettings`
    backend, threads : see `gpt2c.from_pretrained`; 0 threads are as None there

    Raises
    ------
    OSError : a file is missing or cannot be written, or `out` is not empty
    ValueError : nothing or everything would be pruned, or an example is damaged; nothing was
        written

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=3, n_head=2, n_embd=32, n_positions=32, vocab_size=257)
    >>> texts = [{"text": f"{a} and {b}"} for a in "12" for b in "123"]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/model")
    ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/model")
    ...     pruned = gpt2c.finetune.prune(
    ...         directory + "/model", texts, directory + "/small", layers=2, mlp=0.5
    ...     )
    ...     gpt2c.from_pretrained(directory + "/small").config.n_inner
    64
    >>> pruned.after["parameters"] < pruned.before["parameters"]
    True
    """
    own = PruneSettings(layers, mlp, sparsity, method, mask_structure, calibration_tokens)
    out = Path(out)
    found = find_model(model)
    if found.weights != "fp32":
        raise ValueError(f"{model} has {found.weights} weights: prune it before it is quantized")
    if found.config.lora is not None:
        raise ValueError(f"{model} holds adapters: make one model with gpt2c merge, and prune that")
    found.config.require_language_head("pruning")
    check_directory(out, overwrite=True)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name another directory")
    tokenizer = Tokenizer.from_pretrained(found.path)  # examples may give theirs a template
    data = open_data(
        examples, Base(found, Tokenizer.from_pretrained(found.path)), SupervisedSettings()
    )
    kind: type[CausalLM] = MODELS[type(found.config)]
    ops = get_backend(backend, threads or None)
    texts = partial(calibration, data, own.calibration_tokens)
    first = last = kind.from_found(found, ops)
    said = []
    for stage, wanted in (
        (without_layers, own.layers),
        (without_neurons, own.mlp),
        (with_zeros, own.sparsity or own.mask_structure),
    ):
        if wanted is not None:
            config, tensors, text = stage(last, texts, own)
            last = kind(config, None, ops)
            last.load_parameters(tensors, "the pruned model")
            said.append(text)
    before, after = compared([first, last], data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as temporary:
        last.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Pruned(out, before, after, tuple(said))


def calibration(data: Data, tokens: int) -> Iterator[NDArray[np.int32]]:
    """Yield the inputs of training examples, in the order of training, so many tokens of them."""
    for step in range(-(-len(data.train) // data.order.batch_size)):
        for example in data.step(step):
            ids = example.ids[:-1][:tokens]
            tokens -= len(ids)
            yield ids
            if not tokens:
                return


def compared(models: Sequence[CausalLM], data: Data) -> list[dict[str, float]]:
    """Return the figures of models, see `Pruned`; their speeds are measured in turn."""
    batch = next(divided(data.judged, READ_AT_ONCE))
    inputs, targets = [one.ids[:-1] for one in batch], [one.targets for one in batch]
    seconds = [math.inf] * len(models)
    for _ in range(TIMED_ROUNDS):
        for place, model in enumerate(models):
            model.loss(inputs, targets, keep=False)
            began, calls = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < TIMED_SECONDS or not calls:
                model.loss(inputs, targets, keep=False)
                calls += 1
            seconds[place] = min(seconds[place], spent / calls)
    figures = []
    for model, fastest in zip(models, seconds, strict=True):
        parameters = model.config.num_parameters()
        zeros = sum(int((one == 0).sum()) for one in model.parameters.values() if one.ndim == 2)
        figures.append(
            {
                "val_loss": data.mean_loss(model, READ_AT_ONCE),
                "parameters": parameters,
                "bytes": 4 * parameters,
                "zeros": zeros / parameters,
                "tokens_per_second": sum(map(len, inputs)) / fastest,
            }
        )
    return figures
