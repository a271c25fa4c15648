"""How good a model is: loss, perplexity, choices, baselines. Knows nothing about training."""
