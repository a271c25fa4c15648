"""Shapes for every op: around the sizes of vectors, panels, tiles and blocks, and odd values."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2c.kernels.cases import BF16_ATTENTION, EXAMPLES, OpExample, OpShape
from gpt2c.kernels.op import OPS


@dataclass(frozen=True, eq=False)  # so that it can be hashed, to be solved once
class Case:
    """One op on one shape."""

    name: str
    shape: OpShape

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{letter}={size}" for letter, size in self.shape.items())])

    @property
    def example(self) -> OpExample:
        return EXAMPLES[self.name]

    @property
    def rtol(self) -> float:
        if self.name.startswith("attention") and self.shape.get("precision") == "bf16":
            return BF16_ATTENTION
        usual = RTOL_OF.get(self.name, self.example.rtol)
        return self.example.kinds.get(self.shape.get("kind"), usual)

    def arguments(self) -> list[Any]:
        """Return the arguments, the same ones every time."""
        return self.example.make(
            np.random.default_rng(zlib.crc32(str(self).encode())), **self.shape
        )


# ---- shapes --------------------------------------------------------------------------------------


def shapes(letters: str, sizes: Iterable[tuple[Any, ...]]) -> list[OpShape]:
    return [dict(zip(letters.split(), size, strict=True)) for size in sizes]


# vectors hold 4, 8 or 16 floats and loops are unrolled: one less, the same, one more; then primes
VECTOR_EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 257)


def edges(name: str) -> list[OpShape]:
    """Return shapes for an op whose loops go through vectors, and its example's other values.

    Each size is around the vectors in turn; then the last is long, and all together are a task for
    several threads.
    """
    letters, kinds = EXAMPLES[name].letters, EXAMPLES[name].kinds
    last, few = letters[-1], dict.fromkeys(letters, 3)
    long = [{**few, last: size} for size in (768, 1023, 1024, 1025, 3072)]
    many: list[OpShape] = [dict.fromkeys(letters, int(100_003 ** (1 / len(letters))))]
    return [
        *({**few, letter: edge} for letter in letters for edge in VECTOR_EDGES),
        *long,
        *many,
        *({**few, last: size, "kind": kind} for kind in kinds for size in (33, 768, 1003)),
    ]


ENCODER = shapes(
    "B T C V",
    [(1, 1, 1, 1), (2, 50, 5, 2), (1, 7, 768, 257), (4, 64, 768, 1000), (2, 9, 16, 50257)]
    + [(2, 3, C, 7) for C in VECTOR_EDGES],
)
RAGGED_TOKENS = shapes("B T C V S", [(1, 1, 5, 3, 2), (1, 60, 17, 9, 7), (1, 33, 16, 9, 34)])
EMBEDDING = shapes(
    "B T C V kind position",
    [
        (2, 3, C, 7, kind, position)
        for C in VECTOR_EDGES
        for kind, position in (("float32", 5), ("float16", 0), ("uint8", 1))
    ],
)
# around the panels, tiles and blocks of a matmul, in each of its three sizes
PANELS = (95, 96, 97, 191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 512, 513, 767, 768, 769)
BLOCKS = (343, 344, 345, 515, 516, 517, 1031, 1032, 1033, 1535, 1536, 1537, 2064, 2065)
TILES = (*VECTOR_EDGES, 6, 11, 12, 13, 14, 23, 24, 25, 47, 48, 49)
MATMUL = shapes(
    "N C OC",
    [
        *((7, C, 18) for C in (*VECTOR_EDGES, *PANELS, *BLOCKS)),
        *((N, 24, 20) for N in (*TILES, *PANELS, *BLOCKS)),
        *((13, 24, OC) for OC in (*TILES, *PANELS)),
        *((1, C, 1) for C in (1, 16, 17)),
        *((1, 768, 2304), (4, 768, 3072), (5, 3072, 768), (65, 768, 768), (97, 385, 257)),
    ],
) + shapes("N C OC bias", [(1, 1, 1, False), (7, 33, 18, False), (98, 259, 194, False)])
ATTENTION = shapes(
    "B T NH HS",
    [(1, 1, 1, 1), (3, 1, 2, 8), (2, 7, 1, 1), (2, 17, 3, 5), (2, 65, 2, 33), (1, 40, 2, 130)]
    + [(1, T, 2, 16) for T in (2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 127, 128, 129)]
    + [(1, 19, 2, HS) for HS in VECTOR_EDGES]
    + [(1, 64, 12, 64), (2, 256, 1, 64), (1, 300, 2, 64), (1, 257, 1, 64)],
) + shapes("B T NH HS kind", [(2, 40, 2, 64, "saturated"), (1, 130, 1, 33, "saturated")])
RAGGED_ROPE = shapes(
    "B T NH D position S", [(1, 1, 2, 8, 0, 2), (1, 40, 3, 17, 64, 5), (1, 33, 2, 4, 0, 34)]
)
GROUPED = shapes(
    "B T NH HS KV", [(2, 65, 6, 16, 2), (1, 130, 4, 33, 1), (1, 9, 9, 64, 3), (3, 1, 2, 8, 1)]
)
RAGGED = [
    *shapes("B T NH HS S", [(1, 1, 2, 8, 2), (1, 200, 3, 16, 6), (1, 70, 2, 33, 71)]),
    *shapes("B T NH HS KV S", [(1, 333, 6, 16, 2, 4)]),
]
DROPPED = [
    *shapes(
        "B T NH HS dropout",
        [(1, 1, 1, 1, 0.5), (2, 65, 2, 33, 0.1), (1, 200, 2, 16, 0.9)]
        + [(3, T, 2, 8, 0.2) for T in (2, 3, 5, 7, 15, 17, 31, 33, 63, 64, 127, 129)],
    ),
    *shapes("B T NH HS KV dropout", [(2, 130, 6, 16, 2, 0.2), (1, 9, 9, 64, 3, 0.5)]),
    *shapes("B T NH HS S dropout", [(1, 200, 3, 16, 6, 0.2), (1, 70, 2, 33, 71, 0.5)]),
    *shapes("B T NH HS KV S dropout", [(1, 333, 6, 16, 2, 4, 0.1)]),
]
# 16-bit products: lanes hold pairs, so odd and even sums, each around vectors, tiles and panels
BF16_MATMUL = [
    {**shape, "precision": "bf16"}
    for shape in shapes(
        "N C OC",
        [
            *((7, C, 18) for C in (*TILES, 95, 96, 97, 767, 768, 769, 1535, 1536, 1537, 3073)),
            *((N, 24, 20) for N in (*TILES, *PANELS[:6], 1031, 1032, 1033)),
            *((13, 23, OC) for OC in (*TILES, *PANELS[:6])),
            *((1, 1, 1), (1, 768, 2304), (65, 768, 768), (97, 385, 257), (33, 3072, 50)),
        ],
    )
]
# halves: sums of blocks of 64, rows scaled in parts of at most 768
FP16_MATMUL = [
    {**shape, "precision": "fp16"}
    for shape in shapes(
        "N C OC",
        [
            *((N, 24, 20) for N in (1, 16, 17, 23, 24, 25, 97)),
            *((19, C, 18) for C in (1, 2, 63, 64, 65, 129, 767, 768, 769, 1540)),
            *((17, 23, OC) for OC in (1, 15, 16, 17, 63, 64, 65, 130, 257)),
            (1040, 5, 33),
        ],
    )
]
BF16_ATTENDED = [
    {**shape, "precision": "bf16"} for shape in (*ATTENTION[::2], *GROUPED, *RAGGED, *DROPPED[::4])
]
ADAPTERS = shapes(
    "N C OC R",
    [
        *((5, 3, 7, R) for R in VECTOR_EDGES),
        *((N, 24, 20, 8) for N in (1, 2, 15, 16, 17, 131)),
        *((1, 768, 2304, 8), (65, 3072, 768, 4), (97, 385, 257, 33)),
    ],
)
# around the 64 x 64 blocks, and vectors
TRANSPOSE = shapes(
    "R C",
    [(768, 130), (63, 65), (64, 64), (130, 97)]
    + [pair for n in (*VECTOR_EDGES[:-1], 127, 128, 129) for pair in ((n, 5), (5, n))],
)
# around vectors of floats and, with weights of 8 bits, steps of 8, 16, 32 and 64; tiles of 4 rows;
# 16 rows, up to which small weights are used where they lie; 64 columns and 128 rows of a task
LINEAR = shapes(
    "N C OC kind",
    [
        (N, C, OC, kind)
        for kind in ("float32", "float16", "uint8")
        for N, C, OC in [
            *((5, C, 5) for C in (*VECTOR_EDGES, 127, 128, 129)),
            *((N, 21, 19) for N in (1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 127, 128, 129, 257)),
            *(
                (N, 24, OC)
                for N in (1, 6)
                for OC in (1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129)
            ),
            *((1, 768, 2304), (4, 3072, 768), (130, 385, 257), (17, 770, 66)),
        ]
    ],
) + shapes(
    "N C OC kind bias",
    [(N, 33, 18, kind, False) for N in (3, 17) for kind in ("float32", "float16", "uint8")],
)
# blocks of 64 queries against blocks of 64 keys, from everywhere in a block; room left, and none
CACHE = shapes(
    "B T NH HS position P",
    [
        (1 + position % 2, T, 2, 16, position, position + T + position % 2)
        for T in (1, 2, 3, 17, 63, 64, 65, 100, 129)
        for position in (0, 1, 63, 64, 65, 100)
    ]
    + [(1, T, 3, HS, 70, 80) for T in (1, 5) for HS in (*VECTOR_EDGES[:-1], 130)]
    + [(1, 1, 12, 64, 255, 256), (1, 64, 12, 64, 130, 256)],
) + shapes("B T NH HS position P kind", [(1, T, 2, 64, 70, 200, "saturated") for T in (1, 65)])
GROUPED_CACHE = shapes("B T NH HS position P KV", [(2, T, 6, 17, 70, 140, 2) for T in (1, 5, 65)])
SMALL_CACHE = [
    {**shape, "cache": cache}
    for shape in (*CACHE[::3], *GROUPED_CACHE, CACHE[-1], {**GROUPED_CACHE[2], "precision": "bf16"})
    for cache in ("float16", "int8")
]
CROSSENTROPY = shapes(
    "N V", [*((5, V) for V in VECTOR_EDGES), (1, 257), (97, 65), (3, 50257), (1, 50257)]
) + shapes(
    "N V kind",
    [(4, V, kind) for V in (257, 50257) for kind in ("ignored", "equal", "spread")],
)
ADAMW = shapes(
    "n t weight_decay grad_scale",
    [(33, 1, 0.0, 1.0), (33, 1, 0.1, 0.25), (257, 1000, 0.0, 0.25), (257, 1_000_000, 0.1, 2.0)],
) + shapes("n t kind", [(33, 1, "zero")])

# ops whose kernels have blocks, or whose examples have more than sizes and kinds; others: `edges`
OF_BLOCKS: dict[str, list[OpShape]] = {
    "encoder_forward": [
        *(ENCODER + EMBEDDING + RAGGED_TOKENS),
        *shapes("B T C V kind", [(2, 3, C, 7, "no wpe") for C in VECTOR_EDGES]),
    ],
    "encoder_backward": [
        *(ENCODER + RAGGED_TOKENS),
        *shapes("B T C V kind", [(2, 9, 17, 7, "no wpe"), (2, 9, 17, 7, "no wte")]),
    ],
    "matmul_forward": [
        *(*MATMUL, *LINEAR, *BF16_MATMUL, *FP16_MATMUL),
        *shapes("N C OC", [(2, 64, 50257), (3, 768, 10007)]),
        *shapes("N C OC kind precision", [(33, 67, 40, "float16", p) for p in ("bf16", "fp16")]),
        # many rows of x, whose products have the columns of out in their lanes
        *shapes(
            "N C OC kind",
            [
                (N, C, OC, "uint8")
                for N, C, OC in [(129, 24, 40), (131, 4, 1), (134, 36, 17), (300, 100, 70)]
                + [(N, 128, 33) for N in (17, 128, 129, 130, 133, 135)]
            ],
        ),
    ],
    "matmul_backward": [
        *(*MATMUL, *BF16_MATMUL, *FP16_MATMUL),
        *shapes("N C OC", [(3, 64, 50257)]),
        *({**shape, "accumulate": False} for shape in MATMUL),
        *shapes("N C OC add", [(1, 1, 1, True), (13, 24, 33, True), (98, 259, 194, True)]),
        # 3072 rows of a smaller weight are converted at a time
        *shapes(
            "N C OC kind",
            [
                (N, C, OC, kind)
                for kind in ("float16", "uint8")
                for N, C, OC in [(5, C, 9) for C in (1, 4, 7, 8, 9, 15, 16, 17, 33)]
                + [(1, 24, 20), (98, 70, 131), (3, 33, 3072), (3, 33, 3073), (3, 33, 6145)]
            ],
        ),
        *shapes("N C OC kind add", [(3, 33, 3073, "uint8", True), (4, 5, 6, "float16", True)]),
        *shapes("N C OC kind precision", [(33, 67, 40, "uint8", p) for p in ("bf16", "fp16")]),
        *shapes("N C OC add precision", [(33, 67, 40, True, "fp16")]),
    ],
    "lora_forward": ADAPTERS,
    "lora_backward": [*ADAPTERS, *({**shape, "accumulate": False} for shape in ADAPTERS[::5])],
    "matrix_transpose": TRANSPOSE,
    "attention_forward": [
        *(*ATTENTION, *CACHE, *GROUPED, *GROUPED_CACHE, *RAGGED, *DROPPED, *BF16_ATTENDED),
        *({**shape, "precision": "bf16"} for shape in CACHE[::5]),
        *SMALL_CACHE,
    ],
    "attention_backward": [*ATTENTION, *GROUPED, *RAGGED, *DROPPED, *BF16_ATTENDED],
    "rope_forward": [*edges("rope_forward"), *RAGGED_ROPE],
    "rope_backward": [*edges("rope_backward"), *RAGGED_ROPE],
    "crossentropy_forward": CROSSENTROPY,
    "crossentropy_backward": [
        *CROSSENTROPY,
        *shapes("N V kind", [(9, V, "weighted") for V in (*VECTOR_EDGES, 50257)]),
    ],
}
SHAPES = {name: OF_BLOCKS.get(name) or edges(name) for name in EXAMPLES}
SHAPES["adamw_update"] += ADAMW

# GPT-2's shapes have sums over 4096 rows, these over 316 at most
RTOL_OF = {"layernorm_backward": 2e-6}

CASES = [Case(name, shape) for name in EXAMPLES for shape in SHAPES[name]]

NO_DROPOUT = 0.0, 0, 0  # attention's last arguments
NO_CACHE = None, None, None, None  # and those after out and lse

# op: (output, input whose memory it may share), by position
ALIASES = {
    op.name: (0, [array.name for array in op.arrays].index(op.outputs[0].alias, len(op.outputs)))
    for op in OPS.values()
    if op.outputs and op.outputs[0].alias
}

# ---- one quick shape for each op -----------------------------------------------------------------

SIZES = {"B": 2, "T": 5, "N": 6, "C": 17, "OC": 21, "V": 19, "NH": 3, "HS": 5, "n": 35}


def small_shape(name: str) -> OpShape:
    return {letter: SIZES.get(letter, 7) for letter in EXAMPLES[name].letters}
