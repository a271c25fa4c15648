"""Supervised fine-tuning: a model learns the answers of examples, not their prompts.

    L = -(1/M) sum of log p(y_t | tokens before) over the M learned tokens of a step

The learned tokens are a completion or the assistant's messages, each with the end of text that
closes it; of a plain text they are all tokens. Examples follow each other without padding, and none
sees another. The mean is over the learned tokens of the whole step, however it is divided.

Source: Ouyang et al. 2022, arXiv:2203.02155, for the method; TRL's SFTTrainer for the names.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from gpt2c.causal_lm import CausalLM
from gpt2c.finetune.data import Source, SupervisedSettings, open_data
from gpt2c.finetune.given import SFTGiven
from gpt2c.finetune.tune import Base, Method, Result, tune
from gpt2c.kernels.backend import Backend
from gpt2c.kernels.memory import Array
from gpt2c.model.objective import CrossEntropy, Rows
from gpt2c.parallel.world import ALONE, World
from gpt2c.text.examples import Example, divided, tokens_of
from gpt2c.train.hooks import Learned
from gpt2c.train.loop import dropout_of
from gpt2c.train.run import Run
from gpt2c.train.settings import setting
from gpt2c.train.stop import Check

__all__ = ["SFTSettings", "sft"]

AT_ONCE = 16  # prompts that are answered together


@dataclasses.dataclass(frozen=True)
class SFTSettings(SupervisedSettings):
    """The settings of `gpt2c sft`.

    Examples
    --------
    >>> gpt2c.finetune.SFTSettings(lora=True, lora_r=4).adapters.r
    4
    """

    eval_answers: int = setting(
        "sft", 32, "held-out prompts that each evaluation answers, greedily", least=0
    )


class Answers(CrossEntropy):
    """Cross-entropy that counts the rows whose likeliest token is the target."""

    def __init__(self, targets: NDArray[np.int32]) -> None:
        super().__init__(targets)
        self.right = 0

    def _forward(self, ops: Backend, out: Array, logits: Array, rows: Rows) -> Array:
        self.right += int(np.count_nonzero(logits.argmax(axis=1) == self._targets[rows]))
        return super()._forward(ops, out, logits, rows)


class _SFT(Method):
    verb = "sft"
    shown = ("mean_token_accuracy",)
    unit = "nats/token"

    def __init__(self, base: Base, settings: SFTSettings, source: Source) -> None:
        base.found.config.require_language_head("sft")
        self._data, self._settings = open_data(source, base, settings), settings
        self.tokenizer, self.facts = base.tokenizer, self._data.facts
        if settings.eval_answers and self._data.format != "text":
            self.drawn = ("ended", "exact_match")
        self.examples, self.longest = len(self._data.train), self._data.longest

    def lines(self) -> Iterator[str]:
        return self._data.lines()

    def learn(self, run: Run) -> Learned:
        model, step = run.model, self._data.step(run.step)
        count = sum(int(one.learned[1:].sum()) for one in step)
        own = run.world.share(len(step))
        model.zero_grad()
        loss, right, first = 0.0, 0.0, tokens_of(step[: own.start])
        for batch in run.parts(divided(step[own], self._settings.batch_tokens)):
            objective = Answers(np.concatenate([one.targets for one in batch]))
            dropout = dropout_of(run.settings, run.step, first)
            inputs = [one.ids[:-1] for one in batch]
            loss += model.loss(inputs, objective, count=count, dropout=dropout)
            model.backward(final=run.final)
            right += objective.right
            first += sum(map(len, inputs))
        loss, right = run.world.sum([loss, right])
        return Learned(loss, tokens_of(step), {"mean_token_accuracy": right / count})

    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        examples = self._data.judged
        total, right, count = 0.0, 0.0, 0.0
        for batch in run.world.turns(divided(examples, self._settings.batch_tokens), check):
            objective = Answers(np.concatenate([one.targets for one in batch]))
            total += run.model.loss([one.ids[:-1] for one in batch], objective, keep=False, count=1)
            right += objective.right
            count += int(objective.live.sum())
        total, right, count = run.world.sum([total, right, count])
        figures = {"val_loss": total / count, "val_mean_token_accuracy": right / count}
        asked = [] if self._data.format == "text" else examples[: self._settings.eval_answers]
        if asked and math.isfinite(total):
            figures |= answered(run.model, asked, self.tokenizer.eot, check, run.world)
        return figures


def answered(
    model: CausalLM,
    examples: Sequence[Example],
    eot: int,
    check: Check | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """Answer the last prompt of examples greedily; return how well. One that is cut is not asked.

    The ranks of `world` take turns.

    Returns
    -------
    val_ended : the share of answers that end by themselves
    val_exact_match : the share that equal the example's, with its end
    """
    asked = []
    for one in examples:
        start = one.asked
        if not one.cut and start < len(one.ids) and start < model.config.n_positions:
            asked.append((one.ids[:start], one.ids[start:].tolist()))
    ended = right = 0.0
    longest = max((len(answer) for _, answer in asked), default=0)
    for start in world.turns(range(0, len(asked), AT_ONCE), check):
        group = asked[start : start + AT_ONCE]
        texts = model.generate(
            [prompt for prompt, _ in group], 2 * longest, temperature=0, stop=eot, on_full="stop"
        )
        for text, (prompt, answer) in zip(texts, group, strict=True):
            new = text[len(prompt) :].tolist()
            if eot in new:
                new = new[: new.index(eot) + 1]
                ended += 1
            right += new == answer
    ended, right = world.sum([ended, right])
    count = max(1, len(asked))
    return {"val_ended": ended / count, "val_exact_match": right / count}


def sft(
    base: str | os.PathLike[str],
    examples: Source,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Unpack[SFTGiven],
) -> Result:
    """Fine-tune a base model on examples of what it should write.

    Parameters
    ----------
    base : a directory of a model with its tokenizer, or a name on the hub
    examples : a file (JSONL, a JSON list, CSV), or a list of dicts: {"prompt", "completion"},
        {"messages"}, Alpaca's, ShareGPT's, or {"text"}; or a directory of `gpt2c prepare`, whose
        text is learned as in pretraining. An answer in messages whose "weight" is 0 is context
    out : the directory of the run, which becomes a model's
    resume : continue the run in `out`
    overwrite : `out` may exist and hold files
    settings : fields of `gpt2c.finetune.SFTSettings`

    Raises
    ------
    OSError, ValueError, MemoryError : see `gpt2c.finetune.tune.tune`

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=257)
    >>> sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in "12" for b in "123"]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/base")
    ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/base")
    ...     result = gpt2c.finetune.sft(
    ...         directory + "/base", sums, directory + "/run", learning_rate=0.01, max_epochs=20
    ...     )  # doctest: +ELLIPSIS
    6 examples (prompt and completion), ...
    >>> result.after["val_loss"] < result.before["val_loss"]
    True
    """
    return tune(
        "sft",
        SFTSettings,
        lambda opened, own: _SFT(opened, own, examples),
        *(base, out, settings, resume, overwrite, [examples]),
    )
