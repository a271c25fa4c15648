"""How good a model is: loss, perplexity, choices, baselines. Knows nothing about training."""

__all__ = [
    "baselines",
    "classifier",
    "confusion",
    "figures",
    "folds",
    "lm_eval",
    "loss",
    "metrics",
    "scoring",
    "text_baselines",
]
