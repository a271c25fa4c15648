"""RopeScaling: how a model that was trained on shorter texts turns its positions.

linear      frequency / factor
llama3      frequency / factor for long waves, frequency for short ones, a mean of both between them
dynamic     the frequency, in texts up to max_position_embeddings
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.kernels.checks import check_choice
from gpt2c.model.config import check_numbers, check_sizes

__all__ = ["RopeScaling", "read_rope"]

OLD_P = "original_max_position_embeddings"
# The fields that a kind has beside its factor.
KINDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor", OLD_P),
}
RANGES = {"factor": (1.0, 1e6), "low_freq_factor": (1e-3, 1e6), "high_freq_factor": (1e-3, 1e6)}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The rotary scaling of a config, with Hugging Face's names.

    "dynamic" depends on the length of a text only beyond max_position_embeddings, where gpt2c reads
    no text. So it changes nothing here, and the field is kept for other readers.

    Parameters
    ----------
    rope_type : "linear", "llama3" or "dynamic"
    factor : how much longer texts have become, from 1 to 1e6
    low_freq_factor, high_freq_factor : of llama3, from 1e-3 to 1e6, the first the lower one: waves
        longer than original_max_position_embeddings / low_freq_factor are long, those shorter than
        original_max_position_embeddings / high_freq_factor are short
    original_max_position_embeddings : of llama3, the longest text before

    Source: Chen et al. 2023, arXiv:2306.15595 (linear); Grattafiori et al. 2024, arXiv:2407.21783
    (llama3); huggingface/transformers:src/transformers/modeling_rope_utils.py.

    Raises
    ------
    ValueError : an unknown rope_type, or a field that is missing, out of its range or not of this
        rope_type

    Examples
    --------
    >>> gpt2c.RopeScaling("linear", 4.0).scaled(np.array([1.0, 0.1]))
    array([0.25 , 0.025])
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        """Refuse fields that do not belong together."""
        check_choice("rope_type", self.rope_type, KINDS)
        fields = KINDS[self.rope_type]
        for name in KINDS["llama3"]:
            if name not in fields and getattr(self, name) is not None:
                raise ValueError(f"rope_type {self.rope_type} has no {name}")
        check_numbers(self, {name: RANGES[name] for name in ("factor", *fields) if name in RANGES})
        check_sizes(self, tuple(name for name in fields if name not in RANGES), (), "")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"low_freq_factor must be lower than high_freq_factor, got {low} and {high}"
            )

    def to_dict(self) -> dict[str, object]:
        """Return the entries that transformers reads.

        Examples
        --------
        >>> gpt2c.RopeScaling("linear", factor=4.0).to_dict()
        {'rope_type': 'linear', 'factor': 4.0}
        """
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }

    def scaled(self, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the frequencies (HS / 2,) of a model with this scaling.

        Examples
        --------
        >>> scaling = gpt2c.RopeScaling("linear", factor=2.0)  # texts have become twice as long
        >>> scaling.scaled(np.array([1.0, 0.1]))
        array([0.5 , 0.05])
        """
        if self.rope_type == "dynamic":
            return frequencies
        slow: NDArray[np.float64] = frequencies / self.factor
        if self.rope_type == "linear":
            return slow
        low, high, P = (getattr(self, name) for name in KINDS["llama3"])
        turns = P * frequencies / (2 * math.pi)  # in the longest text before
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        mixed: NDArray[np.float64] = kept * frequencies + (1 - kept) * slow
        return mixed


def read_rope(entries: Mapping[str, Any], P: Any) -> dict[str, Any]:
    """Return rope_theta, if config.json has it, and rope_scaling, from config.json's entries.

    transformers 4 has rope_scaling beside rope_theta, and its older versions call rope_type "type";
    transformers 5 has both in rope_parameters.

    Parameters
    ----------
    P : the model's max_position_embeddings

    Raises
    ------
    ValueError : entries that contradict each other, or positions that gpt2c does not have
    """
    found: dict[str, Any] = {}
    beside = {name: entries.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    for parts in (beside, entries.get("rope_scaling"), entries.get("rope_parameters")):
        if parts is None:
            continue
        if not isinstance(parts, dict):
            raise ValueError(f"rope_scaling and rope_parameters must be objects, got {parts!r:.50}")
        for key, value in parts.items():
            _put(found, "rope_type" if key == "type" else key, value)
    if found.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor must be 1: gpt2c turns all channels of a head")
    read = {"rope_theta": found.pop("rope_theta")} if "rope_theta" in found else {}
    if found.get("rope_type", "default") == "default":
        return read | {"rope_scaling": None}
    if found["rope_type"] == "llama3":
        _put(found, OLD_P, entries.get(OLD_P))
        found.setdefault(OLD_P, P)
    fields = [field.name for field in dataclasses.fields(RopeScaling)]
    scaling = RopeScaling(**{"factor": None} | {n: found[n] for n in fields if n in found})
    if unknown := sorted(found.keys() - fields):
        raise ValueError(f"rope_type {scaling.rope_type} has no {unknown[0]!r:.50}")
    return read | {"rope_scaling": scaling}


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    """Put an entry that is not null beside the others; it must not contradict one of them."""
    if value is not None and found.setdefault(name, value) != value:
        raise ValueError(f"{name} is both {found[name]!r:.50} and {value!r:.50}")
