"""The engine: each request gets the text that it gets alone; what ends a request or the engine."""

import copy
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from helpers.command import program, run_process

import gpt2c
from gpt2c.generate import engine as engine_module
from gpt2c.generate.engine import Engine, EngineFull
from gpt2c.kernels.backend import backends, get_backend
from gpt2c.model import reader as decoder_module

V, POSITIONS, CHUNK = 61, 40, 8
WAIT = 120  # seconds until a test that hangs fails
GREEDY = {"temperature": 0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (decoder_module, engine_module):
        monkeypatch.setattr(module, "CHUNK", CHUNK)


def make_model(backend="auto", threads=1, **settings):
    """Return a model whose next token depends on the whole text."""
    backend = get_backend(backend, threads)
    shape = {"vocab_size": V, "n_positions": POSITIONS, "n_embd": 24, "n_layer": 2, "n_head": 3}
    model = gpt2c.GPT2(gpt2c.GPT2Config(**shape | settings), seed=1, backend=backend)
    rng = np.random.default_rng(2)
    for parameter in model.parameters.values():
        parameter += rng.normal(size=parameter.shape).astype(np.float32) / 4
    return model


def ids(count, seed=0):
    return np.random.default_rng((seed, count)).integers(0, V, count).tolist()


def alone(model, prompt, count, **settings):
    """Return the new tokens of model.generate, or a pair with logprobs=True."""
    out = model.generate([prompt], count, **settings)
    if settings.get("logprobs"):
        return out[0][0, len(prompt) :], out[1][0]
    return out[0, len(prompt) :]


@pytest.mark.parametrize("settings", [GREEDY, {"seed": 1, "logprobs": True}])
def test_padding_ids_are_never_drawn_with_a_tokenizer(settings):
    tokenizer = gpt2c.Tokenizer.from_name("bytes")
    model, larger = (make_model(vocab_size=size) for size in (257, 320))
    for name, parameter in larger.parameters.items():
        parameter[: len(model.parameters[name])] = model.parameters[name]
    larger.parameters["wte.weight"][257:] = 3 * model.parameters["wte.weight"][107]
    with Engine(larger, tokenizer=tokenizer) as engine, Engine(larger) as other:
        without = other.submit([65], 30, **settings).result(WAIT)
        assert (np.array(without) >= 257).any()
        for prompt in ([65], list(range(30)), [300]):  # a request's own ids may be padding
            got = engine.submit(prompt, 20, **settings).result(WAIT)
            tokens = got[0] if "logprobs" in settings else got
            assert len(tokens) == 20 and (tokens < 257).all()
        expected = alone(model, [65], 20, **settings)
        got = engine.submit([65], 20, **settings).result(WAIT)
        for one, own in zip(np.atleast_2d(got), np.atleast_2d(expected), strict=True):
            np.testing.assert_allclose(one, own, atol=1e-4)
    assert refused(Engine, 5) == "model must be a GPT2 or Llama, got 5"
    assert refused(Engine, make_model(), tokenizer=5) == "tokenizer must be a Tokenizer, got 5"
    with pytest.raises(ValueError, match="has 257 tokens and the model 61"):
        Engine(make_model(), tokenizer=tokenizer)


def test_timeout_must_be_a_number():
    with Engine(make_model()) as engine:
        request = engine.submit([1], 1)
        for wrong in ("1", True):
            assert refused(request.result, wrong) == f"timeout must be a number, got {wrong!r}"
        request.result(WAIT)


class Gate:
    """A decoder that records its calls, and holds each until the test lets it through."""

    def __init__(self, decoder):
        self.capacity = decoder.capacity
        self.calls = []  # ("read", tokens) or ("step", texts)
        self.errors = {}  # name of a call -> the error that the next such call raises
        self._decoder = decoder
        self._come, self._go = threading.Semaphore(0), threading.Semaphore(0)

    def _pass(self, name, size):
        self.calls.append((name, size))
        self._come.release()
        assert self._go.acquire(timeout=WAIT)
        if name in self.errors:
            raise self.errors.pop(name)

    def read(self, tokens, slot, position):
        self._pass("read", len(tokens))
        return self._decoder.read(tokens, slot, position)

    def step(self, tokens, slots, positions):
        self._pass("step", len(tokens))
        return self._decoder.step(tokens, slots, positions)

    def wait(self, calls=1):
        """Wait for this number of further calls; the last of them is not let through."""
        for call in range(calls):
            assert self._come.acquire(timeout=WAIT)
            if call < calls - 1:
                self._go.release()

    def let(self, calls=1):
        """Let the waiting call through, and those after it; return when the next one waits."""
        for _ in range(calls):
            self._go.release()
            assert self._come.acquire(timeout=WAIT)

    def open(self):
        self._go.release(100_000)


@pytest.fixture
def gated():
    """Return a function that makes a model, its gate and an engine; later close the engines."""
    made = []

    def make(**settings):
        model = make_model()
        gates = []
        original = model.decoder
        model.decoder = lambda *sizes: gates.append(Gate(original(*sizes))) or gates[-1]
        engine = Engine(model, **settings)
        del model.decoder
        made.append((engine, gates[0]))
        return model, gates[0], engine

    yield make
    for engine, gate in made:
        gate.open()
        engine.close()
        assert not engine._thread.is_alive()


# ---- each request as if alone --------------------------------------------------------------------

JOBS = [
    (3, 20, {"seed": 5}),
    (30, 10, GREEDY),
    (POSITIONS - 1, 30, {"seed": 3}),
    (POSITIONS, 3, {"seed": 4, "temperature": 0.7}),
    (1, 5, {"seed": 9, "top_k": 5, "logprobs": True}),
    (16, POSITIONS, {"seed": 9, "top_p": 0.9}),
    (POSITIONS - 2, 10, {"seed": 3, "on_full": "stop"}),
    (12, 1, {"seed": 3}),
    (9, 30, {"seed": 1, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    (5, 40, {"seed": 2, "stop": list(range(0, V, 7)), "min_new_tokens": 2, "min_p": 0.05}),
]


@TWO_BACKENDS
@pytest.mark.parametrize(("quantize", "threads"), [(None, 2), ("int8", 1), ("fp16", 1)])
def test_request_gets_the_text_that_it_gets_alone(quantize, threads, backend_name, tmp_path):
    model = make_model(backend_name, threads)
    if quantize:
        model.save_pretrained(tmp_path)
        model = gpt2c.from_pretrained(tmp_path, model.backend, quantize)
    with Engine(model, slots=3, queue=len(JOBS)) as engine:
        requests = [engine.submit(ids(T), count, **settings) for T, count, settings in JOBS]
        results = [request.result(WAIT) for request in requests]
    for (T, count, settings), request, result in zip(JOBS, requests, results, strict=True):
        expected = alone(model, ids(T), count, **settings)
        if settings.get("logprobs"):
            np.testing.assert_array_equal(result[1], expected[1])
            assert result[1].dtype == np.float64
            result, expected = result[0], expected[0]
        np.testing.assert_array_equal(result, expected, err_msg=f"{T} tokens, {settings}")
        assert result.dtype == np.int64
        if "stop" in settings:
            assert request.ended == "end" and 2 <= len(result) < count
        else:
            assert request.ended == "length"
    assert len(results[6]) == 3, "two more positions and the token that follows the last"


@TWO_BACKENDS
@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_request_gets_the_text_that_it_gets_alone_with_a_small_cache(cache, backend_name):
    """In slots that other texts have left, and with prompts that share a beginning."""
    model = make_model(backend_name)
    with Engine(model, slots=3, queue=len(JOBS), cache=cache) as engine:
        requests = [engine.submit(ids(T), count, **settings) for T, count, settings in JOBS]
        results = [request.result(WAIT) for request in requests]
    for (T, count, settings), result in zip(JOBS, results, strict=True):
        expected = alone(model, ids(T), count, cache=cache, **settings)
        np.testing.assert_array_equal(np.atleast_2d(result)[0], np.atleast_2d(expected)[0])


def test_long_prompts_are_read_in_chunks(monkeypatch):
    monkeypatch.undo()
    size = 2 * decoder_module.CHUNK
    assert size > CHUNK
    model = make_model(n_positions=size + 50)
    prompts = [ids(size + 9), ids(5), ids(size), ids(size + 49)]
    with Engine(model, slots=4) as engine:
        requests = [engine.submit(prompt, 6, seed=1) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            np.testing.assert_array_equal(request.result(WAIT), alone(model, prompt, 6, seed=1))


def test_request_joins_while_others_run(gated):
    model, gate, engine = gated(slots=3)
    first = engine.submit(ids(4), 9, seed=1)
    gate.wait()
    gate.let(3)
    second = engine.submit(ids(2), 3, seed=2)
    gate.let(1)
    third = engine.submit(ids(6), 20, seed=3)
    gate.open()
    for request, T, count, seed in [(first, 4, 9, 1), (second, 2, 3, 2), (third, 6, 20, 3)]:
        np.testing.assert_array_equal(
            request.result(WAIT), alone(model, ids(T), count, seed=seed), err_msg=f"seed {seed}"
        )
    texts = [size for name, size in gate.calls if name == "step"]
    assert texts[:3] == [1, 1, 1] and max(texts) == 3 and texts[-1] == 1
    assert sum(texts) == 8 + 2 + 19, "a text was read in vain"


def test_long_prompt_lets_the_others_go_on(gated):
    _, gate, engine = gated(slots=2)
    running = engine.submit(ids(4), 30, seed=1)
    gate.wait(2)
    long = engine.submit(ids(2 * CHUNK + 3), 5, seed=2)
    gate.open()
    running.result(WAIT)
    long.result(WAIT)
    assert gate.calls[:2] == [("read", 4), ("step", 1)]
    at = gate.calls.index(("read", CHUNK))
    between = [("read", CHUNK), ("step", 1)] * 2
    assert gate.calls[at : at + 6] == [*between, ("read", 3), ("step", 2)]


def test_kept_half_of_a_full_context_is_read_in_chunks(gated):
    model, gate, engine = gated(slots=2)
    full = engine.submit(ids(POSITIONS - 1), 4, seed=1)
    other = engine.submit(ids(2), 30, seed=2)
    gate.open()
    np.testing.assert_array_equal(full.result(WAIT), alone(model, ids(39), 4, seed=1))
    np.testing.assert_array_equal(other.result(WAIT), alone(model, ids(2), 30, seed=2))
    reads = [size for name, size in gate.calls if name == "read"]
    assert sorted(reads) == sorted([8, 8, 8, 8, 7, 2, 8, 8, 4])


def test_smaller_capacity_gives_the_same_text_or_refuses():
    model = make_model()
    with Engine(model, slots=2, capacity=20) as engine:
        assert engine.capacity == 20
        request = engine.submit(ids(12), 8, seed=1)
        np.testing.assert_array_equal(request.result(WAIT), alone(model, ids(12), 8, seed=1))
        for T, count in [(12, 9), (21, 1), (1, 64)]:
            message = refused(engine.submit, ids(T), count)
            assert (
                f"idx: {T} token{'s' * (T > 1)} and {count} new are more" in message
                and message.endswith("capacity, 20")
            )


def test_request_without_new_tokens_or_without_a_prompt():
    model = make_model(eos_token_id=7)
    with Engine(model) as engine:
        nothing = engine.submit([1, 2], max_new_tokens=0)
        assert nothing.done and nothing.ended == "length"
        assert list(nothing) == [] and nothing.result().shape == (0,)
        tokens, logprobs = engine.submit([1], 0, logprobs=True).result()
        assert tokens.dtype == np.int64 and logprobs.dtype == np.float64
        for empty in ([], (), np.empty(0, int)):
            request = engine.submit(empty, 5, seed=1)
            np.testing.assert_array_equal(request.result(WAIT), alone(model, [7], 5, seed=1))


# ---- readers -------------------------------------------------------------------------------------


def test_tokens_come_one_by_one(gated):
    model, gate, engine = gated(slots=1)
    expected = alone(model, ids(4), 6, seed=1, logprobs=True)
    request = engine.submit(ids(4), 6, seed=1, logprobs=True)
    gate.wait()
    tokens = iter(request)
    for count, pair in enumerate(zip(*expected, strict=True), start=1):
        assert not request.done
        gate.let() if count < 6 else gate.open()
        assert next(tokens) == pair
        assert len(gate.calls) == min(count + 1, 6)
    assert next(tokens, None) is None and request.done
    token, logprob = next(iter(request))
    assert type(token) is int and type(logprob) is float


def test_every_reader_gets_all_tokens(gated):
    model, gate, engine = gated(slots=1)
    expected = alone(model, ids(4), 12, seed=1).tolist()
    request = engine.submit(ids(4), 12, seed=1)
    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(list, request) for _ in range(4)]
        waiters = [pool.submit(request.result, WAIT) for _ in range(4)]
        gate.open()
        assert all(reader.result(WAIT) == expected for reader in readers)
        assert all(waiter.result(WAIT).tolist() == expected for waiter in waiters)
    assert list(request) == expected, "and again"
    assert not request._readers


def test_result_times_out(gated):
    _, gate, engine = gated()
    request = engine.submit(ids(4), 3, seed=1)
    for seconds in (0, 0.01, -1):
        with pytest.raises(TimeoutError, match=f"after {seconds:g} s"):
            request.result(timeout=seconds)
    assert not request.done
    gate.open()
    assert len(request.result(timeout=WAIT)) == len(request.result(timeout=0)) == 3


def test_reader_that_stops_holds_up_no_other():
    model = make_model()
    with Engine(model, slots=2) as engine:
        slow = engine.submit(ids(4), 30, seed=1)
        tokens = iter(slow)
        read = [next(tokens)]
        for seed in range(5):
            request = engine.submit(ids(3), 40, seed=seed)
            np.testing.assert_array_equal(request.result(WAIT), alone(model, ids(3), 40, seed=seed))
        assert slow.result(WAIT).tolist() == read + list(tokens)


def test_reader_that_is_interrupted_leaves_the_engine_usable():
    model = make_model()
    with Engine(model, slots=1, queue=1) as engine:
        for _ in range(5):
            request = engine.submit(ids(4), 20, seed=1)
            with pytest.raises(KeyboardInterrupt):
                for _ in request:
                    raise KeyboardInterrupt
            assert len(request.result(WAIT)) == 20


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
@pytest.mark.parametrize("read", [list, lambda request: request.result()])
def test_ctrl_c_interrupts_a_wait(read, gated):
    model, gate, engine = gated(slots=1)
    request = engine.submit(ids(4), 5, seed=1)
    gate.wait()
    main = threading.main_thread().ident
    stop = threading.Event()

    def press():  # until it is noticed, because the first one may come before the wait
        while not stop.wait(0.05):
            signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=press)
    with pytest.raises(KeyboardInterrupt):
        try:
            thread.start()
            read(request)
        finally:
            stop.set()
    thread.join()
    gate.open()
    np.testing.assert_array_equal(request.result(WAIT), alone(model, ids(4), 5, seed=1))
    assert len(engine.submit(ids(4), 5).result(WAIT)) == 5


# ---- cancelling, and a full engine ---------------------------------------------------------------


def test_cancelled_request_frees_its_slot_before_the_next_step(gated):
    model, gate, engine = gated(slots=1, queue=1)
    first = engine.submit(ids(4), 30, seed=1)
    second = engine.submit(ids(5), 3, seed=2)
    gate.wait(3)  # two tokens are there, one of the prompt and one of a step; the second step waits
    first.cancel()
    assert first.done and first.ended == "cancelled"
    third = engine.submit(ids(6), 3, seed=3)  # the queue has room at once
    gate.let()
    assert gate.calls[-2:] == [("step", 1), ("read", 5)]
    gate.open()
    np.testing.assert_array_equal(first.result(), alone(model, ids(4), 30, seed=1)[:2])
    assert list(first) == first.result().tolist()
    np.testing.assert_array_equal(second.result(WAIT), alone(model, ids(5), 3, seed=2))
    np.testing.assert_array_equal(third.result(WAIT), alone(model, ids(6), 3, seed=3))


def test_request_is_cancelled_while_its_prompt_is_read(gated):
    model, gate, engine = gated(slots=2)
    first = engine.submit(ids(3 * CHUNK), 5, seed=1)
    gate.wait(2)
    first.cancel()
    second = engine.submit(ids(4), 5, seed=2)
    gate.let()
    assert gate.calls[1:] == [("read", CHUNK), ("read", 4)]
    gate.open()
    assert first.result().tolist() == [] and list(first) == []
    np.testing.assert_array_equal(second.result(WAIT), alone(model, ids(4), 5, seed=2))


def test_waiting_and_finished_requests_may_be_cancelled(gated):
    _, gate, engine = gated(slots=1, queue=1)
    running = engine.submit(ids(4), 3, seed=1)
    waiting = engine.submit(ids(5), 3, seed=2)
    gate.wait()
    with pytest.raises(EngineFull):
        engine.submit(ids(6), 3)
    waiting.cancel()
    waiting.cancel()
    assert waiting.ended == "cancelled" and waiting.result().shape == (0,)
    other = engine.submit(ids(6), 3)
    gate.open()
    assert len(running.result(WAIT)) == len(other.result(WAIT)) == 3
    running.cancel()
    assert running.ended == "length" and len(running.result()) == 3
    assert ("read", 5) not in gate.calls


def test_cancelling_wakes_a_waiting_reader(gated):
    _, gate, engine = gated()
    request = engine.submit(ids(4), 3)
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(list, request), pool.submit(lambda: request.result().tolist())]
        gate.wait()
        request.cancel()
        assert [reader.result(WAIT) for reader in readers] == [[], []]


@pytest.mark.parametrize(("slots", "places"), [(1, 0), (2, 3)])
def test_full_engine_refuses_at_once(slots, places, gated):
    _, gate, engine = gated(slots=slots, queue=places)
    requests = [engine.submit(ids(4), 3, seed=1) for _ in range(slots + places)]
    with pytest.raises(EngineFull) as error:
        engine.submit(ids(4), 3)
    running = {1: "1 request", 2: "2 requests"}[slots]
    assert f"room for {running} at a time and {places} more that wait" in str(error.value)
    assert isinstance(error.value, RuntimeError)
    gate.open()
    for request in requests:
        request.result(WAIT)
    assert len(engine.submit(ids(4), 3).result(WAIT)) == 3


def test_many_threads_submit_at_once(backend_name):
    model = make_model(backend_name)
    start = threading.Barrier(16)

    def client(number):
        start.wait(WAIT)
        for turn in range(3):
            seed = 16 * turn + number
            prompt, count = ids(1 + seed % 20), 1 + seed % 7
            request = engine.submit(prompt, count, seed=seed)
            if seed % 5 == 0:
                request.cancel()
            expected = alone(model, prompt, count, seed=seed)  # beside the engine
            result = request.result(WAIT)
            if request.ended == "cancelled":
                expected = expected[: len(result)]
            np.testing.assert_array_equal(result, expected)
        return True

    with Engine(model, slots=4, queue=12) as engine, ThreadPoolExecutor(16) as pool:
        assert all(pool.map(client, range(16)))
        assert not engine._live


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (([1, V],), {}, f"{V} is not in"),
        (([1, -1],), {}, "idx"),
        (([1.5],), {}, "whole numbers"),
        ((["a"],), {}, "whole numbers"),
        ((5,), {}, "one prompt"),
        (([[1, 2]],), {}, "one prompt"),
        ((np.zeros((2, 0), int),), {}, "one prompt"),
        (([[1], [2, 3]],), {}, "idx"),
        (([],), {}, "eos_token_id"),
        ((ids(POSITIONS + 1),), {}, f"context is {POSITIONS} (n_positions)"),
        (([1], -1), {}, "max_new_tokens"),
        (([1], 2.5), {}, "max_new_tokens"),
        (([1],), {"temperature": -1}, "temperature"),
        (([1],), {"stop": V}, "stop"),
        (([1],), {"stop": "."}, "token ids"),
        (([1],), {"num_return_sequences": 2}, "num_return_sequences must be 1, got 2"),
        (([1],), {"cache": "fp16"}, "cache is the engine's: give it to Engine"),
    ],
)
def test_bad_arguments_are_refused_before_anything_waits(arguments, settings, words, gated):
    _, gate, engine = gated(slots=1, queue=0)
    assert words in refused(engine.submit, *arguments, **settings)
    request = engine.submit(ids(4), 3, seed=1)  # the only place is free
    gate.wait()
    assert words in refused(engine.submit, *arguments, **settings), "not EngineFull"
    with pytest.raises(TypeError, match="temprature"):
        engine.submit([1], temprature=1)
    gate.open()
    assert len(request.result(WAIT)) == 3


