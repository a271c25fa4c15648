"""Activations: which arrays a batch needs, in one buffer that is used again for every batch.

Knows the names that model and layer write and read, and what stays from forward to backward.
"""

from __future__ import annotations

from collections.abc import Collection

from gpt2c.kernels.memory import Array, aligned_offsets, aligned_zeros, named_views, require
from gpt2c.model.config import GPT2Config

__all__ = ["Activations", "bytes_needed", "parts_needed"]

# The loss never holds more logits than this, 104 MB; (B,T,V) would be 0.8 GB at 4 x 1024.
LOGITS_FLOATS = 26_000_000

# What of each layer's activations stays until its backward pass, by the name of the policy; the
# rest is computed again just before. For C channels, 16, 10 and 1 times C numbers a token.
KEPT: dict[str | None, tuple[str, ...]] = {
    None: (
        *("ln_1", "ln_1.mean", "ln_1.rstd", "qkv", "att", "lse", "middle"),
        *("ln_2", "ln_2.mean", "ln_2.rstd", "fc", "gelu", "out"),
    ),
    "light": ("qkv", "att", "lse", "middle", "fc", "out"),
    "full": ("out",),
}


def activation_shapes(
    config: GPT2Config, B: int, T: int, kept: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that a forward and backward pass write.

    Of a layer's activations those in `kept` are there once for each layer, as "h.0.att", the others
    once for all layers, as "h.att". Of the logits (N, V) there are as many rows as LOGITS_FLOATS
    holds, at least one.
    """
    N, C, F, V = B * T, config.n_embd, config.inner, config.vocab_size
    layer: dict[str, tuple[int, ...]] = {"ln_1": (N, C), "ln_1.mean": (N,), "ln_1.rstd": (N,)}
    layer |= {"qkv": (N, 3 * C), "att": (N, C), "lse": (B, config.n_head, T), "middle": (N, C)}
    layer |= {"ln_2": (N, C), "ln_2.mean": (N,), "ln_2.rstd": (N,)}
    layer |= {"fc": (N, F), "gelu": (N, F), "out": (N, C)}
    shapes: dict[str, tuple[int, ...]] = {"encoded": (N, C), "branch": (N, C)}
    shapes |= {f"h.{name}": shape for name, shape in layer.items() if name not in kept}
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.{name}": shape for name, shape in layer.items() if name in kept}
    shapes |= {"ln_f": (N, C), "ln_f.mean": (N,), "ln_f.rstd": (N,), "d_stream": (N, C)}
    shapes |= {"logits": (max(1, min(N, LOGITS_FLOATS // V)), V), "losses": (N,), "lse": (N,)}
    return shapes


class Activations:
    """The named arrays of a batch.

    Parameters
    ----------
    config : of the model
    recompute : a key of KEPT

    Raises
    ------
    ValueError : an unknown recompute
    """

    def __init__(self, config: GPT2Config, recompute: str | None) -> None:
        if recompute not in KEPT:
            known = ", ".join(repr(policy) for policy in KEPT)
            raise ValueError(f"recompute must be one of {known}, got {recompute!r}")
        self._config = config
        self._recompute = recompute
        self._memory = aligned_zeros(0)
        self._layouts: dict[tuple[int, int, bool], dict[str, Array]] = {}

    def lay_out(self, B: int, T: int, keep: bool) -> dict[str, Array]:
        """Return the arrays of a (B, T) batch, with or without a backward pass to come.

        Those given before are void: they share the memory.
        """
        if (B, T, keep) not in self._layouts:
            kept = KEPT[self._recompute] if keep else ()
            shapes = activation_shapes(self._config, B, T, kept)
            size = aligned_offsets(shapes)[""]
            if size > self._memory.size:
                self._layouts.clear()  # the views go first, and with them the old buffer
                self._memory = aligned_zeros(0)
                mend = "take fewer or shorter rows"
                if keep and self._recompute != "full":
                    mend += ", or a model with recompute='full'"
                require(f"a batch of {B:,} x {T:,} tokens", {"activations": 4 * size}, mend)
                self._memory = aligned_zeros(size)
            views = named_views(self._memory, shapes)
            for layer in range(self._config.n_layer):
                for name in KEPT[None]:
                    if name not in kept:
                        views[f"h.{layer}.{name}"] = views[f"h.{name}"]
            self._layouts[B, T, keep] = views
        return self._layouts[B, T, keep]


def parts_needed(
    config: GPT2Config, B: int, T: int, recompute: str | None = None
) -> dict[str, int]:
    """Return the bytes of what a model, AdamW and a batch need: name -> bytes."""
    parameters = 4 * aligned_offsets(config.parameter_shapes())[""]
    shapes = activation_shapes(config, B, T, KEPT[recompute])
    return {
        "weights": parameters,
        "gradients": parameters,
        "moments": 2 * parameters,
        "activations": 4 * aligned_offsets(shapes)[""],
    }


def bytes_needed(config: GPT2Config, B: int, T: int, recompute: str | None = None) -> int:
    """Return the sum of `parts_needed`."""
    return sum(parts_needed(config, B, T, recompute).values())
