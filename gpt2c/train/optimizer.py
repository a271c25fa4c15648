"""AdamW over a model's flat parameters, and learning-rate schedules as pure functions of the step.

Knows nothing about layers, losses, data or files, only two flat arrays, the names of their parts
and the ops on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2c.kernels.checks import number, whole, whole_or_float
from gpt2c.kernels.memory import aligned_offsets, aligned_zeros, require
from gpt2c.model.parameters import names_that_fit

__all__ = ["SCHEDULES", "AdamW", "NonFiniteGradient", "ParameterGroup", "Schedule", "ScheduleKind"]


class OptimizerOps(Protocol):
    """The two backend ops that an optimizer needs."""

    def adamw_update(
        self,
        param: NDArray[np.float32],
        m: NDArray[np.float32],
        v: NDArray[np.float32],
        grad: NDArray[np.float32],
        learning_rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        t: int,
        grad_scale: float,
    ) -> None:
        """Update param, m, v in place."""

    def global_norm(self, grad: NDArray[np.float32]) -> float:
        """Return the Euclidean norm."""


class FlatModel(Protocol):
    """The part of a model that an optimizer uses.

    The first `trained_size` floats of its parameters are trained and have gradients; the first
    `decay_size` of those decay. `trained` names them in the order of memory.
    """

    @property
    def backend(self) -> OptimizerOps: ...
    @property
    def flat_parameters(self) -> NDArray[np.float32]: ...
    @property
    def flat_gradients(self) -> NDArray[np.float32]: ...
    @property
    def parameters(self) -> Mapping[str, NDArray[np.float32]]: ...
    @property
    def decay_size(self) -> int: ...
    @property
    def trained_size(self) -> int: ...
    @property
    def trained(self) -> tuple[str, ...]: ...


class NonFiniteGradient(ValueError):
    """The gradients' `norm` is nan or infinite: `AdamW.step` has changed nothing."""

    def __init__(self, norm: float, step: int) -> None:
        super().__init__(
            f"the gradient norm is {norm} at step {step}, so the weights were not"
            " changed; lower the learning rate"
        )
        self.norm = norm


class ParameterGroup(TypedDict):
    """Parameters with settings of their own; what a group leaves out is as for all others.

    Parameters
    ----------
    params : a pattern of names, or several, as `Model.freeze` has them
    learning_rate : of a `step` that is called without one
    weight_decay : of the parameters in the group that decay
    """

    params: str | Sequence[str]
    learning_rate: NotRequired[float]
    weight_decay: NotRequired[float]


