"""Distillation: a small model, the student, learns the probabilities of a large one, the teacher.

With logits z of the student and t of the teacher, p = softmax(z / tau), q = softmax(t / tau), means
over the N learned tokens of a step, and r = kd_ratio:

    L = (1 - r) CE + r tau^2 KD
    KD = KL(q || p)                                  beta 0, Hinton et al. 2015, arXiv:1503.02531
    KD = KL(p || q)                                  beta 1, Gu et al. 2023, arXiv:2306.08543
    KD = beta KL(q || m) + (1 - beta) KL(p || m)     between: m = beta q + (1 - beta) p

The last is the generalised Jensen-Shannon divergence of Agarwal et al. 2023, arXiv:2306.13649.
tau^2 keeps the size of the gradient, which falls with 1 / tau^2. A share lmbda of the steps is
on-policy: the student writes completions of its own, and L is tau^2 KD on these, because nobody
has said what the right token is. Names are torchtune's (kd_ratio) and TRL's (beta, lmbda).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from gpt2c.causal_lm import CausalLM
from gpt2c.finetune.data import Source, SupervisedSettings, open_data
from gpt2c.finetune.given import DistillGiven
from gpt2c.finetune.settings import rate
from gpt2c.finetune.tune import Base, Method, Result, checksum, tune
from gpt2c.formats.load import AnyConfig, find_model
from gpt2c.kernels.backend import Backend, get_backend
from gpt2c.kernels.memory import Array
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.objective import CrossEntropy, Rows
from gpt2c.pretrained import MODELS
from gpt2c.text.examples import Example, divided, tokens_of
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.hooks import Learned
from gpt2c.train.loop import dropout_of
from gpt2c.train.run import Run
from gpt2c.train.settings import setting
from gpt2c.train.stop import Check

__all__ = ["DistillSettings", "Distillation", "distill", "divergence"]

BLOCK, ROWS = 1 << 18, 32  # logits of the teacher that are in memory at a time, if rows allow
POLICY = 1 << 33  # beside the seed: the random numbers of on-policy steps are no others


@dataclasses.dataclass(frozen=True)
class DistillSettings(SupervisedSettings):
    """The settings of `gpt2c distill`.

    Examples
    --------
    >>> gpt2c.finetune.DistillSettings(n_layer=2).shape
    {'n_layer': 2}
    """

    learning_rate: float = rate(3e-4)
    n_layer: int = setting(
        "model", 0, "layers of a new student; 0: the teacher's", least=0, fixed=True
    )
    n_head: int = setting(
        "model", 0, "heads of a new student; 0: the teacher's", least=0, fixed=True
    )
    n_embd: int = setting(
        "model", 0, "channels of a new student; 0: the teacher's", least=0, fixed=True
    )
    kd_ratio: float = setting("distill", 0.5, "the teacher's share of the loss, from 0 to 1")
    temperature: float = setting("distill", 2.0, "both models' logits are divided by this")
    beta: float = setting(
        "distill", 0.0, "0: forward KL, 1: reverse KL, between: generalised JSD", least=0
    )
    lmbda: float = setting(
        "distill", 0.0, "the share of steps on completions that the student writes", least=0
    )
    max_new_tokens: int = setting("distill", 128, "the most tokens of such a completion", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kd_ratio", "beta", "lmbda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 1e-3 <= self.temperature <= 1e6:
            raise ValueError(f"temperature must be from 0.001 to 1e6, got {self.temperature}")

    @property
    def shape(self) -> dict[str, int]:
        """The sizes of a new student that differ from the teacher's; {} for none."""
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")}
        return {name: size for name, size in sizes.items() if size}


