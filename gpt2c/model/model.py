"""A model that learns: forward, loss, backward, gradients, on any backend.

The model owns its memory, three flat buffers with named views: parameters (weights.py), gradients,
activations. It hands them to its blocks (stack.py), which call the ops. Knows nothing about text,
training or the instruction set.

Two things are done for speed. `loss` computes the gradient of the lm_head together with the loss, a
block of logits at a time, because the logits of a whole batch are never in memory. And zero_grad
only marks the gradients as void: the next backward writes where it would add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.checks import counted, number
from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, named_views, require
from gpt2c.model.block import (
    NO_DROPOUT,
    Batch,
    Dropout,
    IntArray,
    Pass,
    check_dropout,
)
from gpt2c.model.config import ModelConfig
from gpt2c.model.inputs import (
    Tokens,
    check_batch,
    check_labels,
    check_like,
    check_targets,
    check_tokens,
)
from gpt2c.model.objective import CrossEntropy, Objective
from gpt2c.model.plan import Activations, has_halves
from gpt2c.model.trace import Trace
from gpt2c.model.weights import ModelWeights

__all__ = ["Model"]

LARGEST_FLOAT = float(np.finfo(np.float32).max)


class _Gradients:
    """The gradients' memory: flat, as views whose shapes C trusts, and as views for others."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.flat = aligned_zeros(aligned_offsets(shapes)[""])
        self.own = named_views(self.flat, shapes)
        self.public = MappingProxyType(named_views(self.flat, shapes))


class _Pending(NamedTuple):
    """A loss that backward has not seen; after `losses` and `scores` the head has no gradients yet.

    shapes : of the result of `losses` or `scores`
    targets : of `losses`, (N,)
    rows : the tokens that `scores` has read
    """

    ctx: Pass
    tokens: IntArray
    shapes: Sequence[tuple[int, ...]] = ()
    targets: IntArray | None = None
    rows: NDArray[np.intp] | None = None

    def check_weights(self, weights: ArrayLike | Sequence[ArrayLike] | None) -> Array | None:
        """Return weights as (N,) float32."""
        if weights is None:
            return None
        if self.targets is None:
            raise ValueError("weights are for losses(idx, targets); the last call was another")
        return check_like("weights", weights, self.shapes, "losses")

    def check_d_scores(
        self, d_scores: ArrayLike | Sequence[ArrayLike] | None, scale: float
    ) -> Array | None:
        """Return the gradient of scores as (n, K) float32."""
        if (d_scores is None) != (self.rows is None):
            raise ValueError(
                "backward needs d_scores, the gradient of the scores, after scores(idx)"
                if d_scores is None
                else "d_scores is for scores(idx): the last loss has a gradient of its own"
            )
        if d_scores is None:
            return None
        given = check_like("d_scores", d_scores, self.shapes, "scores").reshape(
            -1, self.shapes[0][-1]
        )
        if not float(np.abs(given).max()) * abs(scale) <= LARGEST_FLOAT:
            raise ValueError("scale times d_scores must be finite as float32")
        return given


