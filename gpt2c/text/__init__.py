"""Text <-> token ids <-> batches. Knows no model."""

__all__ = [
    "batches",
    "bpe_trainer",
    "chat",
    "corpus",
    "documents",
    "examples",
    "gpt2_vocabulary",
    "labelled",
    "merges",
    "prepare",
    "ragged",
    "shards",
    "splits",
    "tokenizer",
    "vocabulary",
    "vocabulary_reader",
    "windows",
]
