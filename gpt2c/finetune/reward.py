"""A reward model: a number for each text, higher for the answer that people prefer.

    hidden state of the last token -> score -> -log sigmoid(score of chosen - score of rejected)

The score is read at the last token of prompt and answer, without an end of text, as a classifier's
is: so an answer that is cut looks like any other, and transformers reads the same token. Its head
begins with random weights. preference.py has the formula.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from gpt2c.finetune.completions import Send
from gpt2c.finetune.given import RewardGiven
from gpt2c.finetune.judging import Array, Judged, Judging, JudgingSettings, Source
from gpt2c.finetune.pairs import Unit, pair_of, without_end
from gpt2c.finetune.preference import bradley_terry
from gpt2c.finetune.tune import Base, Result, tune
from gpt2c.formats.load import AnyConfig
from gpt2c.model.model import Model
from gpt2c.text.examples import Example, Record
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.run import Run
from gpt2c.train.settings import setting
from gpt2c.train.stop import Check

__all__ = ["RewardSettings", "reward"]


@dataclasses.dataclass(frozen=True)
class RewardSettings(JudgingSettings):
    """The settings of `gpt2c reward`.

    Examples
    --------
    >>> gpt2c.finetune.RewardSettings(batch_size=4, max_epochs=2.0).planned(examples=10).max_iters
    5
    """

    center_rewards_coefficient: float = setting(
        "reward", 0.0, "pulls the mean of rewards to 0; 0.01 is usual", least=0
    )


class Scores:
    """Judges pairs by their rewards."""

    def __init__(self, centring: float) -> None:
        self._centring = centring

    def values(self, model: Model, examples: Sequence[Example], keep: bool) -> Array:
        """See `Judge`."""
        return model.scores([one.ids for one in examples], keep=keep)[:, 0].astype(np.float64)

    def push(
        self, model: Model, examples: Sequence[Example], slopes: Array, final: Send = None
    ) -> None:
        """See `Judge`."""
        model.backward(d_scores=slopes[:, None], final=final)

    def __call__(self, units: Sequence[Unit], values: Array) -> Judged:
        """See `Judge`."""
        margins = np.array([unit.margin for unit in units])
        losses, slopes = bradley_terry(values, margins, self._centring)
        margin = values[0] - values[1]
        figures = {
            "accuracy": (margin > 0).astype(float),
            "margin": margin,
            "min_reward": values.min(axis=0),
            "mean_reward": values.mean(axis=0),
            "max_reward": values.max(axis=0),
        }
        return Judged(losses, slopes, figures)


class _Reward(Judging):
    verb = "reward"
    shown = ("accuracy", "margin")
    shares = ("accuracy",)
    unread = 0
    settings: RewardSettings

    def __init__(self, base: Base, settings: RewardSettings, source: Source) -> None:
        context = base.found.config.n_positions
        most = min(settings.max_length or context, context) - 1  # every token is read
        super().__init__(base, settings, source, ["preference"], unended, most)

    def config(self, base: AnyConfig) -> AnyConfig:
        if base.num_labels not in (None, 1):
            raise ValueError(f"the base has {base.num_labels} scores, and a reward is one")
        pad = self.tokenizer.eot if base.pad_token_id is None else base.pad_token_id
        return dataclasses.replace(base, num_labels=1, pad_token_id=pad)

    def judge(self, run: Run, units: Sequence[Unit], check: Check | None) -> Scores:
        return Scores(self.settings.center_rewards_coefficient)


def unended(record: Record, tokenizer: Tokenizer) -> Unit:
    """Return the pair of a record without ends of text."""
    return without_end(pair_of(record, tokenizer))


def reward(
    base: str | os.PathLike[str],
    examples: Source,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Unpack[RewardGiven],
) -> Result:
    """Train a reward model on pairs of answers, the better and the worse.

    Parameters
    ----------
    base : a directory of a model with its tokenizer, or a name on the hub
    examples : a file (JSONL, a JSON list, CSV), or a list of dicts: {"prompt", "chosen",
        "rejected"}, strings or lists of messages, or OpenAI's {"input", "preferred_output",
        "non_preferred_output"}; and "margin", if it is known by how much the chosen should be worth
        more
    out : the directory of the run, which becomes a model's
    resume : continue the run in `out`
    overwrite : `out` may exist and hold files
    settings : fields of `gpt2c.finetune.RewardSettings`

    Raises
    ------
    OSError, ValueError, MemoryError : see `gpt2c.finetune.tune.tune`

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=257)
    >>> pairs = [{"prompt": f"{a}?", "chosen": "yes", "rejected": "no"} for a in range(40)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/base")
    ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/base")
    ...     result = gpt2c.finetune.reward(
    ...         directory + "/base", pairs, directory + "/run", learning_rate=1e-3
    ...     )  # doctest: +ELLIPSIS
    ...     model = gpt2c.from_pretrained(directory + "/run")
    40 pairs, 2 held out; ...
    >>> yes, no = model.scores([list(b"3?yes"), list(b"3?no")])[:, 0]
    >>> bool(yes > no)
    True
    """

    def make(opened: Base, own: RewardSettings) -> Judging:
        return _Reward(opened, own, examples)

    return tune("reward", RewardSettings, make, base, out, settings, resume, overwrite, [examples])
