"""The command line: one file for each verb."""

__all__ = [
    "bench",
    "chat",
    "classify",
    "convert",
    "demo",
    "distill",
    "eval",
    "finetune",
    "flags",
    "generate",
    "info",
    "main",
    "merge",
    "plot",
    "prepare",
    "prune",
    "signals",
    "texts",
    "tokens",
]
