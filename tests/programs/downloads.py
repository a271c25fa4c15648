"""Downloads: all that a model's readers need, and one alone."""

from __future__ import annotations

import gpt2c
from gpt2c.files import hub
from programs.common import main


def find(repo: str) -> None:
    """Print the path of a model."""
    print(hub.find(repo))


def read(repo: str) -> None:
    """Read a model in every way, and print something of each."""
    generator = gpt2c.Generator.from_pretrained(repo)
    print(generator.generate("hello", max_new_tokens=4, temperature=0))
    print(gpt2c.GPT2.from_pretrained(repo, quantize="int8").weights)
    print(gpt2c.from_pretrained(repo, quantize="fp16").weights)
    print(gpt2c.Tokenizer.from_pretrained(repo).vocab_size)


if __name__ == "__main__":
    main(globals())
