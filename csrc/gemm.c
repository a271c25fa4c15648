/* C (M,N) (+)= A (M,K) B (N,K)^T: the matrix product of the linear layers, forward and backward.
 *
 * Method: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with BLIS's names.
 * A microkernel keeps an MR x NR tile of C in registers and reads packed panels of A and B that are KC deep. A panel
 * interleaves MR rows of A (NR of B), so each step of the microkernel reads MR + NR consecutive floats for MR * NR
 * multiply-adds. Packing also transposes where needed and pads the edges with zeros: the microkernel has one case.
 *
 *   for each KC of K:
 *     for each part of C, one for each thread:   up to MC rows and all columns, or all rows and some columns
 *       for each NC columns of the part:
 *         pack B:                                NC x KC, in the thread's second-level cache
 *         for some rows, a task:                 the first time pack A: MC x KC in all
 *           for each MR rows of the task:        a panel of A: MR x KC, in the first-level cache
 *             for each NR columns: microkernel
 *
 * A thread packs what it multiplies: reading what another one has written costs more than packing some of it twice,
 * most of all where threads share no cache. A thread that has done its part takes tasks of others, and packs for them.
 * B, the weights of a linear layer, is read from memory once for MC rows of C. While the microkernel computes on one
 * block of B, it prefetches the thread's next block.
 *
 * No task divides a sum over K, so the order of each sum is the same with any number of threads.
 *
 * BF16: packing rounds to 16 bits and puts two numbers that follow each other in K into one lane. All sizes below count
 * lanes, so a panel has as many bytes and twice the K; a step of the microkernel multiplies both numbers of each lane
 * and adds the products in float.
 *
 * FP16: multiply-adds of halves are twice as fast as those of floats, but a sum of halves has 11 bits and ends at
 * 65504. So packing multiplies each row, as far as the panel goes, by a power of two that brings its largest number
 * into [8, 16); HALF_BLOCK products are added in halves, which is at most 64 * 16 * 16, and the sums of these blocks in
 * float. What is too small for a half is below 2^-27 of the largest number. Storing C takes the powers out again: they
 * stand behind the numbers of their panel. */

#include "internal.h"

/* MR * NV accumulators, NV vectors of B and one of A must fit the registers: 32 with AVX-512 and NEON, else 16.
 * To look for spills, run objdump -d on the extension and count the stores to the stack inside the loop of FMAs. */
#if VF_LEN == 16
enum { MR = 12, NV = 2 };
#elif VF_LEN == 8
enum { MR = 6, NV = 2 };
#elif defined(__ARM_NEON)
enum { MR = 8, NV = 3 };
#else
enum { MR = 4, NV = 2 };
#endif
enum { NR = NV * VF_LEN };
enum { UNROLL = VF_LEN == 16 ? 8 : 1 }; /* steps of the microkernel; more than one would spill 16 registers */

/* Bytes in brackets are those with AVX-512. */
enum {
    KC = 768,           /* large: C is read and written rarely; a panel of A (36 KB) serves NC / NR tiles */
    MC = 86 * MR,       /* rows of A that a thread packs at a time (3 MB); large: each packed B serves more rows */
    NC = 4 * NR,        /* rows of B that a thread packs at a time (384 KB) */
    PREFETCH_STEPS = 8, /* steps of the microkernel for each prefetched line */
};

int64_t gemm_rows(void) { return MC; }

/* Columns of C in a panel of B, and floats of memory that a panel of these rows or columns takes. In FP16 a float has
 * VH_PARTS halves, and a row has one power of two more. */
enum { HALF_COLUMNS = NR * VH_PARTS };
static inline int64_t panel_columns(const int type) { return type == FP16 ? HALF_COLUMNS : NR; }
static inline int64_t panel_size(int64_t rows, int64_t kc, const int type) {
    return type == FP16 ? rows * (kc + VH_PARTS) / VH_PARTS : rows * kc;
}

/* LINE: room for the powers, which leaves all blocks on whole cache lines. */
int64_t gemm_scratch_size(int threads) { return (int64_t)threads * (KC + LINE) * (MC + NC); }

/* ---- packing ------------------------------------------------------------------------------------------------ */

/* Packs n rows of x into panels of `width` rows (MR or NR): panels[p * kc + k * width + i] = x(p + i, k) for p a
 * multiple of width, i < width, k < kc. Rows from n on are 0. x(i, k) is a lane; the rows have `numbers` numbers. */
