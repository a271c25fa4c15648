/* C (M,N) (+)= A (M,K) B (N,K)^T of BF16 numbers on the tiles of AMX, which Intel calls advanced matrix extensions:
 * gemm() where a CPU has them.
 *
 * A tile is 16 rows of 64 bytes. One instruction multiplies a tile of A, 16 rows of 32 numbers along K, by a tile of B,
 * 16 pairs along K for each of 16 columns, and adds the products to a tile of 16 x 16 floats: 16,384 operations in 16
 * cycles. So all else takes longer: the second-level cache gives 50 bytes a cycle, what lies behind it less than 10.
 * The method of gemm.c serves here with other sizes. Sums that become BF16 stay in the second-level cache:
 *
 *   for each KC of K:
 *     for each MC rows of C:                     threads pack A together: MC x KC
 *       for each task, shared by the threads:    a block of C, and
 *         pack B, unless the thread has it:      its columns x KC: in the thread's second-level cache
 *         for each 32 rows of the block:
 *           for each DEPTH of KC:                a panel of A: 32 x DEPTH, in the first-level cache
 *             for each 32 columns: microkernel   2 x 2 tiles of C; for each tile that is read, one is multiplied
 *
 * A panel is 32 rows of A (or B), KC deep: for each 32 numbers along K, two tiles one after the other. A tile of A has
 * a row of A in each row, a tile of B a pair along K. Memory that lies the other way is transposed, 16 x 16 lanes at a
 * time. The edges are padded with zeros. Of 32 numbers along K the products of even and of odd ones are summed apart,
 * then both sums are added to C's; denormals are 0. */

#include "internal.h"

#ifdef HAS_TILES

enum {
    PANEL = 2 * SIDE,
    PAIR = 2,                      /* numbers in a lane */
    DEEP = PAIR * SIDE,            /* numbers along K in a tile */
    STEP = 2 * SIDE * SIDE,        /* floats of a panel's two tiles */
    DEPTH_STEPS = 12,              /* tiles along K that a microkernel goes: a panel of A has 24 KB of them */
    KC = 48 * DEEP,                /* numbers */
    MC = 128 * PANEL,              /* rows of A packed at a time: 12 MB at most, in the last-level cache */
    BLOCK_B = 16 * PANEL * KC / 2, /* numbers of B that a thread packs at a time: 768 KB */
    COLUMNS = 12 * PANEL,          /* of C in a task at most */
    BLOCK_C = PANEL * COLUMNS,     /* floats of the sums of a row of panels: 48 KB */
    PACK_PANELS = 4,               /* panels of A in a task of packing */
    WORTH = 1 << 22                /* multiply-adds: about two microseconds */
};

int64_t tiles_depth(void) { return KC; }

int64_t tiles_scratch_size(int threads) { return (int64_t)MC * KC / PAIR + threads * (BLOCK_B / PAIR + BLOCK_C); }

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

/* Packs n rows of x, `numbers` along K, into panels. What is read are DEEP runs of memory after each other, rows or
 * numbers along K, part by part of DEEP numbers. Meanwhile the next DEEP runs come into the second-level cache, in the
 * order of memory, which memory gives faster than part by part. */
static inline __attribute__((always_inline)) void pack_of(float *panels, Operand x, int64_t n, int64_t numbers,
                                                          const int by_row, const int k_contiguous, const int memory) {
    const int64_t steps = ceil_div(numbers, DEEP), count = ceil_div(n, PANEL);
    const int64_t outer = k_contiguous ? count : steps, parts = k_contiguous ? steps : count;
    const int64_t runs = k_contiguous ? n : numbers, length = k_contiguous ? numbers : n;
    const int64_t stride = k_contiguous ? x.row_stride : x.k_stride, line = memory == FP32 ? LINE : PAIR * LINE;
    for (int64_t i = 0; i < outer; i++) {
        int64_t run = (i + 1) * DEEP, at = 0; /* of the next line to prefetch */
        for (int64_t part = 0; part < parts; part++) {
            for (int64_t l = 0; l < DEEP * DEEP / line && run < runs; l++) {
                __builtin_prefetch(element(x.data, run * stride + at, memory), 0, 2);
                at += line;
                if (at >= length) {
                    at = 0;
                    run++;
                }
            }
            const int64_t panel = k_contiguous ? i : part, step = k_contiguous ? part : i;
            for (int64_t lower = 0; lower < 2; lower++) {
                const int64_t row = panel * PANEL + lower * SIDE, k = step * DEEP;
                pack_tile(panels + (panel * steps + step) * STEP + lower * SIDE * SIDE, x, row, k,
                          min64(SIDE, n > row ? n - row : 0), min64(DEEP, numbers - k), by_row, k_contiguous, memory);
            }
        }
    }
}

