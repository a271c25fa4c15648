"""gpt2c's models for lm-evaluation-harness; see `gpt2c.evaluate.lm_eval`."""

from gpt2c.evaluate.lm_eval import GPT2LM

__all__ = ["GPT2LM"]
