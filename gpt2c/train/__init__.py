"""Training: settings, optimizer, the loop, runs and their checkpoints."""

__all__ = [
    "checkpoints",
    "directory",
    "hooks",
    "logs",
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
