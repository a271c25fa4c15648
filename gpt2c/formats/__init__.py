"""Models and tokenizers <-> the files of other projects. Knows nothing about training."""

__all__ = [
    "convert",
    "gguf",
    "gpt2_layout",
    "huggingface",
    "layout",
    "llama2c",
    "llama_layout",
    "llmc",
    "load",
    "nanogpt",
    "peft",
    "rotary",
]
