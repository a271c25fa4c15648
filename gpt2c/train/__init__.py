"""A model -> a better model: settings, optimizer, the loop, runs and their checkpoints."""
