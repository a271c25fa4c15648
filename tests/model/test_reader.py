"""Reading with a cache: the logits of the whole forward pass, for each text separately."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import Guarded, refused
from helpers.backends import TWO_BACKENDS

from gpt2c import GPT2, Engine, GPT2Config
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.binding import Kernels
from gpt2c.kernels.cases import normalised_error
from gpt2c.kernels.memory import view
from gpt2c.kernels.reference.linear import MIDDLE
from gpt2c.model import reader
from gpt2c.model.block import Cache
from gpt2c.model.config import ModelConfig
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.model.reader import Decoder
from gpt2c.pretrained import MODELS

V, T = 97, 140
ODD = GPT2Config(vocab_size=V, n_positions=T, n_embd=60, n_layer=2, n_head=3, n_inner=71)
FLAT = GPT2Config(vocab_size=7, n_positions=20, n_embd=128, n_layer=1, n_head=2)
LEAST = GPT2Config(vocab_size=5, n_positions=3, n_embd=1, n_layer=1, n_head=1)
# five queries share a head of keys and values: a tile of rows and one more
GROUPED = LlamaConfig(V, 60, 71, 2, 10, 2, 18, T, rope_theta=50.0)
SHARED = LlamaConfig(23, 32, 40, 1, 3, 1, 16, 20, tie_word_embeddings=True)
KINDS = ["fp32", "fp16", "int8"]
CONFIGS = {"odd": ODD, "flat": FLAT, "least": LEAST, "grouped": GROUPED, "shared": SHARED}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# The same sums in another order: some hundred roundings of 6e-8 add up.
RTOL = 1e-5
# Op by op and in one call the products are equal, but a softmax is summed in another order.
STEP = 2e-6
# With int8, activations are rounded too. One almost half way between two of 127 steps may go to
# either, after another rounding in float32: an error of about a hundredth, which all later numbers
# see. Few texts of this length have such a number, so the median row must agree as closely as with
# floats, and no row may differ by more than a few steps.
FLIP = 0.05


# Caches of 16 and 8 bits: what one rounding changes, as a share of the number in 16 bits, of the
# largest in its row in 8.
SMALL_CACHES = {"fp16": 2.0**-11, "int8": 1 / 254}
# models whose products are of 16-bit numbers, by the type of their weights
ROUNDED = {"bf16": "fp32", "fp16 in bf16": "fp16"}
KINDS_AND_CACHES = [
    *((kind, "fp32") for kind in [*KINDS, *ROUNDED]),
    *(("fp32", cache) for cache in SMALL_CACHES),
]


def agree(kind: str, a: Any, b: Any, rtol: float = RTOL) -> None:
    """Compare logits (..., V), the rows of each text separately."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1])
    errors = np.abs(a - b).max(axis=1) / np.abs(b).max()
    if kind == "int8":
        assert errors.max() <= FLIP and np.median(errors) <= rtol, errors
    else:
        assert errors.max() <= rtol, errors  # a NaN must fail


def make(backend: Any, kind: str = "fp32", config: ModelConfig = ODD, seed: int = 1) -> Any:
    """Return a model whose parameters are all random."""
    weights, precision = ROUNDED.get(kind, kind), "bf16" if kind in ROUNDED else "fp32"
    model = MODELS[type(config)](config, seed, backend, precision=precision)
    rng = np.random.default_rng(seed)
    for name, parameter in model.parameters.items():
        size = np.float32(0.1 if "ln" in name else 0.05)
        parameter += size * rng.standard_normal(parameter.shape, np.float32)
    return model if weights == "fp32" else model.quantize(weights)


def widened(model: LanguageModel) -> Model:
    """Return a model with the numbers that a model's small weights represent."""
    wide, p = Model(model.config, None, model.backend), model.parameters
    for name, parameter in wide.parameters.items():
        parameter[...] = p[name]
        if p[name].dtype == np.uint8:
            parameter -= MIDDLE
            parameter *= p[name.removesuffix("weight") + "scale"][:, None]
    return wide