static void pack(float *panels, Operand x, int64_t n, int64_t numbers, const int by_row) {
    if (x.k_stride == 1 && x.memory == BF16)
        pack_of(panels, x, n, numbers, by_row, 1, BF16);
    else if (x.k_stride == 1 && x.memory == FP16)
        pack_of(panels, x, n, numbers, by_row, 1, FP16);
    else if (x.k_stride == 1)
        pack_of(panels, x, n, numbers, by_row, 1, FP32);
    else if (x.memory == BF16)
        pack_of(panels, x, n, numbers, by_row, 0, BF16);
    else
        pack_of(panels, x, n, numbers, by_row, 0, FP32);
}

/* Sums of a tile, with rows of PANEL floats, that are still to be stored as BF16: m x n, row stride ld. */
typedef struct {
    const float *sums;
    uint16_t *to;
    int64_t ld, m, n;
} Rounding;

static inline void round_rows(Rounding *rounding, int64_t rows) {
    for (; rows > 0 && rounding->m > 0; rows--, rounding->m--, rounding->sums += PANEL, rounding->to += rounding->ld)
        for (int64_t j = 0; j < rounding->n; j += VF_LEN)
            store_n(rounding->to, j, vf_load(rounding->sums + j), rounding->n - j, BF16);
}

/* What a microkernel does beside its products, a part in each step, while the tiles compute. */
typedef struct {
    const float *ahead; /* the next panel of A, of which `lines` lines come into the second-level cache in a step */
    int64_t lines;
    Rounding rounding; /* of the last microkernel's sums */
} Beside;

static inline void do_beside(Beside *beside) {
    for (int64_t line = 0; line < beside->lines; line++, beside->ahead += LINE) __builtin_prefetch(beside->ahead, 0, 2);
    round_rows(&beside->rounding, ceil_div(PANEL, DEPTH_STEPS));
}

/* to (m x n, row stride ld; m, n <= PANEL) = a b^T of two panels, plus old (row stride ld_old) or else bias (n), of
 * which both may be NULL. */
static inline void microkernel(float *to, int64_t ld, const float *old, int64_t ld_old, const float *a, const float *b,
                               int64_t steps, int64_t m, int64_t n, const float *bias, Beside *beside) {
    float edge[PANEL * PANEL];
    const int whole = m == PANEL && n == PANEL;
    if (!whole && (old || bias)) {
        for (int64_t i = 0; i < m; i++)
            memcpy(edge + i * PANEL, old ? old + i * ld_old : bias, (size_t)n * sizeof(float));
        old = edge;
        ld_old = PANEL;
    }
    if (old) {
        const int64_t row = ld_old * 4; /* bytes */
        tile_load(0, old, row);
        tile_load(1, old + SIDE, row);
        tile_load(2, (const char *)old + SIDE * row, row);
        tile_load(3, (const char *)(old + SIDE) + SIDE * row, row);
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
        do_beside(beside);
        tile_load(6, b, 4 * SIDE);
        tile_load(4, a, 4 * SIDE);
        tile_load(7, b + SIDE * SIDE, 4 * SIDE);
        tile_load(5, a + SIDE * SIDE, 4 * SIDE);
        tile_dot_bf16(0, 4, 6);
        tile_dot_bf16(1, 4, 7);
        tile_dot_bf16(2, 5, 6);
        tile_dot_bf16(3, 5, 7);
    }
    float *out = whole ? to : edge;
    const int64_t row = (whole ? ld : PANEL) * 4;
    tile_store(0, out, row);
    tile_store(1, out + SIDE, row);
    tile_store(2, (char *)out + SIDE * row, row);
    tile_store(3, (char *)(out + SIDE) + SIDE * row, row);
    for (int64_t i = 0; !whole && i < m; i++) memcpy(to + i * ld, edge + i * PANEL, (size_t)n * sizeof(float));
}

/* A block of C (m x n) from packed a and b, `steps` tiles along K, plus the old c or else bias. C is FP32, or BF16
 * whose sums along the first steps are kept in `block`, a row of panels. */
static void multiply_packed(void *c, int type, int64_t ldc, float *block, const float *a, const float *b, int64_t m,
                            int64_t n, int64_t steps, const float *bias, int accumulate) {
    float sums[2][PANEL * PANEL];
    Beside beside = {0};
    int turn = 0;
    for (int64_t i = 0; i < m; i += PANEL)
        for (int64_t s = 0; s < steps; s += DEPTH_STEPS) {
            const int64_t depth = min64(DEPTH_STEPS, steps - s);
            const int first = s == 0, last = s + depth == steps;
            const float *panel = a + i / PANEL * steps * STEP + s * STEP;
            beside.ahead = panel + depth * STEP;
            beside.lines = !last || i + PANEL < m ? ceil_div(STEP / LINE, ceil_div(n, PANEL)) : 0;
            for (int64_t j = 0; j < n; j += PANEL) {
                const int64_t rows = min64(PANEL, m - i), columns = min64(PANEL, n - j);
                const float *strip = b + j / PANEL * steps * STEP + s * STEP, *add = bias && first ? bias + j : NULL;
                float *to = type == FP32 ? (float *)c + i * ldc + j : block + j * PANEL;
                const int64_t ld = type == FP32 ? ldc : PANEL;
                const float *old = first && !accumulate ? NULL : to;
                if (type == BF16 && last) to = sums[turn ^= 1];
                microkernel(to, ld, old, ld, panel, strip, depth, rows, columns, add, &beside);
                if (type == BF16 && last) {
                    round_rows(&beside.rounding, PANEL);
                    beside.rounding = (Rounding){to, (uint16_t *)c + i * ldc + j, ldc, rows, columns};
                }
            }
        }
    round_rows(&beside.rounding, PANEL);
}

