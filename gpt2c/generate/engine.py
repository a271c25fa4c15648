"""Engine: many requests share one model; each may start and end at any time.

    with gpt2c.Engine(model, slots=8) as engine:
        request = engine.submit(ids, max_new_tokens=50, seed=1)  # from any thread
        for token in request:
            ...

Reading one token of eight texts takes little longer than of one text: most of the time is spent on
reading the weights from memory. So one thread reads the newest tokens of all texts in one turn, and
between two turns requests join and leave (continuous batching, Yu et al., Orca, OSDI 2022). A
request gets the same tokens as from `model.generate`. Knows nothing about strings and sockets.
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
from gpt2c.generate.sampling import GenerationConfig, RequestSettings, shows
from gpt2c.kernels.checks import check_kind, counted, number, whole
from gpt2c.model.inputs import check_ids, check_prompts
from gpt2c.model.language_model import LanguageModel
from gpt2c.model.reader import CHUNK, CacheType, Decoder
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineFull", "Request"]

Ending = Literal["end", "length", "cancelled", "error"]
NewToken = TypeVar("NewToken", int, tuple[int, float])


class EngineFull(RuntimeError):
    """All slots and the whole queue are taken; a later call may succeed.

    Examples
    --------
    >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
    >>> with gpt2c.Engine(model, slots=1, queue=0) as engine:
    ...     request = engine.submit([1], max_new_tokens=10**6)
    ...     engine.submit([2])
    Traceback (most recent call last):
    gpt2c.generate.engine.EngineFull: the engine is full: it has room for 1 request at a time ...
    """


class Request(Generic[NewToken]):
    """A prompt that an engine continues; `Engine.submit` returns it.

    Iterate over it for the new tokens, from the first, as soon as they are chosen: ints, or with
    logprobs=True pairs of a token and its log-probability. The request keeps its tokens, so a slow
    reader does not delay the engine. Several threads may read, wait and cancel at once.

    Attributes
    ----------
    ended : why it ended: "end" (a token that ends a text), "length" (it has max_new_tokens, or the
        context is full), "cancelled" or "error"; None before its end

    Examples
    --------
    >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
    >>> with gpt2c.Engine(model) as engine:
    ...     request = engine.submit([1, 2, 3], max_new_tokens=4, seed=1)
    ...     tokens = [*request]
    >>> len(tokens), request.ended
    (4, 'length')
    """

    def __init__(self, engine: Engine, text: Text, logprobs: bool) -> None:
        self.ended: Ending | None = None
        self._engine = engine
        self._text = text
        self._unread = np.array(text.tokens, np.int32)  # it must read these to join the others
        self._logprobs = logprobs
        self._tokens: list[tuple[int, float]] = []  # each with its log-probability
        self._error: Exception | None = None
        # Readers share no lock with the engine: Ctrl-C in a reader cannot leave the engine locked.
        self._readers: list[SimpleQueue[None]] = []

    def __repr__(self) -> str:
        return f"Request({counted(len(self._tokens), 'new token')}, {self.ended or 'continues'})"

    @property
    def done(self) -> bool:
        """Return whether the request has ended."""
        return self.ended is not None

    def __iter__(self) -> Iterator[NewToken]:
        """Yield the new tokens, from the first; then raise the error that ended it, if any."""
        count = 0
        with self._news() as news:
            while True:
                done = self.done  # read before the tokens: no token comes after the end
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
        """Wait until the request has ended, at most `timeout` seconds.

        Returns
        -------
        all new tokens, (n,) int64; with logprobs=True a pair of them and their log-probabilities,
        (n,) float64 in nats. A cancelled request has the tokens chosen before

        Raises
        ------
        TimeoutError : the request has not ended after `timeout` seconds
        ValueError : its logits hold nan or infinity, or every token is forbidden; timeout is not a
            number
        RuntimeError : the engine was closed before the end of the request

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> with gpt2c.Engine(model) as engine:
        ...     result = engine.submit([1, 2, 3], max_new_tokens=4, seed=1).result(timeout=60)
        >>> result.shape
        (4,)
        """
        until = None if timeout is None else time.monotonic() + number("timeout", timeout)
        with self._news() as news:
            while not self.done:
                try:
                    news.get(timeout=None if until is None else max(0, until - time.monotonic()))
                except Empty:
                    raise TimeoutError(f"the request is not done after {timeout:g} s") from None
        if self._error is not None:
            raise self._error
        tokens = np.array([token for token, _ in self._tokens], np.int64)
        if not self._logprobs:
            return tokens
        return tokens, np.array([logprob for _, logprob in self._tokens], np.float64)

    def cancel(self) -> None:
        """End the request with the tokens it has; another can have its slot in the next step.

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> with gpt2c.Engine(model) as engine:
        ...     request = engine.submit([1, 2, 3], max_new_tokens=10**6)
        ...     request.cancel()
        >>> request.ended
        'cancelled'
        """
        self._engine._end(self, "cancelled")

    @contextmanager
    def _news(self) -> Iterator[SimpleQueue[None]]:
        """Return a queue that gets an item after each change of the request."""
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
    """Continues prompts on one model; any thread may submit prompts at any time.

    `slots` requests run at a time, and `queue` more wait in the order of submission; another one is
    refused at once with `EngineFull`. An error in one request ends that request. An error in the
    step that they share ends all running requests, and the engine continues with the waiting ones.
    Close the engine when it is no longer needed, best by `with`; the end of the program closes it
    too. In the child of a fork it is closed.

    Parameters
    ----------
    model : a `GPT2` or `Llama`; its weights must not change while the engine is open
    slots : the number of requests that run at a time
    queue : the number of requests that may wait
    capacity : the most tokens of a request, prompt and new; None is n_positions, and then a text
        may become longer, see on_full of `gpt2c.GenerationConfig`
    tokenizer : of the model; ids that it lacks, such as a model's padding, are then never chosen
    cache : the type of the texts' keys and values, see `gpt2c.GenerationConfig`

    Raises
    ------
    ValueError : slots, queue or capacity is not a whole number or is out of range, or the tokenizer
        has tokens that the model lacks, or an unknown cache
    MemoryError : the keys and values of `slots` texts do not fit

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
        cache: CacheType = "fp32",
    ) -> None:
        check_kind("model", model, LanguageModel, "a GPT2 or Llama")
        most = model.config.n_positions
        slots, queue = whole("slots", slots), whole("queue", queue)
        capacity = most if capacity is None else whole("capacity", capacity)
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if queue < 0:
            raise ValueError(f"queue must be at least 0, got {queue}")
        if not 1 <= capacity <= most:
            name = model.config.context_name
            raise ValueError(f"capacity must be in [1, {most}], {name}, got {capacity}")
        self.slots, self.queue, self.capacity = slots, queue, capacity
        self._model = model
        self._unused: list[int] = []
        if tokenizer is not None:
            check_kind("tokenizer", tokenizer, Tokenizer, "a Tokenizer")
            self._unused = tokenizer.unused_ids(model.config.vocab_size)
        self._why_closed = ""  # empty while the engine is open
        # Requests in the order of submission; the first `slots` of them run. State that threads
        # share, here and in requests, changes only under the lock; no thread holds it for long.
        self._live: list[Request[Any]] = []
        self._make_locks()
        decoder = model.decoder(slots, self.capacity, cache)
        # A daemon: the end of the program would wait for another thread before it calls `close`.
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
        **settings: Unpack[RequestSettings],
    ) -> Request[int]: ...

    @overload
    def submit(
        self,
        idx: Sequence[int],
        max_new_tokens: int | None = 64,
        *,
        logprobs: Literal[True],
        **settings: Unpack[RequestSettings],
    ) -> Request[tuple[int, float]]: ...

    @shows(RequestSettings)
    def submit(
        self,
        idx: Sequence[int],
        max_new_tokens: int | None = 64,
        *,
        logprobs: bool = False,
        **settings: Unpack[RequestSettings],
    ) -> Request[int] | Request[tuple[int, float]]:
        """Submit one prompt to be continued; return its request at once.

        Parameters
        ----------
        idx : (T,) token ids; an empty prompt starts from eos_token_id of the config
        max_new_tokens : the most tokens to add
        logprobs : the request also has the log-probability of each token
        settings : others of transformers, which gpt2c lacks, at values that leave them off;
            num_return_sequences and cache are not a request's

        Raises
        ------
        ValueError : an argument is out of range, or the text does not fit the capacity
        TypeError : an unknown setting
        EngineFull : all slots and the queue are taken
        RuntimeError : the engine is closed

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> with gpt2c.Engine(model) as engine:
        ...     request = engine.submit([1, 2, 3], max_new_tokens=4, temperature=0)
        ...     tokens = [*request]  # each as soon as it is chosen
        >>> tokens == model.generate([[1, 2, 3]], max_new_tokens=4, temperature=0)[0, 3:].tolist()
        True
        """
        config = GenerationConfig(max_new_tokens=max_new_tokens, logprobs=logprobs, **settings)
        if config.num_return_sequences != 1:
            raise ValueError(
                "a request is one text: num_return_sequences must be 1, got"
                f" {config.num_return_sequences}; submit the prompt several times"
            )
        if settings.get("cache") is not None:
            raise ValueError("cache is the engine's: give it to Engine, not to a request")
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
        """Refuse to be copied or pickled: a copy would have no thread."""
        raise TypeError("an Engine cannot be copied or pickled: make another one with its model")

    def close(self) -> None:
        """Close the engine and end its requests with an error; a second call changes nothing.

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> engine = gpt2c.Engine(model)
        >>> engine.close()
        >>> engine.submit([1, 2, 3])
        Traceback (most recent call last):
        RuntimeError: the engine is closed
        """
        self._close("the engine is closed", "the engine was closed before the request was done")
        self._thread.join()
        atexit.unregister(self.close)

    def _close(self, closed: str, ended: str) -> None:
        """Set the error of later requests, `closed`, and end the present ones with `ended`."""
        with self._lock:
            self._why_closed = self._why_closed or closed
            live = list(self._live)
            self._work.notify()
        for request in live:
            self._end(request, "error", RuntimeError(ended))

    def after_fork(self) -> None:
        """Close the engine in the child of a fork, which lacks its thread."""
        self._make_locks()  # the thread may have held the lock at the fork
        why = "the engine runs in the parent process only: start another one in the child"
        self._close(why, why)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self, idx: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return one prompt as token ids; refuse one that does not fit with its new tokens."""
        empty = isinstance(idx, list | tuple) and not idx
        vocab_size = self._model.config.vocab_size
        ids = check_ids(np.empty(0, np.int32) if empty else idx, "idx", 0, vocab_size)
        if ids.ndim != 1:
            raise ValueError(f"idx must be one prompt, (T,) token ids, got shape {ids.shape}")
        prompt = check_prompts(self._model.config, ids[None])[0]
        if self.capacity < min(len(prompt) + max_new_tokens, self._model.config.n_positions):
            raise ValueError(
                f"idx: {counted(len(prompt), 'token')} and {max_new_tokens} new are more than the"
                f" engine's capacity, {self.capacity}"
            )
        return prompt

    def _end(self, request: Request[Any], why: Ending, error: Exception | None = None) -> None:
        """End a request that has not ended yet, and free its slot."""
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
            except Exception as error:  # in the shared step: it ends these requests only
                for request in running:
                    self._end(request, "error", error)

    def _seat(self, running: list[Request[Any]]) -> None:
        """Assign a free slot to each new request."""
        taken = {request._text.slot for request in running}
        free = (slot for slot in range(self.slots) if slot not in taken)
        for request in running:
            if request._text.slot < 0:
                request._text.slot = next(free)

    def _turn(self, decoder: Decoder, running: list[Request[Any]]) -> None:
        """Read a chunk of the first text that has unread tokens; choose a token for the others."""
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
        """Read at most CHUNK tokens, as `Decoder.read` does; choose a token after the last."""
        text = request._text
        with self._alone(request):
            chunk = request._unread[text.position : text.position + CHUNK]
            logits = decoder.read(chunk, text.slot, text.position)
            text.position += len(chunk)
            if text.position == len(request._unread):
                request._unread = request._unread[:0]
                self._choose(request, logits)

    def _choose(self, request: Request[Any], logits: NDArray[Any]) -> None:
        """Choose the next token of a text and hand it to the readers."""
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
        """End this request alone if an error occurs."""
        try:
            yield
        except Exception as error:
            self._end(request, "error", error)
