/* C (M,N) (+)= A (M,K) B (N,K)^T of BF16 numbers on the tiles of AMX, which Intel calls advanced matrix extensions:
 * gemm() where a CPU has them.
 *
 * A tile is 16 rows of 64 bytes. One instruction multiplies a tile of A, 16 rows of 32 numbers along K, by a tile of B,
 * 16 pairs along K for each of 16 columns, and adds the products to a tile of 16 x 16 floats: 16,384 operations in 16
 * cycles. So nearly everything else takes longer, and the method of gemm.c serves here with other sizes:
 *
 *   for each KC of K:
 *     for each MC rows of C:                     threads pack A together: MC x KC
 *       for each task, shared by the threads:    up to NC columns, some of the MC rows
 *         pack B, unless the thread has it:      NC x KC, in the thread's second-level cache
 *         for each 32 rows of the task:          a panel of A, in the first-level cache as far as it goes
 *           for each 32 columns: microkernel     2 x 2 tiles of C; for each tile that is read, one is multiplied
 *
 * A panel is 32 rows of A (or B), KC deep: for each 16 lanes, which are pairs along K, two tiles one after the other. A
 * tile of A has a row of A in each row, a tile of B a pair along K. Memory that lies the other way is transposed, 16 x
 * 16 lanes at a time. The edges are padded with zeros. Of each 32 numbers along K the products of even and of odd ones
 * are summed apart, then both sums are added to C's; denormals are 0. */

#include "internal.h"

#ifdef HAS_TILES

enum {
    SIDE = 16, /* rows of a tile, and lanes of 32 bits in each */
    PANEL = 2 * SIDE,
    STEP = 2 * SIDE * SIDE, /* floats of a panel's two tiles at one depth */
    PAIR = 2,               /* numbers in a lane */
    KC = 192,               /* lanes: a panel has 24 KB, half of the first-level cache */
    MC = 128 * PANEL,       /* rows of A packed at a time: 8 MB at most, in the last-level cache */
    NC = 16 * PANEL,        /* rows of B that a thread packs at a time: 1 MB at most */
    PACK_PANELS = 8         /* panels of A in a task of packing */
};

int64_t tiles_rows(void) { return MC; }

int64_t tiles_scratch_size(int threads) { return (int64_t)KC * (MC + (int64_t)threads * NC); }

/* tile (SIDE x SIDE lanes) = `rows` rows of x from (row, k) on, `numbers` along K; the rest is 0. by_row: a row of x is
 * a row of the tile, else a lane of each. */
static inline __attribute__((always_inline)) void pack_tile(float *tile, Operand x, int64_t row, int64_t k,
                                                            int64_t rows, int64_t numbers, const int by_row,
                                                            const int k_contiguous, const int memory) {
    vf lines[SIDE];
    const void *from = element(x.data, row * x.row_stride + k * x.k_stride, memory);
    for (int64_t i = 0; i < SIDE; i++) {
        const int64_t stride = k_contiguous ? x.row_stride : PAIR * x.k_stride;
        const void *line = element(from, i * stride, memory);
        if (i >= (k_contiguous ? rows : ceil_div(numbers, PAIR)))
            lines[i] = vf_set1(0.0f);
        else if (k_contiguous)
            lines[i] = load_lanes(line, numbers, BF16, memory);
        else
            lines[i] = load_pair(line, PAIR * i + 1 < numbers ? element(line, x.k_stride, memory) : NULL, rows, memory);
    }
    if (by_row != k_contiguous) vf_transpose(lines);
    for (int i = 0; i < SIDE; i++) vf_store(tile + i * SIDE, lines[i]);
}

/* Packs n rows of x, `numbers` along K, into panels. */
static inline __attribute__((always_inline)) void pack_of(float *panels, Operand x, int64_t n, int64_t numbers,
                                                          const int by_row, const int k_contiguous, const int memory) {
    const int64_t steps = ceil_div(numbers, PAIR * SIDE), count = ceil_div(n, PANEL), all = steps * count;
    for (int64_t each = 0; each < all; each++) { /* in the order of memory */
        const int64_t panel = k_contiguous ? each / steps : each % count, step = k_contiguous ? each % steps : each / count;
        const int64_t k = step * PAIR * SIDE, left = min64(PAIR * SIDE, numbers - k);
        for (int64_t half = 0; half < 2; half++) {
            const int64_t row = panel * PANEL + half * SIDE;
            pack_tile(panels + (panel * steps + step) * STEP + half * SIDE * SIDE, x, row, k,
                      min64(SIDE, n > row ? n - row : 0), left, by_row, k_contiguous, memory);
        }
    }
}

static void pack(float *panels, Operand x, int64_t n, int64_t numbers, const int by_row) {
    if (x.k_stride == 1 && x.memory == BF16)
        pack_of(panels, x, n, numbers, by_row, 1, BF16);
    else if (x.k_stride == 1)
        pack_of(panels, x, n, numbers, by_row, 1, FP32);
    else if (x.memory == BF16)
        pack_of(panels, x, n, numbers, by_row, 0, BF16);
    else
        pack_of(panels, x, n, numbers, by_row, 0, FP32);
}

