"""Engine: many requests on one model, each of which comes and goes when it likes.

    with gpt2c.Engine(model, slots=8) as engine:
        request = engine.submit(ids, max_new_tokens=50, seed=1)  # from any thread
        for token in request:
            ...

Reading one token of eight texts takes little longer than of one: most of the time the weights come
from memory. So one thread reads the newest tokens of all texts in turn after turn, and between two
turns requests join and leave (continuous batching, Yu et al., Orca, OSDI 2022). What a request gets
is what `model.generate` gives for it alone. Knows nothing about strings and sockets.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Generic, Literal, NoReturn, TypeVar, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from gpt2c.generate.continuation import Ids, Logprobs, Text, read_newest
from gpt2c.generate.forks import tell_of_forks
from gpt2c.generate.sampling import GenerationConfig, TokenSettings
from gpt2c.kernels.checks import check_kind, counted, number, whole
from gpt2c.model.language_model import LanguageModel, check_ids
from gpt2c.model.reader import CHUNK, Decoder
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineFull", "Request"]

NewToken = TypeVar("NewToken", int, tuple[int, float])


class EngineFull(RuntimeError):
    """All slots and all places in the queue are taken; a later try may find one."""


class Request(Generic[NewToken]):
    """One prompt that an engine continues; `Engine.submit` makes it.

    Iterate over it for the new tokens, from the first, as they come: ints, or with logprobs=True
    pairs of a token and its log-probability. Who stops reading does not hold the engine up: tokens
    wait here until they are read. Any thread may read, wait and cancel, several at once too.

    Attributes
    ----------
    ended : why it is over: "end" (a token that ends a text), "length" (no more tokens were wanted,
        or fit), "cancelled" or "error"; None while it goes on
    """

    def __init__(self, engine: Engine, text: Text, logprobs: bool) -> None:
        self.ended: str | None = None
        self._engine = engine
        self._text = text
        self._unread = np.array(text.tokens, np.int32)  # to read before it can join the others
        self._logprobs = logprobs
        self._tokens: list[tuple[int, float]] = []  # each with its log-probability
        self._error: Exception | None = None
        # Readers share no lock with the engine: Ctrl-C in one of them cannot leave it locked.
        self._readers: list[SimpleQueue[None]] = []

    def __repr__(self) -> str:
        return f"Request({counted(len(self._tokens), 'new token')}, {self.ended or 'goes on'})"

    @property
    def done(self) -> bool:
        """Return whether it is over."""
        return self.ended is not None

    def __iter__(self) -> Iterator[NewToken]:
        """Return the new tokens, from the first, as they come; then raise what ended it, if any."""
        count = 0
        with self._news() as news:
            while True:
                done = self.done  # first: no token comes after that
                while count < len(self._tokens):
                    token = self._tokens[count]
                    yield cast(NewToken, token if self._logprobs else token[0])
                    count += 1
                if done:
                    break
                news.get()
        if self._error is not None:
            raise self._error

    @overload
    def result(self: Request[int], timeout: float | None = None) -> Ids: ...

    @overload
    def result(
        self: Request[tuple[int, float]], timeout: float | None = None
    ) -> tuple[Ids, Logprobs]: ...

    def result(self, timeout: float | None = None) -> Ids | tuple[Ids, Logprobs]:
        """Wait until it is over, `timeout` seconds at most.

        Returns
        -------
        all new tokens, (n,) int64; with logprobs=True a pair of them and their log-probabilities,
        (n,) float64. A cancelled request has the tokens that came before

        Raises
        ------
        TimeoutError : it goes on after so many seconds
        ValueError : its logits hold nan or infinity, or no token is left to continue with; timeout
            is no number
        RuntimeError : the engine was closed before
        """
        until = None if timeout is None else time.monotonic() + number("timeout", timeout)
        with self._news() as news:
            while not self.done:
                try:
                    news.get(timeout=None if until is None else max(0, until - time.monotonic()))
                except Empty:
                    raise TimeoutError(f"the request goes on after {timeout:g} s") from None
        if self._error is not None:
            raise self._error
        tokens = np.array([token for token, _ in self._tokens], np.int64)
        if not self._logprobs:
            return tokens
        return tokens, np.array([logprob for _, logprob in self._tokens], np.float64)

    def cancel(self) -> None:
        """End it with the tokens it has; before the next step its slot is free for another."""
        self._engine._end(self, "cancelled")

    @contextmanager
    def _news(self) -> Iterator[SimpleQueue[None]]:
        """Return a queue that gets something whenever something has changed."""
        news: SimpleQueue[None] = SimpleQueue()
        self._readers.append(news)
        try:
            yield news
        finally:
            self._readers.remove(news)

    def _tell(self) -> None:
        for news in list(self._readers):
            news.put(None)


class Engine:
    """Continues prompts that are submitted at any time, from any thread, on one model.

    So many run at a time, so many more wait, in the order they came; one more is refused at once
    with `EngineFull`. What is wrong with one request ends that one; an error in what they share
    ends those that run, and the engine goes on with the rest. Close it when it is no longer needed,
    best by `with`; the end of the program closes it too. The child of a fork finds it closed.

    Parameters
    ----------
    model : a `GPT2` or `QuantizedGPT2`; its weights must not change meanwhile
    slots : how many requests run at a time
    queue : how many more may wait
    capacity : the most tokens of a request, prompt and new, that it accepts; with n_positions, or
        None, a text may outgrow it, see on_full of `gpt2c.GenerationConfig`
    tokenizer : the model's; ids that it has not, of a padded model, then never come

    Raises
    ------
    ValueError : slots, queue or capacity is no whole number or out of range, or the tokenizer has
        tokens that the model has not
    MemoryError : the keys and values of so many texts do not fit

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1)
    >>> with gpt2c.Engine(model, slots=2) as engine:
    ...     requests = [engine.submit([104], max_new_tokens=n, seed=1) for n in (2, 4, 6)]
    ...     [len(request.result()) for request in requests]
    [2, 4, 6]
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int = 8,
        queue: int = 64,
        capacity: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_kind("model", model, LanguageModel, "a GPT2 or QuantizedGPT2")
        most = model.config.n_positions
        slots, queue = whole("slots", slots), whole("queue", queue)
        capacity = most if capacity is None else whole("capacity", capacity)
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if queue < 0:
            raise ValueError(f"queue must be at least 0, got {queue}")
        if not 1 <= capacity <= most:
            raise ValueError(f"capacity must be in [1, {most}], n_positions, got {capacity}")
        self.slots, self.queue, self.capacity = slots, queue, capacity
        self._model = model
        self._unused: list[int] = []
        if tokenizer is not None:
            check_kind("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
            self._unused = tokenizer.unused_ids(model.config.vocab_size)
        self._why_closed = ""  # nothing while it is open
        # Requests in the order they came: the first `slots` of them run. What threads share of
        # them and of an engine changes under the lock only, and under it nothing takes long.
        self._live: list[Request[Any]] = []
        self._make_locks()
        decoder = model.decoder(slots, self.capacity)
        # A daemon, or the end of the program would wait for it before it calls `close`.
        self._thread = threading.Thread(
            target=self._serve, args=(decoder,), name="gpt2c.Engine", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)
        tell_of_forks(self)

    def _make_locks(self) -> None:
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)

    @overload
    def submit(
        self,
        idx: Sequence[int],
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[False] = False,
        **settings: Unpack[TokenSettings],
    ) -> Request[int]: ...

    @overload
    def submit(
        self,
        idx: Sequence[int],
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[True],
        **settings: Unpack[TokenSettings],
    ) -> Request[tuple[int, float]]: ...

    def submit(
        self,
        idx: Sequence[int],
        max_new_tokens: int | None = 64,
        *,
        logprobs: bool = False,
        **settings: Unpack[TokenSettings],
    ) -> Request[int] | Request[tuple[int, float]]:
        """Ask for the continuation of one prompt; return at once.

        Parameters
        ----------
        idx : (T,) token ids; none start from eos_token_id of the config
        max_new_tokens : the most tokens to add
        logprobs : the request has the log-probability of each token as well
        settings : the other fields of `gpt2c.GenerationConfig`, except num_return_sequences

        Raises
        ------
        ValueError : an argument is out of range, or the text does not fit the capacity
        TypeError : an unknown setting
        EngineFull : all slots and the queue are taken
        RuntimeError : the engine is closed
        """
        config = GenerationConfig(max_new_tokens=max_new_tokens, logprobs=logprobs, **settings)
        if config.num_return_sequences != 1:
            raise ValueError(
                "a request is one text: num_return_sequences must be 1, got"
                f" {config.num_return_sequences}; submit the prompt as many times"
            )
        prompt = self._check(idx, config.max_new_tokens)
        ends = config.ends(self._model.config.vocab_size)
        text = Text(prompt, config, ends, slot=-1, unused=self._unused)
        request: Request[Any] = Request(self, text, config.logprobs)
        with self._lock:
            if self._why_closed:
                raise RuntimeError(self._why_closed)
            if config.max_new_tokens == 0:
                request.ended = "length"
                return request
            if len(self._live) == self.slots + self.queue:
                raise EngineFull(
                    f"the engine is full: it has room for {counted(self.slots, 'request')} at a"
                    f" time and {self.queue} more that wait; try again later"
                )
            self._live.append(request)
            self._work.notify()
        return request

    def __repr__(self) -> str:
        sizes = f"slots={self.slots}, queue={self.queue}, capacity={self.capacity}"
        return f"Engine({self._model!r}, {sizes}{', closed' if self._why_closed else ''})"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: a copy would have no thread that serves it."""
        raise TypeError("an Engine cannot be copied or pickled: make another one of its model")

    def close(self) -> None:
        """End the engine, and its requests with an error; a second time nothing happens."""
        self._close("the engine is closed", "the engine was closed before the request was done")
        self._thread.join()
        atexit.unregister(self.close)

    def _close(self, closed: str, ended: str) -> None:
        """Say so to who comes later, and to who waits."""
        with self._lock:
            self._why_closed = self._why_closed or closed
            live = list(self._live)
            self._work.notify()
        for request in live:
            self._end(request, "error", RuntimeError(ended))

    def after_fork(self) -> None:
        """Close in the child of a fork: the thread, which may have held the lock, is not here."""
        self._make_locks()
        why = "the engine stayed in the process that was forked: start one in the child"
        self._close(why, why)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self, idx: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return one prompt as token ids, if it and what is to come fit."""
        empty = isinstance(idx, list | tuple) and not idx
        vocab_size = self._model.config.vocab_size
        ids = check_ids(np.empty(0, np.int32) if empty else idx, "idx", 0, vocab_size)
        if ids.ndim != 1:
            raise ValueError(f"idx must be one prompt, (T,) token ids, got shape {ids.shape}")
        prompt = self._model.check_prompts(ids[None])[0]
        if self.capacity < min(len(prompt) + max_new_tokens, self._model.config.n_positions):
            raise ValueError(
                f"idx: {counted(len(prompt), 'token')} and {max_new_tokens} new are more than the"
                f" engine's capacity, {self.capacity}"
            )
        return prompt

    def _end(self, request: Request[Any], why: str, error: Exception | None = None) -> None:
        """Let a request be over, unless it is, and another take its place."""
        with self._lock:
            if request.ended is not None:
                return
            request._error = error
            request.ended = why
            self._live.remove(request)
        request._tell()

    # ---- the thread ------------------------------------------------------------------------------

    def _serve(self, decoder: Decoder) -> None:
        while True:
            with self._lock:
                while not self._live and not self._why_closed:
                    self._work.wait()
                if self._why_closed:
                    return
                running = self._live[: self.slots]
            self._seat(running)
            try:
                self._turn(decoder, running)
            except Exception as error:  # in what they share: it ends them, not the engine
                for request in running:
                    self._end(request, "error", error)

    def _seat(self, running: list[Request[Any]]) -> None:
        """Return those that are new a slot which no other has."""
        taken = {request._text.slot for request in running}
        free = (slot for slot in range(self.slots) if slot not in taken)
        for request in running:
            if request._text.slot < 0:
                request._text.slot = next(free)

    def _turn(self, decoder: Decoder, running: list[Request[Any]]) -> None:
        """Let each text have a token, and the first that has more to read read a chunk of it."""
        for request in running:
            if len(request._unread):
                self._read(decoder, request)
                break
        ready = []
        for request in running:
            if len(request._unread) or request.done:
                continue
            request._unread = request._text.make_room(decoder.capacity)
            if request._text.ended is not None:
                self._end(request, request._text.ended)
            elif not len(request._unread):
                ready.append(request)
        if ready:
            rows = read_newest(decoder, [request._text for request in ready])
            for request, logits in zip(ready, rows, strict=True):
                self._choose(request, logits)

    def _read(self, decoder: Decoder, request: Request[Any]) -> None:
        """Read a chunk, as long as `Decoder.read` has them; after the last comes a token."""
        text = request._text
        with self._alone(request):
            chunk = request._unread[text.position : text.position + CHUNK]
            logits = decoder.read(chunk, text.slot, text.position)
            text.position += len(chunk)
            if text.position == len(request._unread):
                request._unread = request._unread[:0]
                self._choose(request, logits)

    def _choose(self, request: Request[Any], logits: NDArray[Any]) -> None:
        """Let a text choose its next token, and hand it out."""
        text = request._text
        with self._alone(request):
            token = text.choose(logits)
            with self._lock:
                if request.ended is None:
                    request._tokens.append((token, text.logprob))
            request._tell()
            if text.ended is not None:
                self._end(request, text.ended)

    @contextmanager
    def _alone(self, request: Request[Any]) -> Iterator[None]:
        """Let an error end one request only."""
        try:
            yield
        except Exception as error:
            self._end(request, "error", error)