@pytest.mark.parametrize(
    "settings",
    [{"slots": 0}, {"queue": -1}, {"capacity": 0}, {"capacity": POSITIONS + 1}, {"cache": "bf16"}],
)
def test_sizes_out_of_range_are_refused(settings):
    before = threading.active_count()
    assert next(iter(settings)) in refused(Engine, make_model(), **settings)
    assert threading.active_count() == before


@pytest.mark.parametrize("name", [name for name in backends() if name != "numpy"])
def test_damaged_logits_end_one_request_only(name):
    model = make_model(name)
    model.parameters["wpe.weight"][10] = np.nan
    with Engine(model, slots=2) as engine:
        short = engine.submit(ids(2), 8, seed=1)
        long = engine.submit(ids(4), 20, seed=2)
        whole = engine.submit(ids(12), 20, seed=3)
        for _ in range(2):
            tokens = []
            with pytest.raises(ValueError, match="nan or infinity"):
                for token in long:
                    tokens.append(token)
            with pytest.raises(ValueError, match="nan or infinity"):
                long.result(WAIT)
            assert tokens == alone(model, ids(4), 7, seed=2).tolist()
        with pytest.raises(ValueError, match="nan or infinity"):
            whole.result(WAIT)
        assert long.ended == whole.ended == "error"
        np.testing.assert_array_equal(short.result(WAIT), alone(model, ids(2), 8, seed=1))
        assert len(engine.submit(ids(2), 8).result(WAIT)) == 8