class _Part(NamedTuple):
    """A slice of flat memory, updated in one call.

    factor : of the learning rate
    weight_decay : None for the optimizer's
    """

    start: int
    end: int
    factor: float = 1.0
    weight_decay: float | None = None


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101), PyTorch's form.

    ::

        m = beta1 * m + (1 - beta1) * g             m_hat = m / (1 - beta1**t)
        v = beta2 * v + (1 - beta2) * g * g         v_hat = v / (1 - beta2**t)
        param -= learning_rate * (m_hat / (sqrt(v_hat) + eps) + weight_decay * param)

    Only tensors with two or more dimensions decay: biases and layernorm weights do not.

    Parameters
    ----------
    model : its parameters are updated in place, from its gradients
    learning_rate : of a `step` that is called without one
    betas : decay rates of the first and second moment, each in [0, 1)
    eps : added outside the square root
    weight_decay : each step subtracts learning_rate * weight_decay * param
    groups : parameters with settings of their own, see `ParameterGroup`. A parameter is in the
        first group with a pattern that fits it. `step(learning_rate=...)` is for the parameters in
        no group; the rates of the groups change by the same factor, as with PyTorch's schedules

    Attributes
    ----------
    m, v : flat float32 arrays, the moments, laid out as the model's gradients
    steps : the number of steps taken, t of the last one

    Raises
    ------
    ValueError : a setting is out of range, the model has no gradients, or a group has unknown
        settings, or a pattern that fits no trained parameter
    MemoryError : gradients and moments do not fit

    A checkpoint stores `state()` and `steps`. `copy.deepcopy` and `pickle` copy the model too: copy
    both together, as a pair, and the copied optimizer updates the copied model.

    Examples
    --------
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
    >>> model = gpt2c.GPT2(config, seed=1)
    >>> optimizer = gpt2c.AdamW(model, learning_rate=0.01, weight_decay=0.1)
    >>> before = model.loss([[1, 2, 3]], [[2, 3, 4]])
    >>> model.backward()
    >>> norm = optimizer.step(grad_clip=1.0)  # of all gradients, before it is clipped
    >>> model.loss([[1, 2, 3]], [[2, 3, 4]]) < before
    True
    >>> tables = {"params": "w[tp]e.*", "learning_rate": 0.001, "weight_decay": 0.0}
    >>> optimizer = gpt2c.AdamW(model, learning_rate=0.01, groups=[tables])
    """

    def __init__(
        self,
        model: FlatModel,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        groups: Sequence[ParameterGroup] = (),
    ) -> None:
        if not hasattr(model, "flat_gradients"):
            raise ValueError(
                f"AdamW needs a model with gradients, loaded without quantize, got"
                f" {type(model).__name__}"
            )
        _check_learning_rate(learning_rate)
        betas = _checked_betas(betas)
        if not 0 < number("eps", eps) < math.inf:
            raise ValueError(f"eps must be above 0, got {eps}")
        _check_weight_decay(weight_decay)
        self.model = model
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.groups = groups
        self._parts = _parts(model, groups, learning_rate)
        self._owns = self._owned()
        ends = [*itertools.accumulate((own.stop - own.start for own in self._owns), initial=0)]
        self._held = [slice(start, end) for start, end in itertools.pairwise(ends)]
        size = ends[-1]
        what = f"AdamW for {size:,} numbers"
        require(what, {"moments": self.state_bytes(size)}, "take a smaller model")
        self.m, self.v = aligned_zeros(size), aligned_zeros(size)
        self._trained = model.trained
        self.steps = 0

    def __repr__(self) -> str:
        settings = f"learning_rate={self.learning_rate}, betas={self.betas}, eps={self.eps}"
        settings += f", weight_decay={self.weight_decay}, "
        settings += f"groups={self.groups}, " * bool(self.groups) + f"steps={self.steps}"
        return f"AdamW({self.model!r}, {settings})"

    @staticmethod
    def state_bytes(parameters: int) -> int:
        """Return the size in bytes of the state for this many parameters.

        Examples
        --------
        >>> gpt2c.AdamW.state_bytes(124_000_000)  # two moments, of 4 bytes each
        992000000
        """
        return 2 * 4 * parameters

    def _owned(self) -> list[slice]:
        """Return the slices of flat memory that are updated; their moments lie side by side."""
        return [slice(0, self.model.trained_size)]

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Return all that the next step needs of earlier ones, except `steps`: name -> array.

        The arrays are the optimizer's own, not copies: float32, laid out as the gradients.

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> state = gpt2c.AdamW(model).state()
        >>> [*state], state["m"].size == model.trained_size
        (['m', 'v'], True)
        """
        return {"m": self.m, "v": self.v}

    def load_state(self, state: Mapping[str, ArrayLike], steps: int) -> None:
        """Continue from a state after `steps` steps, as if this optimizer had taken them.

        Parameters
        ----------
        state : the result of `state`, also when it was stored since, of an optimizer for which the
            same parameters were trained, which the arrays do not say; they are copied
        steps : int, the number of steps taken, at least 0

        Raises
        ------
        ValueError : the state is another optimizer's or another model's, or steps is not a whole
            number of at least 0; nothing was loaded

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> optimizer = gpt2c.AdamW(model)
        >>> stored = {name: array.copy() for name, array in optimizer.state().items()}
        >>> later = gpt2c.AdamW(model)
        >>> later.load_state(stored, steps=100)
        >>> later.steps
        100
        """
        own = self.state()
        if state.keys() != own.keys():
            names = ", ".join(sorted(state))
            raise ValueError(f"the state of AdamW must be {', '.join(own)}, got {names}")
        arrays = {name: np.asarray(array) for name, array in state.items()}
        for name, array in arrays.items():
            if array.shape != own[name].shape:
                raise ValueError(f"{name} must have shape {own[name].shape}, got {array.shape}")
        steps = whole("steps", steps)
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        for name, array in arrays.items():
            self._load(name, array)
        self.steps = steps

    def _load(self, name: str, array: NDArray[Any]) -> None:
        """Copy a moment of the whole model."""
        getattr(self, name)[...] = array

    def not_finite(self) -> str:
        """Return "weights" or the name of a moment that is not finite; "" if all are finite.

        A step may overflow even if its gradients were finite. This reads all of that memory once.

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> optimizer = gpt2c.AdamW(model)
        >>> optimizer.not_finite()
        ''
        >>> model.parameters["wte.weight"][0, 0] = np.nan
        >>> optimizer.not_finite()
        'weights'
        """
        state = {"moment m": self.m, "moment v": self.v}
        for name, array in ({"weights": self.model.flat_parameters} | state).items():
            if not math.isfinite(self.model.backend.global_norm(array)):
                return name
        return ""

    def step(self, learning_rate: float | None = None, grad_clip: float | None = None) -> float:
        """Take one step along the model's gradients; they are not cleared.

        Parameters
        ----------
        learning_rate : of this step, None for the constructor's; that of a group changes by the
            same factor
        grad_clip : the largest global norm of the gradients, None for no limit; the step multiplies
            them by min(1, grad_clip / (norm + 1e-6)), as PyTorch's clip_grad_norm_

        Returns
        -------
        the global (Euclidean) norm of the gradients before clipping

        Raises
        ------
        ValueError : a setting is out of range, other parameters are trained than when the optimizer
            was made, or (a NonFiniteGradient) the norm is not finite; parameters and moments are
            unchanged

        Examples
        --------
        >>> model = gpt2c.GPT2(gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257))
        >>> optimizer = gpt2c.AdamW(model)
        >>> loss = model.loss([[1, 2, 3]], [[2, 3, 4]])
        >>> model.backward()
        >>> norm = optimizer.step(learning_rate=0.01, grad_clip=1.0)
        >>> model.loss([[1, 2, 3]], [[2, 3, 4]]) < loss
        True
        """
        learning_rate = self.learning_rate if learning_rate is None else learning_rate
        _check_learning_rate(learning_rate)
        if grad_clip is not None and not number("grad_clip", grad_clip) > 0:
            raise ValueError(f"grad_clip must be above 0, or None not to clip, got {grad_clip}")
        model = self.model
        if model.trained != self._trained:
            raise ValueError("other parameters of the model are trained now: make a new AdamW")
        norm = self._norm()
        if not math.isfinite(norm):
            raise NonFiniteGradient(norm, self.steps + 1)
        grad_scale = 1.0 if grad_clip is None else min(1.0, grad_clip / (norm + 1e-6))
        self.steps += 1
        self._update(learning_rate, grad_scale)
        return norm

    def _norm(self) -> float:
        return float(self.model.backend.global_norm(self.model.flat_gradients))

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        """Update the slices that this optimizer owns, part by part."""
        model = self.model
        for owned, moments in zip(self._owns, self._held, strict=True):
            for part in self._parts:
                own = slice(max(part.start, owned.start), min(part.end, owned.stop))
                if own.start >= own.stop:
                    continue
                first = moments.start - owned.start
                held = slice(first + own.start, first + own.stop)
                decay = self.weight_decay if part.weight_decay is None else part.weight_decay
                model.backend.adamw_update(
                    model.flat_parameters[own],
                    self.m[held],
                    self.v[held],
                    model.flat_gradients[own],
                    learning_rate * part.factor,
                    *self.betas,
                    self.eps,
                    decay,
                    self.steps,
                    grad_scale,
                )


