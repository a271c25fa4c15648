"""Fine-tuning: from a base model to one that does what is asked.

A method is an objective, a reader of examples and a verb. tune.py is the frame that all of them
have: base model in, examples in, a run's directory out. See the method's file for its formulas.
"""

from gpt2c.finetune.classify import Classified, classify
from gpt2c.finetune.distill import distill
from gpt2c.finetune.dpo import dpo
from gpt2c.finetune.grpo import grpo
from gpt2c.finetune.prune import Pruned, prune
from gpt2c.finetune.reward import reward
from gpt2c.finetune.sft import sft
from gpt2c.finetune.tune import Result

__all__ = [
    "Classified",
    "Pruned",
    "Result",
    "classify",
    "distill",
    "dpo",
    "grpo",
    "prune",
    "reward",
    "sft",
]