def divergence(
    student: NDArray[Any], teacher: NDArray[Any], temperature: float, beta: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return tau^2 KD of each row, (n,), and its gradient by the student's logits, (n, V).

    Parameters
    ----------
    student, teacher : logits (n, V), not yet divided by the temperature
    temperature, beta : see the top of the file
    """
    tau = temperature
    log_p, p = log_softmax_and_softmax(student, tau)
    log_q, q = log_softmax_and_softmax(teacher, tau)
    if beta == 0:
        ratio = log_q - log_p
        ratio *= q
        p -= q
        p *= tau
        return tau**2 * ratio.sum(axis=1), p
    if beta == 1:
        toward, weight, rest = log_q, 1.0, 0.0
    else:
        toward = np.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))  # log m
        weight, rest = 1 - beta, beta * (q * (log_q - toward)).sum(axis=1)
    ratio = np.subtract(log_p, toward, out=log_p)
    own = (p * ratio).sum(axis=1)  # KL(p || q) or KL(p || m)
    ratio -= own[:, None]
    p *= ratio
    p *= tau * weight
    return tau**2 * (weight * own + rest), p


def log_softmax_and_softmax(
    logits: NDArray[Any], temperature: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the log-probabilities (n, V) of logits (n, V), and the probabilities."""
    logs: NDArray[Any] = logits / temperature
    logs -= logs.max(axis=1, keepdims=True)
    p = np.exp(logs)
    total = p.sum(axis=1, keepdims=True)
    p /= total
    logs -= np.log(total)
    return logs, p


class Distillation(CrossEntropy):
    """The loss at the top of the file, an objective of `gpt2c.model.objective`.

    Parameters
    ----------
    targets : (N,) int32; rows of negative ones have no loss
    teacher : computes logits of a block of rows, so those of a whole batch are never in memory
    hidden : (N, C) of the teacher, see `Model.hidden`
    ratio : of KD; 1 is without cross-entropy
    temperature, beta : see `divergence`

    Attributes
    ----------
    ce, kd : sums over the rows learned so far; ce stays 0 without cross-entropy
    """

    def __init__(
        self,
        targets: NDArray[np.int32],
        teacher: CausalLM,
        hidden: Array,
        ratio: float,
        temperature: float,
        beta: float,
    ) -> None:
        super().__init__(targets)
        self._teacher, self._hidden = teacher, hidden
        self._ratio, self._temperature, self._beta = ratio, temperature, beta
        self.ce = self.kd = 0.0

    def losses(self, ops: Backend, out: Array, logits: Array, rows: Rows) -> None:
        """See `Objective`."""
        self.learn(ops, out, logits, rows, 0.0)
        out *= self.live[rows]

    def learn(self, ops: Backend, out: Array, logits: Array, rows: Rows, scale: float) -> None:
        """See `Objective`."""
        hidden, size = self._hidden[rows], max(ROWS, BLOCK // logits.shape[1])
        numbers = np.arange(len(self.live))[rows]
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            self._learn(ops, out[part], logits[part], numbers[part], hidden[part], scale)

    def _learn(
        self, ops: Backend, out: Array, logits: Array, rows: Rows, hidden: Array, scale: float
    ) -> None:
        kd, gradient = divergence(
            logits, self._teacher.logits(hidden), self._temperature, self._beta
        )
        gradient *= scale * self._ratio
        self.kd += float(kd.sum(dtype=np.float64))
        if self._ratio == 1:
            out[...], logits[...] = kd, gradient
            return
        super().learn(ops, out, logits, rows, scale * (1 - self._ratio))
        self.ce += float(out.sum(dtype=np.float64))
        logits += gradient
        out *= 1 - self._ratio
        out += self._ratio * kd


def student_config(teacher: AnyConfig, n_layer: int, n_head: int, n_embd: int) -> AnyConfig:
    """Return the config of a new student: the teacher's, but for the sizes that are not 0.

    The MLP keeps its size relative to the channels, and heads share keys and values as before.

    Raises
    ------
    ValueError : heads do not divide the channels
    """
    C = n_embd or teacher.n_embd
    inner = max(1, round(teacher.inner * C / teacher.n_embd))
    if isinstance(teacher, LlamaConfig):
        NH = n_head or teacher.num_attention_heads
        KV = max(1, NH * teacher.KV // teacher.num_attention_heads)
        return dataclasses.replace(
            teacher,
            num_hidden_layers=n_layer or teacher.n_layer,
            num_attention_heads=NH,
            num_key_value_heads=KV if NH % KV == 0 else NH,
            head_dim=None,
            hidden_size=C,
            intermediate_size=inner,
        )
    return dataclasses.replace(
        teacher,
        n_layer=n_layer or teacher.n_layer,
        n_head=n_head or teacher.n_head,
        n_embd=C,
        n_inner=None if teacher.n_inner is None else inner,
    )


class _Distill(Method):
    verb = "distill"
    shown = ("ce", "kd")
    unit = "nats/token"
    loss = "loss\nvalidation: nats per token (lower is better)"

    def __init__(self, base: Base, settings: DistillSettings, source: Source, teacher: str) -> None:
        self._settings, self.tokenizer = settings, base.tokenizer
        found = find_model(teacher)
        for config in (found.config, base.found.config):
            config.require_language_head("distillation")
        shared = Tokenizer.from_pretrained(found.path).fingerprint == base.tokenizer.fingerprint
        sizes = found.config.vocab_size, base.found.config.vocab_size
        if not shared or sizes[0] != sizes[1]:
            raise ValueError(
                f"the teacher {teacher} has another vocabulary than the student, {sizes[0]:,} and"
                f" {sizes[1]:,} tokens: both must give the same tokens the same ids"
            )
        self._data = open_data(source, base, settings)
        self.facts, self.examples = self._data.facts, len(self._data.train)
        most, self.longest = found.config.n_positions, self._data.longest
        if settings.lmbda:
            if self._data.format == "text":
                raise ValueError(
                    "on-policy steps need prompts, but the data is text: lmbda must be 0"
                )
            asked = max(one.asked for one in self._data.train)
            context = base.found.config.n_positions
            longest = min(asked + settings.max_new_tokens, context + 1)
            self.longest = max(self.longest, longest)
        if self.longest > most + 1:
            raise ValueError(
                f"the teacher {teacher} reads at most {most:,} tokens, but an example has"
                f" {self.longest - 1:,}: lower max_length"
            )
        backend = get_backend(settings.backend, settings.threads or None)
        weights = None if found.weights == "fp32" else found.weights
        self._teacher = MODELS[type(found.config)].from_found(
            found, backend, None, weights, precision=settings.precision
        )
        self.models = {"teacher": checksum(self._teacher)}
        self._teacher_loss: float | None = None

    def config(self, base: AnyConfig) -> AnyConfig:
        own = self._settings
        return student_config(base, own.n_layer, own.n_head, own.n_embd) if own.shape else base

    def lines(self) -> Iterator[str]:
        yield from self._data.lines()
        yield f"the teacher has {self._teacher.config.num_parameters():,} parameters"

    def learn(self, run: Run) -> Learned:
        own, model, examples = self._settings, run.model, self._data.step(run.step)
        written = self._written(run, examples) if self._is_on_policy(run.step) else []
        examples, ratio = (written, 1.0) if written else (examples, own.kd_ratio)
        count = sum(int(one.learned[1:].sum()) for one in examples)
        share = run.world.share(len(examples))
        model.zero_grad()
        loss, ce, kd, first = 0.0, 0.0, 0.0, tokens_of(examples[: share.start])
        for batch in run.parts(divided(examples[share], own.batch_tokens)):
            targets = np.concatenate([one.targets for one in batch])
            inputs = [one.ids[:-1] for one in batch]
            hidden = self._teacher.hidden(inputs)
            objective = Distillation(
                *(targets, self._teacher, hidden, ratio, own.temperature, own.beta)
            )
            dropout = dropout_of(run.settings, run.step, first)
            loss += model.loss(inputs, objective, count=count, dropout=dropout)
            model.backward(final=run.final)
            ce, kd = ce + objective.ce, kd + objective.kd
            first += sum(map(len, inputs))
        loss, ce, kd = run.world.sum([loss, ce, kd])
        metrics = {"kd": kd / count} | ({"ce": ce / count} if ratio < 1 else {})
        if own.lmbda:
            metrics["on_policy"] = float(bool(written))
        return Learned(loss, tokens_of(examples), metrics)

    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        most, world = self._settings.batch_tokens, run.world
        if self._teacher_loss is None:
            self._teacher_loss = self._data.mean_loss(self._teacher, most, check, world)
        loss = self._data.mean_loss(run.model, most, check, world)
        return {"val_loss": loss, "val_teacher_loss": self._teacher_loss}

    def _is_on_policy(self, step: int) -> bool:
        """Return whether the student writes the completions of a step; the seed decides."""
        bits = int(np.random.PCG64([self._settings.seed, POLICY, step]).random_raw())
        return bits < self._settings.lmbda * 2.0**64

    def _written(self, run: Run, examples: Sequence[Example]) -> list[Example]:
        """Return the prompts of examples with completions that the student samples.

        A prompt that fills the context is left out.
        """
        model, eot, own = run.model, self.tokenizer.eot, self._settings
        prompts = [one.ids[: one.asked] for one in examples]
        prompts = [prompt for prompt in prompts if len(prompt) <= model.config.n_positions]
        if not prompts:
            return []

        def texts() -> list[list[int]]:
            found = model.generate(
                prompts,
                own.max_new_tokens,
                stop=eot,
                on_full="stop",
                seed=own.seed << 32 | run.step,
            )
            return [text.tolist() for text in found]

        written = []
        for prompt, text in zip(prompts, run.world.by_first(texts), strict=True):
            ends = [place for place in range(len(prompt), len(text)) if text[place] == eot]
            ids = np.array(text[: ends[0] + 1 if ends else None], np.int32)
            written.append(Example(ids, np.arange(len(ids)) >= len(prompt), "the student's text"))
        return written


def distill(
    teacher: str | os.PathLike[str],
    examples: Source,
    out: str | os.PathLike[str],
    *,
    student: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Unpack[DistillGiven],
) -> Result:
    """Teach a small model what a large one predicts.

    Parameters
    ----------
    teacher : a directory of a model with its tokenizer, or a name on the hub; it stays as it is
    examples : see `gpt2c.finetune.sft`
    out : the directory of the run, which becomes the student's
    student : a directory of a model with the same tokenizer, for instance a pruned teacher; None
        for a new one of the teacher's kind, whose n_layer, n_head or n_embd is in the settings
    resume : continue the run in `out`
    overwrite : `out` may exist and hold files
    settings : fields of `gpt2c.finetune.DistillSettings`

    Raises
    ------
    OSError, ValueError, MemoryError : see `gpt2c.finetune.tune.tune`; the models have other
        vocabularies, or there is no student

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=257)
    >>> texts = [{"text": f"{a} and {b}"} for a in "12" for b in "123"]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/teacher")
    ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/teacher")
    ...     result = gpt2c.finetune.distill(
    ...         directory + "/teacher", texts, directory + "/run", n_layer=1, max_epochs=2
    ...     )  # doctest: +ELLIPSIS
    6 examples (text), ...
    >>> list(result.after)
    ['val_loss', 'val_teacher_loss']
    """

    def make(base: Base, own: DistillSettings) -> Method:
        if student is None and not own.shape:
            raise ValueError("a student is needed: name one, or give n_layer, n_head or n_embd")
        if student is not None and own.shape:
            raise ValueError(
                f"the student {student} has its own shape: drop {', '.join(own.shape)}, or the"
                " student"
            )
        return _Distill(base, own, examples, os.fspath(teacher))

    base = teacher if student is None else student
    if student is None:
        settings.setdefault("random_weights", True)
    reads = [examples, teacher]
    return tune("distill", DistillSettings, make, base, out, settings, resume, overwrite, reads)