void gemm_in_tiles(void *c, int c_type, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int64_t M,
                   int64_t N, int64_t K, float *scratch, Team *team) {
    const int64_t depth = round_up(ceil_div(K, ceil_div(K, KC)), DEEP); /* equal parts, at most KC */
    /* equal blocks of columns, and one for each thread */
    const int64_t most = min64(COLUMNS, BLOCK_B / depth / PANEL * PANEL), blocks = ceil_div(N, most);
    const int64_t columns = round_up(ceil_div(N, blocks > team->threads ? blocks : team->threads), PANEL);
    float *packed_a = scratch;
    float *packed_b = scratch + (int64_t)MC * KC / PAIR + (int64_t)team->member * (BLOCK_B / PAIR + BLOCK_C);
    float *block = packed_b + BLOCK_B / PAIR;
    expect_tasks(team, M * N * K / WORTH);
    tiles_begin();
    for (int64_t pc = 0; pc < K; pc += depth)
        for (int64_t ic = 0; ic < M; ic += MC) {
            const int64_t numbers = min64(depth, K - pc), steps = ceil_div(numbers, DEEP), mc = min64(MC, M - ic);
            const int64_t groups = ceil_div(N, columns), fair = ceil_div(mc * groups, 8 * (int64_t)team->threads);
            const int64_t rows = round_up(min64(mc, fair), PANEL), per_column = ceil_div(mc, rows);
            int64_t packed = -1; /* the first column in packed_b; -1: none */
            for_shared (group, ceil_div(mc, PACK_PANELS * PANEL), worth(PACK_PANELS * PANEL * numbers / 4), team) {
                const int64_t i = group * PACK_PANELS * PANEL;
                pack(packed_a + i / PANEL * steps * STEP, operand_from(a, ic + i, pc),
                     min64(PACK_PANELS * PANEL, mc - i), numbers, 1);
            }
            for_shared (task, groups * per_column, worth(rows * columns * numbers / 256), team) {
                const int64_t i = task % per_column * rows, j = task / per_column * columns;
                const int64_t m = min64(rows, mc - i), n = min64(columns, N - j);
                if (packed != j) pack(packed_b, operand_from(b, j, pc), n, numbers, 0);
                packed = j;
                multiply_packed((char *)c + ((ic + i) * ldc + j) * (c_type == FP32 ? 4 : 2), c_type, ldc, block,
                                packed_a + i / PANEL * steps * STEP, packed_b, m, n, steps,
                                pc == 0 && bias ? bias + j : NULL, accumulate || pc > 0);
            }
        }
    tiles_end();
}

void product_on_tiles(float *c, int64_t ldc, Operand left, const float *b, int64_t ldb, int64_t m, int64_t n,
                      int64_t depth, int accumulate) {
    for (int64_t i = 0; i < m; i += SIDE)
        for (int64_t j = 0; j < n; j += 4 * SIDE) {
            const int64_t columns = min64(4, (n - j) / SIDE);
            const float *a = (const float *)left.data + i * left.row_stride, *right = b + j;
            float *to = c + i * ldc + j;
            if (accumulate) {
                tile_load(0, to, 4 * ldc);
                if (columns > 1) tile_load(1, to + SIDE, 4 * ldc);
                if (columns > 2) tile_load(2, to + 2 * SIDE, 4 * ldc);
                if (columns > 3) tile_load(3, to + 3 * SIDE, 4 * ldc);
            } else {
                tile_zero(0);
                tile_zero(1);
                tile_zero(2);
                tile_zero(3);
            }
            for (int64_t k = 0; k < depth; k += SIDE, right += SIDE * ldb) {
                tile_load(4, a + k, 4 * left.row_stride);
                tile_load(5, right, 4 * ldb);
                tile_dot_bf16(0, 4, 5);
                if (columns > 1) {
                    tile_load(6, right + SIDE, 4 * ldb);
                    tile_dot_bf16(1, 4, 6);
                }
                if (columns > 2) {
                    tile_load(7, right + 2 * SIDE, 4 * ldb);
                    tile_dot_bf16(2, 4, 7);
                }
                if (columns > 3) {
                    tile_load(5, right + 3 * SIDE, 4 * ldb);
                    tile_dot_bf16(3, 4, 5);
                }
            }
            tile_store(0, to, 4 * ldc);
            if (columns > 1) tile_store(1, to + SIDE, 4 * ldc);
            if (columns > 2) tile_store(2, to + 2 * SIDE, 4 * ldc);
            if (columns > 3) tile_store(3, to + 3 * SIDE, 4 * ldc);
        }
}

#endif
