"""Needs: what a training run takes of memory, added up and compared once, before the first step.

Each array alone may fit where all of them do not, and a system ends the process only when the
memory is used. Knows which settings lower the need.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from gpt2c.kernels.memory import available_bytes, megabytes, require
from gpt2c.model.config import GPT2Config
from gpt2c.model.plan import bytes_needed, parts_needed
from gpt2c.train.settings import TrainSettings

__all__ = ["PYTHON", "check_training", "training_parts"]

PYTHON = 32 << 20  # bytes that it takes later: the picture, what it imports for that
SCRATCH = 3 << 20  # bytes of a thread: what its kernels pack, and its stack


def training_parts(
    config: GPT2Config, settings: TrainSettings, threads: int, order_bytes: int
) -> dict[str, int]:
    """Return what a run needs: name -> bytes. An evaluation takes the activations' place.

    Parameters
    ----------
    config : of the model
    settings : of the run
    threads : of the backend
    order_bytes : of the batches
    """
    shapes = config.parameter_shapes()
    parts = parts_needed(config, settings.batch_size, settings.block_size, settings.recomputation)
    if settings.gradient_accumulation_steps > 1:  # the next batch's of wte is computed beside it
        parts["gradients"] += 4 * math.prod(shapes["wte.weight"])
    parts["threads"] = SCRATCH * threads
    parts["order of the windows"] = order_bytes
    parts["Python"] = PYTHON
    parts["a save"] = 4 * max(map(math.prod, shapes.values()))  # a copy of one tensor
    return parts


def check_training(
    config: GPT2Config,
    settings: TrainSettings,
    threads: int,
    order_bytes: int,
    resumed: bool = False,
) -> None:
    """Refuse a run that does not fit into memory, and name the settings that lower its need.

    Parameters
    ----------
    config, settings, threads, order_bytes : see `training_parts`
    resumed : the run goes on, so that its model and its batches stay as they are

    Raises
    ------
    MemoryError : it does not fit; nothing was asked for
    """
    parts, free = training_parts(config, settings, threads, order_bytes), available_bytes()
    if sum(parts.values()) <= free:
        return
    B, T, recompute = settings.batch_size, settings.block_size, settings.recomputation
    fixed = sum(parts.values()) - bytes_needed(config, B, T, recompute)

    def most_rows(recompute: str | None) -> int:
        return bisect_right(
            range(1, B + 1), free - fixed, key=lambda rows: bytes_needed(config, rows, T, recompute)
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
    require("training", parts, ", or ".join(mends) or "go on where more memory is free")
