"""Fine-tuning: from a base model to one that does what is asked.

A method is an objective, a reader of examples and a verb. tune.py is the frame that all of them
have: base model in, examples in, a run's directory out. See the method's file for its formulas.
"""

from gpt2c.finetune.classify import Classified, ClassifySettings, classify
from gpt2c.finetune.distill import DistillSettings, distill
from gpt2c.finetune.dpo import DPOSettings, dpo
from gpt2c.finetune.grpo import GRPOSettings, grpo
from gpt2c.finetune.prune import Pruned, PruneSettings, prune
from gpt2c.finetune.reward import RewardSettings, reward
from gpt2c.finetune.sft import SFTSettings, sft
from gpt2c.finetune.tune import Result

__all__ = [
    "Classified",
    "ClassifySettings",
    "DPOSettings",
    "DistillSettings",
    "GRPOSettings",
    "PruneSettings",
    "Pruned",
    "Result",
    "RewardSettings",
    "SFTSettings",
    "classify",
    "distill",
    "dpo",
    "grpo",
    "prune",
    "reward",
    "sft",
]
