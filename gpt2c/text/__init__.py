"""Text <-> token ids <-> batches. Knows no model."""

__all__ = [
    "batches",
    "bpe_trainer",
    "chat",
    "corpus",
    "documents",
    "examples",
    "labelled",
    "prepare",
    "ragged",
    "shards",
    "splits",
    "tokenizer",
    "vocabulary",
]
