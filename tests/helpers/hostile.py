"""Every reader of gpt2c with good files, and ways to damage them, for test_hostile and fuzz.

To add a reader, add one entry to READERS: `make` writes good files into an empty directory, `read`
is the public function, `use` does with the result what a user would do. The fuzzers then damage its
files. Bad files made by hand go into test_hostile.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import gpt2c
import gpt2c.train.loop
from gpt2c import GPT2, GPT2Config, Llama, LlamaConfig, Tokenizer
from gpt2c.evaluate import scoring
from gpt2c.files.untrusted import read_json, read_text
from gpt2c.formats import llama2c, llmc
from gpt2c.formats.convert import convert
from gpt2c.formats.nanogpt import open_nanogpt, write_nanogpt
from gpt2c.model.rope_scaling import RopeScaling
from gpt2c.text.batches import Batches
from gpt2c.text.documents import TextFiles
from gpt2c.text.prepare import prepare
from gpt2c.text.shards import read_shards, read_tokens, write_shards, write_tokens
from gpt2c.text.splits import LLAMA3
from gpt2c.train import checkpoints
from gpt2c.train.metrics import read_metrics
from gpt2c.train.pretrain import train
from gpt2c.train.settings import TrainSettings, read_recipe

Draw = Callable[[st.SearchStrategy[Any]], Any]

SECONDS = 20  # a read takes milliseconds; this allows for a busy machine
MEMORY = 4 << 30  # bytes; no good file here needs a hundredth of it
TEXT = "the cat sat on the mat, the dog on the log. "

# ---- allowed exceptions --------------------------------------------------------------------------


class HangError(Exception):
    """A reader took longer than it may."""


@contextmanager
def limits(seconds: int = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """End a call that takes too long with HangError, and too much memory with MemoryError."""

    def stop(signum: int, frame: object) -> None:
        raise HangError(f"more than {seconds} seconds")

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    if sys.platform == "linux":  # other systems do not tell the memory in use
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@dataclass(frozen=True)
class Reader:
    """A public function that reads files.

    Parameters
    ----------
    make : writes good files into an empty directory
    read : reads the directory; may raise only ValueError or OSError, with a file's name
    use : takes the result of `read`; may raise ValueError
    files : the good files that are damaged
    optional : those of them without which `read` succeeds
    """

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    use: Callable[[Any], object]
    files: str = "*"
    optional: tuple[str, ...] = ()

    def spoilable(self, directory: Path) -> list[str]:
        """Return the names of the files to be damaged, relative to their directory."""
        found = [path for path in directory.rglob(self.files) if path.is_file()]
        return sorted(str(path.relative_to(directory)) for path in found)


def attempt(reader: Reader, directory: Path) -> str:
    """Read and use a directory; return "read" or "refused", or raise a forbidden exception."""
    try:
        value = reader.read(directory)
    except (ValueError, OSError) as error:
        message = str(error)
        names = [directory.name, *(path.name for path in directory.rglob("*.*"))]
        assert any(name in message for name in names), f"names no file: {message[:300]}"
        return "refused"
    try:
        reader.use(value)
    except ValueError:  # for example weights that give nan
        return "refused"
    return "read"


# ---- the readers ---------------------------------------------------------------------------------

CONFIG = GPT2Config(vocab_size=262, n_positions=8, n_embd=4, n_layer=1, n_head=2, eos_token_id=261)


def tokenizer() -> Tokenizer:
    """Return a small tokenizer, the same one at each call."""
    return Tokenizer.train([TEXT], CONFIG.vocab_size)


def make_model(directory: Path) -> None:
    GPT2(CONFIG, backend="numpy").save_pretrained(directory)


def make_classifier(directory: Path) -> None:
    GPT2(dataclasses.replace(CONFIG, num_labels=3), backend="numpy").save_pretrained(directory)


def make_generation(directory: Path) -> None:
    """Write a model whose end of text is in generation_config.json alone."""
    make_model(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))


def make_foreign(directory: Path) -> None:
    """Write a model as transformers once did: prefixed names, buffers, a second head, two types."""
    make_model(directory)
    path = directory / "model.safetensors"
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(path).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].astype(np.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    header, body = split(path.read_bytes())
    entries = json.loads(header)
    entries["transformer.wpe.weight"]["dtype"] = "BF16"  # other numbers, of the same size
    path.write_bytes(joined(json.dumps(entries).encode(), body))


def make_sharded(directory: Path) -> None:
    """Write a model in two files and an index, as transformers does with a large one."""
    make_model(directory)
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    parts = {
        f"model-0000{part}-of-00002.safetensors": sorted(whole)[part - 1 :: 2] for part in (1, 2)
    }
    for file, names in parts.items():
        save_file({n: whole[n] for n in names}, directory / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in whole.values())
    places = {name: file for file, names in parts.items() for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


LLAMA = LlamaConfig(
    vocab_size=262,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8,
    rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 4),
)


def make_llama(directory: Path) -> None:
    Llama(LLAMA, seed=1, backend="numpy").save_pretrained(directory)


def make_adapters(model: GPT2 | Llama) -> Callable[[Path], None]:
    """Write a base and adapters for it, with scores in place of its logits."""

    def make(directory: Path) -> None:
        model.save_pretrained(directory / "base")
        config = dataclasses.replace(model.config, num_labels=3)
        scorer = type(model)(config, seed=1, backend="numpy")
        scorer.add_lora(r=2)
        for name in scorer.trained:
            scorer.parameters[name][...] = 0.5
        scorer.save_pretrained(directory / "adapter")

    return make


ADAPTED: tuple[Any, ...] = (
    lambda d: gpt2c.from_pretrained(d / "base", adapter=d / "adapter"),
    lambda model: model.scores([[1, 2, 3]]),
    "adapter/*",
)


def make_quantized(method: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        model = GPT2(CONFIG, backend="numpy")
        model.quantize(method).save_pretrained(directory)

    return make


def quantized(method: str) -> Callable[[Path], GPT2]:
    return lambda directory: GPT2.from_pretrained(directory, quantize=method)


def use_model(model: GPT2 | Llama) -> None:
    ids = np.arange(3)[None] % model.config.vocab_size
    model(ids[:, : model.config.n_positions])
    model.generate(ids[:, :1], max_new_tokens=2, temperature=0)


def use_classifier(model: GPT2) -> None:
    model.scores(np.arange(3)[None] % model.config.vocab_size)
    model.loss([[0]], [0])
    model.backward()


def make_one_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, as transformers' fast tokenizers do, and the files beside it."""
    made = tokenizer()
    made.save_pretrained(directory)
    vocabulary = json.loads((directory / "vocab.json").read_text())
    merges = (directory / "merges.txt").read_text().splitlines()[1:]
    special = {"id": made.eot, "content": "<|endoftext|>", "single_word": False, "lstrip": False}
    special |= {"rstrip": False, "normalized": True, "special": True}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    one = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(one, ensure_ascii=False))
    (directory / "vocab.json").unlink()
    (directory / "merges.txt").unlink()


