"""Training: settings, optimizer, the loop, runs and their checkpoints."""