def _parts(model: FlatModel, groups: Sequence[ParameterGroup], learning_rate: float) -> list[_Part]:
    """Return the slices of flat memory to update: neighbours with the same settings are one."""
    if not groups:
        rest = _Part(model.decay_size, model.trained_size, weight_decay=0.0)
        return [_Part(0, model.decay_size), rest]
    if not isinstance(groups, list | tuple):
        raise ValueError(f"groups must be a list of dicts, got {groups!r:.50}")
    starts = aligned_offsets({name: model.parameters[name].shape for name in model.trained})
    ends = dict(zip(starts, [*starts.values()][1:], strict=False))
    decaying = {name for name in model.trained if starts[name] < model.decay_size}
    settings: dict[str, tuple[float, float | None]] = {}  # the last two fields of a part
    for group in groups:
        factor, decay = _checked_settings(group, learning_rate)
        patterns = group["params"]
        names = {
            name
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            for name in _names_of_trained(model, pattern)
            if name not in settings
        }
        if not names:
            raise ValueError(
                f"the group of params {patterns!r:.70} is empty: name parameters that no group"
                " before it has"
            )
        if decay and names.isdisjoint(decaying):
            raise ValueError(
                f"the group of params {patterns!r:.70} has weight_decay {decay}, but no parameter"
                " with two or more dimensions"
            )
        settings |= {name: (factor, decay if name in decaying else 0.0) for name in names}
    for name in model.trained:
        settings.setdefault(name, (1.0, None if name in decaying else 0.0))
    parts = []
    for own, names_of_part in itertools.groupby(model.trained, settings.__getitem__):
        run = [*names_of_part]
        parts.append(_Part(starts[run[0]], ends[run[-1]], *own))
    return parts