def make_split_tokenizer(directory: Path) -> None:
    made = tokenizer()
    Tokenizer(made._ranks, made.eot, split=LLAMA3, chat_template="{{ x }}").save_pretrained(
        directory
    )


def use_tokenizer(made: Tokenizer) -> None:
    text = TEXT + "\0 é \U0001f600\n"
    assert made.decode(made.encode(text)) == text
    assert len(made.token_lengths) == made.vocab_size
    "".join(made.stream(range(made.vocab_size)))


def make_tokens(directory: Path) -> None:
    write_tokens(directory / "train.bin", np.arange(300) % CONFIG.vocab_size)


def use_tokens(tokens: np.ndarray) -> None:
    assert np.asarray(tokens).max() < CONFIG.vocab_size
    Batches([tokens], batch_size=2, block_size=8, seed=0).batch(len(tokens))


def make_shards(directory: Path) -> None:
    write_shards(directory, "train", np.arange(300) % CONFIG.vocab_size, shard_tokens=200)


def make_nanogpt(directory: Path) -> None:
    write_nanogpt(directory / "train.bin", [np.arange(50, dtype=np.uint16)])


def make_llmc(dtype: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        model = GPT2(CONFIG, backend="numpy")
        llmc.write_model(directory / "model.bin", CONFIG, model.parameters, dtype)

    return make


def make_llama2c(directory: Path) -> None:
    config = dataclasses.replace(LLAMA, rope_scaling=None, rms_norm_eps=1e-5)
    parameters = Llama(config, seed=1, backend="numpy").parameters
    llama2c.write_model(directory / "model.bin", config, parameters)


def make_llmc_tokenizer(directory: Path) -> None:
    made = tokenizer()
    tokens = [made.token_bytes(token_id) for token_id in range(made.vocab_size)]
    llmc.write_tokenizer(directory / "tokenizer.bin", tokens, made.eot)


def converted(name: str, format: str | None = None) -> Callable[[Path], str]:
    """Return a function that converts a file into a directory, or into a file for nanoGPT's."""
    out = "out.bin" if format else "out"
    return lambda d: convert(str(d / name), d / out, format, overwrite=True)


def make_recipe(directory: Path) -> None:
    text = 'n_layer = 1\nn_head = 2\nn_embd = 4\nlearning_rate = 1e-2 # a\nschedule = "cosine"\n'
    (directory / "recipe.toml").write_text(text + "[run]\nmax_iters = 2_000\nbackend = 'auto'\n")


def use_recipe(entries: dict[str, Any]) -> None:
    settings = TrainSettings(**entries)
    settings.learning_rates()(settings.max_iters // 2)


RUN = dict(n_layer=1, n_head=2, n_embd=4, block_size=8, batch_size=2, max_iters=2, backend="base")


def make_run(directory: Path) -> None:
    prepare([TEXT] * 9 + [TEXT + "?"], directory / "data", tokenizer(), val_fraction=0.2)
    resume(directory, **RUN)


def resume(directory: Path, **settings: Any) -> None:
    """Resume for one more step, or begin a run with settings."""
    going_on = not settings
    given = settings or {"max_iters": 3, "backend": "base"}
    with mock.patch.object(sys, "stdout"), mock.patch.object(gpt2c.train.loop, "plot_loss"):
        train(directory / "data", directory / "run", given, resume=going_on)


def resume_mended(directory: Path) -> None:
    """Resume after the checkpoint's checksums were corrected, which would refuse the damage."""
    for path in (directory / "run" / "checkpoints").glob("*/state.json"):
        try:
            content = read_json(path)
            content["files"] = {
                name: checkpoints._sum(path.parent / name) for name in content["files"]
            }
            summed = {name: content[name] for name in ("state", "files")}
            content["sha256"] = checkpoints._sum_of(summed)
        except (LookupError, TypeError, AttributeError, ValueError, OSError, RecursionError):
            continue
        path.write_text(json.dumps(content))
    resume(directory)


def make_metrics(directory: Path) -> None:
    numbers = [{"step": step, "loss": 4.1 / step, "val_loss": None} for step in range(1, 6)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(n) + "\n" for n in numbers))


def use_metrics(entries: list[dict[str, Any]]) -> None:
    assert [entry["step"] for entry in entries] == sorted({entry["step"] for entry in entries})
    numbers = [value for entry in entries for value in entry.values() if value is not None]
    assert all(map(math.isfinite, numbers))


def make_questions(directory: Path) -> None:
    questions = [
        {"ctx": "a b", "endings": ["c", " d", "é"], "label": 1},
        {"ctx": "", "endings": ["no", "yes"], "label": "0", "ind": 24},
    ]
    text = "\n".join(map(json.dumps, questions)) + "\n"
    (directory / "questions.jsonl").write_text(text, encoding="utf-8")


def use_questions(questions: list[scoring.Question]) -> None:
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=4, n_layer=1, n_head=2)
    scoring.answer(GPT2(config), questions)


