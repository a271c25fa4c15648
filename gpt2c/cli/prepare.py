"""`gpt2c prepare`: text files to token files."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpt2c.cli.demo import describe
from gpt2c.screen.progress import Reading
from gpt2c.text.documents import JSON_LINES, PLAIN, TextFiles
from gpt2c.text.prepare import prepare

__all__ = ["add_flags", "run_prepare"]

_EXAMPLES = """examples:
  gpt2c prepare book.txt --out data
  gpt2c prepare texts/ --out data --tokenizer bytes
  gpt2c prepare questions.jsonl --text-field answer --out data
  zcat book.gz | gpt2c prepare - --out data --tokenizer gpt2
"""


def add_flags(verb: argparse.ArgumentParser) -> None:
    """Add the flags of `gpt2c prepare`."""
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = _EXAMPLES
    endings = " ".join(f"*{ending}" for ending in PLAIN + JSON_LINES)
    verb.add_argument(
        "text",
        nargs="+",
        help=f"UTF-8 text files, directories of them ({endings}), or - for standard input;"
        " <|endoftext|> in a text, like the end of a file, ends a document; each line of a .jsonl"
        " file is a document",
    )
    verb.add_argument("--out", type=Path, required=True, help="directory for the token files")
    verb.add_argument(
        "--tokenizer",
        default="bpe:4096",
        help="bpe:SIZE, trained on the training text (default: bpe:4096), bytes, gpt2, a"
        " directory such as a run, or a name on the hub (user/name)",
    )
    verb.add_argument(
        "--text-field",
        metavar="NAME",
        help='the field of JSONL that holds the text (default: "text")',
    )
    verb.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the text to hold out (0.1)",
    )
    verb.add_argument(
        "--seed",
        type=int,
        default=1337,
        metavar="N",
        help="seed of the choice of held-out text (1337)",
    )
    verb.add_argument(
        "--shard-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens in a training file (0: one file)",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace the content of --out")


def run_prepare(options: argparse.Namespace) -> int:
    """`gpt2c prepare`."""
    with Reading() as reading, TextFiles(options.text, options.text_field, reading.read) as texts:
        if len(texts.names) > len(options.text):
            print(f"{len(texts.names):,} files, {texts.names[0]} to {texts.names[-1]}")
        prepared = prepare(
            texts,
            options.out,
            options.tokenizer,
            options.val_fraction,
            options.seed,
            options.overwrite,
            options.shard_tokens,
            reading.stage,
        )
    plural = "" if prepared.documents == 1 else "s"
    print(f"{prepared.documents:,} document{plural}, {describe(prepared)}")
    wanted = options.tokenizer.removeprefix("bpe:")
    if wanted != options.tokenizer and int(wanted) > prepared.vocab_size:
        print(f"the text is too small for {int(wanted):,} tokens: using {prepared.vocab_size:,}")
    print(
        f"{options.out}: {prepared.train_tokens:,} tokens to train, {prepared.val_tokens:,} to"
        f" validate, vocabulary {prepared.vocab_size:,}"
    )
    return 0
