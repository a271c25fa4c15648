"""`gpt2c convert`: flags in, files out."""

from __future__ import annotations

import argparse

from gpt2c.formats.convert import DTYPES, FORMATS, convert
from gpt2c.formats.llmc import EXPORT

__all__ = ["add_flags", "run_convert"]

EPILOG = f"""\
gpt2c convert RUN model.bin                     llm.c's model; --dtype bf16
gpt2c convert model.bin DIR                     Hugging Face's
gpt2c convert RUN model.gguf --dtype q8_0       llama.cpp's, with the tokenizer
gpt2c convert RUN tokenizer.bin                 llm.c's tokenizer, where the name says tokenizer
gpt2c convert gpt2 DIR                          GPT-2's tokenizer as Hugging Face's files
gpt2c convert DATA DIR --format nanogpt         token files: nanoGPT's to llm.c's, or back

nanoGPT's ckpt.pt is a pickle, which gpt2c does not read. Where there is PyTorch, these lines
make of it a directory "model" (nanoGPT computes GELU itself, GPT-2 an approximation of it, so the
losses differ in the third place or so):

{EXPORT}"""


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Say what `gpt2c convert` takes."""
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = EPILOG
    verb.add_argument(
        "src",
        metavar="SRC",
        help="a run or other GPT-2 directory, llm.c's model or tokenizer .bin, token files, or a"
        " tokenizer's name",
    )
    verb.add_argument("dst", metavar="DST", help="FILE.bin, FILE.gguf or a directory")
    verb.add_argument(
        "--format",
        choices=FORMATS,
        help="read or write nanoGPT's token files, which have no header",
    )
    verb.add_argument(
        "--dtype", choices=DTYPES, help="fp32 or bf16 for llm.c, f32, f16 or q8_0 for GGUF"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace what DST is or holds")


def run_convert(options: argparse.Namespace) -> int:
    """`gpt2c convert`."""
    print(convert(options.src, options.dst, options.format, options.dtype, options.overwrite))
    return 0