static inline __attribute__((always_inline)) void pack_from(float *restrict panels, Operand x, int64_t n,
                                                            int64_t numbers, const int64_t width, const int type,
                                                            const int memory) {
    enum { DISTANCE = 8 }; /* how many k ahead of the copy the prefetch runs */
    const int64_t each = numbers_of_lane(type), kc = ceil_div(numbers, each);
    if (x.k_stride == 1) {
        for (int64_t p = 0; p < n; p += width)
            transpose(panels + p * kc, width, element(x.data, p * x.row_stride, memory), x.row_stride,
                      min64(width, n - p), numbers, width, type, memory);
        return;
    }
    for (int64_t k = 0; k < kc; k++) { /* all rows of one k are contiguous: copy in memory order */
        const void *source = element(x.data, k * each * x.k_stride, memory);
        if (k + DISTANCE < kc)
            for (int64_t i = 0; i < n; i += LINE)
                __builtin_prefetch(element(source, DISTANCE * each * x.k_stride + i, memory));
        for (int64_t p = 0; p < n; p += width)
            for (int64_t i = 0; i < width; i += VF_LEN) {
                const int64_t left = min64(n - p, width) - i;
                const void *first = element(source, p + i, memory);
                vf row = vf_set1(0.0f);
                if (left > 0 && type == BF16)
                    row = load_pair(first, k * each + 1 < numbers ? element(first, x.k_stride, memory) : NULL, left,
                                    memory);
                else if (left > 0)
                    row = vf_load_n(first, left);
                vf_store_n(panels + p * kc + k * width + i, row, width - i);
            }
    }
}

/* The largest size among the numbers of each of n rows; 0 from n to `width`, a multiple of VF_LEN. */
static inline void row_maxima(float *largest, Operand x, int64_t n, int64_t numbers, int64_t width) {
    const float *data = x.data;
    for (int64_t r = 0; r < width; r += x.k_stride == 1 ? 1 : VF_LEN) {
        vf found = vf_set1(0.0f);
        if (x.k_stride == 1 && r < n)
            for (int64_t k = 0; k < numbers; k += VF_LEN)
                found = vf_max(found, vf_abs(vf_load_n(data + r * x.row_stride + k, numbers - k)));
        else if (r < n)
            for (int64_t k = 0; k < numbers; k++)
                found = vf_max(found, vf_abs(vf_load_n(data + k * x.k_stride + r, n - r)));
        if (x.k_stride == 1)
            largest[r] = vf_hmax(found);
        else
            vf_store(largest + r, found);
    }
}

/* pack_from() in FP16: a panel has kc * width halves, then the inverse of the power of two of each of its rows. x is of
 * floats. */
static inline __attribute__((always_inline)) void pack_halves(float *panels, Operand x, int64_t n, int64_t numbers,
                                                              const int64_t width) {
    enum { LANES = HALF_COLUMNS + MR }; /* at least round_up(width, VF_LEN) */
    const int64_t lanes = round_up(width, VF_LEN);
    float power[LANES], rows[VF_LEN * LANES];
    for (int64_t p = 0; p < n; p += width) {
        const Operand from = operand_from(x, p, 0);
        const int64_t count = min64(width, n - p);
        half *to = (half *)(panels + panel_size(p, numbers, FP16));
        row_maxima(power, from, count, numbers, lanes);
        for (int64_t r = 0; r < width; r += VF_LEN) { /* exponents, moved by 127: 130 is that of 8 */
            const vf largest = vf_max(vf_set1(0x1p-121f), vf_load(power + r)); /* else the power would be too large */
            const vf_bits exponent = vf_to_bits(largest) & 0x7f800000, opposite = 127 + 130 - (exponent >> 23);
            vf_store(power + r, vf_of_bits(opposite << 23));
            vf_store_n((float *)(to + numbers * width) + r, vf_of_bits((254 - opposite) << 23), width - r);
        }
        for (int64_t k = 0; k < numbers; k += VF_LEN) {
            const int64_t steps = min64(VF_LEN, numbers - k);
            if (x.k_stride == 1)
                transpose(rows, lanes, element(from.data, k, FP32), x.row_stride, count, steps, lanes, FP32, FP32);
            for (int64_t s = 0; s < steps; s++)
                for (int64_t r = 0; r < width; r += VF_LEN) {
                    vf row = vf_set1(0.0f);
                    if (x.k_stride == 1)
                        row = vf_load(rows + s * lanes + r);
                    else if (r < count)
                        row = vf_load_n((const float *)from.data + (k + s) * x.k_stride + r, count - r);
                    vh_store_n(to + (k + s) * width + r, vf_mul(row, vf_load(power + r)), width - r);
                }
        }
    }
}

