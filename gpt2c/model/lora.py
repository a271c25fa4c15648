"""LoRA: low-rank adapters of linear layers, which learn while the model's own weights stay.

out = x W^T + b + s (x A^T) B^T,    s = alpha / r

A is (r, C) and B (OC, r) with a small rank r, so few numbers have gradients and moments. B is 0 at
first: then the adapters change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2c.kernels.checks import check_kind, number, several, whole
from gpt2c.kernels.memory import Array
from gpt2c.model.block import Batch, Life, Parameter, Pass, Slot

if TYPE_CHECKING:
    from gpt2c.model.stack import Stack

__all__ = ["TARGETS", "A", "Adapter", "B", "LoRA", "is_adapter"]

TARGETS = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")  # all linear layers
A, B = ".lora_A.weight", ".lora_B.weight"  # PEFT's names
LARGEST = 65_536  # of r; more than any width that a low rank makes sense for


@dataclass(frozen=True)
class LoRA:
    """The adapters of a model, Hu et al. 2021, arXiv:2106.09685.

    Parameters
    ----------
    r : the rank
    alpha : the adapters' output is multiplied by alpha / r
    targets : the linear layers that have one, by the ends of their names: "c_attn", "attn.c_proj"
    use_rslora : multiply by alpha / sqrt(r) instead; Kalajdzievski 2023, arXiv:2312.03732

    Raises
    ------
    ValueError : r is not a whole number of at least 1, alpha is not positive, use_rslora is not
        True or False, or there is no target

    Examples
    --------
    >>> gpt2c.LoRA(r=4, alpha=8).scale
    2.0
    """

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that are wrong; keep them as plain values, which JSON has, too."""
        r, alpha = whole("r", self.r), number("alpha", self.alpha)
        if not 1 <= r <= LARGEST:
            raise ValueError(f"r must be in [1, {LARGEST}], got {self.r}")
        if not 0 < alpha < 1e30:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        check_kind("use_rslora", self.use_rslora, bool | np.bool_, "True or False")
        targets = several(self.targets)
        if isinstance(self.targets, str) or not all(isinstance(one, str) for one in targets):
            raise ValueError(
                f"targets must be a list of names of linear layers, got {self.targets!r:.70}"
            )
        if not targets:
            raise ValueError(f"targets must name at least one of {', '.join(TARGETS)}")
        plain = {"r": r, "alpha": alpha, "targets": tuple(map(str, targets))}
        for name, value in (plain | {"use_rslora": bool(self.use_rslora)}).items():
            object.__setattr__(self, name, value)

    @property
    def scale(self) -> float:
        """The factor of the adapters' output.

        Examples
        --------
        >>> gpt2c.LoRA(r=4, alpha=8.0).scale
        2.0
        """
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def adapt(self, stack: Stack) -> None:
        """Give the linear layers of a stack their adapters.

        Raises
        ------
        ValueError : a target fits no layer
        """
        linears = list(stack.linears())
        for target in self.targets:
            fitting = [one for one in linears if f".{one.name}".endswith(f".{target}")]
            if not fitting:
                raise ValueError(
                    f"targets: no linear layer has a name that ends with {target!r};"
                    f" there are {', '.join(TARGETS)}"
                )
            for linear in fitting:
                linear.adapter = Adapter(linear.name, linear.C, linear.OC, self)
        if stack.head.weight == "score.weight":
            stack.head.small = False  # it learns, too


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is an adapter's."""
    return name.endswith((A, B))


class Adapter:
    """The adapter of a linear layer.

    Parameters
    ----------
    name, C, OC : of the layer
    lora : the adapters' settings
    """

    def __init__(self, name: str, C: int, OC: int, lora: LoRA) -> None:
        self.down, self.up, self._low = name + A, name + B, name + ".low"
        self.C, self.OC, self.R, self.scale = C, OC, lora.r, lora.scale

    def parameters(self) -> Iterable[Parameter]:
        """Yield A, with PEFT's first values, and B, 0 at first; weight decay would undo them."""
        yield Parameter(self.down, (self.R, self.C), bound=1 / math.sqrt(self.C))
        yield Parameter(self.up, (self.OC, self.R))

    def slots(self, batch: Batch) -> Iterable[Slot]:
        """Yield s x A^T, which is so small that no policy computes it again."""
        yield Slot(self._low, (batch.N, self.R), Life.STREAM)

    def flops(self) -> float:
        """Count the multiply-adds of a token."""
        return self.R * (self.C + self.OC)

    def forward(self, ctx: Pass, out: Array, x: Array) -> None:
        """Add s (x A^T) B^T to out (N, OC)."""
        p, low = ctx.p, ctx.a[self._low]
        ctx.ops.lora_forward(out, low, out, x, p[self.down], p[self.up], self.scale)

    def stage(self, ctx: Pass) -> dict[str, Any]:
        """Return the fields of the layer's `Stage` that do `forward`."""
        return {
            "down": ctx.p[self.down],
            "up": ctx.p[self.up],
            "low": ctx.a[self._low],
            "factor": self.scale,
        }

    def backward(self, ctx: Pass, d_x: Array | None, d_out: Array, x: Array) -> None:
        """Write d_x (N, C), the adapter's part, which may be x, and the gradients of A and B."""
        p, g = ctx.p, ctx.g
        ctx.ops.lora_backward(
            *(d_x, g.get(self.down), g.get(self.up), d_out, x, ctx.a[self._low]),
            *(p[self.down], p[self.up], self.scale, ctx.accumulate),
        )
