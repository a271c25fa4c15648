"""Fine-tuning: from a base model to one that does what is asked.

A method is an objective, a reader of examples and a verb. tune.py is the frame that all of them
have: base model in, examples in, a run's directory out. See the method's file for its formulas.

    sft        answers to prompts, to imitate
    reward     pairs of answers, of which one is better: a model that scores answers
    dpo        such pairs, or single answers that were liked or not, without a reward model
    grpo       prompts whose answers a rule or a model rewards
    distill    texts, with the probabilities of a larger model
    classify   texts and their labels
    prune      a smaller model in place of a learned one

Examples
--------
>>> import tempfile
>>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=257)
>>> sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (1, 2) for b in (1, 2, 3)]
>>> with tempfile.TemporaryDirectory() as directory:
...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/base")
...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/base")
...     result = gpt2c.finetune.sft(directory + "/base", sums, directory + "/run", max_iters=2)
6 examples (prompt and completion), ...
>>> result.step
2
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
