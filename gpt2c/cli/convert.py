"""`gpt2c convert`: flags in, files out."""

from __future__ import annotations

import argparse

from gpt2c.formats.convert import DTYPES, FORMATS, convert
from gpt2c.formats.llmc import EXPORT

__all__ = ["add_flags", "run_convert"]

EPILOG = f"""\
gpt2c convert RUN model.bin                     llm.c's model; --dtype bf16
gpt2c convert LLAMA model.bin                   llama2.c's model, if it is a Llama
gpt2c convert model.bin DIR                     Hugging Face's
gpt2c convert RUN model.gguf --dtype q8_0       llama.cpp's, with the tokenizer
gpt2c convert RUN tokenizer.bin                 llm.c's tokenizer, if the name contains tokenizer
gpt2c convert gpt2 DIR                          GPT-2's tokenizer as Hugging Face's files
gpt2c convert DATA DIR --format nanogpt         token files: nanoGPT's to llm.c's, or back

gpt2c does not read nanoGPT's ckpt.pt, because it is a pickle. With PyTorch, these lines turn it
into a directory "model". nanoGPT computes GELU exactly and GPT-2 approximates it, so the losses
differ in about the third digit:

{EXPORT}"""


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `gpt2c convert`."""
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = EPILOG
    verb.add_argument(
        "src",
        metavar="SRC",
        help="a run or other model's directory, llm.c's or llama2.c's model .bin, llm.c's tokenizer"
        " .bin, token files, or a tokenizer's name",
    )
    verb.add_argument("dst", metavar="DST", help="FILE.bin, FILE.gguf or a directory")
    verb.add_argument(
        "--format",
        choices=FORMATS,
        help="read or write nanoGPT's token files, which have no header",
    )
    verb.add_argument(
        "--dtype",
        choices=DTYPES,
        help="fp32 or bf16 for llm.c, fp32 for llama2.c, f32, f16 or q8_0 for GGUF",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace DST or its content")


def run_convert(options: argparse.Namespace) -> int:
    """`gpt2c convert`."""
    print(convert(options.src, options.dst, options.format, options.dtype, options.overwrite))
    return 0