def read_documents(directory: Path) -> list[str]:
    with TextFiles([directory / "text.txt"]) as texts:
        return ["".join(pieces) for pieces in texts]


def make_text(directory: Path) -> None:
    (directory / "text.txt").write_text(f"{TEXT}é\n<|endoftext|>{TEXT}\n", encoding="utf-8")


SPARE = ("generation_config.json",)  # which counts where config.json lacks a field
# Files that training writes again from the data and the newest checkpoint, and optional files.
RUN_COPIES = (
    *("run/config.json", "run/generation_config.json", "run/model.safetensors", "run/vocab.json"),
    *("run/merges.txt", "run/tokenizer_config.json", "run/metrics.jsonl"),
    "run/result.json",
    "run/checkpoints/00000002/generation_config.json",
)

READERS = {
    "adapters": Reader(make_adapters(GPT2(CONFIG, seed=1, backend="numpy")), *ADAPTED),
    "llama_adapters": Reader(make_adapters(Llama(LLAMA, seed=1, backend="numpy")), *ADAPTED),
    "model": Reader(make_model, GPT2.from_pretrained, use_model, optional=SPARE),
    "classifier": Reader(make_classifier, GPT2.from_pretrained, use_classifier, optional=SPARE),
    "generation": Reader(make_generation, GPT2.from_pretrained, use_model, "generation*"),
    "foreign": Reader(make_foreign, GPT2.from_pretrained, use_model, optional=SPARE),
    "sharded": Reader(make_sharded, GPT2.from_pretrained, use_model, optional=SPARE),
    "rounded": Reader(make_foreign, quantized("int8"), use_model, optional=SPARE),
    "llama": Reader(make_llama, gpt2c.from_pretrained, use_model, optional=SPARE),
    "rounded_llama": Reader(
        make_llama, lambda d: gpt2c.from_pretrained(d, quantize="int8"), use_model, optional=SPARE
    ),
    "int8": Reader(make_quantized("int8"), quantized("int8"), use_model, optional=SPARE),
    "fp16": Reader(make_quantized("fp16"), quantized("fp16"), use_model, optional=SPARE),
    "tokenizer": Reader(
        lambda d: tokenizer().save_pretrained(d),
        Tokenizer.from_pretrained,
        use_tokenizer,
        optional=("tokenizer_config.json",),
    ),
    "tokens": Reader(
        make_tokens, lambda d: read_tokens(d / "train.bin", CONFIG.vocab_size), use_tokens
    ),
    "recipe": Reader(make_recipe, lambda d: read_recipe(d / "recipe.toml"), use_recipe),
    "run": Reader(make_run, resume, lambda _: None, "run/**/*", RUN_COPIES),
    "mended": Reader(make_run, resume_mended, lambda _: None, "run/**/*", RUN_COPIES),
    "questions": Reader(
        make_questions,
        lambda d: scoring.read_questions(d / "questions.jsonl", Tokenizer.from_name("bytes"), 16),
        use_questions,
    ),
    "shards": Reader(
        make_shards,
        lambda d: read_shards(d, "train", CONFIG.vocab_size),
        lambda t: [use_tokens(x) for x in t],
    ),
    "nanogpt": Reader(make_nanogpt, lambda d: open_nanogpt(d / "train.bin"), lambda t: t[:].max()),
    "nanogpt_convert": Reader(make_nanogpt, converted("train.bin", "nanogpt"), len),
    "llmc": Reader(make_llmc("fp32"), lambda d: GPT2.from_pretrained(d / "model.bin"), use_model),
    "llmc_bf16": Reader(
        make_llmc("bf16"),
        lambda d: GPT2.from_pretrained(d / "model.bin", quantize="int8"),
        use_model,
    ),
    "llmc_convert": Reader(make_llmc("fp32"), converted("model.bin"), len),
    "llama2c": Reader(make_llama2c, lambda d: gpt2c.from_pretrained(d / "model.bin"), use_model),
    "llama2c_convert": Reader(
        make_llama2c,
        lambda d: convert(str(d / "model.bin"), d / "out.bin", overwrite=True),
        len,
    ),
    "llmc_tokenizer": Reader(
        make_llmc_tokenizer,
        lambda d: Tokenizer(*llmc.read_tokenizer(d / "tokenizer.bin")),
        use_tokenizer,
    ),
    "llmc_tokenizer_convert": Reader(make_llmc_tokenizer, converted("tokenizer.bin"), len),
    "one_tokenizer": Reader(make_one_tokenizer, Tokenizer.from_pretrained, use_tokenizer),
    "split_tokenizer": Reader(
        make_split_tokenizer,
        Tokenizer.from_pretrained,
        use_tokenizer,
        optional=("tokenizer_config.json", "chat_template.jinja"),
    ),
    "metrics": Reader(make_metrics, lambda d: read_metrics(d / "metrics.jsonl"), use_metrics),
    "text": Reader(make_text, lambda d: read_text(d / "text.txt"), len),
    "texts": Reader(make_text, read_documents, len),
}

