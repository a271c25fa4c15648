"""The benchmark of inference: prefill, and decoding of one text and of eight.

Rows are backends with each kind of weights, and the other engines that are installed.
gpt2c.bench.suite lets them take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpt2c.bench.machine import Ceilings, fastest
from gpt2c.bench.suite import (
    FEWER,
    GPT2_ENGINES,
    PROCESS_BYTES,
    QUICK_ROUNDS,
    ROUNDS,
    SILENT,
    TORCH,
    Follower,
    Measurement,
    Work,
    choose_rows,
    heading_of,
    lacks,
    measure,
)
from gpt2c.kernels.backend import backends
from gpt2c.kernels.memory import require
from gpt2c.model.config import ModelConfig
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.reader import CACHES
from gpt2c.train.plot import row_words

__all__ = [
    "CONTEXT",
    "ENGINES",
    "TRANSFORMERS",
    "WORKS",
    "bench_generate",
    "choose_generate_rows",
    "costs",
]

PRECISIONS = ("fp32", "fp16", "int8")  # of a backend's weights
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a weight
TRANSFORMERS = ("transformers", "transformers-compile")
# another engine -> the kinds of weights that it is measured with
ENGINES = {
    "onnxruntime": ("fp32", "int8"),
    "ctranslate2": ("fp32", "int8"),
    "llama.cpp": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
PROMPT = 512  # tokens of a prefill
CONTEXT = 32  # tokens of each text before the decoding
GenerateWork = tuple[str, int, int]  # "prefill" or "decode", texts, tokens of each
WORKS: tuple[GenerateWork, ...] = (
    ("prefill", 1, PROMPT),
    ("decode", 1, CONTEXT),
    ("decode", 8, CONTEXT),
)
ROW_SECONDS = 4.0


def choose_generate_rows(given: str | None, quick: bool) -> list[str]:
    """Return the rows: backends and engines, with each of their kinds of weights.

    Parameters
    ----------
    given : names with commas between; "avx2:int8" is one row, "avx2" one for each kind, and
        "avx2:int8:fp16" a row whose keys and values are fp16. None means all, but NumPy with fp32
        alone, keys and values of small types for the fastest backend alone, no
        transformers-compile, which takes minutes to start, and no bf16 without instructions for it
    quick : of all rows take the fastest backend and transformers only

    Raises
    ------
    ValueError : an unknown backend or precision, or one that the machine cannot run
    """
    if given is None:
        names = [fastest()] if quick else [name for name in reversed(backends()) if name != "numpy"]
        rows = [f"{name}:{precision}" for name in names for precision in PRECISIONS]
        if quick:
            return [*rows, TRANSFORMERS[0]]
        absent = () if "avx512bf16" in backends() else ("bf16",)
        others = [
            f"{name}:{kind}"
            for name, kinds in ENGINES.items()
            for kind in kinds
            if kind not in absent
        ]
        rows += [f"{fastest()}:{kind}:{kind}" for kind in ("fp16", "int8")]
        return ["numpy:fp32", *rows, TRANSFORMERS[0], *others]
    rows = []
    for name in given.split(","):
        row, precision, cache = row_words(name.strip())
        if row in TRANSFORMERS and not precision:
            rows.append(row)
            continue
        if row in TORCH:
            raise ValueError(f"{name!r} trains: the row to compare with here is {TRANSFORMERS[0]}")
        if row in TRANSFORMERS:
            raise ValueError(f"{name!r}: {row} is measured with fp32 alone, and named {row}")
        kinds = ENGINES.get(row, PRECISIONS)
        if precision and precision not in kinds:
            raise ValueError(f"{name!r}: the precisions are {', '.join(kinds)}")
        if row not in ENGINES:
            choose_rows(row)
        if cache and (cache not in CACHES or row in ENGINES):
            wanted = f"one of {', '.join(CACHES)}, of a backend of gpt2c"
            raise ValueError(f"{name!r}: the third word is the type of keys and values, {wanted}")
        end = f":{cache}" if cache else ""
        rows += [f"{row}:{kind}{end}" for kind in ([precision] if precision else kinds)]
    return list(dict.fromkeys(rows))


def bench_generate(
    names: Sequence[str],
    ceilings: Ceilings,
    config: ModelConfig,
    quick: bool,
    show: Callable[[list[Measurement]], None],
    follower: Follower = SILENT,
    works: Sequence[GenerateWork] | None = None,
) -> tuple[list[Measurement], str]:
    """Time prefill and steps of decoding on every row.

    Parameters
    ----------
    names : the rows, of `choose_generate_rows`
    ceilings : of the machine
    config : of the model
    quick : fewer samples
    show : called with the results of each work when they are complete
    follower : told of the progress through the works
    works : what is timed, WORKS if None

    Returns
    -------
    all results, and how quiet the machine was

    Raises
    ------
    MemoryError : the rows together need more than is free
    """
    works = works or WORKS
    size = 4 * config.num_parameters()
    texts = max(4 * B * (T * config.cache_floats() + config.vocab_size) for _, B, T in works)
    needed = {}
    for name in names:
        engine, _, _ = row_words(name)
        knows_it = isinstance(config, GPT2Config) or engine not in GPT2_ENGINES
        # another engine reads a file, which may lie in memory too, and the weights themselves
        models = 4 if engine in ENGINES else 2
        needed[name] = PROCESS_BYTES + (0 if lacks(name) or not knows_it else models * size + texts)
    require("a benchmark of generation", needed, FEWER)
    readings = [_reading(config, *work) for work in works]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return measure(names, ceilings.threads, [readings], rounds, ROW_SECONDS, show, follower)


def _reading(config: ModelConfig, what: str, B: int, T: int) -> Work:
    group = f"prefill {T} tokens" if what == "prefill" else f"decode, batch {B}"
    group += heading_of(config)
    arguments = {"what": what, "config": config.to_dict(), "B": B, "T": T}

    def facts(row: str) -> dict[str, float]:
        sizes = (BYTES[word or "fp32"] for word in row_words(row)[1:])
        return {"tokens": T if what == "prefill" else B, **costs(config, what, B, T, *sizes)}

    return Work(group, "generate", arguments, "sample", facts)


def costs(
    config: ModelConfig, what: str, B: int, T: int, size: int, cached: int = 4
) -> dict[str, float]:
    """Return a call's operations, and the bytes of weights, keys and values that it reads.

    Parameters
    ----------
    what : "prefill" of T tokens, or "decode": one token more of each of B texts of T tokens
    size : bytes of a weight
    cached : bytes of a number among keys and values
    """
    weights = size * config.stack().flops(0)  # a token takes one multiply-add of each
    if what == "prefill":
        return {"flops": config.prefill_flops(T), "bytes": weights}
    cache = cached * B * T * config.cache_floats()
    return {"flops": B * config.decode_flops(T), "bytes": weights + cache}
