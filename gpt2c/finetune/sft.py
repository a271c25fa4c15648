"""Supervised fine-tuning: a model learns the answers of examples, not their prompts.

    L = -(1/M) sum of log p(y_t | tokens before) over the M learned tokens of a step

The learned tokens are a completion or the assistant's messages, each with the end of text that
closes it; of a plain text they are all tokens. Examples follow each other without padding, and none
sees another. The mean is over the learned tokens of the whole step, however it is divided.

Source: Ouyang et al. 2022, arXiv:2203.02155, for the method; TRL's SFTTrainer for the names.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.causal_lm import CausalLM
from gpt2c.finetune.report import Counts, coloured
from gpt2c.finetune.settings import FinetuneSettings
from gpt2c.finetune.tune import Base, Check, Method, Result, tune
from gpt2c.kernels.backend import Backend
from gpt2c.kernels.memory import Array
from gpt2c.model.objective import CrossEntropy, Rows
from gpt2c.text.chat import CHAT_TEMPLATE
from gpt2c.text.examples import Example, divided, fingerprint, kept, read_records, supervised
from gpt2c.text.ragged import Order, held_out
from gpt2c.train.hooks import Learned
from gpt2c.train.loop import dropout_of
from gpt2c.train.run import Run
from gpt2c.train.settings import setting

__all__ = ["SFTSettings", "sft"]

FORMATS = ("messages", "sharegpt", "alpaca", "prompt and completion", "text")
AT_ONCE = 16  # prompts that are answered together


@dataclasses.dataclass(frozen=True)
class SFTSettings(FinetuneSettings):
    """The settings of `gpt2c sft`."""

    prompt_field: str = setting("sft", "", "the name of the field prompt, if it is another")
    completion_field: str = setting("sft", "", "the name of the field completion")
    text_field: str = setting("sft", "", "the name of the field text")
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

    def __init__(
        self, base: Base, settings: SFTSettings, source: str | Path | Sequence[Mapping[str, Any]]
    ) -> None:
        self.tokenizer = tokenizer = base.tokenizer
        names = {
            "prompt": settings.prompt_field,
            "completion": settings.completion_field,
            "text": settings.text_field,
        }
        found = read_records(source, FORMATS, names)
        self.format = found.format
        if found.format not in ("prompt and completion", "text"):
            tokenizer.chat_template = CHAT_TEMPLATE
        context = base.found.config.n_positions
        most = min(settings.max_length or context, context)
        all_of_them, reasons = kept(
            found.records, lambda record: supervised(record, found.format, tokenizer), most
        )
        if not all_of_them:
            raise ValueError(f"no example is left to learn from: {Counts(reasons)}")
        out = held_out(range(len(all_of_them)), settings.val_fraction, settings.seed)
        self._train = [one for one, held in zip(all_of_them, out, strict=True) if not held]
        self._val = [one for one, held in zip(all_of_them, out, strict=True) if held]
        self._settings, self._reasons = settings, reasons
        self.examples = len(self._train)
        self.longest = max(len(one.ids) for one in all_of_them)
        self.facts = fingerprint(all_of_them)
        self._order = Order(self.examples, settings.batch_size, settings.seed)

    def lines(self) -> Iterator[str]:
        every = [*self._train, *self._val]
        tokens = sum(len(one.ids) for one in every)
        learned = sum(int(one.learned[1:].sum()) for one in every)
        held = f", {len(self._val):,} held out" if self._val else ""
        yield (
            f"{len(every):,} examples ({self.format}){held}; left out: {Counts(self._reasons)};"
            f" {tokens:,} tokens, {learned / tokens:.0%} of them learned; the longest example has"
            f" {self.longest:,}"
        )
        yield f"the first example, with its learned part {coloured(every[0], self.tokenizer)}"

    def learn(self, run: Run) -> Learned:
        model, step = run.model, [self._train[n] for n in self._order.step(run.step)]
        count = sum(int(one.learned[1:].sum()) for one in step)
        model.zero_grad()
        loss, right, first = 0.0, 0, 0
        for batch in divided(step, self._settings.batch_tokens):
            objective = Answers(np.concatenate([one.targets for one in batch]))
            dropout = dropout_of(run.settings, run.step, first)
            inputs = [one.ids[:-1] for one in batch]
            loss += model.loss(inputs, objective, count=count, dropout=dropout)
            model.backward()
            right += objective.right
            first += sum(map(len, inputs))
        return Learned(loss, first, {"mean_token_accuracy": right / count})

    def evaluate(self, run: Run, check: Check) -> dict[str, float]:
        examples = self._val or self._train[: self._settings.batch_size]
        total, right, count = 0.0, 0, 0
        for batch in divided(examples, self._settings.batch_tokens):
            if check:
                check()
            objective = Answers(np.concatenate([one.targets for one in batch]))
            total += run.model.loss([one.ids[:-1] for one in batch], objective, keep=False, count=1)
            right += objective.right
            count += int(objective.live.sum())
        figures = {"val_loss": total / count, "val_mean_token_accuracy": right / count}
        asked = [] if self.format == "text" else examples[: self._settings.eval_answers]
        if asked:
            figures |= answered(run.model, asked, self.tokenizer.eot, check)
        return figures


def answered(
    model: CausalLM, examples: Sequence[Example], eot: int, check: Check = None
) -> dict[str, float]:
    """Answer the last prompt of examples greedily; return how well.

    Returns
    -------
    val_ended : the share of answers that end by themselves
    val_exact_match : the share that equal the example's, with its end
    """
    asked = []
    for one in examples:
        start = int(np.flatnonzero(~one.learned)[-1]) + 1
        if start < len(one.ids) and start < model.config.n_positions:
            asked.append((one.ids[:start], one.ids[start:].tolist()))
    ended = right = 0
    longest = max((len(answer) for _, answer in asked), default=0)
    for start in range(0, len(asked), AT_ONCE):
        if check:
            check()
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
    count = max(1, len(asked))
    return {"val_ended": ended / count, "val_exact_match": right / count}


def sft(
    base: str | os.PathLike[str],
    examples: str | Path | Sequence[Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Fine-tune a base model on examples of what it should write.

    Parameters
    ----------
    base : a directory of a model with its tokenizer, or a name on the hub
    examples : a file (JSONL, a JSON list, CSV), or a list of dicts: {"prompt", "completion"},
        {"messages"}, Alpaca's, ShareGPT's, or {"text"}
    out : the directory of the run, which becomes a model's
    resume : continue the run in `out`
    overwrite : `out` may exist and hold files
    settings : fields of `gpt2c.finetune.sft.SFTSettings`

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
        *(base, out, settings, resume, overwrite),
    )