# ---- safetensors and JSON by hand ----------------------------------------------------------------


def split(content: bytes) -> tuple[bytes, bytes]:
    """Return the header of a safetensors file, and the rest of it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def joined(header: bytes, body: bytes) -> bytes:
    """Return a safetensors file of a header and the rest."""
    return len(header).to_bytes(8, "little") + header + body


class Pairs(list[tuple[str, Any]]):
    """A JSON object that may have a key twice."""


def dumps(value: Any) -> str:
    """Return JSON of Pairs, allowed or not."""
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dumps(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return value.decode() if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False)


# ---- damaging ------------------------------------------------------------------------------------

NUMBERS = [
    *(0, 1, -1, 2, 3, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31),
    *(-(2**31), 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 20240520, 20240326),
]
# some that JSON or TOML may hold, and some that they may not
WORDS = [
    *(b"-1", b"0", b"-0", b"1.5", b"1e999", b"-1e999", b"1e-999", b"NaN", b"nan", b"Infinity"),
    *(b"inf", b"true", b"false", b"null", b'""', b'"1"', b'"gpt2"', b"[]", b"{}", b"[[0]]", b"1e3"),
    *(b"9" * 5000, b"0x" + b"f" * 5000, b"1979-05-27", b'"\\ud800"', b'"\\u0000"', b'"../x"'),
    *(b"[" * 3000 + b"]" * 3000, b"[" * 90 + b"]" * 90, b'{"a":' * 9999),
    *(b"\xef\xbb\xbf", b"\xff", b"\r\n", b"\0", b"\n", b" "),
    *(str(number).encode() for number in NUMBERS),
]
INTEGER = re.compile(rb"-?\d+")
WORD = re.compile(rb'"[^"\n]*"|[^\s"]+')


def spoiled(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    """Return a file's content with one to three changes that suit its format."""

    @st.composite
    def changed(draw: Draw) -> bytes:
        new = content
        for _ in range(draw(st.integers(1, 3))):
            change = draw(st.sampled_from(CHANGES + STRUCTURED.get(Path(name).suffix, [])))
            new = change(draw, new)
        return new

    return changed()


