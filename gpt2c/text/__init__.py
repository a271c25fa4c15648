"""Text <-> token ids <-> batches. Knows no model."""
