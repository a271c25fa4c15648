"""A model or tokenizer <-> the files of other projects. Knows nothing of training."""
