"""Models and tokenizers <-> the files of other projects. Knows nothing about training."""