def texts(rng: np.random.Generator, *shape: int, V: int = V) -> np.ndarray:
    return rng.integers(0, V, shape, np.int32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def read(decoder: Decoder, tokens: np.ndarray, *sizes: int, slot: int = 0) -> np.ndarray:
    """Read a text in pieces of these sizes; return all logits (T, V)."""
    logits, start = [], 0
    for size in sizes:
        for rows in decoder.hidden(tokens[start : start + size], slot, start):
            logits.append(np.full((len(rows), decoder.config.vocab_size), np.nan, np.float32))
            decoder.logits(logits[-1], rows)
        start += size
    assert start == len(tokens)
    return np.concatenate(logits)


def step_through(decoder: Decoder, tokens: np.ndarray, start: int = 0) -> np.ndarray:
    """Read texts (N, T) in slots 0.. token by token from `start` on; return those logits."""
    N, length = tokens.shape
    slots = np.arange(N, dtype=np.int32)
    steps = [
        decoder.step(tokens[:, t].copy(), slots, np.full(N, t, np.int32)).copy()
        for t in range(start, length)
    ]
    return np.stack(steps, axis=1)


def windows(length: int) -> list[tuple[int, int]]:
    """Return the parts of a text to read token by token: its ends, and around 64 and 128."""
    parts = [(0, 5), (62, 66), (127, 131), (length - 2, length)]
    return [(start, stop) for start, stop in parts if 0 <= start and stop <= length]


# ---- cached is uncached --------------------------------------------------------------------------

PIECES = [
    (T,),
    (1, T - 1),
    (T - 1, 1),
    (63, 1, 64, T - 128),
    (64, 64, T - 128),
    (65, T - 65),
    (*(1,) * 18, *(5,) * 4, T - 38),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [ODD, GROUPED], ids=["odd", "grouped"])
def test_reading_in_pieces_is_the_forward_pass(
    config: ModelConfig, kind: str, backend: Any, rng: np.random.Generator
) -> None:
    model, tokens = make(backend, kind, config), texts(rng, T)
    expected = widened(model)(tokens[None])[0]
    if kind == "int8":  # activations are rounded too, by up to half a step
        whole = read(model.decoder(), tokens, T)
        assert normalised_error(whole, expected) <= FLIP
        expected = whole
    for sizes in PIECES:
        agree(kind, read(model.decoder(), tokens, *sizes), expected)


@pytest.mark.parametrize("kind", KINDS)
@EACH_CONFIG
def test_steps_are_the_forward_pass(
    config: ModelConfig, kind: str, backend: Any, rng: np.random.Generator
) -> None:
    model = make(backend, kind, config)
    tokens = texts(rng, 3, config.n_positions, V=config.vocab_size)
    expected, exact = model(tokens), widened(model)(tokens)
    for start, stop in windows(config.n_positions):
        decoder = model.decoder(3)
        if start:
            for slot, text in enumerate(tokens):
                decoder.read(text[:start], slot, 0)
        logits = step_through(decoder, tokens[:, :stop], start)
        agree(kind, logits, expected[:, start:stop])
        if kind != "int8":
            agree(kind, logits, exact[:, start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_read_of_one_token(kind: str, backend: Any, rng: np.random.Generator) -> None:
    """The call for all layers gives the bits of the single ops, on the same cache."""
    model, tokens = make(backend, kind), texts(rng, T)
    decoder = model.decoder()
    stepped, ops = [], []
    for start, stop in windows(T):
        if start:
            decoder.read(tokens[:start], 0, 0)
        for t in range(start, stop):
            token = tokens[t : t + 1]
            stepped.append(decoder.step(token, ints(0), ints(t))[0].copy())
            keys, values = decoder.keys[:, 0, :, t].copy(), decoder.values[:, 0, :, t].copy()
            decoder.keys[:, 0, :, t] = decoder.values[:, 0, :, t] = np.nan
            ops.append(decoder.read(token, 0, t))
            if kind != "int8":
                assert normalised_error(decoder.keys[:, 0, :, t], keys) <= STEP
                assert normalised_error(decoder.values[:, 0, :, t], values) <= STEP
    agree(kind, np.stack(stepped), np.stack(ops), STEP)


def test_prompt_of_several_chunks(
    backend: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make(backend), texts(rng, T)
    expected = read(model.decoder(), tokens, T)
    for chunk in (1, 31, 64, T - 1, T, T + 1):
        monkeypatch.setattr("gpt2c.model.reader.CHUNK", chunk)
        agree("fp32", read(model.decoder(), tokens, T), expected)
        agree("fp32", model.decoder().read(tokens, 0, 0)[None], expected[-1:])


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_logits(
    kind: str, backend: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make(backend, kind), texts(rng, T + 1)
    logits = read(model.decoder(), tokens[:-1], T).astype(np.float64)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(T), tokens[1:]]
    expected[7] = 0
    targets = tokens[1:].copy()
    targets[7] = -1  # ignored
    for chunk, rows in [(256, 64), (33, 5), (T, T), (1, 1)]:
        monkeypatch.setattr("gpt2c.model.reader.CHUNK", chunk)
        monkeypatch.setattr("gpt2c.model.reader.LOGITS_ROWS", rows)
        likeliest = np.empty(len(targets), bool)
        losses = model.decoder().losses(tokens[:-1], targets, likeliest=likeliest)
        np.testing.assert_array_equal(likeliest, logits.argmax(axis=1) == targets)
        assert losses.dtype == np.float32 and losses[7] == 0
        agree(kind, losses[:, None], expected[:, None])


# ---- caches of 16 and 8 bits ---------------------------------------------------------------------


@pytest.mark.parametrize("cache", SMALL_CACHES)
@pytest.mark.parametrize("config", [ODD, GROUPED, FLAT], ids=["odd", "grouped", "flat"])
def test_small_cache_changes_logits_by_its_rounding(
    config: ModelConfig, cache: str, backend: Any, rng: np.random.Generator
) -> None:
    """A layer rounds keys and values; neither moves the logits by more than its own share."""
    length = config.n_positions
    model, tokens = make(backend, "fp32", config), texts(rng, length, V=config.vocab_size)
    exact = read(model.decoder(), tokens, length)
    error = normalised_error(read(model.decoder(1, None, cache), tokens, length), exact)
    share = 2 * config.n_layer * SMALL_CACHES[cache]
    assert share / 100 < error < share


@pytest.mark.parametrize("cache", SMALL_CACHES)
@pytest.mark.parametrize("config", [ODD, GROUPED, FLAT], ids=["odd", "grouped", "flat"])
def test_small_cache_gives_the_same_at_once_and_in_parts(
    config: ModelConfig, cache: str, backend: Any, rng: np.random.Generator
) -> None:
    """A token sees its own key and value as later tokens see them, whichever op reads it.

    Their sums have other orders, so of thousands a few go to the next step. That moves the logits
    by less than a tenth of one rounding; a key or value that is not rounded moves them by more.
    """
    length = config.n_positions
    model, tokens = make(backend, "fp32", config), texts(rng, length, V=config.vocab_size)
    expected = read(model.decoder(1, None, cache), tokens, length)
    rtol = SMALL_CACHES[cache] / 10
    pieces = PIECES[1::2] if length == T else [(1, length - 1), (7, 1, length - 8)]
    for sizes in pieces:
        agree("fp32", read(model.decoder(1, None, cache), tokens, *sizes), expected, rtol)
    stepped = step_through(model.decoder(1, None, cache), tokens[None])[0]
    agree("fp32", stepped, expected, rtol)


@pytest.mark.parametrize("cache", SMALL_CACHES)
def test_small_cache_holds_the_rounded_keys_and_values(
    cache: str, backend: Any, rng: np.random.Generator
) -> None:
    """Of the first layer, which sees no rounded number, by the reader of tokens and the stages."""
    model, tokens = make(backend, "fp32", GROUPED), texts(rng, 20)
    wide = model.decoder()
    wide.read(tokens, 0, 0)
    for stepped in (False, True):
        decoder = model.decoder(1, None, cache)
        if stepped:
            step_through(decoder, tokens[None])
        else:
            decoder.read(tokens, 0, 0)
        for name in ("keys", "values"):
            exact, held = getattr(wide, name)[0, 0, :, :20], getattr(decoder, name)[0, 0, :, :20]
            assert held.dtype == {"fp16": np.float16, "int8": np.int8}[cache]
            held, largest = held.astype(np.float64), np.abs(exact)
            if cache == "int8":
                held *= getattr(decoder, name.removesuffix("s") + "_scales")[0, 0, :, :20, None]
                largest = largest.max(axis=-1, keepdims=True)
            rounding = np.abs(held - exact) / largest
            assert rounding.max() <= SMALL_CACHES[cache] * 1.01
            assert rounding.max() > SMALL_CACHES[cache] / 2


@pytest.mark.parametrize("config", [ODD, GROUPED], ids=["odd", "grouped"])
def test_small_caches_take_a_half_and_a_quarter_of_the_memory(config: ModelConfig) -> None:
    model = make("numpy", "fp32", config)
    numbers = config.cache_floats() * T
    heads = numbers // config.stack().layers[0].attention.HS
    for cache, size in [
        ("fp32", 4 * numbers),
        ("fp16", 2 * numbers),
        ("int8", numbers + 4 * heads),
    ]:
        parts = model.decoder(1, None, cache)._cache
        assert sum(part.nbytes for part in parts if part is not None) == size


def test_unknown_caches_are_refused() -> None:
    model = GPT2(ODD, backend="numpy")
    for wrong in ("bf16", "FP16", None, 16, ["int8"], "", np.array([1, 2])):
        message = f"cache must be one of fp32, fp16, int8, got {wrong!r}"
        assert refused(model.decoder, 1, 4, wrong) == refused(Engine, model, cache=wrong) == message


# ---- texts side by side --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cache"), KINDS_AND_CACHES)
@pytest.mark.parametrize("config", [ODD, GROUPED], ids=["odd", "grouped"])
def test_text_gets_the_same_bits_alone_and_among_others(
    config: ModelConfig, kind: str, cache: str, backend: Any, rng: np.random.Generator
) -> None:
    """Beside texts of other lengths, in slots of any order, some of them ended."""
    model = make(backend, kind, config)
    # Kernels take rows in tiles of several sizes; the reference takes them one by one.
    for N in (1, 5) if backend.name == "numpy" else (1, 2, 3, 4, 5, 9, 17, 66):
        among_others(model, N, cache, rng)


def among_others(model: Any, N: int, cache: str, rng: np.random.Generator) -> None:
    """Compare N texts read together with each alone."""
    slots = rng.permutation(N + 2)[:N].astype(np.int32)
    lengths = rng.integers(1, T - 4, N)
    lengths[0] = 64
    tokens = [texts(rng, length + 4) for length in lengths]
    together = model.decoder(N + 2, None, cache)
    alone = [model.decoder(1, None, cache) for _ in range(N)]
    for text, slot, length, one in zip(tokens, slots, lengths, alone, strict=True):
        first = together.read(text[:length], int(slot), 0)
        assert np.array_equal(first, one.read(text[:length], 0, 0))
    for new in range(4):
        rows = [row for row in rng.permutation(N) if row != new + 1]  # one each time is left out
        now = [int(lengths[row]) for row in rows]
        newest = ints(*(tokens[row][length] for row, length in zip(rows, now, strict=True)))
        logits = together.step(newest, slots[rows], ints(*now))
        assert logits.shape == (len(rows), V) and logits.dtype == np.float32
        for row, length, out in zip(rows, now, logits, strict=True):
            expected = alone[row].step(ints(tokens[row][length]), ints(0), ints(length))
            assert np.array_equal(out, expected[0]), f"row {row} of {N}"
            lengths[row] += 1


def test_text_touches_nothing_but_its_own_rows(backend: Any, rng: np.random.Generator) -> None:
    """All other rows are NaN before and after."""
    model, tokens = make(backend), texts(rng, 10)
    decoder = model.decoder(3, 10)
    for cache in (decoder.keys, decoder.values):
        cache[...] = np.nan
    expected = read(model.decoder(), tokens, 10)
    agree("fp32", read(decoder, tokens[:4], 4, slot=1), expected[:4])
    for t in range(4, 8):
        agree("fp32", decoder.step(ints(tokens[t]), ints(1), ints(t)), expected[t : t + 1])
    for cache in (decoder.keys, decoder.values):
        assert np.isfinite(cache[:, 1, :, :8]).all()
        assert np.isnan(cache[:, [0, 2]]).all() and np.isnan(cache[:, 1, :, 8:]).all()


@TWO_BACKENDS
@pytest.mark.parametrize("cache", ["fp32", *SMALL_CACHES])
def test_copy_begins_with_the_same_tokens(
    cache: str, backend: Any, rng: np.random.Generator
) -> None:
    model, (first, second) = make(backend), texts(rng, 2, 20)
    decoder = model.decoder(3, None, cache)
    for part in decoder._cache:
        if part is not None:
            part[:, 2] = 99
    decoder.read(first[:12], 0, 0)
    decoder.read(first[12:], 0, 12)
    decoder.copy(0, 2, 12)
    fresh = model.decoder(1, None, cache)
    fresh.read(first[:12], 0, 0)
    expected = fresh.read(second[12:], 0, 12)
    assert np.array_equal(decoder.read(second[12:], 2, 12), expected)
    larger = model.decoder(2, None, cache)
    larger.copy(0, 1, 12, decoder)
    assert np.array_equal(larger.read(second[12:], 1, 12), expected)
    again = decoder.step(first[19:], ints(0), ints(19))  # the other goes on as before
    rtol = SMALL_CACHES.get(cache, 10 * RTOL) / 10
    agree("fp32", again, read(model.decoder(1, None, cache), first, 20)[-1:], rtol)


@TWO_BACKENDS
@pytest.mark.parametrize("cache", ["fp32", *SMALL_CACHES])
def test_slot_may_be_used_again(cache: str, backend: Any, rng: np.random.Generator) -> None:
    model, (first, second) = make(backend), texts(rng, 2, 30)
    decoder = model.decoder(2, 30, cache)
    decoder.read(first, 1, 0)
    again = decoder.read(second[:17], 1, 0)
    assert np.array_equal(again, model.decoder(1, 17, cache).read(second[:17], 0, 0))


def test_capacity_changes_nothing(backend: Any, rng: np.random.Generator) -> None:
    model, tokens = make(backend), texts(rng, 2, 67)
    roomy, tight = model.decoder(2), model.decoder(2, 67)
    assert tight.capacity == 67 and roomy.capacity == T
    for decoder in (roomy, tight):
        for slot in (0, 1):
            decoder.read(tokens[slot, :60], slot, 0)
    assert np.array_equal(step_through(tight, tokens, 60), step_through(roomy, tokens, 60))


def test_decoders_do_not_share_memory(backend: Any, rng: np.random.Generator) -> None:
    models = [make(backend, seed=1), make(backend, "int8", seed=2), make(backend, "fp16", seed=1)]
    tokens = texts(rng, 2, 9)
    expected = [step_through(model.decoder(2), tokens) for model in models]
    decoders = [model.decoder(2) for model in models]
    slots = np.arange(2, dtype=np.int32)
    for t in range(9):
        for decoder, logits in zip(decoders, expected, strict=True):
            out = decoder.step(tokens[:, t].copy(), slots, np.full(2, t, np.int32))
            assert np.array_equal(out, logits[:, t])


def test_decoder_sees_changed_parameters(backend: Any, rng: np.random.Generator) -> None:
    model, other, tokens = make(backend, seed=1), make(backend, seed=2), texts(rng, 1, 5)
    decoder = model.decoder()
    first = step_through(decoder, tokens)
    model.load_parameters(other.parameters, "another model")
    expected = step_through(other.decoder(), tokens)
    assert np.array_equal(step_through(decoder, tokens), expected)
    assert not np.array_equal(first, expected)


# ---- threads and memory --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cache"), KINDS_AND_CACHES)
def test_threads_do_not_change_a_bit(
    kind: str, cache: str, backend_name: str, rng: np.random.Generator
) -> None:
    """Threads share rows, columns and heads; each sum is one thread's.

    256 channels and 130 tokens are enough work for every op to wake its threads.
    """
    if backend_name == "numpy":
        pytest.skip("numpy has threads of its own")
    config = GPT2Config(vocab_size=300, n_positions=150, n_embd=256, n_layer=1, n_head=4)
    tokens, results = texts(rng, 5, 134, V=300), []
    for threads in (1, 2, 3):
        model = make(get_backend(backend_name, threads), kind, config)
        decoder = model.decoder(5, None, cache)
        prompts = [decoder.read(row[:130], slot, 0) for slot, row in enumerate(tokens)]
        results.append((np.stack(prompts), step_through(decoder, tokens, 130)))
    for prompts, steps in results[1:]:
        assert np.array_equal(prompts, results[0][0]) and np.array_equal(steps, results[0][1])


@pytest.mark.parametrize("N", [3, 66])
@pytest.mark.parametrize(("kind", "cache"), KINDS_AND_CACHES)
@EACH_CONFIG
def test_step_stays_in_its_memory(
    config: ModelConfig,
    kind: str,
    cache: str,
    N: int,
    backend: Any,
    guarded: Guarded,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All memory that C gets is guarded and unaligned; activations and scratch are full of NaN."""
    if not isinstance(backend, Kernels):
        pytest.skip("numpy has no memory of C's")
    length = {"n_positions" if isinstance(config, GPT2Config) else "max_position_embeddings": 9}
    config = dataclasses.replace(config, **length) if config.n_positions > 9 else config
    model, tokens = (
        make(backend, kind, config),
        texts(rng, N, config.n_positions, V=config.vocab_size),
    )
    expected = step_through(model.decoder(N, None, cache), tokens)
    copies = {name: guarded.copy(array) for name, array in model.parameters.items()}
    model._placed = model._placed._replace(public=copies)
    decoder = model.decoder(N, None, cache)
    decoder._cache = Cache(*(p if p is None else guarded.copy(p) for p in decoder._cache))
    decoder._logits = guarded.copy(np.full_like(decoder._logits, np.nan))
    scratch: dict[int, Any] = {}

    class Alone:
        """Activations that share no memory."""

        def __init__(self, slots: Any, recompute: None, halves: bool = False) -> None:
            self._slots = slots

        def lay_out(self, batch: Any, keep: bool) -> dict[str, Any]:
            nan = {
                slot.name: np.full(slot.shape, np.nan, np.float32) for slot in self._slots(batch)
            }
            return {name: guarded.copy(array) for name, array in nan.items()}

    monkeypatch.setattr(reader, "Activations", Alone)

    def exactly(size: int) -> Any:
        if size not in scratch:
            scratch[size] = guarded.copy(np.full(size, np.nan, np.float32))
        return backend._f(scratch[size])

    monkeypatch.setattr(backend, "_scratch", exactly)
    assert np.array_equal(step_through(decoder, tokens), expected)
    assert len(scratch) == 1


@pytest.mark.parametrize(("cache", "row"), [("fp32", 4 * 20), ("fp16", 2 * 20), ("int8", 20 + 4)])
@pytest.mark.parametrize("slots", [1, 1000])
def test_caches_that_do_not_fit_are_refused(
    slots: int, cache: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("numpy")
    needed = slots * (2 * 2 * 3 * T * row + 4 * V)
    monkeypatch.setattr("gpt2c.kernels.memory.UNASKED", 0)
    monkeypatch.setattr("gpt2c.kernels.memory.available_bytes", lambda: needed)
    model.decoder(slots, None, cache)
    monkeypatch.setattr("gpt2c.kernels.memory.available_bytes", lambda: needed - 1)
    texts = f"{slots:,} texts?"
    with pytest.raises(MemoryError, match=rf"^reading {texts} of {T} tokens needs .*: keys and"):
        model.decoder(slots, None, cache)


# ---- refused before C ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "capacity", "named"),
    [
        *((0, 4, "slots"), (-1, 4, "slots"), (1, 0, "capacity")),
        *((1.5, 4, "slots"), (True, 4, "slots"), (1, "4", "capacity")),
    ],
)
def test_decoder_without_slots_or_capacity_is_refused(
    slots: Any, capacity: Any, named: str
) -> None:
    model = GPT2(ODD, backend="numpy")
    assert refused(model.decoder, slots, capacity).startswith(named)
    assert "n_positions" in refused(model.decoder, 1, ODD.n_positions + 1)


@TWO_BACKENDS
def test_tokens_that_do_not_fit_are_refused(backend: Any) -> None:
    decoder = GPT2(ODD, backend=backend).decoder(2, 4)
    before = decoder.keys.tobytes(), decoder.values.tobytes()
    ids = np.arange(5, dtype=np.int32)
    for tokens, slot, position in (
        *((ids, 0, 0), (ids[:2], 0, 3), (ids[:1], 2, 0), (ids[:1], -1, 0)),
        *((ids[:1], 0, -1), (ids, 1, 1)),
    ):
        assert "do not fit" in refused(decoder.read, tokens, slot, position)
    assert "at least one" in refused(decoder.read, ids[:0], 0, 0)
    for wrong in (5, None, "ab", [1], ids.reshape(1, -1), ids[0]):
        message = f"tokens must be an int32 array (T,), got {wrong!r:.50}"
        assert refused(decoder.read, wrong, 0, 0) == message
        assert refused(decoder.step, wrong, ids[:1], ids[:1]) == message
        assert refused(decoder.losses, wrong, ids) == message
    assert refused(decoder.read, ids, 0.0, 0).startswith("slot must be a whole number")
    assert refused(decoder.read, ids, 0, True).startswith("position must be a whole number")
    three = np.zeros(3, np.int32)
    assert "at most 2" in refused(decoder.step, three, three, three)
    wide = np.zeros(2, np.int64)
    assert "int64" in refused(decoder.step, wide, wide, wide)
    right = {"tokens": ids[:2], "slots": ids[:2], "positions": ids[:2]}
    for name, limit in (("tokens", ODD.vocab_size), ("slots", 2), ("positions", 4)):
        for wrong in (-1, limit, 2**31 - 1):
            message = refused(decoder.step, **right | {name: np.array([0, wrong], np.int32)})
            assert message.startswith(f"{name} must be in [0, {limit})") and str(wrong) in message
    assert "different" in refused(decoder.step, **right | {"slots": np.ones(2, np.int32)})
    gaps = np.zeros(4, np.int32)[::2]
    assert "contiguous" in refused(decoder.step, **right | {"positions": gaps})
    for wrong in (-1, ODD.vocab_size):
        assert "tokens" in refused(decoder.read, np.array([wrong], np.int32), 0, 0)
        assert "targets" in refused(decoder.losses, ids[:1], np.array([wrong * 2], np.int32))
    out, rows = np.zeros((1, ODD.vocab_size), np.float32), np.zeros((1, ODD.n_embd), np.float32)
    for bad in (out[:, :-1], out.astype(np.float64), np.repeat(out, 2, 0)):
        assert refused(decoder.logits, bad, rows).startswith("out")
    out.flags.writeable = False
    assert "writeable" in refused(decoder.logits, out, rows)
    assert (decoder.keys.tobytes(), decoder.values.tobytes()) == before


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("wte.scale", None, "missing"),
        ("h.0.mlp.c_fc.weight", lambda a: a[:3], "must be"),
        ("h.1.ln_1.bias", lambda a: a.astype(np.float64), "float64"),
        ("h.0.attn.c_attn.scale", lambda a: a[:-1], "must be"),
        ("h.0.attn.c_proj.weight", np.asfortranarray, "contiguous"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(name: str, change: Any, said: str) -> None:
    model = GPT2(ODD).quantize("int8")
    parameters = dict(model.parameters)
    array = parameters.pop(name)
    if change is not None:
        parameters[name] = change(array)
    message = refused(Decoder, ODD, parameters, model.backend, 1, 4)
    assert name in message and said in message


@pytest.mark.parametrize("weights", [(np.inf, -np.inf), (3e38, 3e38), (np.nan, 0)])
def test_damaged_weights_are_an_error_and_no_warning(weights: tuple[float, float]) -> None:
    model = make(get_backend("base"))
    model.parameters["wte.weight"][:], model.parameters["wpe.weight"][:] = weights
    with pytest.raises(ValueError, match="diverged or are damaged"):
        model.generate([[1, 2]], max_new_tokens=1)


def test_argmax_is_computed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argmax of 50,257 logits costs more than one token's loss."""
    decoder = GPT2(ODD, backend="numpy").decoder()
    tokens, asked = np.arange(5, dtype=np.int32), 0

    class Logits(np.ndarray):
        def argmax(self, *arguments: Any, **keywords: Any) -> Any:
            nonlocal asked
            asked += 1
            return super().argmax(*arguments, **keywords)

    monkeypatch.setattr(reader, "view", lambda *arguments: view(*arguments).view(Logits))
    losses, likeliest = decoder.losses(tokens, tokens), np.empty(5, bool)
    assert asked == 0
    assert np.array_equal(decoder.losses(tokens, tokens, likeliest=likeliest), losses)
    assert asked == 1


def test_decoders_arrays_keep_the_shapes_that_c_trusts(backend: Any) -> None:
    model = GPT2(ODD, backend=backend).quantize("int8")
    ids = np.arange(3, dtype=np.int32)
    expected = model.decoder().read(ids, 0, 0)
    decoder = model.decoder()
    for name in ("wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.scale"):
        model.parameters[name].shape = (1, -1)
    decoder.keys.shape = decoder.values.shape = (1, -1)
    assert np.array_equal(decoder.read(ids, 0, 0), expected)
    zero = np.zeros(1, np.int32)
    assert np.isfinite(decoder.step(zero, zero, zero + 3)).all()


def test_step_of_no_text_returns_empty_arrays(backend: Any) -> None:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    none = np.empty(0, np.int32)
    assert GPT2(config, backend=backend).decoder(2).step(none, none, none).shape == (0, 11)