def _checked_settings(group: ParameterGroup, learning_rate: float) -> tuple[float, float | None]:
    """Return the factor of a group's learning rate, and its weight decay or None."""
    known = [*ParameterGroup.__annotations__]
    if not isinstance(group, dict) or "params" not in group or not group.keys() <= {*known}:
        raise ValueError(
            f"a group is a dict with params and perhaps {', '.join(known[1:])}, got {group!r:.90}"
        )
    if not isinstance(group["params"], str | list | tuple):
        raise ValueError(
            f"params must be a pattern of names, or a list of them, got {group['params']!r:.50}"
        )
    rate, decay = group.get("learning_rate", learning_rate), group.get("weight_decay")
    _check_learning_rate(rate)
    if decay is not None:
        _check_weight_decay(decay)
    if rate == learning_rate:
        return 1.0, decay
    factor = rate / learning_rate if learning_rate else math.inf
    if factor == math.inf:
        raise ValueError(
            f"learning_rate {learning_rate} is too small: a group's, {rate}, is a multiple of it"
        )
    return factor, decay


def _names_of_trained(model: FlatModel, pattern: str) -> frozenset[str]:
    """Return the trained parameters whose names fit a pattern."""
    fitting = names_that_fit(model.parameters, [pattern])
    if fitting.isdisjoint(model.trained):
        raise ValueError(f"all parameters with a name like {pattern!r} are frozen")
    return fitting.intersection(model.trained)