class Model(ModelWeights):
    """What `gpt2c.GPT2` computes, without files and texts: see there for arguments and errors.

    Weights of 16 or 8 bits are only read. Without adapters nothing is trained then, and no loss
    waits for backward.

    It owns its memory and has one owner at a time, the thread that computes (`gpt2c.model.owner`).
    """

    _memory: Activations
    _pending: _Pending | None
    _made_grads: _Gradients | None
    _void: bool
    _spare_memory: Array
    _d_head: Array | None

    def _laid_out(
        self,
        config: ModelConfig,
        frozen: frozenset[str],
        values: Mapping[str, NDArray[Any]] | None,
    ) -> dict[str, Any]:
        """See `ModelWeights._laid_out`; no loss and no gradient of the old place counts."""
        halves = self.precision == "bf16" and has_halves(config, self.weights)
        laid_out = super()._laid_out(config, frozen, values)
        # Not a method of the model: in a cycle its memory would stay until the garbage collector.
        slots = laid_out["_stack"].slots_with_head
        return {
            **laid_out,
            "_memory": Activations(slots, self._recompute, halves),
            "_pending": None,  # of a loss that backward has not seen
            "_made_grads": None,
            "_void": True,  # the gradients count as 0, whatever their memory holds
            "_spare_memory": aligned_zeros(0),
            "_d_head": None,  # of the last loss: in spare memory, or in that of void gradients
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or pickle."""
        gradients = None if self._void else self._grads.flat
        return {**super().__getstate__(), "gradients": gradients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up the model from a state, in memory of its own."""
        super().__setstate__(state)
        if state["gradients"] is not None:
            self._grads.flat[...] = state["gradients"]
            self._void = False

    # ---- forward ---------------------------------------------------------------------------------

    def _read_all(self, tokens: IntArray, logits: Array, states: Array | None) -> None:
        """See `LanguageModel._read_all`; all rows pass the layers together.

        Not the logits of smaller weights, which are for inference: rows that follow each other take
        the memory of one, and several threads can read at once.
        """
        if self.weights != "fp32" and self.config.num_labels is None:
            super()._read_all(tokens, logits, states)
            return
        with self._owner.alone():
            batch = Tokens(tokens)
            ctx = self._start(batch, keep=False)
            out = self._stack.forward(ctx, tokens, states)
            if self.config.num_labels is not None:
                out = out[batch.last]
            self._stack.head.forward(ctx, logits.reshape(len(out), -1), out)

    def trace(self, idx: ArrayLike) -> Trace:
        """Return the channels that a forward pass writes, by name: for a look inside the model.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range
        RuntimeError : another thread computes with this model
        MemoryError : the activations do not fit

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257)
        >>> trace = gpt2c.GPT2(config, seed=1).trace([[1, 2, 3]])
        >>> trace["h.1.mlp.act"].shape, trace.attention(0).shape, trace.lens("h.0.out").shape
        ((1, 3, 128), (1, 2, 3, 3), (1, 3, 257))
        """
        tokens = check_tokens(self.config, idx)
        batch = Batch(*tokens.shape)
        with self._owner.alone():
            a = Activations(self._stack.slots, None).lay_out(batch, keep=True)
            ctx = Pass(self.backend, self._parameters, a, batch, precision=self.precision)
            self._stack.forward(ctx, tokens)
        return Trace(self._stack, ctx)

    def loss(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        targets: ArrayLike | Sequence[Sequence[int]] | Objective,
        keep: bool = True,
        count: float | None = None,
        dropout: Dropout | None = None,
    ) -> float:
        """Return the mean cross-entropy in nats per target; keep what `backward` needs.

        Parameters
        ----------
        idx : (B, T) token ids in [0, V), T <= n_positions; or a list of B sequences of different
            lengths, each of which is computed as if it were alone
        targets : as idx, the token that follows each: already shifted; -1 is ignored. Of a model
            with num_labels (B,), the label of each sequence. Or another objective of the logits,
            see `gpt2c.model.objective`: it has a loss for each of the N tokens, and the mean is
            that of the live ones
        keep : False if no backward will follow, which takes one layer's memory instead of all, as
            with weights that are not fp32
        count : divide the sum of the losses by this number instead of the number of targets that
            are not ignored. The batches of one step that give the number of all their targets add
            up to the mean of all, however they are divided
        dropout : for training, with another seed in each step; None is without

        Raises
        ------
        ValueError : another shape, not whole numbers, an id out of range, every target ignored and
            no count, a count that is not positive, dropout out of its range
        RuntimeError : another thread computes with this model
        MemoryError, OSError : the activations do not fit, or the threads cannot start

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> loss = model.loss([[1, 2, 3]], [[2, 3, 4]])
        >>> round(loss, 1)  # nothing is learned: near log(257), where all tokens are equally likely
        5.6
        """
        tokens = check_batch(self.config, idx)
        objective = self._objective(targets, tokens)
        if count is None:
            count = int(np.count_nonzero(objective.live))
            if not count:
                raise ValueError("targets are all -1 (ignored): they have no mean")
        elif not 1 / LARGEST_FLOAT <= number("count", count) <= LARGEST_FLOAT:
            raise ValueError(f"count must be positive and finite as a float32, got {count}")
        head, keep = self._stack.head, keep and bool(self.trained)
        dropout = check_dropout(dropout, tokens.ids.size)
        with self._owner.alone():
            ctx = self._start(tokens, keep, dropout)
            x = self._stack.forward(ctx, tokens.ids)
            if keep:
                self._d_head = self._head_memory()
                ctx.accumulate = False
                losses = head.learn(ctx, self._d_head, x, objective, 1 / count)
            else:
                losses = head.losses(ctx, x, objective)
            self._owner.note_loss()
            self._pending = _Pending(ctx, tokens.ids) if keep else None
            return float(losses.sum(dtype=np.float64) / count)

    def losses(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        targets: ArrayLike | Sequence[Sequence[int]],
        dropout: Dropout | None = None,
        keep: bool = True,
    ) -> Array | list[Array]:
        """Return the loss of each token, -log p in nats, and keep what `backward` needs.

        For objectives whose weights depend on the log-probabilities: `backward(weights=...)` then
        computes the logits a second time, so that those of a whole batch are never in memory.

        Parameters
        ----------
        idx, targets, dropout, keep : see `loss`

        Returns
        -------
        (B, T) float32, or a list of B arrays of the sequences' lengths; 0 where it is ignored

        Raises
        ------
        ValueError, RuntimeError, MemoryError, OSError : see `loss`, but every target may be ignored

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> losses = model.losses([[1, 2, 3]], [[2, 3, -1]])
        >>> losses.shape, float(losses[0, 2])
        ((1, 3), 0.0)
        >>> model.backward(weights=[[1, 0, 0]])  # learn from the first target alone
        """
        self.config.require_language_head("losses of tokens")
        tokens = check_batch(self.config, idx)
        wanted = check_targets(self.config, targets, tokens)
        keep, dropout = keep and bool(self.trained), check_dropout(dropout, tokens.ids.size)
        with self._owner.alone():
            ctx = self._start(tokens, keep, dropout)
            x = self._stack.forward(ctx, tokens.ids)
            losses = self._stack.head.losses(ctx, x, CrossEntropy(wanted)).copy()
            self._owner.note_loss()
            self._pending = _Pending(ctx, tokens.ids, tokens.shapes, wanted) if keep else None
        if tokens.offsets is None:
            return losses.reshape(tokens.ids.shape)
        return np.split(losses, tokens.offsets[1:-1])

    def hidden(self, idx: ArrayLike | Sequence[Sequence[int]]) -> Array:
        """Return the last norm's output (N, C) for each of N tokens, sequence after sequence.

        It is all of a forward pass but the head: `logits` turns rows of it into logits, a block at
        a time, because those of a whole batch may not fit.

        Parameters
        ----------
        idx : see `loss`

        Raises
        ------
        ValueError, RuntimeError, MemoryError, OSError : see `loss`

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257)
        >>> model = gpt2c.GPT2(config)
        >>> hidden = model.hidden([[1, 2, 3], [1, 4]])
        >>> hidden.shape, model.logits(hidden[2:]).shape
        ((5, 32), (3, 257))
        """
        tokens = check_batch(self.config, idx)
        size = {"states": 4 * tokens.ids.size * self.config.n_embd}
        require("the last states", size, "take fewer or shorter rows")
        with self._owner.alone():
            ctx = self._start(tokens, keep=False)
            return self._stack.forward(ctx, tokens.ids).copy()

    def logits(self, hidden: Array) -> Array:
        """Return the logits (n, V) of rows (n, C) of `hidden`, of a model with num_labels scores.

        Raises
        ------
        ValueError : another shape or dtype
        MemoryError : the logits do not fit

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> hidden = model.hidden([[1, 2, 3]])
        >>> bool(np.allclose(model.logits(hidden), model([[1, 2, 3]])[0], atol=1e-5))
        True
        """
        C, head = self.config.n_embd, self._stack.head
        is_array = isinstance(hidden, np.ndarray) and hidden.dtype == np.float32
        if not is_array or hidden.shape != (len(hidden), C) or not len(hidden):
            raise ValueError(f"hidden must be float32 (n, {C}), got {hidden!r:.50}")
        require("the logits", {"logits": 4 * len(hidden) * head.V}, "take fewer rows")
        out = np.empty((len(hidden), head.V), np.float32)
        batch = Batch(1, len(hidden))
        ctx = Pass(self.backend, self._parameters, {}, batch, precision=self.precision)
        head.forward(ctx, out, np.ascontiguousarray(hidden))
        return out

    @overload
    def scores(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        *,
        keep: bool = True,
        dropout: Dropout | None = None,
    ) -> Array: ...

    @overload
    def scores(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        per_token: bool,
        keep: bool = True,
        dropout: Dropout | None = None,
    ) -> Array | list[Array]: ...

    def scores(
        self,
        idx: ArrayLike | Sequence[Sequence[int]],
        per_token: bool = False,
        keep: bool = True,
        dropout: Dropout | None = None,
    ) -> Array | list[Array]:
        """Return the scores of each sequence, and keep what `backward` needs.

        For a model with num_labels, K: a classifier, a reward model (K = 1), or a value of each
        token (K = 1, per_token). The caller computes a loss of the scores, and
        `backward(d_scores=...)` takes its gradient.

        Parameters
        ----------
        idx : see `loss`
        per_token : True returns the scores at every token, not only at the last
        keep : False if no backward will follow, see `loss`
        dropout : see `loss`

        Returns
        -------
        (B, K) float32, those of the last token of each sequence; with per_token (B, T, K), or a
        list of B arrays (T, K) if the sequences have different lengths

        Raises
        ------
        ValueError : see `loss`; the model has no scores
        RuntimeError, MemoryError, OSError : see `loss`

        Examples
        --------
        >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257, num_labels=1)
        >>> model = gpt2c.GPT2(config)
        >>> chosen, rejected = model.scores([[1, 2, 3], [1, 4]])  # a reward for each text
        >>> slope = -1 / (1 + np.exp(chosen - rejected))  # of -log sigmoid(chosen - rejected)
        >>> model.backward(d_scores=[slope, -slope])
        """
        K = self._stack.head.V
        if self.config.num_labels is None:
            raise ValueError(
                "this model has logits of tokens, not scores of texts: scores need a config with"
                " num_labels"
            )
        tokens = check_batch(self.config, idx)
        last = tokens.last
        rows = np.arange(tokens.ids.size) if per_token else last
        each = tokens.shapes if per_token else [last.shape]
        shapes = [(*shape, K) for shape in each]
        what, mend = f"scores of {counted(len(rows), 'token')}", "take fewer or shorter rows"
        require(what, {"scores": 4 * len(rows) * K}, mend)
        keep, dropout = keep and bool(self.trained), check_dropout(dropout, tokens.ids.size)
        with self._owner.alone():
            ctx = self._start(tokens, keep, dropout)
            x = self._stack.forward(ctx, tokens.ids)
            scores = np.empty((len(rows), K), x.dtype)
            self._stack.head.forward(ctx, scores, x[rows])
            self._owner.note_loss()
            self._pending = _Pending(ctx, tokens.ids, shapes, rows=rows) if keep else None
        if len(shapes) == 1:
            return scores.reshape(shapes[0])
        return np.split(scores, last[:-1] + 1)

    def _objective(
        self, targets: ArrayLike | Sequence[Sequence[int]] | Objective, tokens: Tokens
    ) -> Objective:
        """Return the objective that targets, or labels, stand for."""
        # to ask for a Protocol takes 40 microseconds, so arrays and lists come first
        if isinstance(targets, np.ndarray | list | tuple) or not isinstance(targets, Objective):
            if self.config.num_labels is None:
                return CrossEntropy(check_targets(self.config, targets, tokens))
            return CrossEntropy(check_labels(self.config.num_labels, targets, tokens))
        live = targets.live
        if getattr(live, "dtype", None) != np.bool_ or live.shape != (tokens.ids.size,):
            raise ValueError(
                f"an objective's live must be bool ({tokens.ids.size},), one for each token of idx,"
                f" got {live!r:.50}"
            )
        return targets

    def _start(self, tokens: Tokens, keep: bool, dropout: Dropout = NO_DROPOUT) -> Pass:
        """Lay out the activations of a batch; with `keep`, those of backward stay."""
        self._pending = None  # its views go first, so that memory which must grow is let go
        batch = Batch(*tokens.ids.shape)
        a = self._memory.lay_out(batch, keep)
        ctx = Pass(
            *(self.backend, self._placed.own, a, batch, tokens.offsets),
            dropout=dropout,
            precision=self.precision,
        )
        ctx.arrive = self._arrive
        return ctx

    def _head_memory(self) -> Array | None:
        """Return memory for the head's gradient: its own where that is void; None if frozen."""
        own = self._grads.own.get(self._stack.head.weight)
        return own if self._void or own is None else self._spare(own)

    def _spare(self, own: Array) -> Array:
        """Return memory for the head's gradient beside its own, which must not be touched."""
        if self._spare_memory.size != own.size:
            self._spare_memory = aligned_zeros(own.size)
        return self._spare_memory.reshape(own.shape)

    # ---- backward --------------------------------------------------------------------------------

    @property
    def _grads(self) -> _Gradients:
        if self._made_grads is None:
            self._check_can_train()
            what = f"training a model of {self.config.num_parameters():,} parameters"
            sizes = {"gradients": 4 * self.trained_size}
            require(what, sizes, "take a smaller one, or freeze some of it")
            shapes = {name: self._placed.own[name].shape for name in self.trained}
            self._made_grads = _Gradients(shapes)
        return self._made_grads

    @property
    def gradients(self) -> Mapping[str, Array]:
        """Name -> float32 view into `flat_gradients`."""
        self._settle()
        return self._grads.public

    @property
    def flat_gradients(self) -> Array:
        """All gradients, laid out as `flat_parameters` up to `trained_size`."""
        self._settle()
        return self._grads.flat[:]

    @property
    def trained_slices(self) -> dict[str, slice]:
        """Name -> its place in `flat_gradients`, up to where the next begins."""
        starts = aligned_offsets({name: self._placed.own[name].shape for name in self.trained})
        names, places = [*starts], [*starts.values()]
        return {name: slice(*ends) for name, *ends in zip(names, places, places[1:], strict=False)}

    @property
    def final_order(self) -> Sequence[tuple[str, ...]]:
        """The parameters whose gradients `backward` finishes together, in its order."""
        return self._stack.final_order

    def zero_grad(self) -> None:
        """Mark all gradients as zero.

        `gradients` shows zeros; the next backward overwrites the memory instead of adding to it.
        Views taken earlier may hold old numbers until then.

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> loss = model.loss([[1, 2, 3]], [[2, 3, 4]])
        >>> model.backward()
        >>> model.zero_grad()
        >>> bool(model.gradients["wte.weight"].any())
        False
        """
        self._void = True

    def _settle(self) -> None:
        """Write zeros to the memory of void gradients."""
        if self._void:
            own = self._grads.own.get(self._stack.head.weight)
            if self._pending is not None and own is not None and self._d_head is own:
                self._d_head = self._spare(own)
                np.copyto(self._d_head, own)
            self._grads.flat.fill(0.0)
            self._void = False

    def backward(
        self,
        scale: float = 1.0,
        weights: ArrayLike | Sequence[ArrayLike] | None = None,
        d_scores: ArrayLike | Sequence[ArrayLike] | None = None,
        final: Callable[[Iterable[str]], None] | None = None,
    ) -> None:
        """Add the gradient of `scale` times the last loss to `gradients`.

        To average over n batches before a step of the optimizer, give each scale=1/n.

        Parameters
        ----------
        scale : a factor of the gradient
        weights : after `losses`: numbers of its result's shape; the gradient is that of
            scale * sum(weights * losses). None: all 1
        d_scores : after `scores`: numbers of its result's shape, the gradient of the caller's loss;
            the gradient is that of scale * sum(d_scores * scores)
        final : is called on the way with the names of parameters whose gradients this call will not
            touch again, the last layer's first, so that others can have them before backward ends

        Raises
        ------
        ValueError : no loss was computed since the last backward, the scale, a weight or a d_score
            is not finite, weights without `losses`, d_scores without `scores`, or the model's own
            weights are not fp32
        RuntimeError : another thread computes with this model, or has computed the last loss
        MemoryError, OSError : a kernel cannot start

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> loss = model.loss([[1, 2, 3]], [[2, 3, 4]])
        >>> model.backward()
        >>> used = model.gradients["wpe.weight"].any(axis=1)
        >>> np.flatnonzero(used).tolist()  # only the vectors of three positions were used
        [0, 1, 2]
        """
        self._check_can_train()
        if not abs(number("scale", scale)) <= LARGEST_FLOAT:
            raise ValueError(f"scale must be finite as a float32, got {scale}")
        with self._owner.alone():
            if self._pending is None:
                raise ValueError(
                    "backward needs a loss: call loss(idx, targets) before each backward(), and"
                    " after freeze()"
                )
            self._owner.check_loss()
            pending = self._pending
            head = self._stack.head
            factors = pending.check_weights(weights)
            d_logits = pending.check_d_scores(d_scores, scale)
            ctx, self._pending = pending.ctx, None
            ctx.p = self._parameters  # whole, if a step has updated them since the loss
            ctx.g, ctx.accumulate, ctx.final = self._grads.own, not self._void, final
            self._void = False
            d_out = ctx.a["ln_f"]  # the head turns its input into its gradient
            d_weight = ctx.g.get(head.weight)
            if pending.targets is not None:
                head.learn(ctx, d_weight, d_out, CrossEntropy(pending.targets, factors), scale)
            elif d_logits is not None and pending.rows is not None:
                head.backward(ctx, d_weight, d_out, np.float32(scale) * d_logits, pending.rows)
            else:
                self._add_head(ctx, scale)
            if not ctx.accumulate:  # ops add to those of norms
                self._grads.flat[self.decay_size :].fill(0.0)
            self._stack.backward(ctx, d_out, pending.tokens, self._memory.kept)

    def _add_head(self, ctx: Pass, scale: float) -> None:
        """Bring in the gradients that `loss` has computed, of the head and its input."""
        d_head, d_out = self._d_head, ctx.a["ln_f"]
        if scale != 1.0:
            np.multiply(d_out, np.float32(scale), out=d_out)
        if d_head is None:
            return
        own = ctx.g[self._stack.head.weight]
        if scale != 1.0:
            np.multiply(d_head, np.float32(scale), out=d_head)
        if ctx.accumulate:
            self.backend.residual_forward(own, own, d_head)
        elif d_head is not own:
            np.copyto(own, d_head)