def test_text_without_a_possible_token_ends_alone():
    model = make_model()
    with Engine(model, slots=2) as engine:
        barren = engine.submit(list(range(30)), V, no_repeat_ngram_size=1, seed=1)
        other = engine.submit(ids(3), 60, seed=2)
        with pytest.raises(ValueError, match="no_repeat_ngram_size"):
            barren.result(WAIT)
        assert len(set(range(30)) | set(barren._text.tokens)) == V
        np.testing.assert_array_equal(other.result(WAIT), alone(model, ids(3), 60, seed=2))


def test_error_in_the_shared_step_ends_all_running_requests(gated):
    model, gate, engine = gated(slots=2)
    requests = [engine.submit(ids(4 + n), 5, seed=n) for n in range(3)]
    gate.wait(4)  # one read and a step, another read and a step of both
    assert gate.calls == [("read", 4), ("step", 1), ("read", 5), ("step", 2)]
    gate.errors["step"] = MemoryError("no memory left")
    gate.open()
    for request in requests[:2]:
        with pytest.raises(MemoryError, match="no memory left"):
            request.result(WAIT)
    np.testing.assert_array_equal(requests[2].result(WAIT), alone(model, ids(6), 5, seed=2))


def test_error_in_reading_a_prompt_ends_its_request(gated):
    model, gate, engine = gated(slots=2)
    first = engine.submit(ids(4), 5, seed=1)
    second = engine.submit(ids(5), 5, seed=2)
    gate.wait(3)
    gate.errors["read"] = MemoryError("no memory left")
    gate.open()
    with pytest.raises(MemoryError, match="no memory left"):
        list(second)
    np.testing.assert_array_equal(first.result(WAIT), alone(model, ids(4), 5, seed=1))