static inline __attribute__((always_inline)) void pack(float *restrict panels, Operand x, int64_t n, int64_t numbers,
                                                       const int64_t width, const int type) {
    if (type == FP16)
        pack_halves(panels, x, n, numbers, width);
    else if (type == BF16 && x.memory == BF16)
        pack_from(panels, x, n, numbers, width, type, BF16);
    else
        pack_from(panels, x, n, numbers, width, type, FP32);
}

/* Memory to prefetch: `runs` runs of `length` consecutive floats, which start `stride` floats apart. `next` is the next
 * line, `end` the end of its run. */
typedef struct {
    const float *next, *end;
    int64_t runs, length, stride;
} Prefetch;

static inline void prefetch_line(Prefetch *prefetch) {
    if (prefetch->runs <= 0) return;
    __builtin_prefetch(prefetch->next, 0, 2);
    prefetch->next += LINE;
    if (prefetch->next < prefetch->end) return;
    prefetch->next = prefetch->end - prefetch->length + prefetch->stride;
    prefetch->end += prefetch->stride;
    prefetch->runs--;
}

/* The memory that packing n rows and kc columns of x reads. Two numbers of BF16 lie in a float. */
static Prefetch prefetch_for_pack(Operand x, int64_t n, int64_t kc) {
    const int64_t numbers = x.memory == BF16 ? 2 : 1, length = ceil_div(x.k_stride == 1 ? kc : n, numbers);
    const float *data = x.data;
    return x.k_stride == 1 ? (Prefetch){data, data + length, n, length, x.row_stride / numbers}
                           : (Prefetch){data, data + length, kc, length, x.k_stride / numbers};
}

/* ---- microkernel -------------------------------------------------------------------------------------------- */

/* How a finished tile is stored: c = tile + bias, or c += tile. */
typedef struct {
    const float *bias;
    int accumulate;
} Epilogue;

/* acc (MR x NR) += a (MR) b (NR)^T, one step of k. */
static inline __attribute__((always_inline)) void multiply_add(vf acc[MR][NV], const float *a, const float *b,
                                                               const int type) {
    vf bk[NV];
    for (int j = 0; j < NV; j++) bk[j] = vf_load(b + j * VF_LEN);
    for (int i = 0; i < MR; i++) {
        vf ai = vf_set1(a[i]);
        for (int j = 0; j < NV; j++) acc[i][j] = multiply_lanes(ai, bk[j], acc[i][j], type);
    }
}

/* c (m x n, row stride ldc) from packed panels a (kc x MR) and b (kc x NR); m <= MR, n <= NR. */
static inline __attribute__((always_inline)) void microkernel(float *restrict c, int64_t ldc, const float *restrict a,
                                                              const float *restrict b, int64_t kc, int64_t m, int64_t n,
                                                              Epilogue epilogue, Prefetch *prefetch, const int type) {
    vf acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = vf_set1(0.0f);
    for (int64_t i = 0; i < m; i++) /* C arrives from memory during the products */
        for (int j = 0; j < NV; j++) __builtin_prefetch(c + i * ldc + j * VF_LEN, 0);
    int64_t k = 0;
    for (; k + PREFETCH_STEPS <= kc; k += PREFETCH_STEPS, a += PREFETCH_STEPS * MR, b += PREFETCH_STEPS * NR) {
        prefetch_line(prefetch);
#pragma GCC unroll UNROLL
        for (int step = 0; step < PREFETCH_STEPS; step++) multiply_add(acc, a + step * MR, b + step * NR, type);
    }
    for (; k < kc; k++, a += MR, b += NR) multiply_add(acc, a, b, type);
    if (m == MR && n == NR) {
        for (int j = 0; j < NV; j++) {
            vf add = epilogue.bias ? vf_load(epilogue.bias + j * VF_LEN) : vf_set1(0.0f);
            for (int i = 0; i < MR; i++) {
                float *to = c + i * ldc + j * VF_LEN;
                vf_store(to, vf_add(acc[i][j], epilogue.accumulate ? vf_load(to) : add));
            }
        }
    } else { /* an edge: through a full tile in memory, because acc stays in registers only with constant indices */
        float tile[MR * NR];
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++) vf_store(tile + i * NR + j * VF_LEN, acc[i][j]);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                float add = epilogue.bias ? epilogue.bias[j] : 0.0f;
                c[i * ldc + j] = tile[i * NR + j] + (epilogue.accumulate ? c[i * ldc + j] : add);
            }
    }
}

