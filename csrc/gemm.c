/* C (+)= A B^T with every transposition hidden in packing: the matrix product of the linear layers.
 *
 * Method: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with BLIS's names.
 * A microkernel keeps an MR x NR tile of C in registers and walks packed panels of A and B, KC deep. A panel holds MR
 * rows of A (NR of B) interleaved, so that every step of the microkernel reads MR + NR consecutive floats and does
 * MR * NR multiply-adds. Edges are packed with zeros: the microkernel never sees a partial tile.
 *
 *   for each KC of the sum:
 *     for each MB rows of C:                  all threads pack A together: MB x KC, in the last-level cache
 *       for each NT columns and some rows, in parallel: a thread packs B for itself: NT x KC, in its second-level
 * cache, unless it has it from the rows before for each MR rows, each NR columns:      packed A: MR x KC, in the
 * first-level cache microkernel
 *
 * B, the weights of a linear layer, is read once from memory for MB rows of C, and while the microkernel computes on
 * one block of it, the lines of the thread's next block are called into the cache (Ahead).
 *
 * Every element of C is summed in the same order whatever the thread count is. */

#include "internal.h"

/* MR * NV accumulators, NV of B and one of A must fit the registers: 32 vectors with AVX-512 and NEON, else 16.
 * To look for spills: objdump -d on the extension and count stores to the stack inside the loop of the FMAs. */
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

/* In brackets the bytes with AVX-512. */
enum {
    KC = 768,     /* deep, so that C is read and written seldom; MR x KC of A (36 KB) is used for NT / NR tiles */
    MB = 86 * MR, /* rows packed at a time (3 MB); many, since each row of C uses a packed B once */
    NT = 4 * NR,  /* columns a thread packs at a time (384 KB) */
    PACE = 8,     /* steps of the microkernel for which one line is called into the cache */
    GROUP = 8     /* panels of A packed together */
};

int64_t gemm_scratch_size(int threads) { return (int64_t)KC * (MB + (int64_t)threads * NT); }

/* ---- packing ------------------------------------------------------------------------------------------------ */

/* Panels of `width` (MR or NR) rows for n rows of x: panels[p * kc + k * width + i] = x(p + i, k), p a multiple of
 * width, i < width, k < kc; rows from n on are 0. */
static inline __attribute__((always_inline)) void pack(float *restrict panels, Operand x, int64_t n, int64_t kc,
                                                       const int64_t width) {
    enum { NEAR = 8 }; /* how many k before its turn a line is called into the cache */
    if (x.k_stride == 1) {
        for (int64_t p = 0; p < n; p += width)
            transpose(panels + p * kc, width, x.data + p * x.stride, x.stride, min64(width, n - p), kc, width);
        return;
    }
    for (int64_t k = 0; k < kc; k++) { /* the rows of a k are contiguous: a copy, in the order of memory */
        const float *source = x.data + k * x.k_stride;
        if (k + NEAR < kc)
            for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(source + NEAR * x.k_stride + i);
        for (int64_t p = 0; p < n; p += width)
            for (int64_t i = 0; i < width; i += VF_LEN) {
                const int64_t left = n - p - i;
                vf row = left <= 0 ? vf_set1(0.0f) : vf_load_n(source + p + i, min64(left, width - i));
                vf_store_n(panels + p * kc + k * width + i, row, width - i);
            }
    }
}

/* x with its first row and first k moved on. */
static inline Operand shifted(Operand x, int64_t row, int64_t k) {
    x.data += row * x.stride + k * x.k_stride;
    return x;
}

/* Memory that will be wanted soon: `runs` runs of `length` floats, `stride` apart, of which the first is at `next`. */
typedef struct {
    const float *next, *end;
    int64_t runs, length, stride;
} Ahead;

static inline void call_a_line(Ahead *ahead) {
    if (ahead->runs <= 0) return;
    __builtin_prefetch(ahead->next, 0, 2);
    ahead->next += LINE;
    if (ahead->next < ahead->end) return;
    ahead->next = ahead->end - ahead->length + ahead->stride;
    ahead->end += ahead->stride;
    ahead->runs--;
}

/* What packing n rows and kc columns of x will read. */
static Ahead to_be_packed(Operand x, int64_t n, int64_t kc) {
    return x.k_stride == 1 ? (Ahead){x.data, x.data + kc, n, kc, x.stride}
                           : (Ahead){x.data, x.data + n, kc, n, x.k_stride};
}

/* ---- microkernel -------------------------------------------------------------------------------------------- */

/* What becomes of a finished tile: c = tile + bias, or c += tile. */
typedef struct {
    const float *bias;
    int accumulate;
} Epilogue;

/* acc += MR of a times NR of b */
static inline __attribute__((always_inline)) void multiply_add(vf acc[MR][NV], const float *a, const float *b) {
    vf bk[NV];
    for (int j = 0; j < NV; j++) bk[j] = vf_load(b + j * VF_LEN);
    for (int i = 0; i < MR; i++) {
        vf ai = vf_set1(a[i]);
        for (int j = 0; j < NV; j++) acc[i][j] = vf_fma(ai, bk[j], acc[i][j]);
    }
}