/* c (m x n, row stride ldc; m, n <= PANEL) = a b^T of two panels, plus bias (n), plus the old c, or alone. */
static inline void microkernel(float *c, int64_t ldc, const float *a, const float *b, int64_t steps, int64_t m,
                               int64_t n, const float *bias, int accumulate) {
    float edge[PANEL * PANEL];
    const int whole = m == PANEL && n == PANEL;
    float *to = whole ? c : edge;
    const int64_t row = (whole ? ldc : PANEL) * 4; /* bytes */
    if (!whole && (accumulate || bias))
        for (int64_t i = 0; i < m; i++)
            memcpy(edge + i * PANEL, accumulate ? c + i * ldc : bias, (size_t)n * sizeof(float));
    if (accumulate || (bias && !whole)) {
        tile_load(0, to, row);
        tile_load(1, to + SIDE, row);
        tile_load(2, (char *)to + SIDE * row, row);
        tile_load(3, (char *)(to + SIDE) + SIDE * row, row);
    } else if (bias) {
        tile_load(0, bias, 0);
        tile_load(1, bias + SIDE, 0);
        tile_load(2, bias, 0);
        tile_load(3, bias + SIDE, 0);
    } else {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++, a += STEP, b += STEP) {
        tile_load(6, b, 4 * SIDE);
        tile_load(4, a, 4 * SIDE);
        tile_load(7, b + SIDE * SIDE, 4 * SIDE);
        tile_load(5, a + SIDE * SIDE, 4 * SIDE);
        tile_dot_bf16(0, 4, 6);
        tile_dot_bf16(1, 4, 7);
        tile_dot_bf16(2, 5, 6);
        tile_dot_bf16(3, 5, 7);
    }
    tile_store(0, to, row);
    tile_store(1, to + SIDE, row);
    tile_store(2, (char *)to + SIDE * row, row);
    tile_store(3, (char *)(to + SIDE) + SIDE * row, row);
    for (int64_t i = 0; !whole && i < m; i++) memcpy(c + i * ldc, edge + i * PANEL, (size_t)n * sizeof(float));
}

void gemm_in_tiles(float *c, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int64_t M, int64_t N,
                   int64_t K, float *scratch, Team *team) {
    enum { TASK_PRODUCTS = 1 << 24 }; /* multiply-adds: about ten microseconds */
    const int64_t lanes = ceil_div(K, PAIR);
    const int64_t depth = PAIR * round_up(ceil_div(lanes, ceil_div(lanes, KC)), SIDE); /* equal parts, at most KC */
    const int64_t columns = min64(NC, round_up(ceil_div(N, team->threads), PANEL));
    float *packed_a = scratch, *packed_b = scratch + (int64_t)KC * (MC + (int64_t)team->member * NC);
    tiles_begin();
    for (int64_t pc = 0; pc < K; pc += depth)
        for (int64_t ic = 0; ic < M; ic += MC) {
            const int64_t numbers = min64(depth, K - pc), steps = ceil_div(numbers, PAIR * SIDE), mc = min64(MC, M - ic);
            const int64_t rows = round_up(min64(mc, ceil_div(TASK_PRODUCTS, columns * numbers)), PANEL);
            const int64_t per_column = ceil_div(mc, rows), tasks = ceil_div(N, columns) * per_column;
            int64_t packed = -1; /* the first column in packed_b; -1: none */
            for_shared (group, ceil_div(mc, PACK_PANELS * PANEL), worth(PACK_PANELS * PANEL * numbers / 4), team) {
                const int64_t i = group * PACK_PANELS * PANEL;
                const Operand part = {element(a.data, (ic + i) * a.row_stride + pc * a.k_stride, a.memory),
                                      a.row_stride, a.k_stride, a.memory};
                pack(packed_a + i / PANEL * steps * STEP, part, min64(PACK_PANELS * PANEL, mc - i), numbers, 1);
            }
            for_shared (task, tasks, worth(rows * columns * numbers / 256), team) {
                const int64_t i0 = task % per_column * rows, j0 = task / per_column * columns, n = min64(columns, N - j0);
                if (packed != j0) {
                    const Operand part = {element(b.data, j0 * b.row_stride + pc * b.k_stride, b.memory), b.row_stride,
                                          b.k_stride, b.memory};
                    pack(packed_b, part, n, numbers, 0);
                }
                packed = j0;
                for (int64_t i = i0; i < min64(i0 + rows, mc); i += PANEL)
                    for (int64_t j = 0; j < n; j += PANEL)
                        microkernel(c + (ic + i) * ldc + j0 + j, ldc, packed_a + i / PANEL * steps * STEP,
                                    packed_b + j / PANEL * steps * STEP, steps, min64(PANEL, mc - i),
                                    min64(PANEL, n - j), pc == 0 && bias ? bias + j0 + j : NULL, accumulate || pc > 0);
            }
        }
    tiles_end();
}

#endif
