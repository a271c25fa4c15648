"""The memory that a training run needs, compared with the free memory before the first step.

Each array may fit alone though all together do not, and the system kills the process only when the
memory is used. Knows which settings lower the need.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping

from gpt2c.kernels.backend import Backend, as_precision
from gpt2c.kernels.memory import available_bytes, megabytes, require
from gpt2c.model.config import ModelConfig
from gpt2c.model.plan import bytes_needed, parts_needed
from gpt2c.parallel.gradients import BUCKET, IN_FLIGHT
from gpt2c.train.settings import TrainSettings

__all__ = ["PYTHON", "check_training", "on_ranks", "training_parts", "with_scratch"]

PYTHON = 32 << 20  # bytes that Python takes later, for the picture and its imports
SCRATCH = 5 << 20  # bytes of a thread: its kernels' packed arrays, and its stack
BLOCKS = 1 << 20  # bytes of a thread in attention: arrays of blocks, and its stack
HEAD_ARRAYS = 5  # beside them, each of a row's tokens and one head
ROWS = 1032  # of a product in 16 bits, which kernels compute in floats before they round them


def training_parts(
    config: ModelConfig,
    settings: TrainSettings,
    backend: Backend,
    order_bytes: int,
    ranks: int = 1,
) -> dict[str, int]:
    """Return the memory of a run: name -> bytes. An evaluation uses that of the activations.

    It is that of one rank, of which a machine may have several.

    Parameters
    ----------
    config : of the model
    settings : of the run
    backend : of the run
    order_bytes : of the batches
    ranks : that share the moments, and send each other gradients
    """
    precision = as_precision(settings.precision, backend)
    parts = parts_needed(
        *(config, settings.batch_size, settings.block_size, settings.recomputation), precision
    )
    parts["order of the windows"] = order_bytes
    parts = on_ranks(parts, ranks, settings.zero)
    divided = settings.gradient_accumulation_steps > 1
    tokens = settings.batch_size * settings.block_size
    row = settings.block_size
    return with_scratch(parts, config, backend, tokens, row, precision, divided)


def on_ranks(parts: Mapping[str, int], ranks: int, zero: int) -> dict[str, int]:
    """Return the parts of one of several ranks, which get gradients and may share the moments."""
    parts = dict(parts)
    if ranks > 1:
        parts["gradients of other ranks"] = min(parts["gradients"], 4 * BUCKET * IN_FLIGHT)
        parts["moments"] //= ranks if zero else 1
    return parts


def with_scratch(
    parts: Mapping[str, int],
    config: ModelConfig,
    backend: Backend,
    tokens: int,
    row: int,
    precision: str,
    divided: bool,
) -> dict[str, int]:
    """Return the parts of `parts_needed` with what a run takes beside them: name -> bytes.

    Parameters
    ----------
    tokens : that are read at once
    row : of these, those of a row; a ragged batch is one row
    divided : a step has several batches, and the head learns: its next gradient has its own memory
    """
    parts, shapes = dict(parts), config.parameter_shapes()
    if divided:
        parts["gradients"] += 4 * math.prod(shapes[config.stack().head.weight])
    channels = -(-config.stack().layers[0].attention.HS // 16) * 16  # in whole vectors
    heads = 4 * HEAD_ARRAYS * row * channels
    parts["threads"] = max(SCRATCH, BLOCKS + heads) * backend.threads
    if precision == "bf16":
        widest = max(shape[0] for name, shape in shapes.items() if name.startswith("h."))
        parts["threads"] += 4 * min(ROWS, tokens) * widest
    parts["Python"] = PYTHON
    parts["a save"] = 4 * max(map(math.prod, shapes.values()))  # a copy of one tensor
    return parts


def check_training(
    config: ModelConfig,
    settings: TrainSettings,
    backend: Backend,
    order_bytes: int,
    resumed: bool = False,
    ranks: int = 1,
    most: float = math.inf,
) -> None:
    """Refuse a run that does not fit into memory, and name the settings that lower its need.

    Parameters
    ----------
    config, settings, backend, order_bytes, ranks : see `training_parts`
    resumed : the run is resumed, so its model and its batches cannot change
    most : see `require`

    Raises
    ------
    MemoryError : the run does not fit; nothing was allocated
    """
    parts = training_parts(config, settings, backend, order_bytes, ranks)
    free = min(available_bytes(), most)
    if sum(parts.values()) <= free:
        return
    B, T, recompute = settings.batch_size, settings.block_size, settings.recomputation
    precision = as_precision(settings.precision, backend)
    fixed = sum(parts.values()) - bytes_needed(config, B, T, recompute, precision)

    def most_rows(recompute: str | None) -> int:
        return bisect_right(
            range(1, B + 1),
            free - fixed,
            key=lambda rows: bytes_needed(config, rows, T, recompute, precision),
        )

    mends, rows, rows_full = [], most_rows(recompute), most_rows("full")
    if rows and not resumed:
        row = parts["activations"] / B
        mends.append(f"lower --batch-size to {rows:,} (a row takes {megabytes(row)})")
    if recompute != "full" and rows_full > (B - 1 if resumed else rows):
        fewer = "" if rows_full == B else f" with --batch-size {rows_full:,}"
        mends.append(f"pass --recompute full{fewer}")
    if not resumed:
        mends.append("lower --block-size" if mends else "lower --n-layer, --n-embd or --block-size")
    require("training", parts, ", or ".join(mends) or "continue where more memory is free", most)
