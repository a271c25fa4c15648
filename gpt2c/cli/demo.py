"""The main job: text -> tokenizer -> token files -> training -> a model that compresses and writes.

Without a text of the user's it trains on the documentation that every Python carries.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gpt2c.evaluate.baselines import BLOCK, bigram_nats, xz_bits_per_byte
from gpt2c.evaluate.figures import figures
from gpt2c.evaluate.loss import evaluate
from gpt2c.files.atomic import check_apart, claimed
from gpt2c.files.names import LOSS_FILE, token_file
from gpt2c.generator import Generator
from gpt2c.gpt2 import GPT2
from gpt2c.llama import Llama
from gpt2c.pretrained import from_pretrained
from gpt2c.screen.command import command
from gpt2c.screen.progress import Reading
from gpt2c.screen.terminal import write_pieces
from gpt2c.text.corpus import python_documentation
from gpt2c.text.documents import TextFiles
from gpt2c.text.prepare import Prepared, prepare
from gpt2c.text.shards import TokenArray, read_tokens
from gpt2c.text.tokenizer import END_OF_TEXT, Tokenizer
from gpt2c.train.loop import TrainResult
from gpt2c.train.pretrain import reserved, train
from gpt2c.train.settings import find_recipe, read_recipe, recipe_settings

__all__ = ["SAMPLES", "demo", "demo_recipe", "describe", "openings"]

VOCABULARY = 4096
SAMPLES = 3
SAMPLE_TOKENS = 96
LITTLE = 0.1  # nats per token: two texts alone differ by as much
LOOKED_AT = 100_000  # held-out tokens that are searched for prompts
# The first three of at least four words, or the beginning of text without spaces.
OPENING = re.compile(r"\b[^\W\d_]\w{,15}(?: \w{1,15}){2}(?= \w)|\b[^\W\d_a-zA-Z]{2,6}(?=\w{2})")


def demo(text: Path | None, out: Path, given: Mapping[str, Any], overwrite: bool) -> TrainResult:
    """Run the main job and show each step; return how the training ended.

    Parameters
    ----------
    text : the user's, see `TextFiles`, or None for the Python documentation
    out : gets data/ (token files) and run/ (the model)
    given : settings that differ from the demo's recipe
    overwrite : `out` may exist and hold something

    Raises
    ------
    OSError, ValueError : the text cannot be read or is too short, or `out` cannot be written
    """
    start = time.perf_counter()
    data, run = out / "data", out / "run"
    result = _learn(text, out, recipe_settings("demo", given), overwrite)
    if result.interrupted:
        return result
    model, tokenizer = from_pretrained(run), Tokenizer.from_pretrained(run)
    tokens, held_out = (read_tokens(data / token_file(split)) for split in ("train", "val"))
    compare(model, tokenizer, tokens, held_out)
    prompts = openings(tokenizer, held_out, model.config.n_positions)
    write_samples(Generator(model, tokenizer), prompts)
    print()
    show(
        "loss curve",
        str(run / LOSS_FILE) if result.has_plot else "none: pip install matplotlib draws one",
    )
    show("time", f"{time.perf_counter() - start:.0f} s in all, {result.seconds:.0f} s of training")
    show("evaluate", command("eval", run, "--data", data))
    print(f"\nGo on with: {command('generate', run, '--prompt', prompts[0])}")
    return result


def _learn(
    text: Path | None, out: Path, settings: Mapping[str, Any], overwrite: bool
) -> TrainResult:
    """Prepare the text and train on it; refuse bad settings before anything is replaced."""
    data, run = out / "data", out / "run"
    check_apart(run, text)
    with ExitStack() as stack:
        stack.enter_context(claimed(out, overwrite))
        stack.enter_context(reserved(run, settings, VOCABULARY, overwrite))
        prepared = _prepare(text, data, overwrite)
        show("text", str(text or "this Python's own documentation"))
        show("documents", f"{prepared.documents:,} of {describe(prepared)}")
        show("tokenizer", f"BPE trained on the training part, {prepared.vocab_size:,} tokens")
        guess = math.log(prepared.vocab_size)
        show("loss", f"in nats per token: 0 if it was certain, {guess:.1f} for a guess among all")
        try:
            return train(data, run, settings, overwrite=overwrite, held=True)
        except (ValueError, OSError, MemoryError):
            if not any(run.iterdir()):  # it never began: another try must not need --overwrite
                shutil.rmtree(data)
            raise


def demo_recipe() -> dict[str, Any]:
    """Return the demo's settings, where they differ from the defaults."""
    return read_recipe(find_recipe("demo"))


def show(name: str, text: str) -> None:
    """Print a line in two columns."""
    print(f"{name:<12}{text}", flush=True)