/* microkernel() in FP16. */
static void microkernel_halves(float *c, int64_t ldc, const float *packed_a, const float *packed_b, int64_t kc,
                               int64_t m, int64_t n, Epilogue epilogue, Prefetch *prefetch) {
    const half *a = (const half *)packed_a, *b = (const half *)packed_b;
    const float *a_powers = (const float *)(a + kc * MR), *b_powers = (const float *)(b + kc * HALF_COLUMNS);
    float tile[MR * HALF_COLUMNS];
    memset(tile, 0, sizeof tile);
    for (int64_t first = 0; first < kc; first += HALF_BLOCK) {
        const int64_t steps = min64(HALF_BLOCK, kc - first);
        vh acc[MR][NV];
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++) acc[i][j] = vh_zero();
        for (int64_t k = 0; k < steps; k += PREFETCH_STEPS / 2) prefetch_line(prefetch); /* a step is half as long */
#pragma GCC unroll 1
        for (int64_t k = 0; k < steps; k++, a += MR, b += HALF_COLUMNS) {
            vh bk[NV];
            for (int j = 0; j < NV; j++) bk[j] = vh_load(b + j * VH_PARTS * VF_LEN);
            for (int i = 0; i < MR; i++) {
                const vh ai = vh_set1(a[i]);
                for (int j = 0; j < NV; j++) acc[i][j] = vh_fma(ai, bk[j], acc[i][j]);
            }
        }
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++)
                for (int part = 0; part < VH_PARTS; part++) {
                    float *sums = tile + i * HALF_COLUMNS + (j * VH_PARTS + part) * VF_LEN;
                    vf_store(sums, vf_add(vf_load(sums), vh_part(acc[i][j], part)));
                }
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j += VF_LEN) {
            /* the smaller power first: the result is exact, and not infinite on the way to a number */
            const vf a_power = vf_set1(a_powers[i]), b_power = vf_load(b_powers + j);
            const vf sums = vf_mul(vf_load(tile + i * HALF_COLUMNS + j), vf_min(a_power, b_power));
            vf add = vf_set1(0.0f);
            if (epilogue.accumulate)
                add = vf_load_n(c + i * ldc + j, n - j);
            else if (epilogue.bias)
                add = vf_load_n(epilogue.bias + j, n - j);
            vf_store_n(c + i * ldc + j, vf_add(vf_mul(sums, vf_max(a_power, b_power)), add), n - j);
        }
}

/* c (m x n) from packed a and b. A panel of A stays in the first-level cache while all panels of B are read. */
static inline __attribute__((always_inline)) void multiply_packed(float *c, int64_t ldc, const float *a, const float *b,
                                                                  int64_t m, int64_t n, int64_t kc, Epilogue epilogue,
                                                                  Prefetch *prefetch, const int type) {
    const float *bias = epilogue.bias;
    const int64_t columns = panel_columns(type);
    for (int64_t i = 0; i < m; i += MR)
        for (int64_t j = 0; j < n; j += columns) {
            const float *rows = a + panel_size(i, kc, type), *strip = b + panel_size(j, kc, type);
            float *to = c + i * ldc + j;
            if (bias) epilogue.bias = bias + j;
            if (type == FP16)
                microkernel_halves(to, ldc, rows, strip, kc, min64(MR, m - i), min64(columns, n - j), epilogue,
                                   prefetch);
            else
                microkernel(to, ldc, rows, strip, kc, min64(MR, m - i), min64(columns, n - j), epilogue, prefetch,
                            type);
        }
}

/* ---- the product -------------------------------------------------------------------------------------------- */

enum { TASK_PRODUCTS = 1 << 22 }; /* multiply-adds of a task: some fifty microseconds */

/* How the threads share C: a part for each, of all columns and some rows or of all rows and some columns. A part is
 * divided into tasks, `chunks` of rows times `blocks` of columns. */
typedef struct {
    int by_rows;
    int64_t part_rows, part_columns, rows, columns, chunks, blocks;
} Division;

/* Of the two divisions that in which the threads pack less. A task has many columns, because B is packed for them, and
 * few rows, so that no thread waits long for the last task. `width` is that of a panel of B. */
