"""Training: settings, optimizer, the loop, runs and their checkpoints."""

__all__ = [
    "checkpoints",
    "hooks",
    "loop",
    "metrics",
    "needs",
    "optimizer",
    "plot",
    "pretrain",
    "run",
    "settings",
    "sharded",
    "stop",
    "tensorboard",
]
