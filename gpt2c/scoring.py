"""Log-probabilities, perplexity, and multiple-choice questions; see `gpt2c.evaluate.scoring`.

Examples
--------
>>> from gpt2c import scoring
>>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
>>> model = gpt2c.GPT2(config, seed=1)
>>> ids = tuple(gpt2c.Tokenizer.from_name("bytes").encode("a text longer than the context"))
>>> loss, perplexity = scoring.perplexity(model, ids, stride=8)
>>> round(loss, 1)  # nats per token: for a fresh model all 257 tokens are equally likely
5.6
>>> endings = ids[6:9], ids[9:14]
>>> question = scoring.Question(ids[:6], endings, label=1, characters=(3, 5))
>>> right = scoring.answer(model, [question])
>>> [name for name, _ in zip(scoring.METRICS, scoring.accuracy(right))]
['acc', 'acc_norm', 'acc_per_token']
"""

from gpt2c.evaluate.scoring import (
    METRICS,
    Question,
    Scorer,
    accuracy,
    answer,
    perplexity,
    read_questions,
    token_logprobs,
)

__all__ = [
    "METRICS",
    "Question",
    "Scorer",
    "accuracy",
    "answer",
    "perplexity",
    "read_questions",
    "token_logprobs",
]
