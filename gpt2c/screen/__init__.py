"""Output for a person: terminal, progress, pictures. Knows no model."""

__all__ = [
    "command",
    "picture",
    "progress",
    "terminal",
]
