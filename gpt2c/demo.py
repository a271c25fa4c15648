"""The main job: text -> tokenizer -> token files -> training -> a model that compresses and writes.

Without a text of the user's it learns the documentation that every Python carries. Used by cli.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.backend import get_backend
from gpt2c.baselines import bigram_nats, bits_per_byte, xz_bits_per_byte
from gpt2c.corpus import python_documentation
from gpt2c.data import Prepared, prepare, read_text, split_documents
from gpt2c.files import claim_directory
from gpt2c.generator import Generator
from gpt2c.model import GPT2
from gpt2c.run import locked
from gpt2c.settings import TrainSettings, find_recipe, read_recipe
from gpt2c.terminal import write_pieces
from gpt2c.tokenfile import read_tokens
from gpt2c.tokenizer import Tokenizer
from gpt2c.train import TrainResult, evaluate, train

SAMPLES = 3
SAMPLE_TOKENS = 96


def demo(text: Path | None, out: Path, given: Mapping[str, Any], overwrite: bool) -> TrainResult:
    """Run the main job and show each step; return how the training ended.

    Parameters
    ----------
    text : a text file of the user's, or None for the Python documentation
    out : gets data/ (token files) and run/ (the model)
    given : settings that differ from the demo's recipe
    overwrite : `out` may exist and hold something

    Raises
    ------
    OSError, ValueError : the text cannot be read or is too short, or `out` cannot be written
    """
    start = time.perf_counter()
    settings = demo_recipe() | dict(given)
    get_backend(TrainSettings(**settings).backend)  # a mistake shows before anything is written
    documents = python_documentation() if text is None else split_documents(read_text(text))
    if not documents:
        raise ValueError(f"{text} holds nothing but blanks")
    claim_directory(out, overwrite)
    data, run = out / "data", out / "run"
    if run.is_dir():  # before its data are replaced: nothing trains into it
        with locked(run):
            pass

    show("text", "this Python's own documentation" if text is None else str(text))
    prepared = prepare(documents, data, "bpe:4096", overwrite=overwrite)
    show("documents", f"{prepared.documents:,} of {describe(prepared)}")
    show("tokenizer", f"BPE trained on them, {prepared.vocab_size:,} tokens")
    try:
        result = train(data, run, settings, overwrite=overwrite)
    except ValueError:
        if not run.exists():  # the text was too short: another try must not need --overwrite
            shutil.rmtree(data)
        raise
    if result.interrupted:
        return result
    model = GPT2.from_pretrained(run)
    compare(model, data, prepared)
    write_samples(model, Tokenizer.from_pretrained(run))
    print()
    show(
        "loss curve",
        str(run / "loss.png") if result.has_plot else "none: pip install matplotlib draws one",
    )
    show("time", f"{time.perf_counter() - start:.0f} s in all, {result.seconds:.0f} s of training")
    print(f'\nGo on with: gpt2c generate {run} --prompt "The string"')
    return result


def demo_recipe() -> dict[str, Any]:
    """Give the demo's settings, where they differ from the defaults."""
    return read_recipe(find_recipe("demo"))


def show(name: str, text: str) -> None:
    """Print a line of the demo's left and right column."""
    print(f"{name:<12}{text}", flush=True)


def describe(prepared: Prepared) -> str:
    """Say how much text there is and how it was split."""
    size = (prepared.train_bytes + prepared.val_bytes) / 1e6
    share = prepared.val_bytes / (prepared.train_bytes + prepared.val_bytes)
    held_out = "the tail" if prepared.tail_held_out else "whole documents"
    return f"{size:.2f} MB; {share:.0%} of it, {held_out}, is held out for validation"


def compare(model: GPT2, data: Path, prepared: Prepared) -> None:
    """Print a table of the model, xz and a bigram model on the held-out text."""
    tokenizer = Tokenizer.from_pretrained(data)
    tokens, held_out = read_tokens(data / "train.bin"), read_tokens(data / "val.bin")
    block_size = model.config.n_positions
    # xz sees all that came before; the model at least half of its window, not a cut in mid-sentence
    rows, overlap = max(1, 2048 // block_size), block_size // 2
    loss = evaluate(model, [held_out], rows, block_size, overlap=overlap)
    scored = len(held_out) - 1
    bigram = bigram_nats(tokens, held_out, tokenizer.vocab_size)
    xz = xz_bits_per_byte(_text(tokenizer, tokens), _text(tokenizer, held_out))
    size = prepared.val_bytes
    print(f"\n{'on the held-out text':<24}{'nats/token':>12}{'bits/byte':>12}")
    print(f"{'GPT-2, this run':<24}{loss:>12.3f}{bits_per_byte(loss * scored, size):>12.3f}")
    print(f"{'bigram model':<24}{bigram / scored:>12.3f}{bits_per_byte(bigram, size):>12.3f}")
    print(f"{'xz -9 after the rest':<24}{'':>12}{xz:>12.3f}")
    print(
        "(GPT-2 sees at least half a window before each token, xz all the training text)",
        flush=True,
    )


def _text(tokenizer: Tokenizer, tokens: np.ndarray[Any, Any]) -> bytes:
    """Give the text of a token file without its end-of-text marks."""
    return tokenizer.decode(tokens[tokens != tokenizer.eot]).encode()


def write_samples(model: GPT2, tokenizer: Tokenizer) -> None:
    """Print texts that the model makes up from an empty page."""
    for seed in range(SAMPLES):
        print(f"\n--- sample {seed + 1} ---")
        pieces = Generator(model, tokenizer).stream(
            "", max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=seed
        )
        write_pieces(pieces)