def _span(draw: Draw, content: bytes) -> tuple[int, int]:
    start = draw(st.integers(0, len(content)))
    return start, draw(st.integers(start, min(len(content), start + 4096)))


def _truncate(draw: Draw, content: bytes) -> bytes:
    return content[: draw(st.integers(0, len(content)))]


def _flip(draw: Draw, content: bytes) -> bytes:
    new = bytearray(content or b"\0")
    for _ in range(draw(st.integers(1, 4))):
        new[draw(st.integers(0, len(new) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(new)


def _splice(draw: Draw, content: bytes) -> bytes:
    """Replace one piece by another."""
    (a, b), (c, d) = _span(draw, content), _span(draw, content)
    return content[:c] + content[a:b] + content[d:]


def _grow(draw: Draw, content: bytes) -> bytes:
    """Insert new bytes, or a piece many times."""
    at, (a, b) = draw(st.integers(0, len(content))), _span(draw, content)
    new = draw(st.binary(min_size=1, max_size=16)) if draw(st.booleans()) else content[a:b]
    return content[:at] + new * draw(st.sampled_from([1, 2, 100])) + content[at:]


def _number(draw: Draw, content: bytes) -> bytes:
    """Overwrite 1 to 8 bytes, often at the beginning, with a number at a limit."""
    width = draw(st.sampled_from([1, 2, 4, 8]))
    step = draw(st.sampled_from([1, width]))
    last = max(0, len(content) - width)
    at = draw(st.integers(0, min(last, draw(st.sampled_from([64, 1024, last]))))) // step * step
    value = draw(st.sampled_from(NUMBERS)) % 256**width
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


def _word(draw: Draw, content: bytes) -> bytes:
    """Replace a number or word by one of WORDS, or by a word from elsewhere in the file."""
    found = list(draw(st.sampled_from([INTEGER, WORD])).finditer(content))
    if not found:
        return draw(st.sampled_from(WORDS)) + content
    place = draw(st.sampled_from(found))
    word = draw(st.sampled_from(WORDS) | st.sampled_from([match[0] for match in found]))
    return content[: place.start()] + word + content[place.end() :]


def _line(draw: Draw, content: bytes) -> bytes:
    """Remove a line, repeat one, or swap two."""
    lines = content.split(b"\n")
    a, b = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    what = draw(st.sampled_from(["take", "twice", "change"]))
    if what == "change":
        lines[a], lines[b] = lines[b], lines[a]
    else:
        lines[a : a + 1] = [lines[a]] * (2 if what == "twice" else 0)
    return b"\n".join(lines)


def _json(draw: Draw, content: bytes) -> bytes:
    """Change one entry of JSON: its value, key or place, or remove it."""
    try:
        top = json.loads(content, object_pairs_hook=Pairs)
        found = [(holder, i) for holder in _holders(top) for i in range(len(holder))]
    except (ValueError, RecursionError):  # damaged already
        found = []
    if not found:
        return _word(draw, content)
    (holder, i), (other, j) = draw(st.sampled_from(found)), draw(st.sampled_from(found))
    key, value = holder[i] if isinstance(holder, Pairs) else ("x", holder[i])
    key_there, value_there = other[j] if isinstance(other, Pairs) else ("x", other[j])
    what = draw(st.sampled_from(["word", "word", "value", "key", "new key", "take", "twice"]))
    if what == "word":
        word = draw(st.sampled_from(WORDS))
        value = word if word.isascii() else word.decode("latin1")
    elif what == "value":
        value = copy.deepcopy(value_there)  # it may contain this one
    elif what == "key":
        key = key_there
    elif what == "new key":
        key = draw(st.sampled_from(["", "\n", "\0", "\ud800", "../x", key + "\u202e", "é" * 99]))
    entry = (key, value) if isinstance(holder, Pairs) else value
    holder[i : i + 1] = [entry] * {"take": 0, "twice": 2}.get(what, 1)
    return dumps(top).encode(errors="surrogatepass")


def _holders(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list):
        yield value
        for item in value:
            yield from _holders(item[1] if isinstance(value, Pairs) else item)


def _json_line(draw: Draw, content: bytes) -> bytes:
    lines = content.split(b"\n")
    i = draw(st.integers(0, len(lines) - 1))
    lines[i] = _json(draw, lines[i])
    return b"\n".join(lines)


def _header(draw: Draw, content: bytes) -> bytes:
    header, body = split(content)
    return joined(_json(draw, header), body)


CHANGES = [_truncate, _flip, _splice, _grow, _number, _word, _line]
STRUCTURED = {".json": [_json] * 7, ".jsonl": [_json_line] * 7, ".safetensors": [_header] * 14}
