"""How likely texts are, perplexity, and questions with choices; see `gpt2c.evaluate.scoring`."""

from gpt2c.evaluate.scoring import (
    Question,
    Scorer,
    accuracy,
    answer,
    perplexity,
    read_questions,
    token_logprobs,
)

__all__ = [
    "Question",
    "Scorer",
    "accuracy",
    "answer",
    "perplexity",
    "read_questions",
    "token_logprobs",
]