static Division divide(int64_t m, int64_t N, int64_t kc, int64_t width, int by_rows, int threads) {
    Division d = {.by_rows = by_rows};
    d.part_rows = by_rows ? round_up(ceil_div(m, threads), MR) : m;
    d.part_columns = by_rows ? N : round_up(ceil_div(N, threads), width);
    d.columns = round_up(ceil_div(d.part_columns, ceil_div(d.part_columns, NC / NR * width)), width);
    d.rows = round_up(min64(d.part_rows, ceil_div(TASK_PRODUCTS, d.columns * kc)), MR);
    d.chunks = ceil_div(d.part_rows, d.rows);
    d.blocks = ceil_div(d.part_columns, d.columns);
    return d;
}

/* gemm() compiled for one type of products. */
static inline __attribute__((always_inline)) void gemm_of_type(float *c, int64_t ldc, Operand a, Operand b,
                                                               const float *bias, int accumulate, int64_t M, int64_t N,
                                                               int64_t K, float *scratch, Team *team, const int type) {
    const int64_t each = numbers_of_lane(type), lanes = ceil_div(K, each);
    const int64_t depth = round_up(ceil_div(lanes, ceil_div(lanes, KC)), PREFETCH_STEPS); /* equal parts, at most KC */
    const int by_rows = M > N;
    const int64_t parts = by_rows ? team->threads : 1, width = panel_columns(type);
    const int64_t rounds = ceil_div(M, MC * parts), most = round_up(ceil_div(M, rounds), MR * parts); /* equal, too */
    float *packed_a = scratch + gemm_scratch_size(team->member), *packed_b = packed_a + (int64_t)(KC + LINE) * MC;
    expect_tasks(team, M * N * K / WAKE_PRODUCTS);
    for (int64_t pc = 0; pc < K; pc += depth * each)
        for (int64_t ic = 0; ic < M; ic += most) {
            const int64_t numbers = min64(depth * each, K - pc), kc = ceil_div(numbers, each), mc = min64(most, M - ic);
            const Division d = divide(mc, N, kc, width, by_rows, team->threads);
            /* what this thread has packed: chunks of A of a part, and the first column of a block of B */
            uint8_t has_chunk[MC / MR] = {0};
            int64_t its_part = 0, its_column = -1;
            Prefetch prefetch = {0};
            for_shared (task, team->threads * d.blocks * d.chunks, worth(d.rows * d.columns * kc / 16), team) {
                const int64_t part = task / (d.blocks * d.chunks), chunk = task % d.chunks;
                const int64_t block = task / d.chunks % d.blocks;
                const int64_t first = by_rows ? part * d.part_rows : 0, i = first + chunk * d.rows;
                const int64_t left = by_rows ? 0 : part * d.part_columns, j = left + block * d.columns;
                const int64_t m = min64(min64(d.rows, first + d.part_rows - i), mc - i);
                const int64_t n = min64(min64(d.columns, left + d.part_columns - j), N - j);
                float *panels = packed_a + panel_size(i - first, kc, type);
                if (m <= 0 || n <= 0) continue;
                if (by_rows && its_part != part) memset(has_chunk, 0, sizeof has_chunk);
                its_part = part;
                if (!has_chunk[chunk]) pack(panels, operand_from(a, ic + i, pc), m, numbers, MR, type);
                has_chunk[chunk] = 1;
                if (its_column != j) {
                    const int64_t next = j + n, end = min64(left + d.part_columns, N);
                    pack(packed_b, operand_from(b, j, pc), n, numbers, width, type);
                    prefetch = (Prefetch){0};
                    if (next < end) /* most likely the thread's next columns */
                        prefetch = prefetch_for_pack(operand_from(b, next, pc), min64(d.columns, end - next), numbers);
                }
                its_column = j;
                multiply_packed(c + (ic + i) * ldc + j, ldc, panels, packed_b, m, n, kc,
                                (Epilogue){pc == 0 && bias ? bias + j : NULL, accumulate || pc > 0}, &prefetch, type);
            }
        }
}

void gemm(float *c, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int precision, int64_t M,
          int64_t N, int64_t K, float *scratch, Team *team) {
    if (precision == BF16)
#ifdef HAS_TILES
        gemm_in_tiles(c, FP32, ldc, a, b, bias, accumulate, M, N, K, scratch, team);
#else
        gemm_of_type(c, ldc, a, b, bias, accumulate, M, N, K, scratch, team, BF16);
#endif
    else if (precision == FP16)
        gemm_of_type(c, ldc, a, b, bias, accumulate, M, N, K, scratch, team, FP16);
    else
        gemm_of_type(c, ldc, a, b, bias, accumulate, M, N, K, scratch, team, FP32);
}