ScheduleKind = Literal["constant", "linear", "cosine", "wsd", "step"]
SCHEDULES: tuple[ScheduleKind, ...] = get_args(ScheduleKind)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: `Schedule(...)(step)`, steps counted from 0.

    The first `warmup_iters` steps rise linearly, learning_rate * (step + 1) / warmup_iters, so that
    the first is not 0. After them, with low = min_lr, high = learning_rate and r going from 0 to 1
    between warmup_iters and max_iters (wsd: over the last decay_fraction of max_iters)::

        constant   high
        linear     low + (1 - r) * (high - low)
        cosine     low + (1 + cos(pi * r)) / 2 * (high - low)
        wsd        low + (1 - sqrt(r)) * (high - low)      "warmup, stable, decay"
        step       max(low, high * gamma ** ((step - warmup_iters) // step_size))

    From max_iters on, linear, cosine and wsd stay at min_lr. Sources: llm.c `llmc/schedulers.h`;
    for step PyTorch's StepLR; for wsd MiniCPM, arXiv:2404.06395, and the 1 - sqrt form of
    arXiv:2405.18392.

    Parameters
    ----------
    kind : one of SCHEDULES
    learning_rate : the highest, reached at the end of the warm-up
    max_iters : steps of the whole run
    warmup_iters : steps of the warm-up, 0 for none
    min_lr : the lowest after the warm-up
    decay_fraction : of wsd, the share of max_iters that decays, in (0, 1]
    step_size, gamma : of step, the rate is multiplied by gamma in (0, 1] every step_size steps

    Raises
    ------
    ValueError : the kind is unknown or a setting is out of range

    Examples
    --------
    >>> rate = gpt2c.Schedule("cosine", learning_rate=1.0, max_iters=10, warmup_iters=2, min_lr=0.1)
    >>> [round(rate(step), 3) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """

    kind: ScheduleKind
    learning_rate: float
    max_iters: int
    warmup_iters: int = 0
    min_lr: float = 0.0
    decay_fraction: float = 0.2
    step_size: int = 1000
    gamma: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that are out of range."""
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.kind!r}")
        _check_learning_rate(self.learning_rate)
        if not 0 <= number("min_lr", self.min_lr) <= self.learning_rate:
            raise ValueError(
                f"min_lr must be in [0, learning_rate = {self.learning_rate}], got {self.min_lr}"
            )
        if whole_or_float("max_iters", self.max_iters) < 1:
            raise ValueError(f"max_iters must be at least 1, got {self.max_iters}")
        if not 0 <= whole_or_float("warmup_iters", self.warmup_iters) <= self.max_iters:
            raise ValueError(
                f"warmup_iters must be in [0, max_iters = {self.max_iters}], "
                f"got {self.warmup_iters}"
            )
        if not 0 < number("decay_fraction", self.decay_fraction) <= 1:
            raise ValueError(f"decay_fraction must be in (0, 1], got {self.decay_fraction}")
        if whole_or_float("step_size", self.step_size) < 1:
            raise ValueError(f"step_size must be at least 1, got {self.step_size}")
        if not 0 < number("gamma", self.gamma) <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}")

    def __call__(self, step: int) -> float:
        """Return the learning rate of `step` >= 0.

        Raises
        ------
        ValueError : the step is not a whole number, or is below 0
        """
        if whole_or_float("step", step) < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        low, high = self.min_lr, self.learning_rate
        if step < self.warmup_iters:
            return high * (step + 1) / self.warmup_iters
        if self.kind == "constant":
            return high
        if self.kind == "step":
            return max(low, high * self.gamma ** ((step - self.warmup_iters) // self.step_size))
        start = self.warmup_iters
        if self.kind == "wsd":
            start = max(start, self.max_iters - round(self.decay_fraction * self.max_iters))
        done = step >= self.max_iters
        r = 1.0 if done else max(0, step - start) / max(1, self.max_iters - start)
        if self.kind == "linear":
            fallen = r
        elif self.kind == "cosine":
            fallen = (1 - math.cos(math.pi * r)) / 2
        else:
            fallen = math.sqrt(r)
        return low + (1 - fallen) * (high - low)


def _check_learning_rate(learning_rate: float) -> None:
    if not 0 <= number("learning_rate", learning_rate) < math.inf:
        raise ValueError(f"learning_rate must be finite and at least 0, got {learning_rate}")


def _check_weight_decay(weight_decay: float) -> None:
    if not 0 <= number("weight_decay", weight_decay) < math.inf:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")


def _checked_betas(betas: Any) -> tuple[float, float]:
    with suppress(TypeError, ValueError):
        beta1, beta2 = (number("a beta", beta) for beta in betas)
        if 0 <= beta1 < 1 and 0 <= beta2 < 1:
            return beta1, beta2
    raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r:.50}")