def describe(prepared: Prepared) -> str:
    """Return the size of the text, and how it was split."""
    size = prepared.train_bytes + prepared.val_bytes
    share = prepared.val_bytes / size
    whole = f"{share:.0%} of it, whole documents,"
    part = f"the last {share:.0%}" if prepared.tail_held_out else whole
    return f"{_size(size)}; {part} is held out for validation"


def _size(count: int) -> str:
    """Return a number of bytes as text, in kB or MB if it is large."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def compare(
    model: GPT2 | Llama, tokenizer: Tokenizer, tokens: TokenArray, held_out: TokenArray
) -> None:
    """Print a table of the model, xz and a bigram model on the held-out text."""
    before, text = _Text(tokenizer, tokens), _Text(tokenizer, held_out)
    block_size, size = model.config.n_positions, sum(map(len, text))
    rows, count = max(1, 2048 // block_size), len(held_out) - 1
    gpt2 = figures(count * evaluate(model, [held_out], rows, block_size), count, size)
    bigram = figures(bigram_nats(tokens, held_out, tokenizer.vocab_size), count, size)
    xz = xz_bits_per_byte(before, text)
    # Pieces from all over the training text, together as long as the held-out text.
    piece = 8 * block_size
    step = max(piece, len(tokens) * piece // len(held_out))
    pieces = [tokens[start : start + piece] for start in range(0, len(tokens), step)]
    seen = evaluate(model, pieces, rows, block_size)
    heart = "the difference is what it has learned by heart"
    if gpt2.loss - seen < LITTLE:
        heart = "not much lower, so it has learned next to nothing by heart"
    print(f"\n{'on the held-out text':<28}{'nats/token':>12}{'bits/byte':>12}")
    name = "GPT-2" if isinstance(model, GPT2) else "Llama"
    print(f"{name + ', this run':<28}{gpt2.loss:>12.3f}{gpt2.bits_per_byte:>12.3f}")
    print(f"{'bigram model':<28}{bigram.loss:>12.3f}{bigram.bits_per_byte:>12.3f}")
    print(f"{'xz -9 after training text':<28}{'':>12}{xz:>12.3f}")
    print(
        f"bits/byte: what a byte of text takes, compressed with the model. {name} reads windows of"
        f" {block_size} tokens\nside by side, as in training and gpt2c eval; xz has all of the"
        f" training text before it.\nOn text that it was trained on, {name}'s loss is {seen:.3f}:"
        f" {heart}.",
        flush=True,
    )


def _prepare(text: Path | None, data: Path, overwrite: bool) -> Prepared:
    spec = f"bpe:{VOCABULARY}"
    if text is None:
        return prepare(python_documentation(), data, spec, overwrite=overwrite)
    with Reading() as reading, TextFiles([text], watch=reading.read) as texts:
        return prepare(texts, data, spec, overwrite=overwrite, stage=reading.stage)


class _Text:
    """The text of a token file without its end-of-text marks, in pieces of bytes."""

    def __init__(self, tokenizer: Tokenizer, tokens: TokenArray) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._tokens), BLOCK):
            part = self._tokens[start : start + BLOCK]
            ids = part[part != self._tokenizer.eot].tolist()
            yield b"".join(map(self._tokenizer.token_bytes, ids))


def openings(tokenizer: Tokenizer, held_out: TokenArray, most: int) -> list[str]:
    """Return `SAMPLES` beginnings of lines, from all over the held-out text, as prompts.

    They are a few words, or letters in a text without spaces, so a shell takes them as they are.
    They have at most `most` tokens.
    """
    text = tokenizer.decode(held_out[:LOOKED_AT]).replace(END_OF_TEXT, "\n")
    matches = map(OPENING.search, text.splitlines())
    found = list(dict.fromkeys(match[0] for match in matches if match))
    if not found:  # no line has four words
        found = re.findall(r"\w{1,12}", text) or [""]
    prompts = [found[number * len(found) // SAMPLES] for number in range(SAMPLES)]
    for number in range(SAMPLES):
        while len(tokenizer.encode(prompts[number])) > most:
            prompts[number] = prompts[number][:-1]
    return prompts


def write_samples(generator: Generator, prompts: list[str]) -> None:
    """Print how the model continues the prompts."""
    for seed, prompt in enumerate(prompts):
        print(f"\n--- sample {seed + 1} ---\n{prompt}", end="")
        # a small model repeats itself: make the tokens that it has written less likely
        pieces = generator.stream(
            prompt,
            max_new_tokens=SAMPLE_TOKENS,
            temperature=0.8,
            top_k=30,
            repetition_penalty=1.1,
            seed=seed,
        )
        write_pieces(pieces)
