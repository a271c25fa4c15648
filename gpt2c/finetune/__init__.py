"""Fine-tuning: from a base model to one that does what examples, preferences or rewards ask."""