# ---- the end -------------------------------------------------------------------------------------


def test_close_ends_running_and_waiting_requests(gated):
    model, gate, engine = gated(slots=1)
    running = engine.submit(ids(4), 30, seed=1)
    waiting = engine.submit(ids(4), 30, seed=1)
    gate.wait(3)
    tokens = iter(running)
    read = [next(tokens), next(tokens)]
    with ThreadPoolExecutor(3) as pool:
        closing = [pool.submit(engine.close) for _ in range(2)]
        for request in (running, waiting):
            with pytest.raises(RuntimeError, match="closed before the request was done"):
                request.result(WAIT)
            assert request.ended == "error"
        with pytest.raises(RuntimeError, match="closed before"):
            next(tokens)
        gate.open()
        for future in closing:
            future.result(WAIT)
    assert read == alone(model, ids(4), 2, seed=1).tolist()
    running.cancel()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit([1])


def test_close_keeps_finished_results():
    with Engine(make_model()) as engine:
        request = engine.submit(ids(4), 5)
        request.result(WAIT)
    assert len(request.result()) == len(list(request)) == 5
    assert not engine._thread.is_alive()


def test_program_ends_without_waiting_for_its_engines():
    done = run_process(program("programs.fresh", "leave_engines"), timeout=WAIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "int 2\n", "")


@pytest.mark.parametrize("name", ["slots", "queue", "capacity"])
@pytest.mark.parametrize("wrong", [1.5, True, "2", [3]])
def test_fractional_slots_queue_or_capacity_are_refused(name, wrong):
    config = gpt2c.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=3)
    model = gpt2c.GPT2(config)
    assert refused(Engine, model, **{name: wrong}).startswith(f"{name} must be a whole number")


def test_engine_is_not_copied() -> None:
    """A copy would take requests that no thread serves."""
    config = gpt2c.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    with Engine(gpt2c.GPT2(config), slots=1) as engine:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="an Engine cannot be copied or pickled"):
                duplicate(engine)