/* c[0..m)[0..n) (ldc) from packed panels a (kc x MR) and b (kc x NR); m <= MR, n <= NR. */
static inline void microkernel(float *restrict c, int64_t ldc, const float *restrict a, const float *restrict b,
                               int64_t kc, int64_t m, int64_t n, Epilogue epilogue, Ahead *ahead) {
    vf acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = vf_set1(0.0f);
    for (int64_t i = 0; i < m; i++) /* C is far away: its lines come while the products are computed */
        for (int j = 0; j < NV; j++) __builtin_prefetch(c + i * ldc + j * VF_LEN, 0);
    int64_t k = 0;
    for (; k + PACE <= kc; k += PACE, a += PACE * MR, b += PACE * NR) {
        call_a_line(ahead);
#pragma GCC unroll 1 /* 16 registers would spill */
        for (int u = 0; u < PACE; u++) multiply_add(acc, a + u * MR, b + u * NR);
    }
    for (; k < kc; k++, a += MR, b += NR) multiply_add(acc, a, b);
    if (m == MR && n == NR) {
        for (int j = 0; j < NV; j++) {
            vf add = epilogue.bias ? vf_load(epilogue.bias + j * VF_LEN) : vf_set1(0.0f);
            for (int i = 0; i < MR; i++) {
                float *to = c + i * ldc + j * VF_LEN;
                vf_store(to, vf_add(acc[i][j], epilogue.accumulate ? vf_load(to) : add));
            }
        }
    } else { /* an edge: by way of a full tile in memory, so that acc is never indexed by a variable */
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

/* c (m x n) from packed a and b: a panel of A stays in the nearest cache while the panels of B pass. */
static void multiply_packed(float *c, int64_t ldc, const float *a, const float *b, int64_t m, int64_t n, int64_t kc,
                            Epilogue epilogue, Ahead ahead) {
    const float *bias = epilogue.bias;
    for (int64_t i = 0; i < m; i += MR)
        for (int64_t j = 0; j < n; j += NR) {
            if (bias) epilogue.bias = bias + j;
            microkernel(c + i * ldc + j, ldc, a + i * kc, b + j * kc, kc, min64(MR, m - i), min64(NR, n - j), epilogue,
                        &ahead);
        }
}

/* ---- the product -------------------------------------------------------------------------------------------- */

/* C in tasks: nt columns by mt rows of a block of MB rows, all rows of the first columns first. */
typedef struct {
    int64_t nt, mt, rows, count; /* rows: tasks above each other */
} Tasks;

/* Wide tasks, since B is packed for each nt columns; low ones, so that nobody waits long for the last. */
static Tasks divide(int64_t mb, int64_t N, int64_t kc, int threads) {
    enum { PRODUCTS = 1 << 20 }; /* of a task: some ten microseconds */
    const int64_t wide = ceil_div(N, NR) / (4 * threads);
    Tasks tasks;
    tasks.nt = NR * (wide < 1 ? 1 : min64(wide, NT / NR));
    tasks.mt = round_up(min64(mb, ceil_div(PRODUCTS, tasks.nt * kc)), MR);
    tasks.rows = ceil_div(mb, tasks.mt);
    tasks.count = ceil_div(N, tasks.nt) * tasks.rows;
    return tasks;
}

void gemm(float *c, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int64_t M, int64_t N,
          int64_t K, float *scratch, Team *team) {
    const int64_t depth = round_up(ceil_div(K, ceil_div(K, KC)), PACE); /* KC or less, in equal parts */
    float *packed_a = scratch, *packed_b = scratch + (int64_t)KC * (MB + (int64_t)team->member * NT);
    for (int64_t pc = 0; pc < K; pc += depth)
        for (int64_t ic = 0; ic < M; ic += MB) {
            const int64_t kc = min64(depth, K - pc), mb = min64(MB, M - ic);
            const Tasks tasks = divide(mb, N, kc, team->threads);
            int64_t packed = -1; /* the columns that are in packed_b */
            for_shared (group, ceil_div(mb, GROUP * MR), worth(GROUP * MR * kc), team) {
                const int64_t i = group * GROUP * MR;
                pack(packed_a + i * kc, shifted(a, ic + i, pc), min64(GROUP * MR, mb - i), kc, MR);
            }
            for_shared (task, tasks.count, worth(tasks.mt * tasks.nt * kc / 16), team) {
                const int64_t i = task % tasks.rows * tasks.mt, j = task / tasks.rows * tasks.nt;
                const int64_t next_j = (task + 1) / tasks.rows * tasks.nt, n = min64(tasks.nt, N - j);
                Ahead ahead = {0};
                if (next_j > j && next_j < N) /* what most likely follows */
                    ahead = to_be_packed(shifted(b, next_j, pc), min64(tasks.nt, N - next_j), kc);
                if (packed != j) pack(packed_b, shifted(b, j, pc), n, kc, NR);
                packed = j;
                multiply_packed(c + (ic + i) * ldc + j, ldc, packed_a + i * kc, packed_b, min64(tasks.mt, mb - i), n,
                                kc, (Epilogue){pc == 0 && bias ? bias + j : NULL, accumulate || pc > 0}, ahead);
            }
        }
}
